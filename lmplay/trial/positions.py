"""The loss by position in the sequence: does a model use a long context?"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import torch

from ..api import IGNORE, Batch
from ..export.verification import validation_batches
from ..files import read_json, write_json
from ..model import to_batch
from ..training.progress import Reporter
from ..training.restore import locate, restore

FILE = "positions.json"


def edges_of(length: int) -> list[int]:
    """Return where bins of positions begin and end: 0, 16, 64, 256, ... and the length."""
    powers = itertools.takewhile(lambda x: x < length, (4**i for i in itertools.count(2)))
    return [0, *powers, length]


@torch.no_grad()
def loss_by_position(runner: Any, model: Any, batches: list[Any]) -> list[dict[str, float]]:
    """Return the mean loss of each bin of positions: from, to (excluded) and loss in nats.

    Args:
        batches: of a validation set, each (B, T). Bins without a counted token are left out.
    """
    edges = edges_of(max(b.ids.shape[1] for b in batches))
    rows = []
    device = next(model.parameters()).device
    for low, high in itertools.pairwise(edges):
        loss = 0.0
        count = 0
        for arrays in batches:
            batch = to_batch(arrays, slice(None), device)
            targets = torch.full_like(batch.targets, IGNORE)
            targets[:, low:high] = batch.targets[:, low:high]
            out = runner.step(model, Batch(batch.ids, targets))
            loss += float(out.loss_sum)
            count += int(out.n_tokens)
        if count:
            rows.append({"from": low, "to": high, "loss": loss / count})
    return rows


def losses_of_run(folder: Path) -> list[dict[str, float]]:
    """Return the loss by position of a finished run, which keeps it in positions.json.

    Raises:
        LmplayError: the run has no checkpoint, or its data have changed.
    """
    kept = folder / FILE
    try:
        return list(read_json(kept)["bins"])
    except (OSError, ValueError, KeyError):  # not there, or damaged: it is measured anew
        pass
    reporter = Reporter(brief=True)
    run, found = locate(folder, folder.parent, lambda text: None, "study:")
    restored = restore(run, found, False)
    model = restored.model.eval()
    with reporter, restored.runner.fixed_weights(model):
        bins = loss_by_position(restored.runner, model, validation_batches(restored, reporter))
    write_json(kept, {"bins": bins}, sealed=True)
    return bins
