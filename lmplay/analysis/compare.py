"""Read, align and compare runs: numbers only. This module neither draws nor imports torch.

Differences are taken on a common grid, by interpolation, in the range that both curves cover.
Smoothing is causal and the same for every curve of a figure.

One module, because figures and the page must read, align and smooth curves in one way.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ..discover import default_baseline
from ..errors import LmplayError, did_you_mean
from ..files import below
from ..training.curves import TRAIN, read_curve
from ..training.record import read_record

X_COLUMNS = {"tokens": "tokens", "steps": "step", "flops": "flops", "seconds": "seconds"}
TABLES = ("unigram", "bigram", "trigram")  # of lmplay.data.counting
METRICS = ("loss", "bpb", "accuracy")
ORIGINAL_SUFFIXES = {"train": "_train_stats.csv", "validate": "_validate_stats.csv"}
GRID = 400  # points of a common grid
COVERAGE = 0.95  # of the bands
TRIALS = "trial-"  # prefix of the folders of a trial's runs: each pair has its own data order
TRIAL_FOLDER = re.compile(TRIALS + r".+-[0-9a-f]{6}(-cuda|-mps)?(-timed)?(-lr[\d.e+-]+)?")


@dataclass(frozen=True)
class RunCurve:
    """One curve of one run.

    plan, fingerprint: only curves with the same ones can be compared.
    run: the content of run.json; {} for a file of the original playground.
    """

    name: str
    plan: str
    fingerprint: str
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
        """The run's name without its seed: what the seeds of one setting share."""
        return re.sub(r"-s-?\d+$", "", self.name)


def collect(
    folders: Sequence[Path],
    kind: str,
    max_files: int,
    read: Callable[[Path], RunCurve] | None = None,
) -> tuple[list[RunCurve], list[str]]:
    """Return the curves of all runs below the folders, oldest first, without those of trials.

    Args:
        kind: "train" or "validate".
        max_files: only the newest ones are kept, and the baselines.
        read: reads a curve, as :func:`any_curve`.

    Returns:
        The curves, and a line for each curve that was left out, with the reason.
    """
    paths: list[Path] = []
    of_trials = 0
    for folder in folders:
        if not folder.exists():
            raise LmplayError(f"{folder}: there is no such folder")
        if folder.is_file():
            if folder.name == f"{kind}.csv" or folder.name.endswith(ORIGINAL_SUFFIXES[kind]):
                paths.append(folder)
            continue
        for p in below(folder, f"{kind}.csv"):
            if not (p.parent / "run.json").exists() or "~" in p.parent.name:
                continue
            above = p.relative_to(folder).parts[-3:]
            if len(above) == 3 and TRIAL_FOLDER.fullmatch(above[0]):
                of_trials += 1
            else:
                paths.append(p)
        paths += below(folder, f"*{ORIGINAL_SUFFIXES[kind]}")
    paths = sorted(set(paths), key=lambda p: (p.stat().st_mtime, str(p)))
    # What all others are compared with is often the oldest of them.
    dropped = [p for p in paths[:-max_files] if not _of_baseline(p)]
    left_out = [f"{p}: left out (--max-files {max_files})" for p in dropped]
    if of_trials:
        left_out.append(f"{of_trials} runs of trials: left to the page (--html, --serve)")
    curves: dict[object, RunCurve] = {}
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
    return one_plan_each(list(curves.values())), left_out


def _of_baseline(path: Path) -> bool:
    """Return whether a curve is of an unchanged baseline, by its run.json."""
    try:
        record = read_record(path.parent / "run.json")
        is_baseline = record["identity"]["variant"] == record.get("baseline")
        return is_baseline and not record.get("overrides")
    except (OSError, ValueError):  # reported when the curve is read
        return False


def any_curve(path: Path) -> RunCurve:
    """Return one of our curves, or a `*_stats.csv` of the original playground.

    Raises:
        LmplayError: it cannot be read.
    """
    return _original_curve(path) if path.name.endswith("_stats.csv") else own_curve(path)


def own_curve(path: Path) -> RunCurve:
    """Return the curve of one of our runs.

    Raises:
        LmplayError: the curve or its run.json cannot be read.
    """
    try:
        run = read_record(path.parent / "run.json")
        identity = run["identity"]
        return RunCurve(
            path.parent.name,
            str(run["plan_name"]),
            # a plan names its files; what is in them may change
            f"{arena_of(run)}-{identity.get('data', '')}",
            str(run.get("label") or identity["variant"]),
            path,
            read_curve(path),
            run,
        )
    except (OSError, ValueError) as e:
        raise LmplayError(f"{path.parent}: its run.json cannot be read: {e}") from e


def count_tables(curves: Iterable[RunCurve]) -> dict[str, float]:
    """Return the losses of count tables by name, if the runs of an arena agree on them."""
    found = {tuple(c.run["tables"]["losses"]) for c in curves if c.run.get("tables")}
    return dict(zip(TABLES, found.pop(), strict=True)) if len(found) == 1 else {}


def arena_of(run: dict[str, Any]) -> str:
    """Return what a run's recipe does not change, as hex digits: only equal ones can be compared.

    Args:
        run: the content of run.json.
    """
    if "arena" in run:
        return str(run["arena"])
    from ..plan import parse_plan
    from ..recipe import arena_fingerprint

    try:  # a run of version 0.2
        return arena_fingerprint(parse_plan(run.get("plan"), "run.json"))
    except LmplayError:
        return str(run["identity"]["plan"])


def one_plan_each(curves: Sequence[RunCurve]) -> list[RunCurve]:
    """Return the curves with one plan's name for each arena.

    Plans that differ in their recipes alone are one arena. It is called as most of its runs are;
    the names of the others' runs say which plan they are of.
    """
    names: dict[str, Counter[str]] = {}
    for curve in curves:
        if curve.run:
            names.setdefault(curve.fingerprint, Counter())[curve.plan] += 1
    found = []
    for curve in curves:
        plan = names[curve.fingerprint].most_common(1)[0][0] if curve.run else curve.plan
        if plan != curve.plan:
            of = f" ({curve.plan})"
            curve = replace(
                curve, plan=plan, name=_with(curve.name, of), variant=curve.variant + of
            )
        found.append(curve)
    return found


def _with(name: str, addition: str) -> str:
    """Return a run's name with an addition in front of its seed."""
    setting, seed, number = name.rpartition("-s")
    return f"{setting}{addition}{seed}{number}" if setting else name + addition


def _original_curve(path: Path) -> RunCurve:
    frame = read_curve(path)
    if "tokens" not in frame or "loss" not in frame:
        raise LmplayError(f"{path}: it has no columns tokens and loss")
    name = path.name
    for suffix in ORIGINAL_SUFFIXES.values():
        name = name.removesuffix(suffix)
    return RunCurve(name, path.parent.name, "", name, path, frame)


def by_arena(curves: Iterable[RunCurve]) -> dict[tuple[str, str], list[RunCurve]]:
    """Group curves by plan and data."""
    groups: dict[tuple[str, str], list[RunCurve]] = {}
    for curve in curves:
        groups.setdefault(curve.arena, []).append(curve)
    return groups


def baseline_of(curves: Sequence[RunCurve], target: str | None) -> RunCurve | None:
    """Return the curve that the others are compared with, or None if there is none.

    Without `target` it is a run of the variant that most of the runs name as their baseline. Runs
    without overrides come first.

    Raises:
        LmplayError: `target` names none of the curves.
    """
    if target is not None:
        named = [c for c in curves if target in (c.name, c.variant)]
        if not named:
            hint = did_you_mean(target, [c.name for c in curves])
            raise LmplayError(f"--target {target}: no such run{hint}")
        return min(named, key=_plain_first)
    present = {c.variant for c in curves}
    names = [name for name in baseline_names(curves) if name in present]
    plain = [c for c in curves if names and c.variant == names[0]]
    return min(plain, key=_plain_first, default=None)


def baseline_names(curves: Sequence[RunCurve]) -> list[str]:
    """Return the variants that the runs name as their baselines, the most frequent first."""
    named = Counter(str(c.run["baseline"]) for c in curves if c.run.get("baseline"))
    return [name for name, _ in named.most_common()] or [default_baseline()]


def _plain_first(curve: RunCurve) -> tuple[bool, str]:
    return bool(curve.run.get("overrides")), curve.name


def partners(
    curves: Sequence[RunCurve], baseline: RunCurve | None, target: str | None
) -> dict[Path, RunCurve]:
    """Return, by a curve's path, the curve that it is compared with.

    Runs of one seed start their shared modules from the same numbers. So a run is compared with the
    baseline's run of its seed, and of its precision if there is one. If `target` names a single
    run, all are compared with it.
    """
    if baseline is None:
        return {}
    fixed = target == baseline.name
    peers = [
        c
        for c in curves
        if c.variant == baseline.variant and c.run.get("overrides") == baseline.run.get("overrides")
    ]
    if fixed:
        return {c.path: baseline for c in curves}
    partner = {}
    for curve in curves:
        same_seed = [c for c in peers if c.seed == curve.seed]
        same_precision = [c for c in same_seed if c.precision == curve.precision]
        partner[curve.path] = next(iter([*same_precision, *same_seed]), baseline)
    return partner


def unpaired(curves: Sequence[RunCurve], partner: dict[Path, RunCurve]) -> list[RunCurve]:
    """Return the runs without a partner of their seed, if other runs have one."""
    if len({other.path for other in partner.values()}) < 2:
        return []
    return [c for c in curves if partner[c.path].seed != c.seed]


def series(curve: RunCurve, x: str, metric: str) -> tuple[np.ndarray, np.ndarray] | None:
    """Return x and y (n,) of a curve in ascending x; None if it has no such columns."""
    column = X_COLUMNS[x]
    if column not in curve.frame or metric not in curve.frame:
        return None
    places = curve.frame[column].to_numpy(float)
    values = curve.frame[metric].to_numpy(float)
    known = ~(np.isnan(places) | np.isnan(values))
    places = places[known]
    values = values[known]
    if (np.diff(places) <= 0).any():  # seldom: the last value of each x counts
        last = pd.Series(values).groupby(places).last()
        places = last.index.to_numpy(float)
        values = last.to_numpy(float)
    return (places, values) if len(places) else None


def smooth(y: np.ndarray, count: int) -> np.ndarray:
    """Return the mean of each value and up to count - 1 values before it."""
    return pd.Series(y).rolling(max(1, count), min_periods=1).mean().to_numpy()


def difference(
    run: tuple[np.ndarray, np.ndarray], base: tuple[np.ndarray, np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """Return (grid, run - base) where both curves exist; empty arrays if they do not overlap."""
    (x, y) = run
    (bx, by) = base
    grid = common_grid([x, bx])
    return grid, np.interp(grid, x, y) - np.interp(grid, bx, by)


def common_grid(xs: Sequence[np.ndarray]) -> np.ndarray:
    """Return the x values at which all curves can be compared; empty if they do not overlap.

    These are the first curve's own points if the others have them, too: then nothing is
    interpolated. Otherwise the grid is geometric, or even if it starts at 0.
    """
    low = max(x[0] for x in xs)
    high = min(x[-1] for x in xs)
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
    """The mean of several seeds and half the width of its 95 % interval (Student's t), each
    (n,)."""

    x: np.ndarray
    mean: np.ndarray
    half: np.ndarray
    seeds: int


def band(lines: Sequence[tuple[np.ndarray, np.ndarray]], coverage: float = COVERAGE) -> Band | None:
    """Return the mean of curves (x, y) and its interval; None for one seed or without overlap.

    A seed that has less than half of the longest one's x is left out: it would end the band there.
    """
    furthest = max((x[-1] for x, _ in lines), default=0.0)
    lines = [(x, y) for x, y in lines if x[-1] >= furthest / 2]
    grid = common_grid([x for x, _ in lines]) if len(lines) > 1 else np.empty(0)
    if not len(grid):
        return None
    ys = np.stack([np.interp(grid, x, y) for x, y in lines])
    half = _quantile(len(lines), coverage) * ys.std(axis=0, ddof=1) / math.sqrt(len(lines))
    return Band(grid, ys.mean(axis=0), half, len(lines))


def null_band(
    lines: Sequence[tuple[np.ndarray, np.ndarray]], coverage: float = COVERAGE
) -> Band | None:
    """Return what luck alone does: an interval for the difference between two runs of the baseline.

    95 % of the differences between runs with different seeds are within `half` of 0, by Student's
    t.
    """
    found = band(lines, coverage)
    if found is None:
        return None
    half = found.half * math.sqrt(2 * found.seeds)  # of the difference of two, not of a mean
    return Band(found.x, np.zeros_like(half), half, found.seeds)


def _quantile(seeds: int, coverage: float) -> float:
    """Return Student's quantile for an interval of this coverage."""
    from scipy import stats

    return float(stats.t.ppf(0.5 + coverage / 2, seeds - 1))


def families(curves: Sequence[RunCurve]) -> dict[str, list[RunCurve]]:
    """Group curves by setting: the seeds of one another.

    Runs of one name whose experiment files differ are not seeds of each other: the digest is added.
    """
    sources: dict[str, set[str]] = {}
    for curve in curves:
        sources.setdefault(curve.family, set()).add(source(curve))
    groups: dict[str, list[RunCurve]] = {}
    for curve in curves:
        odd = len(sources[curve.family]) > 1
        groups.setdefault(
            f"{curve.family} ({source(curve)[:6]})" if odd else curve.family, []
        ).append(curve)
    return groups


def source(curve: RunCurve) -> str:
    """Return the digest of the experiment file that a run was made with, or ""."""
    return str(curve.run.get("identity", {}).get("experiment", ""))


def final_table(curves: Sequence[RunCurve], partner: dict[Path, RunCurve]) -> pd.DataFrame:
    """Return one row per run: final figures, and the difference to its partner at the last common
    x."""
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


def settings_table(
    curves: Sequence[RunCurve], table: pd.DataFrame, coverage: float = COVERAGE
) -> pd.DataFrame:
    """Return one row per setting: the mean over its seeds, and half of its interval (Student's t).

    Args:
        table: of :func:`final_table`, for the same curves.

    Returns:
        Columns plan, run (the setting), seeds, loss, loss_interval, loss_difference,
        loss_difference_interval. Intervals of a single seed are NaN.
    """
    rows = []
    finals = table.set_index("run")
    for family, seeds in families(curves).items():
        own = finals.loc[[c.name for c in seeds]]
        row: dict[str, Any] = {"plan": seeds[0].plan, "run": family, "seeds": len(seeds)}
        for column in ("loss", "loss_difference"):
            values = own[column].dropna().astype(float) if column in own else pd.Series(dtype=float)
            if column == "loss_difference" and "to" in own:  # not of the baseline to itself
                values = values[own.loc[values.index, "to"] != values.index]
            half = math.nan
            if len(values) > 1:
                half = _quantile(len(values), coverage) * values.std() / math.sqrt(len(values))
            row[column] = values.mean() if len(values) else math.nan
            row[f"{column}_interval"] = half
        rows.append(row)
    return pd.DataFrame(rows)


def seeds_note(curves: Sequence[RunCurve]) -> str:
    """Return a note about settings with a single seed, or ""."""
    alone = [family for family, seeds in families(curves).items() if len(seeds) == 1]
    return f"single seed, no claim: {', '.join(alone)}" if alone else ""


@dataclass(frozen=True)
class Comparison:
    """The runs of one plan on one data, and the run that each is compared with.

    partner: by the curve's path, for the curves that can be compared.
    unpaired: runs whose seed the baseline does not have, while others have theirs.
    """

    plan: str
    fingerprint: str
    curves: list[RunCurve]
    baseline: RunCurve | None
    partner: dict[Path, RunCurve]
    unpaired: list[RunCurve]

    def table(self) -> pd.DataFrame:
        """Return one row per run, as :func:`final_table`."""
        return final_table(self.curves, self.partner)

    def settings(self, table: pd.DataFrame) -> pd.DataFrame:
        """Return one row per setting, as :func:`settings_table`, given :meth:`table`'s."""
        return settings_table(self.curves, table)


def compare_runs(curves: Sequence[RunCurve], target: str | None = None) -> list[Comparison]:
    """Return one comparison for each plan and data.

    Raises:
        LmplayError: `target` names none of the runs.
    """
    if target is not None and not any(target in (c.name, c.variant) for c in curves):
        baseline_of(curves, target)  # raises, with the nearest name
    found = []
    for (plan, fingerprint), group in by_arena(curves).items():
        named = target if any(target in (c.name, c.variant) for c in group) else None
        baseline = baseline_of(group, named)
        partner = partners(group, baseline, named)
        lone = unpaired(group, partner)
        paths = {c.path for c in lone}
        pairs = {path: other for path, other in partner.items() if path not in paths}
        found.append(Comparison(plan, fingerprint, group, baseline, pairs, lone))
    return found


def logged_metrics(curves: Iterable[RunCurve]) -> list[str]:
    """Return the curves that experiments log themselves, as columns of train.csv."""
    names = dict.fromkeys(c for curve in curves if curve.run for c in curve.frame.columns)
    return [name for name in names if name not in TRAIN]
