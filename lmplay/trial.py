"""Is it real? The runs that answer it, in the order in which they are needed, and the answer.

A trial's design is written down before its first run. From the design and the results so far :func:`needed` tells which
runs come next; it is a function of these alone, so that any number of workers come to the same runs and the same
verdict. Runs are paired: in a pair, challenger and baseline have the same seed and read the same data in the same
order, which differs from pair to pair.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from .verdict import REAL, UNDECIDED, Verdict, correlation, judge, looks, t_interval, tokens_to_reach

LR_SEED = 1000  # learning rates are chosen on other seeds than the pairs'
RUNGS = (1 / 4, 1 / 2, 1.0)  # shares of the budget at which learning rates are tried; the choice is made at all of it,
KEPT = (3, 2)  # and so many go on from a rung: short runs say which are hopeless, and not which is best
FACTORS = (0.25, 0.5, 1.0, 2.0, 4.0)
WIDEST = 64.0  # no factor beyond it or its inverse is tried
CONTROL_SEEDS = 3
CONTROLS = ("params", "flops", "seconds")


@dataclass(frozen=True)
class Design:
    """What is fixed before the first run.

    The end point is the mean of the last `last` validations' losses, at the end of the schedule.
    """

    plan: str
    plan_fingerprint: str
    against: str
    arms: tuple[str, ...]
    level: float
    max_pairs: int
    smallest_effect: float
    tuned: bool
    controls: tuple[str, ...]
    tokens: int
    precision: str
    device: str
    data: str  # fingerprint of the prepared tokens
    sources: dict[str, str]  # of each arm and the baseline: a digest of its file
    last: int = 3

    @property
    def looks(self) -> list[int]:
        return looks(self.max_pairs, self.level, len(self.arms))

    @property
    def every(self) -> tuple[str, ...]:
        """The baseline and the arms."""
        return (self.against, *self.arms)


@dataclass(frozen=True)
class Unit:
    """One run: whose it is, its seed, the factor on the plan's learning rates, the share of the budget; and for a
    control what it matches ("params", "flops" or "seconds") of which arm."""

    role: str  # "lr", "pair" or "control"
    arm: str
    seed: int
    factor: float = 1.0
    share: float = 1.0
    match: str = ""
    of: str = ""

    @property
    def key(self) -> str:
        parts = [self.role, self.arm, f"s{self.seed}", f"lr{self.factor:g}", f"x{self.share:.6g}"]
        return " ".join([*parts, self.match, self.of]).strip()


@dataclass(frozen=True)
class Result:
    """What a run ended with. `loss` (nats per token) and `bpb` are end points; infinite where it diverged."""

    loss: float
    bpb: float
    tokens: list[float]
    losses: list[float]
    seconds: float
    flops: float
    folder: str


Results = Mapping[str, Result]  # by Unit.key


# ---------------------------------------------------------------- which runs are needed


def needed(design: Design, results: Results) -> list[Unit]:
    """The runs that the next decision waits for, those that are done left out; empty when the trial is over."""
    factors = {}
    if design.tuned:
        wanted: list[Unit] = []
        for arm in design.every:
            found = tuning(arm, results)
            if isinstance(found, list):
                wanted += found
            else:
                factors[arm] = found
        if wanted:
            return wanted
    for n in design.looks:
        active = [a for a in unsettled(design, results, factors, n) if not diverged(design, results, factors, a, n)]
        if not active:
            return []
        units = [pair_unit(a, s, factors) for s in range(n) for a in (design.against, *active)]
        missing = [u for u in units if u.key not in results]
        if missing:
            return missing
        verdicts = verdicts_at(design, results, factors, n, controlled=False)
        candidates = [a for a in active if verdicts[a].word == REAL]
        missing = [u for a in candidates for u in control_units(design, a, factors, results) if u.key not in results]
        if missing:
            return missing
    return []


def tuning(arm: str, results: Results) -> float | list[Unit]:
    """An arm's best factor on the learning rates, or the runs it still takes to find it.

    All factors get a quarter of the budget; while the best is at an end of the range, the range grows there. The three
    best get a half, the two best of these all of it, and the better one is taken (successive halving, Jamieson and
    Talwalkar 2016). The plan's own rate always goes on, in the last one's place: while all rates learn no more than how
    often each token comes, one that blows up later may lead by a hair.
    """
    factors = list(FACTORS)
    while True:
        units = [Unit("lr", arm, LR_SEED, f, RUNGS[0]) for f in sorted(factors)]
        if missing := [u for u in units if u.key not in results]:
            return missing
        units.sort(key=lambda u: (results[u.key].loss, u.factor))
        best = units[0].factor
        if best == max(factors) and best < WIDEST:
            factors.append(2 * best)
        elif best == min(factors) and best > 1 / WIDEST:
            factors.append(best / 2)
        else:
            break
    for share, kept in zip(RUNGS[1:], KEPT, strict=True):
        plans_own = [u for u in units[kept:] if u.factor == 1]
        units = [replace(u, share=share) for u in [*units[: kept - len(plans_own)], *plans_own]]
        if missing := [u for u in units if u.key not in results]:
            return missing
        units.sort(key=lambda u: (results[u.key].loss, u.factor))
    return units[0].factor


def pair_unit(arm: str, seed: int, factors: Mapping[str, float]) -> Unit:
    return Unit("pair", arm, seed, factors.get(arm, 1.0))


def control_units(design: Design, arm: str, factors: Mapping[str, float], results: Results) -> list[Unit]:
    """The baseline at the arm's parameters, its FLOPs, or its wall-clock time, for the first seeds.

    Equal time is given as a share of the budget: the median over the first look's pairs of the arm's seconds over the
    baseline's. Later pairs do not change it: or what was run would be another control.
    """
    units = []
    for what in design.controls:
        share = 1.0
        if what == "seconds":
            share = _median_ratio(design, arm, factors, results)
            if share <= 1:
                continue  # the arm is not slower: the pairs themselves are this control
        factor = factors.get(design.against, 1.0)
        units += [Unit("control", design.against, s, factor, share, what, arm) for s in range(CONTROL_SEEDS)]
    return units


def _median_ratio(design: Design, arm: str, factors: Mapping[str, float], results: Results) -> float:
    ratios = []
    for seed in range(design.looks[0]):
        mine, base = (results.get(pair_unit(a, seed, factors).key) for a in (arm, design.against))
        if mine and base and base.seconds:
            ratios.append(mine.seconds / base.seconds)
    return round(float(np.median(ratios)), 2) if ratios else 1.0


# ---------------------------------------------------------------- what they say


def pairs(design: Design, results: Results, factors: Mapping[str, float], arm: str) -> list[tuple[Result, Result]]:
    """(the arm's result, the baseline's) of each pair that is there, from seed 0 to the first that is missing."""
    found = []
    for seed in range(design.max_pairs):
        both = [results.get(pair_unit(a, seed, factors).key) for a in (arm, design.against)]
        if both[0] is None or both[1] is None:
            break
        found.append((both[0], both[1]))
    return found


def differences(design: Design, results: Results, factors: Mapping[str, float], arm: str) -> list[float]:
    """End points of the arm minus those of the baseline, up to the first pair of which a run diverged."""
    out = []
    for mine, base in pairs(design, results, factors, arm):
        if not (math.isfinite(mine.loss) and math.isfinite(base.loss)):
            break
        out.append(mine.loss - base.loss)
    return out


def diverged(design: Design, results: Results, factors: Mapping[str, float], arm: str, n: int) -> str:
    """What to say of the first of the first n pairs of which a run diverged; empty where none did."""
    for seed, both in enumerate(pairs(design, results, factors, arm)[:n]):
        for name, result in zip((arm, design.against), both, strict=True):
            if not math.isfinite(result.loss):
                return f"{name} diverged with seed {seed} ({_where(result)}): a lower learning rate?"
    return ""


def control_differences(
    design: Design, results: Results, factors: Mapping[str, float], arm: str
) -> dict[str, list[float]]:
    """By control: the arm's end points minus the matched baseline's, of the seeds that are there."""
    out: dict[str, list[float]] = {}
    for unit in control_units(design, arm, factors, results):
        control = results.get(unit.key)
        mine = results.get(pair_unit(arm, unit.seed, factors).key)
        if control and mine and math.isfinite(mine.loss) and math.isfinite(control.loss):
            out.setdefault(unit.match, []).append(mine.loss - control.loss)
    return out


def verdicts_at(
    design: Design, results: Results, factors: Mapping[str, float], n: int, controlled: bool = True
) -> dict[str, Verdict]:
    """The verdicts after n pairs; what was settled at an earlier look stays as it was then."""
    frozen: dict[str, Verdict] = {}
    data: dict[str, list[float]] = {}
    for look in design.looks:
        if look > n:
            break
        for arm in design.arms:
            if arm not in frozen:
                data[arm] = differences(design, results, factors, arm)[:look]
        controls = {a: control_differences(design, results, factors, a) for a in design.arms} if controlled else {}
        now = judge(data, design.smallest_effect, design.max_pairs, design.level, controls)
        if controlled:
            now = {a: _awaiting(v, design, results, factors, a) for a, v in now.items()}
        now |= {a: _ended(now[a], why) for a in design.arms if (why := diverged(design, results, factors, a, look))}
        frozen |= {a: v for a, v in now.items() if a not in frozen and v.settled}
        latest = {a: frozen.get(a, v) for a, v in now.items()}
    if n < design.looks[0]:
        data = {a: differences(design, results, factors, a)[:n] for a in design.arms}
        latest = judge(data, design.smallest_effect, design.max_pairs, design.level)
    for arm in design.arms:  # also of a pair since the last look: no further one is run
        if arm not in frozen and (why := diverged(design, results, factors, arm, n)):
            latest[arm] = _ended(latest[arm], why)
    return latest


def _ended(verdict: Verdict, why: str) -> Verdict:
    """Undecided, and further pairs would not change that."""
    return replace(verdict, word=UNDECIDED, why=why, more=None, closed=True)


def _awaiting(verdict: Verdict, design: Design, results: Results, factors: Mapping[str, float], arm: str) -> Verdict:
    """The verdict, but for a REAL whose controls are not all there."""
    missing = [u for u in control_units(design, arm, factors, results) if u.key not in results]
    if verdict.word != REAL:
        return verdict
    if missing:
        return replace(verdict, word=UNDECIDED, why=f"{len(missing)} runs of its controls are not done")
    lost = [u for u in control_units(design, arm, factors, results) if not math.isfinite(results[u.key].loss)]
    if lost:
        return _ended(verdict, f"the baseline of equal {lost[0].match} diverged with seed {lost[0].seed}")
    return verdict


def unsettled(design: Design, results: Results, factors: Mapping[str, float], n: int) -> list[str]:
    """The arms that still need the pairs of the look at n: those that no earlier look has settled."""
    earlier = [look for look in design.looks if look < n]
    if not earlier:
        return list(design.arms)
    before = verdicts_at(design, results, factors, earlier[-1])
    return [a for a in design.arms if not before[a].settled]


def factors_of(design: Design, results: Results) -> dict[str, float]:
    """The factors on the learning rates that were found, of the arms whose are."""
    if not design.tuned:
        return {}
    found = {arm: tuning(arm, results) for arm in design.every}
    return {arm: f for arm, f in found.items() if isinstance(f, float)}


def report(design: Design, results: Results) -> dict[str, Any]:
    """All that the results say so far, as JSON: verdicts, gains, ratios, noise, costs, and how rates were chosen."""
    factors = factors_of(design, results)
    ready = not design.tuned or len(factors) == len(design.every)
    done = min((len(pairs(design, results, factors, a)) for a in design.arms), default=0) if ready else 0
    most = max((len(pairs(design, results, factors, a)) for a in design.arms), default=0) if ready else 0
    found = verdicts_at(design, results, factors, most) if most else {}
    base = [results[pair_unit(design.against, s, factors).key] for s in range(most)] if most else []
    arms = {}
    for arm, verdict in found.items():
        if not verdict.pairs and not verdict.closed:
            continue
        both = pairs(design, results, factors, arm)[: verdict.pairs]
        fields = {k: _number(v) for k, v in asdict(verdict).items()}
        arms[arm] = {
            **fields, "tuned": design.tuned, "lr_factor": factors.get(arm, 1.0),
            **_beside(design, both), "gains": [b.loss - m.loss for m, b in both],
            "flops": float(np.median([b.flops for _, b in both])) if both else None,
            "controls": control_differences(design, results, factors, arm), "runs": [_where(m) for m, _ in both],
        }  # fmt: skip
    ended = [r.loss for r in base if math.isfinite(r.loss)]
    low, high = t_interval(ended)
    luck = (high - low) / 2 * math.sqrt(2)  # of the difference of two such means
    return {
        "design": asdict(design), "pairs": done, "arms": arms, "runs": [_where(r) for r in base],
        "lr_factor": factors.get(design.against, 1.0),
        "null": {"runs": len(ended), "half": _number(luck)},
        "sensitivity": sensitivity(design, results),
        "cost": {"runs": len(results), "hours": sum(r.seconds for r in results.values()) / 3600},
        "over": not needed(design, results),
    }  # fmt: skip


def _beside(design: Design, both: Sequence[tuple[Result, Result]]) -> dict[str, Any]:
    """Of an arm's pairs: bits per byte, paired and unpaired spread, and how much more the baseline needs."""
    if not both:
        nothing = ("gain_bpb", "tokens_ratio", "seconds_ratio", "flops_ratio", "correlation")
        lists = {key: [None, None] for key in ("gain_bpb_interval", "tokens_ratio_interval")}
        return dict.fromkeys((*nothing, "deviation_paired", "deviation_unpaired")) | lists
    mine, base = [m for m, _ in both], [b for _, b in both]
    apart = np.array([m.loss - b.loss for m, b in both])
    n = len(both)
    ends = [[r.loss for r in arm] for arm in (mine, base)]
    spread = {
        "deviation_paired": float(apart.std(ddof=1)) if n > 1 else None,
        "deviation_unpaired": float(np.sqrt(sum(np.var(e, ddof=1) for e in ends))) if n > 1 else None,
        "correlation": _number(correlation(*ends)),
    }  # fmt: skip
    bpb = [b.bpb - m.bpb for m, b in both]
    ratios = []
    for m, b in both:  # the baseline's tokens to the arm's end point, over the arm's own to the worse of the two
        target = max(m.loss, b.loss)
        own, other = tokens_to_reach(m.tokens, m.losses, target), tokens_to_reach(b.tokens, b.losses, target)
        ratios.append(other / own if math.isfinite(own) and math.isfinite(other) and own else math.nan)
    kept = [r for r in ratios if math.isfinite(r)]
    per_token = {
        "seconds": float(np.median([(m.seconds / m.tokens[-1]) / (b.seconds / b.tokens[-1]) for m, b in both])),
        "flops": float(np.median([m.flops / b.flops for m, b in both])),
    }
    ratio = float(np.median(kept)) if kept else None
    return {
        **spread, "gain_bpb": float(np.mean(bpb)), "gain_bpb_interval": list(_finite(t_interval(bpb))),
        "tokens_ratio": ratio, "tokens_ratio_interval": list(_finite(t_interval(kept))),
        "seconds_ratio": ratio / per_token["seconds"] if ratio else None,
        "flops_ratio": ratio / per_token["flops"] if ratio else None,
    }  # fmt: skip


def _where(result: Result) -> str:
    """A run's folder below --out."""
    return "/".join(result.folder.replace("\\", "/").split("/")[-2:])


def over_sizes(told: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """By arm, how the gain changes as models grow: does it shrink?

    A seed's pairs at all sizes share their first numbers and data, so each seed gives a slope of its own: least squares
    of its gains over the logarithm of the baseline's FLOPs, in nats for twice the compute. Of these Student's interval,
    at the trials' level, over the seeds that every size has.
    """
    fits: dict[str, dict[str, Any]] = {}
    level = told[0]["design"]["level"]
    for arm in told[0]["design"]["arms"]:
        sizes = [t["arms"][arm] for t in told if arm in t["arms"] and t["arms"][arm]["gains"]]
        points = [(s["flops"], float(np.mean(s["gains"]))) for s in sizes]
        seeds = min((len(s["gains"]) for s in sizes), default=0)
        if len(sizes) < 2 or seeds < 2:
            fits[arm] = {"slope": None, "interval": [None, None], "points": points, "sentence": "too few pairs to fit"}
            continue
        x = np.log2([s["flops"] for s in sizes])
        slopes = [float(np.polyfit(x, [s["gains"][seed] for s in sizes], 1)[0]) for seed in range(seeds)]
        mean, (low, high) = float(np.mean(slopes)), t_interval(slopes, 1 - level)
        what = "gain" if np.mean([g for _, g in points]) >= 0 else "harm"
        up, down = ("grows", "shrinks") if what == "gain" else ("shrinks", "grows")
        word = down if high < 0 else up if low > 0 else "is not shown to shrink or grow"
        fits[arm] = {
            "slope": mean, "interval": [low, high], "points": points,
            "sentence": f"the {what} {word}: {mean:+.4f} nats of gain for twice the compute "
            f"({low:+.4f} to {high:+.4f}, {seeds} seeds)",
        }  # fmt: skip
    return fits


def sensitivity(design: Design, results: Results) -> dict[str, list[tuple[float, float, float | None]]]:
    """By arm: (share of the budget, factor, end point) of every learning rate that was tried."""
    out: dict[str, list[tuple[float, float, float | None]]] = {arm: [] for arm in design.every}
    for key, result in results.items():
        role, arm, _, factor, share = key.split(" ")[:5]
        if role == "lr":
            out[arm].append((float(share[1:]), float(factor[2:]), _number(result.loss)))
    return {arm: sorted(v, key=lambda x: x[:2]) for arm, v in out.items()}


def _number(x: Any) -> Any:
    """JSON has no infinity: None."""
    return None if isinstance(x, float) and not math.isfinite(x) else x


def _finite(ends: tuple[float, float]) -> tuple[float | None, float | None]:
    return _number(ends[0]), _number(ends[1])
