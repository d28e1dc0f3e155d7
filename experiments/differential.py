"""Differential attention: the difference of two softmax maps, which cancels what both see.

The idea: attention spreads some weight over tokens that do not matter; two maps share that noise
(Ye et al. 2024, arXiv 2410.05258, section 2.1).

    out_n = (softmax(q1·k1) - s softmax(q2·k2)) v_n         for H / 2 pairs of heads, v_n (2h)
    s = exp(a1·b1) - exp(a2·b2) + s0,   s0 = .8 - .6 exp(-.3 l)     in block l = 0, 1, ...
    head n = (1 - s0) norm(out_n)

a1, b1, a2, b2 (h) are trained and start normal with .1. The norm has a trained gain (2h).
Parameters: 6 h per block more than modern. Time: two calls of attention, because the halves of v
are read one after the other.

The claim (to be tested): two thirds of the parameters or tokens for the same loss.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

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

    def __post_init__(self) -> None:
        if self.embed_dim % (2 * self.num_heads):
            raise ValueError(
                f"rotary positions need heads of an even size: embed_dim {self.embed_dim} is not a "
                f"multiple of 2 x num_heads {self.num_heads}"
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout {self.dropout} is not in [0, 1)")
        # CHANGED: to the end
        if self.num_heads % 2:
            raise ValueError(f"heads go in pairs: num_heads {self.num_heads} is odd")


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


# CHANGED: to Attention
class Share(nn.Module):
    """How much of the second map is subtracted: s (), and s0."""

    def __init__(self, head_dim: int, layer: int):
        super().__init__()
        self.start = 0.8 - 0.6 * math.exp(-0.3 * layer)
        self.vectors = nn.Parameter(torch.empty(2, 2, head_dim))  # (a1, b1), (a2, b2)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.vectors, std=0.1)

    def forward(self) -> Tensor:
        first, second = self.vectors.prod(1).sum(-1).exp()
        return first - second + self.start


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
        self.share = Share(c.embed_dim // c.num_heads, layer)  # CHANGED
        self.out_norm = nn.RMSNorm(2 * c.embed_dim // c.num_heads)  # CHANGED

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor], cache: KVCache | None) -> Tensor:
        head_shape = (self.num_heads, x.shape[-1] // self.num_heads)  # (H, h)
        q = self.query(x).unflatten(-1, head_shape).transpose(1, 2)  # (B, H, t, h)
        k = self.key(x).unflatten(-1, head_shape).transpose(1, 2)
        v = self.value(x).unflatten(-1, head_shape).transpose(1, 2)
        q = rotate(norm(q), rotary)
        k = rotate(norm(k), rotary)
        if cache is not None:
            k, v = cache.append(self.layer, k, v)  # (B, H, T, h)
        # CHANGED: heads 2n and 2n + 1 hold the two maps of pair n, and the two halves of its values
        halves = [v[:, i::2].repeat_interleave(2, 1) for i in range(2)]
        seen = torch.cat([causal_attention(q, k, half) for half in halves], -1)  # (B, H, t, 2h)
        first, second = seen[:, ::2], seen[:, 1::2]  # (B, H/2, t, 2h)
        out = self.out_norm(first - self.share().to(first.dtype) * second)
        out = ((1 - self.share.start) * out).transpose(1, 2).flatten(2)  # (B, t, D)

        return dropout(self.proj(out), self.dropout, self.training)


class FeedForward(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.dropout = c.dropout
        self.fc1 = Linear(c.embed_dim, 4 * c.embed_dim)
        self.fc2 = Linear(4 * c.embed_dim, c.embed_dim, zero=True)

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


BASELINE = "modern"

VARIANTS: dict[str, dict] = {"differential": {}}
