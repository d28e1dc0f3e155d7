"""The baseline: a GPT-2 that every idea is measured against.

The idea: none. Pre-norm GPT-2 (Radford et al. 2019) with the choices of jmward01/lmplay:
separate query, key, value and output projections with biases, an exact GELU, an untied head with a
bias.

    x = E[token] + P[position]
    x = x + proj(attention(LN(x)));  x = x + fc2(gelu(fc1(LN(x))))      for each of L blocks
    logits = head(LN(x))

Dropout acts on the sum of the embeddings and on each branch's output before it is added. It does
not act on the attention weights, so that the fused attention can be used. Weights start as in
GPT-2: normal with standard deviation .02, and .02 / sqrt(2 L) in `proj` and `fc2`, whose outputs
are added to x. With tied=True and head_bias=False the weights map one to one to the transformers
library's GPT2LMHeadModel; with gelu=tanh as well it is GPT-2 as published.

Source: https://github.com/jmward01/lmplay (gpt2ish).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lmplay.api import HfForm, KVCache, ModelRunner, OwnForm, causal_attention, dropout


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
    hf_types = ("gpt2",)

    def build(self) -> nn.Module:
        return start_as(self.config.init, GPT(self.config))

    def to_hf(self, model: nn.Module) -> HfForm:
        """Return the weights as a GPT2LMHeadModel's.

        Its layers store matrices as (in, out), and c_attn joins query, key and value.
        """
        c = self.config
        own = model.state_dict()
        tensors = {theirs: own[name] for theirs, name in OUTSIDE.items()}
        if c.head_bias:  # GPT-2 has none; lmplay/export/gpt2.py adds it
            tensors["lm_head.bias"] = own["head.bias"]
        for i in range(c.num_blocks):
            for kind in ("weight", "bias"):
                qkv = [own[f"blocks.{i}.attn.{name}.{kind}"] for name in ("query", "key", "value")]
                block = {JOINED: torch.cat(qkv).t()}  # a vector is its own transpose
                block |= {x: own[f"blocks.{i}.{name}.{kind}"].t() for x, name in INSIDE.items()}
                tensors |= {f"transformer.h.{i}.{name}.{kind}": t for name, t in block.items()}
        config = {
            "vocab_size": c.vocab_size,
            "n_positions": c.max_len,
            "n_embd": c.embed_dim,
            "n_layer": c.num_blocks,
            "n_head": c.num_heads,
            "n_inner": 4 * c.embed_dim,
            "activation_function": ACTIVATIONS[c.gelu],
            "layer_norm_epsilon": 1e-5,
            "resid_pdrop": 0.0,  # an export is for use, not for training
            "embd_pdrop": 0.0,
            "attn_pdrop": 0.0,
            "tie_word_embeddings": c.tied,
        }
        return HfForm("gpt2", config, tensors=tensors)

    @classmethod
    def from_hf(cls, form: HfForm, max_len: int) -> OwnForm:
        theirs = form.config
        dim = theirs["n_embd"]
        expected = {
            "n_inner": (None, 4 * dim),
            "activation_function": ("gelu", "gelu_new", "gelu_pytorch_tanh"),  # two formulas
            "layer_norm_epsilon": (1e-5,),
            "scale_attn_weights": (True,),
            "scale_attn_by_inverse_layer_idx": (False,),
            "add_cross_attention": (False,),
        }
        for key, values in expected.items():
            if theirs[key] not in values:
                raise ValueError(f"{key} {theirs[key]} is not supported")
        if max_len > theirs["n_positions"]:
            raise ValueError(f"it has {theirs['n_positions']} positions, not {max_len}")
        t = form.tensors
        tensors = {name: t[theirs] for theirs, name in OUTSIDE.items()}
        tensors["pos_embed.weight"] = tensors["pos_embed.weight"][:max_len]
        used = [*OUTSIDE]
        for i in range(theirs["n_layer"]):
            for kind in ("weight", "bias"):
                block = {name: f"transformer.h.{i}.{name}.{kind}" for name in (*INSIDE, JOINED)}
                used += block.values()
                qkv = t[block[JOINED]].t().chunk(3)  # a vector is its own transpose
                own = {f"attn.{n}": x for n, x in zip(("query", "key", "value"), qkv, strict=True)}
                own |= {INSIDE[name]: t[block[name]].t() for name in INSIDE}
                tensors |= {f"blocks.{i}.{name}.{kind}": x for name, x in own.items()}
        config = {
            "vocab_size": theirs["vocab_size"],
            "embed_dim": dim,
            "num_blocks": theirs["n_layer"],
            "num_heads": theirs["n_head"],
            "max_len": max_len,
            "tied": theirs["tie_word_embeddings"],
            "head_bias": False,
            "gelu": "none" if theirs["activation_function"] == "gelu" else "tanh",
        }
        return OwnForm(config, tensors, sorted(set(t) - set(used)))


ACTIVATIONS = {"none": "gelu", "tanh": "gelu_new"}
JOINED = "attn.c_attn"
INSIDE = {
    "ln_1": "ln1",
    "ln_2": "ln2",
    "attn.c_proj": "attn.proj",
    "mlp.c_fc": "ff.fc1",
    "mlp.c_proj": "ff.fc2",
}
OUTSIDE = {
    "transformer.wte.weight": "tok_embed.weight",
    "transformer.wpe.weight": "pos_embed.weight",
    "transformer.ln_f.weight": "ln.weight",
    "transformer.ln_f.bias": "ln.bias",
    "lm_head.weight": "head.weight",
}

BASELINE = "gpt2ish"
DEFAULT = True  # what lmp_trainer trains without --exp, and lmp_new copies

VARIANTS: dict[str, dict] = {
    "gpt2ish": {},
    "gpt2ish_12": {"num_blocks": 12},
    "gpt2ish_med": {"num_blocks": 24, "embed_dim": 1024, "num_heads": 16},
    "gpt2ish_large": {"num_blocks": 36, "embed_dim": 1280, "num_heads": 20},
    "gpt2ish_deep": {"num_blocks": 18, "embed_dim": 288, "num_heads": 6},
    "gpt2ish_tiny": {"num_blocks": 2, "embed_dim": 32, "num_heads": 2},
}
