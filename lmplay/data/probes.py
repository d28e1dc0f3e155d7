"""The source `probe`: two synthetic tasks that ask whether a model can use its context at all.

Sequences are generated for as long as a run lasts; none is read twice but by chance. Symbols are
letters, one byte each. Only what the context determines counts in the loss, so an accuracy of 1 is
possible, and 1/26 is luck.

recall: multi-query associative recall (Arora et al. 2023, arXiv 2312.04927, section 3.1). Keys with
values, then keys that were shown, in any order; the model has to say their values.

    ag kb xq ... | kb xq kb ag ...     the second letter of each pair behind | counts

In sequences of more than 104 letters there are dots at |, so that the answer is far back.

copy: a segment of random symbols, again and again; after its first end everything can be copied
from what followed the same symbol before (induction: Olsson et al. 2022, arXiv 2209.11895). The
segments' lengths differ, so the distance to copy from must be found in the text.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

import numpy as np
from pydantic import Field

from .source import Source, digest
from .token_files import Progress, Tokens
from .tokenizers import Tokenizer

if TYPE_CHECKING:
    from ..plan import Plan

SYMBOLS = np.frombuffer(b"abcdefghijklmnopqrstuvwxyz", np.uint8)
SHORTEST = 8  # segment
DENSE = 4 * len(SYMBOLS)  # letters of a longer sequence of recall; the rest is GAP
GAP = ord(".")
CHUNK = 4096  # sequences made at a time


class ProbeSource(Source):
    """A synthetic task without end."""

    source: Literal["probe"] = "probe"
    task: Literal["recall", "copy"]
    seed: int = Field(0, ge=0)

    @property
    def has_documents(self) -> bool:
        return False

    def check_plan(self, plan: Plan) -> None:
        length = plan.model.max_len or 0
        if plan.tokenizer.kind != "bytes":
            raise ValueError("a probe's symbols are bytes: it needs the tokenizer bytes")
        if length % 8 or length < 4 * SHORTEST:
            raise ValueError(
                f"a probe's sequences fill max_len, a multiple of 8 from {4 * SHORTEST} on"
            )
        for stage in plan.steps:
            if not (stage.tokens or stage.steps) or stage.epochs:
                raise ValueError("a probe has no end: give its stage tokens or steps, no epochs")

    def tokens(self, name: str, tokenizer: Tokenizer, plan: Plan, progress: Progress) -> Tokens:
        """Generate as many sequences as the plan's stages read, and the validation set."""
        length = plan.model.max_len or 0
        read = 0
        for stage in plan.steps:
            tokens = max(stage.tokens or 0, stage.fp32_tokens or 0)
            batches = stage.steps or math.ceil(tokens / (length * plan.batch.batch_size))
            read += batches * plan.batch.batch_size
        parts = {}
        for split, (number, sequences) in {
            "val": (0, math.ceil(plan.validation.tokens / length)),
            "train": (1, read),
        }.items():
            progress(f"generating {sequences} sequences of the probe {self.task}", None)
            # Full chunks, so that a longer run reads the same sequences first.
            chunks = [
                self.generate(np.random.default_rng([self.seed, number, chunk]), CHUNK, length)
                for chunk in range(math.ceil(sequences / CHUNK))
            ]
            # One more token, so that the last sequence is complete.
            size = sequences * length
            ids = np.append(np.concatenate([i.ravel() for i, _ in chunks])[:size], SYMBOLS[0])
            mask = np.append(np.concatenate([m.ravel() for _, m in chunks])[:size], False)
            parts[split] = (ids, mask.astype(np.uint8))
        # Not the number of training sequences: a longer run reads the same ones first.
        fingerprint = digest("probe", self.task, self.seed, length, plan.validation.tokens)
        return Tokens(
            name,
            parts["train"][0],
            parts["val"][0],
            parts["train"][1],
            parts["val"][1],
            fingerprint,
        )

    def generate(
        self, generator: np.random.Generator, sequences: int, length: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return token ids (m, T) uint8, and which of them count (m, T) bool."""
        make = _recall if self.task == "recall" else _copy
        return make(generator, sequences, length)


def _recall(
    generator: np.random.Generator, sequences: int, length: int
) -> tuple[np.ndarray, np.ndarray]:
    letters = min(length, DENSE)
    pairs = letters // 8
    keys = _distinct(generator, sequences, pairs)
    values = SYMBOLS[generator.integers(len(SYMBOLS), size=keys.shape)]
    asked = generator.integers(pairs, size=(sequences, letters // 2 - pairs))
    which = np.concatenate([np.tile(np.arange(pairs), (sequences, 1)), asked], 1)
    both = [np.take_along_axis(part, which, 1) for part in (keys, values)]
    counted = np.zeros((sequences, letters), bool)
    counted[:, 2 * pairs + 1 :: 2] = True
    ids = np.stack(both, -1).reshape(sequences, letters)
    gap = (sequences, length - letters)

    def spread(part: np.ndarray, filler: int) -> np.ndarray:
        middle = np.full(gap, filler, part.dtype)
        return np.concatenate([part[:, : 2 * pairs], middle, part[:, 2 * pairs :]], 1)

    return spread(ids, GAP), spread(counted, 0)


def _copy(
    generator: np.random.Generator, sequences: int, length: int
) -> tuple[np.ndarray, np.ndarray]:
    longest = min(len(SYMBOLS), length // 2)
    segments = _distinct(generator, sequences, longest)
    period = generator.integers(SHORTEST, longest + 1, size=(sequences, 1))
    position = np.arange(length)
    ids = np.take_along_axis(segments, position % period, 1)
    # Nothing says where the first segment ends: what follows it must be seen once.
    return ids, np.broadcast_to(position, ids.shape) > period


def _distinct(generator: np.random.Generator, rows: int, count: int) -> np.ndarray:
    """Return (rows, count) symbols, each row without repetition."""
    order = generator.permuted(np.tile(np.arange(len(SYMBOLS)), (rows, 1)), axis=1)
    return SYMBOLS[order[:, :count]]
