"""Learned residual add: each block may keep less of what comes in, or take more of what it
computes.

The idea: x + f weighs the stream and the branch alike for ever. Two factors let a block forget or
insist.

    x + f   becomes   α x + β f       α, β = .4 + (1.5 - .4) σ(·)

`factors` says where they come from: trained numbers, a linear layer over [x, f], or a small MLP
over it (one hidden layer of width D, GELU); `per_feature` gives each of the D features its own.
Every factor starts at 1 (σ⁻¹(6/11) in the bias, weights at 0), so that training starts from the
baseline's function; with the MLP near it. Differs from gpt2ish in the lines marked CHANGED. Costs
for each of the 2 L additions: 2 numbers, or 2D per feature; linear 4D (4D² per feature), mlp 2D² +
2D (4D² per feature). Nothing folds: the factors serve inference.

The claim (to be tested): trained factors help deep models, predicted ones help more.
Result so far (2026-11-23, docs/results.md): on the plan laptop .011 and .012 nats per token better
than gpt2ish, seeds 0 and 1; lmp_trial on the plan sketch: UNDECIDED, a gain of .013.
Source: https://github.com/jmward01/lmplay (learned residual add).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lmplay.api import KVCache, ModelRunner, causal_attention, dropout


@dataclass(frozen=True)
class Config:
    num_blocks: int = 6
    embed_dim: int = 768
    num_heads: int = 12
    max_len: int = 1024
    vocab_size: int = 50257
    dropout: float = 0.1
    tied: bool = False
    head_bias: bool = True
    init: Literal["gpt2", "torch"] = "gpt2"  # how the layers start
    gelu: Literal["none", "tanh"] = "none"  # GELU's approximation; GPT-2 was trained with tanh
    factors: Literal["trained", "linear", "mlp"] = "trained"  # CHANGED: where α and β come from
    per_feature: bool = False  # CHANGED: a factor for each feature

    def __post_init__(self) -> None:
        if self.embed_dim % self.num_heads:
            raise ValueError(
                f"embed_dim {self.embed_dim} is not a multiple of num_heads {self.num_heads}"
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout {self.dropout} is not in [0, 1)")
        if self.init not in ("gpt2", "torch"):
            raise ValueError(f'init "{self.init}" is neither "gpt2" nor "torch"')
        if self.gelu not in ("none", "tanh"):
            raise ValueError(f'gelu "{self.gelu}" is neither "none" nor "tanh"')
        if self.tied and self.head_bias:
            raise ValueError("tied=true needs head_bias=false")


class Linear(nn.Linear):
    """nn.Linear that starts as GPT-2's (normal weights, zero bias), or as torch's without std."""

    def __init__(self, in_features: int, out_features: int, bias: bool = True, std: float = 0.02):
        self.std: float | None = std  # before super().__init__, which calls reset_parameters
        super().__init__(in_features, out_features, bias)

    def reset_parameters(self) -> None:
        if self.std is None:
            super().reset_parameters()
            return
        nn.init.normal_(self.weight, std=self.std)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class Embedding(nn.Embedding):
    """nn.Embedding that starts as GPT-2's, or as torch's without std."""

    std: float | None = 0.02

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=1.0 if self.std is None else self.std)


def start_as(init: str, model: nn.Module) -> nn.Module:
    """Return the model, whose layers start as torch's do if `init` is "torch"."""
    for module in model.modules():
        if init == "torch" and isinstance(module, Linear | Embedding):
            module.std = None
    return model


class Attention(nn.Module):
    def __init__(self, c: Config, layer: int):
        super().__init__()
        self.layer = layer
        self.num_heads = c.num_heads
        self.dropout = c.dropout
        self.query = Linear(c.embed_dim, c.embed_dim)
        self.key = Linear(c.embed_dim, c.embed_dim)
        self.value = Linear(c.embed_dim, c.embed_dim)
        self.proj = Linear(c.embed_dim, c.embed_dim, std=0.02 / math.sqrt(2 * c.num_blocks))

    def forward(self, x: Tensor, cache: KVCache | None) -> Tensor:
        head_shape = (self.num_heads, x.shape[-1] // self.num_heads)  # (H, h)
        q = self.query(x).unflatten(-1, head_shape).transpose(1, 2)  # (B, H, t, h)
        k = self.key(x).unflatten(-1, head_shape).transpose(1, 2)
        v = self.value(x).unflatten(-1, head_shape).transpose(1, 2)
        if cache is not None:
            k, v = cache.append(self.layer, k, v)  # (B, H, T, h)
        out = causal_attention(q, k, v).transpose(1, 2).flatten(2)  # (B, t, D)
        return dropout(self.proj(out), self.dropout, self.training)


class FeedForward(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.dropout = c.dropout
        self.gelu = c.gelu
        self.fc1 = Linear(c.embed_dim, 4 * c.embed_dim)
        self.fc2 = Linear(4 * c.embed_dim, c.embed_dim, std=0.02 / math.sqrt(2 * c.num_blocks))

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.gelu(self.fc1(x), approximate=self.gelu)
        return dropout(self.fc2(hidden), self.dropout, self.training)


# CHANGED: to Block
class LearnedAdd(nn.Module):
    """α x + β f, each factor in (FLOOR, CEIL) and starting at 1. x, f (..., D) -> (..., D)."""

    FLOOR = 0.4
    CEIL = 1.5

    def __init__(self, c: Config):
        super().__init__()
        self.width = c.embed_dim if c.per_feature else 1
        read = {"trained": 0, "linear": 2 * c.embed_dim, "mlp": c.embed_dim}[c.factors]
        self.hidden = Linear(2 * c.embed_dim, c.embed_dim) if c.factors == "mlp" else None
        self.weight = nn.Parameter(torch.empty(2 * self.width, read)) if read else None
        self.bias = nn.Parameter(torch.empty(2 * self.width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        share = (1 - self.FLOOR) / (self.CEIL - self.FLOOR)
        nn.init.constant_(self.bias, math.log(share / (1 - share)))  # the factor 1
        if self.weight is not None:  # a hidden layer learns only through weights that are not 0
            nn.init.normal_(self.weight, std=0.02 if self.hidden else 0.0)

    def forward(self, x: Tensor, f: Tensor) -> Tensor:
        raw: Tensor = self.bias
        if self.weight is not None:
            read = torch.cat([x, f.to(x.dtype)], -1)  # (..., 2D)
            raw = F.linear(
                read if self.hidden is None else F.gelu(self.hidden(read)), self.weight, self.bias
            )
        alpha, beta = (
            self.FLOOR + (self.CEIL - self.FLOOR) * torch.sigmoid(raw.to(x.dtype))
        ).chunk(2, -1)
        return alpha * x + beta * f


class Block(nn.Module):
    def __init__(self, c: Config, layer: int):
        super().__init__()
        self.ln1 = nn.LayerNorm(c.embed_dim)
        self.attn = Attention(c, layer)
        self.ln2 = nn.LayerNorm(c.embed_dim)
        self.ff = FeedForward(c)
        # CHANGED
        self.add1 = LearnedAdd(c)
        self.add2 = LearnedAdd(c)

    def forward(self, x: Tensor, cache: KVCache | None) -> Tensor:
        x = self.add1(x, self.attn(self.ln1(x), cache))  # CHANGED
        return self.add2(x, self.ff(self.ln2(x)))  # CHANGED


class GPT(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.dropout = c.dropout
        self.tok_embed = Embedding(c.vocab_size, c.embed_dim)
        self.pos_embed = Embedding(c.max_len, c.embed_dim)
        self.blocks = nn.ModuleList(Block(c, layer) for layer in range(c.num_blocks))
        self.ln = nn.LayerNorm(c.embed_dim)
        self.head = Linear(c.embed_dim, c.vocab_size, bias=c.head_bias)
        if c.tied:
            self.head.weight = self.tok_embed.weight

    def forward(self, ids: Tensor, cache: KVCache | None = None) -> Tensor:
        """ids (B, t) -> hidden states (B, t, D); `head` turns them into logits."""
        past = 0 if cache is None else cache.length
        positions = torch.arange(past, past + ids.shape[1], device=ids.device)
        x = dropout(self.tok_embed(ids) + self.pos_embed(positions), self.dropout, self.training)
        for block in self.blocks:
            x = block(x, cache)
        if cache is not None:
            cache.advance(ids.shape[1])
        return self.ln(x)


class Runner(ModelRunner):
    Config = Config

    def build(self) -> nn.Module:
        return start_as(self.config.init, GPT(self.config))


BASELINE = "gpt2ish"

VARIANTS: dict[str, dict] = {
    "lra": {},
    "lra_features": {"per_feature": True},
    "lra_linear": {"factors": "linear"},
    "lra_linear_features": {"factors": "linear", "per_feature": True},
    "lra_mlp": {"factors": "mlp"},
    "lra_mlp_features": {"factors": "mlp", "per_feature": True},
}
