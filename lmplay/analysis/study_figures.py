"""The pictures of a study: a heat map of a grid of two settings, and optuna's plots of more."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

from .figures import THEMES, save, settings
from .palette import COLORS

Cells = Sequence[Mapping[str, Any]]
FEW = 2  # finished cells without which there is nothing to see
LENGTH = "sequence length"


def draw_study(folder: Path, report: Mapping[str, Any]) -> list[Path]:
    """Draw what a study found so far; return the files.

    Raises:
        LmplayError: a file cannot be written.
    """
    matplotlib.use("Agg")
    parts = [part for part in report["parts"] if len(part["cells"]) >= FEW]
    written: list[Path] = []
    with matplotlib.rc_context(settings(THEMES["light"])):
        for plan, score in dict.fromkeys((part["plan"], part["score"]) for part in parts):
            rows = [
                {**_axes(part, cell), "score": cell[score]}
                for part in parts
                if part["plan"] == plan and (part["search"] == "grid" or len(part["space"]) == 1)
                for cell in part["cells"]
            ]
            axes = _varied(rows)
            path = folder / f"{plan}-{score}.png"
            if len(axes) == 2:
                _draw_map(path, _table(rows, *axes), axes, score, f"{plan}: {_of(score)}")
                written.append(path)
            elif len(axes) == 1:
                _draw_line(path, rows, axes[0], score, f"{plan}: {_of(score)}")
                written.append(path)
        for part in parts:
            if "by_position" in part["cells"][0]:
                written += _draw_positions(folder, part)
    # Optuna writes powers as math, and places labels outside of the figure.
    plain: dict[Any, Any] = {"text.parse_math": True, "savefig.bbox": "tight", "savefig.dpi": 120}
    with matplotlib.rc_context(plain), warnings.catch_warnings():
        for part in parts:
            written += _draw_optuna(folder, part)
    return written


def _axes(part: Mapping[str, Any], cell: Mapping[str, Any]) -> dict[str, str]:
    """Return what a cell has of each axis, as text."""
    experiment = cell["arm"]
    for key, value in cell["settings"].items():
        experiment = experiment.replace(f"-{key}={value}", "")
    axes = {**cell["settings"], "experiment": experiment}
    return axes | ({LENGTH: str(part["length"])} if part["length"] else {})


def _varied(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the axes with more than one value, those of settings first."""
    keys = dict.fromkeys(key for row in rows for key in row if key != "score")
    return [key for key in keys if len({row.get(key) for row in rows}) > 1]


def _ordered(values: Sequence[str]) -> list[str]:
    """Return distinct values, numbers by size."""
    distinct = list(dict.fromkeys(values))
    try:
        return sorted(distinct, key=float)
    except ValueError:
        return distinct


def _of(score: str) -> str:
    return "accuracy" if score == "accuracy" else "loss, nats per token"


def _table(
    rows: Sequence[Mapping[str, Any]], y: str, x: str
) -> tuple[list[str], list[str], np.ndarray]:
    """Return the values of both axes, and the scores (y, x); nan where a cell is missing."""
    ys = _ordered([row[y] for row in rows])
    xs = _ordered([row[x] for row in rows])
    scores = np.full((len(ys), len(xs)), math.nan)
    for row in rows:
        if row["score"] is not None:
            scores[ys.index(row[y]), xs.index(row[x])] = row["score"]
    return ys, xs, scores


def _draw_map(
    path: Path,
    table: tuple[list[str], list[str], np.ndarray],
    axes: Sequence[str],
    score: str,
    title: str,
) -> None:
    """Draw a heat map. Losses are colored by their distance to the best of their column, because
    columns are often arenas of their own."""
    from matplotlib import pyplot as plt

    ys, xs, scores = table
    shades = scores if score == "accuracy" else scores - np.nanmin(scores, axis=0)
    size = (2.6 + 1.15 * len(xs), 1.7 + 0.5 * len(ys))
    figure, ax = plt.subplots(figsize=(max(6, size[0]), size[1]), dpi=120, layout="constrained")
    colors = "viridis" if score == "accuracy" else "viridis_r"
    image = ax.imshow(shades, aspect="auto", cmap=colors)
    middle = (np.nanmin(shades) + np.nanmax(shades)) / 2
    for (row, column), value in np.ndenumerate(scores):
        if math.isnan(value):
            continue
        is_light = (shades[row, column] > middle) == (score == "accuracy")
        shown = f"{value:.0%}" if score == "accuracy" else f"{value:.3f}"
        color = "black" if is_light else "white"
        ax.text(column, row, shown, ha="center", va="center", color=color, fontsize=9)
    ax.set_xticks(range(len(xs)), xs)
    ax.set_yticks(range(len(ys)), ys)
    ax.set_ylabel(axes[0])
    ax.set_xlabel(axes[1])
    ax.grid(False)
    label = "accuracy" if score == "accuracy" else "above the column's best"
    figure.colorbar(image, ax=ax, label=label)
    figure.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold")
    save(figure, path)


def _draw_line(
    path: Path, rows: Sequence[Mapping[str, Any]], key: str, score: str, title: str
) -> None:
    """Draw the score against one setting, whose values are equally far from each other."""
    from matplotlib import pyplot as plt

    xs = _ordered([row[key] for row in rows])
    points = sorted((xs.index(r[key]), r["score"]) for r in rows if r["score"] is not None)
    size = (max(6, 2.5 + 0.9 * len(xs)), 4)
    figure, ax = plt.subplots(figsize=size, dpi=120, layout="constrained")
    ax.plot(*zip(*points, strict=True), "o-", color=COLORS[0])
    ax.set_xticks(range(len(xs)), xs, rotation=20 if max(map(len, xs)) > 12 else 0)
    ax.set_xlabel(key)
    ax.set_ylabel(_of(score))
    ax.grid(True, lw=0.5)
    figure.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold")
    save(figure, path)


def _draw_positions(folder: Path, part: Mapping[str, Any]) -> list[Path]:
    """Draw the loss by position: a row for each cell."""
    name = part["plan"] + (f"-{part['length']}" if part["length"] else "")
    rows = [
        {
            "cell": ", ".join(f"{k} {v}" for k, v in cell["settings"].items()) or cell["arm"],
            "position": f"{row['from']}-{row['to'] - 1}",
            "score": row["loss"],
        }
        for cell in sorted(part["cells"], key=lambda c: _sort_key(c["settings"]))
        for row in cell["by_position"]
    ]
    path = folder / f"{name}-by-position.png"
    title = f"{part['plan']}: loss by position in sequences"
    title += f" of {part['length']}" if part["length"] else ""
    _draw_map(path, _table(rows, "cell", "position"), ("", "positions"), "loss", title)
    return [path]


def _sort_key(values: Mapping[str, str]) -> tuple[tuple[float, str], ...]:
    """Order cells by the numbers in their settings."""
    keys = []
    for value in values.values():
        try:
            keys.append((float(value), ""))
        except ValueError:
            keys.append((0.0, value))
    return tuple(keys)


def _draw_optuna(folder: Path, part: Mapping[str, Any]) -> list[Path]:
    """Draw optuna's plots of a search of two settings or more: parallel coordinates, slices, and
    how important each setting is (PED-ANOVA, Watanabe et al. 2023)."""
    if part["search"] == "grid" or len(part["space"]) < 2:
        return []
    import optuna
    from matplotlib import pyplot as plt
    from optuna.visualization import matplotlib as plots

    from ..trial.study_plan import distribution_of, value_of

    study = optuna.create_study()
    distributions = {key: distribution_of(value) for key, value in part["space"].items()}
    for cell in sorted(part["cells"], key=lambda c: c["number"]):
        if cell["loss"] is None:
            continue
        study.add_trial(
            optuna.trial.create_trial(
                params={k: value_of(cell["settings"][k], d) for k, d in distributions.items()},
                distributions=distributions,
                value=cell["loss"],
            )
        )
    written = []
    warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
    evaluator = optuna.importance.PedAnovaImportanceEvaluator()
    drawn = {
        "parallel": lambda: plots.plot_parallel_coordinate(study, target_name="loss"),
        "slice": lambda: plots.plot_slice(study, target_name="loss"),
        "importance": lambda: plots.plot_param_importances(
            study, evaluator=evaluator, target_name="loss"
        ),
    }
    for name, draw in drawn.items():
        draw()
        path = folder / f"{part['plan']}-{name}.png"
        plt.gcf().set_size_inches(max(8, 4 * len(part["space"])), 4.6)
        for ax in plt.gcf().axes if name == "slice" else ():
            ax.tick_params(axis="x", which="both", rotation=60)
        save(plt.gcf(), path)
        written.append(path)
    return written
