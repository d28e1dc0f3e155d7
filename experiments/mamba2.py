"""Mamba-2: a state-space model in matrix products, alone or with attention in every n-th block.

The idea: give each head of P features one rate of decay. Then the recurrence inside a chunk of
positions is attention without softmax, under a mask of decays, and all of it is matrix products
(state-space duality).

    z, xBC, δ = in_proj(RMSNorm(r));   x, B, C = silu(conv(xBC));   δ = softplus(δ + bias)
    h_t = exp(δ_t A) h_{t-1} + B_t (δ_t x_t);   y_t = C_t h_t + d x_t
                                  per head: h (N, P), and A = -exp(A_log) is a number
    r = r + out_proj(RMSNorm(y silu(z)))

    a chunk: y = (C Bᵀ ⊙ L)(δ x) + decay (C h), L_ts = exp(A (δ_{s+1} + ... + δ_t)) for s <= t, else
    0

Source: Mamba-2, Dao & Gu 2024 (arXiv 2405.21060), sections 6 and 7, listing 1; the hybrid: section
9.2.3 there and Jamba (Lieber et al. 2024). The weights are those of the transformers library's
Mamba2ForCausalLM, by name: lmp_cleanmodel --format hf writes them (not the hybrid's, which has no
such form). Differs from gpt2ish in all but the head and the training, from mamba in the mixer.
Heads are as wide as gpt2ish's (embed_dim / num_heads), so a block has expand num_heads of them; B
and C are shared by all (one group). In the hybrid every `attention_every`-th block holds gpt2ish's
attention, without positions, instead of the mixer.

Three scans compute the same: `naive`, a loop over time, the reference; `chunked`, for every device;
`kernel`, mamba-ssm's or flash-linear-attention's where one is installed, else chunked, as is
announced. The chunked one keeps only its inputs for the backward pass and computes the rest again.
Its decays, and its states between chunks, are float32 under autocast; the products take its type.
FLOPs are counted as run: with what the backward pass computes again, and without a kernel's.

Expected: as mamba at equal size, and faster; the hybrid is said to beat both of its parents.
Result so far (2026-11-22, docs/results.md): on the plan laptop better than gpt2ish by .430 and .420
nats per token, seeds 0 and 1, the hybrid by .428 and .411; lmp_trial on the plan sketch, untuned:
both REAL, +.20 and +.19.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from lmplay.api import HfForm, KVCache, ModelRunner, OwnForm, causal_attention, dropout

# CHANGED: a mixer without attention, to the end


@dataclass(frozen=True)
class Config:
    num_blocks: int = 24
    embed_dim: int = 768
    num_heads: int = 12
    max_len: int = 1024
    vocab_size: int = 50257
    dropout: float = 0.0
    state_dim: int = 128  # N, numbers of state a feature keeps
    expand: int = 2  # features of a block, in embed_dim
    conv_width: int = 4  # positions that the convolution sees
    attention_every: int = 0  # every n-th block is attention; 0 is none
    # kernel is chunked where none is installed
    scan: Literal["kernel", "chunked", "naive"] = "kernel"

    def __post_init__(self) -> None:
        if self.embed_dim % self.num_heads:
            raise ValueError(
                f"embed_dim {self.embed_dim} is not a multiple of num_heads {self.num_heads}"
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout {self.dropout} is not in [0, 1)")
        if min(self.state_dim, self.expand, self.conv_width) < 1:
            raise ValueError("state_dim, expand and conv_width are 1 or more")
        if not 0 <= self.attention_every <= self.num_blocks:
            raise ValueError(
                f"attention_every {self.attention_every} is not between 0 and num_blocks "
                f"{self.num_blocks}"
            )

    @property
    def inner(self) -> int:
        return self.expand * self.embed_dim

    @property
    def heads(self) -> int:
        return self.expand * self.num_heads

    def is_attention(self, layer: int) -> bool:
        return bool(self.attention_every) and (layer + 1) % self.attention_every == 0


# ---------------------------------------------------------------- the scan
#
# Every scan takes x (B, T, H, P), delta (B, T, H) float32 or wider, A (H), B and C (B, T, N), and
# the state before the first position (B, H, P, N). It returns y without the skip (B, T, H, P) and
# the state behind the last position.

Scan = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
# products of (64, 64) are large enough for the machine; more positions are more work each
CHUNK = 64
# of a position's log decay: 1 + e^-60 is 1, and a chunk's sums stay where float32 resolves
# 2^-12
STRONGEST = -60.0


def naive_scan(
    x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """The recurrence as it is written, a loop over time."""
    h = state
    ys = []
    kind = x.dtype
    with torch.autocast(x.device.type, enabled=False):
        x, B, C = (v.to(state.dtype) for v in (x, B, C))
        # (B, T, H), (B, T, H, P)
        decay = torch.exp(delta * A)
        u = delta.unsqueeze(-1) * x
        for t in range(x.shape[1]):
            h = decay[:, t, :, None, None] * h + u[:, t].unsqueeze(-1) * B[:, t, None, None]
            ys.append((h * C[:, t, None, None]).sum(-1))
        return torch.stack(ys, 1).to(kind), h


def chunked_scan(
    x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """All chunks side by side in matrix products, then their states in a row."""
    length = x.shape[1]
    width = min(CHUNK, x.shape[1])
    if length % width:  # positions with delta = 0 change nothing
        x, delta, B, C = (
            F.pad(v, (0, 0) * (v.ndim - 2) + (0, -length % width)) for v in (x, delta, B, C)
        )
    x, delta, B, C = (v.unflatten(1, (-1, width)) for v in (x, delta, B, C))  # (B, c, l, ...)
    device = x.device.type
    kind = state.dtype
    with torch.autocast(device, enabled=False):
        steps = (delta * A).clamp(min=STRONGEST).movedim(3, 2)  # (B, c, H, l) log decays
        total = steps.cumsum(-1)
        later = torch.full((width, width), -math.inf, dtype=kind, device=x.device).triu(1)
        mask = (
            total.unsqueeze(-1) - total.unsqueeze(-2) + later
        ).exp()  # (B, c, H, l, l) from s, the last, to t
        u = (delta.unsqueeze(-1) * x).movedim(3, 2)  # (B, c, H, l, P)
        to_end = (total[..., -1:] - total).exp().unsqueeze(-1)
        # (B, c, H, 1, 1) what a chunk leaves of the state before it
        passed = total[..., -1].exp()[..., None, None]
        reached = total.exp().unsqueeze(-1)
    # What one chunk's positions say to each other; scores are the same for every head.
    scores = torch.matmul(C, B.mT).unsqueeze(2)  # (B, c, 1, l, l)
    y = torch.matmul(scores * mask, u)  # (B, c, H, l, P)
    # What each chunk adds to the state: (H P, l) by (l, N).
    added = torch.matmul((u * to_end).mT.flatten(2, 3), B).unflatten(2, (-1, x.shape[-1])).to(kind)
    before = []
    for decay, new in zip(passed.unbind(1), added.unbind(1), strict=True):
        before.append(state)
        state = torch.addcmul(new, decay, state)  # (B, H, P, N)
    carried = torch.matmul(C, torch.stack(before, 1).flatten(2, 3).mT)  # (B, c, l, H P)
    y = torch.addcmul(y, reached, carried.unflatten(-1, (-1, x.shape[-1])).movedim(3, 2))
    return y.movedim(2, 3).flatten(1, 2)[:, :length].to(x.dtype), state


def kernel_scan(
    x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """mamba-ssm's own kernel, or flash-linear-attention's simple gated linear attention, which is
    this scan by other names (q = C, k = B, v = delta x, g = delta A)."""
    if INSTALLED == "flash-linear-attention":
        heads = x.shape[2]
        kind = x.dtype
        q, k = (v.unsqueeze(2).expand(-1, -1, heads, -1).contiguous().to(kind) for v in (C, B))
        run = importlib.import_module("fla.ops.simple_gla").chunk_simple_gla
        v = (delta.unsqueeze(-1) * x).to(kind)
        y, last = run(
            q,
            k,
            v,
            g=delta * A,
            scale=1.0,
            initial_state=state.mT.contiguous(),
            output_final_state=True,
        )
        return y.to(kind), last.mT.to(state.dtype)
    run = importlib.import_module("mamba_ssm.ops.triton.ssd_combined").mamba_chunk_scan_combined
    B = B.unsqueeze(2).to(x.dtype)
    C = C.unsqueeze(2).to(x.dtype)
    return run(x, delta, A, B, C, chunk_size=256, initial_states=state, return_final_states=True)


# mamba-ssm first: its kernel shares B and C among the heads.
PACKAGES = {"mamba_ssm": "mamba-ssm", "fla": "flash-linear-attention"}
INSTALLED = next(
    (name for package, name in PACKAGES.items() if importlib.util.find_spec(package)), None
)


def kernel_name(device: torch.device) -> str | None:
    """The installed package that has a kernel for the device."""
    return INSTALLED if device.type == "cuda" else None


# ---------------------------------------------------------------- the model


class Cache:
    """What is kept of a text for decoding: for each layer the convolution's last inputs (B,
    conv_width - 1, E + 2 N) and the state (B, H, P, N), float32 or wider, of the same size at every
    position; None before the first position. The hybrid's attention keeps keys and values
    besides."""

    def __init__(self, layers: int, attention: KVCache | None):
        self.inputs: list[Tensor | None] = [None] * layers
        self.states: list[Tensor | None] = [None] * layers
        self.attention = attention


class Linear(nn.Linear):
    """nn.Linear that starts as GPT-2's: normal weights, zero bias."""

    def __init__(self, in_features: int, out_features: int, bias: bool = True, std: float = 0.02):
        self.std = std  # before super().__init__, which calls reset_parameters
        super().__init__(in_features, out_features, bias)

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=self.std)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class Embedding(nn.Embedding):
    """nn.Embedding that starts as GPT-2's."""

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=0.02)


class OutProjection(nn.Linear):
    """nn.Linear that starts smaller the more of them write to the residual stream, as in GPT-2."""

    def __init__(self, in_features: int, out_features: int, layers: int):
        self.layers = layers
        super().__init__(in_features, out_features, bias=False)

    def reset_parameters(self) -> None:
        super().reset_parameters()
        with torch.no_grad():
            self.weight /= math.sqrt(self.layers)


def causal_conv(x: Tensor, conv: nn.Conv1d, past: Tensor | None) -> tuple[Tensor, Tensor]:
    """silu of a depthwise convolution over time, in which a position sees itself and its K - 1
    predecessors.

    x (B, t, E), the layer's weight (E, 1, K) and bias (E); past (B, K - 1, E) or None for the
    text's beginning. Returns (B, t, E) and the past of what follows, through which no gradient
    flows.
    """
    assert conv.bias is not None
    past = (
        x.new_zeros(len(x), conv.weight.shape[-1] - 1, x.shape[-1])
        if past is None
        else past.to(x.dtype)
    )
    return _CausalConv.apply(x, conv.weight[:, 0].t().to(x.dtype), conv.bias.to(x.dtype), past)


class _CausalConv(torch.autograd.Function):
    """As shifted products, because conv1d wants time last, and with a backward pass that computes
    them again."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, past: Tensor
    ) -> tuple[Tensor, Tensor]:
        out = _convolve(x, weight, bias, past)
        keep = past.shape[1]
        past_after = (
            torch.cat([past, x[:, max(0, x.shape[1] - keep) :]], 1)[:, -keep:] if keep else past
        )
        ctx.save_for_backward(x, weight, bias, past)
        ctx.mark_non_differentiable(past_after)
        return F.silu(out, inplace=True), past_after

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, past = ctx.saved_tensors
        before = past.shape[1]
        length = x.shape[1]
        width = len(weight)
        out = _convolve(x, weight, bias, past)
        gate = torch.sigmoid(out)
        grad = out.mul_(1 - gate).add_(1).mul_(gate).mul_(grad)  # times silu'
        dx = grad * weight[-1]
        dw = torch.empty_like(weight)
        dw[-1] = (grad * x).sum((0, 1))
        for back in range(1, width):  # the position's `back`-th predecessor
            k = width - 1 - back
            n = max(0, length - back)
            dx[:, :n].addcmul_(grad[:, back:], weight[k])
            dw[k] = (grad[:, back:] * x[:, :n]).sum((0, 1))
            m = min(back, length)
            dw[k] += (grad[:, :m] * past[:, before - back : before - back + m]).sum((0, 1))
        return dx, dw, grad.sum((0, 1)), None


def _convolve(x: Tensor, weight: Tensor, bias: Tensor, past: Tensor) -> Tensor:
    """x (B, t, E), weight (K, E), bias (E), past (B, K - 1, E) -> (B, t, E)."""
    width = len(weight)
    before = past.shape[1]
    length = x.shape[1]
    out = torch.addcmul(bias, x, weight[-1])
    for back in range(1, width):
        k = width - 1 - back
        m = min(back, length)
        out[:, back:].addcmul_(x[:, : length - m], weight[k])
        out[:, :m].addcmul_(past[:, before - back : before - back + m], weight[k])
    return out


class Mixer(nn.Module):
    def __init__(self, c: Config, layer: int):
        super().__init__()
        self.c = c
        self.layer = layer
        wide = c.inner + 2 * c.state_dim
        self.in_proj = nn.Linear(c.embed_dim, c.inner + wide + c.heads, bias=False)
        self.conv1d = nn.Conv1d(wide, wide, c.conv_width, groups=wide)
        self.dt_bias = nn.Parameter(torch.empty(c.heads))
        self.A_log = nn.Parameter(torch.empty(c.heads))
        self.D = nn.Parameter(torch.empty(c.heads))
        self.norm = nn.RMSNorm(c.inner, eps=1e-5)
        self.out_proj = OutProjection(c.inner, c.embed_dim, c.num_blocks)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """A uniform in [-16, -1], softplus of the bias log-uniform in [.001, .1], as in the
        authors' code."""
        with torch.no_grad():
            self.A_log.uniform_(1, 16).log_()
            dt = torch.exp(self.dt_bias.uniform_(math.log(1e-3), math.log(1e-1)))
            self.dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # the inverse of softplus
            self.D.fill_(1.0)

    def forward(self, r: Tensor, cache: Cache | None) -> Tensor:
        c = self.c
        past = None
        h = None
        if cache is not None:
            past = cache.inputs[self.layer]
            h = cache.states[self.layer]
        if h is None:
            kind = torch.promote_types(self.A_log.dtype, torch.float32)
            h = torch.zeros(
                len(r), c.heads, c.inner // c.heads, c.state_dim, dtype=kind, device=r.device
            )
        # (B, t, ...)
        z, xBC, dt = self.in_proj(r).split([c.inner, c.inner + 2 * c.state_dim, c.heads], -1)
        xBC, past = causal_conv(xBC, self.conv1d, past)
        # A token alone is no work for a kernel, and none computes in float64.
        possible = r.shape[1] > 1 and r.dtype != torch.float64 and kernel_name(r.device)
        scan = {
            "naive": naive_scan,
            "chunked": chunked_scan,
            "kernel": kernel_scan if possible else chunked_scan,
        }[c.scan]
        # cheap to compute again, and large to keep
        if torch.is_grad_enabled() and scan is chunked_scan:
            y, h = checkpoint(
                self._mix, scan, z, xBC, dt, h, use_reentrant=False, preserve_rng_state=False
            )
        else:
            y, h = self._mix(scan, z, xBC, dt, h)
        if cache is not None:
            cache.inputs[self.layer] = past
            cache.states[self.layer] = h
        return dropout(self.out_proj(y), c.dropout, self.training)

    def _mix(
        self, scan: Scan, z: Tensor, xBC: Tensor, dt: Tensor, h: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The scan, its skip, gate and norm: (B, t, E), and the state after it."""
        c = self.c
        x, B, C = xBC.split([c.inner, c.state_dim, c.state_dim], -1)
        x = x.unflatten(-1, (c.heads, -1))  # (B, t, H, P)
        delta = F.softplus(dt.to(h.dtype) + self.dt_bias)
        A = -torch.exp(self.A_log)
        y, h = scan(x, delta, A, B, C, h)
        y = torch.addcmul(y, x, self.D.to(x.dtype).unsqueeze(-1)).flatten(2)
        return self.norm((y * F.silu(z)).to(h.dtype)), h.detach()


class Attention(nn.Module):
    """gpt2ish's."""

    def __init__(self, c: Config, layer: int):
        super().__init__()
        self.layer = layer // c.attention_every
        self.num_heads = c.num_heads
        self.dropout = c.dropout
        self.query = Linear(c.embed_dim, c.embed_dim)
        self.key = Linear(c.embed_dim, c.embed_dim)
        self.value = Linear(c.embed_dim, c.embed_dim)
        self.proj = Linear(c.embed_dim, c.embed_dim, std=0.02 / math.sqrt(c.num_blocks))

    def forward(self, x: Tensor, cache: Cache | None) -> Tensor:
        head_shape = (self.num_heads, x.shape[-1] // self.num_heads)  # (H, h)
        q = self.query(x).unflatten(-1, head_shape).transpose(1, 2)  # (B, H, t, h)
        k = self.key(x).unflatten(-1, head_shape).transpose(1, 2)
        v = self.value(x).unflatten(-1, head_shape).transpose(1, 2)
        if cache is not None and cache.attention is not None:
            k, v = cache.attention.append(self.layer, k, v)  # (B, H, T, h)
        out = causal_attention(q, k, v).transpose(1, 2).flatten(2)  # (B, t, D)
        return dropout(self.proj(out), self.dropout, self.training)


class Block(nn.Module):
    def __init__(self, c: Config, layer: int):
        super().__init__()
        self.norm = nn.RMSNorm(c.embed_dim, eps=1e-5)
        self.mixer = Attention(c, layer) if c.is_attention(layer) else Mixer(c, layer)

    def forward(self, r: Tensor, cache: Cache | None) -> Tensor:
        return r + self.mixer(self.norm(r), cache)


class Mamba2(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.dropout = c.dropout
        self.tok_embed = Embedding(c.vocab_size, c.embed_dim)
        self.blocks = nn.ModuleList(Block(c, layer) for layer in range(c.num_blocks))
        self.norm = nn.RMSNorm(c.embed_dim, eps=1e-5)
        self.head = Linear(c.embed_dim, c.vocab_size, bias=False)
        self.head.weight = self.tok_embed.weight

    def forward(self, ids: Tensor, cache: Cache | None = None) -> Tensor:
        """ids (B, t) -> hidden states (B, t, D); `head` turns them into logits."""
        x = dropout(self.tok_embed(ids), self.dropout, self.training)
        for block in self.blocks:
            x = block(x, cache)
        if cache is not None and cache.attention is not None:
            cache.attention.advance(ids.shape[1])
        return self.norm(x)


class Runner(ModelRunner):
    Config = Config
    hf_types = ("mamba2",)

    def build(self) -> nn.Module:
        return Mamba2(self.config)

    def new_cache(self, model: nn.Module, batch_size: int, max_len: int) -> Cache:
        c: Config = self.config
        layers = sum(c.is_attention(layer) for layer in range(c.num_blocks))
        like = next(model.parameters())
        size = c.embed_dim // c.num_heads
        attention = (
            KVCache(layers, batch_size, c.num_heads, max_len, size, like) if layers else None
        )
        return Cache(c.num_blocks, attention)

    def window(self) -> int | None:
        # the state holds all of the text
        return self.config.max_len if self.config.attention_every else None

    def notes(self, device: torch.device) -> list[str]:
        if self.config.scan != "kernel":
            return [f"scan: {self.config.scan}"]
        if name := kernel_name(device):
            return [f"scan: kernel ({name})"]
        if device.type == "cuda":
            return [
                "scan: chunked. Neither mamba-ssm nor flash-linear-attention is installed: their "
                "kernels keep on the "
                f"chip what the chunked scan writes and reads, {CHUNK} decays and scores a head "
                "and position"
            ]
        return [f"scan: chunked (there is no kernel for {device.type})"]

    def param_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """As by default, but nothing pulls the short filters towards 0."""
        kept = {id(p) for name, p in model.named_parameters() if name.endswith("conv1d.weight")}
        groups = super().param_groups(model)
        for group in groups:
            group["params"] = [p for p in group["params"] if id(p) not in kept]
        return [
            *groups,
            {
                "params": [p for p in model.parameters() if id(p) in kept],
                "role": "vector",
                "rows": False,
            },
        ]

    def to_hf(self, model: nn.Module) -> HfForm | None:
        c = self.config
        if c.attention_every:
            return None
        config = {
            "vocab_size": c.vocab_size,
            "hidden_size": c.embed_dim,
            "num_hidden_layers": c.num_blocks,
            "state_size": c.state_dim,
            "expand": c.expand,
            "conv_kernel": c.conv_width,
            "num_heads": c.heads,
            "head_dim": c.inner // c.heads,
            "n_groups": 1,
            "layer_norm_epsilon": 1e-5,
            "tie_word_embeddings": True,
        }
        return HfForm(
            "mamba2", config, {hf_name(name): name for name, _ in model.named_parameters()}
        )

    @classmethod
    def from_hf(cls, form: HfForm, max_len: int) -> OwnForm:
        theirs = form.config
        heads = theirs["num_heads"]
        expand = theirs["expand"]
        expected = {
            "layer_norm_epsilon": 1e-5,
            "use_bias": False,
            "use_conv_bias": True,
            "hidden_act": "silu",
            "tie_word_embeddings": True,
            "n_groups": 1,
            "head_dim": expand * theirs["hidden_size"] // heads,
            "num_heads": heads // expand * expand,
        }
        for key, value in expected.items():
            if theirs[key] != value:
                raise ValueError(f"{key} {theirs[key]} is not supported, only {value}")
        low, high = theirs["time_step_limit"]
        if low > 0 or high < math.inf:
            raise ValueError(f"time_step_limit {low}, {high} is not supported, only none")
        config = {
            "vocab_size": theirs["vocab_size"],
            "embed_dim": theirs["hidden_size"],
            "num_blocks": theirs["num_hidden_layers"],
            "num_heads": heads // expand,
            "max_len": max_len,
            "state_dim": theirs["state_size"],
            "expand": expand,
            "conv_width": theirs["conv_kernel"],
        }
        with torch.device("meta"):
            names = {name: hf_name(name) for name, _ in Mamba2(Config(**config)).named_parameters()}
        tensors = {ours: form.tensors[theirs] for ours, theirs in names.items()}
        unused = set(form.tensors) - {*names.values(), "lm_head.weight"}  # which is tied
        return OwnForm(config, tensors, sorted(unused))


def hf_name(name: str) -> str:
    """A parameter's name in the transformers library's Mamba2ForCausalLM."""
    if name.startswith("blocks."):
        return f"backbone.layers.{name.removeprefix('blocks.')}"
    return {
        "tok_embed.weight": "backbone.embeddings.weight",
        "norm.weight": "backbone.norm_f.weight",
    }[name]


BASELINE = "gpt2ish"

VARIANTS: dict[str, dict] = {
    "mamba2": {},
    "mamba2_tiny": {"num_blocks": 2, "embed_dim": 32, "num_heads": 2, "state_dim": 16},
    "mamba2_naive": {"scan": "naive"},
    "hybrid": {"attention_every": 2},
}
