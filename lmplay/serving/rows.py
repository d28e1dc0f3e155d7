"""Texts of different lengths that are decoded in one forward pass.

The cache of :mod:`lmplay.ops.kv_cache` has one length for all of its texts, and experiments compute
positions from it. Here each text has a length of its own. Experiments need not know: the cache's
length is a tensor, and while the model runs, three calls are answered differently. `torch.arange`
from that tensor gives the position of each text (B, 1). Its `unsqueeze(1)`, with
which experiments compute rotations for all heads, gives (B, 1, 1, 1). And attention does not see
the empty part of the cache.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..api import KVCache, ModelRunner

TOLERANCE = 1e-3  # of the largest logit: both ways round differently


class Rows(Protocol):
    """Caches of up to `slots` texts."""

    def join(self, slot: int, ids: list[int]) -> Tensor:
        """Read a text into a slot; return the logits (V) behind it."""

    def step(self, tokens: dict[int, int]) -> dict[int, Tensor]:
        """Read the next token of each slot; return the logits (V) behind it, by slot."""


class _RowCache:
    """What a model sees as its cache: B texts, whose lengths are a tensor. One token is read."""

    def __init__(self, keys: Tensor, values: Tensor, lengths: Tensor, room: int):
        self.keys = keys  # (L, B, H, W, h)
        self.values = values
        self.lengths = lengths  # (B)
        self.length = torch.tensor(room - 1)  # only _PerRow knows what to make of it
        self.room = room
        self.rows = torch.arange(len(lengths), device=lengths.device)

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write k and v (B, H, 1, h) behind each text; return all (B, H, room, h)."""
        for cache, new in ((self.keys[layer], k), (self.values[layer], v)):
            cache[self.rows, :, self.lengths] = new.squeeze(2)
        return self.keys[layer][:, :, : self.room], self.values[layer][:, :, : self.room]

    def advance(self, t: int) -> None:
        pass  # the owner counts


class _PerRow(TorchFunctionMode):
    """Answers the calls that depend on a cache's length."""

    def __init__(self, lengths: Tensor, room: int):
        super().__init__()
        self.positions = lengths.unsqueeze(1)  # (B, 1)
        at = torch.arange(room, device=lengths.device)
        self.seen = (at <= self.positions).view(-1, 1, 1, room)  # the new position included

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.arange and args and isinstance(args[0], Tensor):
            return self.positions
        if func is Tensor.unsqueeze and args[0] is self.positions and args[1:] == (1,):
            return self.positions.view(-1, 1, 1, 1)
        if func is F.scaled_dot_product_attention:
            if len(args) > 3 or kwargs.get("attn_mask") is not None:
                raise TypeError("its attention has a mask of its own")
            kwargs["attn_mask"] = self.seen
        return func(*args, **kwargs)


class BatchedRows:
    """One forward pass for all texts, with a cache that has room for `window` positions of each."""

    def __init__(self, runner: ModelRunner, model: nn.Module, slots: int, window: int):
        self.runner = runner
        self.model = model
        self.window = window
        cache = runner.new_cache(model, slots, window)
        if not isinstance(cache, KVCache):
            raise TypeError("this model has a cache of its own")
        self.keys = cache.keys.zero_()  # (L, S, H, W, h)
        self.values = cache.values.zero_()
        self.lengths = torch.zeros(slots, dtype=torch.long, device=cache.keys.device)

    @torch.no_grad()
    def join(self, slot: int, ids: list[int]) -> Tensor:
        cache = self.runner.new_cache(self.model, 1, self.window)
        read = torch.tensor([ids], device=self.lengths.device)
        logits, _ = self.runner.logits(self.model, read, cache)
        filled = len(ids)
        self.keys[:, slot, :, :filled] = cache.keys[:, 0, :, :filled]
        self.values[:, slot, :, :filled] = cache.values[:, 0, :, :filled]
        self.lengths[slot] = filled
        return logits[0]

    @torch.no_grad()
    def step(self, tokens: dict[int, int]) -> dict[int, Tensor]:
        # All slots up to the last one are computed, because choosing some would copy the cache.
        # What is computed for an empty one is not used, and what it writes is overwritten.
        count = max(tokens) + 1
        ids = torch.tensor([[tokens.get(slot, 0)] for slot in range(count)])
        slots = torch.tensor(list(tokens), device=self.lengths.device)
        room = int(self.lengths[slots].max()) + 1
        lengths = self.lengths[:count].clamp(max=room - 1)
        cache: Any = _RowCache(self.keys[:, :count], self.values[:, :count], lengths, room)
        with _PerRow(lengths, room):
            logits, _ = self.runner.logits(self.model, ids.to(lengths.device), cache)
        self.lengths[slots] += 1
        return {slot: logits[slot] for slot in tokens}


class SingleRows:
    """A forward pass for each text, for models whose caches cannot be batched."""

    def __init__(self, runner: ModelRunner, model: nn.Module, window: int):
        self.runner = runner
        self.model = model
        self.window = window
        self.caches: dict[int, Any] = {}

    def _read(self, slot: int, ids: list[int]) -> Tensor:
        device = next(self.model.parameters()).device
        read = torch.tensor([ids], device=device)
        logits, self.caches[slot] = self.runner.logits(self.model, read, self.caches[slot])
        return logits[0]

    @torch.no_grad()
    def join(self, slot: int, ids: list[int]) -> Tensor:
        self.caches[slot] = self.runner.new_cache(self.model, 1, self.window)
        return self._read(slot, ids)

    @torch.no_grad()
    def step(self, tokens: dict[int, int]) -> dict[int, Tensor]:
        return {slot: self._read(slot, [token]) for slot, token in tokens.items()}


def make_rows(
    runner: ModelRunner, model: nn.Module, slots: int, window: int, vocab_size: int
) -> tuple[Rows, str]:
    """Return rows for a model, and why they are not batched ("" if they are).

    Batched rows are compared with single ones before they are used, on a text that nearly fills the
    window and on a short one.
    """
    single = SingleRows(runner, model, window)
    if slots == 1:
        return single, ""
    try:
        batched = BatchedRows(runner, model, slots, window)
        difference = _difference(batched, single, window, vocab_size)
    except (RuntimeError, TypeError, ValueError, IndexError, AttributeError, KeyError) as e:
        # whatever an experiment does with the length of a cache
        return SingleRows(runner, model, window), str(e).strip().splitlines()[0]
    if difference > TOLERANCE:
        reason = f"batched, its logits differ by {difference:.1e}"
        return SingleRows(runner, model, window), reason
    return BatchedRows(runner, model, slots, window), ""


def _difference(batched: Rows, single: Rows, window: int, vocab_size: int) -> float:
    """Return how far the logits of two texts differ, relative to the largest."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocab_size, (window,), generator=generator).tolist()
    found = []
    for rows in (batched, single):
        rows.join(0, ids[: max(1, window - 3)])
        rows.join(1, ids[:2])
        steps = [rows.step({0: ids[0], 1: ids[1]}), rows.step({1: ids[-1], 0: ids[-2]})]
        found.append(torch.stack([step[slot] for step in steps for slot in (0, 1)]))
    return float((found[0] - found[1]).abs().max() / found[1].abs().max())
