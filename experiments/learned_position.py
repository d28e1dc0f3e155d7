"""Learned positions: a trained vector for each position, instead of rotations.

The idea: GPT-2's positions (Radford et al. 2019; Vaswani et al. 2017, section 3.5, where learned
and sinusoidal ones came out alike).

    x_i = norm(E[token_i] + P[i]),  P (max_len, D) trained;  queries and keys are not rotated

Parameters: max_len D more than modern. P starts normal with .02, as E does.

The claim (to be tested): rotary positions are better (Su et al. 2021, section 4).
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

    def __post_init__(self) -> None:
        if self.embed_dim % self.num_heads:  # CHANGED
            raise ValueError(
                f"embed_dim {self.embed_dim} is not a multiple of num_heads {self.num_heads}"
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

    def forward(self, x: Tensor, cache: KVCache | None) -> Tensor:  # CHANGED: no rotary table
        head_shape = (self.num_heads, x.shape[-1] // self.num_heads)  # (H, h)
        q = self.query(x).unflatten(-1, head_shape).transpose(1, 2)  # (B, H, t, h)
        k = self.key(x).unflatten(-1, head_shape).transpose(1, 2)
        v = self.value(x).unflatten(-1, head_shape).transpose(1, 2)
        q = norm(q)  # CHANGED
        k = norm(k)  # CHANGED
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

    def forward(self, x: Tensor, cache: KVCache | None) -> Tensor:  # CHANGED: no rotary table
        x = x + self.attn(norm(x), cache)  # CHANGED
        return x + self.ff(norm(x))


class Transformer(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.c = c
        self.tok_embed = Embedding(c.vocab_size, c.embed_dim)
        self.pos_embed = Embedding(c.max_len, c.embed_dim)  # CHANGED
        self.blocks = nn.ModuleList(Block(c, layer) for layer in range(c.num_blocks))
        self.head = Linear(c.embed_dim, c.vocab_size, zero=True)

    def forward(self, ids: Tensor, cache: KVCache | None = None) -> Tensor:
        """ids (B, t) -> hidden states (B, t, D); `head` turns them into logits."""
        past = 0 if cache is None else cache.length
        positions = torch.arange(past, past + ids.shape[1], device=ids.device)  # CHANGED
        x = self.tok_embed(ids) + self.pos_embed(positions)  # CHANGED
        x = norm(dropout(x, self.c.dropout, self.training))  # CHANGED
        for block in self.blocks:
            x = block(x, cache)  # CHANGED
        if cache is not None:
            cache.advance(ids.shape[1])
        return norm(x)


class Runner(ModelRunner):
    Config = Config

    def build(self) -> nn.Module:
        return Transformer(self.config)


BASELINE = "modern"

VARIANTS: dict[str, dict] = {"learned_position": {}}
