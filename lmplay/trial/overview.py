"""What several reports of one question say together: over model sizes, and over contexts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .statistics import UNDECIDED, t_interval


def over_sizes(reports: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return, by arm, how the gain changes as models grow.

    A seed's pairs at all sizes share their first weights and their data, so each seed gives a
    slope of its own: least squares of its gains over log2 of the baseline's FLOPs, in nats for
    twice the compute. The interval is Student's, at the trials' level, over the seeds that every
    size has.
    """
    fits: dict[str, dict[str, Any]] = {}
    level = reports[0]["design"]["level"]
    for arm in reports[0]["design"]["arms"]:
        sizes = [r["arms"][arm] for r in reports if arm in r["arms"] and r["arms"][arm]["gains"]]
        points = [(s["flops"], float(np.mean(s["gains"]))) for s in sizes]
        seeds = min((len(s["gains"]) for s in sizes), default=0)
        if len(sizes) < 2 or seeds < 2:
            fits[arm] = {
                "slope": None,
                "interval": [None, None],
                "points": points,
                "sentence": "too few pairs to fit",
            }
            continue
        x = np.log2([s["flops"] for s in sizes])
        slopes = [
            float(np.polyfit(x, [s["gains"][seed] for s in sizes], 1)[0]) for seed in range(seeds)
        ]
        mean = float(np.mean(slopes))
        low, high = t_interval(slopes, 1 - level)
        what = "gain" if np.mean([g for _, g in points]) >= 0 else "harm"
        up, down = ("grows", "shrinks") if what == "gain" else ("shrinks", "grows")
        word = down if high < 0 else up if low > 0 else "is not shown to shrink or grow"
        fits[arm] = {
            "slope": mean,
            "interval": [low, high],
            "points": points,
            "sentence": f"the {what} {word}: {mean:+.4f} nats of gain for twice the compute "
            f"({low:+.4f} to {high:+.4f}, {seeds} seeds)",
        }
    return fits


def over_contexts(reports: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return, by arm, its verdict in each context, and whether it is ROBUST: REAL in all of them,
    HARMFUL in all or WITHIN NOISE in all."""
    arms = dict.fromkeys(arm for report in reports.values() for arm in report["arms"])
    panel: dict[str, dict[str, Any]] = {}
    for arm in arms:
        words = {name: r["arms"][arm]["word"] for name, r in reports.items() if arm in r["arms"]}
        robust = (
            len(words) > 1 and len(set(words.values())) == 1 and UNDECIDED not in words.values()
        )
        if robust:
            sentence = f"ROBUST: {next(iter(words.values()))} in {' and '.join(words)}"
        else:
            sentence = ", ".join(f"{word} in {name}" for name, word in words.items())
        panel[arm] = {"words": words, "robust": robust, "sentence": sentence}
    return panel
