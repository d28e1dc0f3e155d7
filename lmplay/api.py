"""The interface between the harness and an experiment: everything an experiment file may import.

An experiment is one file with a `Config`, the model, a `Runner` derived from :class:`ModelRunner`, and
`VARIANTS`. The harness builds the model through the runner, hands it batches, and judges the result.

Letters in shapes: B batch, T sequence, D embed_dim, V vocabulary, H heads, h head size, N tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import block_attention

IGNORE = -100
"""The target of a position whose loss is not counted."""


@dataclass(frozen=True)
class Batch:
    """One mini-batch: `ids` (B, T) int64 inputs; `targets` (B, T) int64 next tokens, or IGNORE."""

    ids: Tensor
    targets: Tensor


@dataclass
class StepOut:
    """What one forward pass of a mini-batch says, as sums: the harness divides by the whole step's tokens."""

    loss_sum: Tensor  # () float32, nats summed over the counted tokens
    n_tokens: Tensor  # () int64, counted tokens
    n_correct: Tensor  # () int64, argmax hits
    aux_loss: Tensor | None = None  # () a mean per sequence, added to the training loss only
    # Extra curves, () each, as columns of train.csv: names as Python's, and none of those that stand there already.
    log: dict[str, Tensor] = field(default_factory=dict)


class KVCache:
    """Keys and values of every attention layer, preallocated for decoding.

    `keys` and `values` are (layers, B, H, max_len, h); the first `length` positions are filled.
    """

    def __init__(self, layers: int, batch_size: int, heads: int, max_len: int, head_dim: int, like: Tensor):
        shape = (layers, batch_size, heads, max_len, head_dim)
        self.keys = torch.empty(shape, dtype=like.dtype, device=like.device)
        self.values = torch.empty(shape, dtype=like.dtype, device=like.device)
        self.length = 0

    @property
    def max_len(self) -> int:
        return self.keys.shape[3]

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k and v (B, H, t, h) behind what the layer holds; return all (B, H, length + t, h).

        The length itself moves by :meth:`advance`, once, after the last layer.

        Raises:
            ValueError: the cache has no room for t more positions.
        """
        end = self.length + k.shape[2]
        if end > self.max_len:
            raise ValueError(f"the cache holds {self.max_len} positions, {end} were asked for")
        self.keys[layer, :, :, self.length : end] = k
        self.values[layer, :, :, self.length : end] = v
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]

    def advance(self, t: int) -> None:
        """Count t positions as held by every layer."""
        self.length += t


SHORTEST_IN_BLOCKS = 64
"""Positions from which :func:`block_attention` is the faster one; below, its calls cost more than they compute."""


def _in_bfloat16_on_a_cpu(*tensors: Tensor) -> bool:
    if tensors[0].device.type != "cpu":
        return False
    if torch.is_autocast_enabled("cpu"):  # which leaves float64 as it is
        return torch.get_autocast_dtype("cpu") == torch.bfloat16 and all(x.dtype != torch.float64 for x in tensors)
    return all(x.dtype == torch.bfloat16 for x in tensors)


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q kᵀ/√h) v where the t queries are the *last* t of the T key positions, each seeing its past.

    q (B, H, t, h), k and v (B, H, T, h) -> (B, H, t, h). One form for training (t = T) and for decoding
    with a cache (t < T).
    """
    t, total = q.shape[2], k.shape[2]
    if t == total:
        if t >= SHORTEST_IN_BLOCKS and _in_bfloat16_on_a_cpu(q, k, v):
            return block_attention(q.bfloat16(), k.bfloat16(), v.bfloat16())
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    if t == 1:
        return F.scaled_dot_product_attention(q, k, v)
    sees = torch.ones(t, total, dtype=torch.bool, device=q.device).tril(total - t)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=sees)


class _ByteDropout(torch.autograd.Function):
    """Dropout whose mask is drawn eight elements to a random number; see :func:`dropout`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, drop: int) -> Tensor:
        words = torch.empty((x.numel() + 7) // 8, dtype=torch.int64)
        # random_() alone leaves the top bit at 0, which would make every eighth byte small.
        words.random_(torch.iinfo(torch.int64).min, None)
        keep = (words.view(torch.uint8)[: x.numel()] >= drop).view(x.shape)
        ctx.save_for_backward(keep)
        ctx.scale = 256 / (256 - drop)
        return x * keep * ctx.scale

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (keep,) = ctx.saved_tensors
        return grad * keep * ctx.scale, None


def dropout(x: Tensor, p: float, training: bool) -> Tensor:
    """Inverted dropout (Srivastava et al. 2014, section 10), cheap on a CPU.

    Drawing one random number an element halves the speed of a small model on a CPU. There, eager code
    draws one 64-bit number for eight elements, and p is rounded to the nearest 1/256 (0.1 -> 0.1016) with
    the scale matching what is really dropped. On an accelerator or compiled, it is F.dropout.
    """
    if not training or p == 0.0:
        return x
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return F.dropout(x, p)
    return _ByteDropout.apply(x, max(1, min(255, round(p * 256))))


CHUNK_BYTES = 64 * 2**20
"""Room for one chunk of float32 logits. Large enough that a product with the head runs at full speed."""

VOCAB_SLICE = 4096
"""Rows of the head's gradient that a CPU makes at a time under autocast: a product that is still in the cache is added
half again as fast."""


class _LinearCrossEntropy(torch.autograd.Function):
    """Head and cross entropy in chunks of rows, gradients computed in the forward pass.

    Because the loss is a sum whose upstream gradient is one scalar, the gradients can be taken while a
    chunk's logits are at hand and scaled later: nothing is computed twice and no (N, V) tensor is held.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, chunk: int
    ) -> tuple[Tensor, Tensor]:
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
        accumulate = torch.promote_types(dtype, torch.float32)  # logits and loss: never below float32
        n, vocab = x.shape[0], weight.shape[0]
        need_x, need_weight, need_bias = ctx.needs_input_grad[:3]
        need = need_x or need_weight or need_bias
        with torch.autocast(device, enabled=False):
            w, xs_all = weight.to(dtype), x.to(dtype)
            grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device) if need_x else None
            grad_w = torch.zeros_like(weight) if need_weight else None
            grad_b = torch.zeros_like(bias) if need_bias and bias is not None else None
            loss = torch.zeros((), dtype=accumulate, device=x.device)
            correct = torch.zeros((), dtype=torch.int64, device=x.device)
            rows = min(chunk, n)
            slice_of_vocab = VOCAB_SLICE if device == "cpu" else vocab
            all_counted = bool((targets != IGNORE).all())  # asked once: on a GPU it waits
            buffer = torch.empty(rows, vocab, dtype=dtype, device=x.device)
            log_probs = torch.empty(rows, vocab, dtype=accumulate, device=x.device)
            for start in range(0, n, rows):
                xs, ts = xs_all[start : start + rows], targets[start : start + rows]
                logits, logp = buffer[: len(xs)], log_probs[: len(xs)]
                if bias is None:
                    torch.mm(xs, w.t(), out=logits)
                else:
                    torch.addmm(bias.to(dtype), xs, w.t(), out=logits)
                torch.log_softmax(logits, -1, dtype=accumulate, out=logp)
                counted = ts != IGNORE
                picked = logp.gather(1, ts.clamp(min=0).unsqueeze(1)).squeeze(1)
                loss -= (picked * counted).sum()
                correct += ((picked >= logp.amax(-1)) & counted).sum()
                if not need:
                    continue
                # d loss / d logits = softmax - onehot, and 0 in rows that are not counted.
                delta = logp.exp_()
                delta.scatter_add_(1, ts.clamp(min=0).unsqueeze(1), -torch.ones_like(picked).unsqueeze(1))
                if not all_counted:
                    delta *= counted.unsqueeze(1)
                if grad_b is not None:
                    grad_b += delta.sum(0)
                delta = delta if dtype == accumulate else logits.copy_(delta)
                if grad_x is not None:
                    grad_x[start : start + rows] = delta @ w
                if grad_w is not None:
                    if grad_w.dtype == dtype:
                        torch.addmm(grad_w, delta.t(), xs, out=grad_w)  # addmm_ would not be counted as FLOPs
                    else:
                        for first in range(0, vocab, slice_of_vocab):
                            some = slice(first, first + slice_of_vocab)
                            grad_w[some] += delta[:, some].t() @ xs
        ctx.grads = (grad_x, grad_w, grad_b)
        ctx.mark_non_differentiable(correct)
        return loss, correct

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, _: Tensor) -> tuple[Any, ...]:
        if ctx.grads is None:
            raise RuntimeError("linear_cross_entropy: backward ran twice over one forward pass")
        grads, ctx.grads = ctx.grads, None
        # In place: the buffers were made for this one use, and a copy of (V, D) costs more than the scaling.
        return (*(None if g is None else g.mul_(grad_loss.to(g.dtype)) for g in grads), None, None)


class OutputLayer(Protocol):
    """Anything with a weight (V, D) and a bias (V) or None: nn.Linear, or a layer put together in each step."""

    @property
    def weight(self) -> Tensor: ...

    @property
    def bias(self) -> Tensor | None: ...


def linear_cross_entropy(hidden: Tensor, head: OutputLayer, targets: Tensor, chunk: int | None = None) -> StepOut:
    """Cross entropy of head(hidden) without ever holding the (B, T, V) logits.

    Args:
        hidden: (B, T, D) the model's last hidden states.
        head: the output layer.
        targets: (B, T) int64, IGNORE where no loss is counted.
        chunk: rows of logits held at a time; by default what fits in CHUNK_BYTES.

    Returns:
        Sums over the counted tokens. Under autocast the products run in its type, the loss in float32.
        A hit is a target whose logit no other exceeds.
    """
    weight, bias = head.weight, head.bias
    if not torch.is_grad_enabled():  # a Function sees requires_grad also then, and would compute gradients
        weight, bias = weight.detach(), None if bias is None else bias.detach()
    if chunk is None:
        chunk = max(64, CHUNK_BYTES // (4 * weight.shape[0]))
    flat = targets.reshape(-1)
    loss, correct = _LinearCrossEntropy.apply(hidden.reshape(-1, hidden.shape[-1]), weight, bias, flat, chunk)
    return StepOut(loss, (flat != IGNORE).sum(), correct)


class Holds(Protocol):
    """A model that can keep what it computed from its weights alone in `held`; None where it keeps nothing."""

    held: dict[str, Tensor] | None


@contextmanager
def computed_once(model: Holds, compute: Callable[[], dict[str, Tensor]]) -> Iterator[None]:
    """Keep `compute()`'s tensors in `model.held` for as long as no weight changes.

    Each backward pass inside ends at the kept tensors, where the gradients add up. On leaving, their sum goes on
    to the parameters in one backward pass through `compute`: the same gradients as computing the tensors in
    every forward pass, as differentiation is linear, at the cost of one. When an error leaves the context the
    gradients are not carried on.
    """
    if model.held is not None:  # an outer context holds them already
        yield
        return
    made = compute()
    model.held = {name: t.detach().requires_grad_(t.requires_grad) for name, t in made.items()}
    try:
        yield
        reached = [(made[name], t.grad) for name, t in model.held.items() if t.grad is not None]
    finally:
        model.held = None
    if reached:
        tensors, grads = zip(*reached, strict=True)
        torch.autograd.backward(tensors, grads)


class Stream(Protocol):
    """A decoding cache of endless texts made of pieces, one in each row, whose rows may differ in length.

    :meth:`ModelRunner.logits` takes it as a cache. Its `max_len` positions hold the first token and the latest pieces.
    """

    def make_room(self, tokens: int, piece: int) -> None:
        """Forget the oldest pieces of `piece` tokens of each row, until `tokens` more have room."""

    def mark(self) -> Any:
        """What :meth:`roll_back` needs to come back to this moment, as long as no more is read than has room now."""

    def roll_back(self, mark: Any, rows: Tensor) -> None:
        """Forget what was read since the mark in those rows (B,) bool."""


@dataclass(frozen=True)
class HfForm:
    """A model as one of the transformers library's.

    `model_type` and `config` are what its AutoConfig takes; `names` maps its parameters' names to the model's own,
    of the same shapes. Tied parameters are named once.
    """

    model_type: str
    config: dict[str, Any]
    names: dict[str, str]


class ModelRunner:
    """How the harness builds, trains, samples and folds one experiment's model.

    Set `Config` to a frozen dataclass and implement :meth:`build`. The defaults suit a model that maps ids
    (B, T) to hidden states (B, T, D), takes `cache=`, and has its output layer in `head`.
    """

    Config: ClassVar[type]
    training_only: ClassVar[tuple[str, ...]] = ()
    """Patterns (fnmatch) of parameters that serve training only: :meth:`fold` removes them."""

    def __init__(self, config: Any):
        self.config = config

    def build(self) -> nn.Module:
        """The model, on the CPU, without I/O. The harness then initialises each module by its name."""
        raise NotImplementedError

    def step(self, model: nn.Module, batch: Batch) -> StepOut:
        """One forward pass of a mini-batch, with its loss summed over the counted tokens."""
        return linear_cross_entropy(model(batch.ids), model.head, batch.targets)  # type: ignore[arg-type]

    def fixed_weights(self, model: nn.Module) -> AbstractContextManager[None]:
        """A context in which the harness changes no weight: around the mini-batches of one optimizer step, a
        validation, a text. A model that computes tensors from its weights alone makes them once in it, by
        :func:`computed_once`.
        """
        return nullcontext()

    def new_cache(self, model: nn.Module, batch_size: int, max_len: int) -> Any:
        """An empty decoding cache for `batch_size` sequences of up to `max_len` tokens."""
        c = self.config
        like = next(model.parameters())
        return KVCache(c.num_blocks, batch_size, c.num_heads, max_len, c.embed_dim // c.num_heads, like)

    def new_stream(self, model: nn.Module, batch_size: int, max_len: int) -> Stream | None:
        """An empty cache for endless texts of pieces, where the model has one; None: each token is a full pass."""
        return None

    def window(self) -> int | None:
        """How many positions the model can see while it decodes; None where what it keeps of a text never grows."""
        return self.config.max_len

    def logits(self, model: nn.Module, ids: Tensor, cache: Any = None) -> tuple[Tensor, Any]:
        """Logits (B, V) behind the last of ids (B, t), which follow what `cache` already holds."""
        hidden = model(ids, cache=cache)
        return model.head(hidden[:, -1]), cache  # type: ignore[operator]

    def param_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """Every parameter in exactly one group. Keys of a group:

        params: a list of parameters;
        role: "matrix" (weight decay; Muon's candidates), "embedding" (weight decay) or "vector" (none);
        rows: True where a step's gradient touches the looked-up rows only and comes as a sparse tensor;
        lr_scale: a factor on the learning rate, 1 by default.

        By default: tables and the output head are embeddings, other tensors of two and more dimensions
        matrices, the rest vectors.
        """
        tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
        head = getattr(model, "head", None)
        if isinstance(head, nn.Linear):
            tables.add(id(head.weight))
        rows = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding) and m.sparse}
        groups: dict[tuple[str, bool], list[nn.Parameter]] = {}
        for p in model.parameters():
            role = "embedding" if id(p) in tables else "matrix" if p.ndim >= 2 else "vector"
            groups.setdefault((role, id(p) in rows), []).append(p)
        return [{"params": ps, "role": role, "rows": sparse} for (role, sparse), ps in groups.items()]

    def adopt(self, model: nn.Module, tensors: dict[str, Tensor], say: Callable[[str], None]) -> set[str]:
        """Make something of a trained model's tensors that fit no parameter by name and shape.

        Returns the names that were used; `say` hears about the progress of long work.
        """
        return set()

    def notes(self, device: torch.device) -> list[str]:
        """What the user should know before training on the device: which of several implementations runs, say."""
        return []

    def to_hf(self, model: nn.Module) -> HfForm | None:
        """How the transformers library holds the folded model, where it has such a model; GPT-2's form needs none."""
        return None

    def fold(self, model: nn.Module) -> nn.Module:
        """The same function without the weights that served training only."""
        return model
