"""Sacrificial training on modern: unified embeddings and unified weights, which fold into modern.

The idea: as in sacrificial.py: weights that exist in training only are free in use, so spend many.
The embedding is that of modern_ue.py, and each matrix of the blocks is that of modern_uw.py.

    e(v) = W2 gelu(W1 gelu(E[v]) + b1) + b2
    W' = ((W * m_out + a_out) by rows * m_in + a_in) by columns

Training-only parameters: V m D for the table, (m + 1) D² + 2 D for its network and 2 (in + out) per
matrix.

The claim (to be tested): more than either of its parts.
Source: https://github.com/jmward01/lmplay (sacrificial).
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any

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
    dropout: float = 0.0
    rotary_base: float = 10000.0  # the longest wavelength is 2 pi of it
    front_embed_mul: float = 8.0  # CHANGED: m, the front table's width in embed_dims

    def __post_init__(self) -> None:
        if self.embed_dim % (2 * self.num_heads):
            raise ValueError(
                f"rotary positions need heads of an even size: embed_dim {self.embed_dim} is not a "
                f"multiple of 2 x num_heads {self.num_heads}"
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout {self.dropout} is not in [0, 1)")
        if self.front_embed_mul <= 0:  # CHANGED
            raise ValueError("front_embed_mul must be above 0")


class Linear(nn.Linear):
    """nn.Linear without a bias, that starts normal with 1 / sqrt(inputs), or at zero."""

    def __init__(self, in_features: int, out_features: int, zero: bool = False):
        self.std = 0.0 if zero else in_features**-0.5  # before super().__init__, which uses it
        super().__init__(in_features, out_features, bias=False)

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=self.std)


# CHANGED: to norm
class Unified(Linear):
    """A Linear with modulated rows and columns."""

    def __init__(self, in_features: int, out_features: int, zero: bool = False):
        super().__init__(in_features, out_features, zero)
        self.m_out = nn.Parameter(torch.ones(out_features))
        self.a_out = nn.Parameter(torch.zeros(out_features))
        self.m_in = nn.Parameter(torch.ones(in_features))
        self.a_in = nn.Parameter(torch.zeros(in_features))

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if hasattr(self, "a_in"):  # not in super().__init__
            for m, a in ((self.m_out, self.a_out), (self.m_in, self.a_in)):
                nn.init.ones_(m)
                nn.init.zeros_(a)

    def effective(self) -> Tensor:
        """W' (out, in)."""
        by_rows = self.weight * self.m_out.unsqueeze(1) + self.a_out.unsqueeze(1)
        return by_rows * self.m_in + self.a_in

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.effective())


class Bent(nn.Linear):
    """A layer behind a gelu of what is normal with deviation 1, with outputs of deviation std."""

    def __init__(self, in_features: int, out_features: int, std: float):
        self.std = std / math.sqrt(in_features * 0.425)  # E[gelu(x)²] is .425
        super().__init__(in_features, out_features)

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=self.std)
        nn.init.zeros_(self.bias)


class UnifiedEmbedding(nn.Module):
    """Drop-in for nn.Embedding: ids (any shape) -> (..., D)."""

    def __init__(self, rows: int, c: Config):
        super().__init__()
        front = round(c.front_embed_mul * c.embed_dim)
        self.front = nn.Embedding(rows, front, sparse=True)  # starts with deviation 1
        self.fc1 = Bent(front, c.embed_dim, std=1.0)
        self.fc2 = Bent(c.embed_dim, c.embed_dim, std=0.02)

    def embed(self, distinct: Tensor) -> Tensor:
        """ids (U) -> e (U, D)."""
        return self.fc2(F.gelu(self.fc1(F.gelu(self.front(distinct)))))

    # How many tokens are distinct depends on the data, which a compiler cannot know beforehand.
    @torch.compiler.disable
    def forward(self, ids: Tensor) -> Tensor:
        distinct, inverse = torch.unique(ids, return_inverse=True)
        return F.embedding(inverse, self.embed(distinct))

    @torch.no_grad()
    def table(self, chunk: int = 4096) -> Tensor:
        """e for every row, (V, D): what is left when training is over."""
        ids = torch.arange(self.front.num_embeddings, device=self.fc1.weight.device)
        return torch.cat([self.embed(part) for part in ids.split(chunk)])


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
        # CHANGED
        self.query = Unified(c.embed_dim, c.embed_dim)
        self.key = Unified(c.embed_dim, c.embed_dim)
        self.value = Unified(c.embed_dim, c.embed_dim)
        self.proj = Unified(c.embed_dim, c.embed_dim, zero=True)

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


class FeedForward(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.dropout = c.dropout
        self.fc1 = Unified(c.embed_dim, 4 * c.embed_dim)  # CHANGED
        self.fc2 = Unified(4 * c.embed_dim, c.embed_dim, zero=True)  # CHANGED

    def forward(self, x: Tensor) -> Tensor:
        return dropout(self.fc2(F.relu(self.fc1(x)).square()), self.dropout, self.training)


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
        self.tok_embed: nn.Module = UnifiedEmbedding(c.vocab_size, c)  # CHANGED
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
    training_only = ("tok_embed.*.*", "*.m_out", "*.a_out", "*.m_in", "*.a_in")

    def param_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        slow = [p for name, p in model.named_parameters() if name.endswith((".a_out", ".a_in"))]
        groups = super().param_groups(model)
        for group in groups:
            group["params"] = [p for p in group["params"] if all(p is not s for s in slow)]
        return [*groups, {"params": slow, "role": "vector", "rows": False, "lr_scale": 0.02}]

    @torch.no_grad()
    def fold(self, model: nn.Module) -> nn.Module:
        folded: Any = copy.deepcopy(model)
        folded.tok_embed = nn.Embedding.from_pretrained(folded.tok_embed.table(), freeze=False)
        for module in folded.modules():
            for name, child in list(module.named_children()):
                if isinstance(child, Unified):
                    plain = Linear(child.in_features, child.out_features)
                    plain.weight = nn.Parameter(child.effective().clone())
                    setattr(module, name, plain)
        return folded


BASELINE = "modern"

VARIANTS: dict[str, dict] = {"modern_sac": {}}
