"""Matched controls: the baseline with as many parameters or FLOPs as an experiment."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from ..api import Batch, ModelRunner
from ..discover import Experiment
from ..errors import LmplayError
from ..model import build_model, count_flops, count_inference_flops, parameter_counts

TOLERANCE = 0.02  # a larger difference is mentioned
UNITS = {"params": "parameters", "flops": "training FLOPs per token"}


@dataclass(frozen=True)
class Size:
    """What a model costs: parameters, and FLOPs per token in training and in use."""

    parameters: int
    training_only: int
    folded: int  # parameters of the folded model
    flops: float
    inference_flops: float


@dataclass(frozen=True)
class Match:
    """A control: the baseline with `field` set to `value`, which costs `reached` where `wanted` is
    the goal."""

    what: str
    to: str
    field: str
    value: int
    before: int
    wanted: float
    reached: float
    of: str = ""  # digest of the idea's code; if it changes, the match is made again

    @property
    def off(self) -> float:
        return self.reached / self.wanted - 1

    def sentence(self) -> str:
        near = (
            "" if abs(self.off) <= TOLERANCE else f", more than {TOLERANCE:.0%}: no size is closer"
        )
        return (
            f"matched to {self.to} in {UNITS[self.what]}: {self.field} {self.before} -> "
            f"{self.value}, "
            f"{self.reached:.4g} for {self.wanted:.4g} ({self.off:+.2%}{near})"
        )


def measure(runner: ModelRunner, batch: Batch, passes: int = 1) -> Size:
    """Return the size of the runner's model; `batch` and `passes` as in count_flops."""
    model = build_model(runner, 0).to(batch.ids.device)
    parameters, training_only = parameter_counts(runner, model)
    folded = sum(p.numel() for p in runner.fold(model).parameters())
    flops = count_flops(runner, model, batch, passes)
    return Size(
        parameters, training_only, folded, flops, count_inference_flops(runner, model, batch)
    )


def random_batch(experiment: Experiment, config: Any) -> Batch:
    """Return a sequence of random tokens to measure a model's cost with."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(config.vocab_size, (1, config.max_len), generator=generator)
    labels = experiment.adaptation.labels if experiment.adaptation else ()
    return Batch(ids, ids % len(labels) if labels else ids)


def compare_sizes(own: Size, base: Size, name: str) -> str:
    """Return a line that compares an experiment's size with its baseline's."""
    parts = [
        f"{what} {mine / theirs - 1:+.1%}"
        for what, mine, theirs in (
            ("parameters", own.parameters, base.parameters),
            ("in use", own.folded, base.folded),
            ("FLOPs per token in training", own.flops, base.flops),
            ("in use", own.inference_flops, base.inference_flops),
        )
    ]
    return f"compared with {name}: {', '.join(parts)}"


def match(
    wanted: Size, to: str, baseline: Experiment, config: Any, what: str, device: torch.device
) -> Match:
    """Return the width or depth, whichever is closer, at which the baseline costs as much as
    `wanted`.

    Args:
        config: the baseline's, at the plan's sizes. Width keeps its number of heads.
        what: "params" (all trained parameters, training-only ones included) or "flops".

    Raises:
        LmplayError: the baseline's Config has neither embed_dim nor num_blocks.
    """
    goal = float(wanted.parameters if what == "params" else wanted.flops)

    def cost(field: str, unit: int, steps: int) -> float:
        runner = baseline.runner(dataclasses.replace(config, **{field: steps * unit}))
        if what == "params":
            with torch.device("meta"):
                return float(parameter_counts(runner, runner.build())[0])
        batch = random_batch(baseline, config)
        model = build_model(runner, 0).to(device)
        return count_flops(runner, model, Batch(batch.ids.to(device), batch.targets.to(device)))

    found = []
    for field, unit in (("embed_dim", getattr(config, "num_heads", 1)), ("num_blocks", 1)):
        if hasattr(config, field):
            before = getattr(config, field)
            steps, reached = _nearest(partial(cost, field, unit), goal, max(1, before // unit))
            found.append(Match(what, to, field, steps * unit, before, goal, reached))
    if not found:
        raise LmplayError(
            f"--match: {baseline.variant} has neither embed_dim nor num_blocks to change"
        )
    return min(found, key=lambda m: abs(m.off))


def _nearest(cost: Callable[[int], float], wanted: float, start: int) -> tuple[int, float]:
    """Return the n >= 1 whose cost, which grows with n, is closest to `wanted`, and that cost."""
    known: dict[int, float] = {}

    def at(n: int) -> float:
        if n not in known:
            known[n] = cost(n)
        return known[n]

    high = start
    while at(high) < wanted:
        high = math.ceil(high * 1.5)
    low = min(start, high)
    while low > 1 and at(low) > wanted:
        low = max(1, low // 2)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if at(middle) < wanted else (low, middle)
    best = min({low, high}, key=lambda n: abs(at(n) - wanted))
    return best, at(best)
