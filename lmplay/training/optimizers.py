"""Optimizers over an experiment's parameter groups, and learning rate schedules.

One module, because parameter groups, sparse gradients and clipping must fit together in one update.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..devices import has_bf16
from ..errors import LmplayError
from ..plan import Schedule
from .muon import Muon32
from .optimizer_specs import Optimizer, OptimizerSpec
from .swats import Swats

MakeOptimizer = Callable[[list[dict[str, Any]], OptimizerSpec], torch.optim.Optimizer | None]

ROLES = ("matrix", "embedding", "vector")
GROUP_KEYS = {"params", "role", "rows", "lr_scale"}


def lr_multiplier(schedule: Schedule, progress: float) -> float:
    """Return what multiplies the learning rate at `progress` in (0, 1] of a stage's budget.

    Progress is not a step number because a budget may be in minutes. All schedules but one_cycle
    start with a linear warm-up over `warmup`. Then:

    constant, linear_warmup: 1.
    cosine: half a cosine down to `floor` (Loshchilov & Hutter 2017, eq. 5, one cycle).
    wsd: 1, then linearly down to `floor` over the last `decay` (Hu et al. 2024, section 4.2).
    one_cycle: half a cosine up over `warmup` (.3 if 0), down to `floor` (Smith & Topin 2018).
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

    Without weight decay a row without gradient keeps its value and its sum. So this equals
    torch.optim.Adagrad on the dense gradient. torch.optim.Adagrad also takes sparse gradients, but
    needs 1.6 times as long: 92 ms instead of 56 ms for 1,500 rows of a table of 50,257 x 6,144,
    5.9 ms instead of 4.0 ms for 900 rows of 4,096 x 2,048 (two cores, torch 2.13).
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
                rows = grad.indices()[0]
                values = grad.values()
                total = self.state[p]["sum"]
                sums = total.index_select(0, rows).addcmul_(values, values)
                total.index_copy_(0, rows, sums)
                update = values / sums.sqrt_().add_(group["eps"])
                p.index_add_(0, rows, update, alpha=-group["lr"])


def check_groups(groups: list[dict[str, Any]], model: nn.Module) -> None:
    """Check that each parameter is in exactly one group and that the groups are well-formed.

    Raises:
        LmplayError: a parameter is in no group or in two, or a key or role is unknown.
    """
    names = {id(p): name for name, p in model.named_parameters()}
    seen: set[int] = set()
    for group in groups:
        unknown = set(group) - GROUP_KEYS
        if unknown or group.get("role", "matrix") not in ROLES:
            what = sorted(unknown) or group["role"]
            raise LmplayError(f"param_groups: {what} is unknown; roles: {', '.join(ROLES)}")
        for p in group["params"]:
            if id(p) in seen or id(p) not in names:
                name = names.get(id(p), "a tensor")
                raise LmplayError(f"param_groups: {name} is in two groups or not the model's")
            seen.add(id(p))
    missing = [names[i] for i in names if i not in seen]
    if missing:
        listed = ", ".join(missing[:5])
        raise LmplayError(f"param_groups: {listed} would never be trained: in no group")


class Optimizers:
    """All optimizers of one model, used as one.

    Attributes:
        parts: the torch optimizers.
        notes: what the user should know about sparse gradients.
    """

    def __init__(
        self,
        spec: OptimizerSpec,
        groups: list[dict[str, Any]],
        model: nn.Module,
        make: MakeOptimizer | None = None,
    ):
        """make: the experiment's own, :meth:`lmplay.api.ModelRunner.make_optimizer`."""
        check_groups(groups, model)
        self.spec = spec
        self.model = model
        self.notes: list[str] = []
        self.parts: list[torch.optim.Optimizer] = []
        self._sparse_params: list[nn.Parameter] = []
        self._coalesced: dict[int, int] = {}  # rows of each sparse gradient when last coalesced
        trained = [{**g, "params": [p for p in g["params"] if p.requires_grad]} for g in groups]
        trained = [g for g in trained if g["params"]]
        entries = [_entry(group, spec.lr, spec.weight_decay) for group in trained]
        own = make(entries, spec) if make is not None else None
        if own is not None:
            self._use(own, trained, type(own).__name__)
        elif isinstance(spec, Optimizer):
            self._make_torch_optimizers(spec, trained)
        else:
            self._use(spec.make(entries), trained, spec.name)

    def _use(
        self, optimizer: torch.optim.Optimizer, groups: list[dict[str, Any]], name: str
    ) -> None:
        """Use an optimizer of a plugin or of the experiment, which gets dense gradients."""
        if any(group.get("rows") for group in groups):
            self.notes.append(f"dense update of sparse gradients: {name} gets dense ones")
        self.parts = [optimizer]

    def _make_torch_optimizers(self, spec: Optimizer, groups: list[dict[str, Any]]) -> None:
        dense: dict[bool, list[dict[str, Any]]] = {True: [], False: []}  # by whether Muon trains it
        sparse: list[dict[str, Any]] = []
        for group in _split_by_dimensions(groups) if spec.name == "muon" else groups:
            is_matrix = group.get("role", "matrix") == "matrix"
            muon = spec.name == "muon" and is_matrix and all(p.ndim == 2 for p in group["params"])
            if spec.name == "muon" and is_matrix and not muon:
                self.notes.append("AdamW for matrices that are not 2-D: Muon does not take them")
            lr = spec.other_lr if spec.name == "muon" and not muon else spec.lr
            entry = _entry(group, lr, spec.weight_decay)
            if group.get("rows"):
                sparse.append(entry)
            else:
                dense[muon].append(entry)
        if sparse and not self._updates_rows_only(spec, sparse):
            dense[False] += sparse
            sparse = []
        for muon in (True, False):
            if dense[muon]:
                self.parts.append(_make(spec, dense[muon], muon))
        if sparse:
            self.parts.append(_make_sparse(spec, sparse))
        self._sparse_params = [p for g in sparse for p in g["params"]]

    def _updates_rows_only(self, spec: Optimizer, sparse: list[dict[str, Any]]) -> bool:
        """Return whether only looked-up rows are updated, and note it for the user."""
        decay = any(g["weight_decay"] for g in sparse)
        plain_sgd = spec.name == "sgd" and spec.momentum == 0
        exact = not decay and (spec.name == "adagrad" or plain_sgd)
        if exact:
            self.notes.append("sparse update of looked-up rows: exact for this optimizer")
            return True
        if spec.lazy and spec.name in ("adagrad", "adam", "adamw"):
            self.notes.append(
                f"lazy: {spec.name} updates looked-up rows only, without weight decay; "
                "the dense update differs"
            )
            return True
        if spec.lazy:
            raise LmplayError(
                f"optimizer: lazy goes with adagrad, adam and adamw, not with {spec.name}"
            )
        self.notes.append(
            f"dense update of sparse gradients: under {spec.name} the sparse one would differ"
        )
        return False

    def set_lr(self, multiplier: float) -> float:
        """Set the learning rates to `multiplier` times their base; return the plan's."""
        for part in self.parts:
            for group in part.param_groups:
                group["lr"] = group["base_lr"] * multiplier
        return self.spec.lr * multiplier

    def change_rates(self, spec: OptimizerSpec) -> None:
        """Continue with the learning rates of `spec`, which is otherwise equal."""
        for part in self.parts:
            ratio = spec.lr / self.spec.lr
            muons_rest = self.spec.name == "muon" and not isinstance(part, torch.optim.Muon)
            if muons_rest and isinstance(spec, Optimizer) and isinstance(self.spec, Optimizer):
                ratio = spec.other_lr / self.spec.other_lr
            for group in part.param_groups:
                group["base_lr"] *= ratio
        self.spec = spec

    def switch(self, mode: Literal["eval", "train"]) -> None:
        """Put the weights for use in place, or those for training, if an optimizer has both."""
        for part in self.parts:
            method = getattr(part, mode, None)
            if callable(method):
                method()

    def coalesce(self) -> None:
        """Sum repeated rows of sparse gradients once they have doubled in number.

        Autograd accumulates sparse gradients by concatenating their rows.
        """
        for p in self._sparse_params:
            if p.grad is not None and p.grad._nnz() > 2 * self._coalesced.get(id(p), 0):
                p.grad = p.grad.coalesce()
                self._coalesced[id(p)] = p.grad._nnz()

    def unscale_and_clip(
        self, max_norm: float | None, scaler: torch.amp.GradScaler | None = None
    ) -> Tensor:
        """Prepare the gradients for :meth:`step`; return their norm () before clipping.

        Args:
            max_norm: the gradient's norm is clipped to it.
            scaler: divides the gradients by its scale, if it is enabled.
        """
        sparse = {id(p) for p in self._sparse_params}
        values: list[Tensor] = []
        for p in self.model.parameters():
            if p.grad is None:
                continue
            if p.grad.is_sparse:
                p.grad = p.grad.coalesce() if id(p) in sparse else p.grad.to_dense()
            values.append(p.grad.values() if p.grad.is_sparse else p.grad)
        self._coalesced.clear()
        if scaler is not None:
            for part in self._parts_with_gradients():
                scaler.unscale_(part)
        norm = torch.nn.utils.get_total_norm(values)
        if max_norm is not None:
            scale = max_norm / (float(norm) + 1e-6)
            if scale < 1:
                torch._foreach_mul_(values, scale)
        return norm

    def step(self, scaler: torch.amp.GradScaler | None = None) -> None:
        """Update the weights."""
        if scaler is None:
            for part in self.parts:
                part.step()
            return
        for part in self._parts_with_gradients():
            scaler.step(part)

    def _parts_with_gradients(self) -> list[torch.optim.Optimizer]:
        """Return the optimizers that a GradScaler accepts."""
        return [
            part
            for part in self.parts
            if any(p.grad is not None for g in part.param_groups for p in g["params"])
        ]

    def zero_grad(self) -> None:
        """Zero dense gradients in place, because fresh memory is slow; drop sparse ones."""
        for p in self.model.parameters():
            if p.grad is not None and p.grad.is_sparse:
                p.grad = None
            elif p.grad is not None:
                p.grad.zero_()

    def state_tensors(self) -> dict[str, Tensor]:
        """Return the state of all optimizers as tensors named "<parameter>|<entry>"."""
        names = {id(p): name for name, p in self.model.named_parameters()}
        return {
            f"{names[id(p)]}|{key}": value.detach()
            if isinstance(value, Tensor)
            else torch.tensor(float(value))
            for part in self.parts
            for p, state in part.state.items()
            for key, value in state.items()
            if value is not None
        }

    def load_state_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Load what :meth:`state_tensors` returned.

        Raises:
            LmplayError: the state belongs to other parameters.
        """
        names = {id(p): name for name, p in self.model.named_parameters()}
        states: dict[str, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            name, _, entry = key.rpartition("|")
            states.setdefault(name, {})[entry] = value
        sparse = {id(p) for p in self._sparse_params}
        unknown = set(states) - set(names.values())
        if unknown:
            raise LmplayError(
                f"the optimizer's state is of a parameter that is not there: {sorted(unknown)[0]}"
            )
        for part in self.parts:
            params = [p for g in part.param_groups for p in g["params"]]
            known = {i: names[id(p)] for i, p in enumerate(params) if names[id(p)] in states}
            content = part.state_dict()
            content["state"] = {i: states[name] for i, name in known.items()}
            part.load_state_dict(content)
            if isinstance(part, torch.optim.SparseAdam):  # it needs a Python int
                for state in part.state.values():
                    state["step"] = int(state["step"])
            # A trained parameter keeps a gradient, of zeros in a step that does not reach it, so
            # that momentum and weight decay move it. A resumed run must do the same.
            for p in params:
                state = part.state.get(p)
                if state and float(state.get("step", 1)) > 0 and id(p) not in sparse:
                    p.grad = torch.zeros_like(p)


def _entry(group: dict[str, Any], lr: float, weight_decay: float) -> dict[str, Any]:
    """Return a torch parameter group; `base_lr` is what the schedule multiplies."""
    base_lr = lr * group.get("lr_scale", 1.0)
    return {
        "params": group["params"],
        "base_lr": base_lr,
        "lr": base_lr,
        "weight_decay": 0.0 if group.get("role", "matrix") == "vector" else weight_decay,
    }


def _split_by_dimensions(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the groups with two-dimensional and other parameters separated."""
    split = [
        {**g, "params": [p for p in g["params"] if (p.ndim == 2) is two_dimensional]}
        for g in groups
        for two_dimensional in (True, False)
    ]
    return [g for g in split if g["params"]]


def _make(spec: Optimizer, groups: list[dict[str, Any]], muon: bool) -> torch.optim.Optimizer:
    """Return the torch optimizer for dense gradients, fused where torch has it for the device."""
    devices = {p.device.type for g in groups for p in g["params"]}
    fused = devices in ({"cpu"}, {"cuda"})
    if muon:
        in_bf16 = all(has_bf16(p.device) for g in groups for p in g["params"])
        return (torch.optim.Muon if in_bf16 else Muon32)(groups, momentum=spec.momentum)
    match spec.name:
        case "adagrad":
            fused_adagrad = True if devices == {"cpu"} else None
            return torch.optim.Adagrad(groups, eps=spec.eps or 1e-10, fused=fused_adagrad)
        case "sgd":
            return torch.optim.SGD(groups, momentum=spec.momentum, fused=fused)
        case "rmsprop":
            return torch.optim.RMSprop(groups, eps=spec.eps or 1e-8)
        case "swats":
            return Swats(groups, spec.lr, spec.betas, spec.eps or 1e-9, spec.tolerance)
        case "adam":
            return torch.optim.Adam(groups, betas=spec.betas, eps=spec.eps or 1e-8, fused=fused)
        case _:  # adamw, and what Muon does not train
            return torch.optim.AdamW(groups, betas=spec.betas, eps=spec.eps or 1e-8, fused=fused)


def _make_sparse(spec: Optimizer, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """Return the optimizer for sparse gradients."""
    entries = [{k: v for k, v in g.items() if k != "weight_decay"} for g in groups]
    if spec.name == "adagrad":
        return RowAdagrad(entries, eps=spec.eps or 1e-10)
    if spec.name == "sgd":
        return torch.optim.SGD(entries)
    return torch.optim.SparseAdam(entries, betas=spec.betas, eps=spec.eps or 1e-8)
