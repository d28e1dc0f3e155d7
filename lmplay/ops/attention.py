"""Causal attention, with a fast version for bfloat16 on a CPU.

On a CPU torch's flash attention takes about twice as long as :func:`block_attention`
(benchmarks/attention_speed.py). It computes the scores of 128 queries at a time with batched matrix
products, skips the blocks above the diagonal and keeps nothing of size (T, T): backward recomputes
the scores. Scores and their gradients are rounded to bfloat16, as every product under autocast is;
sums over blocks are float32.

Forward and backward are custom operators, so that a compiled model calls them and the FLOP counter
counts them on every device.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# Queries at a time. A smaller block skips more above the diagonal, a larger one makes fewer calls.
BLOCK = 128


def _probabilities(q: Tensor, k: Tensor, start: int) -> Tensor:
    """softmax(q kᵀ) (N, t, start + t) of the queries (N, t, h) that begin at position `start`.

    q is already divided by √h.
    """
    t = q.shape[1]
    scores = torch.bmm(q, k[:, : start + t].transpose(1, 2))
    future = torch.full((t, t), float("-inf"), dtype=q.dtype).triu(1)
    scores[:, :, start:] += future  # masked_fill_ takes five times as long
    return scores.softmax(-1)


@torch.library.custom_op("lmplay::block_attention", mutates_args=(), device_types="cpu")
def block_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal softmax(q kᵀ/√h) v on the CPU: q, k, v (B, H, T, h) -> (B, H, T, h)."""
    b, heads, t, h = q.shape
    scaled, k, v = (x.reshape(-1, t, h) for x in (q * h**-0.5, k, v))
    out = scaled.new_empty(scaled.shape)  # contiguous, even if the inputs are views
    for start in range(0, t, BLOCK):
        end = min(start + BLOCK, t)
        p = _probabilities(scaled[:, start:end], k, start)
        out[:, start:end] = torch.bmm(p, v[:, :end])
    return out.view(b, heads, t, h)


@torch.library.custom_op("lmplay::block_attention_backward", mutates_args=(), device_types="cpu")
def block_attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, each (B, H, T, h), from the gradient of the output."""
    b, heads, t, h = q.shape
    scaled, grad, k, v = (x.reshape(-1, t, h) for x in (q * h**-0.5, grad, k, v))
    wide = torch.promote_types(q.dtype, torch.float32) if t > BLOCK else q.dtype
    grad_q = scaled.new_empty(scaled.shape)
    grad_k, grad_v = (scaled.new_empty(scaled.shape, dtype=wide) for _ in range(2))
    # the last block sees every position: it writes, the others add
    for start in reversed(range(0, t, BLOCK)):
        end = min(start + BLOCK, t)
        p = _probabilities(scaled[:, start:end], k, start)
        g = grad[:, start:end]
        of_p = torch.bmm(g, v[:, :end].transpose(1, 2))
        of_scores = torch._softmax_backward_data(of_p, p, -1, p.dtype)
        grad_q[:, start:end] = torch.bmm(of_scores, k[:, :end]).mul_(h**-0.5)
        of_k = torch.bmm(of_scores.mT, scaled[:, start:end])
        of_v = torch.bmm(p.mT, g)
        if end == t:
            grad_k.copy_(of_k)
            grad_v.copy_(of_v)
        else:
            grad_k[:, :end] += of_k
            grad_v[:, :end] += of_v
    grad_k = grad_k.to(q.dtype)
    grad_v = grad_v.to(q.dtype)
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


# Below this length the calls of block_attention cost more than they compute.
MIN_BLOCK_LENGTH = 64


def _is_cpu_bfloat16(*tensors: Tensor) -> bool:
    if tensors[0].device.type != "cpu":
        return False
    if torch.is_autocast_enabled("cpu"):  # autocast does not touch float64
        bfloat16 = torch.get_autocast_dtype("cpu") == torch.bfloat16
        return bfloat16 and all(x.dtype != torch.float64 for x in tensors)
    return all(x.dtype == torch.bfloat16 for x in tensors)


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q kᵀ/√h) v, where the t queries are the *last* t of the T positions.

    Each query sees its own position and those before it. The same call serves training (t = T) and
    decoding with a cache (t < T).

    q (B, H, t, h), k and v (B, H, T, h) -> (B, H, t, h).
    """
    t = q.shape[2]
    total = k.shape[2]
    if t == total:
        if t >= MIN_BLOCK_LENGTH and _is_cpu_bfloat16(q, k, v):
            return block_attention(q.bfloat16(), k.bfloat16(), v.bfloat16())
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    if t == 1:
        return F.scaled_dot_product_attention(q, k, v)
    mask = torch.ones(t, total, dtype=torch.bool, device=q.device).tril(total - t)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def naive_causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Reference for :func:`causal_attention`: the formula, with all scores (B, H, t, T)."""
    t = q.shape[2]
    total = k.shape[2]
    scores = q @ k.mT * q.shape[-1] ** -0.5
    future = torch.ones(t, total, dtype=torch.bool, device=q.device).triu(total - t + 1)
    return scores.masked_fill(future, float("-inf")).softmax(-1) @ v
