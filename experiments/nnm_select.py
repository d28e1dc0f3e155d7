"""NNMemory with a cheap selector: a small network scores memory cells directly; blocks and memories
alternate.

The idea: keys are not needed to look a cell up. A two-layer network gives each position its scores
over the C cells, several heads at a time, and the scores weigh a table of trained values.

    s = W2 gelu(W1 LN(x))                   (M x C)
    r_m = Σ_c softmax_c(s_m) table[m, c]
    x + proj([r_1, ..., r_M])

`select` none leaves the softmax out: the scores weigh the table as they are. `pattern` says which
of the num_blocks layers are blocks of the baseline (B) and which memories (N): it is repeated, or
cut, to num_blocks letters; other characters are for the eye (BN-BNN-BNNN). W1 is D x D, a head of
the table as wide as the attention's. A memory costs D² + D M C + C M h + M h D parameters and the
like in FLOPs, where a block costs 12 D²: the run's first lines compare it with the
baseline. mem_heads and cells are numbers of their own: a memory is half of a block at the size of
laptop and a fifth of one at the default. Nothing folds.

The claim (to be tested): two of three blocks can be memories at little loss.
Result so far (2026-11-23, docs/results.md): with two of four blocks memories (BNNB) on the plan
laptop better than gpt2ish by .198 and .177 nats per token, seeds 0 and 1, with fewer parameters;
lmp_trial on the plan sketch, with one of two (BN): UNDECIDED, +.06. The claim itself, at a depth of
three or more, was not tried. Source: https://github.com/jmward01/lmplay (nnmemory 4).
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
    dropout: float = 0.1
    head_bias: bool = True
    init: Literal["gpt2", "torch"] = "gpt2"  # how the layers start
    gelu: Literal["none", "tanh"] = "none"  # GELU's approximation; GPT-2 was trained with tanh
    pattern: str = "BNN"  # CHANGED: the order of blocks and memories
    cells: int = 128  # CHANGED: C
    mem_heads: int = 6  # CHANGED: M
    select: Literal["softmax", "none"] = "softmax"  # CHANGED: over the cells

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
        if "B" not in self.letters or set(self.pattern) - set("BN- "):  # CHANGED
            raise ValueError(
                f"pattern {self.pattern}: it is made of B and N, with a B among the first "
                "num_blocks"
            )
        if min(self.cells, self.mem_heads) < 1:  # CHANGED
            raise ValueError("cells and mem_heads must be above 0")

    @property  # CHANGED
    def letters(self) -> str:
        """B or N for each of the num_blocks layers."""
        letters = "".join(x for x in self.pattern if x in "BN")
        return (letters * self.num_blocks)[: self.num_blocks]


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

    def forward(self, x: Tensor, cache: KVCache | None) -> Tensor:
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

    def forward(self, x: Tensor, cache: KVCache | None) -> Tensor:
        x = x + self.attn(self.ln1(x), cache)
        return x + self.ff(self.ln2(x))


# CHANGED: to GPT
class Memory(nn.Module):
    """A layer that stands where a block would: x (B, t, D) -> (B, t, D)."""

    def __init__(self, c: Config):
        super().__init__()
        self.dropout = c.dropout
        self.softmax = c.select == "softmax"
        head_dim = c.embed_dim // c.num_heads
        self.ln = nn.LayerNorm(c.embed_dim)
        self.fc1 = Linear(c.embed_dim, c.embed_dim)
        self.fc2 = Linear(c.embed_dim, c.mem_heads * c.cells)
        self.table = nn.Parameter(torch.empty(c.mem_heads, c.cells, head_dim))
        self.proj = Linear(
            c.mem_heads * head_dim, c.embed_dim, std=0.02 / math.sqrt(2 * c.num_blocks)
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        # as large as attention's values
        nn.init.normal_(self.table, std=0.02 * math.sqrt(self.fc1.in_features))

    def forward(self, x: Tensor, cache: KVCache | None) -> Tensor:
        # (B, t, M, C)
        scores = self.fc2(F.gelu(self.fc1(self.ln(x)))).unflatten(-1, self.table.shape[:2])
        if self.softmax:
            scores = scores.softmax(-1)
        r = torch.einsum("btmc,mch->btmh", scores.to(x.dtype), self.table.to(x.dtype))
        return x + dropout(self.proj(r.flatten(2)), self.dropout, self.training)


class GPT(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.dropout = c.dropout
        self.tok_embed = Embedding(c.vocab_size, c.embed_dim)
        self.pos_embed = Embedding(c.max_len, c.embed_dim)
        self.blocks = nn.ModuleList(  # CHANGED
            Block(c, layer) if letter == "B" else Memory(c)
            for layer, letter in enumerate(c.letters)
        )
        self.ln = nn.LayerNorm(c.embed_dim)
        self.head = Linear(c.embed_dim, c.vocab_size, bias=c.head_bias)

    def forward(self, ids: Tensor, cache: KVCache | None = None) -> Tensor:
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


BASELINE = "gpt2ish"

VARIANTS: dict[str, dict] = {
    "nnm_select": {},
    "nnm_select_plain": {"select": "none"},
    "nnm_select_bn": {"pattern": "BN"},
    "nnm_select_bn_bnn_bnnn": {"pattern": "BN-BNN-BNNN", "num_blocks": 9},
}
