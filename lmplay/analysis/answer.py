"""The figure that answers: one row per idea, its gain with an interval, and what an arena resolves.

A gain is the baseline's final loss minus the idea's, in nats per token: right of 0 is better.
Verdicts come from trials; runs without a trial are drawn hollow, and claim nothing.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

from ..trial.certificate import Certificate
from .compare import Comparison
from .figures import THEMES, TITLE_WIDTH, save, settings
from .page.gather import TrialReport
from .palette import COLORS, GREY

INTERVALS = (
    "trials: 99 % (bootstrap over pairs); runs without a trial: 95 % (Student's t over seeds)"
)


@dataclass(frozen=True)
class Row:
    """One idea. low, high: ends of the gain's interval, None if unknown. word: a trial's verdict,
    or ""."""

    name: str
    gain: float
    low: float | None
    high: float | None
    count: str
    word: str


def rows_of_trials(trials: Sequence[TrialReport]) -> list[Row]:
    """Return a row for each arm of trials that has a gain, under its context if there is one."""
    found = []
    for trial in trials:
        for name, arm in trial.arms.items():
            if arm.gain is None:
                continue
            shown = f"{name}, {trial.design.context}" if trial.design.context else name
            shown += "" if arm.tuned else " (untuned)"
            found.append(Row(shown, arm.gain, arm.low, arm.high, f"{arm.pairs} pairs", arm.word))
    return found


def rows_of_runs(comparison: Comparison) -> list[Row]:
    """Return a row for each setting of single runs, next to the baseline's of the same seed."""
    rows = []
    for row in comparison.settings(comparison.table()).to_dict("records"):
        difference = row["loss_difference"]
        if not math.isfinite(difference):
            continue
        half = row["loss_difference_interval"]
        known = math.isfinite(half)
        seeds = f"{row['seeds']} seed{'s' * (row['seeds'] > 1)}"
        low, high = (-difference - half, -difference + half) if known else (None, None)
        rows.append(Row(row["run"], -difference, low, high, seeds, ""))
    return rows


def draw_answer(
    path: Path,
    plan: str,
    baseline: str,
    rows: Sequence[Row],
    certificate: Certificate | None,
    theme: str = "light",
) -> None:
    """Write the figure. The best idea is on top.

    Raises:
        LmplayError: the file cannot be written, or matplotlib does not know its type.
    """
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    ranked = sorted(rows, key=lambda r: r.gain)
    with plt.rc_context(settings(THEMES[theme])):
        figure, ax = plt.subplots(
            figsize=(10, 2.1 + 0.34 * len(ranked)), dpi=120, layout="constrained"
        )
        ax.axvline(0, color=GREY, lw=1.5)
        bands = (certificate.smallest_gain, certificate.smallest_gain_unlike) if certificate else ()
        for half in bands:
            if half is not None:
                ax.axvspan(-half, half, color=GREY, alpha=0.15, lw=0)
        for place, row in enumerate(ranked):
            if row.low is not None and row.high is not None:
                ax.plot([row.low, row.high], [place, place], color=COLORS[0])
            ax.plot(row.gain, place, "o", color=COLORS[0], mfc=COLORS[0] if row.word else "none")
        _fit(ax, ranked)
        ax.set_yticks(range(len(ranked)), [_label(row) for row in ranked])
        ax.set_ylim(-0.7, len(ranked) - 0.3)
        ax.set_xlabel(f"gain over {baseline}, nats per token (right is better)")
        ax.grid(True, axis="x", lw=0.6)
        title = "\n".join(textwrap.wrap(_title(plan, baseline, ranked), TITLE_WIDTH - 10))
        figure.suptitle(title, x=0.01, ha="left", fontsize=12.5, fontweight="bold")
        figure.supxlabel(_caption(certificate), x=0.01, ha="left", fontsize=8.5)
        save(figure, path)


def _label(row: Row) -> str:
    return f"{row.name}: {row.word or 'no verdict'} ({row.count})"


def _title(plan: str, baseline: str, ranked: Sequence[Row]) -> str:
    best = ranked[-1]
    if len(ranked) == 1:
        return f"{best.name} against {baseline} on {plan}: {best.gain:+.4f} nats per token"
    better = sum(row.word == "REAL" for row in ranked)
    judged = sum(bool(row.word) for row in ranked)
    verdicts = f"{better} of {judged} verdicts REAL" if judged else "no verdicts"
    return f"{len(ranked)} ideas against {baseline} on {plan}: {verdicts}, best {best.name}"


def _caption(certificate: Certificate | None) -> str:
    lines = [f"Intervals: {INTERVALS}; hollow: no verdict."]
    if certificate is None:
        lines.append("Uncertified arena: lmp_arena measures the smallest gain it can resolve.")
    elif certificate.smallest_gain is not None:
        unlike = certificate.smallest_gain_unlike
        lines.append(
            "Grey: gains that nine pairs may miss here: dark, between models that are like "
            f"each other ({certificate.smallest_gain:.4f} nats)"
            + (f"; light, between unlike ones ({unlike:.3f})" if unlike else "")
            + f". Certified {certificate.date}."
        )
    return "\n".join(lines)


def _fit(ax: Any, rows: Sequence[Row]) -> None:
    """Fit the x axis to dots, 0 and intervals; an extreme interval, or a band, may leave it."""
    gains = [*(row.gain for row in rows), 0.0]
    spread = max(gains) - min(gains) or 0.01
    ends = [end for row in rows for end in (row.low, row.high) if end is not None]
    low = max(min([*gains, *ends]), min(gains) - spread)
    high = min(max([*gains, *ends]), max(gains) + spread)
    ax.set_xlim(low - 0.05 * spread, high + 0.05 * spread)
