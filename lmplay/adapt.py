"""What a plan changes of every experiment's model: a head for labels, and low-rank adapters."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .api import ModelRunner
from .errors import LmplayError

SCALE = 2.0
"""Of a low-rank change: alpha / r with alpha = 2 r, so the rank does not ask for another rate."""


@dataclass(frozen=True)
class Adaptation:
    """Changes of a model.

    Attributes:
        labels: the outputs of the head; (): the head stays that of the vocabulary.
        rank: of the low-rank adapters; None: there are none, and all parameters are trained.
    """

    labels: tuple[str, ...] = ()
    rank: int | None = None

    @classmethod
    def of(cls, plan: Mapping[str, Any]) -> Adaptation:
        """Return what a plan asks for, given as JSON."""
        classify = plan.get("classify") or {}
        labels = classify["labels"] if classify.get("label_as") == "head" else []
        return cls(tuple(labels), (plan.get("model") or {}).get("lora"))


def adapted(runner: ModelRunner, adaptation: Adaptation) -> ModelRunner:
    """Return a runner of the same experiment whose models are changed.

    Adapters come last: the head for labels has none, and is trained.
    """
    if adaptation.labels:
        runner = _derived(_LabelHead, runner, labels=adaptation.labels)
    if adaptation.rank:
        runner = _derived(_LowRank, runner, rank=adaptation.rank)
    return runner


def _derived(mixin: type, runner: ModelRunner, **attributes: Any) -> ModelRunner:
    """Return the runner as an instance of its class with a mixin in front."""
    kind = type(runner)
    derived = type(f"{mixin.__name__.strip('_')}{kind.__name__}", (mixin, kind), attributes)
    return cast(ModelRunner, derived(runner.config))


class LabelHead(nn.Linear):
    """Hidden states (B, T, D) to one logit for each label."""

    def __init__(self, embed_dim: int, labels: int):
        super().__init__(embed_dim, labels, bias=False)

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=0.02)


class _LabelHead(ModelRunner):
    """A runner whose models have a head for labels in place of that for the vocabulary.

    The loss of a sequence is that of its one counted target, which is a label's number.
    """

    labels: tuple[str, ...]

    def build(self) -> nn.Module:
        model = super().build()
        if not isinstance(getattr(model, "head", None), nn.Linear):
            raise LmplayError(
                f"{type(model).__name__} has no linear layer `head`, which a head for labels "
                'replaces; "label_as": "text" needs none'
            )
        model.head = LabelHead(self.config.embed_dim, len(self.labels))
        return model

    def fold(self, model: nn.Module) -> nn.Module:
        """Fold the model as if it had a head for the vocabulary, which a fold may copy."""
        with torch.device("meta"):
            vocabulary: Any = super().build().head
        vocabulary = vocabulary.to_empty(device=next(model.parameters()).device)
        shell = copy.copy(model)
        shell._modules = {**model._modules, "head": vocabulary}
        folded = super().fold(shell)
        folded.head = cast(nn.Module, model.head)
        return folded


class Adapted(nn.Linear):
    """A linear layer with a trained change of low rank: W x + scale B A x.

    Hu et al. 2021 (arXiv 2106.09685), equation 3: A starts at random, B at 0.
    """

    lora_a: nn.Parameter  # (rank, in)
    lora_b: nn.Parameter  # (out, rank)

    def add(self, rank: int) -> None:
        self.lora_a = nn.Parameter(self.weight.new_empty(rank, self.in_features))
        self.lora_b = nn.Parameter(self.weight.new_empty(self.out_features, rank))
        self.weight.requires_grad_(False)

    def reset_parameters(self) -> None:
        super().reset_parameters()
        nn.init.normal_(self.lora_a, std=self.in_features**-0.5)
        nn.init.zeros_(self.lora_b)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + SCALE * F.linear(F.linear(x, self.lora_a), self.lora_b)

    @torch.no_grad()
    def merged(self) -> Tensor:
        """Return the weight (out, in) of an ordinary layer with the same function."""
        return self.weight + SCALE * self.lora_b @ self.lora_a


class _LowRank(ModelRunner):
    """A runner whose models train low-rank changes of their matrices, and a head for labels."""

    rank: int

    def build(self) -> nn.Module:
        model = super().build()
        matrices = {
            id(p)
            for group in super().param_groups(model)
            if group["role"] == "matrix"
            for p in group["params"]
        }
        for p in model.parameters():
            p.requires_grad_(False)
        for module in model.modules():
            if isinstance(module, LabelHead):
                module.requires_grad_(True)
            elif _is_plain(module) and id(module.weight) in matrices:
                kind = type(module)
                module.__class__ = type(f"Adapted{kind.__name__}", (Adapted, kind), {})
                cast(Adapted, module).add(self.rank)
        if not any(isinstance(m, Adapted) for m in model.modules()):
            raise LmplayError(
                f"model.lora: {type(model).__name__} has no linear layers that adapters can change"
            )
        return model

    def param_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        groups = super().param_groups(model)
        known = {id(p) for group in groups for p in group["params"]}
        added = [p for p in model.parameters() if id(p) not in known]
        return [*groups, {"params": added, "role": "matrix", "rows": False}] if added else groups

    def fold(self, model: nn.Module) -> nn.Module:
        """Return the same function with the changes added to the matrices."""
        merged = copy.deepcopy(model)
        for module in merged.modules():
            if isinstance(module, Adapted):
                module.weight = nn.Parameter(module.merged())
                del module.lora_a, module.lora_b
                module.__class__ = type(module).__mro__[2]
        return super().fold(merged)


def _is_plain(module: nn.Module) -> bool:
    """Return whether a module is a linear layer that does nothing of its own."""
    return isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward


def without_effect(model: nn.Module) -> list[str]:
    """Return the names of layers whose adapters got no gradient: the model uses their weights, and
    does not call them."""
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, Adapted) and module.lora_b.grad is None
    ]
