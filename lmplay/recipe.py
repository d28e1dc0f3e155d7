"""Recipes: the parts of a training plan that an arm of a comparison may change.

A plan has two halves. Its arena is what a comparison holds fixed: tokenizer, data sets, validation,
stages, budgets, the length of a sequence and the order of the data. Its recipe is the rest:
optimizer, schedule, batch, model sizes and initialization. Runs in one arena are comparable
whatever their recipes.

A setting is a dotted key of the recipe, such as `optimizer.lr`, with a value. Settings come from
`--set`, from an experiment's VARIANTS and from a trial's arms.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from pydantic import TypeAdapter, ValidationError

from .errors import LmplayError, did_you_mean
from .plan import (
    TORCH_OPTIMIZERS,
    AnyOptimizer,
    BatchSpec,
    ModelSizes,
    Plan,
    Schedule,
    keys_at,
)
from .training.optimizer_specs import optimizers

PARTS: dict[str, Any] = {
    "model": ModelSizes,
    "optimizer": AnyOptimizer,
    "schedule": Schedule,
    "batch": BatchSpec,
}
OF_THE_ARENA = "model.max_len"
STAGE_KEYS = {"optimizer": ("optimizer", "lr"), "schedule": ("schedule",)}
"""What a stage may have of its own, instead of the plan's part."""


def is_setting(key: str) -> bool:
    """Return whether a key is a recipe's, not a field of a Config."""
    return "." in key


def split(settings: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the fields of a Config and the settings of the recipe."""
    fields = {k: v for k, v in settings.items() if not is_setting(k)}
    return fields, {k: v for k, v in settings.items() if is_setting(k)}


def every_key() -> list[str]:
    """Return all dotted keys."""
    known = [f"{part}.{key}" for part in PARTS for key in keys_at(Plan, [part])]
    return [key for key in known if key != OF_THE_ARENA]


def apply(plan: Plan, settings: Mapping[str, Any], where: str) -> Plan:
    """Return the plan with these settings of its recipe.

    Another `optimizer.name` starts from that optimizer's defaults.

    Args:
        settings: dotted keys and their values, as text or as JSON has them.
        where: what gave them, for errors, such as "--set".

    Raises:
        LmplayError: a key is unknown, a value does not fit, or a stage has such a part of its own.
    """
    changed: dict[str, dict[str, Any]] = {}
    for key, value in settings.items():
        part, _, name = key.partition(".")
        if key == OF_THE_ARENA:
            raise LmplayError(
                f"{where} {key}: the length of a sequence is the arena's, because runs of a plan "
                "read the same tokens; copy the plan to change it"
            )
        if part not in PARTS or not _could_be(part, name):
            raise LmplayError(
                f"{where} {key}: there is no such setting{did_you_mean(key, every_key())}"
            )
        changed.setdefault(part, {})[name] = _value(value)
    for part, values in changed.items():
        for stage in plan.steps:
            for own in STAGE_KEYS.get(part, ()):
                if getattr(stage, own) is not None:
                    raise LmplayError(
                        f"{where} {part}.{next(iter(values))}: the stage {stage.step_name} has its "
                        f"own {own}; copy the plan to change it"
                    )
        plan = plan.model_copy(update={part: _changed(plan, part, values, where)})
    try:
        plan.check_stream()
    except ValueError as e:
        raise LmplayError(f"{where}: {e}") from e
    return plan


def _could_be(part: str, name: str) -> bool:
    """Return whether a part has the key; an optimizer's plugin may have others."""
    return part == "optimizer" or name in keys_at(Plan, [part])


def _value(value: Any) -> Any:
    """Return a value as JSON has it. Text is a number if Python reads one (.004), else itself."""
    if not isinstance(value, str):
        return list(value) if isinstance(value, tuple) else value
    for read in (json.loads, float):
        try:
            return read(value)
        except ValueError:
            pass
    return value


def _changed(plan: Plan, part: str, values: dict[str, Any], where: str) -> Any:
    before = getattr(plan, part).model_dump(mode="json", exclude_unset=True)
    if part == "optimizer" and values.get("name", before.get("name")) != before.get("name"):
        before = {}
    try:
        return TypeAdapter(PARTS[part]).validate_python({**before, **values})
    except ValidationError as e:
        error = e.errors()[0]
        tags = (TORCH_OPTIMIZERS, *optimizers())  # of the union of optimizers, which are no keys
        keys = [part for part in error["loc"] if part not in tags]
        name = str(keys[-1]) if keys else next(iter(values))
        if error["type"] == "extra_forbidden":
            known = every_key()
            raise LmplayError(
                f"{where} {part}.{name}: there is no such setting"
                f"{did_you_mean(f'{part}.{name}', known)}"
            ) from e
        message = error["msg"].removeprefix("Value error, ")
        shown = f"{part}.{name}"
        given = f"={values[name]}" if name in values else ""
        raise LmplayError(f"{where} {shown}{given}: {message}") from e


def in_context(plan: Plan, name: str) -> Plan:
    """Return the plan with the recipe of one of its contexts.

    Raises:
        LmplayError: the plan has no such context, or one of its settings does not fit.
    """
    if name not in plan.contexts:
        known = ", ".join(plan.contexts) or "none"
        hint = did_you_mean(name, plan.contexts)
        raise LmplayError(
            f"--context {name}: the plan has none of this name{hint} (it has: {known})"
        )
    return apply(plan, plan.contexts[name], f"context {name}:")


def arena_fingerprint(plan: Plan) -> str:
    """Return 16 hex digits that change with everything that makes runs incomparable."""
    content = plan.content()
    for part in PARTS:
        if part != "model":
            del content[part]
    content["model"] = {"max_len": plan.model.max_len}
    for stage in content["steps"]:
        for keys in STAGE_KEYS.values():
            for key in keys:
                del stage[key]
        if stage["steps"]:  # a budget in steps has as many tokens as its batches
            stage["batch_size"] = plan.batch.batch_size
    text = json.dumps(content, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
