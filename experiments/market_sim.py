"""A transformer that reads and writes a stock exchange's messages, and is run against a live order
book.

The idea: every event of an order book is a message of 24 tokens without order ids
(lmplay/market/messages.py), and a decoder learns the stream. Which orders there are the book knows;
`lmp_market simulate` samples through it. In the form "book" three more tokens tell spread and
volumes at the touch that the message meets.

The model is the last of a series, and every change has its switch: rotary positions (Su et al.
2021), RMSNorm (Zhang and Sennrich 2019), grouped-query attention (Ainslie et al. 2023), SwiGLU
(Shazeer 2020), a head tied to the embedding, and an attention sink: a learned token in front of
every sample (Xiao et al. 2023, section 3.3). `market_vanilla` has none.

    x = x + O attention(rot(Q RMS(x)), rot(K RMS(x)), V RMS(x));  x = x + W2 (silu(W1 RMS(x)) * W3
    RMS(x))

For a stream without end the cache keeps the sink and the last messages, and complete messages leave
it. A key is stored rotated by its place in the stream; the sink's is stored unrotated and turned to
stand just before the oldest message. As attention sees only differences of places, that is the same
as rotating every key by its place in the cache, which the tests compare it with.

The claim (to be tested): a lower loss and fewer cancels of orders that are not there than
`market_vanilla`, and quality that lasts past the context with the sink and breaks without.
Result so far (2026-11-23, docs/results.md): against `market_vanilla` it was not run; lmp_trial on
the plan market_smoke, some seconds of training: HARMFUL, -.07 against gpt2ish. Trained for half an
hour on market_btc and sampled through the book mask it is nearer to the held-out market than zero
intelligence, in the mean of LOB-Bench's distances: L1 .277 and .258 against .289 and .283, W1 .331
and .313 against .343 and .333 (two seeds of sampling, one run). Without that mask one cancel in a
thousand names an order's exact time, 68 % a price at which something rests. Past the context
nothing breaks, with the sink or without, at six layers and 42 messages. Source: the ancestor's log;
MarketGPT (Wheeler and Varner 2024, arXiv 2411.16585); StreamingLLM (arXiv 2309.17453).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lmplay.api import KVCache, ModelRunner, causal_attention, dropout


@dataclass(frozen=True)
class Config:
    num_blocks: int = 12
    embed_dim: int = 768
    num_heads: int = 12
    # heads that share a key and a value; at most, of those that divide num_heads
    queries_per_kv: int = 3
    # 0: 4 embed_dim for gelu, 19/6 embed_dim for swiglu, about as many weights
    ff_dim: int = 0
    max_len: int = 2689
    vocab_size: int = 12544
    dropout: float = 0.0
    # turned keys and queries, or a vector for each place
    positions: Literal["rotary", "learned"] = "rotary"
    norm: Literal["rms", "layer"] = "rms"  # RMSNorm or LayerNorm
    ff: Literal["swiglu", "gelu"] = "swiglu"  # gated, or gpt2ish's
    tied: bool = True  # one table for the input and the output
    sink: bool = True  # False: no other position sees the first
    rotary_base: float = 10000.0  # the longest wavelength is 2 pi of it

    def __post_init__(self) -> None:
        if self.embed_dim % self.num_heads:
            raise ValueError(
                f"embed_dim {self.embed_dim} is not a multiple of num_heads {self.num_heads}"
            )
        if self.queries_per_kv < 1:
            raise ValueError(f"queries_per_kv must be 1 or more, not {self.queries_per_kv}")
        if self.positions == "rotary" and self.head_dim % 2:
            raise ValueError(
                f"rotary positions need an even head size, embed_dim / num_heads is {self.head_dim}"
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout {self.dropout} is not in [0, 1)")
        if self.positions == "learned" and self.rotary_base != 10000.0:
            raise ValueError("rotary_base goes with positions=rotary")

    @property
    def head_dim(self) -> int:
        return self.embed_dim // self.num_heads

    @property
    def num_kv_heads(self) -> int:
        most = min(self.queries_per_kv, self.num_heads)
        return self.num_heads // max(n for n in range(1, most + 1) if self.num_heads % n == 0)

    @property
    def inner(self) -> int:
        wide = 4 * self.embed_dim if self.ff == "gelu" else -(-19 * self.embed_dim // (6 * 8)) * 8
        return self.ff_dim or wide


class Linear(nn.Linear):
    """nn.Linear that starts as GPT-2's: normal weights, zero bias."""

    def __init__(self, in_features: int, out_features: int, bias: bool = False, std: float = 0.02):
        self.std = std  # before super().__init__, which calls reset_parameters
        super().__init__(in_features, out_features, bias)

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=self.std)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class Embedding(nn.Embedding):
    """nn.Embedding that starts as GPT-2's."""

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=0.02)


def make_norm(c: Config) -> nn.Module:
    return nn.RMSNorm(c.embed_dim, eps=1e-5) if c.norm == "rms" else nn.LayerNorm(c.embed_dim)


def rotate(x: Tensor, places: Tensor, base: float) -> Tensor:
    """Rotary positions: dimension i is turned with dimension i + h/2 by place / base^(2i/h).

    x (B, H, t, h); places (t,) or (B, t) integers. Angles are taken in float64: a stream may
    be long.
    """
    half = x.shape[-1] // 2
    steps = base ** (-torch.arange(half, dtype=torch.float64, device=x.device) / half)
    angles = places.double().unsqueeze(-1) * steps  # ([B,] t, h/2)
    angles = angles if angles.ndim == 2 else angles.unsqueeze(1)
    cos = angles.cos().to(x.dtype)
    sin = angles.sin().to(x.dtype)
    a = x[..., :half]
    b = x[..., half:]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


class StreamCache:
    """Keys and values of several endless streams, each with a length of its own.

    Slot 0 holds the sink, the other slots are a ring: the token at place p of its stream, the
    sink's being 0, stands in slot 1 + (p - 1) mod (slots - 1). `gone` (B,) counts the tokens that
    left; they are not seen, but stay where they are until others are written over them.
    """

    def __init__(self, c: Config, batch_size: int, max_len: int, like: Tensor):
        shape = (c.num_blocks, batch_size, c.num_kv_heads, max_len, c.head_dim)
        self.keys = torch.zeros(shape, dtype=like.dtype, device=like.device)
        self.values = torch.zeros_like(self.keys)
        self.sink = torch.zeros_like(self.keys[:, :, :, :1])  # its keys before they are turned
        self.length = torch.zeros(batch_size, dtype=torch.int64, device=like.device)
        self.gone = torch.zeros_like(self.length)

    @property
    def max_len(self) -> int:
        return self.keys.shape[3]

    def make_room(self, tokens: int, piece: int) -> None:
        """Let the oldest pieces of `piece` tokens go, until there are `tokens` free places."""
        over = self.length - self.gone + tokens - self.max_len
        self.gone = self.gone + -(-over.clamp(min=0) // piece) * piece

    def mark(self) -> tuple[Tensor, Tensor]:
        """What :meth:`roll_back` needs; valid until more than the free places at this moment were
        written."""
        return self.length, self.gone

    def roll_back(self, mark: tuple[Tensor, Tensor], rows: Tensor) -> None:
        """Forget what was read since the mark in those of the streams, rows (B,) bool."""
        self.length = torch.where(rows, mark[0], self.length)
        self.gone = torch.where(rows, mark[1], self.gone)

    def begin(self, t: int) -> None:
        """Find what all layers need to read t more tokens: their places and slots, and what each of
        them sees.

        Raises:
            ValueError: there are fewer free places; :meth:`make_room` makes some.
        """
        if int((self.length - self.gone).max()) + t > self.max_len:
            raise ValueError(f"the cache holds {self.max_len} positions; make room for {t} more")
        ring = self.max_len - 1
        # (B, t)
        self.places = self.length.unsqueeze(1) + torch.arange(t, device=self.length.device)
        self.slots = torch.where(self.places == 0, 0, 1 + (self.places - 1) % ring)
        self.rows = torch.arange(len(self.slots), device=self.slots.device).unsqueeze(1)
        self.used = min(self.max_len, int(self.length.max()) + t)
        slot = torch.arange(self.used, device=self.length.device)
        # (B, 1) the newest place; a slot's is as many before it as their slots lie apart
        last = self.places[:, -1:]
        # (B, used)
        place = torch.where(slot == 0, 0, last - ((last - 1) % ring - (slot - 1)) % ring)
        alive = (slot == 0) | ((place > self.gone.unsqueeze(1)) & (place > 0))
        # (B, t, used)
        self.seen = alive.unsqueeze(1) & (place.unsqueeze(1) <= self.places.unsqueeze(2))

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k and v (B, H, t, h) at the places found; returns all (B, H, used, h), the unseen
        ones as well."""
        # indexing puts (B, t) first: (B, t, H, h)
        self.keys[layer][self.rows, :, self.slots] = k.transpose(1, 2)
        self.values[layer][self.rows, :, self.slots] = v.transpose(1, 2)
        return self.keys[layer][:, :, : self.used], self.values[layer][:, :, : self.used]

    def advance(self, t: int) -> None:
        self.length = self.length + t


class Attention(nn.Module):
    def __init__(self, c: Config, layer: int):
        super().__init__()
        self.c = c
        self.layer = layer
        kv = c.num_kv_heads * c.head_dim
        self.query = Linear(c.embed_dim, c.embed_dim)
        self.key = Linear(c.embed_dim, kv)
        self.value = Linear(c.embed_dim, kv)
        self.proj = Linear(c.embed_dim, c.embed_dim, std=0.02 / math.sqrt(2 * c.num_blocks))

    def forward(self, x: Tensor, cache: KVCache | StreamCache | None) -> Tensor:
        c = self.c
        t = x.shape[1]
        q = self.query(x).unflatten(-1, (c.num_heads, c.head_dim)).transpose(1, 2)  # (B, H, t, h)
        k = self.key(x).unflatten(-1, (c.num_kv_heads, c.head_dim)).transpose(1, 2)
        v = self.value(x).unflatten(-1, (c.num_kv_heads, c.head_dim)).transpose(1, 2)
        if isinstance(cache, StreamCache):
            out = self._stream(q, k, v, cache)
        else:
            past = 0 if cache is None else cache.length
            if c.positions == "rotary":
                places = torch.arange(past, past + t, device=x.device)
                q = rotate(q, places, c.rotary_base)
                k = rotate(k, places, c.rotary_base)
            if cache is not None:
                k, v = cache.append(self.layer, k, v)  # (B, H, T, h)
            out = self._attend(q, k, v, past)
        return dropout(self.proj(out.transpose(1, 2).flatten(2)), c.dropout, self.training)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, past: int) -> Tensor:
        """Causal attention; without a sink, positions after the first do not see the first."""
        groups = self.c.num_heads // self.c.num_kv_heads
        k = k.repeat_interleave(groups, 1)
        v = v.repeat_interleave(groups, 1)
        if self.c.sink or k.shape[2] == 1:
            return causal_attention(q, k, v)
        if past:
            return causal_attention(q, k[:, :, 1:], v[:, :, 1:])
        return torch.cat([v[:, :, :1], causal_attention(q[:, :, 1:], k[:, :, 1:], v[:, :, 1:])], 2)

    def _stream(self, q: Tensor, k: Tensor, v: Tensor, cache: StreamCache) -> Tensor:
        c = self.c
        places = cache.places
        first = k
        if c.positions == "rotary":
            q = rotate(q, places, c.rotary_base)
            k = rotate(k, places, c.rotary_base)
        keys, values = cache.append(self.layer, k, v)
        if c.positions == "rotary":
            # The sink stands at the cache's place 0: as many places on in the stream as tokens
            # left.
            begins = (places[:, :1] == 0)[:, None, :, None]
            cache.sink[self.layer] = torch.where(begins, first[:, :, :1], cache.sink[self.layer])
            keys[:, :, :1] = rotate(cache.sink[self.layer], cache.gone.unsqueeze(1), c.rotary_base)
        mask = cache.seen
        if not c.sink:
            mask = mask.clone()
            mask[:, :, 0] &= places == 0
        # The heads that share a key are further queries of it, so nothing is copied.
        shared = c.num_heads // c.num_kv_heads
        q = q.unflatten(1, (c.num_kv_heads, shared)).flatten(2, 3)  # (B, KV, shared t, h)
        mask = mask.repeat(1, shared, 1).unsqueeze(1)  # (B, 1, shared t, used)
        out = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask)
        return out.unflatten(2, (shared, -1)).flatten(1, 2)


class FeedForward(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.c = c
        biased = c.ff == "gelu"
        self.fc1 = Linear(c.embed_dim, c.inner, bias=biased)
        self.gate = None if biased else Linear(c.embed_dim, c.inner)
        self.fc2 = Linear(c.inner, c.embed_dim, bias=biased, std=0.02 / math.sqrt(2 * c.num_blocks))

    def forward(self, x: Tensor) -> Tensor:
        inner = F.gelu(self.fc1(x)) if self.gate is None else F.silu(self.gate(x)) * self.fc1(x)
        return dropout(self.fc2(inner), self.c.dropout, self.training)


class Block(nn.Module):
    def __init__(self, c: Config, layer: int):
        super().__init__()
        self.norm1 = make_norm(c)
        self.attn = Attention(c, layer)
        self.norm2 = make_norm(c)
        self.ff = FeedForward(c)

    def forward(self, x: Tensor, cache: KVCache | StreamCache | None) -> Tensor:
        x = x + self.attn(self.norm1(x), cache)
        return x + self.ff(self.norm2(x))


class Transformer(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.c = c
        self.tok_embed = Embedding(c.vocab_size, c.embed_dim)
        self.pos_embed = Embedding(c.max_len, c.embed_dim) if c.positions == "learned" else None
        self.blocks = nn.ModuleList(Block(c, layer) for layer in range(c.num_blocks))
        self.norm = make_norm(c)
        self.head = Linear(c.embed_dim, c.vocab_size)
        if c.tied:
            self.head.weight = self.tok_embed.weight

    def forward(self, ids: Tensor, cache: KVCache | StreamCache | None = None) -> Tensor:
        """ids (B, t) -> hidden states (B, t, D); `head` turns them into logits."""
        x = self.tok_embed(ids)
        if self.pos_embed is not None:
            if isinstance(cache, StreamCache):
                raise ValueError(
                    "learned positions are fixed to a place: no stream of them can lose its "
                    "beginning"
                )
            past = 0 if cache is None else cache.length
            x = x + self.pos_embed(torch.arange(past, past + ids.shape[1], device=ids.device))
        if isinstance(cache, StreamCache):
            cache.begin(ids.shape[1])
        x = dropout(x, self.c.dropout, self.training)
        for block in self.blocks:
            x = block(x, cache)
        if cache is not None:
            cache.advance(ids.shape[1])
        return self.norm(x)


class Runner(ModelRunner):
    Config = Config

    def build(self) -> nn.Module:
        return Transformer(self.config)

    def new_cache(self, model: nn.Module, batch_size: int, max_len: int) -> KVCache:
        c = self.config
        like = next(model.parameters())
        return KVCache(c.num_blocks, batch_size, c.num_kv_heads, max_len, c.head_dim, like)

    def new_stream(self, model: nn.Module, batch_size: int, max_len: int) -> Any:
        if self.config.positions == "learned":
            return None
        return StreamCache(self.config, batch_size, max_len, next(model.parameters()))


BASELINE = "market_modern"

VARIANTS: dict[str, dict] = {
    "market_modern": {},
    "market_modern_nosink": {"sink": False},
    "market_vanilla": {
        "queries_per_kv": 1,
        "positions": "learned",
        "norm": "layer",
        "ff": "gelu",
        "tied": False,
        "sink": False,
    },
    "market_kv6": {"queries_per_kv": 2},  # six keys and values of twelve heads
    "market_tiny": {"num_blocks": 2, "embed_dim": 32, "num_heads": 2},
    "market_100m": {"num_blocks": 12, "embed_dim": 768, "num_heads": 12},
}
