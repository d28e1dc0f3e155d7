"""NNMemory as weights: a few memory cells hold linear layers, and each position mixes its
own layer from these.

The idea: a linear layer does the same to every position. Here C cells (10 to 20) hold a weight and
a bias each, and a position's own layer is their mixture, chosen by attention over the cells.

    p(x) = softmax(W_s x)  (C)          y = Σ_c p_c (W_c x + b_c)

`layers` says which of a block's layers are made so: value and proj, all four of the attention, or
the two of the feed-forward. All cells of a layer start near each other (one GPT-2 start plus
differences a tenth as large: equal cells would never part), and W_s at 0, where every cell counts
alike. The mixture is one matrix product over [p_1 x, ..., p_C x]: C times the layer's FLOPs and
parameters, in training and in use, so that `--match flops` is the comparison to look at. Nothing
folds. The source leaves open what "memory that produces weights for the linear layers" mixes by;
here by position.

The claim (to be tested): few cells suffice to beat a plain layer.
Result so far (2026-11-23, docs/results.md): on the plan laptop worse than gpt2ish by .044 and .033
nats per token, seeds 0 and 1; lmp_trial on the plan sketch, untuned: UNDECIDED, -.11 (while
its biases still decayed with the matrices).
Source: https://github.com/jmward01/lmplay (nnmemory 3).
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
    head_bias: bool = True
    init: Literal["gpt2", "torch"] = "gpt2"  # how the layers start
    gelu: Literal["none", "tanh"] = "none"  # GELU's approximation; GPT-2 was trained with tanh
    cells: int = 10  # CHANGED: C
    # CHANGED: what is mixed
    layers: Literal["value_proj", "attention", "feed_forward"] = "value_proj"

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
        if self.cells < 2:  # CHANGED
            raise ValueError("cells must be 2 or more")


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
class MemoryLinear(nn.Module):
    """y = Σ_c p_c(x) (W_c x + b_c). x (B, t, in) -> (B, t, out)."""

    def __init__(self, in_features: int, out_features: int, cells: int, std: float = 0.02):
        super().__init__()
        self.std = std
        self.select = nn.Parameter(torch.empty(cells, in_features))  # W_s
        self.weight = nn.Parameter(torch.empty(out_features, cells, in_features))
        # flat: as a matrix it would decay
        self.bias = nn.Parameter(torch.empty(cells * out_features))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.select)
        nn.init.zeros_(self.bias)
        with torch.no_grad():
            common = torch.empty_like(self.weight[:, :1]).normal_(std=self.std)
            self.weight.copy_(common + torch.empty_like(self.weight).normal_(std=self.std / 10))

    def forward(self, x: Tensor) -> Tensor:
        p = F.linear(x, self.select).softmax(-1)  # (B, t, C)
        each = p.to(x.dtype).unsqueeze(-1) * x.unsqueeze(-2)  # (B, t, C, in)
        return F.linear(each.flatten(-2), self.weight.flatten(1)) + p.to(
            self.bias.dtype
        ) @ self.bias.view(p.shape[-1], -1)


def linear(
    name: str, in_features: int, out_features: int, c: Config, std: float = 0.02
) -> nn.Module:
    """The layer `name` of a block: mixed from memory, or plain."""
    mixed = {
        "value_proj": ("value", "proj"),
        "attention": ("query", "key", "value", "proj"),
        "feed_forward": ("fc1", "fc2"),
    }
    if name in mixed[c.layers]:
        return MemoryLinear(in_features, out_features, c.cells, std)
    return Linear(in_features, out_features, std=std)


class Attention(nn.Module):
    def __init__(self, c: Config, layer: int):
        super().__init__()
        self.layer = layer
        self.num_heads = c.num_heads
        self.dropout = c.dropout
        # CHANGED: each may come from memory
        self.query = linear("query", c.embed_dim, c.embed_dim, c)
        self.key = linear("key", c.embed_dim, c.embed_dim, c)
        self.value = linear("value", c.embed_dim, c.embed_dim, c)
        self.proj = linear("proj", c.embed_dim, c.embed_dim, c, 0.02 / math.sqrt(2 * c.num_blocks))

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
        self.fc1 = linear("fc1", c.embed_dim, 4 * c.embed_dim, c)  # CHANGED
        # CHANGED
        self.fc2 = linear(
            "fc2", 4 * c.embed_dim, c.embed_dim, c, 0.02 / math.sqrt(2 * c.num_blocks)
        )

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
    "nnm_weights": {},
    "nnm_weights_20": {"cells": 20},
    "nnm_weights_attn": {"layers": "attention"},
    "nnm_weights_ff": {"layers": "feed_forward"},
}
