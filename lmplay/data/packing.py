"""Packed sequences in a fixed order.

Sequence i of a data set is the tokens [iT, iT + T); its targets are shifted by one. Nothing is
padded, and no two sequences overlap. The plan's seed, the stage, the data set, the epoch and the
position decide which sequence is read where. So every experiment, run seed and mini-batch size
reads the same data, a resumed run computes its position directly, and each of several processes
computes its own share.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from ..errors import LmplayError
from ..ops import IGNORE
from ..plan import Plan, PlanStage
from .prepare import Prepared
from .token_files import Tokens


def permute(index: np.ndarray, n: int, key: int) -> np.ndarray:
    """Pseudo-random permutation of range(n), evaluated at `index` only.

    A balanced Feistel network of six rounds (Luby & Rackoff 1988) on the smallest domain 4^k >= n,
    repeated until the value is below n ("cycle walking", Black & Rogaway 2002). A shuffled array
    per epoch would be simpler, but every number in docs/results.md depends on this order.

    index (m,) with values in [0, n) -> (m,) uint64.
    """
    half = max(1, ((n - 1).bit_length() + 1) // 2)
    mask = np.uint64((1 << half) - 1)
    shift = np.uint64(half)
    keys = [np.uint64(_hash(key, r)) for r in range(6)]

    def encrypt(x: np.ndarray) -> np.ndarray:
        left = x >> shift
        right = x & mask
        for k in keys:
            mixed = (right + k) * np.uint64(0x9E3779B97F4A7C15)
            mixed ^= mixed >> np.uint64(29)
            mixed *= np.uint64(0xBF58476D1CE4E5B9)
            left, right = right, left ^ ((mixed >> np.uint64(32)) & mask)
        return (left << shift) | right

    out = encrypt(index.astype(np.uint64))
    while (outside := out >= n).any():
        out[outside] = encrypt(out[outside])
    return out


def _hash(*parts: object) -> int:
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "big")


def share(batch_size: int, rank: int, world: int) -> slice:
    """Return the part of a batch that process `rank` of `world` reads."""
    return slice(batch_size * rank // world, batch_size * (rank + 1) // world)


@dataclass(frozen=True)
class Arrays:
    """Sequences: ids and targets (m, T) int64; targets are IGNORE where no loss is counted."""

    ids: np.ndarray
    targets: np.ndarray

    @property
    def n_tokens(self) -> int:
        return int((self.targets != IGNORE).sum())


class Mixture:
    """The sequences of one plan stage, in order.

    Data sets take turns in a repeating pattern: one turn each, or by weights in a pattern of about
    1000 turns that spreads each data set's turns evenly.
    """

    PATTERN = 1000

    def __init__(self, stage: PlanStage, number: int, sets: list[Tokens], length: int, seed: int):
        self.stage = stage
        self.number = number
        self.length = length
        self.seed = seed
        self.sets = sets
        self.sizes = np.array([max(0, (len(t.train) - 1) // length) for t in sets])
        for tokens, size in zip(sets, self.sizes, strict=True):
            if size == 0:
                if len(tokens.train) == 0 and tokens.documents:
                    raise LmplayError(f"data set {tokens.name}: {_why_empty(tokens, 'train')}")
                raise LmplayError(
                    f"data set {tokens.name}: {len(tokens.train)} training tokens are too few for "
                    f"a sequence of {length}: more text, or a smaller max_len?"
                )
        counts = self._turns()
        # Put the c turns of a data set at (i + 1/2) / c; sorting spreads them evenly.
        places = [((i + 0.5) / c, d, i) for d, c in enumerate(counts) for i in range(c)]
        ordered = sorted(places)
        self.pattern = np.array([d for _, d, _ in ordered])
        self.nth = np.array([i for _, _, i in ordered])
        self.turns = np.array(counts)

    def _turns(self) -> list[int]:
        weights = self.stage.weights
        if weights is None:
            return [1] * len(self.sets)
        total = sum(weights)
        return [max(1, round(self.PATTERN * w / total)) for w in weights]

    @property
    def sequences(self) -> int:
        """Number of sequences in an epoch of this stage."""
        if self.stage.interleave == "concatenate":
            return int(self.sizes.sum())
        rounds = self.sizes / self.turns
        fit = rounds.min() if self.stage.interleave == "first_exhausted" else rounds.max()
        return max(1, int(fit * len(self.pattern)))

    def locate(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the data set and the sequence number, (m,) each, at these positions."""
        if self.stage.interleave == "concatenate":
            total = int(self.sizes.sum())
            flat = self._shuffled(positions, total, "all")
            which = np.searchsorted(np.cumsum(self.sizes), flat, side="right")
            return which, flat - (np.cumsum(self.sizes) - self.sizes)[which]
        rounds = positions // len(self.pattern)
        turn = positions % len(self.pattern)
        which = self.pattern[turn]
        nth = rounds * self.turns[which] + self.nth[turn]
        out = np.empty(len(positions), dtype=np.int64)
        for d, tokens in enumerate(self.sets):
            here = which == d
            out[here] = self._shuffled(nth[here], int(self.sizes[d]), tokens.name)
        return which, out

    def _shuffled(self, nth: np.ndarray, size: int, name: str) -> np.ndarray:
        """Return the nth draws from `size` sequences; each epoch has a new order."""
        out = np.empty(len(nth), dtype=np.int64)
        for epoch in np.unique(nth // size):
            here = nth // size == epoch
            key = _hash("order", self.seed, self.number, name, int(epoch))
            out[here] = permute(nth[here] % size, size, key).astype(np.int64)
        return out

    def batch(self, index: int, batch_size: int, rank: int = 0, world: int = 1) -> Arrays:
        """Return what process `rank` of `world` reads in optimizer step `index` of this stage."""
        part = share(batch_size, rank, world)
        positions = np.arange(index * batch_size + part.start, index * batch_size + part.stop)
        which, sequence = self.locate(positions)
        pairs = [
            window(self.sets[d].train, self.sets[d].train_mask, int(s), self.length)
            for d, s in zip(which, sequence, strict=True)
        ]
        return Arrays(np.stack([i for i, _ in pairs]), np.stack([t for _, t in pairs]))


def stage_steps(stage: PlanStage, sequences: int, batch_size: int, length: int) -> float:
    """Return the optimizer steps that a stage's budgets allow; inf if only time limits it.

    Args:
        sequences: in an epoch of the stage.
    """
    limits = [float(stage.steps)] if stage.steps else []
    if stage.tokens:
        limits.append(math.ceil(stage.tokens / (batch_size * length)))
    # A stage without a budget lasts one epoch.
    epochs = stage.epochs if stage.epochs or limits or stage.minutes else 1.0
    if epochs:
        limits.append(max(1, int(epochs * sequences) // batch_size))
    return min(limits, default=math.inf)


def window(
    tokens: np.ndarray, mask: np.ndarray | None, sequence: int, length: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return ids and targets (T,) of one sequence; past the last token the targets are IGNORE."""
    start = sequence * length
    window = np.asarray(tokens[start : start + length + 1]).astype(np.int64)
    ids = np.zeros(length, np.int64)
    targets = np.full(length, IGNORE, np.int64)
    ids[: len(window[:-1])] = window[:-1]
    targets[: len(window) - 1] = window[1:]
    if mask is not None:
        counted = np.asarray(mask[start + 1 : start + length + 1]).astype(bool)
        targets[: len(counted)][~counted] = IGNORE
    return ids, targets


def mixtures(plan: Plan, prepared: Prepared, length: int) -> list[Mixture]:
    """Return the sequences of each stage of the plan, `length` tokens long."""
    return [
        Mixture(
            stage, number, [prepared.tokens[name] for name in stage.datasets], length, plan.seed
        )
        for number, stage in enumerate(plan.steps)
    ]


def _why_empty(tokens: Tokens, split: str) -> str:
    """Return why a split has no text, and what to do."""
    count = sum(tokens.documents.values())
    part = "training" if split == "train" else "validation"
    if count == 1:
        return (
            f"its text is one document, which cannot be split into training and validation: end "
            f'documents with a blank line, or set "documents": "lines" (none is left for {part})'
        )
    known = f"of its {count} documents none" if count else "no document"
    change = "raise" if split == "val" else "lower"
    return (
        f"{known} fell into {part}; {change} validation.fraction, or make documents shorter "
        '("documents": "lines" takes each line of a text file as one)'
    )


class ValidationSet:
    """A plan's validation set: the first validation tokens of each data set."""

    def __init__(self, plan: Plan, prepared: Prepared, length: int):
        names = plan.used_datasets
        budget = max(1, plan.validation.tokens // len(names))
        self.length = length
        self.parts = []
        for name in names:
            tokens = prepared.tokens[name]
            n = min(len(tokens.val), budget + 1)
            if n < 2:
                raise LmplayError(f"data set {name}: {_why_empty(tokens, 'val')}")
            mask = None if tokens.val_mask is None else tokens.val_mask[:n]
            self.parts.append((name, tokens.val[:n], mask))

    def sequences(self, name: str | None = None) -> list[tuple[np.ndarray, np.ndarray]]:
        """Return ids and targets (T,) of each sequence, of one data set or of all."""
        return [
            window(tokens, mask, s, self.length)
            for own, tokens, mask in self.parts
            if name in (None, own)
            for s in range((len(tokens) - 2) // self.length + 1)
        ]

    def batches(self, size: int) -> Iterator[Arrays]:
        """Yield all sequences, `size` at a time; the last one of a data set may end early."""
        pairs = self.sequences()
        for start in range(0, len(pairs), size):
            chunk = pairs[start : start + size]
            yield Arrays(np.stack([i for i, _ in chunk]), np.stack([t for _, t in chunk]))
