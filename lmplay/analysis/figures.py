"""Draw what :mod:`lmplay.analysis.compare` computes.

One module, because all figures share their style, their colors and their titles.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib
import numpy as np

from ..errors import LmplayError
from ..files import atomic_write
from .compare import (
    Band,
    Comparison,
    RunCurve,
    band,
    count_tables,
    difference,
    families,
    null_band,
    series,
    smooth,
)
from .palette import COLORS, GREY, LABELS, UNITS

if TYPE_CHECKING:
    from ..training.lr_finder import Range

MAX_CURVES = len(COLORS)  # settings in a figure of curves; more are drawn as dots
MAX_BANDS = len(COLORS)  # more bands hide one another and the curves
MAX_FAINT = 3  # settings whose single seeds are drawn; with more, mean and band say enough
MAX_POINTS = 400  # of a curve in a figure, which is about as wide in pixels
TITLE_WIDTH = 100  # characters
NEAR = 1.1  # a count table is drawn if its loss is at most as many times another's
MAX_MARKED = 60  # points that get a marker each
DASHES = ("-", "--", "-.", ":")  # only if more curves than colors are requested
THEMES = {
    "light": {"ground": "#ffffff", "text": "#222222", "grid": "#e3e3e3"},
    "dark": {"ground": "#16181d", "text": "#e6e6e6", "grid": "#33363d"},
}


@dataclass(frozen=True)
class Style:
    """How the figures of one call look; the same for all curves.

    x: the x axis, a key of X_COLUMNS.
    average_count: points that are averaged, causally.
    min_show: left end of the x axis, as a share of the shortest run.
    raw: draw faint unsmoothed curves, too.
    kind: "validation" or "training".
    form: "curves", "dots", or "auto": dots for more than MAX_CURVES settings.
    """

    x: str = "tokens"
    average_count: int = 1
    min_show: float = 0.0
    raw: bool = False
    theme: str = "light"
    kind: str = "validation"
    form: str = "auto"


@dataclass(frozen=True)
class Line:
    """One run in a figure: x and smoothed y (n,), and raw y if it is drawn."""

    curve: RunCurve
    x: np.ndarray
    y: np.ndarray
    raw: np.ndarray | None


@dataclass(frozen=True)
class Group:
    """The seeds of one setting, and their mean with its interval if there are several."""

    name: str
    lines: list[Line]
    band: Band | None

    @property
    def end(self) -> float:
        """Last value of the mean, or of the longest run."""
        return float(self.band.mean[-1]) if self.band is not None else float(self.longest.y[-1])

    @property
    def half(self) -> float | None:
        """Half of the last interval's width; None for a single seed."""
        return float(self.band.half[-1]) if self.band is not None else None

    @property
    def longest(self) -> Line:
        return max(self.lines, key=lambda line: line.x[-1])

    @property
    def seeds(self) -> str:
        """How many seeds the last value stands for."""
        count = self.band.seeds if self.band is not None else 1
        of = f" of {len(self.lines)}" if count < len(self.lines) else ""
        return f"{count}{of} seed{'s' if count > 1 or of else ''}"


@dataclass(frozen=True)
class Content:
    """What one figure shows: a metric of each run, or its difference to the baseline's."""

    comparison: Comparison
    metric: str
    style: Style
    diff: bool
    groups: list[Group]
    null: Band | None

    @property
    def base_name(self) -> str:
        baseline = self.comparison.baseline
        return baseline.variant if baseline is not None else ""

    def tables(self, low: float, high: float) -> dict[str, float]:
        """Return the losses of count tables by name, of those near the losses from low to high."""
        if self.diff or self.metric != "loss":
            return {}
        losses = count_tables(self.comparison.curves)
        return {k: v for k, v in losses.items() if low / NEAR < v < high * NEAR}


def draw(path: Path, comparison: Comparison, metric: str, style: Style, diff: bool) -> bool:
    """Write one figure; return False, without writing, if no run has the metric.

    Seeds of one setting are faint lines behind their mean, with Student's 95 % interval as a band.
    In a difference, the grey band is what luck alone does (:func:`compare.null_band`). Many
    settings are drawn as dots: final values with intervals.

    Args:
        diff: draw the difference to the baseline's run of the same seed.

    Raises:
        LmplayError: the file cannot be written, or matplotlib does not know its type.
    """
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    groups = _groups(comparison, metric, style, diff)
    if not groups:
        return False
    null = _null(comparison, metric, style) if diff else None
    content = Content(comparison, metric, style, diff, groups, null)
    dots = style.form == "dots" or (style.form == "auto" and len(groups) > MAX_CURVES)
    with plt.rc_context(settings(THEMES[style.theme])):
        figure = _draw_dots(content) if dots else _draw_curves(content)
        # matplotlib's own wrapping reads $ as math whatever its settings say.
        lines = "\n".join(textwrap.wrap(title(content), TITLE_WIDTH))
        figure.suptitle(lines, x=0.01, ha="left", fontsize=12.5, fontweight="bold")
        save(figure, path)
    return True


def title(content: Content) -> str:
    """Return the question that the figure answers, and the answer."""
    comparison = content.comparison
    unit = UNITS.get(content.metric, content.metric)
    higher_is_better = content.metric == "accuracy"
    if not content.diff and content.metric not in UNITS:
        names = ", ".join(group.name for group in content.groups[:3])
        return f"{content.metric} of {names} on {comparison.plan}"
    ranked = sorted(content.groups, key=lambda g: g.end, reverse=higher_is_better)
    best = ranked[0]
    count = len(ranked)
    if not content.diff:
        value = f"{best.end:.4f} {unit}, {best.seeds}"
        if count == 1:
            return f"{best.name} on {comparison.plan}: {value}"
        return f"{best.name} ends best of {count} on {comparison.plan}: {value}"
    value = f"{best.end:+.3g} {unit}, {best.seeds}, {_claim(best)}"
    if count == 1:
        return f"{best.name} vs {content.base_name} on {comparison.plan}: {value}"
    return f"Best of {count} vs {content.base_name} on {comparison.plan}: {best.name}, {value}"


def _claim(group: Group) -> str:
    """Return what the seeds allow to say about a difference. Verdicts come from trials."""
    if group.half is None:
        return "no claim"
    return f"± {group.half:.2g} (95 %)"


def _draw_curves(content: Content) -> Any:
    """Draw each run over x, with the seeds' mean and interval."""
    from matplotlib import pyplot as plt
    from matplotlib.ticker import PercentFormatter

    style = content.style
    metric = content.metric
    figure, ax = plt.subplots(figsize=(10, 6), dpi=120, layout="constrained")
    several = sum(group.band is not None for group in content.groups)
    banded = several <= MAX_BANDS
    faint = several <= MAX_FAINT
    if content.null is not None:
        half = content.null.half
        x, low, high = thinned(content.null.x, -half, half)
        ax.fill_between(x, low, high, color=GREY, alpha=0.22, lw=0, zorder=0.5)
    looks = looks_of(content.groups, content.comparison.baseline)
    for group in content.groups:
        _draw_group(ax, group, *looks[group.name], banded, faint)
    lines = [line for group in content.groups for line in group.lines]
    shortest = min(line.x[-1] for line in lines)
    positive = [line.x[line.x > 0][0] for line in lines if (line.x > 0).any()]
    left = max(min(positive, default=1.0), style.min_show * shortest)
    _log_x(ax, left, max(line.x[-1] for line in lines))
    _fit_y(ax, content, left, banded)
    if metric == "accuracy":
        ax.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=None))
    label = LABELS.get(metric, metric)
    if content.diff:
        ax.axhline(0, color=GREY, lw=1.5)
        better = "higher" if metric == "accuracy" else "lower"
        label = f"{label}\nminus {content.base_name}'s ({better} is better)"
    ax.set_ylabel(label)
    ax.set_xlabel(LABELS[style.x])
    ax.grid(True, which="major", lw=0.6)
    bottom, top = ax.get_ylim()
    for name, loss in content.tables(bottom, top).items():
        if not bottom < loss < top:
            continue
        ax.axhline(loss, color=GREY, lw=0.9, ls=(0, (6, 3)), zorder=1)
        ax.annotate(
            f"{name} table  {loss:.2f}",
            (0.01, loss),
            xycoords=("axes fraction", "data"),
            xytext=(0, 2),
            textcoords="offset points",
            color=GREY,
            fontsize=8,
        )
    _label_ends(ax, content.groups, looks)
    figure.supxlabel(_caption(content, banded), x=0.01, ha="left", fontsize=8.5)
    return figure


def thinned(x: np.ndarray, *ys: np.ndarray) -> list[np.ndarray]:
    """Return x and each y (n,) without points that a figure cannot show, evenly on a log axis.

    The first and last points stay.
    """
    if len(x) <= MAX_POINTS:
        return [x, *ys]
    start = max(float(x[x > 0][0]), float(x[-1]) * 1e-9) if (x > 0).any() else 1.0
    wanted = np.geomspace(start, float(x[-1]), MAX_POINTS)
    keep = np.unique([0, *np.searchsorted(x, wanted).clip(max=len(x) - 1), len(x) - 1])
    return [x[keep], *(y[keep] for y in ys)]


def _draw_group(ax: Any, group: Group, color: str, dash: str, banded: bool, faint: bool) -> None:
    """Draw the seeds of one setting (if `faint`), and their mean with its band, or the longest
    run."""
    for line in group.lines:
        if line.raw is not None:
            ax.plot(*thinned(line.x, line.raw), color=color, alpha=0.25, lw=0.8)
        if group.band is not None and faint:
            ax.plot(*thinned(line.x, line.y), color=color, alpha=0.4, lw=0.7)
        elif group.band is None and len(group.lines) > 1:
            ax.plot(*thinned(line.x, line.y), color=color, ls=dash, lw=1)
    x = group.longest.x
    y = group.longest.y
    if group.band is not None:
        x = group.band.x
        y = group.band.mean
        if banded:
            half = group.band.half
            places, low, high = thinned(x, y - half, y + half)
            ax.fill_between(places, low, high, color=color, alpha=0.12, lw=0)
    is_short = len(x) <= MAX_MARKED
    ax.plot(*thinned(x, y), color=color, ls=dash, lw=1.8, marker="o" if is_short else None, ms=3.5)


def _draw_dots(content: Content) -> Any:
    """Draw the final value of each setting as a dot with its interval, the best on top."""
    from matplotlib import pyplot as plt

    higher_is_better = content.metric == "accuracy"
    ranked = sorted(content.groups, key=lambda g: g.end, reverse=not higher_is_better)
    figure, ax = plt.subplots(figsize=(10, 1.8 + 0.32 * len(ranked)), dpi=120, layout="constrained")
    if content.diff:
        ax.axvline(0, color=GREY, lw=1.5)
        if content.null is not None:
            half = float(content.null.half[-1])
            ax.axvspan(-half, half, color=GREY, alpha=0.22, lw=0)
    for row, group in enumerate(ranked):
        if group.half is not None:
            ax.plot([group.end - group.half, group.end + group.half], [row, row], color=COLORS[0])
        single = group.half is None
        face = "none" if single else COLORS[0]
        ax.plot(group.end, row, "o", color=COLORS[0], mfc=face, ms=6)
    _fit_dots(ax, ranked)
    ax.set_yticks(range(len(ranked)), [f"{g.name} ({g.seeds})" for g in ranked])
    ax.set_ylim(-0.7, len(ranked) - 0.3)
    label = LABELS.get(content.metric, content.metric)
    if content.diff:
        better = "higher" if higher_is_better else "lower"
        label += f" minus {content.base_name}'s at the end ({better} is better)"
    ax.set_xlabel(label)
    ax.grid(True, axis="x", lw=0.6)
    figure.supxlabel(_caption(content, banded=True), x=0.01, ha="left", fontsize=8.5)
    return figure


def _fit_dots(ax: Any, groups: Sequence[Group]) -> None:
    """Fit the x axis to dots and intervals; an extreme interval may leave it."""
    ends = np.array([g.end for g in groups])
    spread = float(np.ptp(ends)) or abs(float(ends[0])) * 0.01 or 0.01
    reach = [min(g.half or 0.0, spread) for g in groups]
    low = min(e - r for e, r in zip(ends, reach, strict=True))
    high = max(e + r for e, r in zip(ends, reach, strict=True))
    ax.set_xlim(low - 0.05 * spread, high + 0.05 * spread)


def _caption(content: Content, banded: bool) -> str:
    """Return what bands, faint lines and smoothing mean."""
    style = content.style
    parts = [f"{content.comparison.plan}, {style.kind}"]
    if style.average_count > 1:
        parts.append(f"each point is the mean of the last {style.average_count}")
    if any(group.band is not None for group in content.groups):
        several = "95 % interval of the mean over seeds (Student's t)"
        parts.append(several if banded else f"no bands for more than {MAX_BANDS} settings")
    single = [group.name for group in content.groups if group.half is None]
    if single:
        parts.append(f"single seed, no claim: {', '.join(single[:4])}" + " ..." * (len(single) > 4))
    if content.null is not None:
        parts.append(
            f"grey: 95 % of the differences between two runs of {content.base_name} with other "
            f"seeds ({content.null.seeds} seeds)"
        )
    lines = [""]
    for part in parts:
        if len(lines[-1]) + len(part) > 150:
            lines.append("")
        lines[-1] += ("; " if lines[-1] else "") + part
    return "\n".join(lines)


def looks_of(groups: Sequence[Group], baseline: RunCurve | None) -> dict[str, tuple[str, str]]:
    """Return color and dash of each setting. The baseline is grey; the others differ in color."""
    looks: dict[str, tuple[str, str]] = {}
    number = 0
    for group in groups:
        if baseline is not None and any(line.curve == baseline for line in group.lines):
            looks[group.name] = (GREY, DASHES[0])
            continue
        dash = DASHES[number // len(COLORS) % len(DASHES)]
        looks[group.name] = (COLORS[number % len(COLORS)], dash)
        number += 1
    return looks


def settings(theme: dict[str, str]) -> dict[Any, Any]:
    """Return matplotlib's settings for a theme."""
    return {
        "axes.facecolor": theme["ground"],
        "figure.facecolor": theme["ground"],
        "savefig.facecolor": theme["ground"],
        "text.color": theme["text"],
        "axes.labelcolor": theme["text"],
        "axes.edgecolor": theme["grid"],
        "xtick.color": theme["text"],
        "ytick.color": theme["text"],
        "grid.color": theme["grid"],
        "font.size": 11,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "text.parse_math": False,  # names may contain $
    }


def save(figure: Any, path: Path) -> None:
    """Write a figure and free its memory."""
    from matplotlib import pyplot as plt

    try:
        with atomic_write(path) as temporary:
            figure.savefig(temporary)
    except (OSError, ValueError) as e:
        raise LmplayError(f"{path}: the figure could not be written: {e}") from e
    finally:
        plt.close(figure)


def draw_range(path: Path, found: Range, name: str) -> None:
    """Draw a learning rate range test: the loss over the rate, and the two rates read off it.

    Raises:
        LmplayError: the file cannot be written.
    """
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    with plt.rc_context(settings(THEMES["light"])):
        figure, ax = plt.subplots(figsize=(8, 4.8), dpi=120, layout="constrained")
        ax.plot(found.rates, found.losses, color=GREY, lw=0.8, alpha=0.7, label="each step")
        ax.plot(found.rates, found.smoothed, color=COLORS[0], lw=2, label="smoothed")
        marks = [("steepest", found.steepest_lr, COLORS[1])]
        if found.suggested_lr is not None:
            marks.append(("suggested", found.suggested_lr, COLORS[2]))
        for label, rate, color in marks:
            ax.axvline(rate, color=color, lw=1.5, ls="--", label=f"{label}: {rate:.2e}")
        low = float(found.smoothed.min())
        high = float(found.smoothed[0])
        # The diverged end would flatten the rest.
        ax.set_ylim(low - 0.1 * (high - low), high + 0.4 * (high - low))
        ax.set_xscale("log")
        ax.set_xlabel("learning rate")
        ax.set_ylabel(LABELS["loss"])
        answer = "unknown, the loss still fell at the highest"
        if found.suggested_lr is not None:
            answer = f"{found.suggested_lr:.2e}"
        ax.set_title(f"Which learning rate for {name}? {answer}", loc="left", fontsize=11)
        ax.grid(True, lw=0.5)
        ax.legend(frameon=False)
        save(figure, path)


def _groups(comparison: Comparison, metric: str, style: Style, diff: bool) -> list[Group]:
    """Return what the figure draws, by setting."""
    groups = []
    for name, seeds in families(comparison.curves).items():
        lines = [
            line for c in seeds if (line := _line(comparison, c, metric, style, diff)) is not None
        ]
        if lines:
            groups.append(Group(name, lines, band([(line.x, line.y) for line in lines])))
    return groups


def _line(
    comparison: Comparison, curve: RunCurve, metric: str, style: Style, diff: bool
) -> Line | None:
    """Return one run's line; None if it has nothing to draw on a logarithmic axis."""
    own = series(curve, style.x, metric)
    if own is None:
        return None
    x, raw = own
    smoothed = smooth(raw, style.average_count)
    if diff:
        other = comparison.partner.get(curve.path)
        if other is None or other.path == curve.path:
            return None
        base = series(other, style.x, metric)
        if base is None:
            return None
        _, raw = difference(own, base)
        smoothed_base = (base[0], smooth(base[1], style.average_count))
        x, smoothed = difference((x, smoothed), smoothed_base)
    if not len(x) or x[-1] <= 0:
        return None
    return Line(curve, x, smoothed, raw if style.raw and style.average_count > 1 else None)


def _null(comparison: Comparison, metric: str, style: Style) -> Band | None:
    """Return what luck does, from the baseline's seeds."""
    baseline = comparison.baseline
    for seeds in families(comparison.curves).values():
        if baseline in seeds:
            found = [series(c, style.x, metric) for c in seeds]
            curves = [f for f in found if f is not None]
            return null_band([(x, smooth(y, style.average_count)) for x, y in curves])
    return None


def _fit_y(ax: Any, content: Content, left: float, banded: bool) -> None:
    """Fit the y axis to what is visible: curves and bands. A difference keeps 0 in sight.

    The first points of a difference's single runs may be wild and may leave the figure; a mean and
    its band do not.
    """
    lines = [line for group in content.groups for line in group.lines]
    visible = [line.y[line.x >= left] for line in lines]
    bands = [np.zeros(1)]
    if banded:
        for group in content.groups:
            if group.band is not None:
                inside = group.band.x >= left
                mean = group.band.mean[inside]
                half = group.band.half[inside]
                bands += [mean - half, mean + half]
    visible += [] if content.diff else bands[1:]
    values = np.concatenate(visible)
    values = values[np.isfinite(values)]
    if not len(values):
        return
    low = float(values.min())
    high = float(values.max())
    if content.diff:
        late = np.concatenate([line.y[len(line.y) // 3 :] for line in lines])
        spread = max(1e-9, float(np.abs(late[np.isfinite(late)]).max(initial=0)))
        around = np.concatenate(bands)
        around = around[np.isfinite(around)]
        low = min(max(low, -3 * spread), float(around.min()))
        high = max(min(high, 3 * spread), float(around.max()))
    elif content.metric == "loss" and low > 0:
        shown = [low, high, *content.tables(low, high).values()]
        _log_y(ax, min(shown) / 1.03, max(shown) * 1.03)
        return
    room = 0.06 * (high - low) or 0.01
    ax.set_ylim(low - room, high + room)


def _log_y(ax: Any, low: float, high: float) -> None:
    """Make the y axis logarithmic with plain numbers, at least three of them."""
    from matplotlib.ticker import FixedLocator, NullFormatter, NullLocator, ScalarFormatter

    ax.set_yscale("log")
    ax.set_ylim(low, high)
    for step in (5, 2, 1, 0.5, 0.2, 0.1, 0.05, 0.02, 0.01):
        ticks = np.arange(math.ceil(low / step), math.floor(high / step) + 1) * step
        if len(ticks) >= 3:
            break
    ax.yaxis.set_major_locator(FixedLocator([round(float(t), 6) for t in ticks]))
    ax.yaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_major_formatter(ScalarFormatter())
    ax.yaxis.set_minor_formatter(NullFormatter())


def _log_x(ax: Any, low: float, high: float) -> None:
    """Make the x axis logarithmic, with round ticks such as 6k, 10k, 20k that do not collide."""
    from matplotlib.ticker import EngFormatter, FixedLocator, NullLocator

    if high <= low * 1.001:  # one point
        low, high = low / 1.5, high * 1.5
    ax.set_xscale("log")
    room = (high / low) ** 0.01
    ax.set_xlim(low if room > 1.01 else low / room, high * room)
    ax.xaxis.set_major_locator(FixedLocator(round_ticks(low, high)))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(EngFormatter(sep=""))


def round_ticks(low: float, high: float) -> list[float]:
    """Return four to nine round numbers in [low, high], or all powers of ten if these are many."""
    first = math.floor(math.log10(low))
    decades = [10.0**n for n in range(first, math.ceil(math.log10(high)) + 1)]
    ticks: list[float] = []
    for digits in ((1,), (1, 3), (1, 2, 5), (1, 2, 3, 4, 6, 8), tuple(n / 2 for n in range(2, 20))):
        ticks = [d * m for d in decades for m in digits if low <= d * m * 1.0001 <= high * 1.0002]
        if len(ticks) >= 4:
            break
    return ticks[:: math.ceil(len(ticks) / 9)]


def _label_ends(ax: Any, groups: Sequence[Group], looks: dict[str, tuple[str, str]]) -> None:
    """Write name and last value at the end of each curve, moved apart where they would overlap."""
    height = ax.get_window_extent().height or 1.0
    signed = ax.get_ylim()[0] < 0
    # Figures of one comparison may have other seeds: a difference needs a partner for each.
    counts = {group.band.seeds if group.band is not None else 1 for group in groups}
    ends = []
    for group in groups:
        x = group.band.x if group.band is not None else group.longest.x
        ends.append((float(ax.transData.transform((x[-1], group.end))[1]), group, float(x[-1])))
    below: float = -math.inf
    for at, group, end in sorted(ends, key=lambda e: e[0]):
        below = max(at, below + 0.042 * float(height))
        value = f"{group.end:+.4f}" if signed else f"{group.end:.4f}"
        value += f" ({group.seeds})" if len(counts) > 1 else ""
        ax.annotate(
            f"{group.name}  {value}",
            (end, group.end),
            xytext=(8, (below - at) * 72 / ax.figure.dpi),
            textcoords="offset points",
            color=looks[group.name][0],
            fontsize=9,
            va="center",
            annotation_clip=False,
        )
