"""ALiBi: scores fall linearly with the distance, instead of rotations.

The idea: attention with linear biases (Press et al. 2021, arXiv 2108.12409, section 3). Nothing is
trained, and a model may read further than it was trained to.

    score(i, j) = q_i·k_j / √h - m (i - j),   m = 2^(-8 n / H) for the heads n = 1 ... H

The queries and keys are normalized, as modern's, and not rotated.

The claim (to be tested): as good as other positions at the length of training.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lmplay.api import KVCache, ModelRunner, dropout


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


# CHANGED: to Attention
def distance_biases(c: Config, past: int, t: int, like: Tensor) -> Tensor:
    """Return what is added to the scores (H, t, past + t): -m (i - j), and -inf ahead."""
    heads = torch.arange(1, c.num_heads + 1, device=like.device)
    slopes = 2.0 ** (-8 * heads / c.num_heads)
    queries = torch.arange(past, past + t, device=like.device)
    distance = queries.unsqueeze(1) - torch.arange(past + t, device=like.device)  # (t, past + t)
    biases = -slopes.view(-1, 1, 1) * distance
    return biases.masked_fill(distance < 0, float("-inf")).to(like.dtype)


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

    # CHANGED: biases
    def forward(self, x: Tensor, biases: Tensor, cache: KVCache | None) -> Tensor:
        head_shape = (self.num_heads, x.shape[-1] // self.num_heads)  # (H, h)
        q = self.query(x).unflatten(-1, head_shape).transpose(1, 2)  # (B, H, t, h)
        k = self.key(x).unflatten(-1, head_shape).transpose(1, 2)
        v = self.value(x).unflatten(-1, head_shape).transpose(1, 2)
        q = norm(q)  # CHANGED
        k = norm(k)  # CHANGED
        if cache is not None:
            k, v = cache.append(self.layer, k, v)  # (B, H, T, h)
        # CHANGED: (B, H, t, h) -> (B, t, D)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=biases.to(q.dtype))
        out = out.transpose(1, 2).flatten(2)

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

    # CHANGED: biases
    def forward(self, x: Tensor, biases: Tensor, cache: KVCache | None) -> Tensor:
        x = x + self.attn(norm(x), biases, cache)  # CHANGED
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
        biases = distance_biases(self.c, past, ids.shape[1], x)  # CHANGED
        for block in self.blocks:
            x = block(x, biases, cache)  # CHANGED
        if cache is not None:
            cache.advance(ids.shape[1])
        return norm(x)


class Runner(ModelRunner):
    Config = Config

    def build(self) -> nn.Module:
        return Transformer(self.config)


BASELINE = "modern"

VARIANTS: dict[str, dict] = {"alibi": {}}
