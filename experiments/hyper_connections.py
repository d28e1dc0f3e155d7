"""Hyper-connections: two residual streams, mixed by trained and input-dependent weights.

The idea: with one stream a network has to choose between vanishing gradients (post-norm) and alike
layers (pre-norm) (Zhu et al. 2024, arXiv 2409.19606, section 2, dynamic, n = 2).

    H (n, D) for each position, from n copies of the embedding. For each layer f (attention, ff):
    A = A0 + s_a tanh(norm(H) W_a)   (n, 1 + n),   B = B0 + s_b tanh(norm(H) W_b)   (n)
    [x, H'] = Aᵀ H;    H = H' + B f(norm(x))ᵀ;     the output is the sum of the streams

A0 starts as [e_k, I] with k the layer's number mod n, B0 as ones, W as zeros, s as .01.
Parameters: 2 ((n + 2) (n + D) + 2) per block more than modern.

The claim (to be tested): half of the tokens for the same loss, at some billion parameters.
"""

from __future__ import annotations

from collections.abc import Callable
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
    streams: int = 2  # CHANGED: n

    def __post_init__(self) -> None:
        if self.embed_dim % (2 * self.num_heads):
            raise ValueError(
                f"rotary positions need heads of an even size: embed_dim {self.embed_dim} is not a "
                f"multiple of 2 x num_heads {self.num_heads}"
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout {self.dropout} is not in [0, 1)")
        # CHANGED: to the end
        if self.streams < 1:
            raise ValueError(f"streams {self.streams} is not 1 or more")


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


class FeedForward(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.dropout = c.dropout
        self.fc1 = Linear(c.embed_dim, 4 * c.embed_dim)
        self.fc2 = Linear(4 * c.embed_dim, c.embed_dim, zero=True)

    def forward(self, x: Tensor) -> Tensor:
        return dropout(self.fc2(F.relu(self.fc1(x)).square()), self.dropout, self.training)


# CHANGED: to Block
class Connection(nn.Module):
    """What a layer reads from the streams, and how its output is added to them."""

    def __init__(self, c: Config, index: int):
        super().__init__()
        self.index = index
        n = c.streams
        self.static = nn.Parameter(torch.empty(1, n, n + 2))  # [A0, B0]; not for Muon
        self.weight = nn.Parameter(torch.empty(c.embed_dim, n + 2))  # [W_a, W_b]
        self.scale = nn.Parameter(torch.empty(2))  # s_a, s_b
        self.reset_parameters()

    def reset_parameters(self) -> None:
        n = self.static.shape[1]
        first = F.one_hot(torch.tensor(self.index % n), n).unsqueeze(1)
        start = torch.cat([first, torch.eye(n), torch.ones(n, 1)], 1)
        with torch.no_grad():
            self.static[0] = start
        nn.init.zeros_(self.weight)
        nn.init.constant_(self.scale, 0.01)

    def forward(self, streams: Tensor, layer: Callable[[Tensor], Tensor]) -> Tensor:
        """streams (B, t, n, D) -> (B, t, n, D)."""
        n = streams.shape[2]
        scale = torch.cat([self.scale[:1].expand(n + 1), self.scale[1:]])
        weights = self.static + scale * torch.tanh(norm(streams) @ self.weight)  # (B, t, n, n + 2)
        mixed = weights[..., :-1].mT @ streams  # (B, t, 1 + n, D)
        out = layer(norm(mixed[:, :, 0]))
        return mixed[:, :, 1:] + weights[..., -1:] * out.unsqueeze(2)


class Block(nn.Module):
    def __init__(self, c: Config, layer: int):
        super().__init__()
        self.attn = Attention(c, layer)
        self.ff = FeedForward(c)
        self.attn_connection = Connection(c, 2 * layer)  # CHANGED
        self.ff_connection = Connection(c, 2 * layer + 1)  # CHANGED

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor], cache: KVCache | None) -> Tensor:
        x = self.attn_connection(x, lambda y: self.attn(y, rotary, cache))  # CHANGED
        return self.ff_connection(x, self.ff)  # CHANGED


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
        x = x.unsqueeze(2).expand(-1, -1, self.c.streams, -1)  # CHANGED: (B, t, n, D)
        for block in self.blocks:
            x = block(x, rotary, cache)
        x = x.sum(2)  # CHANGED
        if cache is not None:
            cache.advance(ids.shape[1])
        return norm(x)


class Runner(ModelRunner):
    Config = Config

    def build(self) -> nn.Module:
        return Transformer(self.config)


BASELINE = "modern"

VARIANTS: dict[str, dict] = {"hyper_connections": {}}
