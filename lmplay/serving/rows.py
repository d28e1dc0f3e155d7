"""Texts of different lengths that are decoded in one forward pass.

The cache of :mod:`lmplay.ops.kv_cache` has one length for all of its texts, and experiments compute
positions from it. Here each text has a length of its own. `torch.vmap` runs the model as if there
were one text, whose length is a tensor, so experiments need not know. Two calls need help, because
their result would depend on the length as a number: `torch.arange` for the new position, and
attention, which must not see the empty part of the cache.
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
    """What a model sees as its cache: one text, of a length that is a tensor."""

    def __init__(self, keys: Tensor, values: Tensor, length: Tensor):
        self.keys = keys  # (L, 1, H, W, h)
        self.values = values
        self.length = length  # ()
        self.seen = torch.arange(keys.shape[3], device=keys.device) <= length
        self.is_new = torch.arange(keys.shape[3], device=keys.device) == length
        self.new: dict[int, tuple[Tensor, Tensor]] = {}

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        self.new[layer] = (k, v)
        here = self.is_new.view(1, 1, -1, 1)
        return torch.where(here, k, self.keys[layer]), torch.where(here, v, self.values[layer])

    def advance(self, t: int) -> None:
        pass  # the owner counts


class _OneRow(TorchFunctionMode):
    """Gives `torch.arange` and attention what they need for a length that is a tensor."""

    def __init__(self, seen: Tensor):
        super().__init__()
        self.seen = seen  # (W): the filled positions, the new one included

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.arange and args and isinstance(args[0], Tensor):
            return args[0].reshape(1)  # one token is read, so this is all of the range
        if func is F.scaled_dot_product_attention:
            q, k, v, *mask = args
            if mask or kwargs.keys() - {"scale"}:
                raise TypeError("its attention has a mask of its own")
            # The fused operator would be called once for each text.
            scale = kwargs.get("scale") or q.shape[-1] ** -0.5
            scores = (q @ k.mT * scale).masked_fill(~self.seen, float("-inf"))
            return scores.softmax(-1) @ v
        return func(*args, **kwargs)


class BatchedRows:
    """One forward pass for all texts, with a cache that has room for `window` positions of each."""

    def __init__(self, runner: ModelRunner, model: nn.Module, slots: int, window: int):
        self.runner = runner
        self.model = model
        self.window = window
        cache = runner.new_cache(model, 1, window)
        if not isinstance(cache, KVCache):
            raise TypeError("this model has a cache of its own")
        shape = (slots, *cache.keys.shape)  # (S, L, 1, H, W, h)
        self.keys = cache.keys.new_zeros(shape)
        self.values = cache.values.new_zeros(shape)
        self.lengths = torch.zeros(slots, dtype=torch.long, device=cache.keys.device)
        self._decode = torch.vmap(self._one, in_dims=(0, 0, 0, 0), randomness="error")

    def _one(self, ids: Tensor, keys: Tensor, values: Tensor, length: Tensor) -> Any:
        cache: Any = _RowCache(keys, values, length)
        with _OneRow(cache.seen):
            logits, _ = self.runner.logits(self.model, ids.view(1, 1), cache)
        # A layer that keeps nothing in the cache writes what is there already.
        new = [cache.new.get(i, (keys[i][:, :, :1], values[i][:, :, :1])) for i in range(len(keys))]
        return logits[0], torch.stack([k for k, _ in new]), torch.stack([v for _, v in new])

    @torch.no_grad()
    def join(self, slot: int, ids: list[int]) -> Tensor:
        cache = self.runner.new_cache(self.model, 1, self.window)
        read = torch.tensor([ids], device=self.lengths.device)
        logits, _ = self.runner.logits(self.model, read, cache)
        filled = len(ids)
        self.keys[slot, ..., :filled, :] = cache.keys[..., :filled, :]
        self.values[slot, ..., :filled, :] = cache.values[..., :filled, :]
        self.lengths[slot] = filled
        return logits[0]

    @torch.no_grad()
    def step(self, tokens: dict[int, int]) -> dict[int, Tensor]:
        slots = torch.tensor(list(tokens), device=self.lengths.device)
        ids = torch.tensor(list(tokens.values()), device=self.lengths.device)
        lengths = self.lengths[slots]
        room = int(lengths.max()) + 1  # the rest of the window is empty in all of these texts
        logits, keys, values = self._decode(
            ids, self.keys[slots, ..., :room, :], self.values[slots, ..., :room, :], lengths
        )
        # Indices apart from each other put their dimension first: (S, L, 1, H, h).
        self.keys[slots, :, :, :, lengths] = keys.squeeze(-2)
        self.values[slots, :, :, :, lengths] = values.squeeze(-2)
        self.lengths[slots] += 1
        return dict(zip(tokens, logits, strict=True))


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
