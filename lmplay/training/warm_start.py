"""Start from a trained model's weights, and freeze parameters."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatch

import torch
from torch import Tensor, nn

from ..api import ModelRunner
from ..errors import LmplayError, did_you_mean
from .checkpoint import model_tensors
from .restore import Restored


@dataclass(frozen=True)
class InitialWeights:
    """Weights of a trained model, to start from.

    Attributes:
        name: in labels of runs.
        where: in messages.
        tensors: by the names of the experiment's model, or of another experiment's.
        fingerprint: a sha256.
        unused: names of tensors that have no place in the experiment's model.
    """

    name: str
    where: str
    tensors: dict[str, Tensor]
    fingerprint: str
    unused: tuple[str, ...] = ()

    @classmethod
    def of(cls, source: Restored) -> InitialWeights:
        """Return the weights of a run."""
        return cls(
            source.experiment.variant,
            f"{source.name}, step {source.found.step}",
            model_tensors(source.model),
            source.found.fingerprint,
        )

    def check_complete(self, model: nn.Module) -> None:
        """Check that there is a tensor for each of the model's, of its shape.

        Raises:
            LmplayError: one is missing.
        """
        for name, own in model_tensors(model).items():
            if name not in self.tensors or self.tensors[name].shape != own.shape:
                raise LmplayError(f"{self.where}: it has no {name} of the shape {(*own.shape,)}")

    @torch.no_grad()
    def copy_to(self, model: nn.Module) -> set[str]:
        """Copy the tensors with a name and shape of the model's; return their names."""
        own = model_tensors(model)
        fits = {n for n, t in self.tensors.items() if n in own and own[n].shape == t.shape}
        for name in fits:
            own[name].copy_(self.tensors[name])
        return fits


def check_tokenizer(source: Restored, fingerprint: str) -> None:
    """Check that a run's tokens mean the same texts as those of the tokenizer `fingerprint`.

    Raises:
        LmplayError: they do not.
    """
    if source.tokenizer.fingerprint != fingerprint:
        path = source.run.path.resolve()
        raise LmplayError(
            f"--initial-model {source.run.path}: it was trained with another tokenizer, and its "
            'tokens are other texts; a plan takes its tokenizer with "tokenizer": '
            f'{{"kind": "run", "path": "{path}"}}'
        )


def warm_start(
    runner: ModelRunner, model: nn.Module, source: InitialWeights, log: Callable[[str], None]
) -> None:
    """Copy a trained model's weights into the model, and log which were not used.

    Tensors with equal name and shape are copied. The runner may use the others
    (:meth:`ModelRunner.warm_start`).

    Raises:
        LmplayError: none of the weights fits.
    """
    own = model_tensors(model)
    tied = {n for n, _ in model.named_parameters(remove_duplicate=False)} - set(own)
    given = {name: t for name, t in source.tensors.items() if name not in tied}
    fits = source.copy_to(model)
    rest = {name: t for name, t in given.items() if name not in fits}
    versions = {name: t._version for name, t in own.items()}
    used = runner.warm_start(model, rest, log) if rest else set()
    written = {name for name, t in own.items() if t._version != versions[name]}
    if not fits and not used:
        raise LmplayError(f"--initial-model {source.where}: none of its weights fits this model")
    count = len(fits) + len(used)
    log(f"from {source.where}: {count} of {len(given) + len(source.unused)} tensors")
    lost = {*source.unused, *rest} - used
    for title, names in (("not loaded", lost), ("new here", set(own) - fits - written)):
        if names:
            more = f" and {len(names) - 8} more" if len(names) > 8 else ""
            log(f"{title}: {', '.join(sorted(names)[:8])}{more}")


def freeze(model: nn.Module, frozen: tuple[str, ...], train_only: tuple[str, ...]) -> list[str]:
    """Freeze the parameters that match a pattern of `frozen`, or none of `train_only`.

    Parameters that the experiment itself does not train stay frozen.

    Returns:
        The names of the parameters that were frozen here.

    Raises:
        LmplayError: a pattern matches no parameter, or no parameter is left to train.
    """
    names = [name for name, _ in model.named_parameters()]
    for option, patterns in (("--freeze", frozen), ("--train-only", train_only)):
        for pattern in patterns:
            if not any(fnmatch(name, pattern) for name in names):
                hint = did_you_mean(pattern, names)
                raise LmplayError(f"{option} {pattern}: no parameter has such a name{hint}")

    def trains(name: str) -> bool:
        chosen = not train_only or any(fnmatch(name, p) for p in train_only)
        return chosen and not any(fnmatch(name, p) for p in frozen)

    newly_frozen = [n for n, p in model.named_parameters() if p.requires_grad and not trains(n)]
    for name in newly_frozen:
        model.get_parameter(name).requires_grad_(False)
    if newly_frozen and not any(p.requires_grad for p in model.parameters()):
        raise LmplayError("--freeze, --train-only: nothing is left to train")
    return newly_frozen
