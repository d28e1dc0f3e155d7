"""Starting from a trained run: weights by name where shapes agree, and what the experiment makes of the rest."""

from __future__ import annotations

from collections.abc import Callable
from fnmatch import fnmatch

import torch
from torch import nn

from . import checkpoint
from .api import ModelRunner
from .errors import LmplayError, nearest
from .restore import Restored


def check_tokenizer(source: Restored, fingerprint: str) -> None:
    """Refuse a run whose tokens are other texts than those of the tokenizer with this fingerprint.

    Raises:
        LmplayError: they are.
    """
    if source.tokenizer.fingerprint != fingerprint:
        where = source.run.path
        raise LmplayError(
            f"--initial-model {where}: it was trained with another tokenizer, and its tokens are other texts: "
            "take the plan it was trained on, or one with its tokenizer"
        )


def adopt(runner: ModelRunner, model: nn.Module, source: Restored, say: Callable[[str], None]) -> None:
    """Give the model what it can take of a trained one's weights, and say what was not taken.

    Raises:
        LmplayError: none of the run's weights fits.
    """
    where = source.run.path
    given = checkpoint.model_tensors(source.model)
    own = checkpoint.model_tensors(model)
    fits = {name for name, t in given.items() if name in own and own[name].shape == t.shape}
    with torch.no_grad():
        for name in fits:
            own[name].copy_(given[name])
    rest = {name: t for name, t in given.items() if name not in fits}
    versions = {name: t._version for name, t in own.items()}
    adopted = runner.adopt(model, rest, say) if rest else set()
    made = {name for name, t in own.items() if t._version != versions[name]}  # written by adopt
    if not fits and not adopted:
        raise LmplayError(f"--initial-model {where}: none of its weights fits this model")
    say(f"from {where}, step {source.found.step}: {len(fits) + len(adopted)} of {len(given)} tensors")
    for title, names in (
        ("not loaded", set(rest) - adopted),
        ("new here", set(own) - fits - made),
    ):
        if names:
            shown = ", ".join(sorted(names)[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
            say(f"{title}: {shown}")


def freeze(model: nn.Module, frozen: tuple[str, ...], train_only: tuple[str, ...]) -> list[str]:
    """Take parameters out of training: those that match a pattern of `frozen`, or none of `train_only`.

    What the experiment itself does not train stays so. Returns the names that were taken out.

    Raises:
        LmplayError: a pattern matches no parameter, or nothing is left to train.
    """
    names = [name for name, _ in model.named_parameters()]
    for option, patterns in (("--freeze", frozen), ("--train-only", train_only)):
        for pattern in patterns:
            if not any(fnmatch(name, pattern) for name in names):
                raise LmplayError(f"{option} {pattern}: no parameter has such a name{nearest(pattern, names)}")

    def stays(name: str) -> bool:
        chosen = not train_only or any(fnmatch(name, p) for p in train_only)
        return chosen and not any(fnmatch(name, p) for p in frozen)

    left_out = [name for name, p in model.named_parameters() if p.requires_grad and not stays(name)]
    for name in left_out:
        model.get_parameter(name).requires_grad_(False)
    if left_out and not any(p.requires_grad for p in model.parameters()):
        raise LmplayError("--freeze, --train-only: nothing is left to train")
    return left_out
