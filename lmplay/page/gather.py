"""What the page shows, as JSON: every run's curves, settings, final figures and texts, and the trials' verdicts.

The page computes means, bands and differences itself, as x axis, metric and baseline are switched there; it does so as
:mod:`lmplay.compare` does, and a test holds the two against each other.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from ..compare import AXES, COVERAGE, GRID, METRICS, Curve, baseline_of, by_arena, collect, families, own_curve
from ..palette import COLOURS, GREY, LABELS

POINTS = 400  # of a curve on the page; longer ones are averaged down
DIGITS = 7  # significant, of every number
MOST_SEEDS = 60  # beyond it Student's quantile is taken as that of so many
MOST_TEXT = 2000  # characters of a sample
TRIAL = ("design", "arms", "null", "sensitivity", "cost", "over", "pairs", "runs")


def gather(folders: Sequence[Path], max_files: int, target: str | None = None) -> tuple[dict[str, Any], list[str]]:
    """The page's content, and a line for each run or trial that was left out with the reason.

    Raises:
        LmplayError: a folder is not there, or `target` names no run.
    """
    validation, left_out = collect(folders, "validate", max_files)
    training, more = collect(folders, "train", max_files)
    left_out += [line for line in more if line not in left_out]
    train_of = {c.path.parent: c for c in training if c.run}
    trials, odd = find_reports(folders, "trial.json", TRIAL)
    sizes, more = find_reports(folders, "sizes.json", ("fits",))
    odd += more
    arenas = trial_arenas(trials)
    for (name, fingerprint), curves in by_arena(validation).items():
        named = target if target in {n for c in curves for n in (c.name, c.variant)} else None
        baseline = baseline_of(curves, named)
        family = {c.path: f for f, seeds in families(curves).items() for c in seeds}
        arenas.append(
            {
                "name": name,
                "fingerprint": fingerprint,
                "baseline": family[baseline.path] if baseline else None,
                "runs": [one_run(c, train_of.get(c.path.parent), family[c.path]) for c in curves],
                "changed": max(c.path.stat().st_mtime for c in curves),
            }
        )
    if target is not None and not any(named_in(a, target) for a in arenas):
        baseline_of(validation, target)  # raises, naming the nearest
    arenas.sort(key=lambda a: -a["changed"])
    content = {
        "made": time.strftime("%Y-%m-%d %H:%M"),
        "arenas": arenas,
        "trials": [{k: v for k, v in t.items() if k != "path"} for t in trials],
        "sizes": [{k: v for k, v in s.items() if k != "path"} for s in sizes],
        "quantiles": quantiles(),
        "coverage": COVERAGE,
        "grid": GRID,
        "colours": COLOURS,
        "grey": GREY,
        "labels": LABELS,
        "axes": AXES,
        "metrics": METRICS,
    }
    return content, left_out + odd


def named_in(arena: Mapping[str, Any], target: str) -> bool:
    return any(target in (r["name"], r["variant"]) for r in arena["runs"])


def trial_arenas(trials: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The pairs of trials with one plan, budget and baseline as one arena: a pair shares its seed and data order, and
    each idea has the learning rate that was found for it."""
    groups: dict[tuple[str, ...], list[Mapping[str, Any]]] = {}
    for trial in trials:
        key = tuple(str(trial["design"].get(k)) for k in ("plan", "plan_fingerprint", "against", "precision"))
        groups.setdefault(key, []).append(trial)
    arenas = []
    for (plan, fingerprint, against, _), same in groups.items():
        runs, changed = {}, 0.0
        for trial in same:
            out = trial["path"].parents[2]
            arms = [(against, trial["runs"]), *((name, arm.get("runs", [])) for name, arm in trial["arms"].items())]
            for arm, folder in ((arm, f) for arm, folders in arms for f in folders):
                path = out.joinpath(*safe_parts(folder), "validate.csv")
                if path in runs or not path.exists():
                    continue
                curve = own_curve(path)
                training = own_curve(path.with_name("train.csv"))
                rate = path.parent.parent.name.rpartition("-lr")[2] if "-lr" in path.parent.parent.name else "1"
                family = arm if rate == "1" else f"{arm} (lr × {rate})"
                runs[path] = one_run(curve, training, family)
                changed = max(changed, path.stat().st_mtime)
        if runs:
            found = list(runs.values())
            base = next((r["family"] for r in found if r["variant"] == against), None)
            name = f"trials on {plan} against {against}"
            arenas.append(
                {"name": name, "fingerprint": fingerprint, "baseline": base, "runs": found, "changed": changed}
            )
    return arenas


def safe_parts(folder: str) -> list[str]:
    """The two last parts of a run's folder as a report names it; nothing of it leads out of the folder of runs."""
    return [part for part in str(folder).split("/")[-2:] if part not in ("", ".", "..")]


def one_run(curve: Curve, training: Curve | None, family: str) -> dict[str, Any]:
    """A run as the page takes it."""
    record = curve.run
    summary = record.get("summary") or {}
    last = curve.frame.iloc[-1]
    return {
        "name": curve.name,
        "variant": curve.variant,
        "family": family,
        "seed": curve.seed,
        "precision": curve.precision,
        "settings": settings(record),
        "finished": bool(summary) or not record,
        "final": {k: number(last.get(k)) for k in ("tokens", *METRICS)}
        | {k: number(summary.get(k)) for k in ("parameters", "tokens_per_second", "peak_memory_mb", "seconds")},
        "validate": points(curve.frame),
        "train": points(training.frame) if training else None,
        "samples": samples(curve.path.parent / "samples.jsonl") if record else [],
    }


def points(frame: pd.DataFrame) -> dict[str, Any]:
    """A curve's columns, of at most POINTS rows; `window` rows stand in each: x is the last one's, y their mean."""
    columns = [c for c in (*AXES.values(), *METRICS) if c in frame]
    frame = frame[columns]
    window = math.ceil(len(frame) / POINTS)
    if window > 1:
        axes = [c for c in AXES.values() if c in frame]
        groups = frame.groupby(pd.RangeIndex(len(frame)) // window)
        frame = groups.mean()
        frame[axes] = groups[axes].last()
    return {"window": window, **{c: [number(v) for v in frame[c]] for c in columns}}


def settings(record: Mapping[str, Any]) -> dict[str, Any]:
    """What decides a run and can be read: the experiment's settings, seed, precision, machine, code."""
    identity = record.get("identity", {})
    told = dict(identity.get("config") or {})
    told |= {k: identity[k] for k in ("seed", "precision") if k in identity}
    told |= {k: record[k] for k in ("device", "threads", "mini_batch_size") if k in record}
    told["code"] = str(identity.get("experiment", ""))[:8]
    commit = (record.get("git") or {}).get("commit")
    told["commit"] = (commit or "none")[:8] + ("+" if (record.get("git") or {}).get("dirty") else "")
    return {k: v if isinstance(v, str | int | float | bool) else json.dumps(v) for k, v in told.items()}


def samples(path: Path) -> list[dict[str, Any]]:
    """The texts of a run's validations; a last line that a kill cut short is left out."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")[:-1]
        found = [json.loads(line) for line in lines if line]
    except (OSError, ValueError):
        return []  # a run of before there were any; a text is no result
    return [{"tokens": s["tokens"], "text": str(s["text"])[:MOST_TEXT]} for s in found]


def find_reports(folders: Sequence[Path], file: str, keys: Sequence[str]) -> tuple[list[dict[str, Any]], list[str]]:
    """What trials below the folders have written down in `file`, newest first, and a line for each that cannot be
    read."""
    found, odd = [], []
    paths = {p for folder in folders if folder.is_dir() for p in folder.rglob(f"trials/*/{file}")}
    for path in sorted(paths, key=lambda p: -p.stat().st_mtime):
        try:
            told = json.loads(path.read_text(encoding="utf-8"))
            found.append({"name": path.parent.name, "path": path, **{k: told[k] for k in keys}})
        except (OSError, ValueError, KeyError, TypeError) as e:
            odd.append(f"{path}: this trial cannot be read: {e}")
    return found, odd


def quantiles() -> list[float]:
    """Student's quantile of the bands' coverage, by degrees of freedom from 1 on."""
    from scipy import stats

    return [float(stats.t.ppf(0.5 + COVERAGE / 2, n)) for n in range(1, MOST_SEEDS)]


def number(value: Any) -> float | int | None:
    """A number that JSON has, short; None for anything else."""
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
        return None
    return int(value) if float(value).is_integer() and abs(value) < 2**53 else float(f"{value:.{DIGITS}g}")
