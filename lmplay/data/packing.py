"""Sequences in a fixed order.

Sequence i of a data set is the tokens [iT, iT + T); its targets are shifted by one. Nothing is
padded, and no two sequences overlap. (A labeled example is a sequence of its own, and is padded.)
The plan's seed, the stage, the data set, the epoch and the
position decide which sequence is read where. So every experiment, run seed and mini-batch size
reads the same data, a resumed run computes its position directly, and each of several processes
computes its own share.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from ..errors import LmplayError
from ..ops import IGNORE
from ..plan import Plan
from .examples import Examples
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
    keys = [np.uint64(seed_of_order(key, r)) for r in range(6)]

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


def seed_of_order(*parts: object) -> int:
    """Return 64 bits that depend on every part."""
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


def stacked(pairs: list[tuple[np.ndarray, np.ndarray]]) -> Arrays:
    """Return sequences, ids and targets (T,) each, as one batch."""
    return Arrays(np.stack([i for i, _ in pairs]), np.stack([t for _, t in pairs]))


class Sequences(Protocol):
    """The sequences of one split of a data set."""

    name: str

    def __len__(self) -> int: ...

    def sequence(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Return ids and targets (T,)."""
        ...


class Packed:
    """Sequences of one split that fill the length with one document after another."""

    def __init__(self, tokens: Tokens, split: str, length: int):
        self.name = tokens.name
        self.length = length
        self.ids, self.mask = (
            (tokens.train, tokens.train_mask) if split == "train" else (tokens.val, tokens.val_mask)
        )

    def __len__(self) -> int:
        return max(0, (len(self.ids) - 1) // self.length)

    def sequence(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        return window(self.ids, self.mask, number, self.length)


def sequences_of(plan: Plan, tokens: Tokens, split: str, length: int) -> Sequences:
    """Return the training or validation sequences ("train", "val") of a data set."""
    if plan.classify is None:
        return Packed(tokens, split, length)
    return Examples(tokens, split, length, plan.classify.label_as == "text")


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


def why_empty(tokens: Tokens, split: str) -> str:
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


def _first_sequences(
    tokens: Tokens, budget: int, length: int
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return the sequences of the first validation tokens; the last one may end early."""
    n = min(len(tokens.val), budget + 1)
    mask = None if tokens.val_mask is None else tokens.val_mask[:n]
    count = (n - 2) // length + 1
    return [window(tokens.val[:n], mask, s, length) for s in range(count)]


def spread(n: int, most: int) -> np.ndarray:
    """Return up to `most` numbers below n, evenly spread."""
    return np.unique(np.linspace(0, n - 1, min(n, most)).round().astype(int))


class ValidationSet:
    """A plan's validation set: the first validation tokens of each data set, or labeled examples
    from all over it."""

    def __init__(self, plan: Plan, prepared: Prepared, length: int):
        names = plan.used_datasets
        budget = max(1, plan.validation.tokens // len(names))
        self.length = length
        self.by_dataset = {}
        self.examples: dict[str, tuple[Examples, np.ndarray]] = {}
        for name in names:
            tokens = prepared.tokens[name]
            if len(tokens.val) < 2:
                raise LmplayError(f"data set {name}: {why_empty(tokens, 'val')}")
            if plan.classify is None:
                self.by_dataset[name] = _first_sequences(tokens, budget, length)
            else:
                as_text = plan.classify.label_as == "text"
                examples = Examples(tokens, "val", length, as_text)
                chosen = spread(len(examples), math.ceil(budget / length))
                self.examples[name] = (examples, chosen)
                self.by_dataset[name] = [examples.sequence(int(number)) for number in chosen]

    def sequences(self, name: str | None = None) -> list[tuple[np.ndarray, np.ndarray]]:
        """Return ids and targets (T,) of each sequence, of one data set or of all."""
        return [
            pair for own, pairs in self.by_dataset.items() if name in (None, own) for pair in pairs
        ]

    def batches(self, size: int) -> Iterator[Arrays]:
        """Yield all sequences, `size` at a time; the last one of a data set may end early."""
        pairs = self.sequences()
        for start in range(0, len(pairs), size):
            yield stacked(pairs[start : start + size])
