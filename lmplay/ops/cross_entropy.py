"""Output layer and cross entropy in chunks, without the (B, T, V) logits."""

from __future__ import annotations

from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from . import IGNORE

CHUNK_BYTES = 64 * 2**20
"""Room for one chunk of float32 logits. Large enough that a product with the head runs at full
speed."""

VOCAB_SLICE = 4096
"""Rows of the head's gradient that a CPU makes at a time under autocast: a product that is still in
the cache is added half again as fast."""


class _LinearCrossEntropy(torch.autograd.Function):
    """Head and cross entropy in chunks of rows, gradients computed in the forward pass.

    Because the loss is a sum whose upstream gradient is one scalar, the gradients can be taken
    while a chunk's logits are at hand and scaled later: nothing is computed twice and no (N, V)
    tensor is held.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, chunk: int
    ) -> tuple[Tensor, Tensor]:
        device = x.device.type
        dtype = (
            torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
        )
        # logits and loss: never below float32
        accumulate = torch.promote_types(dtype, torch.float32)
        n = x.shape[0]
        vocab = weight.shape[0]
        need_x, need_weight, need_bias = ctx.needs_input_grad[:3]
        need = need_x or need_weight or need_bias
        with torch.autocast(device, enabled=False):
            w = weight.to(dtype)
            xs_all = x.to(dtype)
            grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device) if need_x else None
            grad_w = torch.zeros_like(weight) if need_weight else None
            grad_b = torch.zeros_like(bias) if need_bias and bias is not None else None
            loss = torch.zeros((), dtype=accumulate, device=x.device)
            correct = torch.zeros((), dtype=torch.int64, device=x.device)
            rows = min(chunk, n)
            slice_of_vocab = VOCAB_SLICE if device == "cpu" else vocab
            all_counted = bool((targets != IGNORE).all())  # asked once: on a GPU it waits
            buffer = torch.empty(rows, vocab, dtype=dtype, device=x.device)
            log_probs = torch.empty(rows, vocab, dtype=accumulate, device=x.device)
            for start in range(0, n, rows):
                xs = xs_all[start : start + rows]
                ts = targets[start : start + rows]
                logits = buffer[: len(xs)]
                logp = log_probs[: len(xs)]
                if bias is None:
                    torch.mm(xs, w.t(), out=logits)
                else:
                    torch.addmm(bias.to(dtype), xs, w.t(), out=logits)
                torch.log_softmax(logits, -1, dtype=accumulate, out=logp)
                counted = ts != IGNORE
                picked = logp.gather(1, ts.clamp(min=0).unsqueeze(1)).squeeze(1)
                loss -= (picked * counted).sum()
                correct += ((logp.argmax(-1) == ts) & counted).sum()
                if not need:
                    continue
                # d loss / d logits = softmax - onehot, and 0 in rows that are not counted.
                delta = logp.exp_()
                delta.scatter_add_(
                    1, ts.clamp(min=0).unsqueeze(1), -torch.ones_like(picked).unsqueeze(1)
                )
                if not all_counted:
                    delta *= counted.unsqueeze(1)
                if grad_b is not None:
                    grad_b += delta.sum(0)
                delta = delta if dtype == accumulate else logits.copy_(delta)
                if grad_x is not None:
                    grad_x[start : start + rows] = delta @ w
                if grad_w is not None:
                    if grad_w.dtype == dtype:
                        # addmm_ would not be counted as FLOPs
                        torch.addmm(grad_w, delta.t(), xs, out=grad_w)
                    else:
                        for first in range(0, vocab, slice_of_vocab):
                            some = slice(first, first + slice_of_vocab)
                            grad_w[some] += delta[:, some].t() @ xs
        ctx.grads = (grad_x, grad_w, grad_b)
        ctx.mark_non_differentiable(correct)
        return loss, correct

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, _: Tensor) -> tuple[Any, ...]:
        if ctx.grads is None:
            raise RuntimeError("linear_cross_entropy: backward ran twice over one forward pass")
        grads = ctx.grads
        ctx.grads = None
        # In place: the buffers were made for this one use, and a copy of (V, D) costs more than the
        # scaling.
        return (*(None if g is None else g.mul_(grad_loss.to(g.dtype)) for g in grads), None, None)


class OutputLayer(Protocol):
    """Anything with a weight (V, D) and a bias (V) or None, such as nn.Linear."""

    @property
    def weight(self) -> Tensor: ...

    @property
    def bias(self) -> Tensor | None: ...


def cross_entropy_sums(
    hidden: Tensor, head: OutputLayer, targets: Tensor, chunk: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Cross entropy of head(hidden), summed over the counted tokens.

    Args:
        hidden: (B, T, D) last hidden states of the model.
        head: the output layer.
        targets: (B, T) int64, IGNORE where no loss is counted.
        chunk: rows of logits held at a time. Default: as many as fit in CHUNK_BYTES.

    Returns:
        The loss in nats, the number of counted tokens and the number of hits, () each. A hit is a
        target with the largest logit; of equal ones the first counts. Under autocast the matrix
        products use autocast's type and the loss is float32.
    """
    weight = head.weight
    bias = head.bias
    if not torch.is_grad_enabled():
        # A Function would compute gradients whenever its inputs require them.
        weight = weight.detach()
        bias = None if bias is None else bias.detach()
    if chunk is None:
        chunk = max(64, CHUNK_BYTES // (4 * weight.shape[0]))
    flat = targets.reshape(-1)
    rows = hidden.reshape(-1, hidden.shape[-1])
    loss, correct = _LinearCrossEntropy.apply(rows, weight, bias, flat, chunk)
    return loss, (flat != IGNORE).sum(), correct


def naive_cross_entropy_sums(
    hidden: Tensor, head: OutputLayer, targets: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Reference for :func:`cross_entropy_sums`: all logits at once."""
    logits = F.linear(hidden, head.weight, head.bias).flatten(0, 1)
    flat = targets.flatten()
    counted = flat != IGNORE
    loss = F.cross_entropy(logits, flat, ignore_index=IGNORE, reduction="sum")
    hits = (logits.argmax(-1) == flat) & counted
    return loss, counted.sum(), hits.sum()
