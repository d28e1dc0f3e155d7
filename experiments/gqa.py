"""Grouped-query attention: several heads of queries share one head of keys and values.

The idea: a smaller cache and fewer parameters at nearly the same loss (Ainslie et al. 2023, arXiv
2305.13245, section 2.2). With one head of keys for all it is multi-query attention (Shazeer 2019,
arXiv 1911.02150).

    head n attends with its own q_n to k_g, v_g of its group g = n // (H / num_kv_heads)

Parameters: 2 D (D - num_kv_heads h) per block fewer than modern, and a cache of num_kv_heads / H of
its size.

The claim (to be tested): worth its savings. A log book behind this project found it "a significant
improvement" in one run.
"""

from __future__ import annotations

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
    num_kv_heads: int = 2  # CHANGED: heads of keys and values

    def __post_init__(self) -> None:
        if self.embed_dim % (2 * self.num_heads):
            raise ValueError(
                f"rotary positions need heads of an even size: embed_dim {self.embed_dim} is not a "
                f"multiple of 2 x num_heads {self.num_heads}"
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout {self.dropout} is not in [0, 1)")
        # CHANGED: to the end
        if self.num_kv_heads < 1 or self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}"
            )


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
        self.kv_heads = c.num_kv_heads  # CHANGED
        kv_dim = c.num_kv_heads * (c.embed_dim // c.num_heads)  # CHANGED
        self.key = Linear(c.embed_dim, kv_dim)  # CHANGED
        self.value = Linear(c.embed_dim, kv_dim)  # CHANGED
        self.proj = Linear(c.embed_dim, c.embed_dim, zero=True)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor], cache: KVCache | None) -> Tensor:
        head_shape = (self.num_heads, x.shape[-1] // self.num_heads)  # (H, h)
        q = self.query(x).unflatten(-1, head_shape).transpose(1, 2)  # (B, H, t, h)
        kv_shape = (self.kv_heads, head_shape[1])  # CHANGED
        k = self.key(x).unflatten(-1, kv_shape).transpose(1, 2)  # CHANGED: (B, kv_heads, t, h)
        v = self.value(x).unflatten(-1, kv_shape).transpose(1, 2)  # CHANGED
        q = rotate(norm(q), rotary)
        k = rotate(norm(k), rotary)
        if cache is not None:
            k, v = cache.append(self.layer, k, v)  # (B, H, T, h)
        group = self.num_heads // self.kv_heads  # CHANGED
        k = k.repeat_interleave(group, 1)  # CHANGED: (B, H, T, h)
        v = v.repeat_interleave(group, 1)  # CHANGED
        out = causal_attention(q, k, v).transpose(1, 2).flatten(2)  # (B, t, D)
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

    # CHANGED: to the end
    def new_cache(self, model: nn.Module, batch_size: int, max_len: int) -> KVCache:
        c = self.config
        like = next(model.parameters())
        head_dim = c.embed_dim // c.num_heads
        return KVCache(c.num_blocks, batch_size, c.num_kv_heads, max_len, head_dim, like)


BASELINE = "modern"

VARIANTS: dict[str, dict] = {"gqa": {}, "mqa": {"num_kv_heads": 1}}
