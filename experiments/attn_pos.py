"""Attention position: a trained vector for each distance back, read by the query, joins the
attention score.

The idea: where a key stands relative to the query matters as much as what it holds, and each head
may want its own view of near and far. A table P (H x max_len x h) holds a vector for each head and
distance back (distance 0 is the position itself).

    add:       score(i, j) = (q_i·k_j + q_i·P_h[i-j]) / √h
    multiply:  score(i, j) = q_i·k_j (1 + q_i·P_h[i-j]) / √h

`op` chooses between them, `last` names the blocks that have it (0: all of them, else the last so
many). The learned position embedding stays. P starts at 0, so that training starts from the
baseline's function (the source leaves the start and the form of the product open).

The products q·P are one matrix product over all distances; moving each row so that distances become
key positions is a padding and a view, no gather. The scores (B, H, T, T) are held, which the fused
attention of the baseline avoids: that is the cost in memory and time.
Under bf16 autocast they are rounded to bf16 as well, where an accelerator's fused attention sums in
float32: a comparison there is of both (on a CPU the baseline's are rounded, too). Differs from
gpt2ish in the lines marked CHANGED. Costs H max_len h = D max_len parameters a block and a third
product of the size of q·k. Nothing folds: P serves inference too.

The claim (to be tested): better than learned absolute positions alone, the last two blocks nearly
as good. Result so far (2026-11-23, docs/results.md): on the plan laptop .013 and .012 nats per
token better than gpt2ish, seeds 0 and 1; lmp_trial on the plan sketch: UNDECIDED, -.001 with an
interval of .009. Source: https://github.com/jmward01/lmplay (attention position).
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
    tied: bool = False
    head_bias: bool = True
    init: Literal["gpt2", "torch"] = "gpt2"  # how the layers start
    gelu: Literal["none", "tanh"] = "none"  # GELU's approximation; GPT-2 was trained with tanh
    op: Literal["add", "multiply"] = "add"  # CHANGED: how distance joins the score
    last: int = 0  # CHANGED: the number of last blocks that have it; 0 means all

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
        if not 0 <= self.last <= self.num_blocks:  # CHANGED
            raise ValueError(f"last {self.last} is not between 0 and num_blocks {self.num_blocks}")


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
def by_key(by_distance: Tensor) -> Tensor:
    """Columns of distances to columns of key positions, for the last t of T positions.

    by_distance (..., t, T), column m standing for the distance T-1-m -> (..., t, T), column j for
    the key j. Row r belongs to query i = T-t+r, whose key j lies at the column m = j+t-1-r: each
    row moves left by one less than the row above. That is what reading the same memory in rows
    longer by one does (Huang et al. 2018, section 3.4.1). Columns j > i hold what the causal mask
    removes.
    """
    t, total = by_distance.shape[-2:]
    return F.pad(by_distance, (1, 0)).flatten(-2)[..., t:].unflatten(-1, (t, total))


class DistanceTable(nn.Module):
    """P (H, max_len, h), starting at 0."""

    def __init__(self, c: Config):
        super().__init__()
        self.multiply = c.op == "multiply"
        self.weight = nn.Parameter(torch.empty(c.num_heads, c.max_len, c.embed_dim // c.num_heads))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Causal attention whose scores know the distance. q (B, H, t, h), k, v (B, H, T, h) -> (B,
        H, t, h)."""
        t = q.shape[2]
        total = k.shape[2]
        q = q / math.sqrt(q.shape[-1])
        content = q @ k.transpose(-1, -2)  # (B, H, t, T)
        # (H, h, T): distances T-1 to 0
        far_first = self.weight[:, :total].flip(1).transpose(-1, -2)
        position = by_key(q @ far_first)
        # q was divided by √h for the content; in the product it counts for the position as it was
        scores = (
            content * (1 + position * math.sqrt(q.shape[-1]))
            if self.multiply
            else content + position
        )
        later = torch.ones(t, total, dtype=torch.bool, device=q.device).triu(total - t + 1)
        return scores.masked_fill(later, float("-inf")).softmax(-1) @ v


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
        has_distance = c.last == 0 or layer >= c.num_blocks - c.last  # CHANGED
        self.distance = DistanceTable(c) if has_distance else None  # CHANGED

    def forward(self, x: Tensor, cache: KVCache | None) -> Tensor:
        head_shape = (self.num_heads, x.shape[-1] // self.num_heads)  # (H, h)
        q = self.query(x).unflatten(-1, head_shape).transpose(1, 2)  # (B, H, t, h)
        k = self.key(x).unflatten(-1, head_shape).transpose(1, 2)
        v = self.value(x).unflatten(-1, head_shape).transpose(1, 2)
        if cache is not None:
            k, v = cache.append(self.layer, k, v)  # (B, H, T, h)
        attend = causal_attention if self.distance is None else self.distance.attend  # CHANGED
        out = attend(q, k, v).transpose(1, 2).flatten(2)  # (B, t, D)  # CHANGED
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
    "attn_pos": {},
    "attn_pos_mul": {"op": "multiply"},
    "attn_pos_last2": {"last": 2},
    "attn_pos_mul_last2": {"op": "multiply", "last": 2},
}
