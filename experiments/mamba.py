"""Mamba: a selective state-space model instead of attention; its scan is fast without a compiler.

The idea: each of E = expand D features keeps N numbers of state, which decay and take in the input
at rates that the input itself sets. Reading a token costs the same at every position, and what is
kept of a text does not grow.

    x, z = in_proj(RMSNorm(r));   x = silu(conv(x))                  causal, depthwise, conv_width
    δ, B, C = x_proj(x);          δ = softplus(dt_proj(δ))           (E), (N), (N) per position
    h_t = exp(δ_t A) h_{t-1} + δ_t x_t B_t;   y_t = C_t h_t + d x_t  (E, N), A = -exp(A_log)
    r = r + out_proj(y silu(z))

Source: Mamba, Gu & Dao 2023 (arXiv 2312.00752), algorithm 2, section 3.4; how weights start:
section 3.6 and the authors' code. The weights are those of the transformers library's
MambaForCausalLM, by name: lmp_cleanmodel --format hf writes them.
Differs from gpt2ish in all but the training: no attention, feed-forward or positions; the head is
tied and has no bias. A block has about half of a gpt2ish block's parameters, so a fair comparison
needs --match params.

Three scans compute the recurrence. `naive` is the formula, a loop over time under autograd: the
reference. `chunked` is for every device: about sqrt(T) positions at a time it computes decays and
inputs in one operation each, steps through them in place (one operation a position), and weighs the
states by C in one batched product. Beside its inputs it keeps one state a chunk, sqrt(T) (N, E);
the backward pass computes the others again. A scan in log2(T) parallel rounds would move every
state several times; where memory is what limits, stepping is faster. `kernel` is mamba-ssm's CUDA
kernel where that is installed, else the chunked scan, as is announced. All of them keep decays and
states in float32 under autocast. FLOPs are counted as run: with the products that the backward pass
makes again, without a kernel's, and without what is no product (in the scan, per token and block,
some 5 N E in use and 20 N E in training).

The claim (of others, at larger sizes): level with a transformer at equal data; in use no cache that
grows. Result so far (2026-11-22, docs/results.md): on the plan laptop better than gpt2ish by .460
and .460 nats per token, seeds 0 and 1, with about half of its parameters; lmp_trial on the plan
sketch: REAL, +.47, and +.56 over gpt2ish of its size.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lmplay.api import HfForm, ModelRunner, OwnForm, dropout

# CHANGED: a mixer without attention, to the end


@dataclass(frozen=True)
class Config:
    num_blocks: int = 24
    embed_dim: int = 768
    max_len: int = 1024
    vocab_size: int = 50257
    dropout: float = 0.0
    state_dim: int = 16  # N, numbers of state a feature keeps
    expand: int = 2  # features of a block, in embed_dim
    conv_width: int = 4  # positions that the convolution sees
    dt_ratio: int = 16  # embed_dim over the rank of the step sizes
    # kernel is chunked where none is installed
    scan: Literal["kernel", "chunked", "naive"] = "kernel"

    def __post_init__(self) -> None:
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout {self.dropout} is not in [0, 1)")
        if min(self.state_dim, self.expand, self.conv_width, self.dt_ratio) < 1:
            raise ValueError("state_dim, expand, conv_width and dt_ratio are 1 or more")

    @property
    def inner(self) -> int:
        return self.expand * self.embed_dim

    @property
    def dt_rank(self) -> int:
        return math.ceil(self.embed_dim / self.dt_ratio)


# ---------------------------------------------------------------- the scan
#
# Every scan takes x, dt, z (B, T, E), the step sizes before bias and softplus; A_log (E, N), B and
# C (B, T, N), D and dt_bias (E), and the state before the first position (B, N, E). It returns y
# silu(z) (B, T, E) and the state behind the last position, through which no gradient flows.


def naive_scan(
    x: Tensor,
    dt: Tensor,
    A_log: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    z: Tensor,
    dt_bias: Tensor,
    state: Tensor,
) -> tuple[Tensor, Tensor]:
    """The recurrence as it is written, a loop over time."""
    out_type = z.dtype
    with torch.autocast(x.device.type, enabled=False):
        x, dt, B, C, z = (v.to(state.dtype) for v in (x, dt, B, C, z))
        # (B, T, E), (N, E)
        delta = F.softplus(dt + dt_bias)
        A = -torch.exp(A_log.t())
        h = state
        ys = []
        for t in range(x.shape[1]):
            decay = torch.exp(delta[:, t, None] * A)
            h = decay * h + (delta[:, t] * x[:, t])[:, None] * B[:, t, :, None]  # (B, N, E)
            ys.append((C[:, t, :, None] * h).sum(1))
        y = torch.stack(ys, 1) + D * x
        return (y * F.silu(z)).to(out_type), h.detach()


def chunked_scan(
    x: Tensor,
    dt: Tensor,
    A_log: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    z: Tensor,
    dt_bias: Tensor,
    state: Tensor,
) -> tuple[Tensor, Tensor]:
    """The same, sqrt(T) positions at a time, with a backward pass that computes the states
    again."""
    return _ChunkedScan.apply(x, dt, A_log, B, C, D, z, dt_bias, state)


class _ChunkedScan(torch.autograd.Function):
    """Time comes first inside, so that a position is one contiguous (B, N, E) piece of a chunk."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        dt: Tensor,
        A_log: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor,
        z: Tensor,
        dt_bias: Tensor,
        state: Tensor,
    ) -> tuple[Tensor, Tensor]:
        chunk = math.isqrt(x.shape[1] - 1) + 1  # sqrt(T), rounded up
        with torch.autocast(x.device.type, enabled=False):
            xs, dts, Bs, Cs, zs = _time_first(state.dtype, x, dt, B, C, z)
            delta = F.softplus(dts + dt_bias)  # (T, B, E)
            u = delta * xs
            y = torch.empty_like(delta)
            rate = _rates(A_log)
            states = []
            room = state.new_empty(2, min(chunk, len(xs)), *state.shape)
            for start in range(0, len(xs), chunk):
                part = slice(start, start + chunk)
                a, h = room[:, : len(xs[part])]
                _recur(delta[part], u[part], Bs[part], rate, state, a, h)
                y[part] = _over_states(Cs[part], h)
                states.append(state)
                state = h[-1].clone()
            out = y.addcmul_(D, xs).mul_(F.silu(zs)).transpose(0, 1).to(z.dtype).contiguous()
        ctx.chunk = chunk
        ctx.save_for_backward(x, dt, A_log, B, C, D, z, dt_bias, *states)
        ctx.mark_non_differentiable(state)
        return out, state

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        x, dt, A_log, B, C, D, z, dt_bias, *states = ctx.saved_tensors
        with torch.autocast(x.device.type, enabled=False):
            xs, dts, Bs, Cs, zs, gs = _time_first(states[0].dtype, x, dt, B, C, z, grad)
            pre = dts + dt_bias
            delta = F.softplus(pre)
            gate = torch.sigmoid(zs)
            u = delta * xs
            gy = gs * zs * gate
            y, du, ddelta = (torch.empty_like(u) for _ in range(3))
            dB = torch.empty_like(Bs)
            dC = torch.empty_like(Cs)
            rate = _rates(A_log)
            A = -torch.exp(A_log.t()).contiguous()
            dA_log = torch.zeros_like(A)
            carry = torch.zeros_like(states[0])
            room = carry.new_empty(3, min(ctx.chunk, len(xs)), *carry.shape)
            for number, before in reversed(list(enumerate(states))):
                part = slice(number * ctx.chunk, (number + 1) * ctx.chunk)
                a, h, g = room[:, : len(xs[part])]
                _recur(delta[part], u[part], Bs[part], rate, before, a, h)
                y[part] = _over_states(Cs[part], h)
                # g_t = dL/dh_t = C_t gy_t + a_{t+1} g_{t+1}, from the last position to the first.
                torch.mul(gy[part].unsqueeze(2), Cs[part].unsqueeze(3), out=g)
                later = g[-1].add_(carry)
                for decay, here in zip(
                    reversed(a[1:].unbind(0)), reversed(g[:-1].unbind(0)), strict=True
                ):
                    later = here.addcmul_(decay, later)
                carry = a[0] * later
                dC[part] = _over_features(gy[part], h)
                dB[part] = _over_features(u[part], g)
                du[part] = _over_states(Bs[part], g)
                # q = dL/d(log a) A = g a h_before A. Its sums are the gradients of delta and, as
                # dA/dA_log = A, A_log.
                q = a.mul_(g)
                q[0] *= before
                q[1:] *= h[:-1]
                torch.sum(q.mul_(A), 2, out=ddelta[part])
                dA_log += q.mul_(delta[part].unsqueeze(2)).sum((0, 1))
            dx = torch.addcmul(du * delta, gy, D)
            ddt = du.mul_(xs).add_(ddelta).mul_(torch.sigmoid(pre))
            dD = (gy * xs).sum((0, 1))
            d_bias = ddt.sum((0, 1))
            dz = y.addcmul_(D, xs).mul_(gs).mul_(gate).mul_(1 + zs * (1 - gate))  # times silu'
            dx, ddt, dB, dC, dz = (g.transpose(0, 1).to(x.dtype) for g in (dx, ddt, dB, dC, dz))
        return dx, ddt, dA_log.t(), dB, dC, dD, dz, d_bias, None


def _time_first(kind: torch.dtype, *inputs: Tensor) -> list[Tensor]:
    """Each (B, T, ...) as (T, B, ...), contiguous, of the states' type."""
    return [v.transpose(0, 1).to(kind).contiguous() for v in inputs]


def _rates(A_log: Tensor) -> Tensor:
    """A log2(e) (N, E), because exp2 is the faster exponential."""
    return (-math.log2(math.e) * torch.exp(A_log.t())).contiguous()


def _recur(
    delta: Tensor, u: Tensor, B: Tensor, rate: Tensor, state: Tensor, a: Tensor, h: Tensor
) -> None:
    """Fill a with the decays and h with the states of l positions (l, B, N, E), from the state
    before them.

    delta, u = delta x (l, B, E); B (l, B, N); rate (N, E).
    """
    torch.mul(delta.unsqueeze(2), rate, out=a).exp2_()
    torch.mul(u.unsqueeze(2), B.unsqueeze(3), out=h)
    for decay, here in zip(a.unbind(0), h.unbind(0), strict=True):
        state = here.addcmul_(decay, state)


def _over_states(weights: Tensor, h: Tensor) -> Tensor:
    """weights (l, B, N), h (l, B, N, E) -> (l, B, E)."""
    return torch.bmm(weights.flatten(0, 1).unsqueeze(1), h.flatten(0, 1)).view(*h.shape[:2], -1)


def _over_features(weights: Tensor, h: Tensor) -> Tensor:
    """weights (l, B, E), h (l, B, N, E) -> (l, B, N)."""
    return torch.bmm(weights.flatten(0, 1).unsqueeze(1), h.flatten(0, 1).transpose(1, 2)).view(
        *h.shape[:3]
    )


def kernel_scan(
    x: Tensor,
    dt: Tensor,
    A_log: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    z: Tensor,
    dt_bias: Tensor,
    state: Tensor,
) -> tuple[Tensor, Tensor]:
    """mamba-ssm's kernel; it begins from a state of zeros, whatever `state` holds."""
    kernel = importlib.import_module("mamba_ssm.ops.selective_scan_interface").selective_scan_fn
    x, dt, B, C, z = (v.transpose(1, 2) for v in (x, dt, B, C, z))
    A = -torch.exp(A_log.to(state.dtype))
    y, last = kernel(x, dt, A, B, C, D, z, dt_bias, delta_softplus=True, return_last_state=True)
    return y.transpose(1, 2), last.transpose(1, 2).to(state.dtype).detach()


INSTALLED = importlib.util.find_spec("mamba_ssm") is not None


def has_kernel(device: torch.device) -> bool:
    return device.type == "cuda" and INSTALLED


@torch.compiler.disable  # a loop over time would be unrolled, step by step
def selective_scan(name: str, fresh: bool, *inputs: Tensor) -> tuple[Tensor, Tensor]:
    """The scan of that name; the kernel where there is one for the device, that begins from zeros
    and below float64."""
    if name == "naive":
        return naive_scan(*inputs)
    possible = fresh and inputs[0].dtype != torch.float64 and has_kernel(inputs[0].device)
    return (kernel_scan if name == "kernel" and possible else chunked_scan)(*inputs)


# ---------------------------------------------------------------- the model


class State:
    """What is kept of a text for decoding, of the same size at every position: for each layer the
    convolution's last inputs (B, conv_width - 1, E) and the state (B, N, E), float32 or wider; None
    before the first position."""

    def __init__(self, layers: int):
        self.inputs: list[Tensor | None] = [None] * layers
        self.states: list[Tensor | None] = [None] * layers

    def make_room(self, tokens: int, piece: int) -> None:
        """Nothing has to go: the state does not grow."""

    def mark(self) -> tuple[list[Tensor | None], list[Tensor | None]]:
        # a step makes new tensors and leaves these as they are
        return list(self.inputs), list(self.states)

    def roll_back(
        self, mark: tuple[list[Tensor | None], list[Tensor | None]], rows: Tensor
    ) -> None:
        for kept, lists in zip(mark, (self.inputs, self.states), strict=True):
            for layer, (before, now) in enumerate(zip(kept, lists, strict=True)):
                if now is not None:
                    before = torch.zeros_like(now) if before is None else before
                    lists[layer] = torch.where(rows.view(-1, *[1] * (now.ndim - 1)), before, now)


class Embedding(nn.Embedding):
    """nn.Embedding that starts as GPT-2's."""

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=0.02)


class Head(nn.Linear):
    """nn.Linear that starts as the embedding that it is tied to."""

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


class DtProjection(nn.Linear):
    """The step sizes: softplus of the bias is log-uniform in [.001, .1] at the start, as in the
    authors' code."""

    def reset_parameters(self) -> None:
        nn.init.uniform_(self.weight, -(self.in_features**-0.5), self.in_features**-0.5)
        dt = torch.exp(torch.empty_like(self.bias).uniform_(math.log(1e-3), math.log(1e-1)))
        with torch.no_grad():
            self.bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # the inverse of softplus


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
        self.in_proj = nn.Linear(c.embed_dim, 2 * c.inner, bias=False)
        self.conv1d = nn.Conv1d(c.inner, c.inner, c.conv_width, groups=c.inner)
        self.x_proj = nn.Linear(c.inner, c.dt_rank + 2 * c.state_dim, bias=False)
        self.dt_proj = DtProjection(c.dt_rank, c.inner)
        self.A_log = nn.Parameter(torch.empty(c.inner, c.state_dim))
        self.D = nn.Parameter(torch.empty(c.inner))
        self.out_proj = OutProjection(c.inner, c.embed_dim, c.num_blocks)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        with torch.no_grad():  # S4D-real (Gu et al. 2022): A = -1, ..., -N
            self.A_log.copy_(torch.arange(1, self.c.state_dim + 1).log().expand_as(self.A_log))
            self.D.fill_(1.0)

    def forward(self, r: Tensor, state: State | None) -> Tensor:
        c = self.c
        past = None
        h = None
        if state is not None:
            past = state.inputs[self.layer]
            h = state.states[self.layer]
        x, z = self.in_proj(r).chunk(2, -1)  # (B, t, E)
        x, past = causal_conv(x, self.conv1d, past)
        # (B, t, R), (B, t, N) twice
        dt, B, C = self.x_proj(x).split([c.dt_rank, c.state_dim, c.state_dim], -1)
        dt = F.linear(dt, self.dt_proj.weight)  # its bias is added in float32
        fresh = h is None
        if h is None:
            kind = torch.promote_types(self.A_log.dtype, torch.float32)
            h = torch.zeros(len(r), c.state_dim, c.inner, dtype=kind, device=r.device)
        y, h = selective_scan(
            c.scan, fresh, x, dt, self.A_log, B, C, self.D, z, self.dt_proj.bias, h
        )
        if state is not None:
            state.inputs[self.layer] = past
            state.states[self.layer] = h
        return dropout(self.out_proj(y), c.dropout, self.training)


class Block(nn.Module):
    def __init__(self, c: Config, layer: int):
        super().__init__()
        self.norm = nn.RMSNorm(c.embed_dim, eps=1e-5)
        self.mixer = Mixer(c, layer)

    def forward(self, r: Tensor, state: State | None) -> Tensor:
        return r + self.mixer(self.norm(r), state)


class Mamba(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.dropout = c.dropout
        self.tok_embed = Embedding(c.vocab_size, c.embed_dim)
        self.blocks = nn.ModuleList(Block(c, layer) for layer in range(c.num_blocks))
        self.norm = nn.RMSNorm(c.embed_dim, eps=1e-5)
        self.head = Head(c.embed_dim, c.vocab_size, bias=False)
        self.head.weight = self.tok_embed.weight

    def forward(self, ids: Tensor, cache: State | None = None) -> Tensor:
        """ids (B, t) -> hidden states (B, t, D); `head` turns them into logits."""
        x = dropout(self.tok_embed(ids), self.dropout, self.training)
        for block in self.blocks:
            x = block(x, cache)
        return self.norm(x)


class Runner(ModelRunner):
    Config = Config
    hf_types = ("mamba",)

    def build(self) -> nn.Module:
        return Mamba(self.config)

    def new_cache(self, model: nn.Module, batch_size: int, max_len: int) -> State:
        return State(self.config.num_blocks)

    def new_stream(self, model: nn.Module, batch_size: int, max_len: int) -> State:
        return State(self.config.num_blocks)

    def window(self) -> int | None:
        return None  # the state holds all of the text, however long

    def notes(self, device: torch.device) -> list[str]:
        if self.config.scan != "kernel":
            return [f"scan: {self.config.scan}"]
        if has_kernel(device):
            return ["scan: kernel (mamba-ssm)"]
        if device.type == "cuda":
            return [
                "scan: chunked. mamba-ssm is not installed: its kernel keeps the "
                f"{self.config.state_dim} numbers of a "
                "feature's state on the chip, which the chunked scan reads and writes at each "
                "position"
            ]
        return [f"scan: chunked (there is no kernel for {device.type})"]

    def param_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """As by default, but nothing pulls the rates A or the short filters towards 0."""
        kept = {
            id(p)
            for name, p in model.named_parameters()
            if name.endswith(("A_log", "conv1d.weight"))
        }
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

    def to_hf(self, model: nn.Module) -> HfForm:
        c = self.config
        config = {
            "vocab_size": c.vocab_size,
            "hidden_size": c.embed_dim,
            "num_hidden_layers": c.num_blocks,
            "state_size": c.state_dim,
            "expand": c.expand,
            "conv_kernel": c.conv_width,
            "time_step_rank": c.dt_rank,
            "layer_norm_epsilon": 1e-5,
            "tie_word_embeddings": True,
        }
        return HfForm(
            "mamba", config, {hf_name(name): name for name, _ in model.named_parameters()}
        )

    @classmethod
    def from_hf(cls, form: HfForm, max_len: int) -> OwnForm:
        theirs = form.config
        expected = {
            "layer_norm_epsilon": 1e-5,
            "use_bias": False,
            "use_conv_bias": True,
            "hidden_act": "silu",
            "tie_word_embeddings": True,
        }
        for key, value in expected.items():
            if theirs[key] != value:
                raise ValueError(f"{key} {theirs[key]} is not supported, only {value}")
        config = {
            "vocab_size": theirs["vocab_size"],
            "embed_dim": theirs["hidden_size"],
            "num_blocks": theirs["num_hidden_layers"],
            "max_len": max_len,
            "state_dim": theirs["state_size"],
            "expand": theirs["expand"],
            "conv_width": theirs["conv_kernel"],
            "dt_ratio": theirs["hidden_size"] // theirs["time_step_rank"],
        }
        with torch.device("meta"):
            names = {name: hf_name(name) for name, _ in Mamba(Config(**config)).named_parameters()}
        tensors = {ours: form.tensors[theirs] for ours, theirs in names.items()}
        unused = set(form.tensors) - {*names.values(), "lm_head.weight"}  # which is tied
        return OwnForm(config, tensors, sorted(unused))


def hf_name(name: str) -> str:
    """A parameter's name in the transformers library's MambaForCausalLM."""
    if name.startswith("blocks."):
        return f"backbone.layers.{name.removeprefix('blocks.')}"
    return {
        "tok_embed.weight": "backbone.embeddings.weight",
        "norm.weight": "backbone.norm_f.weight",
    }[name]


BASELINE = "gpt2ish"

VARIANTS: dict[str, dict] = {
    "mamba": {},
    "mamba_735m": {"num_blocks": 48, "embed_dim": 1536},
    "mamba_tiny": {"num_blocks": 2, "embed_dim": 32},
    "mamba_naive": {"scan": "naive"},
    "market_mamba": {},
}
