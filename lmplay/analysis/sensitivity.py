"""The picture of a trial's tuning: how the loss of each arm depends on what was tuned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

from .figures import THEMES, save, settings
from .palette import COLORS

Point = tuple[float, float]

FAINT = 0.35  # of what was tried with a part of the budget


def panels(report: Mapping[str, Any]) -> dict[str, dict[str, list[tuple[float, list[Point]]]]]:
    """Return by knob and arm: (share of the budget, points (value, loss) in ascending order).

    Args:
        report: a trial's. Runs that diverged are left out.
    """
    found: dict[str, dict[str, list[tuple[float, list[Point]]]]] = {}
    for arm, tries in report["knobs"].items():
        for knob in sorted({key for values, _ in tries for key in values}):
            points = sorted((v[knob], x) for v, x in tries if knob in v and x is not None)
            found.setdefault(knob, {})[arm] = [(1.0, points)]
    if found:
        return found
    for arm, tries in report["sensitivity"].items():
        shares = sorted({share for share, _, _ in tries})
        curves = [
            (share, sorted((m, x) for s, m, x in tries if s == share and x is not None))
            for share in shares
        ]
        if curves:
            found.setdefault("learning rate, multiple of the plan's", {})[arm] = curves
    return found


def draw_sensitivity(path: Path, report: Mapping[str, Any]) -> bool:
    """Draw a panel for each knob; return False, without writing, if nothing was tuned.

    Raises:
        LmplayError: the file cannot be written.
    """
    shown = panels(report)
    if not shown:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import FuncFormatter, NullFormatter

    count = len(shown)
    with plt.rc_context(settings(THEMES["light"])):
        figure, axes = plt.subplots(
            1,
            count,
            figsize=(max(7, 4.6 * count), 4.4),
            dpi=120,
            squeeze=False,
            sharey=True,
            layout="constrained",
        )
        for ax, (knob, arms) in zip(axes[0], shown.items(), strict=True):
            for number, (arm, curves) in enumerate(arms.items()):
                color = COLORS[number % len(COLORS)]
                _draw_arm(ax, arm, color, curves, joined=not report["knobs"])
            ax.set_xscale("log", base=2 if "multiple" in knob else 10)
            # Names are not math in our figures, so matplotlib's powers would be shown as code.
            ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            ax.xaxis.set_minor_formatter(NullFormatter())
            ax.set_xlabel(knob)
            ax.grid(True, lw=0.5)
        axes[0][0].set_ylabel("loss at the end, nats per token")
        axes[0][-1].legend(frameon=False)
        design = report["design"]
        title = f"What was tuned for {', '.join(design['arms'])} on {design['plan']}"
        figure.suptitle(title, x=0.01, ha="left", fontweight="bold")
        note = "star: what was chosen; faint: with a part of the budget"
        figure.supxlabel(note, x=0.01, ha="left", fontsize=8.5)
        save(figure, path)
    return True


def _draw_arm(
    ax: Any, arm: str, color: str, curves: Sequence[tuple[float, list[Point]]], joined: bool
) -> None:
    last = max(share for share, _ in curves)
    for share, points in curves:
        if not points:
            continue
        x, y = zip(*points, strict=True)
        is_full = share == last
        style = "o-" if joined else "o"
        label = arm if is_full else None
        ax.plot(x, y, style, color=color, ms=5, alpha=1 if is_full else FAINT, label=label)
        if is_full:
            best = min(points, key=lambda p: p[1])
            ax.plot(*best, "*", color=color, ms=14)
