"""The sequences of each stage of a plan, in the order in which they are read."""

from __future__ import annotations

import math

import numpy as np

from ..errors import LmplayError
from ..plan import Plan, PlanStage
from .examples import Examples
from .packing import (
    Arrays,
    Sequences,
    permute,
    seed_of_order,
    sequences_of,
    share,
    stacked,
    why_empty,
)
from .prepare import Prepared
from .windows import Windows


class Mixture:
    """The sequences of one plan stage, in order.

    Data sets take turns in a repeating pattern: one turn each, or by weights in a pattern of about
    1000 turns that spreads each data set's turns evenly.
    """

    PATTERN = 1000

    def __init__(self, stage: PlanStage, number: int, sets: list[Sequences], seed: int):
        self.stage = stage
        self.number = number
        self.seed = seed
        self.sets = sets
        self.sizes = np.array([len(s) for s in sets])
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

    def steps(self, batch_size: int, length: int) -> float:
        """Return the optimizer steps that the stage's budgets allow; inf if only time limits it."""
        stage = self.stage
        limits = [float(stage.steps)] if stage.steps else []
        if stage.tokens:
            limits.append(math.ceil(stage.tokens / (batch_size * length)))
        # A stage without a budget lasts one epoch.
        epochs = stage.epochs if stage.epochs or limits or stage.minutes else 1.0
        if epochs:
            limits.append(max(1, int(epochs * self.sequences) // batch_size))
        return min(limits, default=math.inf)

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
        for d, sequences in enumerate(self.sets):
            here = which == d
            out[here] = self._shuffled(nth[here], int(self.sizes[d]), sequences.name)
        return which, out

    def _shuffled(self, nth: np.ndarray, size: int, name: str) -> np.ndarray:
        """Return the nth draws from `size` sequences; each epoch has a new order."""
        out = np.empty(len(nth), dtype=np.int64)
        for epoch in np.unique(nth // size):
            here = nth // size == epoch
            key = seed_of_order("order", self.seed, self.number, name, int(epoch))
            out[here] = permute(nth[here] % size, size, key).astype(np.int64)
        return out

    def batch(self, index: int, batch_size: int, rank: int = 0, world: int = 1) -> Arrays:
        """Return what process `rank` of `world` reads in optimizer step `index` of this stage."""
        part = share(batch_size, rank, world)
        positions = np.arange(index * batch_size + part.start, index * batch_size + part.stop)
        which, sequence = self.locate(positions)
        return stacked(
            [self.sets[d].sequence(int(s)) for d, s in zip(which, sequence, strict=True)]
        )


def stages(plan: Plan, prepared: Prepared, length: int) -> list[Mixture | Windows]:
    """Return the sequences of each stage of the plan, `length` tokens long.

    Raises:
        LmplayError: a data set has none.
    """
    found: list[Mixture | Windows] = []
    for number, stage in enumerate(plan.steps):
        sets = []
        for name in stage.datasets:
            tokens = prepared.tokens[name]
            sets.append(sequences_of(plan, tokens, "train", length))
            if len(sets[-1]) == 0:
                if len(tokens.train) == 0 and tokens.documents:
                    raise LmplayError(f"data set {name}: {why_empty(tokens, 'train')}")
                raise LmplayError(
                    f"data set {name}: {len(tokens.train)} training tokens are too few for "
                    f"a sequence of {length}: more text, or a smaller max_len?"
                )
        if stage.stream is None:
            found.append(Mixture(stage, number, sets, plan.seed))
            continue
        (train,) = sets
        held_out = sequences_of(plan, prepared.tokens[stage.datasets[0]], "val", length)
        assert isinstance(train, Examples)
        assert isinstance(held_out, Examples)
        found.append(Windows(plan, stage, number, train, held_out))
    return found
