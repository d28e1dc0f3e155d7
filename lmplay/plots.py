"""Drawing what compare.py computed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

from .compare import Band, Curve, band, difference, families, null_band, series, smooth
from .errors import LmplayError
from .files import whole
from .lr_range import Range
from .palette import COLOURS, GREY, LABELS

DASHES = ("-", "--", "-.", ":")
MOST_BANDS = 6  # in a figure: the bands of more, each as wide as two seeds make it, hide one another and the curves
THEMES = {
    "light": {"ground": "#ffffff", "text": "#222222", "grid": "#e3e3e3"},
    "dark": {"ground": "#16181d", "text": "#e6e6e6", "grid": "#33363d"},
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


def looks_of(curves: Sequence[Curve], baseline: Curve | None) -> dict[str, tuple[str, str]]:
    """Colour and dash of each family of seeds; the baseline's is grey. Beyond the palette the dash differs."""
    groups = families(curves)
    grey = [name for name, seeds in groups.items() if baseline is not None and baseline in seeds]
    others = [name for name in groups if name not in grey]
    found = {n: (COLOURS[i % len(COLOURS)], DASHES[i // len(COLOURS) % len(DASHES)]) for i, n in enumerate(others)}
    return found | dict.fromkeys(grey, (GREY, DASHES[0]))


def draw(
    path: Path,
    curves: Sequence[Curve],
    metric: str,
    style: Style,
    baseline: Curve | None,
    partner: dict[Path, Curve] | None,
) -> bool:
    """Write one figure: the metric of every run, or with `partner` its difference to its partner.

    Seeds of one setting are faint lines behind their mean with Student's 95 % interval; one seed has no interval, and
    of more than MOST_BANDS settings none is drawn, as the title says. In a difference the grey band is what luck alone
    does: :func:`lmplay.compare.null_band`.

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
    with plt.rc_context(_settings(THEMES[style.theme])):
        groups = _groups(curves, lines)
        bands = sum(found is not None for _, found in groups.values())
        legend_rows = -(-(len(groups) + 1) // 2)
        fig, ax = plt.subplots(figsize=(10, 5.6 + 0.22 * legend_rows), dpi=120, layout="constrained")
        null = _null(curves, metric, style, baseline) if diff else None
        if null is not None:
            label = f"luck: two runs of {_family_of(curves, baseline)} with other seeds ({null.seeds} seeds)"
            ax.fill_between(null.x, -null.half, null.half, color=GREY, alpha=0.25, lw=0, label=label, zorder=0.5)
            for edge in (-null.half, null.half):
                ax.plot(null.x, edge, color=GREY, lw=1, ls=":")
        looks = looks_of(curves, baseline)
        ends = [_draw_family(ax, name, *groups[name], *looks[name], bands <= MOST_BANDS) for name in groups]
        shortest = min(x[-1] for _, x, _, _ in lines)
        first = min((x[x > 0][0] for _, x, _, _ in lines if (x > 0).any()), default=1.0)
        ax.set_xscale("log")
        left = max(first, style.min_show * shortest)
        ax.set_xlim(left, max(x[-1] for _, x, _, _ in lines) * 1.02)
        _fit_y(ax, lines, left, diff, log=metric == "loss" and not diff)
        if metric == "accuracy":
            ax.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=None))
        ax.set_ylabel(LABELS[metric])
        if partner is not None and baseline is not None:
            ax.axhline(0, color=GREY, lw=1.5)
            better = "lower" if metric != "accuracy" else "higher"
            paired = {c.path for c in partner.values()} != {baseline.path}
            to = f"{baseline.variant} of the same seed" if paired else baseline.name
            ax.set_ylabel(f"{LABELS[metric]}, difference to {to}\n({better} is better)")
        ax.set_xlabel(LABELS[style.x])
        ax.grid(True, which="major", lw=0.6)
        _label_ends(ax, ends)
        window = f"each point is the mean of the last {style.average_count}"
        what = [f"{curves[0].plan}: {style.kind}", window if style.average_count > 1 else "not smoothed"]
        if bands:
            many = f"without bands: more than {MOST_BANDS} settings"
            what.append(many if bands > MOST_BANDS else "bands of 95 % (Student's t)")
        ax.set_title(", ".join(what), loc="left", fontsize=11)
        fig.legend(loc="outside lower left", ncols=2, frameon=False, fontsize=9)  # inside it would cover curves
        _save(fig, path)
    return True


def _settings(theme: dict[str, str]) -> dict[Any, Any]:
    return {
        "axes.facecolor": theme["ground"], "figure.facecolor": theme["ground"],
        "savefig.facecolor": theme["ground"],
        "text.color": theme["text"], "axes.labelcolor": theme["text"], "axes.edgecolor": theme["grid"],
        "xtick.color": theme["text"], "ytick.color": theme["text"], "grid.color": theme["grid"],
        "font.size": 11, "axes.spines.top": False, "axes.spines.right": False,
    }  # fmt: skip


def _draw_family(
    ax: Any, name: str, seeds: Sequence[Line], found: Band | None, colour: str, dash: str, banded: bool
) -> End:
    """The seeds of one setting, their mean and, if `banded`, its band; without a band, the one that came farthest."""
    for _, x, y, faint in seeds:
        if faint is not None:
            ax.plot(x, faint, color=colour, alpha=0.25, lw=0.8)
        if found is not None:
            ax.plot(x, y, color=colour, alpha=0.45, lw=0.7)
        elif len(seeds) > 1:
            ax.plot(x, y, color=colour, ls=dash, lw=1)
    curve, x, y, _ = max(seeds, key=lambda line: line[1][-1])
    label = f"{curve.name} (single seed: no claim)"
    if len(seeds) > 1:
        label = f"{name} (1 of {len(seeds)} seeds came far enough: no claim)"
    if found is not None:
        of = f"{found.seeds} seeds" if found.seeds == len(seeds) else f"{found.seeds} of {len(seeds)} seeds"
        x, y, label = found.x, found.mean, f"{name} ({of})"
        if banded:
            ax.fill_between(x, y - found.half, y + found.half, color=colour, alpha=0.1, lw=0)
    ax.plot(x, y, color=colour, ls=dash, lw=1.8, label=label, marker="o" if len(x) == 1 else None)
    return name, colour, float(x[-1]), float(y[-1])


def _save(fig: Any, path: Path) -> None:
    """Write a figure and let go of it."""
    from matplotlib import pyplot as plt

    try:
        with whole(path) as temporary:
            fig.savefig(temporary)
    except (OSError, ValueError) as e:
        raise LmplayError(f"{path}: the figure could not be written: {e}") from e
    finally:
        plt.close(fig)


def draw_range(path: Path, found: Range, title: str) -> None:
    """The learning rate range test: the loss against the rate, with the two points that are read off it.

    Raises:
        LmplayError: the file cannot be written.
    """
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    fig, ax = plt.subplots(figsize=(8, 4.8), dpi=120, layout="constrained")
    ax.plot(found.rates, found.losses, color=GREY, lw=0.8, alpha=0.7, label="each step")
    ax.plot(found.rates, found.smoothed, color=COLOURS[0], lw=2, label="smoothed")
    for rate, name, colour in ((found.steepest, "steepest", COLOURS[1]), (found.safest, "safest", COLOURS[2])):
        if rate is None:
            continue
        ax.axvline(rate, color=colour, lw=1.5, ls="--", label=f"{name}: {rate:.2e}")
    low, high = float(found.smoothed.min()), float(found.smoothed[0])
    ax.set_ylim(low - 0.1 * (high - low), high + 0.4 * (high - low))  # what blew up would flatten the rest
    ax.set_xscale("log")
    ax.set_xlabel("learning rate")
    ax.set_ylabel(LABELS["loss"])
    ax.set_title(title, loc="left", fontsize=11)
    ax.grid(True, lw=0.5, color=THEMES["light"]["grid"])
    ax.legend(frameon=False)
    _save(fig, path)


Line = tuple[Curve, np.ndarray, np.ndarray, np.ndarray | None]
Group = tuple[list[Line], Band | None]
End = tuple[str, str, float, float]  # name, colour, x and y of a curve's last point


def _groups(curves: Sequence[Curve], lines: Sequence[Line]) -> dict[str, Group]:
    """The lines by family, and the band of those that have several seeds."""
    by_path = {line[0].path: line for line in lines}
    groups: dict[str, Group] = {}
    for name, seeds in families(curves).items():
        own = [by_path[c.path] for c in seeds if c.path in by_path]
        if own:
            groups[name] = own, band([(x, y) for _, x, y, _ in own])
    return groups


def _family_of(curves: Sequence[Curve], baseline: Curve | None) -> str:
    return next((name for name, seeds in families(curves).items() if baseline in seeds), "")


def _null(curves: Sequence[Curve], metric: str, style: Style, baseline: Curve | None) -> Band | None:
    """The band of luck, from the baseline's seeds."""
    own = families(curves).get(_family_of(curves, baseline), [])
    found = [series(c, style.x, metric) for c in own]
    return null_band([(x, smooth(y, style.average_count)) for x, y in (f for f in found if f is not None)])


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
        if len(x) and x[-1] > 0:  # the axis is logarithmic: a run that has only begun has nothing on it
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


def _label_ends(ax: Any, ends: Sequence[End]) -> None:
    """Name and last value beside the end of each curve, kept apart where they would overlap."""
    height = ax.get_window_extent().height or 1.0
    placed = sorted((float(ax.transData.transform((x, y))[1]), name, colour, x, y) for name, colour, x, y in ends)
    below = -np.inf
    signed = ax.get_ylim()[0] < 0
    for at, name, colour, x, y in placed:
        below = max(at, below + 0.042 * height)
        ax.annotate(
            f"{name}  {y:+.4f}" if signed else f"{name}  {y:.4f}",
            (x, y), xytext=(8, (below - at) * 72 / ax.figure.dpi), textcoords="offset points",
            color=colour, fontsize=9, va="center", annotation_clip=False,
        )  # fmt: skip
