"""Focus: a learned attention temperature, for each position and head, or one number a block.

The idea: some positions should look at one thing, others at all of the past. The softmax cannot
choose that freely, as queries and keys must then grow or shrink. Here the query's position sets its
own temperature.

    score(i, j) = q_i·k_j / (√h s_i)       full:   s_i = 2σ(W x_i + b), one for each head
                                           simple: s = 2σ(w), one trained number a block

s lies in (0, 2). W, b and w start at 0, where s = 1, so that training starts from the baseline's
function. Dividing the query by s is all it takes: the fused attention stays.
Differs from gpt2ish in the lines marked CHANGED; costs D H + H parameters a block (full) or 1
(simple) and next to no time. Nothing folds in full; simple is kept as it is, for a single number is
not worth it.

The claim (to be tested): a small gain for nearly no cost.
Result so far (2026-11-22, docs/results.md): on the plan laptop level with gpt2ish (+.001 and +.005
nats per token, seeds 0 and 1, below 0 is better); lmp_trial on the plan sketch: UNDECIDED, a gain
of .013. Source: https://github.com/jmward01/lmplay (focus).
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
    focus: Literal["full", "simple"] = "full"  # CHANGED: s of each position and head, or of a block

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


# CHANGED: to Attention
class Temperature(nn.Module):
    """s in (0, 2), starting at 1: x (B, t, D) -> (B, H, t, 1), or ()."""

    def __init__(self, c: Config):
        super().__init__()
        self.full = c.focus == "full"
        self.weight = nn.Parameter(torch.empty((c.num_heads, c.embed_dim) if self.full else ()))
        self.bias = nn.Parameter(torch.empty(c.num_heads)) if self.full else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        if not self.full:
            return 2 * torch.sigmoid(self.weight)
        return 2 * torch.sigmoid(F.linear(x, self.weight, self.bias)).transpose(1, 2).unsqueeze(-1)


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
        self.temperature = Temperature(c)  # CHANGED

    def forward(self, x: Tensor, cache: KVCache | None) -> Tensor:
        head_shape = (self.num_heads, x.shape[-1] // self.num_heads)  # (H, h)
        q = self.query(x).unflatten(-1, head_shape).transpose(1, 2)  # (B, H, t, h)
        q = (q / self.temperature(x)).to(q.dtype)  # CHANGED
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


class Block(nn.Module):
    def __init__(self, c: Config, layer: int):
        super().__init__()
        self.ln1 = nn.LayerNorm(c.embed_dim)
        self.attn = Attention(c, layer)
        self.ln2 = nn.LayerNorm(c.embed_dim)
        self.ff = FeedForward(c)

    def forward(self, x: Tensor, cache: KVCache | None) -> Tensor:
        x = x + self.attn(self.ln1(x), cache)
        return x + self.ff(self.ln2(x))


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
    "focus": {},
    "focus_simple": {"focus": "simple"},
}
