"""What a plan says about its optimizer, and the base class of optimizers that plugins add.

To add an optimizer, derive a class from :class:`OptimizerSpec`, give it a `name`, fields and
:meth:`OptimizerSpec.make`, and register it (see :mod:`lmplay.registry`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from .. import registry
from ..schema import Strict

if TYPE_CHECKING:
    import torch


Beta = Annotated[float, Field(ge=0, lt=1)]


class OptimizerSpec(Strict):
    """A plan's optimizer: its fields are the keys in the plan."""

    rates: ClassVar[tuple[str, ...]] = ("lr",)
    """Fields that are learning rates. Tuning multiplies all of them."""

    name: str
    """The name under which plans use it. Subclasses set a Literal and its default."""
    lr: float = Field(6e-4, gt=0)
    weight_decay: float = Field(0.0, ge=0, description="for matrices and embeddings only")

    def make(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """Return the torch optimizer for these parameter groups.

        Each group has `params`, `lr`, `weight_decay`, and `base_lr`, which the schedule multiplies.
        Gradients are dense.
        """
        raise NotImplementedError

    def scaled(self, multiplier: float) -> Self:
        """Return the spec with all learning rates multiplied."""
        return self.model_copy(update={r: getattr(self, r) * multiplier for r in self.rates})

    def with_rates_of(self, other: OptimizerSpec) -> Self:
        """Return the spec with the learning rates of another one of its class."""
        return self.model_copy(update={rate: getattr(other, rate) for rate in self.rates})


DEFAULTS: dict[str, dict[str, Any]] = {
    # Muon's steps have the size of its rate, so that its rates are those of no other optimizer.
    "muon": {"lr": 0.02, "other_lr": 0.01},
    "swats": {"lr": 0.001, "betas": (0.9, 0.999)},  # the paper's
}


class Optimizer(OptimizerSpec):
    """The optimizers that come with torch, and swats: Adam, then SGD."""

    rates: ClassVar[tuple[str, ...]] = ("lr", "other_lr")

    name: Literal["adagrad", "adamw", "adam", "sgd", "rmsprop", "muon", "swats"] = "adagrad"
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    momentum: float = Field(0.9, ge=0, lt=1, description="of sgd and muon")
    eps: float | None = Field(None, gt=0)
    other_lr: float = Field(3e-4, gt=0, description="muon: AdamW's rate for all but the matrices")
    tolerance: float = Field(
        0.01, gt=0, description="swats: relative distance of SGD's rate to its mean that ends Adam"
    )
    lazy: bool = Field(
        False, description="update looked-up rows only, even if that differs from a dense update"
    )

    @model_validator(mode="before")
    @classmethod
    def _of_their_name(cls, data: Any) -> Any:
        """Fill in the defaults that suit one optimizer only."""
        if isinstance(data, dict) and data.get("name") in DEFAULTS:
            return {**DEFAULTS[data["name"]], **data}
        return data


def optimizers() -> dict[str, type[OptimizerSpec]]:
    """Return the optimizers that plugins add, by name."""
    return dict(registry.plugins(registry.OPTIMIZERS)[0])
