"""Gated DeltaNet: a state that is corrected, instead of attention.

The idea: the state maps keys to values. A position fades it, reads what it holds for its key, and
writes the difference to its own value (Yang et al. 2024, arXiv 2412.06464, eq. 10).

    q, k, v = silu(conv(W norm(x)));  q, k of length 1          conv: causal, of 4 positions
    S_t = a_t S_t-1 + k_t b_t (v_t - a_t S_t-1ᵀ k_t)ᵀ           S (h, h) for each head
    o_t = S_tᵀ q_t / √h;   out = proj(norm(o) * silu(G norm(x)))
    a = exp(-exp(A) softplus(W_a norm(x) + d)),  b = σ(W_b norm(x))       numbers for each head

Decoding takes the same time for each token, however long the text. Parameters: about D² per block
more than modern. deltanet_hybrid keeps attention in every second block.

Scans: `naive` is the recurrence; `chunked` solves a triangular system for all positions of a chunk
(section 3.3) and is what is used.

The claim (to be tested): better than Mamba-2, and than attention if combined with it.
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
    dropout: float = 0.0
    rotary_base: float = 10000.0  # the longest wavelength is 2 pi of it
    attention_every: int = 0  # CHANGED: n: blocks n, 2n, ... have attention; 0: none has
    scan: Literal["chunked", "naive"] = "chunked"  # CHANGED

    def __post_init__(self) -> None:
        if self.embed_dim % (2 * self.num_heads):
            raise ValueError(
                f"rotary positions need heads of an even size: embed_dim {self.embed_dim} is not a "
                f"multiple of 2 x num_heads {self.num_heads}"
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout {self.dropout} is not in [0, 1)")
        # CHANGED: to the end
        if self.attention_every < 0:
            raise ValueError(f"attention_every {self.attention_every} is below 0")
        if self.scan not in SCANS:
            raise ValueError(f'scan "{self.scan}" is none of {", ".join(SCANS)}')
        if not self.attention_every and self.rotary_base != 10000.0:
            raise ValueError("rotary_base does nothing without attention")

    # CHANGED
    def has_attention(self, layer: int) -> bool:
        return bool(self.attention_every) and (layer + 1) % self.attention_every == 0


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
class Cache(KVCache):
    """Of attention its keys and values; of the others the states and the last inputs."""

    states: list[Tensor]  # (B, H, h, h)
    inputs: list[Tensor]  # (B, WIDTH - 1, 3 D)


WIDTH = 4
CHUNK = 64


def naive_scan(
    q: Tensor, k: Tensor, v: Tensor, log_a: Tensor, b: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """The recurrence: q, k, v (B, H, t, h), log_a, b (B, H, t, 1), state (B, H, h, h)."""
    out = []
    for i in range(q.shape[2]):
        key = k[:, :, i].unsqueeze(-1)  # (B, H, h, 1)
        state = log_a[:, :, i : i + 1].exp() * state
        missing = v[:, :, i : i + 1] - key.mT @ state  # (B, H, 1, h)
        state = state + key @ (b[:, :, i : i + 1] * missing)
        out.append(q[:, :, i : i + 1] @ state)
    return torch.cat(out, 2), state


@torch.compiler.disable  # torch 2.13 compiles its result with strides that it does not have
def solved(system: Tensor, wanted: Tensor) -> Tensor:
    """Return u with (1 + system) u = wanted, for system (..., c, c) below its diagonal."""
    return torch.linalg.solve_triangular(system, wanted, upper=False, unitriangular=True)


def chunked_scan(
    q: Tensor, k: Tensor, v: Tensor, log_a: Tensor, b: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """As naive_scan, CHUNK positions at a time.

    What position i of a chunk writes, u_i, depends on what those before it write:
    u_i = b_i (v_i - a_1..i Sᵀ k_i - sum over j < i of a_j+1..i (k_i·k_j) u_j).
    """
    out = []
    chunks = (x.split(CHUNK, 2) for x in (q, k, v, log_a, b))
    for qc, kc, vc, fade_by, write in zip(*chunks, strict=True):
        total = fade_by.cumsum(2)  # (B, H, c, 1)
        fade = (total - total.mT).tril().exp().tril()  # (B, H, c, c): a_j+1..i
        system = (write * (kc @ kc.mT) * fade).tril(-1)  # the ones of its diagonal are implied
        wanted = write * (vc - (total.exp() * kc) @ state)
        u = solved(system, wanted)
        out.append((total.exp() * qc) @ state + (qc @ kc.mT * fade) @ u)
        last = total[:, :, -1:]
        state = last.exp() * state + ((last - total).exp() * kc).mT @ u
    return torch.cat(out, 2), state


SCANS = {"naive": naive_scan, "chunked": chunked_scan}


class Mixer(nn.Module):
    """In the place of attention: x (B, t, D) -> (B, t, D)."""

    def __init__(self, c: Config, layer: int):
        super().__init__()
        self.c = c
        self.layer = layer
        self.query = Linear(c.embed_dim, c.embed_dim)
        self.key = Linear(c.embed_dim, c.embed_dim)
        self.value = Linear(c.embed_dim, c.embed_dim)
        self.gate = Linear(c.embed_dim, c.embed_dim)
        self.decay = Linear(c.embed_dim, c.num_heads)
        self.write = Linear(c.embed_dim, c.num_heads)
        self.proj = Linear(c.embed_dim, c.embed_dim, zero=True)
        self.conv = nn.Parameter(torch.empty(WIDTH, 1, 3 * c.embed_dim))
        self.A_log = nn.Parameter(torch.empty(c.num_heads))
        self.dt_bias = nn.Parameter(torch.empty(c.num_heads))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """exp(A) uniform in [1, 16], softplus(d) log-uniform in [.001, .1], as Mamba-2's."""
        with torch.no_grad():
            self.conv.uniform_(-(WIDTH**-0.5), WIDTH**-0.5)
            self.A_log.uniform_(1, 16).log_()
            dt = self.dt_bias.uniform_(math.log(1e-3), math.log(1e-1)).exp()
            self.dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # the inverse of softplus

    def forward(self, x: Tensor, cache: Cache | None) -> Tensor:
        c = self.c
        head_shape = (c.num_heads, c.embed_dim // c.num_heads)
        qkv = torch.cat([self.query(x), self.key(x), self.value(x)], -1)
        kind = torch.promote_types(qkv.dtype, torch.float32)
        if cache is None:
            text = F.pad(qkv, (0, 0, WIDTH - 1, 0))
            state = x.new_zeros(len(x), *head_shape, head_shape[1], dtype=kind)
        else:
            text = torch.cat([cache.inputs[self.layer].to(qkv.dtype), qkv], 1)
            state = cache.states[self.layer]
        mixed = sum(w * text[:, i : i + x.shape[1]] for i, w in enumerate(self.conv))
        q, k, v = F.silu(mixed).to(kind).unflatten(-1, (3, *head_shape)).permute(2, 0, 3, 1, 4)
        dt = F.softplus(self.decay(x).to(kind) + self.dt_bias)  # (B, t, H)
        log_a = (-self.A_log.exp() * dt).mT.unsqueeze(-1)  # (B, H, t, 1)
        b = self.write(x).to(kind).sigmoid().mT.unsqueeze(-1)
        q = F.normalize(q, dim=-1) * head_shape[1] ** -0.5
        out, state = SCANS[c.scan](q, F.normalize(k, dim=-1), v, log_a, b, state)
        if cache is not None:
            cache.states[self.layer] = state
            cache.inputs[self.layer] = text[:, -(WIDTH - 1) :]
        out = norm(out).transpose(1, 2).flatten(2) * F.silu(self.gate(x))
        return dropout(self.proj(out), c.dropout, self.training)


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
        # CHANGED
        self.attn = Attention(c, layer) if c.has_attention(layer) else None
        self.mixer = None if c.has_attention(layer) else Mixer(c, layer)

        self.ff = FeedForward(c)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor], cache: KVCache | None) -> Tensor:
        # CHANGED
        if self.attn is not None:
            x = x + self.attn(norm(x), rotary, cache)
        if self.mixer is not None:
            x = x + self.mixer(norm(x), cache)

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
    def new_cache(self, model: nn.Module, batch_size: int, max_len: int) -> Cache:
        c = self.config
        like = next(model.parameters())
        h = c.embed_dim // c.num_heads
        room = max_len if c.attention_every else 0
        cache = Cache(c.num_blocks, batch_size, c.num_heads, room, h, like)
        cache.states = [like.new_zeros(batch_size, c.num_heads, h, h)] * c.num_blocks
        cache.inputs = [like.new_zeros(batch_size, WIDTH - 1, 3 * c.embed_dim)] * c.num_blocks
        return cache

    def window(self) -> int | None:
        # the state holds all of the text
        return self.config.max_len if self.config.attention_every else None


BASELINE = "modern"

VARIANTS: dict[str, dict] = {
    "deltanet": {},
    "deltanet_hybrid": {"attention_every": 2},
    "deltanet_naive": {"scan": "naive"},
}
