"""The optimizer `swats`: Adam, until the rate that SGD would need is known; then SGD."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class Swats(torch.optim.Optimizer):
    """Algorithm 1 of arXiv 1712.07628, over all parameters together.

        p = Adam's step;  gamma = p.p / -(p.g)         the rate with which SGD would step as far
        mean = beta2 mean + (1 - beta2) gamma           debiased by 1 / (1 - beta2^k)
        |mean - gamma| < tolerance mean:  from now on v = beta1 v + g;  w -= (1 - beta1) mean v

    The paper is Keskar and Socher 2017. Weight decay is added to the gradient, as there. Its
    tolerance is 1e-9 absolute, which a gradient's noise does not meet in a short run.
    The learning rate's schedule multiplies SGD's rate as well.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-9,
        tolerance: float = 0.01,
    ):
        super().__init__(params, {"lr": lr, "weight_decay": 0.0, "base_lr": lr})
        self.betas = betas
        self.eps = eps
        self.tolerance = tolerance

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        entries = [
            (group, p) for group in self.param_groups for p in group["params"] if p.grad is not None
        ]
        for _, p in entries:
            if not self.state[p]:
                self._begin(p)
        if not entries:
            return
        gradients = [
            p.grad if not group["weight_decay"] else p.grad.add(p, alpha=group["weight_decay"])
            for group, p in entries
        ]
        # The numbers of all parameters are the same; each has them so that they are saved.
        shared = self.state[entries[0][1]]
        if float(shared["rate"]):
            self._sgd_step(entries, gradients, float(shared["rate"]))
        else:
            self._adam_step(entries, gradients)

    def _begin(self, p: Tensor) -> None:
        state = self.state[p]
        for name in ("exp_avg", "exp_avg_sq", "momentum_buffer"):
            state[name] = torch.zeros_like(p)
        for name in ("step", "mean", "rate"):  # rate: SGD's; 0 while it is Adam's turn
            state[name] = torch.zeros(())  # float32, as torch loads a state

    def _adam_step(
        self, entries: list[tuple[dict[str, Any], Tensor]], gradients: list[Any]
    ) -> None:
        beta1, beta2 = self.betas
        k = float(self.state[entries[0][1]]["step"]) + 1
        correction = math.sqrt(1 - beta2**k) / (1 - beta1**k)
        squares = 0.0
        along = 0.0
        for (group, p), g in zip(entries, gradients, strict=True):
            state = self.state[p]
            state["exp_avg"].lerp_(g, 1 - beta1)
            state["exp_avg_sq"].mul_(beta2).addcmul_(g, g, value=1 - beta2)
            update = state["exp_avg"] / state["exp_avg_sq"].sqrt().add_(self.eps)
            update.mul_(-group["lr"] * correction)
            p.add_(update)
            squares += float(update.double().square().sum())
            along += float((update.double() * g).sum())
        # The mean of rates at the full learning rate, whatever the schedule does to it now.
        multiplier = entries[0][0]["lr"] / entries[0][0]["base_lr"]
        gamma = squares / -along / multiplier if along and multiplier else None
        mean = float(self.state[entries[0][1]]["mean"])
        rate = 0.0
        if gamma is not None:
            mean = beta2 * mean + (1 - beta2) * gamma
            debiased = mean / (1 - beta2**k)
            if k > 1 and debiased > 0 and abs(debiased - gamma) < self.tolerance * debiased:
                rate = debiased
        for _, p in entries:
            state = self.state[p]
            for name, value in (("step", k), ("mean", mean), ("rate", rate)):
                state[name].fill_(value)

    def _sgd_step(
        self, entries: list[tuple[dict[str, Any], Tensor]], gradients: list[Any], rate: float
    ) -> None:
        beta1, _ = self.betas
        for (group, p), g in zip(entries, gradients, strict=True):
            buffer = self.state[p]["momentum_buffer"]
            buffer.mul_(beta1).add_(g)
            p.add_(buffer, alpha=-(1 - beta1) * rate * group["lr"] / group["base_lr"])
