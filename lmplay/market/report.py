"""Score generated markets against a real one, and write tables, pictures and a page."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from ..files import atomic_write, write_text
from . import pictures, score


@dataclass(frozen=True)
class ScoreReport:
    """What was written, and the tables that a command prints.

    distances: with 99 % bootstrap intervals, as text. facts: stylized facts. impact: mean
    difference of the impact curves to the real ones, in ticks.
    """

    page: Path
    distances: pd.DataFrame
    facts: pd.DataFrame
    impact: pd.DataFrame


def write_scores(
    real: Path, generated: Path, baseline: Path | None, tick: int, folder: Path
) -> ScoreReport:
    """Compare folders of LOBSTER files and write the results to `folder`.

    Args:
        baseline: a third folder that is scored, too.
        tick: the price grid in 1/10000.

    Raises:
        LmplayError: a folder holds no LOBSTER files, or a pair of files does not fit together.
    """
    folders = {"real": real, "generated": generated}
    if baseline is not None:
        folders["baseline"] = baseline
    markets = {name: score.read(path, tick) for name, path in folders.items()}
    others = [name for name in markets if name != "real"]
    folder.mkdir(parents=True, exist_ok=True)
    tables = {name: score.compare(markets["real"], markets[name]) for name in others}
    distances = pd.concat(tables, axis=1)
    distances.columns = [f"{name} {column}" for name in others for column in tables[name].columns]
    write_csv(folder / "distances.csv", distances)
    facts = pd.DataFrame({name: score.facts(sessions) for name, sessions in markets.items()})
    write_csv(folder / "facts.csv", facts)
    curves = {name: score.impact(sessions) for name, sessions in markets.items()}
    write_csv(folder / "impact.csv", pd.concat(curves, axis=1))
    diverging = {name: score.divergence(markets["real"], markets[name]) for name in others}
    write_csv(folder / "divergence.csv", pd.concat(diverging, axis=1))
    shown = pd.DataFrame(
        {
            f"{name} {metric.upper()}": [_with_interval(row, metric) for _, row in table.iterrows()]
            for name, table in tables.items()
            for metric in ("l1", "w1")
        },
        index=tables[others[0]].index,
    )
    impact = pd.DataFrame({n: (curves[n] - curves["real"]).abs().mean() for n in others})
    write_csv(folder / "impact_distance.csv", impact)
    drawn = [
        pictures.book(markets, folder / "book.png"),
        pictures.paths(markets, folder / "paths.png"),
        pictures.distributions(markets, tables["generated"], folder / "distributions.png"),
        pictures.impact_curves(curves, folder / "impact.png"),
        pictures.divergence_curves(diverging, folder / "divergence.png"),
    ]
    page = folder / "index.html"
    _write_page(page, shown, facts, drawn)
    return ScoreReport(page, shown, facts, impact)


def write_csv(path: Path, table: pd.DataFrame) -> None:
    """Write a table atomically."""
    with atomic_write(path) as temporary:
        table.to_csv(temporary)


def _with_interval(row: pd.Series[float], metric: str) -> str:
    return f"{row[metric]:.3f} ({row[f'{metric}_low']:.3f}-{row[f'{metric}_high']:.3f})"


STYLE = (
    "body{font-family:sans-serif;max-width:70em;margin:auto;padding:1em}"
    "table{border-collapse:collapse;font-size:.85em}"
    "td,th{padding:.2em .6em;border-bottom:1px solid #ccc;text-align:right}"
    "img{max-width:100%}"
)


def _write_page(
    path: Path, distances: pd.DataFrame, facts: pd.DataFrame, drawn: list[Path]
) -> None:
    """Write tables and pictures as one page; the pictures are files next to it."""
    images = "\n".join(f'<p><img src="{p.name}" alt="{p.stem}"></p>' for p in drawn)
    page = (
        '<!doctype html><html lang="en"><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width">'
        f"<title>market scores</title><style>{STYLE}</style>"
        "<h1>Market scores</h1><h2>Distances to the real market</h2>"
        f"{distances.to_html()}<h2>Stylized facts</h2>"
        f"{facts.to_html(float_format='{:.4g}'.format)}{images}</html>"
    )
    write_text(path, page)
