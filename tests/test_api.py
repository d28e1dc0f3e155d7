"""The chunked head and loss, attention with a cache, and dropout, each against a naive
reference."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lmplay.api import IGNORE, KVCache, causal_attention, dropout, linear_cross_entropy
from lmplay.ops.cross_entropy import VOCAB_SLICE, naive_cross_entropy_sums


@pytest.mark.parametrize("chunk", [1, 5, 7, 64])
@pytest.mark.parametrize("bias", [True, False])
def test_linear_cross_entropy_matches_the_naive_form(chunk: int, bias: bool) -> None:
    head = nn.Linear(6, 11, bias=bias).double()
    hidden = torch.randn(3, 7, 6, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(11, (3, 7))
    targets[0, :4] = IGNORE
    out = linear_cross_entropy(hidden, head, targets, chunk=chunk)
    (3.5 * out.loss_sum).backward()
    got = [hidden.grad, *(p.grad for p in head.parameters())]
    hidden.grad = None
    head.zero_grad()
    logits = head(hidden)
    naive = F.cross_entropy(
        logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction="sum"
    )
    (3.5 * naive).backward()
    torch.testing.assert_close(out.loss_sum, naive)
    for a, b in zip(got, [hidden.grad, *(p.grad for p in head.parameters())], strict=True):
        torch.testing.assert_close(a, b)
    assert int(out.n_tokens) == 17
    assert int(out.n_correct) == int(((logits.argmax(-1) == targets) & (targets != IGNORE)).sum())


@pytest.mark.parametrize("equal", ["all", "two", "none"])
def test_of_equal_logits_the_first_alone_is_a_hit(equal: str) -> None:
    """A head that starts at zero knows nothing; that every tie is a hit would make it perfect."""
    head = nn.Linear(6, 50, bias=False)
    with torch.no_grad():
        if equal == "all":
            head.weight.zero_()
        elif equal == "two":
            head.weight[25:] = head.weight[:25]
    hidden = torch.randn(4, 30, 6)
    targets = torch.randint(50, (4, 30))
    targets[0, 0] = IGNORE
    fast = linear_cross_entropy(hidden, head, targets, chunk=16)
    loss, count, hits = naive_cross_entropy_sums(hidden, head, targets)
    torch.testing.assert_close(fast.loss_sum, loss)
    assert int(fast.n_tokens) == int(count)
    assert int(fast.n_correct) == int(hits) < 40
    if equal == "all":
        assert int(hits) == int((targets == 0).sum())


def test_linear_cross_entropy_keeps_extreme_logits_finite() -> None:
    head = nn.Linear(2, 4, bias=False)
    with torch.no_grad():
        head.weight.copy_(torch.tensor([[900.0, 0], [-900.0, 0], [0, 0], [0, 1]]))
    out = linear_cross_entropy(
        torch.tensor([[[1.0, 0.0]]], requires_grad=True), head, torch.tensor([[1]])
    )
    assert out.loss_sum.item() == pytest.approx(1800)
    out.loss_sum.backward()
    assert bool(head.weight.grad.isfinite().all())


def test_linear_cross_entropy_without_gradients_and_twice_backward() -> None:
    head = nn.Linear(4, 9)
    hidden = torch.randn(1, 3, 4)
    targets = torch.randint(9, (1, 3))
    with torch.no_grad():
        assert not linear_cross_entropy(hidden, head, targets).loss_sum.requires_grad
    out = linear_cross_entropy(hidden, head, targets)
    out.loss_sum.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="twice"):
        out.loss_sum.backward()


def test_linear_cross_entropy_bf16_is_near_float32() -> None:
    vocab = VOCAB_SLICE + 50  # the head's gradient takes two slices, in four chunks
    head = nn.Linear(16, vocab)
    hidden = torch.randn(2, 9, 16)
    targets = torch.randint(vocab, (2, 9))
    exact = linear_cross_entropy(hidden, head, targets)
    wanted = torch.autograd.grad(exact.loss_sum, (head.weight, head.bias))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = linear_cross_entropy(hidden, head, targets, chunk=5)
    assert half.loss_sum.dtype == torch.float32
    assert half.loss_sum.item() == pytest.approx(exact.loss_sum.item(), rel=0.02)
    for made, right in zip(
        torch.autograd.grad(half.loss_sum, (head.weight, head.bias)), wanted, strict=True
    ):
        assert (made - right).norm() < 0.02 * right.norm()


def test_causal_attention_of_the_last_positions() -> None:
    q, k, v = (torch.randn(2, 3, 8, 4, dtype=torch.float64) for _ in range(3))
    scores = q @ k.transpose(-1, -2) / 2
    hidden = torch.ones(8, 8, dtype=torch.bool).triu(1)
    naive = scores.masked_fill(hidden, float("-inf")).softmax(-1) @ v
    for t in (1, 3, 8):
        torch.testing.assert_close(causal_attention(q[:, :, -t:], k, v), naive[:, :, -t:])


def test_cache_refuses_what_does_not_fit() -> None:
    cache = KVCache(1, 1, 1, 4, 2, torch.zeros(1))
    k = torch.ones(1, 1, 3, 2)
    keys, _ = cache.append(0, k, k)
    assert keys.shape == (1, 1, 3, 2)
    cache.advance(3)
    with pytest.raises(ValueError, match="holds 4"):
        cache.append(0, k, k)


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_dropout_drops_the_share_it_says(p: float) -> None:
    x = torch.ones(100_003, requires_grad=True)
    y = dropout(x, p, training=True)
    rounded = round(p * 256) / 256
    kept = (y != 0).float()
    assert float(1 - kept.mean()) == pytest.approx(rounded, abs=0.01)
    assert y.mean().item() == pytest.approx(1.0, abs=0.02)
    # each of the eight bytes of a random word drops as often
    shares = 1 - kept[: len(kept) // 8 * 8].view(-1, 8).mean(0)
    assert bool(((shares - rounded).abs() < 0.02).all())
    y.sum().backward()
    assert torch.equal(x.grad, y.detach())  # the same mask and scale on the way back
    assert dropout(x, p, training=False) is x
