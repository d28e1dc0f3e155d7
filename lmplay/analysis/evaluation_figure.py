"""The picture of an evaluation: a row for each model, a panel for each metric."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib

from .figures import THEMES, save, settings
from .palette import COLORS

SHOWN = {  # metric: its panel's title
    "acc": "accuracy (more is better)",
    "acc_norm": "accuracy, by length (more is better)",
    "exact_match": "exact matches (more is better)",
    "bits_per_byte": "bits per byte of the correct answer (less is better)",
}
Metrics = Mapping[str, tuple[float, float | None]]


def draw_evaluation(path: Path, task: str, rows: Sequence[tuple[str, Metrics]]) -> bool:
    """Draw the models' metrics with 95 % intervals; return False if there is none to draw.

    Raises:
        LmplayError: the file cannot be written.
    """
    shown = [m for m in SHOWN if all(m in metrics for _, metrics in rows)]
    if not shown:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    with plt.rc_context(settings(THEMES["light"])):
        figure, axes = plt.subplots(
            1,
            len(shown),
            figsize=(3 + 3.4 * len(shown), 1.6 + 0.4 * len(rows)),
            dpi=120,
            squeeze=False,
            sharey=True,
            layout="constrained",
        )
        for ax, metric in zip(axes[0], shown, strict=True):
            for number, (_, metrics) in enumerate(rows):
                value, error = metrics[metric]
                margin = None if error is None else 1.96 * error
                color = COLORS[number % len(COLORS)]
                ax.errorbar(value, number, xerr=margin, fmt="o", color=color, capsize=3)
            ax.set_title(SHOWN[metric], fontsize=9, loc="left")
            ax.grid(True, axis="x", lw=0.5)
        axes[0][0].set_yticks(range(len(rows)), [Path(name).name for name, _ in rows])
        axes[0][0].set_ylim(len(rows) - 0.5, -0.5)
        figure.suptitle(f"{task}", x=0.01, ha="left", fontweight="bold")
        figure.supxlabel("bars: 95 % intervals over the items", x=0.01, ha="left", fontsize=8.5)
        save(figure, path)
    return True
