"""Pictures of classifications: confusion matrices, and the losses of a stream's windows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd

from .compare import Comparison
from .figures import THEMES, save, settings
from .palette import COLORS

MOST_PANELS = 6
COLUMNS = 3
FOR_COUNTS = 15  # labels, up to which the cells hold their counts


def confusions(comparison: Comparison) -> dict[str, np.ndarray]:
    """Return the confusion matrix (C, C) of every setting, summed over its seeds."""
    found: dict[str, np.ndarray] = {}
    for curve in comparison.curves:
        if record := curve.run.get("classification"):
            counts = np.array(record["confusion"])
            found[curve.family] = found.get(curve.family, 0) + counts
    return found


def draw_confusions(path: Path, comparison: Comparison, theme: str) -> bool:
    """Draw the first settings' confusion matrices; return False if no run classifies.

    Raises:
        LmplayError: the file cannot be written.
    """
    found = confusions(comparison)
    if not found:
        return False
    record = next(c.run["classification"] for c in comparison.curves if "classification" in c.run)
    shown = dict(list(found.items())[:MOST_PANELS])
    matplotlib.use("Agg")
    with matplotlib.rc_context(settings(THEMES[theme])):
        _draw_matrices(path, comparison.plan, record["labels"], shown)
    return True


def _draw_matrices(
    path: Path, plan: str, labels: Sequence[str], found: Mapping[str, np.ndarray]
) -> None:
    from matplotlib import pyplot as plt

    wide = min(len(found), COLUMNS)
    high = -(-len(found) // COLUMNS)
    side = max(2.6, 0.42 * len(labels) + 1.2)
    figure, grid = plt.subplots(
        high,
        wide,
        figsize=(max(5.5, wide * (side + 0.8)), high * side + 0.9),
        dpi=120,
        squeeze=False,
        layout="constrained",
    )
    for ax in grid.flat[len(found) :]:
        ax.set_visible(False)
    for number, (ax, (name, counts)) in enumerate(zip(grid.flat, found.items(), strict=False)):
        shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
        ax.imshow(shares, cmap="Blues", vmin=0, vmax=1)
        for (row, column), count in np.ndenumerate(counts):
            if len(labels) <= FOR_COUNTS and count:
                color = "white" if shares[row, column] > 0.6 else "black"
                ax.text(column, row, f"{count}", ha="center", va="center", color=color, fontsize=8)
        right = np.trace(counts) / max(1, counts.sum())
        ax.set_title(f"{name}: {right:.1%} right", fontsize=10, loc="left")
        ax.set_xticks(range(len(labels)), labels, rotation=45, ha="right", fontsize=8)
        ax.set_yticks(range(len(labels)), labels if number % COLUMNS == 0 else [], fontsize=8)
        ax.grid(False)
    figure.supylabel("label", fontsize=10)
    figure.supxlabel("given by the model (color: share of the row)", fontsize=10)
    figure.suptitle(f"{plan}: which labels are taken for which", x=0.01, ha="left", fontsize=12)
    save(figure, path)


def draw_windows(path: Path, comparison: Comparison, theme: str) -> bool:
    """Draw the loss of every window of a stream before training on it, a line for each setting;
    return False if no run is on a stream.

    Raises:
        LmplayError: the file cannot be written.
    """
    found: dict[str, list[pd.Series]] = {}
    for curve in comparison.curves:
        file = curve.path.parent / "windows.csv"
        if file.exists():
            rows = pd.read_csv(file)
            tested = rows[(rows["held_out"] == 0) & (rows["window"] > 0)]
            loss = tested.set_index("window")["loss"]
            found.setdefault(curve.family, []).append(loss)
    if not found:
        return False
    matplotlib.use("Agg")
    with matplotlib.rc_context(settings(THEMES[theme])):
        _draw_lines(path, comparison.plan, found)
    return True


def _draw_lines(path: Path, plan: str, found: Mapping[str, Sequence[pd.Series]]) -> None:
    from matplotlib import pyplot as plt
    from matplotlib.ticker import MaxNLocator

    figure, ax = plt.subplots(figsize=(8, 4.5), dpi=120, layout="constrained")
    ranked = sorted(found.items(), key=lambda entry: float(pd.concat(entry[1]).mean()))
    for number, (name, runs) in enumerate(ranked):
        mean = pd.concat(runs, axis=1).mean(axis=1)
        color = COLORS[number % len(COLORS)]
        ax.plot(mean.index, mean, "o-", color=color, ms=4, label=f"{name}: {mean.mean():.3f}")
    ax.set_xlabel("window")
    ax.set_ylabel("loss before training on it (nats per label)")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.grid(True, lw=0.5)
    ax.legend(frameon=False, fontsize=9, title="setting: mean over the windows")
    figure.suptitle(f"{plan}: the loss of each window", x=0.01, ha="left", fontsize=12)
    save(figure, path)
