"""Drawing what compare.py computed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

from .compare import AXES, Curve, difference, series, smooth
from .errors import LmplayError

# Okabe & Ito's palette, told apart with every common colour blindness; reordered for contrast.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
DASHES = ("-", "--", "-.", ":")
THEMES = {
    "light": {"ground": "#ffffff", "text": "#222222", "grid": "#e3e3e3"},
    "dark": {"ground": "#16181d", "text": "#e6e6e6", "grid": "#33363d"},
}
LABELS = {
    "loss": "loss (nats per token)",
    "bpb": "bits per byte",
    "accuracy": "token accuracy",
    "tokens": "training tokens",
    "steps": "optimizer steps",
    "flops": "training FLOPs",
    "seconds": "training seconds",
}


@dataclass(frozen=True)
class Style:
    """How the figures of one call look; the same for all curves of a figure."""

    x: str = "tokens"
    average_count: int = 1
    min_show: float = 0.0  # left end of the x axis, as a share of the shortest run
    raw: bool = False  # faint unsmoothed curves behind the smoothed ones
    theme: str = "light"
    kind: str = "validation"


def colours(curves: Sequence[Curve], baseline: Curve | None) -> dict[str, tuple[str, str]]:
    """Colour and dash of each run: a colour a variant, a dash a seed; the baseline's variant is grey."""
    variants = list(dict.fromkeys(c.variant for c in curves if baseline is None or c.variant != baseline.variant))
    chosen = {v: COLOURS[i % len(COLOURS)] for i, v in enumerate(variants)}
    if baseline is not None:
        chosen[baseline.variant] = "#8a8a8a"
    seen: dict[str, int] = {}
    out = {}
    for c in curves:  # seeds, and variants beyond the palette, share a colour and differ in the dash
        colour = chosen[c.variant]
        out[str(c.path)] = (colour, DASHES[seen.get(colour, 0) % len(DASHES)])
        seen[colour] = seen.get(colour, 0) + 1
    return out


def draw(
    path: Path,
    curves: Sequence[Curve],
    metric: str,
    style: Style,
    baseline: Curve | None,
    partner: dict[Path, Curve] | None,
) -> bool:
    """Write one figure: the metric of every run, or with `partner` its difference to its partner.

    Returns whether there was anything to draw; a metric that no run has writes nothing.

    Raises:
        LmplayError: the file cannot be written, or its type is none that matplotlib writes.
    """
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import PercentFormatter

    diff = partner is not None
    lines = _lines(curves, metric, style, partner)
    if not lines:
        return False
    theme = THEMES[style.theme]
    settings: Any = {
        "axes.facecolor": theme["ground"], "figure.facecolor": theme["ground"],
        "savefig.facecolor": theme["ground"],
        "text.color": theme["text"], "axes.labelcolor": theme["text"], "axes.edgecolor": theme["grid"],
        "xtick.color": theme["text"], "ytick.color": theme["text"], "grid.color": theme["grid"],
        "font.size": 11, "axes.spines.top": False, "axes.spines.right": False,
    }  # fmt: skip
    with plt.rc_context(settings):
        legend_rows = -(-len(lines) // 3)
        fig, ax = plt.subplots(figsize=(10, 5.6 + 0.22 * legend_rows), dpi=120, layout="constrained")
        looks = colours(curves, baseline)
        for curve, x, y, faint in lines:
            colour, dash = looks[str(curve.path)]
            if faint is not None:
                ax.plot(x, faint, color=colour, alpha=0.25, lw=0.8)
            ax.plot(x, y, color=colour, ls=dash, lw=1.8, label=curve.name, marker="o" if len(x) == 1 else None)
        shortest = min(x[-1] for _, x, _, _ in lines)
        first = min((x[x > 0][0] for _, x, _, _ in lines if (x > 0).any()), default=1.0)
        ax.set_xscale("log")
        left = max(first, style.min_show * shortest)
        ax.set_xlim(left, max(x[-1] for _, x, _, _ in lines) * 1.02)
        _fit_y(ax, lines, left, diff, log=metric == "loss" and not diff)
        if metric == "accuracy":
            ax.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=None))
        if diff and baseline is not None:
            ax.axhline(0, color="#8a8a8a", lw=1.5)
            better = "lower" if metric != "accuracy" else "higher"
            paired = {c.path for c in (partner or {}).values()} != {baseline.path}
            to = f"{baseline.variant} of the same seed" if paired else baseline.name
            ax.set_ylabel(f"{LABELS[metric]}, difference to {to}\n({better} is better)")
        else:
            ax.set_ylabel(LABELS[metric])
        ax.set_xlabel(LABELS[style.x])
        ax.grid(True, which="major", lw=0.6)
        _label_ends(ax, lines, looks)
        window = (
            f"each point is the mean of the last {style.average_count}" if style.average_count > 1 else "not smoothed"
        )
        ax.set_title(f"{curves[0].plan}: {style.kind}, {window}", loc="left", fontsize=11)
        fig.legend(loc="outside lower left", ncols=3, frameon=False, fontsize=9)  # inside it would cover curves
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            fig.savefig(path)
        except (OSError, ValueError) as e:
            raise LmplayError(f"{path}: the figure could not be written: {e}") from e
        finally:
            plt.close(fig)
    return True


Line = tuple[Curve, np.ndarray, np.ndarray, np.ndarray | None]


def _lines(curves: Sequence[Curve], metric: str, style: Style, partner: dict[Path, Curve] | None) -> list[Line]:
    """x, smoothed y and, where wanted, raw y of each curve, or of its difference to its partner."""
    out: list[Line] = []
    for curve in curves:
        own = series(curve, style.x, metric)
        if own is None:
            continue
        x, raw = own
        smoothed = smooth(raw, style.average_count)
        if partner is not None:
            other = partner.get(curve.path)
            base = series(other, style.x, metric) if other is not None and other.path != curve.path else None
            if base is None:
                continue
            _, raw = difference(own, base)
            x, smoothed = difference((x, smoothed), (base[0], smooth(base[1], style.average_count)))
        if len(x):
            out.append((curve, x, smoothed, raw if style.raw and style.average_count > 1 else None))
    return out


def _fit_y(ax: Any, lines: Sequence[Line], left: float, diff: bool, log: bool) -> None:
    """The y range of what is shown; a difference keeps zero in sight and its first wild points out of it."""
    shown = np.concatenate([y[x >= left] for _, x, y, _ in lines])
    shown = shown[np.isfinite(shown)]
    if not len(shown):
        return
    low, high = float(shown.min()), float(shown.max())
    if diff:
        late = np.concatenate([y[len(y) // 3 :] for _, _, y, _ in lines])
        spread = max(1e-9, float(np.abs(late[np.isfinite(late)]).max(initial=0)))
        low, high = max(low, -3 * spread), min(high, 3 * spread)
        low, high = min(low, 0.0), max(high, 0.0)
    if log:
        ax.set_yscale("log")
        from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

        ax.yaxis.set_major_locator(LogLocator(subs=(1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0)))
        ax.yaxis.set_major_formatter(ScalarFormatter())
        ax.yaxis.set_minor_formatter(NullFormatter())
        ax.set_ylim(low / 1.03, high * 1.03)
    else:
        room = 0.06 * (high - low) or 0.01
        ax.set_ylim(low - room, high + room)


def _label_ends(ax: Any, lines: Sequence[Line], looks: dict[str, tuple[str, str]]) -> None:
    """Each curve's name and last value beside its end, kept apart where they would overlap."""
    transform = ax.transData
    height = ax.get_window_extent().height or 1.0
    ends = sorted(
        (
            (float(transform.transform((x[-1], y[-1]))[1]), curve, float(x[-1]), float(y[-1]))
            for curve, x, y, _ in lines
        ),
        key=lambda e: e[0],
    )
    below = -np.inf
    for at, curve, x, y in ends:
        place = max(at, below + 0.042 * height)
        below = place
        ax.annotate(
            f"{curve.name}  {y:+.4f}" if ax.get_ylim()[0] < 0 else f"{curve.name}  {y:.4f}",
            (x, y), xytext=(8, (place - at) * 72 / ax.figure.dpi), textcoords="offset points",
            color=looks[str(curve.path)][0], fontsize=9, va="center", annotation_clip=False,
        )  # fmt: skip


__all__ = ["AXES", "Style", "draw"]
