"""Check that an exported model computes what the trained one does, on real validation text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..api import IGNORE, ModelRunner
from ..data.packing import Arrays, ValidationSet
from ..data.prepare import prepare
from ..errors import LmplayError
from ..model import to_batch
from ..plan import parse_plan
from ..training.progress import Reporter
from ..training.restore import Restored
from .hf import Logits

TOLERANCE = 1e-4  # of the largest logit, and of the loss in nats; float32 rounding is far smaller


@dataclass(frozen=True)
class EvalResult:
    """A model on the validation text: mean loss in nats, and some logits (N, V) on the CPU."""

    loss: float
    logits: torch.Tensor

    def distance(self, other: EvalResult) -> float:
        """Return the largest difference of a logit, relative to the largest logit."""
        return float((self.logits - other.logits).abs().max() / self.logits.abs().max())


def validation_batches(restored: Restored, reporter: Reporter) -> list[Arrays]:
    """Return the validation set of the plan that the run was trained on.

    Raises:
        LmplayError: its text cannot be loaded, or has changed.
    """
    record = restored.run.read()
    plan = parse_plan(record["plan"], f"the plan in {restored.run.path}")
    prepared = prepare(plan, reporter.preparing)
    if prepared.fingerprint != record["identity"]["data"]:
        raise LmplayError(
            f"{restored.run.path}: the plan's data have changed since the run was trained: restore "
            "them, or train again with --fresh"
        )
    return list(ValidationSet(plan, prepared, restored.config.max_len).batches(8))


def one_by_one(batches: list[Arrays], count: int) -> list[Arrays]:
    """Return the first sequences as batches of one."""
    single = [
        Arrays(b.ids[i : i + 1], b.targets[i : i + 1]) for b in batches for i in range(len(b.ids))
    ]
    return single[:count]


def compared_lengths(length: int) -> list[int]:
    """Return the prefixes whose last logits are compared: quarters of the sequence."""
    return [max(1, length * quarter // 4) for quarter in (1, 2, 3, 4)]


def evaluate(
    runner: ModelRunner, model: nn.Module, batches: list[Arrays], device: torch.device
) -> EvalResult:
    """Evaluate a model through its runner, in float32."""
    loss = 0.0
    counted = 0
    logits = []
    with torch.no_grad(), runner.fixed_weights(model):
        for arrays in batches:
            batch = to_batch(arrays, slice(None), device)
            out = runner.step(model, batch)
            loss += float(out.loss_sum)
            counted += int(out.n_tokens)
            for t in compared_lengths(batch.ids.shape[1]):
                logits.append(runner.logits(model, batch.ids[:, :t])[0].cpu())
    return EvalResult(loss / max(1, counted), torch.cat(logits))


def evaluate_logits(model: Logits, batches: list[Arrays]) -> EvalResult:
    """Evaluate another library's model on the CPU."""
    loss = 0.0
    counted = 0
    logits = []
    with torch.no_grad():
        for arrays in batches:
            batch = to_batch(arrays, slice(None), torch.device("cpu"))
            out = model(batch.ids)
            flat = batch.targets.flatten()
            rows = out.flatten(0, 1)
            loss += float(F.cross_entropy(rows, flat, ignore_index=IGNORE, reduction="sum"))
            counted += int((flat != IGNORE).sum())
            logits += [out[:, t - 1] for t in compared_lengths(out.shape[1])]
    return EvalResult(loss / max(1, counted), torch.cat(logits))


def check_equal(
    name: str,
    before: EvalResult,
    after: EvalResult,
    loss_tolerance: float = TOLERANCE,
    logit_tolerance: float = TOLERANCE,
) -> str:
    """Return a line that says how close two forms of a model are.

    Raises:
        LmplayError: the difference is larger than rounding explains.
    """
    distance = before.distance(after)
    if not (distance <= logit_tolerance and abs(after.loss - before.loss) <= loss_tolerance):
        raise LmplayError(
            f"the {name} model differs from the trained one: val_loss {before.loss:.6f} -> "
            f"{after.loss:.6f}, largest difference of a logit {distance:.1e} (allowed: "
            f"{loss_tolerance:g} nats, {logit_tolerance:g}): nothing is written; the experiment's "
            "fold is wrong, and lmplay.testing.check_experiment tells more"
        )
    return (
        f"{name}: val_loss {before.loss:.6f} -> {after.loss:.6f}, "
        f"largest difference of a logit {distance:.1e}"
    )


def check_tokenizer(restored: Restored, theirs: Any, batches: list[Arrays]) -> None:
    """Check that the written tokenizer gives the same ids on the validation text.

    Raises:
        LmplayError: it does not.
    """
    tokenizer = restored.tokenizer
    for arrays in batches:
        for ids in arrays.ids:
            text = tokenizer.decode(int(i) for i in ids if i != tokenizer.eot)
            found = theirs(text, add_special_tokens=False, verbose=False)["input_ids"]
            if found != tokenizer.encode(text):
                raise LmplayError(
                    f"the written tokenizer splits {text[:40]!r}... differently: nothing is written"
                )
