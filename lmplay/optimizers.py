"""Optimizers over an experiment's parameter groups, and schedules as pure functions of progress."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from .errors import LmplayError
from .plan import Optimizer as OptimizerSpec
from .plan import Schedule

ROLES = ("matrix", "embedding", "vector")
GROUP_KEYS = {"params", "role", "rows", "lr_scale"}


def factor(schedule: Schedule, progress: float) -> float:
    """What the learning rate is multiplied with at `progress` in (0, 1] of a plan step's budget.

    Progress, not a step number, because a budget may be given in minutes. All schedules but one_cycle begin
    with a linear warm-up over `warmup`; then:

    constant, linear_warmup: 1.
    cosine: down to `floor` along half a cosine (Loshchilov & Hutter 2017, eq. 5, one cycle).
    wsd: 1, then linearly to `floor` over the last `decay` (Hu et al. 2024, section 4.2).
    one_cycle: up along half a cosine over `warmup` (.3 if 0), down to `floor` (Smith & Topin 2018).
    """
    progress = min(1.0, max(0.0, progress))
    warmup = schedule.warmup
    if schedule.name == "one_cycle":
        warmup = warmup or 0.3
        if progress < warmup:
            return 0.04 + 0.96 * (1 - math.cos(math.pi * progress / warmup)) / 2
    elif progress < warmup:
        return progress / warmup
    if schedule.name in ("cosine", "one_cycle"):
        along = (progress - warmup) / (1 - warmup)
        return schedule.floor + (1 - schedule.floor) * (1 + math.cos(math.pi * along)) / 2
    if schedule.name == "wsd" and progress > 1 - schedule.decay:
        along = (progress - (1 - schedule.decay)) / schedule.decay
        return 1 - (1 - schedule.floor) * along
    return 1.0


class RowAdagrad(torch.optim.Optimizer):
    """Adagrad (Duchi et al. 2011) on the rows that a sparse gradient touches.

    Without weight decay and rate decay an untouched row keeps its value and its sum, so this equals
    torch.optim.Adagrad on the dense gradient exactly, at a cost of the touched rows only.
    """

    def __init__(self, params: Any, lr: float = 1e-2, eps: float = 1e-10):
        super().__init__(params, {"lr": lr, "eps": eps})
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["sum"] = torch.zeros_like(p)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                grad = p.grad.coalesce()
                rows, values = grad.indices()[0], grad.values()
                total = self.state[p]["sum"]
                sums = total.index_select(0, rows).addcmul_(values, values)
                total.index_copy_(0, rows, sums)
                p.index_add_(0, rows, values / sums.sqrt_().add_(group["eps"]), alpha=-group["lr"])


def check_groups(groups: list[dict[str, Any]], model: nn.Module) -> None:
    """Every parameter that is trained stands in exactly one group, and each group says what it is.

    Raises:
        LmplayError: a parameter in no group or in two, or an unknown key or role.
    """
    names = {id(p): name for name, p in model.named_parameters()}
    seen: set[int] = set()
    for group in groups:
        unknown = set(group) - GROUP_KEYS
        if unknown or group.get("role", "matrix") not in ROLES:
            raise LmplayError(f"param_groups: {sorted(unknown) or group['role']} is unknown; roles: {', '.join(ROLES)}")
        for p in group["params"]:
            if id(p) in seen or id(p) not in names:
                raise LmplayError(f"param_groups: {names.get(id(p), 'a tensor')} is in two groups or not the model's")
            seen.add(id(p))
    missing = [names[i] for i in names if i not in seen]
    if missing:
        raise LmplayError(f"param_groups: {', '.join(missing[:5])} would never be trained: in no group")


class Optimizers:
    """The optimizers that train one model, driven as one.

    Attributes:
        notes: what the user should know about how sparse gradients are treated.
    """

    def __init__(self, spec: OptimizerSpec, groups: list[dict[str, Any]], model: nn.Module):
        check_groups(groups, model)
        groups = [{**g, "params": [p for p in g["params"] if p.requires_grad]} for g in groups]  # without frozen ones
        groups = [g for g in groups if g["params"]]
        self.spec, self.model = spec, model
        self.notes: list[str] = []
        self.parts: list[torch.optim.Optimizer] = []
        dense: list[dict[str, Any]] = []
        sparse: list[dict[str, Any]] = []
        for group in _for_muon(groups) if spec.name == "muon" else groups:
            role = group.get("role", "matrix")
            matrix = spec.name == "muon" and role == "matrix" and all(p.ndim == 2 for p in group["params"])
            if spec.name == "muon" and role == "matrix" and not matrix:
                self.notes.append("AdamW for matrices that are not two-dimensional: Muon does not take them")
            base = spec.other_lr if spec.name == "muon" and not matrix else spec.lr
            entry = {
                "params": group["params"],
                "base_lr": base * group.get("lr_scale", 1.0),
                "lr": base * group.get("lr_scale", 1.0),
                "weight_decay": 0.0 if role == "vector" else spec.weight_decay,
                "muon": matrix,
            }
            (sparse if group.get("rows") else dense).append(entry)
        if sparse and not self._rows_only(sparse):
            dense, sparse = dense + sparse, []
        for muon in (True, False):
            chosen = [_without(g, "muon") for g in dense if g["muon"] is muon]
            if chosen:
                self.parts.append(_make(spec, chosen, muon))
        if sparse:
            self.parts.append(self._sparse(sparse))
        self._sparse_params = [p for g in sparse for p in g["params"]]
        self._compacted: dict[int, int] = {}

    def _rows_only(self, sparse: list[dict[str, Any]]) -> bool:
        """Whether looked-up rows alone are updated; says so where that is a choice."""
        spec, decay = self.spec, any(g["weight_decay"] for g in sparse)
        exact = not decay and (spec.name == "adagrad" or (spec.name == "sgd" and spec.momentum == 0))
        if exact:
            self.notes.append("sparse update of looked-up rows: exact for this optimizer")
        elif spec.lazy and spec.name in ("adagrad", "adam", "adamw"):
            note = f"lazy: {spec.name} updates looked-up rows only, without weight decay; the dense update differs"
            self.notes.append(note)
            return True
        elif spec.lazy:
            raise LmplayError(f"optimizer: lazy goes with adagrad, adam and adamw, not with {spec.name}")
        else:
            self.notes.append(f"dense update of sparse gradients: under {spec.name} the sparse one would differ")
        return exact

    def _sparse(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        spec = self.spec
        chosen = [_without(g, "muon", "weight_decay") for g in groups]
        if spec.name == "adagrad":
            return RowAdagrad(chosen, eps=spec.eps or 1e-10)
        if spec.name == "sgd":
            return torch.optim.SGD(chosen)
        return torch.optim.SparseAdam(chosen, betas=spec.betas, eps=spec.eps or 1e-8)

    def set_factor(self, value: float) -> float:
        """Set the learning rates to `value` times their base; return that of a group without a scale."""
        for part in self.parts:
            for group in part.param_groups:
                group["lr"] = group["base_lr"] * value
        return self.spec.lr * value

    def change_rates(self, spec: OptimizerSpec) -> None:
        """Go on with the learning rates of `spec`, which differs in nothing else."""
        for part in self.parts:
            other = self.spec.name == "muon" and not isinstance(part, torch.optim.Muon)
            ratio = spec.other_lr / self.spec.other_lr if other else spec.lr / self.spec.lr
            for group in part.param_groups:
                group["base_lr"] *= ratio
        self.spec = spec

    def compact(self) -> None:
        """Sum repeated rows of sparse gradients once they have doubled: accumulating would only list them."""
        for p in self._sparse_params:
            if p.grad is not None and p.grad._nnz() > 2 * self._compacted.get(id(p), 0):
                p.grad = p.grad.coalesce()
                self._compacted[id(p)] = p.grad._nnz()

    def prepare(self, clip: float | None, unscale: float = 1.0) -> Tensor:
        """Make the gradients what the optimizers take and clip them; returns the norm () before that."""
        kept = {id(p) for p in self._sparse_params}
        values: list[Tensor] = []
        for p in self.model.parameters():
            if p.grad is None:
                continue
            if p.grad.is_sparse:
                p.grad = p.grad.coalesce() if id(p) in kept else p.grad.to_dense()
            values.append(p.grad.values() if p.grad.is_sparse else p.grad)
        self._compacted.clear()
        if unscale != 1.0:
            torch._foreach_mul_(values, 1 / unscale)
        norm = torch.nn.utils.get_total_norm(values)
        if clip is not None:
            scale = clip / (float(norm) + 1e-6)
            if scale < 1:
                torch._foreach_mul_(values, scale)
        return norm

    def step(self) -> None:
        for part in self.parts:
            part.step()

    def zero_grad(self) -> None:
        """Dense gradients are zeroed in place, as fresh memory is slow; sparse ones are dropped."""
        for p in self.model.parameters():
            if p.grad is not None and p.grad.is_sparse:
                p.grad = None
            elif p.grad is not None:
                p.grad.zero_()

    def state_tensors(self) -> dict[str, Tensor]:
        """The whole state as tensors named "<parameter>|<entry>"."""
        names = {id(p): name for name, p in self.model.named_parameters()}
        return {
            f"{names[id(p)]}|{key}": value.detach() if isinstance(value, Tensor) else torch.tensor(float(value))
            for part in self.parts
            for p, state in part.state.items()
            for key, value in state.items()
            if value is not None
        }

    def load_state_tensors(self, tensors: dict[str, Tensor]) -> None:
        """The reverse of :meth:`state_tensors`.

        Raises:
            LmplayError: the state is of other parameters.
        """
        names = {id(p): name for name, p in self.model.named_parameters()}
        states: dict[str, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            name, _, entry = key.rpartition("|")
            states.setdefault(name, {})[entry] = value
        sparse = {id(p) for p in self._sparse_params}
        unknown = set(states) - set(names.values())
        if unknown:
            raise LmplayError(f"the optimizer's state is of a parameter that is not there: {sorted(unknown)[0]}")
        for part in self.parts:
            params = [p for g in part.param_groups for p in g["params"]]
            content = part.state_dict()
            content["state"] = {i: states[names[id(p)]] for i, p in enumerate(params) if names[id(p)] in states}
            part.load_state_dict(content)
            if isinstance(part, torch.optim.SparseAdam):  # it counts in Python's int, and computes with it
                for state in part.state.values():
                    state["step"] = int(state["step"])
            # A parameter that was trained has a gradient from then on, zeros where a step does not reach it; a resume
            # must not leave it out of a step that moves it by momentum or decay.
            for p in params:
                state = part.state.get(p)
                if state and float(state.get("step", 1)) > 0 and id(p) not in sparse:
                    p.grad = torch.zeros_like(p)


def _for_muon(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The groups with two-dimensional parameters and others apart."""
    split = [
        {**g, "params": [p for p in g["params"] if (p.ndim == 2) is flat]} for g in groups for flat in (True, False)
    ]
    return [g for g in split if g["params"]]


def _without(group: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {k: v for k, v in group.items() if k not in keys}


def _make(spec: OptimizerSpec, groups: Iterable[dict[str, Any]], muon: bool) -> torch.optim.Optimizer:
    """The torch optimizer for dense gradients, fused where torch has it for the device."""
    groups = list(groups)
    devices = {p.device.type for g in groups for p in g["params"]}
    fused = devices in ({"cpu"}, {"cuda"})
    if muon:
        return torch.optim.Muon(groups, momentum=spec.momentum)
    match spec.name:
        case "adagrad":
            return torch.optim.Adagrad(groups, eps=spec.eps or 1e-10, fused=True if devices == {"cpu"} else None)
        case "sgd":
            return torch.optim.SGD(groups, momentum=spec.momentum, fused=fused)
        case "rmsprop":
            return torch.optim.RMSprop(groups, eps=spec.eps or 1e-8)
        case "adam":
            return torch.optim.Adam(groups, betas=spec.betas, eps=spec.eps or 1e-8, fused=fused)
        case _:  # adamw, and muon's rest
            return torch.optim.AdamW(groups, betas=spec.betas, eps=spec.eps or 1e-8, fused=fused)
