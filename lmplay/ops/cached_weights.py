"""Compute tensors that depend on weights alone once per optimizer step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


@contextmanager
def cache_weights(
    model: Any, compute: Callable[[], dict[str, Tensor]], attribute: str = "cached"
) -> Iterator[None]:
    """Keep the tensors of `compute()` in `model.cached` while no weight changes.

    Backward passes inside the context stop at the kept tensors and accumulate gradients there. On
    exit, one backward pass through `compute` carries the sums on to the parameters. Because
    differentiation is linear, the gradients equal those of calling `compute` in every forward
    pass. If an exception leaves the context, the gradients are dropped.

    Args:
        model: has the attribute, which is None outside of the context.
        compute: returns tensors by name, computed from the model's parameters.
        attribute: where the tensors are kept.
    """
    if getattr(model, attribute) is not None:  # an outer context already keeps them
        yield
        return
    computed = compute()
    kept = {name: t.detach().requires_grad_(t.requires_grad) for name, t in computed.items()}
    setattr(model, attribute, kept)
    try:
        yield
        reached = [(computed[name], t.grad) for name, t in kept.items() if t.grad is not None]
    finally:
        setattr(model, attribute, None)
    if reached:
        tensors, grads = zip(*reached, strict=True)
        torch.autograd.backward(tensors, grads)
