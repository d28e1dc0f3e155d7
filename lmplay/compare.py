"""Reading, aligning and differencing runs: numbers only. It neither draws nor imports torch.

Differences are taken on a common grid, by interpolation, inside the range that both curves cover; smoothing
is causal and the same for every curve of a figure.
"""

from __future__ import annotations

import io
import json
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from .errors import LmplayError, nearest

AXES = {"tokens": "tokens", "steps": "step", "flops": "flops", "seconds": "seconds"}  # --x to column
METRICS = ("loss", "bpb", "accuracy")
ANCESTOR_SUFFIXES = {"train": "_train_stats.csv", "validate": "_validate_stats.csv"}
BASELINE = "gpt2ish"
GRID = 400  # points of a common grid
COVERAGE = 0.95  # of the bands
TRIALS = "trial-"  # how the folders of a trial's runs begin, each of whose pairs reads its data in another order
TRIAL_FOLDER = re.compile(TRIALS + r".+-[0-9a-f]{6}(-cuda|-mps)?(-timed)?(-lr[\d.e+-]+)?")


@dataclass(frozen=True)
class Curve:
    """One run's curve of one kind. `plan` groups what may be compared."""

    name: str
    plan: str
    fingerprint: str  # of the plan: the same name may stand for two contents
    variant: str
    path: Path
    frame: pd.DataFrame
    run: dict[str, Any] = field(default_factory=dict)

    @property
    def seed(self) -> int | None:
        return self.run.get("identity", {}).get("seed")

    @property
    def precision(self) -> str | None:
        return self.run.get("identity", {}).get("precision")

    @property
    def arena(self) -> tuple[str, str]:
        return self.plan, self.fingerprint

    @property
    def family(self) -> str:
        """What the seeds of one setting share: the run's name without its seed."""
        return re.sub(r"-s-?\d+$", "", self.name)


def read_curve(path: Path) -> pd.DataFrame:
    """A curve file as it was written; a last line that a kill cut short is left out.

    Raises:
        LmplayError: it is empty or no CSV.
    """
    try:
        text = path.read_text(encoding="utf-8")
        whole = text[: text.rfind("\n") + 1]
        frame = pd.read_csv(io.StringIO(whole))
    except (OSError, ValueError, pd.errors.ParserError) as e:
        raise LmplayError(f"{path}: this curve cannot be read: {e}") from e
    if frame.empty:
        raise LmplayError(f"{path}: this curve has no rows yet")
    return frame


def collect(
    folders: Sequence[Path], kind: str, max_files: int, read: Callable[[Path], Curve] | None = None
) -> tuple[list[Curve], list[str]]:
    """The curves of every run below the folders, ours and the ancestor's `*_stats.csv`, but for those of trials.

    Args:
        kind: "train" or "validate".
        max_files: the newest so many are kept.
        read: reads a curve (:func:`any_curve`), say with a memory.

    Returns:
        The curves, oldest first, and a line for each that was left out with the reason.
    """
    paths: list[Path] = []
    of_trials = 0
    for folder in folders:
        if not folder.exists():
            raise LmplayError(f"{folder}: there is no such folder")
        if folder.is_file():
            if folder.name == f"{kind}.csv" or folder.name.endswith(ANCESTOR_SUFFIXES[kind]):
                paths.append(folder)
            continue
        for p in folder.rglob(f"{kind}.csv"):
            if not (p.parent / "run.json").exists() or "~" in p.parent.name:
                continue
            above = p.relative_to(folder).parts[-3:]
            if len(above) == 3 and TRIAL_FOLDER.fullmatch(above[0]):
                of_trials += 1
            else:
                paths.append(p)
        paths += list(folder.rglob(f"*{ANCESTOR_SUFFIXES[kind]}"))
    paths = sorted(set(paths), key=lambda p: (p.stat().st_mtime, str(p)))
    # What all others are compared with is often the oldest of them.
    dropped = [p for p in paths[:-max_files] if not _of_baseline(p)]
    left_out = [f"{p}: left out (--max-files {max_files})" for p in dropped]
    if of_trials:
        left_out.append(f"{of_trials} runs of trials: left to the page (--html, --serve)")
    curves: dict[object, Curve] = {}
    gone = set(dropped)
    for path in (p for p in paths if p not in gone):
        try:
            curve = (read or any_curve)(path)
        except LmplayError as e:
            left_out.append(str(e))
            continue
        key = (curve.arena, curve.name, source(curve)) if curve.run else path
        if key in curves:
            left_out.append(f"{curves[key].path}: left out, {path} is the same run and newer")
        curves[key] = curve
    return list(curves.values()), left_out


def _of_baseline(path: Path) -> bool:
    """Whether a curve is of a run of gpt2ish as it stands in its file."""
    try:
        record = json.loads((path.parent / "run.json").read_text(encoding="utf-8"))
        return record["identity"]["variant"] == BASELINE and not record.get("overrides")
    except (OSError, ValueError, KeyError, TypeError):  # the ancestor's, or a file that is said to be odd when read
        return False


def any_curve(path: Path) -> Curve:
    """One of our curves, or the ancestor's.

    Raises:
        LmplayError: it cannot be read.
    """
    return _ancestor_curve(path) if path.name.endswith("_stats.csv") else own_curve(path)


def own_curve(path: Path) -> Curve:
    """The curve of one of our runs.

    Raises:
        LmplayError: it, or the run.json beside it, cannot be read.
    """
    try:
        run = json.loads((path.parent / "run.json").read_text(encoding="utf-8"))
        identity = run["identity"]
        return Curve(
            path.parent.name,
            str(run["plan_name"]),
            f"{identity['plan']}-{identity.get('data', '')}",  # a plan names its files; what is in them may change
            str(run.get("label", identity["variant"])),
            path,
            read_curve(path),
            run,
        )
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise LmplayError(f"{path.parent}: its run.json cannot be read: {e}") from e


def _ancestor_curve(path: Path) -> Curve:
    frame = read_curve(path)
    if "tokens" not in frame or "loss" not in frame:
        raise LmplayError(f"{path}: it has no columns tokens and loss")
    name = path.name
    for suffix in ANCESTOR_SUFFIXES.values():
        name = name.removesuffix(suffix)
    return Curve(name, path.parent.name, "", name, path, frame)


def by_arena(curves: Iterable[Curve]) -> dict[tuple[str, str], list[Curve]]:
    """Curves grouped by plan and data: only within a group are they comparable."""
    groups: dict[tuple[str, str], list[Curve]] = {}
    for curve in curves:
        groups.setdefault(curve.arena, []).append(curve)
    return groups


def baseline_of(curves: Sequence[Curve], target: str | None) -> Curve | None:
    """The curve that differences are taken to: the one named, or the first run of gpt2ish by name.

    Runs without overrides come first. Never silently another.

    Raises:
        LmplayError: `target` names none of them.
    """
    if target is not None:
        named = [c for c in curves if target in (c.name, c.variant)]
        if not named:
            raise LmplayError(f"--target {target}: no such run{nearest(target, [c.name for c in curves])}")
        return min(named, key=lambda c: (bool(c.run.get("overrides")), c.name))
    plain = [c for c in curves if c.variant == BASELINE]
    return min(plain, key=lambda c: (bool(c.run.get("overrides")), c.name), default=None)


def partners(curves: Sequence[Curve], baseline: Curve | None, target: str | None) -> dict[Path, Curve]:
    """For each curve (by its path) the curve that its difference is taken to.

    Runs of one seed start their shared modules from the same numbers, so a run is compared with the
    baseline's run of its own seed, and of its own precision where there is one. A run that `target` names
    is the partner of all.
    """
    if baseline is None:
        return {}
    fixed = target == baseline.name
    peers = [
        c for c in curves if c.variant == baseline.variant and c.run.get("overrides") == baseline.run.get("overrides")
    ]
    if fixed:
        return {c.path: baseline for c in curves}
    partner = {}
    for curve in curves:
        same_seed = [c for c in peers if c.seed == curve.seed]
        same_precision = [c for c in same_seed if c.precision == curve.precision]
        partner[curve.path] = next(iter([*same_precision, *same_seed]), baseline)
    return partner


def unpaired(curves: Sequence[Curve], partner: dict[Path, Curve]) -> list[Curve]:
    """The runs without a partner of their own seed, where others have one: no difference of pairs is theirs."""
    if len({other.path for other in partner.values()}) < 2:
        return []
    return [c for c in curves if partner[c.path].seed != c.seed]


def series(curve: Curve, x: str, metric: str) -> tuple[np.ndarray, np.ndarray] | None:
    """x and y (n,) of a curve, by growing x, or None where it has no such columns."""
    column = AXES[x]
    if column not in curve.frame or metric not in curve.frame:
        return None
    frame = curve.frame[[column, metric]].dropna().groupby(column, as_index=False).last()
    return (frame[column].to_numpy(float), frame[metric].to_numpy(float)) if len(frame) else None


def smooth(y: np.ndarray, count: int) -> np.ndarray:
    """The mean of each value and up to count - 1 before it: causal, no value sees the future."""
    return pd.Series(y).rolling(max(1, count), min_periods=1).mean().to_numpy()


def difference(
    run: tuple[np.ndarray, np.ndarray], base: tuple[np.ndarray, np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """run - base on a common grid inside the overlap; empty arrays where there is none.

    The grid is geometric, as the figures' axis is logarithmic, and is made of the curves' own points where
    they have the same ones, so that nothing is interpolated there.
    """
    (x, y), (bx, by) = run, base
    grid = common_grid([x, bx])
    return grid, np.interp(grid, x, y) - np.interp(grid, bx, by)


def common_grid(xs: Sequence[np.ndarray]) -> np.ndarray:
    """Where all curves with the points `xs`, growing, can be compared; empty where they do not overlap.

    The first one's own points where the others have them, too; else a geometric grid, or an even one from 0.
    """
    low, high = max(x[0] for x in xs), min(x[-1] for x in xs)
    if low > high:
        return np.empty(0)
    inside = xs[0][(xs[0] >= low) & (xs[0] <= high)]
    if len(inside) and inside[-1] == high and all(np.isin(inside, x).all() for x in xs[1:]):
        return inside
    if low == high:
        return np.array([low])
    return np.geomspace(low, high, GRID) if low > 0 else np.linspace(low, high, GRID)


@dataclass(frozen=True)
class Band:
    """Several seeds as one curve: their mean, and half the width of Student's 95 % interval of it, each (n,)."""

    x: np.ndarray
    mean: np.ndarray
    half: np.ndarray
    seeds: int


def band(lines: Sequence[tuple[np.ndarray, np.ndarray]], coverage: float = COVERAGE) -> Band | None:
    """The mean of curves (x, y) and its interval at each point; None for one seed, or where they do not overlap.

    A seed that has not come half as far as the furthest is left out: a run that has just begun would end it there.
    """
    furthest = max((x[-1] for x, _ in lines), default=0.0)
    lines = [(x, y) for x, y in lines if x[-1] >= furthest / 2]
    grid = common_grid([x for x, _ in lines]) if len(lines) > 1 else np.empty(0)
    if not len(grid):
        return None
    ys = np.stack([np.interp(grid, x, y) for x, y in lines])
    half = _quantile(len(lines), coverage) * ys.std(axis=0, ddof=1) / math.sqrt(len(lines))
    return Band(grid, ys.mean(axis=0), half, len(lines))


def null_band(lines: Sequence[tuple[np.ndarray, np.ndarray]], coverage: float = COVERAGE) -> Band | None:
    """What luck alone does: 95 % of the differences between two runs of the baseline with other seeds lie within
    `half` of 0, by Student's t of the seeds that are there. `mean` is 0."""
    found = band(lines, coverage)
    if found is None:
        return None
    half = found.half * math.sqrt(2 * found.seeds)  # of the difference of two, not of a mean
    return Band(found.x, np.zeros_like(half), half, found.seeds)


def _quantile(seeds: int, coverage: float) -> float:
    from scipy import stats

    return float(stats.t.ppf(0.5 + coverage / 2, seeds - 1))


def families(curves: Sequence[Curve]) -> dict[str, list[Curve]]:
    """Curves by setting, as seeds of one another.

    Runs of one name whose experiment's source differs are no seeds of each other: the source's digest is added.
    """
    sources: dict[str, set[str]] = {}
    for curve in curves:
        sources.setdefault(curve.family, set()).add(source(curve))
    groups: dict[str, list[Curve]] = {}
    for curve in curves:
        odd = len(sources[curve.family]) > 1
        groups.setdefault(f"{curve.family} ({source(curve)[:6]})" if odd else curve.family, []).append(curve)
    return groups


def source(curve: Curve) -> str:
    """The digest of the experiment file that a run was made with; empty where none is recorded."""
    return str(curve.run.get("identity", {}).get("experiment", ""))


def final_table(curves: Sequence[Curve], partner: dict[Path, Curve]) -> pd.DataFrame:
    """One row a run: final figures, and the difference to its partner at the last common token count."""
    rows = []
    for curve in curves:
        last = curve.frame.iloc[-1]
        row: dict[str, Any] = {"plan": curve.plan, "run": curve.name}
        row |= {key: last.get(key) for key in ("tokens", *METRICS)}
        own = series(curve, "tokens", "loss")
        baseline = partner.get(curve.path)
        base = series(baseline, "tokens", "loss") if baseline is not None else None
        if own and base and baseline is not None:
            _, delta = difference(own, base)
            row["loss_difference"] = delta[-1] if len(delta) else None
            row["to"] = baseline.name
        summary = curve.run.get("summary") or {}
        row |= {k: summary.get(k) for k in ("parameters", "tokens_per_second", "peak_memory_mb")}
        rows.append(row)
    return pd.DataFrame(rows)


def seeds_note(curves: Sequence[Curve]) -> str:
    """What the number of seeds allows to say."""
    alone = [family for family, seeds in families(curves).items() if len(seeds) == 1]
    return f"single seed, no claim: {', '.join(alone)}" if alone else ""
