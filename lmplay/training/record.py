"""The shape of run.json and of a checkpoint's state.json, which may come from anywhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..files import read_json


class _Part(BaseModel):
    """Known fields have a type; others are allowed, for older and newer versions."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)


class Identity(_Part):
    """What decides a run's numbers."""

    variant: str
    plan: str
    config: dict[str, Any]
    seed: int | None = None
    experiment: str | None = None
    precision: str | None = None
    tokenizer: str | None = None
    data: str | None = None


class Tables(_Part):
    """Losses of count tables, of :class:`lmplay.data.counting.TableLosses`."""

    losses: list[float]
    datasets: dict[str, list[float]]
    tokens: int = Field(ge=0)
    complete: bool


class Record(_Part):
    """The fields of run.json that are read back."""

    identity: Identity
    plan_name: str
    plan: dict[str, Any] | None = None
    arena: str | None = None
    baseline: str = ""
    idea: str | None = None
    label: str | None = None
    overrides: dict[str, str] | None = None
    command: list[str] | None = None
    device: str | None = None
    versions: dict[str, str] | None = None
    threads: int | None = Field(None, gt=0)
    compiled: bool | None = None
    notes: list[str] | None = None
    git: dict[str, Any] | None = None
    sizes: dict[str, float] | None = None
    match: dict[str, Any] | None = None
    initial_model: str | None = None
    tables: Tables | None = None
    flops_per_token: float | None = Field(None, ge=0)
    mini_batch_size: int | None = Field(None, gt=0)
    log_id: str | None = None
    cleaned: bool | None = None
    summary: dict[str, bool | float | None] | None = None


def read_record(path: Path) -> dict[str, Any]:
    """Return the content of a run.json.

    Raises:
        ValueError: it is no JSON, or a field has another shape; the message names it.
        OSError: it cannot be read.
    """
    content = read_json(path)
    check_shape(Record, content)
    return content


def check_shape(shape: type[BaseModel], content: Any) -> None:
    """Raise ValueError, naming the first field that does not fit."""
    try:
        shape.model_validate(content)
    except ValidationError as e:
        error = e.errors()[0]
        where = ".".join(str(part) for part in error["loc"])
        raise ValueError(f"{where}: {error['msg']}") from e


class Position(_Part):
    """A run's position in its plan, :class:`lmplay.training.loop.TrainState`."""

    plan_step: int = Field(ge=0)
    index: int = Field(ge=0)
    step_seconds: float = Field(ge=0)
    step: int = Field(ge=0)
    tokens: int = Field(ge=0)
    seconds: float = Field(ge=0)
    validated_at: int = Field(ge=-1)


class SavedState(_Part):
    """state.json of a checkpoint that training continues from."""

    place: Position
    train_bytes: int = Field(ge=0)
    validate_bytes: int = Field(ge=0)
    samples_bytes: int = Field(0, ge=0)
    grad_scaler: dict[str, float] | None = None
    loss_scale: float | None = None


def check_state(state: dict[str, Any]) -> None:
    """Raise ValueError if training cannot continue from this state."""
    check_shape(SavedState, state)
