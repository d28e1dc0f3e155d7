"""Whether gains in one arena say something about the next larger one."""

from __future__ import annotations

import math
from pathlib import Path
from statistics import NormalDist

import numpy as np

from ..files import read_json
from .certificate import LineRecord

FEWEST_IDEAS = 8
AGREEMENT = 0.5  # rank correlation from which the smaller arena is worth asking first


def transfer(out: Path, plan: str, larger: Path | None) -> LineRecord:
    """Return the line on transfer, from the trials below `out` on both plans."""
    if larger is None:
        return LineRecord(passed=None, sentence="not measured: --larger PLAN names the next arena")
    gains = [judged(out, name) for name in (plan, larger.stem)]
    common = sorted(set(gains[0]) & set(gains[1]))
    if len(common) < FEWEST_IDEAS:
        return LineRecord(
            passed=None,
            sentence=f"not measured: {len(common)} ideas are judged here and in {larger.stem}, of "
            f"{FEWEST_IDEAS}",
        )
    here, there = ([g[idea] for idea in common] for g in gains)
    correlation = rank_correlation(here, there)
    low, high = correlation_interval(correlation, len(common))
    return LineRecord(
        passed=correlation >= AGREEMENT,
        sentence=f"the gains of {len(common)} ideas here and in {larger.stem} have a rank "
        f"correlation of {correlation:+.2f} (95 %: {low:+.2f} to {high:+.2f})",
        interval=[low, high],
        ideas=common,
        here=here,
        there=there,
    )


def judged(out: Path, plan: str) -> dict[str, float]:
    """Return the gains (nats per token) that trials on a plan found, by "arm against baseline in
    context". Trials that are not over do not count."""
    found: dict[str, float] = {}
    for path in sorted((out / "trials").glob("*/trial.json")):
        try:
            report = read_json(path)
            design = report["design"]
            if design["plan"] != plan or not report["over"]:
                continue
            where = f" in {design['context']}" if design.get("context") else ""
            for arm, verdict in report["arms"].items():
                if verdict["gain"] is not None:
                    found[f"{arm} against {design['against']}{where}"] = float(verdict["gain"])
        except (OSError, ValueError, KeyError, TypeError):
            continue  # a damaged report of one trial, which lmp_trial and the page name
    return found


def rank_correlation(a: list[float], b: list[float]) -> float:
    """Return Spearman's rank correlation."""
    from scipy import stats

    return float(np.nan_to_num(stats.spearmanr(a, b).statistic))


def correlation_interval(correlation: float, n: int, level: float = 0.95) -> tuple[float, float]:
    """Return an interval for Spearman's rank correlation of n > 3 points.

    Bonett and Wright 2000 (Psychometrika 65), eq. 3: normal in atanh of the correlation, with
    variance (1 + correlation² / 2) / (n - 3).
    """
    z = math.atanh(max(-1 + 1e-9, min(1 - 1e-9, correlation)))
    half = NormalDist().inv_cdf((1 + level) / 2) * math.sqrt((1 + correlation**2 / 2) / (n - 3))
    return math.tanh(z - half), math.tanh(z + half)
