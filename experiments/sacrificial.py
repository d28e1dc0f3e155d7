"""Sacrificial training: unified embeddings and unified weights together, all folded into a plain
GPT-2.

The idea: weights that exist in training only are free in use. So spend many of them: a wide front
table behind every token (see ue.py) and modulating vectors, predicted by networks of their own,
over every linear layer (see uw.py, whose notation this is).

    e(v) = W2 gelu(W1 a(E[v]) + b1) + b2
    W' = (W ⊙ m_out + a_out) by row, then (· ⊙ m_in + a_in) by column;  b' = b + shift
    m, a, shift = P · gelu(S z + s) + rest

sac1: UE 8x (or 16x) and a predicting network for each layer. sac2: UE 16x, one shared network
without activation (depth 0, exp_mul 64), the blocks' LayerNorms left out; options: the network
reaches into the UE as well (unify_embed), into the head (unify_head, its rows by plain vectors), or
is one for each purpose. The effective weights are computed once for all mini-batches of an
optimizer step. Details that the source leaves open are chosen as in ue.py and uw.py. `fold`
tabulates the embedding and multiplies the weights out: sac1 leaves a plain GPT-2, sac2 one without
the blocks' LayerNorms. Training-only parameters at 50257 x 768 with 6 blocks: 500 M in the
predicting networks and 314 M in the UE (sac1), 55 M and 628 M (sac2), against the baseline's 120.6
M in all.

The claim (to be tested): the largest gain of the family at the same inference cost.
Result so far (2026-11-23, docs/results.md): sac1 on the plan laptop worse than gpt2ish by .119 and
.135 nats per token, seeds 0 and 1; lmp_trial on the plan sketch, untuned: UNDECIDED, a gain of
.032. Source: https://github.com/jmward01/lmplay (sacrificial).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lmplay.api import (
    Batch,
    KVCache,
    ModelRunner,
    StepOut,
    cache_weights,
    causal_attention,
    dropout,
    linear_cross_entropy,
)

# CHANGED: what a modulating vector can be, and where each kind starts
Vector = Literal["on", "off", "plain"]  # on: predicted
STARTS = {"m_out": 1.0, "a_out": 0.0, "m_in": 1.0, "a_in": 0.0, "shift": 0.0}
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
    m_out: Vector = "on"  # CHANGED: factors of W's rows
    a_out: Vector = "on"  # CHANGED: what is added to W's rows
    m_in: Vector = "on"  # CHANGED: factors of W's columns
    a_in: Vector = "on"  # CHANGED: what is added to W's columns
    # CHANGED: what is added to the bias; plain it is one number, as the bias is a vector
    shift: Vector = "on"
    # CHANGED: which layers share a predicting network
    predictor: Literal["layer", "purpose", "model"] = "model"
    exp_mul: float = 16.0  # CHANGED: size of z in embed_dims
    depth: int = 1  # CHANGED: GELUs in a predicting network
    unify_embed: bool = False  # CHANGED: the layers behind the front table too
    unify_head: bool = False  # CHANGED: the head too
    block_norms: bool = True  # CHANGED: False leaves the blocks' LayerNorms out

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
        if "predicted" not in {self.how(kind) for kind in STARTS}:  # CHANGED
            for name, default in (("predictor", "model"), ("exp_mul", 16.0), ("depth", 1)):
                if getattr(self, name) != default:
                    raise ValueError(f"{name} is for predicted vectors, and none is")
        if self.exp_mul <= 0 or not 0 <= self.depth <= 2:  # CHANGED
            raise ValueError("exp_mul must be above 0, depth 0, 1 or 2")
        if self.front_embed_mul < 0 or self.mid_mul <= 0:  # CHANGED
            raise ValueError("front_embed_mul must be 0 or more, mid_mul above 0")

    def how(self, kind: str) -> str:  # CHANGED
        """off, plain or predicted."""
        own: str = getattr(self, kind)
        return "predicted" if own == "on" else own

    def plain(self) -> Config:  # CHANGED
        """The same model without modulation and UE: what is left when training is over."""
        off: Vector = "off"
        return replace(
            self,
            m_out=off,
            a_out=off,
            m_in=off,
            a_in=off,
            shift=off,
            predictor="model",
            exp_mul=16.0,
            depth=1,
            unify_embed=False,
            unify_head=False,
            front_embed_mul=0.0,
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
Weights = dict[str, Tensor]  # the effective weights and biases of the unified layers, by name


class UnifiedLinear(Linear):
    """A linear layer whose weight is modulated by vectors; `path` is its name in the model.

    Plain vectors are its own, a factor with a number c that is added to all its entries; predicted
    ones are given.
    """

    plain: tuple[str, ...] = ()

    def __init__(
        self,
        in_features: int,
        out_features: int,
        c: Config,
        path: str,
        std: float = 0.02,
        bias: bool = True,
    ):
        super().__init__(in_features, out_features, bias, std)
        self.path = path
        self.sizes = {
            "m_out": out_features,
            "a_out": out_features,
            "m_in": in_features,
            "a_in": in_features,
        }
        if bias:
            self.sizes["shift"] = out_features
        # The head's rows are as many as the vocabulary: too many to predict, so there they are
        # plain.
        rows = {"m_out", "a_out", "shift"} if path == "head" else set()
        self.predicted = tuple(k for k in self.sizes if c.how(k) == "predicted" and k not in rows)
        self.plain = tuple(k for k in self.sizes if c.how(k) != "off" and k not in self.predicted)
        for kind in self.plain:
            if kind not in RATES:
                self.register_parameter(f"c_{kind}", nn.Parameter(torch.empty(())))
            if kind != "shift":
                self.register_parameter(kind, nn.Parameter(torch.empty(self.sizes[kind])))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        for kind in self.plain:
            if kind not in RATES:
                nn.init.zeros_(self.get_parameter(f"c_{kind}"))
            if kind != "shift":
                nn.init.constant_(self.get_parameter(kind), STARTS[kind])

    def effective(self, predicted: dict[str, Tensor]) -> Weights:
        """W' (out, in) and b' (out), named as a plain layer's would be."""
        v = dict(predicted)
        for kind in self.plain:
            if kind == "shift":
                v[kind] = self.get_parameter("c_shift")
            elif kind in RATES:
                v[kind] = self.get_parameter(kind)
            else:
                v[kind] = self.get_parameter(kind) + self.get_parameter(f"c_{kind}")
        w = self.weight
        b = self.bias
        w = w * v["m_out"].unsqueeze(1) if "m_out" in v else w
        w = w + v["a_out"].unsqueeze(1) if "a_out" in v else w
        w = w * v["m_in"] if "m_in" in v else w
        w = w + v["a_in"] if "a_in" in v else w
        if b is None:
            return {f"{self.path}.weight": w}
        return {
            f"{self.path}.weight": w,
            f"{self.path}.bias": b + v["shift"] if "shift" in v else b,
        }

    def forward(self, x: Tensor, weights: Weights) -> Tensor:  # type: ignore[override]
        return F.linear(x, weights[f"{self.path}.weight"], weights.get(f"{self.path}.bias"))


class Predictor(nn.Module):
    """One network that predicts the vectors of several layers, those of one kind and size in one
    product.

    z is a row for each layer. For each kind and size there is a matrix, shared by the layers, and
    for each layer a trained rest, which starts at what the prediction lacks to 1 or 0.
    """

    def __init__(self, c: Config, layers: list[UnifiedLinear]):
        super().__init__()
        self.paths = [layer.path for layer in layers]
        self.depth = c.depth
        wide = round(c.exp_mul * c.embed_dim)
        dim = c.embed_dim
        self.z = nn.Parameter(torch.empty(len(layers), wide))
        self.enter = nn.Parameter(torch.empty(dim, wide))  # S
        self.enter_bias = nn.Parameter(torch.empty(dim))  # s
        self.middle = nn.Parameter(torch.empty(dim, dim)) if c.depth == 2 else None
        self.middle_bias = nn.Parameter(torch.empty(dim)) if c.depth == 2 else None
        self.tables: list[tuple[str, str, list[int]]] = []  # parameter, kind, the layers it serves
        for kind in STARTS:
            for size in sorted({layer.sizes[kind] for layer in layers if kind in layer.predicted}):
                rows = [
                    i for i, x in enumerate(layers) if kind in x.predicted and x.sizes[kind] == size
                ]
                self.tables.append((f"{kind}_{size}", kind, rows))
                self.register_parameter(f"{kind}_{size}", nn.Parameter(torch.empty(size, dim)))
                self.register_parameter(
                    f"{kind}_{size}_rest", nn.Parameter(torch.empty(len(rows), size))
                )
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        nn.init.normal_(self.z)
        nn.init.normal_(self.enter, std=1 / math.sqrt(self.enter.shape[1]))
        nn.init.zeros_(self.enter_bias)
        if self.middle is not None and self.middle_bias is not None:
            nn.init.normal_(self.middle, std=1 / math.sqrt(len(self.middle)))
            nn.init.zeros_(self.middle_bias)
        for name, _, _ in self.tables:
            nn.init.normal_(self.get_parameter(name), std=0.02)
            nn.init.zeros_(self.get_parameter(f"{name}_rest"))
        first = self.forward()
        for name, kind, rows in self.tables:
            predicted = torch.stack([first[self.paths[i]][kind] for i in rows])
            self.get_parameter(f"{name}_rest").copy_(STARTS[kind] - predicted)

    def forward(self) -> dict[str, dict[str, Tensor]]:
        """For each layer's path its predicted vectors by kind."""
        h = F.linear(self.z, self.enter, self.enter_bias)  # (layers, D)
        h = F.gelu(h) if self.depth else h
        if self.middle is not None:
            h = F.gelu(F.linear(h, self.middle, self.middle_bias))
        out: dict[str, dict[str, Tensor]] = {path: {} for path in self.paths}
        for name, kind, rows in self.tables:
            made = F.linear(h[rows], self.get_parameter(name)) + self.get_parameter(f"{name}_rest")
            for row, vector in zip(rows, made.unbind(), strict=True):
                out[self.paths[row]][kind] = vector
        return out


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
        u = c if c.unify_embed else c.plain()
        self.fc1 = UnifiedLinear(front, mid, u, "tok_embed.fc1", 1 / math.sqrt(front * power))
        self.fc2 = UnifiedLinear(
            mid, c.embed_dim, u, "tok_embed.fc2", 0.02 / math.sqrt(mid * 0.425)
        )

    def embed(self, distinct: Tensor, w: Weights) -> Tensor:
        """ids (U) -> e (U, D)."""
        return self.fc2(F.gelu(self.fc1(self.act(self.front(distinct)), w)), w)

    # How many tokens are distinct depends on the data, which a compiler cannot know beforehand.
    @torch.compiler.disable
    def forward(self, ids: Tensor, w: Weights) -> Tensor:
        distinct, inverse = torch.unique(ids, return_inverse=True)
        return F.embedding(inverse, self.embed(distinct, w))

    @torch.no_grad()
    def table(self, w: Weights, chunk: int = 4096) -> Tensor:
        """e for every row, (V, D): what is left when training is over."""
        ids = torch.arange(self.front.num_embeddings, device=self.fc1.weight.device)
        return torch.cat([self.embed(part, w) for part in ids.split(chunk)])


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

    def forward(self, x: Tensor, cache: KVCache | None, w: Weights) -> Tensor:  # CHANGED
        head_shape = (self.num_heads, x.shape[-1] // self.num_heads)  # (H, h)
        q = self.query(x, w).unflatten(-1, head_shape).transpose(1, 2)  # (B, H, t, h)
        k = self.key(x, w).unflatten(-1, head_shape).transpose(1, 2)
        v = self.value(x, w).unflatten(-1, head_shape).transpose(1, 2)
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


class Block(nn.Module):
    def __init__(self, c: Config, layer: int):
        super().__init__()
        self.ln1 = nn.LayerNorm(c.embed_dim) if c.block_norms else nn.Identity()  # CHANGED
        self.attn = Attention(c, layer)
        self.ln2 = nn.LayerNorm(c.embed_dim) if c.block_norms else nn.Identity()  # CHANGED
        self.ff = FeedForward(c, layer)  # CHANGED

    def forward(self, x: Tensor, cache: KVCache | None, w: Weights) -> Tensor:  # CHANGED
        x = x + self.attn(self.ln1(x), cache, w)
        return x + self.ff(self.ln2(x), w)


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
        # CHANGED: to effective
        self.head: Linear = Linear(c.embed_dim, c.vocab_size, bias=c.head_bias)
        if c.unify_head:
            self.head = UnifiedLinear(c.embed_dim, c.vocab_size, c, "head", bias=c.head_bias)
        self.unified = [m for m in self.modules() if isinstance(m, UnifiedLinear)]
        sharing: dict[str, list[UnifiedLinear]] = {}
        for layer in self.unified:
            if layer.predicted:
                # the embedding has an fc1 of its own
                purpose = ".".join(layer.path.split(".")[-2:])
                key = {"layer": layer.path, "purpose": purpose, "model": ""}[c.predictor]
                sharing.setdefault(key, []).append(layer)
        self.predictors = nn.ModuleList(Predictor(c, layers) for layers in sharing.values())
        self.cached: Weights | None = None  # what `effective` gave, while no weight changes

    def effective(self) -> Weights:  # CHANGED
        """Weights and biases of all unified layers, in full precision, under the names of a plain
        model's."""
        with torch.autocast(self.ln.weight.device.type, enabled=False):
            predicted: dict[str, dict[str, Tensor]] = {}
            for predictor in self.predictors:
                predicted |= predictor()
            made: Weights = {}
            for layer in self.unified:
                made |= layer.effective(predicted.get(layer.path, {}))
            return made

    def forward(self, ids: Tensor, cache: KVCache | None = None) -> Tensor:
        """ids (B, t) -> hidden states (B, t, D); `head` turns them into logits."""
        past = 0 if cache is None else cache.length
        positions = torch.arange(past, past + ids.shape[1], device=ids.device)
        w = self.effective() if self.cached is None else self.cached  # CHANGED
        tokens = (  # CHANGED
            self.tok_embed(ids, w)
            if isinstance(self.tok_embed, UnifiedEmbedding)
            else self.tok_embed(ids)
        )
        x = dropout(tokens + self.pos_embed(positions), self.dropout, self.training)  # CHANGED
        for block in self.blocks:
            x = block(x, cache, w)  # CHANGED
        if cache is not None:
            cache.advance(ids.shape[1])
        return self.ln(x)

    def output(self) -> Output:  # CHANGED
        """The head that training and decoding use."""
        if not isinstance(self.head, UnifiedLinear):
            return Output(self.head.weight, self.head.bias)
        w = self.effective() if self.cached is None else self.cached
        return Output(w["head.weight"], w.get("head.bias"))


class Output(NamedTuple):  # CHANGED
    """An output layer: weight (V, D), bias (V) or None."""

    weight: Tensor
    bias: Tensor | None


def regrouped(  # CHANGED
    groups: list[dict[str, Any]], model: nn.Module, special: dict[str, tuple[str, float]]
) -> list[dict[str, Any]]:
    """The groups, with the parameters named in `special` in groups of their own: name -> role,
    lr_scale."""
    own = dict(model.named_parameters())
    taken = {id(own[name]) for name in special}
    groups = [{**g, "params": [p for p in g["params"] if id(p) not in taken]} for g in groups]
    for role, scale in sorted(set(special.values())):
        params = [own[name] for name, key in special.items() if key == (role, scale)]
        groups.append({"params": params, "role": role, "lr_scale": scale})
    return [g for g in groups if g["params"]]


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
        "predictors.*",
        "tok_embed.front.*",
        "tok_embed.fc1.*",
        "tok_embed.fc2.*",
    )

    def step(self, model: nn.Module, batch: Batch) -> StepOut:
        return linear_cross_entropy(model(batch.ids), model.output(), batch.targets)  # type: ignore[operator]

    def logits(self, model: nn.Module, ids: Tensor, cache: Any = None) -> tuple[Tensor, Any]:
        hidden = model(ids, cache=cache)
        return F.linear(hidden[:, -1], *model.output()), cache  # type: ignore[operator]

    def fixed_weights(self, model: nn.Module) -> AbstractContextManager[None]:
        return cache_weights(model, model.effective)  # type: ignore[arg-type]

    def param_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """Modulating vectors get no weight decay, whatever their shape, and all that makes them
        rates to measure.

        Under Adam and Adagrad a step moves an entry by about the rate, so a product by the rate
        times its fan-in. Divided by that a predicted vector moves as fast as a plain one. It should
        not move faster: it moves all entries of a weight.
        """
        groups = super().param_groups(model)
        special: dict[str, tuple[str, float]] = {}
        for name, p in model.named_parameters():
            own = name.split(".")[-1]
            kind = next((k for k in STARTS if k in name.split(".")[-1]), "")
            if name.startswith("predictors."):
                vector = p.ndim == 1 or own == "z" or own.endswith("_rest")
                # z meets S, whose entries are 1/√fan-in
                fan_in = (
                    1.0
                    if p.ndim == 1 or own.endswith("_rest")
                    else p.shape[1] ** (0.5 if own == "z" else 1.0)
                )
                special[name] = ("vector" if vector else "embedding", RATES.get(kind, 1.0) / fan_in)
            elif kind:
                special[name] = ("vector", RATES.get(kind, 1.0))
        return regrouped(groups, model, special)

    @torch.no_grad()
    def fold(self, model: nn.Module) -> nn.Module:
        """A plain model with the effective weights and the tabulated embedding; the rest is
        shared."""
        with torch.device("meta"):
            plain = GPT(self.config.plain())
        made = model.effective()  # type: ignore[operator]
        tensors = {**model.state_dict(), **made}
        if isinstance(model.tok_embed, UnifiedEmbedding):
            tensors["tok_embed.weight"] = model.tok_embed.table(made)
        plain.load_state_dict({name: tensors[name] for name in plain.state_dict()}, assign=True)
        return plain


BASELINE = "gpt2ish"

VARIANTS: dict[str, dict] = {
    "sac1": {"predictor": "layer"},
    "sac1_16x": {"predictor": "layer", "front_embed_mul": 16.0},
    "sac2": {"front_embed_mul": 16.0, "exp_mul": 64.0, "depth": 0, "block_norms": False},
    "sac2_ln": {"front_embed_mul": 16.0, "exp_mul": 64.0, "depth": 0},
    "sac2_embed": {
        "front_embed_mul": 16.0,
        "exp_mul": 64.0,
        "depth": 0,
        "block_norms": False,
        "unify_embed": True,
    },
    "sac2_head": {
        "front_embed_mul": 16.0,
        "exp_mul": 64.0,
        "depth": 0,
        "block_norms": False,
        "unify_head": True,
    },
    "sac2_purpose": {
        "front_embed_mul": 16.0,
        "exp_mul": 64.0,
        "depth": 0,
        "block_norms": False,
        "predictor": "purpose",
    },
}
