"""Canon layers: a short causal convolution before attention and before the feed-forward layer.

The idea: neighbors are mixed without spending attention on it (Allen-Zhu 2025, "Physics of language
models 4.1", ssrn 5240330, Canon-A and Canon-C; So et al. 2021 do it to queries, keys and values).

    y = norm(x);  y_i = y_i + sum over k < 4 of w_k y_i-k      w_k (D) trained, from 0

Parameters: 8 D per block more than modern.

The claim (to be tested): a clear gain in tasks that need several steps, and in the loss.
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

    def __post_init__(self) -> None:
        if self.embed_dim % (2 * self.num_heads):
            raise ValueError(
                f"rotary positions need heads of an even size: embed_dim {self.embed_dim} is not a "
                f"multiple of 2 x num_heads {self.num_heads}"
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout {self.dropout} is not in [0, 1)")


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
WIDTH = 4


class CanonCache(KVCache):
    """Keys and values, and the last inputs (B, WIDTH - 1, D) of each convolution."""

    inputs: list[Tensor]


class Canon(nn.Module):
    """x (B, t, D) -> x + its causal convolution, each dimension by itself."""

    def __init__(self, dim: int, index: int):
        super().__init__()
        self.index = index
        self.weight = nn.Parameter(torch.empty(WIDTH, 1, dim))  # three dimensions: not for Muon
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)

    def forward(self, x: Tensor, cache: KVCache | None) -> Tensor:
        t = x.shape[1]
        if isinstance(cache, CanonCache):
            text = torch.cat([cache.inputs[self.index], x], 1)
            cache.inputs[self.index] = text[:, -(WIDTH - 1) :]
        else:
            text = F.pad(x, (0, 0, WIDTH - 1, 0))
        out = x
        for back, weight in enumerate(self.weight):
            start = WIDTH - 1 - back
            out = out + weight * text[:, start : start + t]
        return out


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
        self.attn_canon = Canon(c.embed_dim, 2 * layer)  # CHANGED
        self.ff_canon = Canon(c.embed_dim, 2 * layer + 1)  # CHANGED

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor], cache: KVCache | None) -> Tensor:
        x = x + self.attn(self.attn_canon(norm(x), cache), rotary, cache)  # CHANGED
        return x + self.ff(self.ff_canon(norm(x), cache))  # CHANGED


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
    def new_cache(self, model: nn.Module, batch_size: int, max_len: int) -> CanonCache:
        c = self.config
        like = next(model.parameters())
        head_dim = c.embed_dim // c.num_heads
        cache = CanonCache(c.num_blocks, batch_size, c.num_heads, max_len, head_dim, like)
        cache.inputs = [like.new_zeros(batch_size, WIDTH - 1, c.embed_dim)] * (2 * c.num_blocks)
        return cache


BASELINE = "modern"

VARIANTS: dict[str, dict] = {"canon": {}}
