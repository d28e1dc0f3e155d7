"""Mixture of experts: each token passes a few of many feed-forward layers.

The idea: more parameters at the same compute (Shazeer et al. 2017, arXiv 1701.06538; with shared
experts Dai et al. 2024, arXiv 2401.06066, section 3).

    s = σ(R x) (E);   chosen: the num_active largest of s + b
    ff(x) = sum over chosen of s_e expert_e(x) + sum over num_shared of expert(x)

Experts are modern's feed-forward layers with 2 D inside, so two cost as much as modern's. What
keeps experts equally busy, by their loads f_e over all of an optimizer step:

    bias: b_e grows by balance_rate if f_e is below the mean, else shrinks, and is not trained
          (Wang et al. 2024, arXiv 2408.15664, algorithm 1)
    loss: balance_rate E sum f_e mean(s_e / sum s) is trained as well, and b = 0 (Fedus et al. 2021,
          arXiv 2101.03961, eq. 4-6). f_e is the last step's: a step's own is known too late.

The claim (to be tested): better at equal compute. A log book behind this project found 8 experts
with 2 active worse than a dense model of equal size, in one run.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lmplay.api import Batch, KVCache, ModelRunner, StepOut, causal_attention, dropout


@dataclass(frozen=True)
class Config:
    num_blocks: int = 6
    embed_dim: int = 768
    num_heads: int = 12
    max_len: int = 1024
    vocab_size: int = 50257
    dropout: float = 0.0
    rotary_base: float = 10000.0  # the longest wavelength is 2 pi of it
    num_experts: int = 8  # CHANGED: to choose from
    num_active: int = 2  # CHANGED: of them for each token
    num_shared: int = 0  # CHANGED: experts that every token passes as well
    balance: Literal["bias", "loss"] = "bias"  # CHANGED: what keeps experts equally busy
    balance_rate: float = 0.001  # CHANGED: a step of a bias, or the weight of the loss

    def __post_init__(self) -> None:
        if self.embed_dim % (2 * self.num_heads):
            raise ValueError(
                f"rotary positions need heads of an even size: embed_dim {self.embed_dim} is not a "
                f"multiple of 2 x num_heads {self.num_heads}"
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout {self.dropout} is not in [0, 1)")
        # CHANGED: to the end
        if not 1 <= self.num_active < self.num_experts or self.num_shared < 0:
            raise ValueError("num_active must be in [1, num_experts), num_shared 0 or more")
        if self.balance not in ("bias", "loss"):
            raise ValueError(f'balance "{self.balance}" is neither "bias" nor "loss"')
        if self.balance_rate <= 0:
            raise ValueError(f"balance_rate {self.balance_rate} is not above 0")


class Linear(nn.Linear):
    """nn.Linear without a bias, that starts normal with 1 / sqrt(inputs), or at zero."""

    def __init__(self, in_features: int, out_features: int, zero: bool = False):
        self.std = 0.0 if zero else in_features**-0.5  # before super().__init__, which uses it
        super().__init__(in_features, out_features, bias=False)

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=self.std)


class Embedding(nn.Embedding):
    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=0.02)


def norm(x: Tensor) -> Tensor:
    """RMSNorm without a gain, over the last dimension."""
    return F.rms_norm(x, x.shape[-1:])


def rotary_table(c: Config, past: int, t: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return cos and sin (t, h/2) of the angles at the positions from `past` on."""
    half = c.embed_dim // c.num_heads // 2
    frequencies = c.rotary_base ** (-torch.arange(half, device=like.device) / half)
    positions = torch.arange(past, past + t, device=like.device)
    angles = positions.unsqueeze(1) * frequencies
    return angles.cos().to(like.dtype), angles.sin().to(like.dtype)


def rotate(x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """Turn dimensions i and i + h/2 of x (B, H, t, h) by the angle of their position."""
    cos, sin = rotary
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


class Attention(nn.Module):
    def __init__(self, c: Config, layer: int):
        super().__init__()
        self.layer = layer
        self.num_heads = c.num_heads
        self.dropout = c.dropout
        self.query = Linear(c.embed_dim, c.embed_dim)
        self.key = Linear(c.embed_dim, c.embed_dim)
        self.value = Linear(c.embed_dim, c.embed_dim)
        self.proj = Linear(c.embed_dim, c.embed_dim, zero=True)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor], cache: KVCache | None) -> Tensor:
        head_shape = (self.num_heads, x.shape[-1] // self.num_heads)  # (H, h)
        q = self.query(x).unflatten(-1, head_shape).transpose(1, 2)  # (B, H, t, h)
        k = self.key(x).unflatten(-1, head_shape).transpose(1, 2)
        v = self.value(x).unflatten(-1, head_shape).transpose(1, 2)
        q = rotate(norm(q), rotary)
        k = rotate(norm(k), rotary)
        if cache is not None:
            k, v = cache.append(self.layer, k, v)  # (B, H, T, h)
        out = causal_attention(q, k, v).transpose(1, 2).flatten(2)  # (B, t, D)
        return dropout(self.proj(out), self.dropout, self.training)


# CHANGED: to Block
@torch.compiler.disable  # torch 2.13's shape rule of grouped_mm knows bfloat16 only
def grouped_product(x: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    """Multiply rows of x (N, D) by the weights (E, D, F) of their group, which ends at ends (E)."""
    if x.dtype != torch.float64:  # grouped_mm has no float64, which tests need
        return F.grouped_mm(x, weights, offs=ends)
    parts = x.tensor_split(ends[:-1].cpu().long())
    return torch.cat([part @ w for part, w in zip(parts, weights, strict=True)])


class FeedForward(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.c = c
        experts = range(c.num_experts + c.num_shared)  # the shared ones last
        self.router = Linear(c.embed_dim, c.num_experts)
        self.fc1: Any = nn.ModuleList(Linear(c.embed_dim, 2 * c.embed_dim) for _ in experts)
        second = (Linear(2 * c.embed_dim, c.embed_dim, zero=True) for _ in experts)
        self.fc2: Any = nn.ModuleList(second)
        self.bias = nn.Buffer(torch.zeros(c.num_experts))
        self.load = nn.Buffer(torch.full((c.num_experts,), 1 / c.num_experts))
        self.counts = nn.Buffer(torch.zeros(c.num_experts, dtype=torch.int64))
        self.uneven: Tensor | None = None  # (), of the latest forward pass: the loss's term

    def forward(self, x: Tensor) -> Tensor:
        c = self.c
        rows = x.flatten(0, 1)  # (N, D)
        scores = self.router(rows).sigmoid()  # (N, E)
        chosen = (scores + self.bias).topk(c.num_active).indices  # (N, k)
        weights = F.pad(scores.gather(1, chosen), (0, c.num_shared), value=1.0)
        every = torch.arange(len(self.fc1), device=x.device)
        chosen = torch.cat([chosen, every[c.num_experts :].expand(len(rows), -1)], 1)
        counts = (chosen.unsqueeze(-1) == every).sum((0, 1))
        if self.training:
            self.counts.add_(counts[: c.num_experts])
            shares = (scores / scores.sum(-1, keepdim=True)).mean(0)
            self.uneven = c.num_experts * (self.load.to(shares.dtype) * shares).sum()
        order = chosen.flatten().argsort(stable=True)  # rows sorted by expert
        ends = counts.cumsum(0).to(torch.int32)
        first, second = (
            torch.stack([layer.weight for layer in layers]).to(scores.dtype).mT
            for layers in (self.fc1, self.fc2)
        )
        inner = grouped_product(rows[order // chosen.shape[1]].to(scores.dtype), first, ends)
        out = grouped_product(F.relu(inner).square(), second, ends)
        out = out[order.argsort()].unflatten(0, chosen.shape)  # (N, k, D)
        out = (out * weights.unsqueeze(-1)).sum(1).view_as(x)
        return dropout(out, c.dropout, self.training)

    @torch.no_grad()
    def end_step(self) -> None:
        """Use what was counted in an optimizer step, and begin to count anew."""
        if self.counts.any():
            self.load.copy_(self.counts / self.counts.sum())
            if self.c.balance == "bias":
                self.bias.add_(self.c.balance_rate * (self.load.mean() - self.load).sign())
            self.counts.zero_()


class Block(nn.Module):
    def __init__(self, c: Config, layer: int):
        super().__init__()
        self.attn = Attention(c, layer)
        self.ff = FeedForward(c)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor], cache: KVCache | None) -> Tensor:
        x = x + self.attn(norm(x), rotary, cache)
        return x + self.ff(norm(x))


class Transformer(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.c = c
        self.tok_embed = Embedding(c.vocab_size, c.embed_dim)
        self.blocks = nn.ModuleList(Block(c, layer) for layer in range(c.num_blocks))
        self.head = Linear(c.embed_dim, c.vocab_size, zero=True)

    def forward(self, ids: Tensor, cache: KVCache | None = None) -> Tensor:
        """ids (B, t) -> hidden states (B, t, D); `head` turns them into logits."""
        x = norm(dropout(self.tok_embed(ids), self.c.dropout, self.training))
        past = 0 if cache is None else cache.length
        rotary = rotary_table(self.c, past, ids.shape[1], x)
        for block in self.blocks:
            x = block(x, rotary, cache)
        if cache is not None:
            cache.advance(ids.shape[1])
        return norm(x)


class Runner(ModelRunner):
    Config = Config

    def build(self) -> nn.Module:
        return Transformer(self.config)

    # CHANGED: to the end
    def step(self, model: nn.Module, batch: Batch) -> StepOut:
        out = super().step(model, batch)
        layers = [m for m in model.modules() if isinstance(m, FeedForward)]
        terms = [layer.uneven for layer in layers if layer.uneven is not None]
        if model.training and self.config.balance == "loss":
            out.aux_loss = self.config.balance_rate * torch.stack(terms).sum()
        for layer in layers:
            layer.uneven = None
        return out

    @contextmanager
    def fixed_weights(self, model: nn.Module) -> Iterator[None]:
        """The balance is updated at the end of an optimizer step."""
        yield
        for module in model.modules() if model.training else ():
            if isinstance(module, FeedForward):
                module.end_step()


BASELINE = "modern"

VARIANTS: dict[str, dict] = {
    "moe": {},
    "moe_loss": {"balance": "loss", "balance_rate": 0.01},
    "moe_shared": {"num_active": 1, "num_shared": 1},
}
