"""Is a difference real? What paired runs allow to say, and when enough of them are there.

Differences are of one pair each: the challenger's end point minus the baseline's, with the same
data in the same order and the same initial numbers. Below zero is better.

The test is the exact sign-flip permutation test: if nothing differs, each difference could as well
have had the other sign. It is made at a few looks, fixed before the first run, and the level is
spent over them so that all looks together are wrong no more often than it says (Lan and DeMets
1983; by the union bound, as p-values of this test are not normal).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

REAL = "REAL"
WITHIN_NOISE = "WITHIN NOISE"
HARMFUL = "HARMFUL"
UNDECIDED = "UNDECIDED"
LEVEL = 0.01
MOST_PAIRS = 40  # more would take gigabytes to try all signs of
RESAMPLES = 9999


def fewest(level: float = LEVEL, arms: int = 1, spent: float = 0.5) -> int:
    """The fewest pairs that can be significant: the smallest p-value, 2 / 2^n, times the arms
    (Holm), is no more than what a look may spend of the level: a half at the first of several, all
    of it at an only one. Nine and eight for one arm at .01."""
    return math.ceil(math.log2(2 * arms / (spent * level)))


def looks(max_pairs: int, level: float = LEVEL, arms: int = 1) -> list[int]:
    """After how many pairs the test is made: the fewest that can show anything, and then each time
    a third more.

    Where there may be no more pairs than that, the only look is at the end.
    """
    found = [min(fewest(level, arms), max_pairs)]
    while found[-1] < max_pairs:
        found.append(min(max_pairs, math.ceil(found[-1] * 4 / 3)))
    return found


def spending(number_of_looks: int, level: float = LEVEL) -> list[float]:
    """The level of each look; they sum to `level`. The first has half of it, the others share the
    rest alike."""
    if number_of_looks == 1:
        return [level]
    return [level / 2] + [level / 2 / (number_of_looks - 1)] * (number_of_looks - 1)


def sign_flip(differences: Sequence[float]) -> float:
    """The two-sided p-value of the exact sign-flip test of mean 0.

    All 2^n signs are tried, by meeting in the middle: n up to 30 takes moments, 40 some seconds.
    """
    d = np.asarray(differences, float)
    if not len(d):
        return 1.0
    observed = abs(d.sum())
    halves = []
    for part in (d[: len(d) // 2], d[len(d) // 2 :]):
        sums = np.zeros(1)
        for x in part:
            sums = np.concatenate([sums + x, sums - x])
        halves.append(np.sort(sums))
    # sums in another order differ in their last digits
    tolerance = 1e-12 * max(1.0, np.abs(d).sum())
    above = len(halves[0]) - np.searchsorted(
        halves[0], observed - tolerance - halves[1], side="left"
    )
    below = np.searchsorted(halves[0], -observed + tolerance - halves[1], side="right")
    return min(1.0, float((above.sum() + below.sum()) / 2.0 ** len(d)))


def bca(differences: Sequence[float], coverage: float = 0.99, seed: int = 0) -> tuple[float, float]:
    """The bias-corrected and accelerated bootstrap interval of the mean (Efron 1987, section 3).

    With fewer than two values, or values that are all equal, there is no spread to resample: both
    ends are the mean, or infinite for a single value.
    """
    return _bca(tuple(float(d) for d in differences), coverage, seed)


@functools.lru_cache(maxsize=4096)  # a trial asks for the intervals of its past looks at each look
def _bca(differences: tuple[float, ...], coverage: float, seed: int) -> tuple[float, float]:
    from scipy import stats

    d = np.array(differences)
    if len(d) < 2:
        return -math.inf, math.inf
    if np.ptp(d) == 0:
        return float(d[0]), float(d[0])
    random = np.random.default_rng(seed)
    found = stats.bootstrap(
        (d,),
        np.mean,
        confidence_level=coverage,
        n_resamples=RESAMPLES,
        method="BCa",
        rng=random,
        vectorized=True,
    ).confidence_interval
    return float(found.low), float(found.high)


def student(coverage: float, freedom: int) -> float:
    """Student's one-sided quantile."""
    from scipy import stats

    return float(stats.t.ppf(coverage, freedom))


def t_interval(values: Sequence[float], coverage: float = 0.99) -> tuple[float, float]:
    """Student's interval of the mean."""
    from scipy import stats

    v = np.asarray(values, float)
    if len(v) < 2:
        return -math.inf, math.inf
    half = float(stats.t.ppf(0.5 + coverage / 2, len(v) - 1)) * v.std(ddof=1) / math.sqrt(len(v))
    return float(v.mean() - half), float(v.mean() + half)


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Holm's step-down adjusted p-values (Holm 1979): with several arms, of all of them
    together."""
    ordered = sorted(p_values, key=lambda k: p_values[k])
    adjusted = {}
    least = 0.0
    for i, name in enumerate(ordered):
        least = max(least, min(1.0, (len(ordered) - i) * p_values[name]))
        adjusted[name] = least
    return adjusted


@dataclass(frozen=True)
class Verdict:
    """What was found about one arm.

    gain is the mean difference's negative, in nats per token: above zero is better. `p` is
    Holm-adjusted, `level` what the look at hand may spend. `more` is how many further pairs an
    undecided arm would take at the spread seen, None where no number would be enough to promise
    anything.
    """

    word: str
    pairs: int
    gain: float
    low: float
    high: float
    p: float
    level: float
    why: str
    more: int | None = None
    closed: bool = False  # undecided, and more pairs would not change that

    @property
    def settled(self) -> bool:
        return self.word != UNDECIDED or self.closed


def judge(
    differences: Mapping[str, Sequence[float]],
    smallest_effect: float,
    max_pairs: int,
    level: float = LEVEL,
    controls: Mapping[str, Mapping[str, Sequence[float]]] | None = None,
) -> dict[str, Verdict]:
    """The verdict on each arm, from the differences of its pairs so far, in the order of their
    seeds.

    An arm is judged by its first pairs up to the last look that it has reached; what came after is
    not looked at.

    Args:
        smallest_effect: nats per token; an effect smaller than it is of no interest.
        controls: by arm and control, the differences to matched baselines: REAL needs the same sign
            under each.
    """
    plan = looks(max_pairs, level, len(differences))
    spend = spending(len(plan), level)
    reached = {
        arm: [i for i, n in enumerate(plan) if n <= len(d)] for arm, d in differences.items()
    }
    seen = {
        arm: list(d)[: plan[at[-1]]] if (at := reached[arm]) else list(d)
        for arm, d in differences.items()
    }
    adjusted = holm({arm: sign_flip(d) for arm, d in seen.items()})
    return {
        arm: _judge_one(
            d,
            adjusted[arm],
            spend[reached[arm][-1]] if reached[arm] else 0.0,
            smallest_effect,
            level,
            (controls or {}).get(arm, {}),
            plan,
            len(differences),
        )
        for arm, d in seen.items()
    }


def _judge_one(
    d: list[float],
    p: float,
    allowed: float,
    smallest: float,
    level: float,
    controls: Mapping[str, Sequence[float]],
    plan: list[int],
    arms: int,
) -> Verdict:
    low, high = bca(d, 1 - level)
    mean = float(np.mean(d)) if d else math.nan
    contrary = [
        name for name, c in controls.items() if len(c) and np.sign(np.mean(c)) != np.sign(mean)
    ]

    def verdict(word: str, why: str, more: int | None = None, closed: bool = False) -> Verdict:
        return Verdict(word, len(d), -mean, -high, -low, p, allowed, why, more, closed)

    if not allowed:
        return verdict(UNDECIDED, f"the first look is after {plan[0]} pairs", plan[0] - len(d))
    significant = p <= allowed and (low > 0 or high < 0)
    if significant and mean > 0:
        return verdict(HARMFUL, "the loss is higher")
    if significant and not contrary:
        return verdict(
            REAL, "the loss is lower" + (", under every control as well" if controls else "")
        )
    if significant:
        why = f"the loss is lower, but not than the baseline of equal {' and '.join(contrary)}"
        return verdict(UNDECIDED, why, closed=True)
    # Two one-sided tests by Student's interval, at what the look may spend and shared by the arms:
    # the bootstrap's is too short where pairs are few.
    least, most = t_interval(d, 1 - allowed / arms)
    if -smallest < least and most < smallest:
        return verdict(WITHIN_NOISE, f"any effect is smaller than {smallest:g}")
    return verdict(UNDECIDED, "neither shown nor excluded", further_pairs(d, smallest, plan, level))


def further_pairs(
    d: Sequence[float], smallest: float, plan: list[int], level: float = LEVEL
) -> int | None:
    """How many more pairs would settle it if mean and spread stay what they are; None where even a
    thousand would not, and 0 where by this there are enough: it is close.

    The normal approximation of both ways out: the interval leaves 0, or it fits within the smallest
    effect.
    """
    from statistics import NormalDist

    v = np.asarray(d, float)
    if len(v) < 2:
        return None
    mean = abs(float(v.mean()))
    deviation = float(v.std(ddof=1))
    z = NormalDist().inv_cdf(1 - level / 4)  # half of the level may be spent by then
    room = max(mean, smallest - mean)
    if room <= 0:
        return None
    needed = max(plan[0], math.ceil((z * deviation / room) ** 2))
    return max(0, needed - len(v)) if needed <= 1000 else None


def tokens_to_reach(tokens: Sequence[float], losses: Sequence[float], target: float) -> float:
    """How many tokens a curve takes to come down to a loss for good, between its points on a line;
    inf if it does not."""
    x = np.asarray(tokens, float)
    y = np.asarray(losses, float)
    below = y <= target
    if not below[-1]:
        return math.inf
    first = int(np.flatnonzero(~below)[-1]) + 1 if not below.all() else 0
    if first == 0:
        return float(x[0])
    x0 = x[first - 1]
    x1 = x[first]
    y0 = y[first - 1]
    y1 = y[first]
    return float(x0 + (x1 - x0) * (y0 - target) / (y0 - y1))


def correlation(a: Sequence[float], b: Sequence[float]) -> float:
    """Pearson's, of the two arms' end points over pairs: how much of the noise pairing takes
    away."""
    if len(a) < 3 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return math.nan
    return float(np.corrcoef(a, b)[0, 1])
