"""Caches for decoding: keys and values of a fixed window, and the protocol of endless streams."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor


class KVCache:
    """Preallocated keys and values of every attention layer.

    `keys` and `values` are (layers, B, H, max_len, h). The first `length` positions are filled.
    """

    def __init__(
        self, layers: int, batch_size: int, heads: int, max_len: int, head_dim: int, like: Tensor
    ):
        shape = (layers, batch_size, heads, max_len, head_dim)
        self.keys = torch.empty(shape, dtype=like.dtype, device=like.device)
        self.values = torch.empty(shape, dtype=like.dtype, device=like.device)
        self.length = 0

    @property
    def max_len(self) -> int:
        return self.keys.shape[3]

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append k and v (B, H, t, h) to one layer; return all its (B, H, length + t, h).

        Call :meth:`advance` once, after the last layer, to count the new positions.

        Raises:
            ValueError: the cache has no room for t more positions.
        """
        end = self.length + k.shape[2]
        if end > self.max_len:
            raise ValueError(f"the cache holds {self.max_len} positions, {end} were requested")
        self.keys[layer, :, :, self.length : end] = k
        self.values[layer, :, :, self.length : end] = v
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]

    def repeated(self, rows: int) -> KVCache:
        """Return a cache of `rows` texts that all begin as this one of a single text does."""
        layers, _, heads, max_len, head_dim = self.keys.shape
        cache = KVCache(layers, rows, heads, max_len, head_dim, self.keys)
        cache.keys.copy_(self.keys)
        cache.values.copy_(self.values)
        cache.length = self.length
        return cache

    def advance(self, t: int) -> None:
        """Count t positions as filled in every layer."""
        self.length += t


class Stream(Protocol):
    """A decoding cache for endless texts that consist of pieces of equal length.

    Each row of the batch is a text of its own, and rows may differ in length. Pass it to
    :meth:`ModelRunner.logits` as the cache. Its `max_len` positions hold the first token of the
    text and the latest pieces.
    """

    def make_room(self, tokens: int, piece: int) -> None:
        """Drop the oldest pieces of `piece` tokens in each row until `tokens` more fit."""

    def mark(self) -> Any:
        """Return what :meth:`roll_back` needs to return to this moment.

        The mark is valid until more tokens are read than fit now.
        """

    def roll_back(self, mark: Any, rows: Tensor) -> None:
        """Forget what was read since the mark, in the rows (B,) bool that are True."""
