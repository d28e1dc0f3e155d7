"""Base class of everything that a training plan holds."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Strict(BaseModel):
    """A frozen part of a plan. An unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)
