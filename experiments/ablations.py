"""Known answers: changes to modern that must come out as worse, and one that must not matter.

The idea: none. lmp_arena judges a training plan by them: a plan that cannot tell that a model
without positions is worse than one with them cannot tell much.

no_position: queries and keys are not rotated, so a block knows the set of earlier tokens, not their
order, except through the causal mask.

half_attention: every second block, the second first, has no attention and only mixes channels.

random_tokens: in training, a tenth of the tokens is replaced by random ones, as inputs and as
targets.

modern_again: each initial weight is multiplied by 1 + .001 n, n ~ N(0, 1). That is modern, but not
bit for bit: what two runs then differ by is the noise that training makes of a difference that
nobody cares about.

Source: none; each undoes something that modern does or spoils its data.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lmplay.api import (
    IGNORE,
    Batch,
    KVCache,
    ModelRunner,
    StepOut,
    causal_attention,
    dropout,
)


@dataclass(frozen=True)
class Config:
    num_blocks: int = 6
    embed_dim: int = 768
    num_heads: int = 12
    max_len: int = 1024
    vocab_size: int = 50257
    dropout: float = 0.0
    rotary_base: float = 10000.0  # the longest wavelength is 2 pi of it
    rotary: bool = True  # CHANGED: False: no positions
    attention_every: int = 1  # CHANGED: 2: blocks 0, 2, 4, ... have attention, the others none
    random_tokens: float = 0.0  # CHANGED: share of the training tokens that are replaced
    start_noise: float = 0.0  # CHANGED: relative noise of the initial weights

    def __post_init__(self) -> None:
        if self.embed_dim % (2 * self.num_heads):
            raise ValueError(
                f"rotary positions need heads of an even size: embed_dim {self.embed_dim} is not a "
                f"multiple of 2 x num_heads {self.num_heads}"
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout {self.dropout} is not in [0, 1)")
        # CHANGED: to the end of the method
        if not self.rotary and self.rotary_base != 10000.0:
            raise ValueError("rotary_base does nothing without rotary")
        if not 0 <= self.random_tokens < 1:
            raise ValueError(f"random_tokens {self.random_tokens} is not in [0, 1)")
        if self.attention_every < 1:
            raise ValueError(f"attention_every {self.attention_every} is not 1 or more")


class Linear(nn.Linear):
    """nn.Linear without a bias, that starts normal with 1 / sqrt(inputs), or at zero."""

    # CHANGED: noise
    def __init__(self, in_features: int, out_features: int, zero: bool = False, noise: float = 0.0):
        self.std = 0.0 if zero else in_features**-0.5  # before super().__init__, which uses it
        self.noise = noise  # CHANGED
        super().__init__(in_features, out_features, bias=False)

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=self.std)
        shake(self.weight, self.noise)  # CHANGED


class Embedding(nn.Embedding):
    # CHANGED: noise
    def __init__(self, num_embeddings: int, embedding_dim: int, noise: float = 0.0):
        self.noise = noise
        super().__init__(num_embeddings, embedding_dim)

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=0.02)
        shake(self.weight, self.noise)  # CHANGED


# CHANGED: to norm
@torch.no_grad()
def shake(weight: Tensor, noise: float) -> None:
    """Multiply each weight by 1 + noise n, n ~ N(0, 1)."""
    if noise:
        weight.mul_(1 + noise * torch.randn_like(weight))


def spoil(tokens: Tensor, key: Tensor, first: int, share: float, vocab: int) -> Tensor:
    """Return tokens (B, T) with a share of them replaced by random ones.

    What is random is a hash of the sequence's key (B, 1) and the position, which begins at `first`:
    so a token is replaced alike as an input and as a target, in any mini-batch, on any device.
    """
    position = torch.arange(first, first + tokens.shape[1], device=tokens.device)
    mixed = hashed(hashed(key) + position)
    drawn = hashed(mixed)
    return torch.where(mixed < share * 2**32, drawn % vocab, tokens)


def hashed(x: Tensor) -> Tensor:
    """Return integers in [0, 2**32) that depend on x as if at random (Wellons's lowbias32)."""
    x = x % 2**32
    x = ((x ^ (x >> 16)) * 0x7FEB352D) % 2**32
    x = ((x ^ (x >> 15)) * 0x846CA68B) % 2**32
    return x ^ (x >> 16)


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
        self.rotary = c.rotary  # CHANGED
        self.query = Linear(c.embed_dim, c.embed_dim, noise=c.start_noise)  # CHANGED
        self.key = Linear(c.embed_dim, c.embed_dim, noise=c.start_noise)  # CHANGED
        self.value = Linear(c.embed_dim, c.embed_dim, noise=c.start_noise)  # CHANGED
        self.proj = Linear(c.embed_dim, c.embed_dim, zero=True)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor], cache: KVCache | None) -> Tensor:
        head_shape = (self.num_heads, x.shape[-1] // self.num_heads)  # (H, h)
        q = self.query(x).unflatten(-1, head_shape).transpose(1, 2)  # (B, H, t, h)
        k = self.key(x).unflatten(-1, head_shape).transpose(1, 2)
        v = self.value(x).unflatten(-1, head_shape).transpose(1, 2)
        q = rotate(norm(q), rotary) if self.rotary else norm(q)  # CHANGED
        k = rotate(norm(k), rotary) if self.rotary else norm(k)  # CHANGED
        if cache is not None:
            k, v = cache.append(self.layer, k, v)  # (B, H, T, h)
        out = causal_attention(q, k, v).transpose(1, 2).flatten(2)  # (B, t, D)
        return dropout(self.proj(out), self.dropout, self.training)


class FeedForward(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.dropout = c.dropout
        self.fc1 = Linear(c.embed_dim, 4 * c.embed_dim, noise=c.start_noise)  # CHANGED
        self.fc2 = Linear(4 * c.embed_dim, c.embed_dim, zero=True)

    def forward(self, x: Tensor) -> Tensor:
        return dropout(self.fc2(F.relu(self.fc1(x)).square()), self.dropout, self.training)


class Block(nn.Module):
    def __init__(self, c: Config, layer: int):
        super().__init__()
        # CHANGED: not in every block
        self.attn = Attention(c, layer) if layer % c.attention_every == 0 else None
        self.ff = FeedForward(c)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor], cache: KVCache | None) -> Tensor:
        if self.attn is not None:  # CHANGED
            x = x + self.attn(norm(x), rotary, cache)
        return x + self.ff(norm(x))


class Transformer(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.c = c
        self.tok_embed = Embedding(c.vocab_size, c.embed_dim, c.start_noise)  # CHANGED
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
    def step(self, model: nn.Module, batch: Batch) -> StepOut:
        c = self.config
        if c.random_tokens and model.training:
            weights = torch.arange(1, batch.ids.shape[1] + 1, device=batch.ids.device)
            key = (batch.ids * weights).sum(1, keepdim=True)
            counted = batch.targets != IGNORE
            targets = spoil(batch.targets, key, 1, c.random_tokens, c.vocab_size)
            batch = Batch(
                spoil(batch.ids, key, 0, c.random_tokens, c.vocab_size),
                torch.where(counted, targets, batch.targets),
            )
        return super().step(model, batch)


BASELINE = "modern"

VARIANTS: dict[str, dict] = {
    "modern_again": {"start_noise": 0.001},
    "no_position": {"rotary": False},
    "half_attention": {"attention_every": 2},
    "random_tokens": {"random_tokens": 0.1},
}

KNOWN_HARMFUL = ("no_position", "half_attention", "random_tokens")
KNOWN_EQUAL = ("modern_again",)
