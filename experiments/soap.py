"""SOAP: Adam in the eigenbasis of Shampoo's preconditioner. The model is the baseline.

The idea: Adam scales each weight by itself; in a basis in which a matrix's gradients are least
correlated that says more (Vyas et al. 2024, arXiv 2409.11321, algorithm 3).

    L = b2 L + (1 - b2) G Gᵀ,  R = b2 R + (1 - b2) Gᵀ G          for a matrix's gradient G (m, n)
    Q_L, Q_R: the eigenvectors of L and R; every 10 steps one power iteration and a QR decomposition
    G' = Q_Lᵀ G Q_R;   V = b2 V + (1 - b2) G'²;   M = b1 M + (1 - b1) G
    W = W - lr Q_L (Q_Lᵀ M Q_R / sqrt(V)) Q_Rᵀ - lr weight_decay W

b1, b2 are .95. A side of more than 1000 has Q = 1, so that a vocabulary is no matrix to decompose.
Vectors are Adam's. As in the authors' code the first step only starts L and R.

The claim (to be tested): fewer tokens than AdamW and Shampoo for the same loss.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

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
    dropout: float = 0.0
    rotary_base: float = 10000.0  # the longest wavelength is 2 pi of it

    def __post_init__(self) -> None:
        if self.embed_dim % (2 * self.num_heads):
            raise ValueError(
                f"rotary positions need heads of an even size: embed_dim {self.embed_dim} is not a "
                f"multiple of 2 x num_heads {self.num_heads}"
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout {self.dropout} is not in [0, 1)")


class Linear(nn.Linear):
    """nn.Linear without a bias, that starts normal with 1 / sqrt(inputs), or at zero."""

    def __init__(self, in_features: int, out_features: int, zero: bool = False):
        self.std = 0.0 if zero else in_features**-0.5  # before super().__init__, which uses it
        super().__init__(in_features, out_features, bias=False)

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=self.std)


class Embedding(nn.Embedding):
    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=0.02)


def norm(x: Tensor) -> Tensor:
    """RMSNorm without a gain, over the last dimension."""
    return F.rms_norm(x, x.shape[-1:])


def rotary_table(c: Config, past: int, t: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return cos and sin (t, h/2) of the angles at the positions from `past` on."""
    half = c.embed_dim // c.num_heads // 2
    frequencies = c.rotary_base ** (-torch.arange(half, device=like.device) / half)
    positions = torch.arange(past, past + t, device=like.device)
    angles = positions.unsqueeze(1) * frequencies
    return angles.cos().to(like.dtype), angles.sin().to(like.dtype)


def rotate(x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """Turn dimensions i and i + h/2 of x (B, H, t, h) by the angle of their position."""
    cos, sin = rotary
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


class Attention(nn.Module):
    def __init__(self, c: Config, layer: int):
        super().__init__()
        self.layer = layer
        self.num_heads = c.num_heads
        self.dropout = c.dropout
        self.query = Linear(c.embed_dim, c.embed_dim)
        self.key = Linear(c.embed_dim, c.embed_dim)
        self.value = Linear(c.embed_dim, c.embed_dim)
        self.proj = Linear(c.embed_dim, c.embed_dim, zero=True)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor], cache: KVCache | None) -> Tensor:
        head_shape = (self.num_heads, x.shape[-1] // self.num_heads)  # (H, h)
        q = self.query(x).unflatten(-1, head_shape).transpose(1, 2)  # (B, H, t, h)
        k = self.key(x).unflatten(-1, head_shape).transpose(1, 2)
        v = self.value(x).unflatten(-1, head_shape).transpose(1, 2)
        q = rotate(norm(q), rotary)
        k = rotate(norm(k), rotary)
        if cache is not None:
            k, v = cache.append(self.layer, k, v)  # (B, H, T, h)
        out = causal_attention(q, k, v).transpose(1, 2).flatten(2)  # (B, t, D)
        return dropout(self.proj(out), self.dropout, self.training)


class FeedForward(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.dropout = c.dropout
        self.fc1 = Linear(c.embed_dim, 4 * c.embed_dim)
        self.fc2 = Linear(4 * c.embed_dim, c.embed_dim, zero=True)

    def forward(self, x: Tensor) -> Tensor:
        return dropout(self.fc2(F.relu(self.fc1(x)).square()), self.dropout, self.training)


class Block(nn.Module):
    def __init__(self, c: Config, layer: int):
        super().__init__()
        self.attn = Attention(c, layer)
        self.ff = FeedForward(c)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor], cache: KVCache | None) -> Tensor:
        x = x + self.attn(norm(x), rotary, cache)
        return x + self.ff(norm(x))


class Transformer(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.c = c
        self.tok_embed = Embedding(c.vocab_size, c.embed_dim)
        self.blocks = nn.ModuleList(Block(c, layer) for layer in range(c.num_blocks))
        self.head = Linear(c.embed_dim, c.vocab_size, zero=True)

    def forward(self, ids: Tensor, cache: KVCache | None = None) -> Tensor:
        """ids (B, t) -> hidden states (B, t, D); `head` turns them into logits."""
        x = norm(dropout(self.tok_embed(ids), self.c.dropout, self.training))
        past = 0 if cache is None else cache.length
        rotary = rotary_table(self.c, past, ids.shape[1], x)
        for block in self.blocks:
            x = block(x, rotary, cache)
        if cache is not None:
            cache.advance(ids.shape[1])
        return norm(x)


# CHANGED: to Runner
class Soap(torch.optim.Optimizer):
    def __init__(
        self,
        params: Any,
        lr: float = 3e-3,
        betas: tuple[float, float] = (0.95, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        every: int = 10,
        largest: int = 1000,
    ):
        super().__init__(
            params,
            {
                "lr": lr,
                "betas": betas,
                "eps": eps,
                "weight_decay": weight_decay,
                "every": every,
                "largest": largest,
            },
        )

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            b1, b2 = group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    self._start(p, p.grad, group)
                    continue
                state["step"] += 1
                t = int(state["step"])
                state["m"].lerp_(p.grad, 1 - b1)
                state["v"].lerp_(_rotated(p.grad, state).square(), 1 - b2)
                update = _rotated(state["m"], state) / (state["v"].sqrt() + group["eps"])
                lr = group["lr"] * math.sqrt(1 - b2**t) / (1 - b1**t)
                p.sub_(lr * _rotated(update, state, back=True))
                p.mul_(1 - group["lr"] * group["weight_decay"])
                self._learn_basis(p.grad, state, b2, t % group["every"] == 0)

    def _start(self, p: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        state = self.state[p]
        state.update(step=torch.zeros(()), m=torch.zeros_like(p), v=torch.zeros_like(p))
        for side, size in enumerate(p.shape if p.ndim == 2 else ()):
            if size <= group["largest"]:
                g = grad if side == 0 else grad.T
                state[f"gram{side}"] = (1 - group["betas"][1]) * (g @ g.T)
                state[f"basis{side}"] = torch.linalg.eigh(state[f"gram{side}"])[1].flip(1)

    def _learn_basis(self, grad: Tensor, state: dict[str, Tensor], b2: float, turn: bool) -> None:
        for side in range(2):
            gram, basis = state.get(f"gram{side}"), state.get(f"basis{side}")
            if gram is None or basis is None:
                continue
            g = grad if side == 0 else grad.T
            gram.lerp_(g @ g.T, 1 - b2)
            if turn:
                product = gram @ basis
                order = (basis * product).sum(0).argsort(descending=True)
                state["v"].copy_(state["v"].index_select(side, order))
                basis.copy_(torch.linalg.qr(product[:, order])[0])


def _rotated(x: Tensor, state: dict[str, Tensor], back: bool = False) -> Tensor:
    """Q_Lᵀ x Q_R, or back: Q_L x Q_Rᵀ; a side without a basis stays."""
    left, right = state.get("basis0"), state.get("basis1")
    if left is not None:
        x = (left if back else left.T) @ x
    if right is not None:
        x = x @ (right.T if back else right)
    return x


class Runner(ModelRunner):
    Config = Config

    def build(self) -> nn.Module:
        return Transformer(self.config)

    # CHANGED: to the end
    def make_optimizer(self, groups: list[dict[str, Any]], recipe: Any) -> torch.optim.Optimizer:
        return Soap(groups)


BASELINE = "modern"

VARIANTS: dict[str, dict] = {
    "soap": {"optimizer.name": "adamw", "optimizer.lr": 0.003, "optimizer.weight_decay": 0.01},
}
