"""Find and load a trained model, for generation, export and warm starts."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from .. import model as probe
from ..adapt import Adaptation
from ..api import ModelRunner
from ..data.tokenizers import Tokenizer
from ..discover import Experiment
from ..errors import LmplayError, did_you_mean
from . import checkpoint
from .checkpoint import Checkpoint, verify
from .run_folder import RUN_FILE, RunFolder, find_runs


@dataclass(frozen=True)
class LoadedModel:
    """A model for use, with its tokenizer.

    Attributes:
        name: a run's folder, or the name of a pretrained model.
        folded: whether the model is folded.
    """

    name: str
    experiment: Experiment
    config: Any
    runner: ModelRunner
    model: nn.Module
    tokenizer: Tokenizer
    folded: bool

    @property
    def labels(self) -> tuple[str, ...]:
        """What the model tells instead of text; () for a language model."""
        adaptation = self.experiment.adaptation
        return () if adaptation is None else adaptation.labels

    def check_writes_text(self, what: str) -> None:
        """Raise LmplayError, which begins with `what`, if the model tells labels."""
        if self.labels:
            names = ", ".join(self.labels)
            raise LmplayError(
                f"{what}: this model tells labels ({names}) and writes no text; lmp_serve answers "
                "with them"
            )


@dataclass(frozen=True)
class Restored(LoadedModel):
    """A run's model from one of its checkpoints. `folded`: it was folded before it was saved."""

    run: RunFolder
    found: Checkpoint


def with_settings(restored: Restored, overrides: Mapping[str, str]) -> Restored:
    """Return the same weights in a model with other settings.

    Raises:
        LmplayError: a setting is unknown, does not fit the others, or needs other weights.
    """
    if not overrides:
        return restored
    try:
        config = dataclasses.replace(restored.config, **restored.experiment.parsed(overrides))
        runner = restored.experiment.runner(config)
        model = probe.build_model(runner, 0)
        model = runner.fold(model) if restored.folded else model
        model.load_state_dict(restored.model.state_dict())
    except (ValueError, TypeError, ArithmeticError, RuntimeError) as e:
        reason = str(e).strip().splitlines()[-1].strip()
        raise LmplayError(
            f"--set: the trained weights do not go with these settings: {reason}"
        ) from e
    return dataclasses.replace(restored, config=config, runner=runner, model=model)


def locate(
    model: Path | None, out: Path, say: Callable[[str], None], option: str
) -> tuple[RunFolder, Checkpoint]:
    """Return the run and the checkpoint of a path, or of the newest run below `out`.

    Args:
        model: a run's folder or a checkpoint's folder; None for the newest run.
        option: begins the message of an error, as the user wrote it.

    Raises:
        LmplayError: there is none, or it cannot be used.
    """
    if model is None:
        for run in reversed(find_runs(out)):
            found = run.newest(say)
            if found is not None:
                say(f"model: {run.path}")
                return run, found
        raise LmplayError(
            f"{out}: there is no run with a checkpoint; lmp_trainer makes one, {option} names one"
        )
    if model.is_file():
        kind = (
            "it is a pickle, which can run code when it is read: refused; "
            if is_pickle(model)
            else ""
        )
        raise LmplayError(
            f"{option} {model}: {kind}a run's folder or a checkpoint's folder is wanted"
        )
    if not model.is_dir():
        near = did_you_mean(
            model.name, (path.parent.name for path in model.parent.glob(f"*/{RUN_FILE}"))
        )
        raise LmplayError(f"{option} {model}: there is no such folder{near}")
    if (model / RUN_FILE).exists():
        run = RunFolder(model)
        found = run.newest(say)
        if found is None:
            raise LmplayError(
                f"{option} {model}: this run has no checkpoint yet (lmp_trainer --save-minutes)"
            )
        return run, found
    run = RunFolder(model.resolve().parent.parent)
    if not (run.path / RUN_FILE).exists():
        raise LmplayError(f"{option} {model}: this is neither a run nor a checkpoint of one")
    if not model.resolve().name.isdigit():
        raise LmplayError(
            f"{option} {model}: a checkpoint's folder has the number of its step for a name"
        )
    try:
        return run, verify(model.resolve())
    except LmplayError as e:
        raise LmplayError(f"{option} {model}: {e}") from e


def is_pickle(path: Path) -> bool:
    """Return whether a file begins like a pickle or like torch's archive of one."""
    with open(path, "rb") as file:
        head = file.read(4)
    return head.startswith((b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"))


def restore(run: RunFolder, found: Checkpoint, trust: bool = False) -> Restored:
    """Build the model from the run's copy of the source and load the checkpoint, on the CPU.

    Args:
        trust: execute the source also if it is from elsewhere.

    Raises:
        LmplayError: source, tokenizer and tensors do not fit together.
    """
    content = run.read()
    tokenizer = run.tokenizer()
    adaptation = Adaptation.of(content.get("plan") or {})
    experiment = dataclasses.replace(run.experiment(trust), adaptation=adaptation)
    try:
        config = experiment.config_type(**content["identity"]["config"])
    except (TypeError, ValueError) as e:
        raise LmplayError(f"{run.path / RUN_FILE}: its config does not fit: {e}") from e
    if config.vocab_size != tokenizer.vocab_size:
        raise LmplayError(
            f"{run.path}: the vocabulary does not match: the model has {config.vocab_size} tokens, "
            f"its tokenizer {tokenizer.vocab_size}"
        )
    runner = experiment.runner(config)
    model = probe.build_model(runner, 0)
    folded = bool(content.get("cleaned"))
    if folded:
        model = runner.fold(model)
    checkpoint.load_model_tensors(model, found.tensors("model"), found.path)
    name = str(run.path)
    return Restored(name, experiment, config, runner, model, tokenizer, folded, run, found)
