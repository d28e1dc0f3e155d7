"""All in one: unified embeddings (8x, 16x), unified linear layers, learned residual add; value norm
on request.

The idea: each of the family's ideas acts on another part of the model, so their gains might add up.

    e(v) = W2 gelu(W1 a(E[v]) + b1) + b2                                          ue.py
    W' = (W ⊙ (m_out + c1) + a_out) by row, then the same by column; b' = b + c3  uw1 in uw.py
    x + f becomes α x + β f with learned α, β in (.4, 1.5)                        lra.py
    v = LN_h(W_v x), with value_norm                                              value_norm.py

`all1` holds the first three. `fold` tabulates the embedding and multiplies the weights out; α, β
and the value norm stay, so that no standard architecture holds what is left.
Training-only parameters: the front table and its network (see ue.py), 2 (in + out) + 3 a linear
layer.

The claim (to be tested): better than each of its parts.
Result so far (2026-11-23, docs/results.md): all1 on the plan laptop worse than gpt2ish by .096 and
.108 nats per token, seeds 0 and 1; lmp_trial on the plan sketch, untuned: .072 better with every
seed, and .042 behind gpt2ish of its parameters: UNDECIDED.
Source: https://github.com/jmward01/lmplay (combined).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lmplay.api import KVCache, ModelRunner, cache_weights, causal_attention, dropout

# CHANGED
# multipliers of the learning rate: W's entries, to which a is added, are about .02, not 1
RATES = {
    "a_out": 0.02,
    "a_in": 0.02,
}


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
    # CHANGED: m, the front table's width in embed_dims; 0: a plain table
    front_embed_mul: float = 8.0
    mid_mul: float = 1.0  # CHANGED: k, the middle's width in embed_dims
    front_act: Literal["gelu", "relu", "elu", "identity"] = "gelu"  # CHANGED: a
    unify_linear: bool = True  # CHANGED: modulate the blocks' linear layers
    per_feature: bool = False  # CHANGED: α and β for each feature
    value_norm: bool = False  # CHANGED: LayerNorm over each head's values

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
        if self.front_embed_mul < 0 or self.mid_mul <= 0:  # CHANGED
            raise ValueError("front_embed_mul must be 0 or more, mid_mul above 0")


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
Weights = dict[str, Tensor]  # the effective weights and biases of the unified layers, by name


class UnifiedLinear(Linear):
    """A linear layer whose weight is modulated by vectors; `path` is its name in the model.

    A factor, and the shift of the bias, has a number c that is added to all its entries.
    """

    modulated = False  # while nn.Linear begins

    def __init__(
        self, in_features: int, out_features: int, c: Config, path: str, std: float = 0.02
    ):
        super().__init__(in_features, out_features, std=std)
        self.path = path
        self.modulated = c.unify_linear
        if self.modulated:
            self.m_out, self.a_out = (nn.Parameter(torch.empty(out_features)) for _ in range(2))
            self.m_in, self.a_in = (nn.Parameter(torch.empty(in_features)) for _ in range(2))
            self.c_m_out, self.c_m_in, self.c_shift = (
                nn.Parameter(torch.empty(())) for _ in range(3)
            )
            self.reset_parameters()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if self.modulated:
            for factor in (self.m_out, self.m_in):
                nn.init.ones_(factor)
            for added in (self.a_out, self.a_in, self.c_m_out, self.c_m_in, self.c_shift):
                nn.init.zeros_(added)

    def effective(self) -> Weights:
        """W' (out, in) and b' (out), named as a plain layer's would be."""
        w: Tensor = self.weight
        b: Tensor = self.bias
        if self.modulated:
            w = w * (self.m_out + self.c_m_out).unsqueeze(1) + self.a_out.unsqueeze(1)
            w = w * (self.m_in + self.c_m_in) + self.a_in
            b = b + self.c_shift
        return {f"{self.path}.weight": w, f"{self.path}.bias": b}

    def forward(self, x: Tensor, weights: Weights) -> Tensor:  # type: ignore[override]
        return F.linear(x, weights[f"{self.path}.weight"], weights[f"{self.path}.bias"])


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "relu": F.relu,
    "elu": F.elu,
    "identity": lambda x: x,
}


class FrontTable(nn.Embedding):
    """E (V x mD), with sparse gradients."""

    def __init__(self, rows: int, width: int):
        super().__init__(rows, width, sparse=True)

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight)


class UnifiedEmbedding(nn.Module):
    """Drop-in for nn.Embedding: ids (any shape) -> (..., D)."""

    def __init__(self, rows: int, c: Config):
        super().__init__()
        front = round(c.front_embed_mul * c.embed_dim)
        mid = round(c.mid_mul * c.embed_dim)
        self.act = ACTIVATIONS[c.front_act]
        # E[x²] after each activation, for x normal with deviation 1: it keeps the middle at
        # deviation 1.
        power = {"gelu": 0.425, "relu": 0.5, "elu": 0.645, "identity": 1.0}[c.front_act]
        self.front = FrontTable(rows, front)
        self.fc1 = Linear(front, mid, std=1 / math.sqrt(front * power))
        self.fc2 = Linear(mid, c.embed_dim, std=0.02 / math.sqrt(mid * 0.425))

    def embed(self, distinct: Tensor) -> Tensor:
        """ids (U) -> e (U, D)."""
        return self.fc2(F.gelu(self.fc1(self.act(self.front(distinct)))))

    # How many tokens are distinct depends on the data, which a compiler cannot know beforehand.
    @torch.compiler.disable
    def forward(self, ids: Tensor) -> Tensor:
        distinct, inverse = torch.unique(ids, return_inverse=True)
        return F.embedding(inverse, self.embed(distinct))

    @torch.no_grad()
    def table(self, chunk: int = 4096) -> Tensor:
        """e for every row, (V, D): what is left when training is over."""
        ids = torch.arange(self.front.num_embeddings, device=self.fc1.weight.device)
        return torch.cat([self.embed(part) for part in ids.split(chunk)])


class Attention(nn.Module):
    def __init__(self, c: Config, layer: int):
        super().__init__()
        self.layer = layer
        self.num_heads = c.num_heads
        self.dropout = c.dropout
        path = f"blocks.{layer}.attn"  # CHANGED: unified layers, here and below
        self.query = UnifiedLinear(c.embed_dim, c.embed_dim, c, f"{path}.query")  # CHANGED
        self.key = UnifiedLinear(c.embed_dim, c.embed_dim, c, f"{path}.key")  # CHANGED
        self.value = UnifiedLinear(c.embed_dim, c.embed_dim, c, f"{path}.value")  # CHANGED
        std = 0.02 / math.sqrt(2 * c.num_blocks)  # CHANGED
        self.proj = UnifiedLinear(c.embed_dim, c.embed_dim, c, f"{path}.proj", std)  # CHANGED
        head_dim = c.embed_dim // c.num_heads  # CHANGED
        self.value_norm = nn.LayerNorm(head_dim) if c.value_norm else nn.Identity()  # CHANGED

    def forward(self, x: Tensor, cache: KVCache | None, w: Weights) -> Tensor:  # CHANGED
        head_shape = (self.num_heads, x.shape[-1] // self.num_heads)  # (H, h)
        q = self.query(x, w).unflatten(-1, head_shape).transpose(1, 2)  # (B, H, t, h)
        k = self.key(x, w).unflatten(-1, head_shape).transpose(1, 2)
        v = self.value_norm(self.value(x, w).unflatten(-1, head_shape).transpose(1, 2))
        if cache is not None:
            k, v = cache.append(self.layer, k, v)  # (B, H, T, h)
        out = causal_attention(q, k, v).transpose(1, 2).flatten(2)  # (B, t, D)
        return dropout(self.proj(out, w), self.dropout, self.training)


class FeedForward(nn.Module):
    def __init__(self, c: Config, layer: int):  # CHANGED
        super().__init__()
        self.dropout = c.dropout
        self.gelu = c.gelu
        path = f"blocks.{layer}.ff"
        std = 0.02 / math.sqrt(2 * c.num_blocks)
        self.fc1 = UnifiedLinear(c.embed_dim, 4 * c.embed_dim, c, f"{path}.fc1")  # CHANGED
        self.fc2 = UnifiedLinear(4 * c.embed_dim, c.embed_dim, c, f"{path}.fc2", std)  # CHANGED

    def forward(self, x: Tensor, w: Weights) -> Tensor:  # CHANGED
        hidden = F.gelu(self.fc1(x, w), approximate=self.gelu)  # CHANGED
        return dropout(self.fc2(hidden, w), self.dropout, self.training)  # CHANGED


# CHANGED: to Block
class LearnedAdd(nn.Module):
    """α x + β f, each factor a trained number in (FLOOR, CEIL), starting at 1. x, f (..., D) ->
    (..., D)."""

    FLOOR = 0.4
    CEIL = 1.5

    def __init__(self, c: Config):
        super().__init__()
        self.bias = nn.Parameter(torch.empty(2 * c.embed_dim if c.per_feature else 2))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        share = (1 - self.FLOOR) / (self.CEIL - self.FLOOR)
        nn.init.constant_(self.bias, math.log(share / (1 - share)))  # the factor 1

    def forward(self, x: Tensor, f: Tensor) -> Tensor:
        alpha, beta = (self.FLOOR + (self.CEIL - self.FLOOR) * torch.sigmoid(self.bias)).chunk(
            2, -1
        )
        return alpha * x + beta * f


class Block(nn.Module):
    def __init__(self, c: Config, layer: int):
        super().__init__()
        self.ln1 = nn.LayerNorm(c.embed_dim)
        self.attn = Attention(c, layer)
        self.ln2 = nn.LayerNorm(c.embed_dim)
        self.ff = FeedForward(c, layer)  # CHANGED
        # CHANGED
        self.add1 = LearnedAdd(c)
        self.add2 = LearnedAdd(c)

    def forward(self, x: Tensor, cache: KVCache | None, w: Weights) -> Tensor:  # CHANGED
        x = self.add1(x, self.attn(self.ln1(x), cache, w))  # CHANGED
        return self.add2(x, self.ff(self.ln2(x), w))  # CHANGED


class GPT(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.dropout = c.dropout
        self.tok_embed: nn.Module = Embedding(c.vocab_size, c.embed_dim)  # CHANGED
        if c.front_embed_mul:  # CHANGED
            self.tok_embed = UnifiedEmbedding(c.vocab_size, c)
        self.pos_embed = Embedding(c.max_len, c.embed_dim)
        self.blocks = nn.ModuleList(Block(c, layer) for layer in range(c.num_blocks))
        self.ln = nn.LayerNorm(c.embed_dim)
        self.head = Linear(c.embed_dim, c.vocab_size, bias=c.head_bias)
        # CHANGED: to effective
        self.unified = [m for m in self.modules() if isinstance(m, UnifiedLinear)]
        self.cached: Weights | None = None  # what `effective` gave, while no weight changes

    def effective(self) -> Weights:  # CHANGED
        """Weights and biases of all unified layers, under the names of a plain model's."""
        made: Weights = {}
        for layer in self.unified:
            made |= layer.effective()
        return made

    def forward(self, ids: Tensor, cache: KVCache | None = None) -> Tensor:
        """ids (B, t) -> hidden states (B, t, D); `head` turns them into logits."""
        past = 0 if cache is None else cache.length
        positions = torch.arange(past, past + ids.shape[1], device=ids.device)
        x = dropout(self.tok_embed(ids) + self.pos_embed(positions), self.dropout, self.training)
        w = self.effective() if self.cached is None else self.cached  # CHANGED
        for block in self.blocks:
            x = block(x, cache, w)  # CHANGED
        if cache is not None:
            cache.advance(ids.shape[1])
        return self.ln(x)


class Runner(ModelRunner):
    Config = Config

    def build(self) -> nn.Module:
        return start_as(self.config.init, GPT(self.config))

    # CHANGED: to the end of the class
    training_only = (
        "*.m_out",
        "*.a_out",
        "*.m_in",
        "*.a_in",
        "*.c_*",
        "tok_embed.front.*",
        "tok_embed.fc1.*",
        "tok_embed.fc2.*",
    )

    def fixed_weights(self, model: nn.Module) -> AbstractContextManager[None]:
        return cache_weights(model, model.effective)  # type: ignore[arg-type]

    def param_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """What is added to W learns at the rate in RATES, because W's entries are about .02."""
        groups = super().param_groups(model)
        own = dict(model.named_parameters())
        slow = {name: RATES[kind] for name in own for kind in RATES if name.endswith(f".{kind}")}
        taken = {id(own[name]) for name in slow}
        groups = [{**g, "params": [p for p in g["params"] if id(p) not in taken]} for g in groups]
        for scale in sorted(set(slow.values())):
            params = [own[name] for name in slow if slow[name] == scale]
            groups.append({"params": params, "role": "vector", "lr_scale": scale})
        return [g for g in groups if g["params"]]

    @torch.no_grad()
    def fold(self, model: nn.Module) -> nn.Module:
        """The model with effective weights and the tabulated embedding; the rest is shared."""
        with torch.device("meta"):
            plain = GPT(replace(self.config, unify_linear=False, front_embed_mul=0.0))
        tensors = {**model.state_dict(), **model.effective()}  # type: ignore[operator]
        if isinstance(model.tok_embed, UnifiedEmbedding):
            tensors["tok_embed.weight"] = model.tok_embed.table()
        plain.load_state_dict({name: tensors[name] for name in plain.state_dict()}, assign=True)
        return plain


BASELINE = "gpt2ish"

VARIANTS: dict[str, dict] = {
    "all1": {},
    "all1_16x": {"front_embed_mul": 16.0},
    "all1_value_norm": {"value_norm": True},
    "all1_features": {"per_feature": True},
}
