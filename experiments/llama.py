"""Llama 2 as published, and what Llama 1 and 3, Mistral, Qwen2, Qwen3 and SmolLM2 change of it.

The idea: none of ours. Touvron et al. 2023 (arXiv 2307.09288, section 2.2; the model is that of
arXiv 2302.13971, section 2.2): RMSNorm with a gain before each layer, rotary positions, a gated
feed-forward, no biases, an untied head, no dropout.

    x = E[token]
    q, k, v = W norm(x);  q, k = rotate(q), rotate(k)                        for each of L blocks
    x = x + proj(attention(q, k, v));  x = x + down(silu(gate(norm(x))) * up(norm(x)))
    logits = head(norm(x))

Grouped queries (`num_kv_heads`) are those of Llama 2 70B and Llama 3, slower rotations for longer
texts (`rotary_scaling`) those of Llama 3.1, the sliding window (`sliding_window`) that of Mistral
7B, biases of queries, keys and values (`qkv_bias`) those of Qwen2, normalized queries and keys
(`qk_norm`) those of Qwen3 and the tied head (`tied`) that of SmolLM2. Weights map one to one to the
transformers library's, in both directions. They start normal with standard deviation .02.

The variants are these families at the plan's sizes; as published they have grouped queries as well.
`llama_42m` and `llama_1b` have the sizes of Karpathy's llama2.c and of Sheared-LLaMA 1.3B.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

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
    dropout: float = 0.0
    num_kv_heads: int | None = None  # heads of keys and values; None: num_heads
    head_dim: int = 0  # 0: embed_dim / num_heads
    ff_dim: int = 0  # 0: 8/3 embed_dim, rounded up to a multiple of 32
    norm_eps: float = 1e-5  # of every RMSNorm
    rotary_base: float = 10000.0  # the longest wavelength is 2 pi of it
    # Llama 3.1: factor, low and high frequency factors, length in training; (): none
    rotary_scaling: tuple[float, ...] = ()
    sliding_window: int = 0  # positions that a position sees, its own included; 0: all
    qkv_bias: bool = False  # of queries, keys and values
    qk_norm: bool = False  # RMSNorm of queries and keys, for each head
    tied: bool = False  # the head is the embedding

    def __post_init__(self) -> None:
        if self.num_heads % self.kv_heads:
            raise ValueError(
                f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.kv_heads}"
            )
        if (not self.head_dim and self.embed_dim % self.num_heads) or self.head_size % 2:
            raise ValueError("rotary positions need heads of an even size: set head_dim")
        if self.rotary_scaling and len(self.rotary_scaling) != 4:
            raise ValueError("rotary_scaling has four numbers, or none")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout {self.dropout} is not in [0, 1)")

    @property
    def kv_heads(self) -> int:
        return self.num_kv_heads or self.num_heads

    @property
    def head_size(self) -> int:
        return self.head_dim or self.embed_dim // self.num_heads

    @property
    def inner(self) -> int:
        return self.ff_dim or -(-8 * self.embed_dim // (3 * 32)) * 32


class Linear(nn.Linear):
    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=0.02)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class Embedding(nn.Embedding):
    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=0.02)


class RMSNorm(nn.RMSNorm):
    """nn.RMSNorm with a gain of the input's precision, which the fused kernel wants."""

    def forward(self, x: Tensor) -> Tensor:
        assert self.weight is not None
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


def rotary_table(c: Config, past: int, t: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return cos and sin (t, h/2) of the angles at the positions from `past` on."""
    half = c.head_size // 2
    f = c.rotary_base ** (-torch.arange(half, device=like.device, dtype=torch.float32) / half)
    if c.rotary_scaling:  # slow rotations become slower still, with a ramp in between
        factor, low, high, trained = c.rotary_scaling
        turns = trained * f / (2 * math.pi)
        keep = ((turns - low) / (high - low)).clamp(0, 1)
        f = f * (keep + (1 - keep) / factor)
    angles = torch.arange(past, past + t, device=like.device).unsqueeze(1) * f
    return angles.cos().to(like.dtype), angles.sin().to(like.dtype)


def rotate(x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """Turn dimensions i and i + h/2 of x (B, H, t, h) by the angle of their position."""
    cos, sin = rotary
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


class Attention(nn.Module):
    def __init__(self, c: Config, layer: int):
        super().__init__()
        self.c = c
        self.layer = layer
        h = c.head_size
        self.query = Linear(c.embed_dim, c.num_heads * h, bias=c.qkv_bias)
        self.key = Linear(c.embed_dim, c.kv_heads * h, bias=c.qkv_bias)
        self.value = Linear(c.embed_dim, c.kv_heads * h, bias=c.qkv_bias)
        self.proj = Linear(c.num_heads * h, c.embed_dim, bias=False)
        self.query_norm = RMSNorm(h, c.norm_eps) if c.qk_norm else nn.Identity()
        self.key_norm = RMSNorm(h, c.norm_eps) if c.qk_norm else nn.Identity()

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor], cache: KVCache | None) -> Tensor:
        c = self.c
        q = self.query_norm(self.query(x).unflatten(-1, (c.num_heads, -1))).transpose(1, 2)
        k = self.key_norm(self.key(x).unflatten(-1, (c.kv_heads, -1))).transpose(1, 2)
        v = self.value(x).unflatten(-1, (c.kv_heads, -1)).transpose(1, 2)  # (B, kv_heads, t, h)
        q, k = rotate(q, rotary), rotate(k, rotary)
        if cache is not None:
            k, v = cache.append(self.layer, k, v)
        group = c.num_heads // c.kv_heads
        k = k.repeat_interleave(group, 1)  # (B, H, T, h)
        v = v.repeat_interleave(group, 1)
        t, total = q.shape[2], k.shape[2]
        if c.sliding_window and total > c.sliding_window:
            at = torch.arange(total, device=x.device)
            distance = at[total - t :, None] - at
            seen = (distance >= 0) & (distance < c.sliding_window)
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=seen)
        else:
            out = causal_attention(q, k, v)
        return dropout(self.proj(out.transpose(1, 2).flatten(2)), c.dropout, self.training)


class FeedForward(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.dropout = c.dropout
        self.gate = Linear(c.embed_dim, c.inner, bias=False)
        self.up = Linear(c.embed_dim, c.inner, bias=False)
        self.down = Linear(c.inner, c.embed_dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return dropout(self.down(F.silu(self.gate(x)) * self.up(x)), self.dropout, self.training)


class Block(nn.Module):
    def __init__(self, c: Config, layer: int):
        super().__init__()
        self.norm1 = RMSNorm(c.embed_dim, c.norm_eps)
        self.attn = Attention(c, layer)
        self.norm2 = RMSNorm(c.embed_dim, c.norm_eps)
        self.ff = FeedForward(c)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor], cache: KVCache | None) -> Tensor:
        x = x + self.attn(self.norm1(x), rotary, cache)
        return x + self.ff(self.norm2(x))


class Llama(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.c = c
        self.tok_embed = Embedding(c.vocab_size, c.embed_dim)
        self.blocks = nn.ModuleList(Block(c, layer) for layer in range(c.num_blocks))
        self.norm = RMSNorm(c.embed_dim, c.norm_eps)
        self.head = Linear(c.embed_dim, c.vocab_size, bias=False)
        if c.tied:
            self.head.weight = self.tok_embed.weight

    def forward(self, ids: Tensor, cache: KVCache | None = None) -> Tensor:
        """ids (B, t) -> hidden states (B, t, D); `head` turns them into logits."""
        past = 0 if cache is None else cache.length
        x = dropout(self.tok_embed(ids), self.c.dropout, self.training)
        rotary = rotary_table(self.c, past, ids.shape[1], x)
        for block in self.blocks:
            x = block(x, rotary, cache)
        if cache is not None:
            cache.advance(ids.shape[1])
        return self.norm(x)


class Runner(ModelRunner):
    Config = Config
    hf_types = ("llama", "mistral", "qwen2", "qwen3")

    def build(self) -> nn.Module:
        return Llama(self.config)

    def new_cache(self, model: nn.Module, batch_size: int, max_len: int) -> KVCache:
        c = self.config
        like = next(model.parameters())
        return KVCache(c.num_blocks, batch_size, c.kv_heads, max_len, c.head_size, like)

    def to_hf(self, model: nn.Module) -> HfForm | None:
        """Return the weights as a model of the family that has these features, if one has."""
        c = self.config
        features = {"mistral": c.sliding_window > 0, "qwen2": c.qkv_bias, "qwen3": c.qk_norm}
        kinds = [kind for kind, has in features.items() if has] or ["llama"]
        if len(kinds) > 1 or (c.qkv_bias and c.head_dim not in (0, c.embed_dim // c.num_heads)):
            return None
        config = {ours: getattr(c, theirs) for ours, theirs in HF_FIELDS.items()}
        rope: dict[str, Any] = {"rope_type": "default", "rope_theta": c.rotary_base}
        if c.rotary_scaling:
            scaling = zip(LLAMA3, (*c.rotary_scaling[:3], int(c.rotary_scaling[3])), strict=True)
            rope |= {"rope_type": "llama3", **dict(scaling)}
        config |= {"rope_parameters": rope, "sliding_window": c.sliding_window or None}
        return HfForm(kinds[0], config, {hf_name(name): name for name in model.state_dict()})

    @classmethod
    def from_hf(cls, form: HfForm, max_len: int) -> OwnForm:
        theirs = form.config
        for key in ("mlp_bias", "attention_bias", "use_sliding_window"):
            if theirs.get(key):
                raise ValueError(f"{key} is not supported")
        if theirs["hidden_act"] != "silu":
            raise ValueError(f"hidden_act {theirs['hidden_act']} is not supported, only silu")
        rope = theirs["rope_parameters"]
        kind = rope.get("rope_type", "default")
        if kind not in ("default", "llama3"):
            raise ValueError(f"rope_type {kind} is not supported, only default and llama3")
        head_dim = theirs["hidden_size"] // theirs["num_attention_heads"]
        read = {ours: theirs.get(key) for key, ours in HF_FIELDS.items() if ours in READ}
        config = {ours: value for ours, value in read.items() if value is not None} | {
            "num_kv_heads": theirs["num_key_value_heads"],
            "head_dim": theirs.get("head_dim") or head_dim,
            "ff_dim": theirs["intermediate_size"],
            "max_len": max_len,
            "rotary_base": rope["rope_theta"],
            "rotary_scaling": tuple(float(rope[key]) for key in LLAMA3 if kind == "llama3"),
            "sliding_window": theirs.get("sliding_window") or 0,
            "qkv_bias": form.model_type == "qwen2",
            "qk_norm": form.model_type == "qwen3",
        }
        with torch.device("meta"):
            names = {name: hf_name(name) for name in Llama(Config(**config)).state_dict()}
        tensors = {ours: form.tensors[theirs] for ours, theirs in names.items()}
        return OwnForm(config, tensors, sorted(set(form.tensors) - set(names.values())))


HF_FIELDS = {
    "vocab_size": "vocab_size",
    "hidden_size": "embed_dim",
    "num_hidden_layers": "num_blocks",
    "num_attention_heads": "num_heads",
    "num_key_value_heads": "kv_heads",
    "head_dim": "head_size",
    "intermediate_size": "inner",
    "max_position_embeddings": "max_len",
    "rms_norm_eps": "norm_eps",
    "tie_word_embeddings": "tied",
}
READ = ("vocab_size", "embed_dim", "num_blocks", "num_heads", "norm_eps", "tied")
LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
HF_NAMES = {
    "tok_embed": "model.embed_tokens",
    "norm": "model.norm",
    "head": "lm_head",
    "norm1": "input_layernorm",
    "norm2": "post_attention_layernorm",
    "attn.query": "self_attn.q_proj",
    "attn.key": "self_attn.k_proj",
    "attn.value": "self_attn.v_proj",
    "attn.proj": "self_attn.o_proj",
    "attn.query_norm": "self_attn.q_norm",
    "attn.key_norm": "self_attn.k_norm",
    "ff.gate": "mlp.gate_proj",
    "ff.up": "mlp.up_proj",
    "ff.down": "mlp.down_proj",
}


def hf_name(name: str) -> str:
    """Return a tensor's name in the transformers library's models."""
    layer, _, kind = name.rpartition(".")
    if not name.startswith("blocks."):
        return f"{HF_NAMES[layer]}.{kind}"
    _, block, inside = layer.split(".", 2)
    return f"model.layers.{block}.{HF_NAMES[inside]}.{kind}"


BASELINE = "llama"

VARIANTS: dict[str, dict] = {
    "llama": {},
    "llama3": {"rotary_base": 5e5, "rotary_scaling": (8.0, 1.0, 4.0, 8192.0)},
    "mistral": {"sliding_window": 4096},
    "qwen2": {"qkv_bias": True, "rotary_base": 1e6},
    "qwen3": {"qk_norm": True, "head_dim": 128, "rotary_base": 1e6},
    "smollm2": {"tied": True, "rotary_base": 1e5},
    "llama_42m": {"num_blocks": 8, "embed_dim": 512, "num_heads": 8},
    "llama_1b": {"num_blocks": 24, "embed_dim": 2048, "num_heads": 16, "ff_dim": 5504},
}
