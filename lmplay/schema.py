"""Base class of everything that a training plan holds."""

from __future__ import annotations

import math
import typing
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel, ConfigDict, model_validator


class Strict(BaseModel):
    """A frozen part of a plan. An unknown key is an error, and so is a value of another kind.

    Numbers are not read from text ("8") or from true and false, and must be finite.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)

    @model_validator(mode="before")
    @classmethod
    def _of_their_kinds(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        fields = {field.alias or name: field for name, field in cls.model_fields.items()}
        for key, value in data.items():
            if key in fields:
                kinds = set(_kinds(fields[key].annotation))
                for part in value if isinstance(value, list | tuple) else [value]:
                    try:
                        _check_kind(part, kinds)
                    except ValueError as e:
                        raise ValueError(f"{key}: {e}") from e
        return data


def _check_kind(value: Any, kinds: set[type]) -> None:
    """Raise ValueError if a number is wanted and this is none, or no usable one."""
    wants_number = bool({int, float} & kinds)
    if isinstance(value, bool) and wants_number and bool not in kinds:
        raise ValueError(f"a number is wanted, not {str(value).lower()}")
    if isinstance(value, str):
        if bool in kinds and not {str, int, float} & kinds:
            raise ValueError(f'true or false is wanted, not the text "{value}"')
        if wants_number and str not in kinds:
            raise ValueError(f'a number is wanted, not the text "{value}"')
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as e:
            raise ValueError("it holds half of a surrogate pair, which is no character") from e
    if isinstance(value, int | float) and bool in kinds and not wants_number:
        if not isinstance(value, bool):
            raise ValueError(f"true or false is wanted, not {value}")
    elif isinstance(value, float) and not math.isfinite(value):
        raise ValueError("it must be a finite number")


def _kinds(annotation: Any) -> Iterator[type]:
    """Yield the types in an annotation, and those of its literals."""
    if typing.get_origin(annotation) is typing.Literal:
        yield from (type(value) for value in typing.get_args(annotation))
        return
    args = typing.get_args(annotation)
    if not args and isinstance(annotation, type):
        yield annotation
    for arg in args:
        yield from _kinds(arg)
