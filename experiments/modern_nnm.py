"""Neural memory on modern: every second block has a bank of trained cells instead of attention.

The idea: as in nnm_select.py: facts of the language need no search in the text, so that a small
network may select them from a table.

    s = W2 gelu(W1 norm(x)) (H, cells);   r = softmax(s) T, T (H, cells, h) trained
    x = x + proj(r)

W1 is (D, D), W2 (H cells, D). Parameters: (H cells + cells - 2 D) D per changed block more than
modern.

The claim (to be tested): attention in half of the blocks is enough, as nnm_select.py says.
Source: https://github.com/jmward01/lmplay (NNMemory, version 4).
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
    cells: int = 64  # CHANGED: of the memory, for each head
    memory_every: int = 2  # CHANGED: blocks memory_every, 2 memory_every, ... have a memory

    def __post_init__(self) -> None:
        if self.embed_dim % (2 * self.num_heads):
            raise ValueError(
                f"rotary positions need heads of an even size: embed_dim {self.embed_dim} is not a "
                f"multiple of 2 x num_heads {self.num_heads}"
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout {self.dropout} is not in [0, 1)")
        # CHANGED: to the end
        if self.cells < 1 or self.memory_every < 1:
            raise ValueError("cells and memory_every must be 1 or more")
        if self.memory_every == 1 and self.rotary_base != 10000.0:
            raise ValueError("rotary_base does nothing without attention")


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


# CHANGED: to FeedForward
class Memory(nn.Module):
    """In the place of attention: x (B, t, D) -> (B, t, D)."""

    def __init__(self, c: Config):
        super().__init__()
        self.c = c
        self.fc1 = Linear(c.embed_dim, c.embed_dim)
        self.fc2 = Linear(c.embed_dim, c.num_heads * c.cells)
        self.table = nn.Parameter(torch.empty(c.num_heads, c.cells, c.embed_dim // c.num_heads))
        self.proj = Linear(c.embed_dim, c.embed_dim, zero=True)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.table)

    def forward(self, x: Tensor) -> Tensor:
        scores = self.fc2(F.gelu(self.fc1(x))).unflatten(-1, (self.c.num_heads, -1))
        read = torch.einsum("bthc,hcd->bthd", scores.softmax(-1), self.table)
        return dropout(self.proj(read.flatten(2)), self.c.dropout, self.training)


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
        # CHANGED
        has_memory = (layer + 1) % c.memory_every == 0
        self.attn = None if has_memory else Attention(c, layer)
        self.memory = Memory(c) if has_memory else None

        self.ff = FeedForward(c)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor], cache: KVCache | None) -> Tensor:
        # CHANGED
        if self.memory is not None:
            x = x + self.memory(norm(x))
        if self.attn is not None:
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

VARIANTS: dict[str, dict] = {"modern_nnm": {}}
