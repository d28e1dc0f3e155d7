"""The interface between the harness and an experiment: all that an experiment file may import.

An experiment is one file with a `Config`, the model, a `Runner` derived from :class:`ModelRunner`,
`BASELINE` and `VARIANTS`. The harness builds the model through the runner, hands it batches and
judges the result.

Letters in shapes: B batch, T sequence, t new positions when decoding with a cache (else T),
D embed_dim, V vocabulary, H heads, h head size, N tokens, L blocks.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from .ops import IGNORE
from .ops.attention import causal_attention
from .ops.cached_weights import cache_weights
from .ops.cross_entropy import OutputLayer, cross_entropy_sums
from .ops.dropout import dropout
from .ops.kv_cache import KVCache, Stream

if TYPE_CHECKING:
    from .training.optimizer_specs import OptimizerSpec

__all__ = [
    "IGNORE",
    "Batch",
    "HfForm",
    "KVCache",
    "ModelRunner",
    "OutputLayer",
    "OwnForm",
    "StepOut",
    "Stream",
    "cache_weights",
    "causal_attention",
    "dropout",
    "linear_cross_entropy",
]


@dataclass(frozen=True)
class Batch:
    """One mini-batch of sequences.

    ids: (B, T) int64, the inputs.
    targets: (B, T) int64, the next tokens; IGNORE where no loss is counted.
    """

    ids: Tensor
    targets: Tensor


@dataclass
class StepOut:
    """Result of one forward pass over a mini-batch.

    Counted tokens are those whose target is not IGNORE. lmplay divides the sums over them by the
    counted tokens of the optimizer step, so the mini-batch size does not change the gradient.

    loss_sum: () float32, nats, a sum over the counted tokens.
    n_tokens: () int64, the number of counted tokens.
    n_correct: () int64, how many of their targets have the largest logit.
    aux_loss: () is added to what is trained, not to the reported loss; a mean over sequences.
    log: extra curves, () each, means over sequences. They become columns of train.csv and figures.
        Names must be Python identifiers that are not columns already.
    """

    loss_sum: Tensor
    n_tokens: Tensor
    n_correct: Tensor
    aux_loss: Tensor | None = None
    log: dict[str, Tensor] = field(default_factory=dict)


def linear_cross_entropy(
    hidden: Tensor, head: OutputLayer, targets: Tensor, chunk: int | None = None
) -> StepOut:
    """Cross entropy of head(hidden) without the (B, T, V) logits.

    Args:
        hidden: (B, T, D).
        head: the output layer, D to V.
        targets: (B, T) int64; IGNORE where no loss is counted.
        chunk: positions whose logits are computed at once. Default: chosen by the vocabulary.
    """
    return StepOut(*cross_entropy_sums(hidden, head, targets, chunk))


@dataclass(frozen=True)
class HfForm:
    """What is needed to load the weights into a model of the transformers library.

    model_type, config: what transformers' AutoConfig takes.
    names: {transformers' name: our name} of tensors that are equal. If two names share a tensor,
        list one.
    tensors: {transformers' name: tensor} of those that had to be rearranged.
    """

    model_type: str
    config: dict[str, Any]
    names: dict[str, str] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class OwnForm:
    """A model of the transformers library as an experiment's.

    config: fields of the experiment's Config.
    tensors: {our name: tensor}.
    unused: transformers' names of tensors that have no place in the experiment's model.
    """

    config: dict[str, Any]
    tensors: dict[str, Tensor]
    unused: list[str] = field(default_factory=list)


class ModelRunner:
    """How the harness builds, trains, samples and folds an experiment's model.

    To fold a model is to remove the parameters that only training needs, with the same function.

    Set `Config` to a frozen dataclass and implement :meth:`build`. The other methods have defaults
    for a model that maps ids (B, T) to hidden states (B, T, D), takes `cache=` and has its output
    layer in `head`.
    """

    Config: ClassVar[type]
    training_only: ClassVar[tuple[str, ...]] = ()
    """Patterns (fnmatch) of parameters that only training needs. :meth:`fold` removes them."""
    hf_types: ClassVar[tuple[str, ...]] = ()
    """The model_types of the transformers library that :meth:`from_hf` can read."""

    def __init__(self, config: Any):
        self.config = config

    def build(self) -> nn.Module:
        """Return the model, on the CPU, without I/O.

        The harness then calls `reset_parameters` of each module with a seed of its own.
        """
        raise NotImplementedError

    def step(self, model: nn.Module, batch: Batch) -> StepOut:
        """Run one forward pass over a mini-batch and sum its loss over the counted tokens."""
        head: Any = model.head
        return linear_cross_entropy(model(batch.ids), head, batch.targets)

    def fixed_weights(self, model: nn.Module) -> AbstractContextManager[None]:
        """Return a context in which the harness updates no weight.

        That is for the mini-batches of one optimizer step, for a validation and for a generated
        text. A model that computes tensors from its weights alone can compute them once in it, with
        :func:`cache_weights`. (To freeze weights see `lmp_trainer --freeze`.)
        """
        return nullcontext()

    def new_cache(self, model: nn.Module, batch_size: int, max_len: int) -> Any:
        """Return an empty decoding cache for `batch_size` sequences of up to `max_len` tokens."""
        c = self.config
        like = next(model.parameters())
        head_dim = c.embed_dim // c.num_heads
        return KVCache(c.num_blocks, batch_size, c.num_heads, max_len, head_dim, like)

    def new_stream(self, model: nn.Module, batch_size: int, max_len: int) -> Stream | None:
        """Return an empty cache for generating beyond max_len, or None if the model has none.

        Without one, each token beyond max_len takes a full forward pass.
        """
        return None

    def window(self) -> int | None:
        """Return how many positions the model sees while it decodes.

        None: no limit, for recurrent models, whose state does not grow with the text.
        """
        return self.config.max_len

    def logits(self, model: nn.Module, ids: Tensor, cache: Any = None) -> tuple[Tensor, Any]:
        """Return the logits (B, V) after the last of ids (B, t), and the cache.

        The ids follow what `cache` already holds.
        """
        hidden = model(ids, cache=cache)
        head: Any = model.head
        return head(hidden[:, -1]), cache

    def param_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """Return parameter groups that hold every parameter exactly once. Keys of a group:

        params: a list of parameters.
        role: "matrix" (has weight decay, Muon can train it), "embedding" (has weight decay) or
            "vector" (no weight decay).
        rows: True if the gradient is sparse: it touches only the rows that were looked up.
        lr_scale: multiplies the learning rate. Default 1.

        The default makes embedding tables and the output head embeddings, other tensors with two or
        more dimensions matrices, and the rest vectors.
        """
        modules = [m for m in model.modules() if isinstance(m, nn.Embedding)]
        embeddings = {id(m.weight) for m in modules}
        head = getattr(model, "head", None)
        if isinstance(head, nn.Linear):
            embeddings.add(id(head.weight))
        sparse_tables = {id(m.weight) for m in modules if m.sparse}
        groups: dict[tuple[str, bool], list[nn.Parameter]] = {}
        for p in model.parameters():
            role = "embedding" if id(p) in embeddings else "matrix" if p.ndim >= 2 else "vector"
            groups.setdefault((role, id(p) in sparse_tables), []).append(p)
        return [
            {"params": params, "role": role, "rows": sparse}
            for (role, sparse), params in groups.items()
        ]

    def make_optimizer(
        self, groups: list[dict[str, Any]], recipe: OptimizerSpec
    ) -> torch.optim.Optimizer | None:
        """Return an optimizer of the experiment's own, or None for the plan's.

        It gets dense gradients, which are clipped already, and must keep its state in `state`, as
        torch's do: tensors, by parameter. If it has methods `eval` and `train`, as schedule-free
        ones do, they are called around a validation and a saving, so that both use the weights that
        `eval` puts in place.

        Args:
            groups: torch's parameter groups, with params, lr and weight_decay (0 for vectors). The
                schedule sets each group's lr to a multiple of its `base_lr`.
            recipe: the plan's optimizer: lr, weight_decay, betas, momentum, ...
        """
        return None

    def warm_start(
        self, model: nn.Module, tensors: dict[str, Tensor], log: Callable[[str], None]
    ) -> set[str]:
        """Convert weights of a trained model that fit no parameter by name and shape.

        The default ignores them.

        Args:
            log: prints a line of progress.

        Returns:
            The names of the tensors that were used.
        """
        return set()

    def notes(self, device: torch.device) -> list[str]:
        """Return what the user should know before training, such as which kernel runs."""
        return []

    def to_hf(self, model: nn.Module) -> HfForm | None:
        """Return the folded model as one of the transformers library's, or None.

        None: the harness asks the baseline's runner, which can export the model if its folded
        parameters are the baseline's by name and shape.
        """
        return None

    @classmethod
    def from_hf(cls, form: HfForm, max_len: int) -> OwnForm:
        """Return a model of the transformers library, of one of `hf_types`, as this experiment's.

        If a runner has no `hf_types`, the harness asks the baseline's, and loads those of its
        tensors that fit the experiment's model.

        Args:
            form: its model_type, its config as a dict, and all of its tensors; on the device
                "meta" if only the fields of the Config are wanted.
            max_len: the longest sequence it will see.

        Raises:
            ValueError: its config has a feature that this model lacks; the message names it.
            KeyError: a tensor is missing.
        """
        raise NotImplementedError

    def fold(self, model: nn.Module) -> nn.Module:
        """Return the same function without the parameters that only training needs."""
        return model


def __getattr__(name: str) -> Any:
    """Serve names of version 0.2, which the source copies in old runs import."""
    if name == "computed_once":  # kept its tensors in `model.held`
        return partial(cache_weights, attribute="held")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
