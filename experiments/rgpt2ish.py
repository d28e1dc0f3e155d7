"""Recurrent baseline: gpt2ish that reads a sequence in chunks and carries its state from chunk to
chunk.

The idea: none of its own. It shows how a model with a state is trained here, and what truncated
back-propagation costs. A sequence of T tokens is cut into `num_chunks` chunks, each a forward pass
of its own. The state is what attention has stored of the chunks before: keys and values, detached,
so that a gradient ends at its chunk's border (as in Transformer-XL, Dai et al. 2019, section 3.2,
with absolute positions).

    state_0 = empty;   hidden_c, state_c = model(chunk_c, stop_gradient(state_{c-1}))

With `carry` the numbers of the forward pass are gpt2ish's on the full sequence; only the gradient
is cut. Without it the state is ignored, and it is gpt2ish exactly on sequences of the chunk's
length.

The state never outlives its sequence: the harness shuffles sequences, the same way for every
experiment, so what a mini-batch before had read is of another text (and a gradient must not depend
on the mini-batch's size). Differs from gpt2ish in the Runner alone: no parameter more, about the
same FLOPs.

The claim (to be tested): little is lost with 4 chunks and carried state.
Result so far (2026-11-22, docs/results.md): on the plan laptop behind gpt2ish by .044 and .010 nats
per token, seeds 0 and 1, where it was .048 ahead at a third of it; lmp_trial on the plan sketch,
untuned: UNDECIDED, a gain of .058. Source: https://github.com/jmward01/lmplay (recurrent baseline).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lmplay.api import (
    Batch,
    KVCache,
    ModelRunner,
    StepOut,
    causal_attention,
    dropout,
    linear_cross_entropy,
)


@dataclass(frozen=True)
class Config:
    num_blocks: int = 6
    embed_dim: int = 768
    num_heads: int = 12
    max_len: int = 1024
    vocab_size: int = 50257
    dropout: float = 0.1
    tied: bool = False
    head_bias: bool = True
    init: Literal["gpt2", "torch"] = "gpt2"  # how the layers start
    gelu: Literal["none", "tanh"] = "none"  # GELU's approximation; GPT-2 was trained with tanh
    num_chunks: int = 4  # CHANGED: pieces that a sequence of max_len is read in
    carry: bool = True  # CHANGED: whether a chunk sees the state that the chunks before it left

    def __post_init__(self) -> None:
        if self.embed_dim % self.num_heads:
            raise ValueError(
                f"embed_dim {self.embed_dim} is not a multiple of num_heads {self.num_heads}"
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout {self.dropout} is not in [0, 1)")
        if self.init not in ("gpt2", "torch"):
            raise ValueError(f'init "{self.init}" is neither "gpt2" nor "torch"')
        if self.gelu not in ("none", "tanh"):
            raise ValueError(f'gelu "{self.gelu}" is neither "none" nor "tanh"')
        if self.tied and self.head_bias:
            raise ValueError("tied=true needs head_bias=false")
        if self.max_len % self.num_chunks:  # CHANGED
            raise ValueError(
                f"max_len {self.max_len} is not a multiple of num_chunks {self.num_chunks}"
            )


class Linear(nn.Linear):
    """nn.Linear that starts as GPT-2's (normal weights, zero bias), or as torch's without std."""

    def __init__(self, in_features: int, out_features: int, bias: bool = True, std: float = 0.02):
        self.std: float | None = std  # before super().__init__, which calls reset_parameters
        super().__init__(in_features, out_features, bias)

    def reset_parameters(self) -> None:
        if self.std is None:
            super().reset_parameters()
            return
        nn.init.normal_(self.weight, std=self.std)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class Embedding(nn.Embedding):
    """nn.Embedding that starts as GPT-2's, or as torch's without std."""

    std: float | None = 0.02

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=1.0 if self.std is None else self.std)


def start_as(init: str, model: nn.Module) -> nn.Module:
    """Return the model, whose layers start as torch's do if `init` is "torch"."""
    for module in model.modules():
        if init == "torch" and isinstance(module, Linear | Embedding):
            module.std = None
    return model


# CHANGED: to Attention
@dataclass
class State:
    """Keys and values (B, H, T, h) of each layer; unlike KVCache it may stand in a graph of
    gradients."""

    layers: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    length: int = 0

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        if layer in self.layers:
            before = self.layers[layer]
            k = torch.cat([before[0], k], 2)
            v = torch.cat([before[1], v], 2)
        self.layers[layer] = (k, v)
        return k, v

    def advance(self, t: int) -> None:
        self.length += t

    def detached(self) -> State:
        return State(
            {i: (k.detach(), v.detach()) for i, (k, v) in self.layers.items()}, self.length
        )


class Attention(nn.Module):
    def __init__(self, c: Config, layer: int):
        super().__init__()
        self.layer = layer
        self.num_heads = c.num_heads
        self.dropout = c.dropout
        self.query = Linear(c.embed_dim, c.embed_dim)
        self.key = Linear(c.embed_dim, c.embed_dim)
        self.value = Linear(c.embed_dim, c.embed_dim)
        self.proj = Linear(c.embed_dim, c.embed_dim, std=0.02 / math.sqrt(2 * c.num_blocks))

    def forward(self, x: Tensor, cache: KVCache | State | None) -> Tensor:  # CHANGED
        head_shape = (self.num_heads, x.shape[-1] // self.num_heads)  # (H, h)
        q = self.query(x).unflatten(-1, head_shape).transpose(1, 2)  # (B, H, t, h)
        k = self.key(x).unflatten(-1, head_shape).transpose(1, 2)
        v = self.value(x).unflatten(-1, head_shape).transpose(1, 2)
        if cache is not None:
            k, v = cache.append(self.layer, k, v)  # (B, H, T, h)
        out = causal_attention(q, k, v).transpose(1, 2).flatten(2)  # (B, t, D)
        return dropout(self.proj(out), self.dropout, self.training)


class FeedForward(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.dropout = c.dropout
        self.gelu = c.gelu
        self.fc1 = Linear(c.embed_dim, 4 * c.embed_dim)
        self.fc2 = Linear(4 * c.embed_dim, c.embed_dim, std=0.02 / math.sqrt(2 * c.num_blocks))

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.gelu(self.fc1(x), approximate=self.gelu)
        return dropout(self.fc2(hidden), self.dropout, self.training)


class Block(nn.Module):
    def __init__(self, c: Config, layer: int):
        super().__init__()
        self.ln1 = nn.LayerNorm(c.embed_dim)
        self.attn = Attention(c, layer)
        self.ln2 = nn.LayerNorm(c.embed_dim)
        self.ff = FeedForward(c)

    def forward(self, x: Tensor, cache: KVCache | State | None) -> Tensor:  # CHANGED
        x = x + self.attn(self.ln1(x), cache)
        return x + self.ff(self.ln2(x))


class GPT(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.dropout = c.dropout
        self.tok_embed = Embedding(c.vocab_size, c.embed_dim)
        self.pos_embed = Embedding(c.max_len, c.embed_dim)
        self.blocks = nn.ModuleList(Block(c, layer) for layer in range(c.num_blocks))
        self.ln = nn.LayerNorm(c.embed_dim)
        self.head = Linear(c.embed_dim, c.vocab_size, bias=c.head_bias)
        if c.tied:
            self.head.weight = self.tok_embed.weight

    def forward(self, ids: Tensor, cache: KVCache | State | None = None) -> Tensor:  # CHANGED
        """ids (B, t) -> hidden states (B, t, D); `head` turns them into logits."""
        past = 0 if cache is None else cache.length
        positions = torch.arange(past, past + ids.shape[1], device=ids.device)
        x = dropout(self.tok_embed(ids) + self.pos_embed(positions), self.dropout, self.training)
        for block in self.blocks:
            x = block(x, cache)
        if cache is not None:
            cache.advance(ids.shape[1])
        return self.ln(x)


class Runner(ModelRunner):
    Config = Config

    def build(self) -> nn.Module:
        return start_as(self.config.init, GPT(self.config))

    # CHANGED: to the end of the class
    @property
    def chunk(self) -> int:
        return self.config.max_len // self.config.num_chunks

    def step(self, model: nn.Module, batch: Batch) -> StepOut:
        """The chunks one after another; gradients end at their borders."""
        state = State()
        hidden = []
        for ids in batch.ids.split(self.chunk, 1):
            state = state.detached() if self.config.carry else State()
            hidden.append(model(ids, cache=state))
        return linear_cross_entropy(torch.cat(hidden, 1), model.head, batch.targets)  # type: ignore[arg-type]

    def new_cache(self, model: nn.Module, batch_size: int, max_len: int) -> Any:
        """Decoding needs no gradient, so an ordinary cache: of everything, or of the chunk at
        hand."""
        return super().new_cache(model, batch_size, max_len if self.config.carry else self.chunk)

    def logits(self, model: nn.Module, ids: Tensor, cache: Any = None) -> tuple[Tensor, Any]:
        if self.config.carry:
            return super().logits(model, ids, cache)
        if cache is None:
            # only the last token's own chunk counts
            begin = (ids.shape[1] - 1) // self.chunk * self.chunk
            return super().logits(model, ids[:, begin:], None)
        for part in self._at_borders(ids, cache.length):
            if cache.length == self.chunk:
                cache.length = 0
            out, cache = super().logits(model, part, cache)
        return out, cache

    def _at_borders(self, ids: Tensor, held: int) -> tuple[Tensor, ...]:
        """ids (B, t) cut where a chunk that holds `held` tokens is full, and then at every chunk's
        length."""
        first = min(ids.shape[1], self.chunk - held % self.chunk)
        return ids[:, :first], *(
            ids[:, first:].split(self.chunk, 1) if first < ids.shape[1] else ()
        )


BASELINE = "gpt2ish"

VARIANTS: dict[str, dict] = {
    "rgpt2ish": {},
    "rgpt2ish_2": {"num_chunks": 2},
    "rgpt2ish_stateless": {"carry": False},
}
