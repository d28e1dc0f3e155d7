"""NNMemory: trained memory cells that every position reads by attention, next to or instead of the
feed-forward.

The idea: a feed-forward layer stores what the model knows in the product of two matrices. A bank of
C cells, read by attention, stores it where it can be looked up. Cells are not positions, so there
is no causal mask.

    K, V = W_k cells, W_v cells      cells (C x cell_mul D); with cell_net, first through a network
    r = softmax(q Kᵀ / √h) V,  q = W_q LN(x), `mem_heads` heads of the attention's head size h
    memory(x) = proj(r), and with mem_ff a feed-forward of its own behind it: m + ff(LN(x + m))

`place`: before or after the attention, `beside` it (both read the same x), `only` (every second
block has memory in place of attention), or ff (version 2: memory in place of the feed-forward; with
`shadow` a plain D x D linear layer runs parallel to it). `shared`: one bank for all blocks, each
with queries of its own.

K and V come from weights alone: computed once for all mini-batches of an optimizer step, and `fold`
keeps the tables (mem_heads x C x h) and drops cells, W_k and W_v. The cells' wide layers learn at
1/cell_mul of the rate, as a step of Adam moves their product by the rate times the cells' size. No
standard architecture holds what is left. Parameters a bank: training only C cell_mul D + 2 cell_mul
D mem_heads h, in use 2 C mem_heads h; and a reading layer 2 D mem_heads h. The run's first lines
compare it with the baseline. mem_heads and cells are numbers of their own: a memory is
1.5 times as wide as the model at the size of laptop, and half as wide at the default.

The claim (to be tested): memory next to attention beats a wider feed-forward.
Result so far (2026-11-23, docs/results.md): on the plan laptop worse than gpt2ish by .136 and .171
nats per token, seeds 0 and 1; lmp_trial on the plan sketch: HARMFUL, -.17.
Source: https://github.com/jmward01/lmplay (nnmemory 1 and 2).
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lmplay.api import KVCache, ModelRunner, cache_weights, causal_attention, dropout


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
    # CHANGED: where the memory is read
    place: Literal["after", "before", "beside", "only", "ff"] = "after"
    cells: int = 128  # CHANGED: C
    cell_mul: float = 32.0  # CHANGED: width of a cell in embed_dims
    cell_net: bool = False  # CHANGED: a unified embedding's network behind the cells
    mem_heads: int = 6  # CHANGED
    mem_ff: bool = True  # CHANGED: a feed-forward of the memory's own
    shared: bool = False  # CHANGED: one bank for all blocks
    shadow: bool = False  # CHANGED: with place ff, a linear layer parallel to the memory

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
        if min(self.cells, self.mem_heads, self.cell_mul) <= 0:  # CHANGED
            raise ValueError("cells, mem_heads and cell_mul must be above 0")
        if self.place == "only" and self.num_blocks < 2:  # CHANGED
            raise ValueError("place=only needs two blocks: every second one is a memory")
        if self.shared and self.num_blocks < (4 if self.place == "only" else 2):  # CHANGED
            raise ValueError("shared=true needs two memories to share the bank")
        if self.shadow and self.place != "ff":  # CHANGED
            raise ValueError("shadow=true goes with place=ff")
        if self.place == "ff" and not self.mem_ff and self.gelu != "none":  # CHANGED
            raise ValueError("gelu does nothing without a feed-forward")


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
Tables = dict[str, Tensor]  # the keys and values of all banks, by name


class Bank(nn.Module):
    """C cells, and the keys and values (M, C, h) made of them; folded, just those. `path` is its
    name."""

    def __init__(self, c: Config, path: str, folded: bool):
        super().__init__()
        self.path = path
        self.heads = c.mem_heads
        wide = round(c.cell_mul * c.embed_dim)
        head_dim = c.embed_dim // c.num_heads
        self.folded = folded
        if folded:
            self.keys = nn.Parameter(torch.empty(c.mem_heads, c.cells, head_dim))
            self.values = nn.Parameter(torch.empty(c.mem_heads, c.cells, head_dim))
            return
        self.cells = nn.Parameter(torch.empty(c.cells, wide))
        self.net: nn.Module = nn.Identity()
        width = wide
        if c.cell_net:  # W2 gelu(W1 gelu(cells)), as a unified embedding
            narrow = Linear(wide, c.embed_dim, std=1 / math.sqrt(0.425 * wide))
            last = Linear(c.embed_dim, c.embed_dim, std=1 / math.sqrt(0.425 * c.embed_dim))
            self.net = nn.Sequential(nn.GELU(), narrow, nn.GELU(), last)
            width = c.embed_dim
        # Keys and values start as large as the attention's: .02 √D.
        std = 0.02 * math.sqrt(c.embed_dim / width)
        self.to_key = Linear(width, c.mem_heads * head_dim, std=std)
        self.to_value = Linear(width, c.mem_heads * head_dim, std=std)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for p in (self.keys, self.values) if self.folded else (self.cells,):
            nn.init.normal_(p)

    def effective(self) -> Tables:
        if self.folded:
            return {f"{self.path}.keys": self.keys, f"{self.path}.values": self.values}
        cells = self.net(self.cells)
        k, v = (
            m(cells).unflatten(1, (self.heads, -1)).transpose(0, 1)
            for m in (self.to_key, self.to_value)
        )
        return {f"{self.path}.keys": k, f"{self.path}.values": v}


class Memory(nn.Module):
    """Reads the bank called `bank`: x (B, t, D) -> (B, t, D)."""

    def __init__(self, c: Config, bank: str):
        super().__init__()
        self.bank = bank
        self.heads = c.mem_heads
        self.dropout = c.dropout
        inner = c.mem_heads * (c.embed_dim // c.num_heads)
        std = 0.02 / math.sqrt(2 * c.num_blocks)
        self.ln = nn.LayerNorm(c.embed_dim)
        self.query = Linear(c.embed_dim, inner)
        self.proj = Linear(inner, c.embed_dim, std=std)
        self.shadow = Linear(c.embed_dim, c.embed_dim, std=std) if c.shadow else None
        self.ff_ln = nn.LayerNorm(c.embed_dim) if c.mem_ff else None
        self.ff = FeedForward(c) if c.mem_ff else None

    def forward(self, x: Tensor, tables: Tables) -> Tensor:
        y = self.ln(x)
        # Positions do not see each other here, so all of the batch is one long list of queries: (1,
        # M, B t, h).
        q = self.query(y).flatten(0, 1).unflatten(-1, (self.heads, -1)).transpose(0, 1).unsqueeze(0)
        k, v = (
            tables[f"{self.bank}.{name}"].to(q.dtype).unsqueeze(0) for name in ("keys", "values")
        )
        r = F.scaled_dot_product_attention(q, k, v).squeeze(0).transpose(0, 1).flatten(1)
        m = self.proj(r).view_as(x)
        m = dropout(m if self.shadow is None else m + self.shadow(y), self.dropout, self.training)
        return m if self.ff is None or self.ff_ln is None else m + self.ff(self.ff_ln(x + m))


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
        self.place = c.place  # CHANGED
        if c.place != "only" or layer % 2 == 0:  # CHANGED
            self.ln1 = nn.LayerNorm(c.embed_dim)
            self.attn = Attention(c, layer)
        if c.place != "only" or layer % 2 == 1:  # CHANGED
            self.memory = Memory(
                c, "banks.0" if c.shared else f"banks.{layer // (2 if c.place == 'only' else 1)}"
            )
        if c.place != "ff":  # CHANGED
            self.ln2 = nn.LayerNorm(c.embed_dim)
            self.ff = FeedForward(c)

    def forward(self, x: Tensor, cache: KVCache | None, tables: Tables) -> Tensor:  # CHANGED
        if self.place == "beside":
            x = x + self.attn(self.ln1(x), cache) + self.memory(x, tables)
        elif self.place == "only":
            x = x + (
                self.attn(self.ln1(x), cache) if hasattr(self, "attn") else self.memory(x, tables)
            )
        elif self.place == "before":
            x = x + self.memory(x, tables)
            x = x + self.attn(self.ln1(x), cache)
        else:
            x = x + self.attn(self.ln1(x), cache)
            x = x + self.memory(x, tables)
        return x + self.ff(self.ln2(x)) if self.place != "ff" else x


class GPT(nn.Module):
    def __init__(self, c: Config, folded: bool = False):  # CHANGED
        super().__init__()
        self.dropout = c.dropout
        self.tok_embed = Embedding(c.vocab_size, c.embed_dim)
        self.pos_embed = Embedding(c.max_len, c.embed_dim)
        self.blocks = nn.ModuleList(Block(c, layer) for layer in range(c.num_blocks))
        self.ln = nn.LayerNorm(c.embed_dim)
        self.head = Linear(c.embed_dim, c.vocab_size, bias=c.head_bias)
        # CHANGED: to effective
        readers = c.num_blocks // 2 if c.place == "only" else c.num_blocks
        self.banks = nn.ModuleList(
            Bank(c, f"banks.{i}", folded) for i in range(1 if c.shared else readers)
        )
        self.cached: Tables | None = None  # what `effective` gave, while no weight changes

    def effective(self) -> Tables:  # CHANGED
        """Keys and values of all banks, under the names that the folded model's have; in full
        precision."""
        with torch.autocast(self.head.weight.device.type, enabled=False):
            return {name: t for bank in self.banks for name, t in bank.effective().items()}  # type: ignore[operator]

    def forward(self, ids: Tensor, cache: KVCache | None = None) -> Tensor:
        """ids (B, t) -> hidden states (B, t, D); `head` turns them into logits."""
        past = 0 if cache is None else cache.length
        positions = torch.arange(past, past + ids.shape[1], device=ids.device)
        x = dropout(self.tok_embed(ids) + self.pos_embed(positions), self.dropout, self.training)
        tables = self.effective() if self.cached is None else self.cached  # CHANGED
        for block in self.blocks:
            x = block(x, cache, tables)  # CHANGED
        if cache is not None:
            cache.advance(ids.shape[1])
        return self.ln(x)


class Runner(ModelRunner):
    Config = Config

    def build(self) -> nn.Module:
        return start_as(self.config.init, GPT(self.config))

    # CHANGED: to the end of the class
    training_only = ("banks.*.cells", "banks.*.net.*", "banks.*.to_key.*", "banks.*.to_value.*")

    def fixed_weights(self, model: nn.Module) -> AbstractContextManager[None]:
        return cache_weights(model, model.effective)  # type: ignore[arg-type]

    def param_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """Cells get no weight decay; what reads them learns slower by cell_mul."""
        wide = round(self.config.cell_mul * self.config.embed_dim)
        slow = [
            p
            for name, p in model.named_parameters()
            if name.startswith("banks.") and p.shape[1:] == (wide,)
        ]
        cells = [p for name, p in model.named_parameters() if name.endswith(".cells")]
        special = {id(p) for p in slow + cells}
        groups = [
            {**g, "params": [p for p in g["params"] if id(p) not in special]}
            for g in super().param_groups(model)
        ]
        readers = [p for p in slow if all(p is not cell for cell in cells)]
        # "embedding", as the scale is made for Adam: Muon, which takes matrices, moves all of them
        # alike
        groups.append(
            {"params": readers, "role": "embedding", "lr_scale": 1 / self.config.cell_mul}
        )
        groups.append({"params": cells, "role": "vector"})
        return [g for g in groups if g["params"]]

    @torch.no_grad()
    def fold(self, model: nn.Module) -> nn.Module:
        """The model with its tables in place of the cells; the rest is shared."""
        with torch.device("meta"):
            folded = GPT(self.config, folded=True)
        tensors = {**model.state_dict(), **model.effective()}  # type: ignore[operator]
        folded.load_state_dict({name: tensors[name] for name in folded.state_dict()}, assign=True)
        return folded


BASELINE = "gpt2ish"

VARIANTS: dict[str, dict] = {
    "nnm": {},
    "nnm_shared": {"shared": True},
    "nnm_before": {"place": "before"},
    "nnm_beside": {"place": "beside"},
    "nnm_only": {"place": "only"},
    "nnm_ue": {"cell_net": True},
    "nnm_ff": {"place": "ff", "mem_ff": False},
    "nnm_ff_shadow": {"place": "ff", "mem_ff": False, "shadow": True},
}
