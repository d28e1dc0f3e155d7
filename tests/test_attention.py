"""The CPU's attention in blocks against the naive form, against torch's own, and as an operator of
torch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from lmplay.api import causal_attention
from lmplay.model import _flops
from lmplay.ops.attention import BLOCK, MIN_BLOCK_LENGTH, block_attention


def heads(t: int, dtype: torch.dtype, batch: int = 2) -> list[Tensor]:
    """q, k, v and an upstream gradient (batch, 3, t, 8), laid out as a model's heads are."""
    return [torch.randn(batch, t, 3, 8, dtype=dtype).transpose(1, 2) for _ in range(4)]


def naive(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    future = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).triu(1)
    return (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(future, float("-inf")).softmax(-1) @ v


def with_gradients(attend: object, tensors: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    q, k, v = (x.detach().to(dtype).requires_grad_() for x in tensors[:3])
    out = attend(q, k, v)  # type: ignore[operator]
    out.backward(tensors[3].to(out.dtype))
    return [x.double() for x in (out.detach(), q.grad, k.grad, v.grad)]


@pytest.mark.parametrize("batch", [1, 2])  # the heads of one sequence are laid out otherwise
@pytest.mark.parametrize("t", [1, 7, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK + 44])
def test_equals_the_naive_form_with_gradients(t: int, batch: int) -> None:
    tensors = heads(t, torch.float64, batch)
    for a, b in zip(
        with_gradients(block_attention, tensors, torch.float64),
        with_gradients(naive, tensors, torch.float64),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("t", [MIN_BLOCK_LENGTH, 300, 1500])
# rotary positions, say, leave float32
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_autocast_takes_it_and_rounds_little_more_than_torch(t: int, dtype: torch.dtype) -> None:
    tensors = [x.to(torch.bfloat16) for x in heads(t, torch.float64)]
    exact = with_gradients(naive, tensors, torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        q, k, v = (x.to(dtype).requires_grad_() for x in tensors[:3])
        made = causal_attention(q, k, v)
    assert made.dtype == torch.bfloat16
    assert "block_attention" in type(made.grad_fn).__name__
    made.backward(tensors[3])
    ours = [x.double() for x in (made.detach(), q.grad, k.grad, v.grad)]
    torchs = with_gradients(
        lambda *x: F.scaled_dot_product_attention(*x, is_causal=True), tensors, torch.bfloat16
    )
    for a, b, reference in zip(ours, torchs, exact, strict=True):
        assert (a - reference).norm() < 2.5 * (b - reference).norm()


def test_float32_and_short_texts_are_torchs() -> None:
    for t, dtype in ((MIN_BLOCK_LENGTH - 1, torch.bfloat16), (MIN_BLOCK_LENGTH, torch.float32)):
        q, k, v, _ = heads(t, dtype)
        assert (
            "block_attention"
            not in type(causal_attention(q.requires_grad_(), k, v).grad_fn).__name__
        )


@pytest.mark.parametrize("batch", [1, 2])
def test_is_an_operator_that_torch_can_compile(batch: int) -> None:
    q, k, v, _ = heads(BLOCK + 3, torch.bfloat16, batch)
    torch.library.opcheck(
        block_attention, (q.requires_grad_(), k.requires_grad_(), v.requires_grad_())
    )


def test_runs_compiled_under_autocast() -> None:
    tensors = heads(BLOCK + 3, torch.float32, batch=1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        eager = with_gradients(causal_attention, tensors, torch.float32)
        compiled = with_gradients(torch.compile(causal_attention), tensors, torch.float32)
    torch.compiler.reset()
    for a, b in zip(compiled, eager, strict=True):
        torch.testing.assert_close(a, b, rtol=0.02, atol=0.02)


def test_counts_as_many_operations_as_torchs() -> None:
    tensors = heads(2 * BLOCK, torch.float32)
    in_blocks = _flops(lambda: with_gradients(block_attention, tensors, torch.bfloat16))
    assert in_blocks == _flops(
        lambda: with_gradients(
            lambda *x: F.scaled_dot_product_attention(*x, is_causal=True), tensors, torch.float32
        )
    )
    with FlopCounterMode(display=False) as counter:  # forward: two products, backward: five
        with_gradients(naive, tensors, torch.float32)
    assert in_blocks == pytest.approx(counter.get_total_flops() * 7 / 6)
