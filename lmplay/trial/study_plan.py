"""The files of lmp_study: which settings are tried, in which arenas, and how they are searched."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from ..errors import LmplayError, did_you_mean
from ..plan import Plan
from ..shipped import shipped

Value = bool | int | float | str
FOLDER = "studies"  # below training_plans


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Range(Strict):
    """Numbers between two ends, for a search."""

    low: float
    high: float
    log: bool = False
    integer: bool = False

    @model_validator(mode="after")
    def _ascending(self) -> Range:
        if not self.low < self.high:
            raise ValueError(f"low {self.low:g} is not below high {self.high:g}")
        if self.log and self.low <= 0:
            raise ValueError(f"log needs a low above 0, not {self.low:g}")
        return self


class StudyPlan(Strict):
    """What a study tries.

    arms: experiments, with settings if they have any, as for `lmp_trial --arm`.
    training_plans: names or files. lengths: sequence lengths instead of the plans' own.
    tokens: budget instead of the plans'.
    tokens_per_step: tokens of a batch, the same at each length.
    settings: by setting of a Config or of the recipe, the values to try, or the range of a search.
    search: "grid" tries all combinations; "random" and "tpe" (Bergstra et al. 2011) make `tries`.
    seeds: a cell's score is the mean over them.
    by_position: also measure the loss by position in the sequence, for the first seed.
    """

    schema_: str | None = Field(None, alias="$schema")
    description: str = ""
    arms: list[str] = Field(min_length=1)
    training_plans: list[str] = Field(["laptop"], min_length=1)
    lengths: list[int] = []
    tokens: int | None = Field(None, gt=0)
    tokens_per_step: int | None = Field(None, gt=0)
    settings: dict[str, list[Value] | Range] = {}
    search: Literal["grid", "random", "tpe"] = "grid"
    tries: int = Field(20, gt=0)
    seeds: list[int] = Field([0], min_length=1)
    by_position: bool = False

    @model_validator(mode="after")
    def _fits(self) -> StudyPlan:
        ranges = [key for key, values in self.settings.items() if isinstance(values, Range)]
        if self.search == "grid":
            if ranges:
                raise ValueError(f'settings.{ranges[0]}: a range needs "search": "random" or "tpe"')
            if "tries" in self.model_fields_set:
                raise ValueError("tries: a grid tries all combinations")
        elif len(self.arms) * len(self.training_plans) * max(1, len(self.lengths)) > 1:
            raise ValueError("a search has one arm, one training plan and one length at most")
        elif not self.settings:
            raise ValueError("settings: there is nothing to search")
        for key, values in self.settings.items():
            if isinstance(values, list) and (not values or len(set(values)) < len(values)):
                raise ValueError(f"settings.{key}: no value, or one that is there twice")
        return self

    def combinations(self) -> Iterator[dict[str, str]]:
        """Yield the settings of each cell of a grid, as text."""
        lists = {key: values for key, values in self.settings.items() if isinstance(values, list)}
        for chosen in itertools.product(*lists.values()):
            yield {key: as_text(value) for key, value in zip(lists, chosen, strict=True)}

    def arenas(self, plan: Plan, where: str) -> Iterator[tuple[int, Plan]]:
        """Yield each length (0: the plan's own) and the plan with it, and with the budget.

        Raises:
            LmplayError: a length does not divide the tokens of a step.
        """
        plan = plan.with_budget(self.tokens, None, None)
        for length in self.lengths or [0]:
            changed = plan
            if length:
                model = plan.model.model_copy(update={"max_len": length})
                changed = plan.model_copy(update={"model": model})
            own = changed.model.max_len or 0
            wanted = self.tokens_per_step or plan.batch.batch_size * (plan.model.max_len or 0)
            if length or self.tokens_per_step:
                if not own or wanted % own:
                    raise LmplayError(
                        f"{where}: sequences of {own} do not divide the {wanted} tokens of an "
                        "optimizer step; tokens_per_step sets another number"
                    )
                batch = plan.batch.model_copy(update={"batch_size": wanted // own})
                changed = changed.model_copy(update={"batch": batch})
            yield length, changed


def as_text(value: Value) -> str:
    """Return a value as --set takes it."""
    return value if isinstance(value, str) else json.dumps(value)


def study_files() -> dict[str, Path]:
    """Return every study by name: those of ./training_plans/studies, then the shipped ones."""
    found: dict[str, Path] = {}
    for folder in (shipped("training_plans"), Path("training_plans").resolve()):
        found |= {path.stem: path for path in sorted((folder / FOLDER).glob("*.json"))}
    return dict(sorted(found.items()))


def find_study(name: str) -> Path:
    """Return the file of a study, given its name or path.

    Raises:
        LmplayError: there is none.
    """
    if name.endswith(".json") or "/" in name:
        path = Path(name).expanduser()
        if not path.is_file():
            raise LmplayError(f"{name}: there is no such file")
        return path.resolve()
    known = study_files()
    if name not in known:
        raise LmplayError(
            f"{name}: there is no such study{did_you_mean(name, known)} "
            f"(there is: {', '.join(known) or 'none'})"
        )
    return known[name]


def load_study(path: Path) -> StudyPlan:
    """Read a study's file strictly.

    Raises:
        LmplayError: the file is not JSON, or a key or value is wrong; the message names it.
    """
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as e:
        raise LmplayError(f"{path}: this cannot be read as JSON: {e}") from e
    try:
        return StudyPlan.model_validate(raw)
    except ValidationError as e:
        errors = e.errors()  # of a list and of a range, where either may be
        error = next((error for error in errors if error["type"] == "value_error"), errors[0])
        place = ".".join(str(part) for part in error["loc"] if part != "Range")
        if error["type"] == "extra_forbidden":
            hint = did_you_mean(str(error["loc"][-1]), StudyPlan.model_fields)
            raise LmplayError(f"{path}: {place}: there is no such key{hint}") from e
        message = error["msg"].removeprefix("Value error, ")
        raise LmplayError(f"{path}: {place + ': ' if place else ''}{message}") from e


def schema() -> dict[str, Any]:
    """Return the JSON schema of a study's file, for editors."""
    return StudyPlan.model_json_schema()


def distribution_of(value: Any) -> Any:
    """Return optuna's distribution for a list of values or the fields of a Range."""
    from optuna.distributions import (
        CategoricalDistribution,
        FloatDistribution,
        IntDistribution,
    )

    if isinstance(value, list):
        return CategoricalDistribution(value)
    if value["integer"]:
        return IntDistribution(round(value["low"]), round(value["high"]), log=value["log"])
    return FloatDistribution(value["low"], value["high"], log=value["log"])


def value_of(text: str, distribution: Any) -> Any:
    """Return the value that a unit keeps as text, for one of optuna's distributions."""
    from optuna.distributions import CategoricalDistribution, IntDistribution

    if isinstance(distribution, CategoricalDistribution):
        return next(choice for choice in distribution.choices if shown(choice) == text)
    return int(text) if isinstance(distribution, IntDistribution) else float(text)


def shown(value: Any) -> str:
    """Return a value as a unit keeps it: numbers of a range with four digits."""
    if isinstance(value, float):
        return f"{value:.4g}"
    return value if isinstance(value, str) else json.dumps(value)
