"""Unified Embeddings: a wide table and a small network behind it in training, a plain table
afterwards.

The idea: a rare token's vector is updated seldom and drags the network back to an older state. A
wide front table lets every token keep what it stores, while the network behind it, trained at every
step, keeps all tokens in the language the rest of the model speaks now.

    e(v) = W2 gelu(W1 a(E[v]) + b1) + b2       E (V x mD), W1 (kD x mD), W2 (D x kD)

m is `front_embed_mul`, k `mid_mul`, a `front_act`. e depends on the token alone, so `fold`
tabulates it into a plain (V x D) embedding and inference costs nothing. It is computed for the
distinct tokens of a mini-batch only, and E's gradient is sparse: the rows of those tokens. Under
Adagrad without weight decay a row that is not looked up does not change, so the sparse update
equals the dense one and is what the harness uses.

`--initial-model` fits it to a trained plain embedding (see fit), so that an existing model goes on
with UE.

E starts normal with deviation 1, where gelu bends; W1 and W2 are scaled so that e starts with
deviation .02, as the baseline's table does.

Variants: the width m and the middle k; with value norm; for positions instead of tokens; `ue8x_cpu`
keeps the front table on the CPU while the rest is on the GPU.
Training-only parameters: V m D for the table, m k D² + k D² for the network. At 50257 x 768 and m =
8 that is 309 M and 5.3 M, against the baseline's 120.6 M.

The claim (to be tested): 6 blocks with UE beat 12 without; wider is better.
Result so far (2026-11-28, docs/results.md): on the plan sketch, with Muon, HARMFUL (-.014 nats)
from GPT-2's initialization and REAL (+.043) from torch's.
Source: https://github.com/jmward01/lmplay (unified embeddings 1.0 to 1.4).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

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
    front_embed_mul: float = 8.0  # CHANGED: m, the front table's width in embed_dims
    mid_mul: float = 1.0  # CHANGED: k, the middle's width in embed_dims
    front_act: Literal["gelu", "relu", "elu", "identity"] = "gelu"  # CHANGED: a
    unify: Literal["tokens", "positions"] = "tokens"  # CHANGED: which table is unified
    front_on_cpu: bool = False  # CHANGED: keep E in the computer's memory
    value_norm: bool = False  # CHANGED: LayerNorm over each head's values, as in value_norm.py

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
        if self.front_embed_mul <= 0 or self.mid_mul <= 0:  # CHANGED
            raise ValueError("front_embed_mul and mid_mul must be above 0")


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
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "relu": F.relu,
    "elu": F.elu,
    "identity": lambda x: x,
}


class FrontTable(nn.Embedding):
    """E (V x mD), with sparse gradients; with on_cpu it stays in the computer's memory."""

    def __init__(self, rows: int, width: int, on_cpu: bool):
        self.on_cpu = on_cpu
        super().__init__(rows, width, sparse=True)

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        if not self.on_cpu:
            return super()._apply(fn, recurse)
        # it may not fit elsewhere at all
        self.weight.data = self.weight.data.to(fn(self.weight.data[:0]).dtype)
        return self


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
        self.front = FrontTable(rows, front, c.front_on_cpu)
        self.fc1 = Linear(front, mid, std=1 / math.sqrt(front * power))
        self.fc2 = Linear(mid, c.embed_dim, std=0.02 / math.sqrt(mid * 0.425))

    def embed(self, distinct: Tensor) -> Tensor:
        """ids (U) -> e (U, D)."""
        rows = self.front(distinct.to(self.front.weight.device)).to(self.fc1.weight.device)
        return self.fc2(F.gelu(self.fc1(self.act(rows))))

    # How many tokens are distinct depends on the data, which a compiler cannot know beforehand.
    @torch.compiler.disable
    def forward(self, ids: Tensor) -> Tensor:
        distinct, inverse = torch.unique(ids, return_inverse=True)
        return F.embedding(inverse, self.embed(distinct))

    @torch.no_grad()
    def fit(self, table: Tensor, chunk: int = 4096) -> float:
        """Make e the plain table (V, D): a fold undone.

        Returns the error's root mean square by the table's deviation.

        The first D columns of the front hold the table, moved so far up that the activations pass
        it on as it is; W1 and W2 carry it through and b2 moves it back. The other columns keep
        their random start, and what W1 makes of them is subtracted from the first ones, so that
        they are ready to learn and change nothing yet. (Fitting it by descent, as the source does,
        is far slower: 300 passes of Adagrad over a random table of 4096 x 256 at its rate of 5e-3
        left an error of 89 %.)
        """
        dim = table.shape[1]
        size = table.std()
        wanted = table / size
        w1 = self.fc1.weight
        w2 = self.fc2.weight
        front = self.front.weight
        rest = [
            F.linear(self.act(rows.to(w1.device)), w1[:dim, dim:]).to(front.device)
            for rows in front[:, dim:].split(chunk)
        ]
        others = torch.cat(rest)  # (V, D)
        up = float(wanted.abs().max() + others.abs().max() + 6)  # gelu(6) is 6 but for 6e-9
        front[:, :dim] = wanted.to(front.device) + up - others
        w1[:, :dim] = torch.eye(len(w1), dim, device=w1.device)
        self.fc1.bias.zero_()
        w2.copy_(size * torch.eye(dim, len(w1), device=w1.device))
        self.fc2.bias.fill_(-up * float(size))
        return float((self.table() - table).square().mean().sqrt() / size)

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
        self.query = Linear(c.embed_dim, c.embed_dim)
        self.key = Linear(c.embed_dim, c.embed_dim)
        self.value = Linear(c.embed_dim, c.embed_dim)
        self.proj = Linear(c.embed_dim, c.embed_dim, std=0.02 / math.sqrt(2 * c.num_blocks))
        head_dim = c.embed_dim // c.num_heads  # CHANGED
        self.value_norm = nn.LayerNorm(head_dim) if c.value_norm else nn.Identity()  # CHANGED

    def forward(self, x: Tensor, cache: KVCache | None) -> Tensor:
        head_shape = (self.num_heads, x.shape[-1] // self.num_heads)  # (H, h)
        q = self.query(x).unflatten(-1, head_shape).transpose(1, 2)  # (B, H, t, h)
        k = self.key(x).unflatten(-1, head_shape).transpose(1, 2)
        v = self.value_norm(self.value(x).unflatten(-1, head_shape).transpose(1, 2))  # CHANGED
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
        self.tok_embed: nn.Module = Embedding(c.vocab_size, c.embed_dim)  # CHANGED
        self.pos_embed: nn.Module = Embedding(c.max_len, c.embed_dim)  # CHANGED
        if c.unify == "tokens":  # CHANGED
            self.tok_embed = UnifiedEmbedding(c.vocab_size, c)
        else:  # CHANGED
            self.pos_embed = UnifiedEmbedding(c.max_len, c)
        self.blocks = nn.ModuleList(Block(c, layer) for layer in range(c.num_blocks))
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

    # CHANGED: to the end of the class
    training_only = ("*_embed.front.*", "*_embed.fc1.*", "*_embed.fc2.*")

    def new_cache(self, model: nn.Module, batch_size: int, max_len: int) -> KVCache:
        # not E, which may be on the CPU
        c = self.config
        like = model.get_parameter("head.weight")
        return KVCache(
            c.num_blocks, batch_size, c.num_heads, max_len, c.embed_dim // c.num_heads, like
        )

    def warm_start(
        self, model: nn.Module, tensors: dict[str, Tensor], say: Callable[[str], None]
    ) -> set[str]:
        """Fit the unified embedding to a trained plain one."""
        used = set()
        for name, module in model.named_children():
            plain = tensors.get(f"{name}.weight")
            if isinstance(module, UnifiedEmbedding) and plain is not None:
                rows = module.front.num_embeddings
                dim = module.fc2.out_features
                if min(module.front.embedding_dim, module.fc1.out_features) < dim:
                    say(
                        f"{name}: UE narrower than the model holds no plain table "
                        "(front_embed_mul, mid_mul below 1)"
                    )
                elif plain.shape == (rows, dim):
                    say(f"fitting UE to {name}.weight, {rows} x {dim} ...")
                    table = plain.to(module.fc1.weight.device)
                    error = module.fit(table)
                    with torch.autocast(table.device.type, dtype=torch.bfloat16):
                        rough = (
                            module.table() - table
                        ).float().square().mean().sqrt() / table.std()
                    say(
                        f"fitted: remaining error {error:.1e} of the table's deviation "
                        f"({float(rough):.1e} under --amp)"
                    )
                    used.add(f"{name}.weight")
        return used

    def fold(self, model: nn.Module) -> nn.Module:
        """A copy in which plain tables stand for the unified ones; everything else is shared."""
        folded = copy.copy(model)
        folded._modules = dict(model._modules)
        for name, module in model.named_children():
            if isinstance(module, UnifiedEmbedding):
                table: Any = module.table()
                folded._modules[name] = nn.Embedding.from_pretrained(table, freeze=False)
        return folded


BASELINE = "gpt2ish"

VARIANTS: dict[str, dict] = {
    "ue": {},
    "ue1x": {"front_embed_mul": 1.0},
    "ue4x": {"front_embed_mul": 4.0},
    "ue8x": {"front_embed_mul": 8.0},
    "ue16x": {"front_embed_mul": 16.0},
    "ue4x_64": {"front_embed_mul": 4.0, "mid_mul": 64.0},
    "ue8x_32": {"front_embed_mul": 8.0, "mid_mul": 32.0},
    "ue16x_4": {"front_embed_mul": 16.0, "mid_mul": 4.0},
    "ue1x_value_norm": {"front_embed_mul": 1.0, "value_norm": True},
    "ue4x_value_norm": {"front_embed_mul": 4.0, "value_norm": True},
    "ue8x_value_norm": {"front_embed_mul": 8.0, "value_norm": True},
    "ue16x_value_norm": {"front_embed_mul": 16.0, "value_norm": True},
    "ue4x_64_value_norm": {"front_embed_mul": 4.0, "mid_mul": 64.0, "value_norm": True},
    "ue8x_32_value_norm": {"front_embed_mul": 8.0, "mid_mul": 32.0, "value_norm": True},
    "ue16x_4_value_norm": {"front_embed_mul": 16.0, "mid_mul": 4.0, "value_norm": True},
    "ue_positions": {"unify": "positions"},
    "ue8x_cpu": {"front_embed_mul": 8.0, "front_on_cpu": True},
}
