"""What a trial's results say, and which runs it needs next.

The state is a function of the fixed design and the results alone. So any number of workers come to
the same runs and the same verdict. The idea and the baseline of a pair have the same seed and read
the same data in the same order, which differs from pair to pair.

One module, because the next runs depend on the verdicts so far and the verdicts on the runs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import cached_property
from typing import Any

import numpy as np

from .design import FixedDesign, Result, Results, Unit
from .statistics import (
    REAL,
    UNDECIDED,
    Verdict,
    correlation,
    judge,
    student,
    t_interval,
    tokens_to_reach,
)
from .tuning import SEED, parsed, tune_knobs

LR_SEED = SEED
LR_MULTIPLIERS = (0.25, 0.5, 1.0, 2.0, 4.0)
MAX_LR_MULTIPLIER = 64.0
RUNGS = (1 / 4, 1 / 2, 1.0)  # shares of the budget at which learning rates are tried
KEPT = (3, 2)  # rates that continue after the first and the second rung
CONTROL_SEEDS = 3
SCREENING_PAIRS = 3
SCREENING_COVERAGE = 0.95
COST_SHARE = 0.05  # of the budget, in which the cost of a token is measured


def tuning(arm: str, results: Results, budget: float = 1.0) -> float | list[Unit]:
    """Return an arm's best multiplier of the learning rates, or the runs that are missing.

    All multipliers get a quarter of the budget; while the best is at an end of the range, the range
    grows there. The three best get half of the budget, the two best of these all of it, and the
    better one wins (successive halving, Jamieson and Talwalkar 2016). The plan's own rate always
    continues, if need be instead of the last one: as long as all rates learn no more than token
    frequencies, one that diverges later may lead by a hair.

    Args:
        budget: the arm's share of the trial's budget.
    """
    multipliers = list(LR_MULTIPLIERS)
    while True:
        units = [Unit("lr", arm, LR_SEED, m, budget * RUNGS[0]) for m in sorted(multipliers)]
        if missing := [u for u in units if u.key not in results]:
            return missing
        units.sort(key=lambda u: (results[u.key].loss, u.lr_multiplier))
        best = units[0].lr_multiplier
        if best == max(multipliers) and best < MAX_LR_MULTIPLIER:
            multipliers.append(2 * best)
        elif best == min(multipliers) and best > 1 / MAX_LR_MULTIPLIER:
            multipliers.append(best / 2)
        else:
            break
    for share, kept in zip(RUNGS[1:], KEPT, strict=True):
        plans_own = [u for u in units[kept:] if u.lr_multiplier == 1]
        units = [
            replace(u, share=budget * share) for u in [*units[: kept - len(plans_own)], *plans_own]
        ]
        if missing := [u for u in units if u.key not in results]:
            return missing
        units.sort(key=lambda u: (results[u.key].loss, u.lr_multiplier))
    return units[0].lr_multiplier


class TrialState:
    """The fixed design and the results so far.

    certificate: what is known about the arena, for the report.
    """

    def __init__(
        self, design: FixedDesign, results: Results, certificate: Mapping[str, Any] | None = None
    ):
        self.design = design
        self.results = results
        self.certificate = certificate or {}
        self._pairs: dict[str, list[tuple[Result, Result]]] = {}

    @cached_property
    def lr_multipliers(self) -> dict[str, float]:
        """The chosen multiplier of the learning rates, for each arm whose tuning is done."""
        if self.design.knobs:
            return {}
        found = self._tuned()
        return {arm: value for arm, value in found.items() if isinstance(value, float)}

    @cached_property
    def settings(self) -> dict[str, str]:
        """The chosen settings of the knobs, for each arm whose tuning is done."""
        if not self.design.knobs:
            return {}
        return {arm: value for arm, value in self._tuned().items() if isinstance(value, str)}

    def _tuned(self) -> dict[str, float | str | list[Unit]]:
        """Return for each arm what was chosen, or the runs that are missing."""
        design = self.design
        found: dict[str, float | str | list[Unit]] = {}
        if self.shares is None or not design.tuned:
            return found
        for arm, share in self.shares.items():
            if design.knobs:
                found[arm] = tune_knobs(
                    arm, design.knobs[arm], design.integers, design.tune_tries, share, self.results
                )
            else:
                found[arm] = tuning(arm, self.results, share)
        return found

    @property
    def is_tuned(self) -> bool:
        """Whether the settings of all arms are chosen."""
        every = len(self.design.every_arm)
        chosen = self.settings if self.design.knobs else self.lr_multipliers
        return self.shares is not None and (not self.design.tuned or len(chosen) == every)

    @cached_property
    def shares(self) -> dict[str, float] | None:
        """Each arm's share of the budget in tokens; None until the cost of a token is measured."""
        design = self.design
        if design.budget == "tokens":
            return dict.fromkeys(design.every_arm, 1.0)
        if self._missing(self._cost_units()):
            return None
        costs = {}
        for unit in self._cost_units():
            result = self.results[unit.key]
            if not result.tokens:  # it diverged, and its pairs will as well
                return dict.fromkeys(design.every_arm, 1.0)
            spent = result.flops if design.budget == "flops" else result.seconds
            costs[unit.arm] = spent / result.tokens[-1]
        base = costs[design.against]
        return {arm: float(f"{base / cost:.3g}") for arm, cost in costs.items()}

    def _cost_units(self) -> list[Unit]:
        return [Unit("cost", arm, LR_SEED, share=COST_SHARE) for arm in self.design.every_arm]

    # ---------------------------------------------------------------- which runs are needed

    def needed(self) -> list[Unit]:
        """Return the missing runs of the next decision; [] when the trial is over."""
        design = self.design
        if self.shares is None:
            return self._missing(self._cost_units())
        if not self.is_tuned:
            found = self._tuned().values()
            return [unit for units in found if isinstance(units, list) for unit in units]
        if design.screen:
            units = [
                self.pair_unit(arm, seed)
                for seed in range(SCREENING_PAIRS)
                for arm in design.every_arm
            ]
            if missing := self._missing(units):
                return missing
        for n in design.looks:
            active = [a for a in self.unsettled(n) if not self.reason_to_stop(a, n)]
            if not active:
                return []
            arms = (design.against, *active)
            units = [self.pair_unit(arm, seed) for seed in range(n) for arm in arms]
            if missing := self._missing(units):
                return missing
            verdicts = self.verdicts_at(n, controlled=False)
            candidates = [a for a in active if verdicts[a].word == REAL]
            units = [unit for arm in candidates for unit in self.control_units(arm)]
            if missing := self._missing(units):
                return missing
        return []

    def _missing(self, units: Sequence[Unit]) -> list[Unit]:
        return [unit for unit in units if unit.key not in self.results]

    def pair_unit(self, arm: str, seed: int) -> Unit:
        """Return an arm's run of the pair with this seed."""
        return Unit(
            "pair",
            arm,
            seed,
            self.lr_multipliers.get(arm, 1.0),
            (self.shares or {}).get(arm, 1.0),
            settings=self.settings.get(arm, ""),
        )

    def control_units(self, arm: str) -> list[Unit]:
        """Return the runs of the arm's controls: the baseline at its parameters, FLOPs or seconds.

        Equal time is a share of the budget: the median ratio of the first look's pairs. Later pairs
        do not change it, because that would be another control. An arm that is not slower needs
        none: its pairs are that control.
        """
        units = []
        against = self.design.against
        base = self.pair_unit(against, 0)
        for what in self.design.controls:
            share = self._median_ratio(arm) if what == "seconds" else 1.0
            if what == "seconds" and share <= 1:
                continue
            units += [
                replace(base, role="control", seed=seed, share=share, match=what, of=arm)
                for seed in range(CONTROL_SEEDS)
            ]
        return units

    def _median_ratio(self, arm: str) -> float:
        """Return the arm's training time divided by the baseline's."""
        ratios = []
        for seed in range(self.design.looks[0]):
            mine = self.results.get(self.pair_unit(arm, seed).key)
            base = self.results.get(self.pair_unit(self.design.against, seed).key)
            if mine and base and base.seconds:
                ratios.append(mine.seconds / base.seconds)
        return round(float(np.median(ratios)), 2) if ratios else 1.0

    # ---------------------------------------------------------------- what the results say

    def pairs(self, arm: str) -> list[tuple[Result, Result]]:
        """Return (the arm's result, the baseline's) from seed 0 to the first missing pair."""
        if arm in self._pairs:  # asked for again and again in one look
            return self._pairs[arm]
        found = self._pairs[arm] = []
        for seed in range(self.design.max_pairs):
            mine = self.results.get(self.pair_unit(arm, seed).key)
            base = self.results.get(self.pair_unit(self.design.against, seed).key)
            if mine is None or base is None:
                break
            found.append((mine, base))
        return found

    def differences(self, arm: str) -> list[float]:
        """Return the arm's end points minus the baseline's, up to the first diverged pair."""
        out = []
        for mine, base in self.pairs(arm):
            if not (math.isfinite(mine.loss) and math.isfinite(base.loss)):
                break
            out.append(mine.loss - base.loss)
        return out

    def divergence_message(self, arm: str, n: int) -> str:
        """Message for the first diverged of the first n pairs; "" if there is none."""
        for seed, both in enumerate(self.pairs(arm)[:n]):
            for name, result in zip((arm, self.design.against), both, strict=True):
                if not math.isfinite(result.loss):
                    folder = _short_folder(result)
                    return f"{name} diverged with seed {seed} ({folder}): try a lower learning rate"
        return ""

    def reason_to_stop(self, arm: str, n: int) -> str:
        """Return why an arm gets no more pairs after n of them; "" if nothing speaks against it."""
        return self.divergence_message(arm, n) or self.screened_out(arm)

    def screened_out(self, arm: str) -> str:
        """Return why the first pairs show that an arm is no better; "" if they do not.

        Only pairs are saved: an arm that is dropped cannot become REAL, so no error is added. The
        spread is pooled over the arms, and at least that of the plan's certificate.
        """
        design = self.design
        first = {a: self.differences(a)[:SCREENING_PAIRS] for a in design.arms}
        if not design.screen or any(len(d) < SCREENING_PAIRS for d in first.values()):
            return ""
        spread = math.sqrt(np.mean([np.var(d, ddof=1) for d in first.values()]))
        spread = max(spread, design.noise or 0.0)
        freedom = len(first) * (SCREENING_PAIRS - 1)
        reach = student(SCREENING_COVERAGE, freedom) * spread / math.sqrt(SCREENING_PAIRS)
        most = reach - float(np.mean(first[arm]))
        if most >= design.smallest_effect:
            return ""
        return (
            f"screened out: after {SCREENING_PAIRS} pairs its gain is below {most:.4f} nats "
            f"({SCREENING_COVERAGE:.0%})"
        )

    def control_differences(self, arm: str) -> dict[str, list[float]]:
        """Return the arm's end points minus the matched baseline's, by control."""
        out: dict[str, list[float]] = {}
        for unit in self.control_units(arm):
            control = self.results.get(unit.key)
            mine = self.results.get(self.pair_unit(arm, unit.seed).key)
            if control and mine and math.isfinite(mine.loss) and math.isfinite(control.loss):
                out.setdefault(unit.match, []).append(mine.loss - control.loss)
        return out

    def verdicts_at(self, n: int, controlled: bool = True) -> dict[str, Verdict]:
        """Return the verdicts after n pairs. A verdict that a look settled does not change later.

        Args:
            controlled: whether a REAL needs its controls.
        """
        design = self.design
        settled: dict[str, Verdict] = {}
        latest: dict[str, Verdict] = {}
        data: dict[str, list[float]] = {}
        for look in design.looks:
            if look > n:
                break
            for arm in design.arms:
                if arm not in settled:
                    data[arm] = self.differences(arm)[:look]
            now = self._judge(data, controlled)
            for arm in design.arms:
                if why := self.reason_to_stop(arm, look):
                    now[arm] = _closed(now[arm], why)
            settled |= {a: v for a, v in now.items() if a not in settled and v.settled}
            latest = {a: settled.get(a, v) for a, v in now.items()}
        if n < design.looks[0]:
            data = {a: self.differences(a)[:n] for a in design.arms}
            latest = judge(data, design.smallest_effect, design.max_pairs, design.level)
        for arm in design.arms:  # a pair since the last look may have diverged
            if arm not in settled and (why := self.reason_to_stop(arm, n)):
                latest[arm] = _closed(latest[arm], why)
        return latest

    def _judge(self, data: Mapping[str, Sequence[float]], controlled: bool) -> dict[str, Verdict]:
        design = self.design
        effect = design.smallest_effect
        if not controlled:
            return judge(data, effect, design.max_pairs, design.level)
        controls = {arm: self.control_differences(arm) for arm in design.arms}
        found = judge(data, effect, design.max_pairs, design.level, controls)
        return {arm: self._await_controls(verdict, arm) for arm, verdict in found.items()}

    def _await_controls(self, verdict: Verdict, arm: str) -> Verdict:
        """Return the verdict; a REAL stays UNDECIDED until its controls are done."""
        if verdict.word != REAL:
            return verdict
        units = self.control_units(arm)
        if missing := self._missing(units):
            why = f"{len(missing)} runs of its controls are not done"
            return replace(verdict, word=UNDECIDED, why=why)
        for unit in units:
            if not math.isfinite(self.results[unit.key].loss):
                why = f"the baseline of equal {unit.match} diverged with seed {unit.seed}"
                return _closed(verdict, why)
        return verdict

    def unsettled(self, n: int) -> list[str]:
        """Return the arms that need the pairs of the look at n."""
        earlier = [look for look in self.design.looks if look < n]
        if not earlier:
            return list(self.design.arms)
        before = self.verdicts_at(earlier[-1])
        return [arm for arm in self.design.arms if not before[arm].settled]

    # ---------------------------------------------------------------- the report

    def report(self) -> dict[str, Any]:
        """Return everything the results say so far, as JSON."""
        design = self.design
        counts = [len(self.pairs(a)) for a in design.arms] if self.is_tuned else [0]
        most = max(counts)
        verdicts = self.verdicts_at(most) if most else {}
        base_units = [self.pair_unit(design.against, seed) for seed in range(most)]
        base = [self.results[unit.key] for unit in base_units]
        arms = {
            arm: self._report_arm(arm, verdict)
            for arm, verdict in verdicts.items()
            if verdict.pairs or verdict.closed
        }
        ended = [r.loss for r in base if math.isfinite(r.loss)]
        low, high = t_interval(ended)
        luck = (high - low) / 2 * math.sqrt(2)  # of the difference of two such means
        hours = sum(r.seconds for r in self.results.values()) / 3600
        return {
            "design": asdict(design),
            "pairs": min(counts, default=0),
            "arms": arms,
            "runs": [_short_folder(r) for r in base],
            "lr_multiplier": self.lr_multipliers.get(design.against, 1.0),
            "null": {"runs": len(ended), "half": _finite(luck)},
            "settings": self.settings.get(design.against, ""),
            "sensitivity": self.sensitivity(),
            "knobs": self.knob_tries(),
            "cost": {"runs": len(self.results), "hours": hours},
            "over": not self.needed(),
            "certificate": dict(self.certificate),
        }

    def _report_arm(self, arm: str, verdict: Verdict) -> dict[str, Any]:
        both = self.pairs(arm)[: verdict.pairs]
        return {
            **{key: _finite(value) for key, value in asdict(verdict).items()},
            "tuned": self.design.tuned,
            "lr_multiplier": self.lr_multipliers.get(arm, 1.0),
            "settings": self.settings.get(arm, ""),
            "share": (self.shares or {}).get(arm, 1.0),
            **_comparison(both),
            "gains": [b.loss - m.loss for m, b in both],
            "flops": float(np.median([b.flops for _, b in both])) if both else None,
            "controls": self.control_differences(arm),
            "runs": [_short_folder(m) for m, _ in both],
        }

    def sensitivity(self) -> dict[str, list[tuple[float, float, float | None]]]:
        """Return, by arm, (share, multiplier, end point) of every learning rate that was tried."""
        out: dict[str, list[tuple[float, float, float | None]]] = {}
        for arm in self.design.every_arm:
            out[arm] = []
        for key, result in self.results.items():
            role, arm, _, multiplier, share = key.split(" ")[:5]
            if role == "lr":
                out[arm].append((float(share[1:]), float(multiplier[2:]), _finite(result.loss)))
        return {arm: sorted(tries, key=lambda t: t[:2]) for arm, tries in out.items()}

    def knob_tries(self) -> dict[str, list[tuple[dict[str, float], float | None]]]:
        """Return, by arm, (values of the knobs, end point) of every try; no values: its own."""
        out: dict[str, list[tuple[dict[str, float], float | None]]] = {}
        for key, result in self.results.items():
            role, arm, *rest = key.split(" ")
            if role == "knobs":
                text = rest[-1] if "=" in rest[-1] else ""
                values = {k: float(v) for k, v in parsed(text).items()}
                out.setdefault(arm, []).append((values, _finite(result.loss)))
        return out


def _closed(verdict: Verdict, why: str) -> Verdict:
    """Return UNDECIDED, which more pairs would not change."""
    return replace(verdict, word=UNDECIDED, why=why, more=None, closed=True)


def _comparison(both: Sequence[tuple[Result, Result]]) -> dict[str, Any]:
    """Return an arm's bits per byte, spread, and how many tokens the baseline needs for its loss.

    The ratio of tokens is of each pair: the baseline's tokens down to the worse of both end points,
    divided by the arm's.
    """
    if not both:
        numbers = ("gain_bpb", "tokens_ratio", "seconds_ratio", "flops_ratio", "correlation")
        spreads = ("deviation_paired", "deviation_unpaired")
        intervals = {key: [None, None] for key in ("gain_bpb_interval", "tokens_ratio_interval")}
        return dict.fromkeys((*numbers, *spreads)) | intervals
    mine = [m for m, _ in both]
    base = [b for _, b in both]
    differences = np.array([m.loss - b.loss for m, b in both])
    ends = [[r.loss for r in arm] for arm in (mine, base)]
    several = len(both) > 1
    paired = float(differences.std(ddof=1)) if several else None
    unpaired = float(np.sqrt(sum(np.var(e, ddof=1) for e in ends))) if several else None
    bpb = [b.bpb - m.bpb for m, b in both]
    ratios = []
    for m, b in both:
        target = max(m.loss, b.loss)
        own = tokens_to_reach(m.tokens, m.losses, target)
        other = tokens_to_reach(b.tokens, b.losses, target)
        if math.isfinite(own) and math.isfinite(other) and own:
            ratios.append(other / own)
    seconds = [(m.seconds / m.tokens[-1]) / (b.seconds / b.tokens[-1]) for m, b in both]
    flops = [m.flops / b.flops for m, b in both]
    ratio = float(np.median(ratios)) if ratios else None
    return {
        "deviation_paired": paired,
        "deviation_unpaired": unpaired,
        "correlation": _finite(correlation(*ends)),
        "gain_bpb": _finite(float(np.mean(bpb))),
        "gain_bpb_interval": [_finite(end) for end in t_interval(bpb)],
        "tokens_ratio": ratio,
        "tokens_ratio_interval": [_finite(end) for end in t_interval(ratios)],
        "seconds_ratio": ratio / float(np.median(seconds)) if ratio else None,
        "flops_ratio": ratio / float(np.median(flops)) if ratio else None,
    }


def _short_folder(result: Result) -> str:
    """Return a run's folder relative to --out."""
    return "/".join(result.folder.replace("\\", "/").split("/")[-2:])


def _finite(x: Any) -> Any:
    """Return None for infinity and NaN, which JSON cannot hold."""
    return None if isinstance(x, float) and not math.isfinite(x) else x
