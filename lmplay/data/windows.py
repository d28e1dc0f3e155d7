"""Windows of a stream: labeled examples in the order of their time."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from ..errors import LmplayError
from ..plan import Plan, PlanStage
from .examples import Examples
from .packing import Arrays, permute, seed_of_order, share, stacked


@dataclass(frozen=True)
class Window:
    """A stretch of time.

    start: seconds since 1970.
    examples: numbers (n,) of its training examples, in their order.
    known: those of them (m,) whose label was known when the window ended. Training is on them.
    held_out: numbers of its validation examples.
    first_step: of the stage, with which training on it begins. steps: how many there are.
    replayed: sequences of each batch that are from earlier windows.
    """

    start: float
    examples: np.ndarray
    known: np.ndarray
    held_out: np.ndarray
    first_step: int
    steps: int
    replayed: int


class Windows:
    """The sequences of a stage that is a stream: those of one window after another.

    Windows without examples to train on are left out.
    """

    def __init__(
        self, plan: Plan, stage: PlanStage, number: int, train: Examples, held_out: Examples
    ):
        assert stage.stream is not None
        self.number = number
        self.seed = plan.seed
        self.train = train
        self.held_out = held_out
        batch = plan.batch
        times = train.records["time"]
        length = stage.stream.seconds
        first = math.floor(times[0] / length)
        which = np.floor(times / length).astype(int) - first
        which_held = np.floor(held_out.records["time"] / length).astype(int) - first
        self.windows: list[Window] = []
        for n in np.unique(which):
            examples = np.flatnonzero(which == n)
            end = (first + n + 1) * length
            known = examples[train.records["known"][examples] < end]
            if not len(known):
                continue
            # Nothing is replayed in the first window.
            replayed = min(round(batch.replay * batch.batch_size), batch.batch_size - 1)
            replayed = replayed if self.windows else 0
            new = batch.batch_size - replayed
            self.windows.append(
                Window(
                    float((first + n) * length),
                    examples,
                    known,
                    np.flatnonzero(which_held == n),
                    self.steps(),
                    math.ceil(stage.stream.epochs * len(known) / new),
                    replayed,
                )
            )
        if len(self.windows) < 2:
            raise LmplayError(
                f"data set {train.name}: all its examples are in one window of "
                f"{stage.stream.window}; a stream needs two or more"
            )

    def steps(self, batch_size: int = 0, length: int = 0) -> int:
        """Return the optimizer steps of all windows; their sizes are the plan's."""
        return self.windows[-1].first_step + self.windows[-1].steps if self.windows else 0

    def starting_at(self, step: int) -> int | None:
        """Return the number of the window whose training begins with a step of the stage."""
        return next((n for n, w in enumerate(self.windows) if w.first_step == step), None)

    def at(self, step: int) -> Window:
        """Return the window of a step of the stage; the last one at its end."""
        return next(w for w in reversed(self.windows) if w.first_step <= step)

    def batch(self, index: int, batch_size: int, rank: int = 0, world: int = 1) -> Arrays:
        """Return what process `rank` of `world` reads in optimizer step `index` of the stage."""
        window = self.at(index)
        new = batch_size - window.replayed
        position = (index - window.first_step) * new + np.arange(new)
        size = len(window.known)
        chosen = np.empty(new, np.int64)
        for epoch in np.unique(position // size):
            here = position // size == epoch
            key = seed_of_order(self.seed, self.number, window.start, int(epoch))
            chosen[here] = window.known[permute(position[here] % size, size, key).astype(int)]
        if window.replayed:
            earlier = np.concatenate(
                [w.known for w in self.windows if w.first_step < window.first_step]
            )
            key = seed_of_order(self.seed, self.number, "replay", index)
            generator = np.random.default_rng(key)
            chosen = np.append(chosen, generator.choice(earlier, window.replayed))
        part = chosen[share(batch_size, rank, world)]
        return stacked([self.train.sequence(int(number)) for number in part])

    def label_frequencies(self, number: int, classes: int) -> np.ndarray:
        """Return the share of each label (C,) in the windows before window `number`."""
        before = [w.known for w in self.windows[:number]]
        labels = self.train.records["label"][np.concatenate(before)] if before else []
        counts = np.bincount(np.asarray(labels, np.int64), minlength=classes) + 1
        return counts / counts.sum()
