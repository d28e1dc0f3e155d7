"""Training plans: everything about a run but the idea, as a strict JSON file.

Runs of one plan can be compared. An unknown key is an error. Sources, tokenizers and optimizers
that plugins register are part of the schema. Plan files of the original playground load unchanged
(:mod:`lmplay.legacy`); the defaults below are the original's.

One module, because a plan's parts, how they are read, and what an error says of them belong
together.
"""

from __future__ import annotations

import hashlib
import json
import math
import types
import typing
from collections.abc import Iterator, Sequence
from functools import reduce
from operator import or_
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, Discriminator, Field, Tag, ValidationError, model_validator

from . import legacy, registry
from .data.source import Source
from .data.sources import sources
from .data.tokenizers import TiktokenTokenizer, TokenizerSchema, tokenizers
from .discover import RECIPE_PARTS
from .errors import LmplayError, did_you_mean
from .pretrained.library import is_pretrained
from .schema import Strict
from .shipped import shipped
from .training.optimizer_specs import Optimizer, OptimizerSpec, optimizers

TORCH_OPTIMIZERS = "torch"


def _optimizer_tag(value: Any) -> str:
    """Return which class an optimizer's keys belong to."""
    name = value.get("name") if isinstance(value, dict) else getattr(value, "name", None)
    return str(name) if name in optimizers() else TORCH_OPTIMIZERS


def _any_optimizer() -> Any:
    added = optimizers()
    if not added:
        return Optimizer
    tagged = [Annotated[Optimizer, Tag(TORCH_OPTIMIZERS)]]
    tagged += [Annotated[spec, Tag(name)] for name, spec in added.items()]
    return Annotated[reduce(or_, tagged), Discriminator(_optimizer_tag)]


if TYPE_CHECKING:
    AnySource = Source
    AnyTokenizer = TokenizerSchema
    AnyOptimizer = OptimizerSpec
else:
    AnySource = Annotated[reduce(or_, sources().values()), Field(discriminator="source")]
    schemas = [t.Schema for t in tokenizers().values()]
    AnyTokenizer = Annotated[reduce(or_, schemas), Field(discriminator="kind")]
    AnyOptimizer = _any_optimizer()


class ModelSizes(Strict):
    """Model sizes, for every experiment whose Config has the field."""

    # The limits are far above what runs anywhere; they catch a slip of the keyboard at once.
    num_blocks: int | None = Field(None, gt=0, le=10_000)
    embed_dim: int | None = Field(None, gt=0, le=2**20)
    num_heads: int | None = Field(None, gt=0, le=2**16)
    num_kv_heads: int | None = Field(None, gt=0, le=2**16)
    max_len: int | None = Field(None, gt=0, le=2**26)
    dropout: float | None = Field(None, ge=0, lt=1)
    init: Literal["gpt2", "torch"] | None = Field(None, description="how the weights start")
    lora: int | None = Field(
        None, gt=0, le=2**16, description="train only low-rank changes of the matrices: their rank"
    )


class Schedule(Strict):
    """How the learning rate changes over a stage."""

    name: Literal["constant", "linear_warmup", "cosine", "wsd", "one_cycle"] = "constant"
    warmup: float = Field(0.0, ge=0, lt=1, description="share of the stage's budget")
    floor: float = Field(0.1, ge=0, le=1, description="last multiplier of cosine, wsd, one_cycle")
    decay: float = Field(0.2, gt=0, le=1, description="wsd: share of the budget in which it decays")
    per: Literal["stage", "window"] = Field(
        "stage", description="window: it begins again in every window of a stream"
    )


class BatchSpec(Strict):
    """Size of an optimizer step, and clipping."""

    batch_size: int = Field(50, gt=0, le=2**20, description="sequences in one optimizer step")
    grad_clip: float | None = Field(None, gt=0, description="largest norm of the gradient")
    replay: float = Field(
        0.0, ge=0, lt=1, description="share of a batch that is from earlier windows of a stream"
    )


class Validation(Strict):
    """The held-out text, and how often the model is tested on it."""

    fraction: float = Field(0.01, gt=0, lt=1, description="share of documents, chosen by content")
    split: Literal["content", "time"] = Field(
        "content", description="time: the last labeled examples are held out"
    )
    tokens: int = Field(262_144, gt=0, description="size of the validation set over all data sets")
    every_tokens: int = Field(2_000_000, gt=0)
    solved: float | None = Field(
        None, gt=0, le=1, description="accuracy from which a synthetic task counts as solved"
    )
    sample_prompt: str = Field("The ", description="the text that the sample at validation begins")


class Classification(Strict):
    """The documents are prompts with labels, and the model tells the label."""

    labels: list[str] = Field(min_length=2)
    label_as: Literal["head", "text"] = Field(
        "head",
        description="head: an output layer for the labels, at the last token of the prompt. text: "
        "the label's text behind the prompt",
    )

    @model_validator(mode="after")
    def _different(self) -> Classification:
        if len(set(self.labels)) < len(self.labels) or not all(x.strip() for x in self.labels):
            raise ValueError("labels must be different texts")
        return self


class Stream(Strict):
    """Test on a window of time, then train on it, then go on to the next."""

    window: str = Field(description="its length: a number and s, m, h or d, such as 5m")
    epochs: float = Field(1.0, gt=0, description="how often a window's examples are trained on")

    @property
    def seconds(self) -> float:
        """Length of a window."""
        return float(self.window[:-1]) * UNITS[self.window[-1]]

    @model_validator(mode="after")
    def _has_a_length(self) -> Stream:
        try:
            is_positive = 0 < self.seconds < math.inf
        except (ValueError, KeyError, IndexError):
            is_positive = False
        if not is_positive:
            raise ValueError(
                f"window {self.window}: a number and a unit are wanted, s, m, h or d, such as 5m"
            )
        return self


UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


class PlanStage(Strict):
    """A part of a run with its own data and budget. The JSON key is `steps`."""

    step_name: str = "train"
    datasets: list[str] = Field(min_length=1)
    epochs: float | None = Field(None, gt=0)
    tokens: int | None = Field(None, gt=0)
    fp32_tokens: int | None = Field(
        None, gt=0, description="instead of `tokens` on a CPU that trains in float32"
    )
    steps: int | None = Field(None, gt=0, description="optimizer steps")
    minutes: float | None = Field(None, gt=0)
    stream: Stream | None = Field(None, description="instead of a budget, for labeled examples")
    interleave: Literal["first_exhausted", "all_exhausted", "concatenate"] = "first_exhausted"
    weights: list[float] | None = Field(
        None, description="shares of the data sets instead of equal turns"
    )
    optimizer: AnyOptimizer | None = None
    lr: float | None = Field(None, gt=0)
    schedule: Schedule | None = None

    @model_validator(mode="after")
    def _weights_fit(self) -> PlanStage:
        if self.weights is not None:
            if len(self.weights) != len(self.datasets) or min(self.weights) <= 0:
                raise ValueError("weights must be one number above 0 for each of datasets")
            if self.interleave == "concatenate":
                raise ValueError("weights do not go with interleave concatenate")
        return self

    @model_validator(mode="after")
    def _budget_fits(self) -> PlanStage:
        if self.fp32_tokens and not self.tokens:
            raise ValueError("fp32_tokens replaces tokens, which is missing")
        if self.stream and (self.epochs or self.tokens or self.steps or self.minutes):
            raise ValueError(
                "a stream ends with its data: it has no epochs, tokens, steps, minutes"
            )
        if self.stream and len(self.datasets) > 1:
            raise ValueError("a stream reads one data set")
        return self


DEFAULT_SIZES = ModelSizes(num_blocks=6, embed_dim=768, num_heads=12, max_len=1024, dropout=0.1)


class Plan(Strict):
    """Everything but the idea."""

    schema_: str | None = Field(None, alias="$schema", exclude=True)
    description: str = ""
    tokenizer: AnyTokenizer = TiktokenTokenizer()
    model: ModelSizes = DEFAULT_SIZES
    datasets: dict[str, AnySource]
    classify: Classification | None = None
    optimizer: AnyOptimizer = Optimizer()
    schedule: Schedule = Schedule()
    batch: BatchSpec = BatchSpec()
    validation: Validation = Validation()
    seed: int = Field(0, ge=0, lt=2**63)
    initial_model: str | None = Field(
        None, description="where every run starts: hf:FOLDER or NAME, gguf:FILE, or a run's folder"
    )
    steps: list[PlanStage] = Field(min_length=1)
    contexts: dict[str, dict[str, Any]] = Field(
        {}, description="by name, settings of the recipe under which a trial repeats its question"
    )

    @model_validator(mode="before")
    @classmethod
    def _from_original(cls, data: Any) -> Any:
        return legacy.modernize(data) if isinstance(data, dict) else data

    @model_validator(mode="after")
    def _parts_fit(self) -> Plan:
        for stage in self.steps:
            for name in stage.datasets:
                if name not in self.datasets:
                    raise ValueError(
                        f"step {stage.step_name} uses the data set {name}, which the plan does not "
                        f"define{did_you_mean(name, self.datasets)}"
                    )
        for name in self.used_datasets:
            self.datasets[name].check_plan(self)
        self.check_stream()
        self._labels_fit()
        self.tokenizer.check_plan(self)
        known = [f"{part}.{key}" for part in RECIPE_PARTS for key in keys_at(Plan, [part])]
        for context, settings in self.contexts.items():
            for key in settings:
                if key not in known and not key.startswith("optimizer."):  # plugins have others
                    raise ValueError(
                        f"context {context}: {key} is no setting of a recipe"
                        f"{did_you_mean(key, known)}"
                    )
        names = [stage.step_name for stage in self.steps]
        if len(set(names)) != len(names):
            raise ValueError("two steps have the same step_name")
        return self

    def check_stream(self) -> None:
        """Raise ValueError if the parts of a plan that are about a stream do not go together."""
        is_stream = [stage.stream is not None for stage in self.steps]
        if self.classify is None and (any(is_stream) or self.validation.split == "time"):
            what = "a stream" if any(is_stream) else "validation.split time"
            raise ValueError(f"{what} needs labeled examples: the plan has no classify")
        if any(is_stream[:-1]):
            raise ValueError("a stream must be the last of the steps")
        for key, is_set in (
            ("batch.replay", self.batch.replay > 0),
            ("schedule.per window", self.schedule.per == "window"),
        ):
            if is_set and not any(is_stream):
                raise ValueError(f"{key} is for a stream, and no step of the plan is one")

    def _labels_fit(self) -> None:
        for name in self.used_datasets:
            if self.classify is not None and not self.datasets[name].has_labels:
                raise ValueError(
                    f"the data set {name} has no labels, which classify needs (files and hub: "
                    "columns.label and columns.prompt; bundled: label)"
                )

    @property
    def fingerprint(self) -> str:
        """16 hex digits that change with everything but the description."""
        text = json.dumps(self.content(), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def content(self) -> dict[str, Any]:
        """Return all that decides a run's numbers, as JSON. Data sets are named by content."""
        # Contexts change no run; each of theirs has its own recipe.
        content = self.model_dump(mode="json", exclude={"description", "contexts"})
        for name, source in self.datasets.items():
            content["datasets"][name] = source.identity()
        content["tokenizer"] = self.tokenizer.identity()
        if self.initial_model is not None:
            # Wherever it is; a run's identity has the fingerprint of its weights.
            content["initial_model"] = Path(self.initial_model).name
        _drop(content, {"initial_model": None, "classify": None})
        for part, defaults in LATER_KEYS.items():
            for holder in (content, *content["steps"]):
                if holder.get(part) is not None:
                    _drop(holder[part], defaults)
        for stage in content["steps"]:
            _drop(stage, {"fp32_tokens": None, "stream": None})
        return content

    @property
    def used_datasets(self) -> list[str]:
        """Names of the data sets that the stages use, in the order of first use."""
        return list(dict.fromkeys(name for stage in self.steps for name in stage.datasets))

    def sizes(self) -> dict[str, Any]:
        """Return the model sizes that the plan sets."""
        return self.model.model_dump(exclude_none=True, exclude={"lora"})

    def optimizer_of(self, stage: PlanStage) -> OptimizerSpec:
        chosen = stage.optimizer or self.optimizer
        return chosen.model_copy(update={"lr": stage.lr}) if stage.lr else chosen

    def schedule_of(self, stage: PlanStage) -> Schedule:
        return stage.schedule or self.schedule

    def with_budget(self, tokens: int | None, steps: int | None, minutes: float | None) -> Plan:
        """Return the plan with these budgets instead of its own.

        Several stages get equal shares; the first ones get what is left over.

        Raises:
            LmplayError: there are more stages than tokens or steps.
        """
        if tokens is None and steps is None and minutes is None:
            return self
        if any(stage.stream for stage in self.steps):
            raise LmplayError("--tokens, --steps, --minutes: a stream ends with its data")
        n = len(self.steps)
        for option, budget in (("tokens", tokens), ("steps", steps)):
            if budget is not None and budget < n:
                raise LmplayError(
                    f"--{option} {budget}: the plan has {n} steps, which would get none each"
                )
        shares = [
            {
                "epochs": None,
                "fp32_tokens": None,
                "tokens": tokens and tokens // n + (i < tokens % n),
                "steps": steps and steps // n + (i < steps % n),
                "minutes": minutes and minutes / n,
            }
            for i in range(n)
        ]
        changed = [
            stage.model_copy(update=share) for stage, share in zip(self.steps, shares, strict=True)
        ]
        return self.model_copy(update={"steps": changed})

    def starting_from(self, model: str) -> Plan:
        """Return the plan whose runs start from a pretrained model, with its tokenizer."""
        tokenizer = tokenizers()["hf"].Schema.model_validate({"kind": "hf", "path": model})
        return self.model_copy(update={"initial_model": model, "tokenizer": tokenizer})

    def for_precision(self, device: str, precision: str) -> Plan:
        """Return the plan with the budgets that a machine has: `fp32_tokens` become `tokens` where
        a CPU trains in float32, and are dropped elsewhere.

        Args:
            device: cpu, cuda or mps.
            precision: fp32, bf16 or fp16.
        """
        is_slow = device == "cpu" and precision == "fp32"
        changed = [
            stage.model_copy(
                update={
                    "tokens": (stage.fp32_tokens if is_slow else None) or stage.tokens,
                    "fp32_tokens": None,
                }
            )
            for stage in self.steps
        ]
        return self.model_copy(update={"steps": changed})


LATER_KEYS: dict[str, dict[str, Any]] = {
    "model": {"init": None, "lora": None},
    "validation": {"solved": None, "split": "content"},
    "schedule": {"per": "stage"},
    "batch": {"replay": 0.0},
    "optimizer": {"tolerance": 0.01},
}
"""Keys that plans had not from the beginning. At their defaults they change no fingerprint."""


def _drop(content: dict[str, Any], defaults: dict[str, Any]) -> None:
    """Remove keys that have these values."""
    for key, default in defaults.items():
        if key in content and content[key] == default:  # a plugin's optimizer has other keys
            del content[key]


def plan_files() -> dict[str, Path]:
    """Return every plan by name: those of ./training_plans, then the shipped ones."""
    found: dict[str, Path] = {}
    for folder in (shipped("training_plans"), Path("training_plans").resolve()):
        for path in sorted(folder.glob("*.json")):
            if not path.name.endswith(".schema.json"):
                found[path.stem] = path
    return dict(sorted(found.items()))


def find_plan(name: str) -> Path:
    """Return the file of a plan, given its name or path.

    Raises:
        LmplayError: there is none.
    """
    if name.endswith(".json") or "/" in name:
        path = Path(name).expanduser()
        if not path.is_file():
            raise LmplayError(f"--training-plan {name}: there is no such file")
        return path.resolve()
    known = plan_files()
    if name not in known:
        hint = did_you_mean(name, known)
        raise LmplayError(
            f"--training-plan {name}: there is none{hint}; --training-plan list shows all"
        )
    return known[name]


def load_plan(path: Path) -> Plan:
    """Read a plan strictly. Relative paths in it start at its own folder.

    Raises:
        LmplayError: the file is not JSON, or a key or value is wrong; the message names it.
    """
    try:
        raw = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_without_repeats)
    except _RepeatedKeyError as e:
        raise LmplayError(f"{path}: {e}") from e
    except RecursionError as e:
        raise LmplayError(f"{path}: it is nested too deeply for a plan") from e
    except json.JSONDecodeError as e:
        raise LmplayError(f"{path}: line {e.lineno}: this is not JSON: {e.msg}") from e
    except (OSError, ValueError) as e:  # among them UnicodeDecodeError
        raise LmplayError(f"{path}: it cannot be read: {e}") from e
    plan = parse_plan(raw, str(path))
    located = {name: source.relative_to(path.parent) for name, source in plan.datasets.items()}
    tokenizer = plan.tokenizer.relative_to(path.parent)
    plan = plan.model_copy(update={"datasets": located, "tokenizer": tokenizer})
    if plan.initial_model is None:
        return plan
    model = located_model(plan.initial_model, path.parent)
    if is_pretrained(model):
        return plan.starting_from(model)
    return plan.model_copy(update={"initial_model": model})


def located_model(model: str, folder: Path) -> str:
    """Return the name of a model with a local path in it made relative to a plan's folder."""
    kind, colon, name = model.rpartition(":")
    local = folder / Path(name).expanduser()
    return f"{kind}{colon}{local}" if local.exists() else model


class _RepeatedKeyError(Exception):
    """A key is twice in one object, which JSON readers resolve in different ways."""


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise _RepeatedKeyError(f"the key {twice} appears twice in one object; keep one")
    return content


def parse_plan(raw: Any, where: str) -> Plan:
    """Return the plan for parsed JSON; `where` is named in errors.

    Raises:
        LmplayError: the first error. For an unknown key it suggests the nearest valid one.
    """
    try:
        return Plan.model_validate(raw)
    except ValidationError as e:
        error = e.errors()[0]
        place = ".".join(_in_file(raw, error["loc"])) or "the plan"
        context = error.get("ctx", {})
        if error["type"] == "extra_forbidden":
            *parents, key = error["loc"]
            hint = did_you_mean(str(key), keys_at(Plan, parents))
            raise LmplayError(f"{where}: {place}: unknown key{hint}") from e
        if error["type"] == "union_tag_not_found":
            raise LmplayError(
                f"{where}: {place}: the key {context.get('discriminator')} is missing"
            ) from e
        if reason := _broken_plugin(str(context.get("tag", error.get("input", "")))):
            raise LmplayError(f"{where}: {place}: its plugin cannot be loaded: {reason}") from e
        message = error["msg"].removeprefix("Value error, ")
        raise LmplayError(f"{where}: {place}: {message}") from e


def _broken_plugin(name: str) -> str:
    """Return why the plugin of this name could not be loaded; "" if there is no such plugin."""
    groups = (registry.SOURCES, registry.TOKENIZERS, registry.OPTIMIZERS)
    return next((b[name] for b in (registry.plugins(g)[1] for g in groups) if name in b), "")


def _in_file(raw: Any, loc: Sequence[int | str]) -> Iterator[str]:
    """Yield a validation error's location without the tags of unions, which are no keys."""
    for number, part in enumerate(loc):
        if isinstance(raw, dict) and part not in raw and number < len(loc) - 1:
            continue
        yield str(part)
        if isinstance(raw, dict):
            raw = raw.get(part)
        elif isinstance(raw, list) and isinstance(part, int) and part < len(raw):
            raw = raw[part]


def keys_at(annotation: Any, loc: list[Any]) -> list[str]:
    """Return the keys that the schema knows at a location of a validation error."""
    origin = typing.get_origin(annotation)
    args = typing.get_args(annotation)
    if origin is Annotated:
        return keys_at(args[0], loc)
    if origin in (typing.Union, types.UnionType):
        members = [a for a in args if a is not type(None)]
        tagged = {_tag(member): member for member in members}
        if loc and loc[0] in tagged:
            return keys_at(tagged[loc[0]], loc[1:])
        return keys_at(members[0], loc) if members else []
    if origin in (list, dict):
        return keys_at(args[-1], loc[1:])
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        if loc:
            inner = annotation.model_fields.get(str(loc[0]))
            return keys_at(inner.annotation, loc[1:]) if inner else []
        return [f.alias or name for name, f in annotation.model_fields.items()]
    return []


def _tag(member: Any) -> str:
    """Return the tag by which a union knows a member."""
    if typing.get_origin(member) is Annotated:
        tags = [m.tag for m in typing.get_args(member) if isinstance(m, Tag)]
        return tags[0] if tags else _tag(typing.get_args(member)[0])
    fields = getattr(member, "model_fields", {})
    return next((str(fields[k].default) for k in ("kind", "source") if k in fields), "")


def json_schema() -> dict[str, Any]:
    """Return the JSON Schema with which editors check and complete plan files."""
    return Plan.model_json_schema(by_alias=True)


if __name__ == "__main__":
    print(json.dumps(json_schema(), indent=2))
