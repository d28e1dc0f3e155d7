"""Causal attention for bfloat16 on a CPU: blocks of queries, at the speed of the matrix products.

torch's own flash attention takes about twice as long (benchmarks/attention_speed.py). Here the scores of 128 queries
at a time go through batched products, which run at full rate, and the blocks above the diagonal are left out. Nothing
of the size (T, T) is kept: backward makes the scores again. What it costs is that scores and their gradients are
rounded to bfloat16, as every other product under autocast is; sums over blocks are float32.

Both passes are operators of their own, so that a compiled model calls them and FLOPs are counted alike on all devices.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 128  # queries at a time: smaller leaves more above the diagonal out, larger makes fewer calls


def _probabilities(q: Tensor, k: Tensor, start: int) -> Tensor:
    """softmax(q kᵀ) (N, t, start + t) of the queries from position `start` on, q (N, t, h), already divided by √h."""
    t = q.shape[1]
    scores = torch.bmm(q, k[:, : start + t].transpose(1, 2))
    future = torch.full((t, t), float("-inf"), dtype=q.dtype).triu(1)
    scores[:, :, start:] += future  # masked_fill_ takes five times as long
    return scores.softmax(-1)


@torch.library.custom_op("lmplay::block_attention", mutates_args=(), device_types="cpu")
def block_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q kᵀ/√h) v, each position seeing its past: q, k, v (B, H, T, h) -> (B, H, T, h), on the CPU."""
    b, heads, t, h = q.shape
    scaled, k, v = (x.reshape(-1, t, h) for x in (q * h**-0.5, k, v))
    out = scaled.new_empty(scaled.shape)  # contiguous, whatever a view of the heads is
    for start in range(0, t, BLOCK):
        end = min(start + BLOCK, t)
        p = _probabilities(scaled[:, start:end], k, start)
        out[:, start:end] = torch.bmm(p, v[:, :end])
    return out.view(b, heads, t, h)


@torch.library.custom_op("lmplay::block_attention_backward", mutates_args=(), device_types="cpu")
def block_attention_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v, all (B, H, T, h), from that of :func:`block_attention`'s result."""
    b, heads, t, h = q.shape
    scaled, grad, k, v = (x.reshape(-1, t, h) for x in (q * h**-0.5, grad, k, v))
    wide = torch.promote_types(q.dtype, torch.float32) if t > BLOCK else q.dtype
    grad_q = scaled.new_empty(scaled.shape)
    grad_k, grad_v = (scaled.new_empty(scaled.shape, dtype=wide) for _ in range(2))
    for start in reversed(range(0, t, BLOCK)):  # the last block sees all positions: it fills, the others add
        end = min(start + BLOCK, t)
        p, g = _probabilities(scaled[:, start:end], k, start), grad[:, start:end]
        of_p = torch.bmm(g, v[:, :end].transpose(1, 2))
        of_scores = torch._softmax_backward_data(of_p, p, -1, p.dtype)
        grad_q[:, start:end] = torch.bmm(of_scores, k[:, :end]).mul_(h**-0.5)
        of_k, of_v = torch.bmm(of_scores.mT, scaled[:, start:end]), torch.bmm(p.mT, g)
        if end == t:
            grad_k.copy_(of_k)
            grad_v.copy_(of_v)
        else:
            grad_k[:, :end] += of_k
            grad_v[:, :end] += of_v
    grad_k, grad_v = grad_k.to(q.dtype), grad_v.to(q.dtype)
    return grad_q.view(b, heads, t, h), grad_k.view(b, heads, t, h), grad_v.view(b, heads, t, h)


@block_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return q.new_empty(q.shape)


@block_attention_backward.register_fake
def _(grad: Tensor, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape), q.new_empty(q.shape)


block_attention.register_autograd(
    lambda ctx, grad: block_attention_backward(grad, *ctx.saved_tensors),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)
