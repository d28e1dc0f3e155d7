"""Draw markets: the book over time, price paths, distributions, impact curves, divergence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no window, whatever the machine has

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from ..files import atomic_write
from .score import EVENT_TYPES, HORIZON, STATISTICS, SessionData, edges, values

COLOURS = {"real": "#222222", "generated": "#0072b2", "baseline": "#d55e00"}
MOST_MESSAGES = 20_000  # of a heat map
AROUND = 12  # ticks on each side of the touch, at least
Markets = dict[str, list[SessionData]]  # "real", "generated" and, where there is one, "baseline"


def _save(figure: Figure, path: Path) -> Path:
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)
    plt.close(figure)
    return path


def _seconds(tape: SessionData) -> np.ndarray:
    times = tape.messages["time"].to_numpy()
    return (times - times[0]) / 1e9


def book(markets: Markets, path: Path) -> Path:
    """Draw resting volume over time, ten levels per side, for one session of each market."""
    figure, axes = plt.subplots(
        len(markets), 1, figsize=(11, 3.3 * len(markets)), layout="constrained", squeeze=False
    )
    span = min(_seconds(tapes[0])[:MOST_MESSAGES][-1] for tapes in markets.values())
    span = min(span, 60.0)
    mesh = None
    for ax, (name, tapes) in zip(axes[:, 0], markets.items(), strict=True):
        mesh = _heat(ax, tapes[0], span) or mesh
        ax.set_title(
            f"{name}: the first {span:.0f} seconds of one session", loc="left", fontsize=10
        )
        ax.set_ylabel("price (ticks from the first mid)")
    axes[-1, 0].set_xlabel("seconds")
    if mesh is not None:
        figure.colorbar(
            mesh, ax=axes[:, 0], label="resting volume (lots), ten levels a side", shrink=0.8
        )
    return _save(figure, path)


def _heat(ax: Any, tape: SessionData, span: float) -> Any:
    seconds = _seconds(tape)
    columns = 500
    grid = np.linspace(0, span, columns)
    at = np.searchsorted(seconds, grid, side="right") - 1
    rows = tape.book[at]
    if not np.isfinite(tape.mid).any():
        return None
    first = np.floor(tape.mid[np.isfinite(tape.mid)][0])  # whole, so that levels fall on rows
    touch = rows[:, [0, 2]] - first
    if not np.isfinite(touch).any():
        return None
    low = np.floor(np.nanmin(touch)) - AROUND
    high = np.ceil(np.nanmax(touch)) + AROUND
    prices = np.arange(low, high + 1)
    volume = np.full((len(prices), columns), np.nan)
    for level in range(rows.shape[1] // 2):
        where = np.round(rows[:, 2 * level] - first - low)
        inside = np.isfinite(where) & (where >= 0) & (where < len(prices))
        volume[where[inside].astype(int), np.flatnonzero(inside)] = rows[inside, 2 * level + 1]
    mesh = ax.pcolormesh(
        grid,
        prices,
        volume,
        norm=LogNorm(1, 2000),
        cmap="viridis",
        shading="nearest",
        rasterized=True,
    )
    ax.plot(grid, touch[:, 0], color="#d62728", lw=1, label="best ask")
    ax.plot(grid, touch[:, 1], color="#1f77b4", lw=1, label="best bid")
    trades = tape.messages["type"].eq(4).to_numpy() & (seconds <= span)
    ax.plot(
        seconds[trades],
        tape.messages["price"].to_numpy()[trades] - first,
        ".",
        color="black",
        ms=4,
        label="trades",
    )
    ax.set_ylim(low, high)
    ax.legend(loc="upper right", fontsize=8, ncols=3)
    return mesh


def paths(markets: Markets, path: Path) -> Path:
    """Draw the mid prices of every session over time."""
    figure, ax = plt.subplots(figsize=(11, 4), layout="constrained")
    span = min(max(_seconds(tape)[-1] for tape in tapes) for tapes in markets.values())
    for name, tapes in markets.items():
        for i, tape in enumerate(tapes):
            seconds = _seconds(tape)
            kept = np.isfinite(tape.mid) & (seconds <= span)
            if not kept.any():
                continue
            moves = tape.mid[kept] - tape.mid[kept][0]
            label = f"{name} ({len(tapes)})" if i == 0 else None
            ax.step(
                seconds[kept],
                moves,
                where="post",
                color=COLOURS[name],
                lw=1.2,
                alpha=0.75,
                label=label,
            )
    ax.set_xlabel("seconds")
    ax.set_ylabel("mid price (ticks from its beginning)")
    ax.legend(fontsize=9)
    ax.grid(alpha=0.3)
    return _save(figure, path)


def distributions(markets: Markets, table: pd.DataFrame, path: Path) -> Path:
    """Draw the distribution of each statistic, with the generated market's L1 in the title."""
    columns = 3
    rows = -(-len(STATISTICS) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(11, 2.1 * rows), layout="constrained")
    for ax, (name, (statistic, discrete)) in zip(axes.flat, STATISTICS.items(), strict=False):
        found = {k: values(tapes, statistic) for k, tapes in markets.items()}
        real = found["real"]
        if len(real):
            low, high = np.percentile(real, (0.5, 99.5))
            borders = edges(real, real, discrete)
            borders = (
                borders[(borders >= low - 1) & (borders <= high + 1)]
                if discrete
                else np.linspace(low, high, 40)
            )
            shift = 0.5 if discrete else 0.0
            for k, v in found.items():
                if len(v) and len(borders) > 1:
                    weights = np.full(len(v), 1 / len(v))
                    histogram, _ = np.histogram(v, borders, weights=weights)
                    ax.stairs(
                        histogram,
                        borders - shift,
                        color=COLOURS[k],
                        lw=1.4,
                        fill=k == "real",
                        alpha=0.25 if k == "real" else 1.0,
                        label=k,
                    )
        ax.set_title(
            f"{name}  (L1 {table['l1'].get(name, float('nan')):.2f})", fontsize=9, loc="left"
        )
        ax.tick_params(labelsize=7)
    for ax in axes.flat[len(STATISTICS) :]:
        ax.axis("off")
    axes.flat[0].legend(fontsize=8)
    figure.supylabel("share of events", fontsize=9)
    return _save(figure, path)


def impact_curves(curves: dict[str, pd.DataFrame], path: Path) -> Path:
    """Draw mid-price moves after six kinds of events, by lag."""
    labels = {"MO": "market orders", "LO": "limit orders", "CA": "cancels"}
    figure, axes = plt.subplots(2, 3, figsize=(11, 5.5), layout="constrained", sharex=True)
    for ax, event in zip(axes.T.flat, EVENT_TYPES, strict=True):
        for name, curve in curves.items():
            ax.plot(curve.index, curve[event], color=COLOURS[name], lw=1.4, label=name)
        moves = "that move the mid" if event.endswith("1") else "that leave the mid"
        ax.set_title(f"{labels[event[:2]]} {moves}", fontsize=9, loc="left")
        ax.axhline(0, color="#999999", lw=0.6)
        ax.grid(alpha=0.3)
    axes[0, 0].legend(fontsize=8)
    figure.supxlabel("events later", fontsize=9)
    figure.supylabel("mid price, ticks in the event's direction", fontsize=9)
    return _save(figure, path)


def divergence_curves(found: dict[str, pd.DataFrame], path: Path) -> Path:
    """Draw L1 to the real market over the length of the simulation."""
    figure, axes = plt.subplots(1, 5, figsize=(13, 3), layout="constrained", sharey=True)
    if all(table.empty for table in found.values()):
        figure.suptitle(f"nothing to show: a generated market has fewer than {HORIZON} messages")
        return _save(figure, path)
    for name, table in found.items():
        for ax, column in zip(axes, [c for c in table.columns if c != "messages"], strict=False):
            ax.plot(table["messages"], table[column], color=COLOURS[name], lw=1.4, label=name)
            ax.set_title(column, fontsize=9, loc="left")
            ax.set_ylim(0, 1)
            ax.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    axes[0].set_ylabel("L1")
    figure.supxlabel("messages since the beginning", fontsize=9)
    return _save(figure, path)
