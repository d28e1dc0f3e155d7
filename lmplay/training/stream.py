"""A stage that is a stream: test on a window of time, train on it, go on to the next.

The score of a stream is its progressive loss: the mean over all examples, each tested before it was
trained on (Blum, Kalai and Langford 1999). The first window is left out, because nothing of the
stream was known yet. Backward transfer asks what later windows did to earlier ones: the mean over
the windows of the final loss on their held-out examples, less the loss just after training on them
(Lopez-Paz and Ranzato 2017, arXiv 1706.08840, with the sign of a loss: above 0 is forgetting).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ..data.packing import Arrays, stacked
from ..data.windows import Windows
from .curves import CurveFile, read_curve

WINDOWS = "windows.csv"
COLUMNS = ("window", "start", "trained", "held_out", "examples", "loss", "accuracy")
"""window: its number. start: seconds since 1970. trained: on how many windows the model was trained
when it was tested. held_out: 1 for the window's held-out examples, 0 for those it is trained on."""

Evaluate = Callable[[list[Arrays]], tuple[float, float, int]]
"""Returns the loss (a sum, nats), the correct predictions and the count of some sequences."""


class StreamLog:
    """windows.csv of a run: which windows the model was tested on, and when."""

    def __init__(self, path: Path):
        self.file = CurveFile(path / WINDOWS, COLUMNS)

    def rows(self) -> pd.DataFrame:
        """Return what was measured so far."""
        if not self.file.size:
            return pd.DataFrame(columns=list(COLUMNS))
        return read_curve(self.file.path)

    def test(
        self, windows: Windows, trained: int, evaluate: Evaluate, mini_batch: int
    ) -> tuple[float, float, int]:
        """Test the model where the training on `trained` windows has ended.

        Returns:
            Loss (a sum), correct predictions and count over the windows that were tested before
            they were trained on, without the first one unless it is the only one.
        """
        ends = trained == len(windows.windows)
        if trained:
            self._append(windows, trained - 1, trained, True, evaluate, mini_batch)
        if not ends:
            self._append(windows, trained, trained, False, evaluate, mini_batch)
        else:
            for number in range(len(windows.windows) - 1):
                self._append(windows, number, trained, True, evaluate, mini_batch)
        return progressive(self.rows())

    def _append(
        self,
        windows: Windows,
        number: int,
        trained: int,
        held_out: bool,
        evaluate: Evaluate,
        mini_batch: int,
    ) -> None:
        window = windows.windows[number]
        numbers = window.held_out if held_out else window.examples
        if not len(numbers):
            return
        examples = windows.held_out if held_out else windows.train
        pairs = [examples.sequence(int(n)) for n in numbers]
        batches = [
            stacked(pairs[start : start + mini_batch]) for start in range(0, len(pairs), mini_batch)
        ]
        loss, correct, count = evaluate(batches)
        self.file.append(
            {
                "window": number,
                "start": window.start,
                "trained": trained,
                "held_out": int(held_out),
                "examples": count,
                "loss": loss / count,
                "accuracy": correct / count,
            }
        )


def progressive(rows: pd.DataFrame) -> tuple[float, float, int]:
    """Return loss (a sum), correct predictions and count over the windows tested before training.

    Args:
        rows: of windows.csv.
    """
    tested = rows[rows["held_out"] == 0]
    tested = tested[tested["window"] > 0] if len(tested) > 1 else tested
    n = tested["examples"]
    return float((tested["loss"] * n).sum()), float((tested["accuracy"] * n).sum()), int(n.sum())


def backward_transfer(rows: pd.DataFrame) -> float:
    """Return the mean change of the loss on earlier windows' held-out examples, in nats; NaN if
    there are none."""
    held_out = rows[rows["held_out"] == 1]
    end = held_out["trained"].max()
    learned = held_out[held_out["trained"] == held_out["window"] + 1]
    final = held_out[(held_out["trained"] == end) & (held_out["window"] < end - 1)]
    both = learned.set_index("window")["loss"], final.set_index("window")["loss"]
    changes = (both[1] - both[0]).dropna()
    return float(changes.mean()) if len(changes) else math.nan


def sentence(rows: pd.DataFrame, windows: Windows, classes: int) -> str:
    """Return a finished stream's results in words."""
    tested = rows[(rows["held_out"] == 0) & (rows["window"] > 0)]
    labels = windows.train.records["label"]
    counted = 0.0
    for number in tested["window"].astype(int):
        shares = windows.label_frequencies(number, classes)
        counted -= float(np.log(shares[labels[windows.windows[number].examples]]).sum())
    loss, correct, count = progressive(rows)
    transfer = backward_transfer(rows)
    forgotten = (
        "no held-out examples for backward transfer"
        if math.isnan(transfer)
        else f"backward transfer {transfer:+.3f} (above 0: earlier windows were forgotten)"
    )
    return (
        f"{len(tested)} windows tested before training on them, {count} examples: loss "
        f"{loss / count:.3f} (the labels' frequencies in the windows before: "
        f"{counted / count:.3f}), accuracy {100 * correct / count:.1f} %; {forgotten}"
    )


def record_of(rows: pd.DataFrame) -> dict[str, Any]:
    """Return the figures of a finished stream for a run's summary."""
    transfer = backward_transfer(rows)
    known = {} if math.isnan(transfer) else {"backward_transfer": transfer}  # JSON has no NaN
    return {"windows": int((rows["held_out"] == 0).sum()), **known}
