"""What the page shows, as JSON: curves, settings, final figures and texts of runs, and verdicts.

The page computes means, bands and differences itself, with the formulas of
:mod:`lmplay.analysis.compare`; a test compares both. Sending what is drawn would take about 200
times the data: each baseline x metric x axis x kind x smoothing is another set of lines.

One module, because its parts are one JSON document.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

import pandas as pd
from pydantic import AliasChoices, BaseModel, Field, ValidationError

from ...errors import LmplayError
from ...files import read_json
from ...training.curves import check_digest
from ..compare import (
    COVERAGE,
    GRID,
    METRICS,
    X_COLUMNS,
    RunCurve,
    any_curve,
    baseline_of,
    by_arena,
    collect,
    count_tables,
    families,
    source,
)
from ..palette import COLORS, GREY, LABELS

POINTS = 400  # of a curve on the page; longer ones are averaged down
DIGITS = 7  # significant, of every number
MOST_SEEDS = 60  # with more, the page uses Student's quantile for this number
MOST_TEXT = 2000  # characters of a sample


Read = Callable[[Path], RunCurve]


def gather(
    folders: Sequence[Path], max_files: int, target: str | None = None, read: Read = any_curve
) -> tuple[dict[str, Any], list[str]]:
    """Return the page's content, and a line for each run or trial that was left out.

    Raises:
        LmplayError: a folder does not exist, or `target` names no run.
    """
    validation, left_out = collect(folders, "validate", max_files, read)
    training, more = collect(folders, "train", max_files, read)
    left_out += [line for line in more if line not in left_out]
    train_of = {(c.path.parent, c.name): c for c in training}
    trials, odd = find_reports(folders, "trial.json", TrialReport)
    sizes, more = find_reports(folders, "sizes.json", SizesReport)
    panels, others = find_reports(folders, "panel.json", PanelReport)
    arenas, lost = trial_arenas(trials, read)
    for (name, fingerprint), curves in by_arena(validation).items():
        named = target if target in {n for c in curves for n in (c.name, c.variant)} else None
        baseline = baseline_of(curves, named)
        family = {c.path: f for f, seeds in families(curves).items() for c in seeds}
        members = [
            Member(
                c,
                train_of.get((c.path.parent, c.name)),
                family[c.path],
                f"{c.variant} {c.run.get('overrides')}",
            )
            for c in curves
        ]
        runs, problems = page_runs(members)
        lost += problems
        if runs:
            fixed = baseline.name if baseline is not None and target == baseline.name else None
            base = family[baseline.path] if baseline is not None else None
            arenas.append(one_arena(name, fingerprint, base, fixed, runs, curves))
    if target is not None and not any(
        target in (r["name"], r["variant"]) for a in arenas for r in a["runs"]
    ):
        baseline_of(validation, target)  # raises, naming the nearest
    arenas.sort(key=lambda a: -a["changed"])
    content = {
        "made": time.strftime("%Y-%m-%d %H:%M"),
        "arenas": arenas,
        "trials": [{"name": path.parent.name, **t.model_dump()} for path, t in trials],
        "sizes": [{"name": path.parent.name, **t.model_dump()} for path, t in sizes],
        "panels": [{"name": path.parent.name, **t.model_dump()} for path, t in panels],
        "quantiles": quantiles(),
        "grid": GRID,
        "colors": COLORS,
        "grey": GREY,
        "labels": LABELS,
        "axes": X_COLUMNS,
        "metrics": METRICS,
    }
    return content, [*left_out, *odd, *more, *others, *lost]


# ---------------------------------------------------------------- runs


@dataclass(frozen=True)
class Member:
    """A run of an arena, the name that its seeds share, and the setting by which partners are
    found."""

    curve: RunCurve
    training: RunCurve | None
    family: str
    setting: str


def one_arena(
    name: str,
    fingerprint: str,
    baseline: str | None,
    fixed: str | None,
    runs: Sequence[Any],
    curves: Sequence[RunCurve],
) -> dict[str, Any]:
    """Return an arena. `fixed` is the run that all others are compared with, if `target` names
    one."""
    return {
        "key": f"{name} {fingerprint}",
        "name": name,
        "fingerprint": fingerprint,
        "baseline": baseline,
        "fixed": fixed,
        "tables": count_tables(curves),
        "runs": runs,
        "changed": max(changed(c.path) for c in curves),
    }


def changed(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:  # moved aside since it was read
        return 0.0


def page_runs(members: Sequence[Member]) -> tuple[list[dict[str, Any]], list[str]]:
    """Return the runs of an arena, averaged down alike, and a line for each that was left out."""
    windows = {
        "validate": math.ceil(max((len(m.curve.frame) for m in members), default=1) / POINTS),
        "train": math.ceil(
            max((len(m.training.frame) for m in members if m.training), default=1) / POINTS
        ),
    }
    runs = []
    lost = []
    for member in members:
        try:
            run = one_run(member, windows)
            if member.curve.run:
                run["samples"], damage = samples(member.curve.path.parent / "samples.jsonl")
                lost += damage
            runs.append(run)
        except (
            KeyError,
            TypeError,
            ValueError,
            AttributeError,
        ) as e:  # a run.json may say anything
            lost.append(
                f"{member.curve.path.parent}: left out, its run.json is not one of lmplay's: {e!r}"
            )
    return runs, lost


def one_run(member: Member, windows: Mapping[str, int]) -> dict[str, Any]:
    """Return one run."""
    curve = member.curve
    training = member.training
    record = curve.run
    summary = record.get("summary") or {}
    last = curve.frame.iloc[-1]
    return {
        "name": curve.name,
        "variant": curve.variant,
        "family": member.family,
        "setting": member.setting,
        "seed": None if curve.seed is None else int(curve.seed),
        "precision": str(curve.precision),
        "settings": settings(record),
        "finished": bool(summary) or not record,
        "final": {k: number(last.get(k)) for k in ("tokens", *METRICS)}
        | {
            k: number(summary.get(k))
            for k in ("parameters", "tokens_per_second", "peak_memory_mb", "seconds")
        },
        "validate": points(curve.frame, windows["validate"]),
        "train": points(training.frame, windows["train"]) if training else None,
        "samples": [],
    }


def points(frame: pd.DataFrame, window: int) -> dict[str, Any]:
    """Return a curve's columns; each point stands for `window` rows: their last x, their mean y."""
    columns = [c for c in (*X_COLUMNS.values(), *METRICS) if c in frame]
    frame = frame[columns]
    if window > 1:
        axes = [c for c in X_COLUMNS.values() if c in frame]
        groups = frame.groupby(pd.RangeIndex(len(frame)) // window)
        frame = groups.mean()
        frame[axes] = groups[axes].last()
    return {"window": window, **{c: [number(v) for v in frame[c]] for c in columns}}


def settings(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return what decides a run: the experiment's settings, seed, precision, machine, code."""
    identity = record.get("identity", {})
    found: dict[str, Any] = {}
    found |= identity.get("config") or {}
    found |= {k: identity[k] for k in ("seed", "precision") if k in identity}
    found |= {k: record[k] for k in ("device", "threads", "mini_batch_size") if k in record}
    found["code"] = str(identity.get("experiment", ""))[:8]
    commit = (record.get("git") or {}).get("commit")
    found["commit"] = (commit or "none")[:8] + (
        "+" if (record.get("git") or {}).get("dirty") else ""
    )
    return {str(k): v if isinstance(v, str | bool) else readable(v) for k, v in found.items()}


def readable(value: Any) -> Any:
    """Return a setting in a form that JSON has: infinities and lists become text."""
    if isinstance(value, int | float) and math.isfinite(value):
        return value
    return str(value) if isinstance(value, int | float) else json.dumps(value)


def samples(path: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """Return the texts of a run's validations, without an incomplete last line.

    Also returns a line if the file is damaged. A run of before there were any has none.
    """
    if not path.exists():
        return [], []
    try:
        check_digest(path)
        lines = path.read_text(encoding="utf-8").split("\n")[:-1]
        found = [json.loads(line) for line in lines if line]
        texts = [{"tokens": number(s["tokens"]), "text": str(s["text"])[:MOST_TEXT]} for s in found]
        return texts, []
    except LmplayError as e:
        return [], [f"{e}; its texts are left out"]
    except (OSError, ValueError, KeyError, TypeError) as e:
        return [], [f"{path}: it is damaged, and its texts are left out: {e!r}"]


# ---------------------------------------------------------------- trials

Finite = Annotated[float, Field(allow_inf_nan=False)]
Maybe = Finite | None
# Version 0.2 wrote another name.
Multiplier = Annotated[Finite, Field(validation_alias=AliasChoices("lr_multiplier", "lr_factor"))]


class TrialDesign(BaseModel):
    plan: str
    plan_fingerprint: str
    against: str
    precision: str
    tuned: bool
    data: str
    sources: dict[str, str]
    context: str = ""


class Arm(BaseModel):
    """What a trial says about an arm, as far as the page shows it."""

    word: str
    why: str
    gain: Maybe
    low: Maybe
    high: Maybe
    gain_bpb: Maybe
    p: Maybe
    level: Maybe
    pairs: int
    more: int | None
    tuned: bool
    lr_multiplier: Multiplier
    settings: str = ""
    share: Finite = 1.0
    tokens_ratio: Maybe
    deviation_paired: Maybe
    deviation_unpaired: Maybe
    controls: dict[str, list[Finite]]
    runs: list[str]


class Cost(BaseModel):
    runs: int
    hours: Finite


class Quoted(BaseModel):
    """What a report says of its plan's certificate."""

    sentence: str = ""
    arena: str = ""


class TrialReport(BaseModel):
    """A trial.json."""

    design: TrialDesign
    arms: dict[str, Arm]
    lr_multiplier: Multiplier
    runs: list[str]
    sensitivity: dict[str, list[tuple[Finite, Finite, Maybe]]]
    cost: Cost
    over: bool
    certificate: Quoted = Quoted()


class Fit(BaseModel):
    sentence: str
    points: list[tuple[Finite, Finite]]


class SizesReport(BaseModel):
    """A sizes.json."""

    fits: dict[str, Fit]


class Holds(BaseModel):
    sentence: str


class PanelReport(BaseModel):
    """A panel.json."""

    panel: dict[str, Holds]


Report = TypeVar("Report", bound=BaseModel)


def find_reports(
    folders: Sequence[Path], file: str, kind: type[Report]
) -> tuple[list[tuple[Path, Report]], list[str]]:
    """Return the trials' `file`s below the folders, newest first, and a line for each unreadable
    one."""
    found = []
    odd = []
    paths = {
        p for f in folders if f.is_dir() for p in f.rglob(file) if p.parent.parent.name == "trials"
    }
    for path in sorted(paths, key=lambda p: -changed(p)):
        try:
            found.append((path, kind.model_validate(read_json(path))))
        except ValidationError as e:
            first = e.errors()[0]
            odd.append(
                f"{path}: this trial cannot be read: {'.'.join(map(str, first['loc']))}: "
                f"{first['msg']}"
            )
        except (OSError, ValueError) as e:
            odd.append(f"{path}: this trial cannot be read: {e}")
    return found, odd


def trial_arenas(
    trials: Sequence[tuple[Path, TrialReport]], read: Read
) -> tuple[list[dict[str, Any]], list[str]]:
    """Return the pairs of trials of one plan, data, budget and baseline as an arena of their own.

    A pair shares its seed and data order, and each idea has the learning rate that was chosen for
    it. Also returns a line for each run that cannot be read, or that was made before the idea was
    edited.
    """
    groups: dict[tuple[Any, ...], list[tuple[Path, TrialReport]]] = {}
    for path, trial in trials:
        d = trial.design
        key = (d.plan, f"{d.plan_fingerprint}-{d.data}", d.against, d.precision, d.tuned)
        groups.setdefault(key, []).append((path, trial))
    arenas = []
    lost = []
    for (plan, fingerprint, against, precision, tuned), same in groups.items():
        members: dict[Path, Member] = {}
        for path, trial in same:
            arms = [(against, trial.lr_multiplier, trial.runs)]
            arms += [(name, arm.lr_multiplier, arm.runs) for name, arm in trial.arms.items()]
            for arm, rate, runs in arms:
                family = arm if rate == 1 else f"{arm} (lr × {rate:g})"
                edited = 0
                for run in runs:
                    where = path.parents[2].joinpath(*safe_parts(run), "validate.csv")
                    if where in members:
                        continue
                    try:
                        member = Member(
                            read(where), read(where.with_name("train.csv")), family, family
                        )
                    except LmplayError as e:
                        lost.append(str(e))
                        continue
                    if source(member.curve) == trial.design.sources.get(arm):
                        members[where] = member
                    else:
                        edited += 1
                if edited:
                    runs_of = f"{edited} run{'s' * (edited > 1)} of {arm}"
                    lost.append(f"{path.parent}: {runs_of} left out, which was edited since")
        found, problems = page_runs(list(members.values()))
        lost += problems
        if found:
            name = f"trials on {plan} against {against}{'' if tuned else ', untuned'}"
            name += "" if precision == "fp32" else f", {precision}"
            base = next((r["family"] for r in found if r["variant"] == against), None)
            curves = [m.curve for m in members.values()]
            arenas.append(one_arena(name, fingerprint, base, None, found, curves))
    return arenas, lost


def safe_parts(folder: str) -> list[str]:
    """Return the last two parts of a run's folder; they cannot lead out of the folder of runs."""
    return [part for part in folder.split("/")[-2:] if part not in ("", ".", "..")]


def quantiles() -> list[float]:
    """Return Student's quantiles of the bands' coverage, for 1 and more degrees of freedom."""
    from scipy import stats

    return [float(stats.t.ppf(0.5 + COVERAGE / 2, n)) for n in range(1, MOST_SEEDS)]


def number(value: Any) -> float | int | None:
    """Return a short number that JSON has; None for anything else."""
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
        return None
    return (
        int(value)
        if float(value).is_integer() and abs(value) < 2**53
        else float(f"{value:.{DIGITS}g}")
    )
