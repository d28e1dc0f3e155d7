"""What a trial asks for, what it fixes before its first run, and the runs it consists of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .statistics import LEVEL, looks

CONTROLS = ("params", "flops", "seconds")
BUDGETS = ("tokens", "flops", "seconds")


@dataclass(frozen=True)
class Design:
    """A trial as a user asks for it. Run it with :class:`lmplay.Trial`.

    exp: the ideas: names of variants or files, each with settings if it has any, such as
        "NAME optimizer.name=muon". One that is the baseline is left out.
    against: the baseline, in the same form; None: the first idea's own.
    training_plan: name or file of the plan.
    tokens: budget instead of the plan's.
    max_pairs: pairs at most per idea.
    smallest_effect: nats per token; smaller effects are WITHIN NOISE.
    level: how often a REAL or HARMFUL may be wrong.
    tuned: choose each arm's learning rate first.
    tune: settings of the recipe to choose first instead, such as "optimizer.weight_decay".
    tune_tries: runs with which they are chosen, for each arm.
    budget: what the arms of a pair have in common: "tokens", "flops" or "seconds" of training.
    screen: drop ideas that three pairs show to be no better.
    contexts: names of the plan's contexts in which the question is asked; None: all that the plan
        has; empty: the plan's own recipe only.
    controls: baselines of equal "params", "flops" or "seconds" that a REAL must beat as well.
    sizes: widths of the model, as multiples of the plan's; empty: the plan's only.
    mini_batch_size: sequences in a forward pass.
    """

    exp: tuple[str, ...]
    against: str | None = None
    training_plan: str = "laptop"
    tokens: int | None = None
    max_pairs: int = 20
    smallest_effect: float = 0.005
    level: float = LEVEL
    tuned: bool = True
    tune: tuple[str, ...] = ()
    tune_tries: int = 10
    budget: str = "tokens"
    screen: bool = False
    contexts: tuple[str, ...] | None = None
    controls: tuple[str, ...] = ()
    sizes: tuple[float, ...] = ()
    mini_batch_size: int = 4
    device: str = "auto"
    amp: bool = False


@dataclass(frozen=True)
class FixedDesign:
    """What is written down before the first run and must not change.

    The end point of a run is the mean loss of its last `last` validations: of one where the
    learning rate has come down, of three where it has not and the loss still jumps.

    against, arms: variants, followed by their settings, as in "NAME-optimizer.name=muon".
    context: name of the plan's context, "" for the plan's own recipe.
    knobs: by arm and setting that is tuned: the range in which it is tried. integers: those
        that are integers.
    noise: the paired standard deviation of the plan's certificate; None if it has none.
    data: fingerprint of the tokens. sources: digest of each arm's file.
    """

    plan: str
    plan_fingerprint: str
    against: str
    arms: tuple[str, ...]
    level: float
    max_pairs: int
    smallest_effect: float
    tuned: bool
    controls: tuple[str, ...]
    tokens: int
    precision: str
    device: str
    data: str
    sources: dict[str, str]
    last: int = 3
    context: str = ""
    budget: str = "tokens"
    screen: bool = False
    noise: float | None = None
    tune_tries: int = 0
    integers: tuple[str, ...] = ()
    knobs: dict[str, dict[str, tuple[float, float]]] = field(default_factory=dict)

    @property
    def looks(self) -> list[int]:
        """Numbers of pairs after which the test is made."""
        return looks(self.max_pairs, self.level, len(self.arms))

    @property
    def every_arm(self) -> tuple[str, ...]:
        """The baseline and the arms."""
        return (self.against, *self.arms)


@dataclass(frozen=True)
class Unit:
    """One run of a trial.

    role: "lr" (choosing a learning rate), "knobs" (choosing other settings), "cost" (measuring what
        a token costs), "pair" or "control".
    lr_multiplier: of the plan's learning rates.
    share: fraction of the trial's token budget.
    settings: of the recipe, instead of the arm's, as "KEY=VALUE,KEY=VALUE".
    match, of: what a control has in common ("params", "flops" or "seconds") with which idea.
    """

    role: str
    arm: str
    seed: int
    lr_multiplier: float = 1.0
    share: float = 1.0
    match: str = ""
    of: str = ""
    settings: str = ""

    @property
    def key(self) -> str:
        parts = [self.role, self.arm, f"s{self.seed}"]
        parts += [f"lr{self.lr_multiplier:g}", f"x{self.share:.6g}"]
        return " ".join([*parts, self.match, self.of, self.settings]).strip()

    @classmethod
    def from_fields(cls, fields: Mapping[str, Any]) -> Unit:
        """Return the unit from its stored fields; version 0.2 stored another name."""
        names = {"factor": "lr_multiplier"}
        return cls(**{names.get(key, key): value for key, value in fields.items()})


@dataclass(frozen=True)
class Result:
    """What a run ended with.

    loss (nats per token) and bpb are end points, infinite if the run diverged. tokens and losses
    are its validation curve. accuracy: of the last validation; None in journals of before 2026-12.
    """

    loss: float
    bpb: float
    tokens: list[float]
    losses: list[float]
    seconds: float
    flops: float
    folder: str
    accuracy: float | None = None


Results = Mapping[str, Result]
"""Results by :attr:`Unit.key`."""
