"""What a certificate measures of an arena: the runs it needs, and what each line says of them.

An arena is what a training plan fixes. It is measured with a baseline, and with the experiment file
that says which changes to that baseline are known to be harmful, and which must not matter
(KNOWN_HARMFUL and KNOWN_EQUAL). As in a trial, everything is a function of the design and the
results, so any number of workers can share the work and any of it can be resumed.

One module, because a line is the runs it needs and what it reads from them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np

from .design import FixedDesign, Results, Unit
from .statistics import HARMFUL, REAL, Verdict, judge, t_interval

PAIRS = 9  # the fewest with which the exact test can say REAL or HARMFUL at two looks
TRIAL_PAIRS = 20  # pairs at most in a trial by default, which decides what a look may spend
PLANTED_PAIRS = 8  # the fewest with which the exact test can, at one look
TUNING_SEEDS = 2
LR_MULTIPLIERS = (0.5, 1.0, 2.0)
LR_ENDS = {0.5: 0.25, 2.0: 4.0}  # what is tried as well if the best rate so far is at an end
DECAY_MULTIPLIERS = (0.0, 1.0, 10.0)
WIDTHS = (0.5, 1.0, 2.0)
WIDTH_LR_MULTIPLIERS = (0.5, 1.0, 2.0)
SHORTER, LONGER = 0.9, 1.1  # budgets of the planted effects
CURVE = (0.8, 1.25)  # budgets from which the effects are predicted
LR_OFF = 4.0
SHORT = 1.0  # minutes; a longer run must beat the trigram table, a shorter one the bigram table
POWER = 0.8


@dataclass(frozen=True)
class Recipe:
    """A baseline with one recipe.

    arm: its label. decays: labels of the same recipe by the multiple of its weight decay; empty
    where it has none.
    """

    name: str
    arm: str
    decays: dict[float, str]


@dataclass(frozen=True)
class Layout:
    """The arms of an arena's measurements, by label.

    recipes: the plan's own first, then those of its contexts. widths: the baseline's label by
    multiple of its width. tables: losses of the unigram, bigram and trigram tables.
    """

    baseline: str
    recipes: tuple[Recipe, ...]
    widths: dict[float, str]
    harmful: tuple[str, ...]
    equal: tuple[str, ...]
    tables: tuple[float, float, float]


@dataclass(frozen=True)
class Line:
    """A line of a certificate. passed: None if it is not measured yet."""

    name: str
    passed: bool | None
    sentence: str
    numbers: dict[str, Any]


class Arena:
    """The layout, the design and the results so far.

    Its methods are those that :func:`lmplay.trial.work.work` asks a trial's state for.
    """

    def __init__(self, layout: Layout, design: FixedDesign, results: Results):
        self.layout = layout
        self.design = design
        self.results = results

    # ---------------------------------------------------------------- which runs are needed

    def base(self, seed: int, multiplier: float = 1.0, share: float = 1.0) -> Unit:
        """Return a run of the baseline."""
        return Unit("pair", self.layout.baseline, seed, multiplier, share)

    def lines(self) -> list[tuple[str, list[Unit], Callable[[], Line]]]:
        """Return the lines: name, runs, and what reads them. The cheap ones are first."""
        seeds = range(PAIRS)
        base = [self.base(s) for s in seeds]
        equal = [Unit("pair", arm, s) for arm in self.layout.equal for s in seeds]
        tuned = [u for recipe in self.layout.recipes for u in self._tuning_units(recipe)]
        scale = [
            Unit("pair", arm, s, m)
            for arm in self.layout.widths.values()
            for m in WIDTH_LR_MULTIPLIERS
            for s in range(TUNING_SEEDS)
        ]
        few = range(PLANTED_PAIRS)
        planted = [self.base(s, share=share) for share in (SHORTER, LONGER) for s in few]
        curve = [self.base(s, share=share) for share in CURVE for s in range(TUNING_SEEDS)]
        known = [Unit("pair", arm, s) for arm in self.layout.harmful for s in few]
        known += [self.base(s, LR_OFF) for s in few]
        return [
            ("beyond counting", base, self._beyond_counting),
            ("tuned", tuned, self._tuned),
            ("sensitivity", [*base, *equal, *curve], self._sensitivity),
            ("planted effects", [*base, *planted, *curve, *equal], self._planted),
            ("scale", [*base, *equal, *scale], self._scale),
            ("known answers", [*base, *known], self._known),
        ]

    def _tuning_units(self, recipe: Recipe) -> list[Unit]:
        seeds = range(TUNING_SEEDS)
        units = [Unit("pair", recipe.arm, s, m) for m in self._rates(recipe) for s in seeds]
        return units + [Unit("pair", arm, s) for arm in recipe.decays.values() for s in seeds]

    def _rates(self, recipe: Recipe) -> list[float]:
        """Return the multiples of a recipe's learning rate to try, by the results so far."""
        seeds = range(TUNING_SEEDS)
        units = {m: [Unit("pair", recipe.arm, s, m) for s in seeds] for m in LR_MULTIPLIERS}
        if any(u.key not in self.results for of_rate in units.values() for u in of_rate):
            return list(LR_MULTIPLIERS)
        best = min(units, key=lambda m: self._losses(units[m]).mean())
        return sorted({*LR_MULTIPLIERS, LR_ENDS.get(best, best)})

    def needed(self) -> list[Unit]:
        """Return the missing runs of the first line that is not complete; [] if all are."""
        for _, units, _ in self.lines():
            if missing := [u for u in dict.fromkeys(units) if u.key not in self.results]:
                return missing
        return []

    # ---------------------------------------------------------------- what the results say

    def _losses(self, units: Sequence[Unit]) -> np.ndarray:
        return np.array([self.results[u.key].loss for u in units])

    def differences(
        self, arm: str, pairs: int, multiplier: float = 1.0, share: float = 1.0
    ) -> list[float]:
        """Return an arm's end points minus the baseline's at the plan's rates and budget."""
        units = [Unit("pair", arm, s, multiplier, share) for s in range(pairs)]
        return _plain(self._losses(units) - self._losses([self.base(s) for s in range(pairs)]))

    def deviation(self) -> float:
        """Return the standard deviation of a pair that differs by nothing that matters."""
        squares = [np.var(self.differences(arm, PAIRS), ddof=1) for arm in self.layout.equal]
        return float(np.sqrt(np.mean(squares)))

    def minutes(self) -> float:
        """Return the training time of a run of the baseline."""
        runs = [self.results[self.base(s).key] for s in range(PAIRS)]
        return float(np.median([r.seconds for r in runs])) / 60

    def slope(self) -> float:
        """Return the nats that the baseline's end point loses per e-fold of tokens, by budgets."""
        x, y = self._budgets()
        quadratic = np.polyfit(x, y, 2)
        return float(-quadratic[1])

    def _budgets(self) -> tuple[np.ndarray, np.ndarray]:
        """Return log(budget / the plan's) and mean end points, over the seeds of the curve."""
        shares = (CURVE[0], 1.0, CURVE[1])
        ends = [
            self._losses([self.base(s, share=share) for s in range(TUNING_SEEDS)]).mean()
            for share in shares
        ]
        return np.log(shares), np.array(ends)

    def predicted(self, share: float) -> float:
        """Return how much the loss should change with a budget, by the curve over budgets."""
        x, y = self._budgets()
        quadratic = np.polyfit(x, y - y[1], 2)
        return float(np.polyval(quadratic, math.log(share)))

    def verdict(self, differences: Sequence[float], max_pairs: int) -> Verdict:
        """Return the word for one arm, as a trial with a maximum of pairs gives it."""
        design = self.design
        return judge({"": differences}, design.smallest_effect, max_pairs, design.level)[""]

    def _beyond_counting(self) -> Line:
        losses = self._losses([self.base(s) for s in range(PAIRS)])
        names = ("unigram", "bigram", "trigram")
        table = "trigram" if self.minutes() >= SHORT else "bigram"
        wanted = self.layout.tables[names.index(table)]
        where = "below" if losses.max() < wanted else "not below"
        return Line(
            "beyond counting",
            bool(losses.max() < wanted),
            f"{losses.mean():.3f} nats, {where} the {table} table ({wanted:.3f}) with every seed",
            {
                "losses": _plain(losses),
                "tables": dict(zip(names, self.layout.tables, strict=True)),
                "table": table,
            },
        )

    def _tuned(self) -> Line:
        parts = []
        passed = True
        curves = {}
        for recipe in self.layout.recipes:
            rates = self._curve({m: (recipe.arm, m) for m in self._rates(recipe)})
            decays = self._curve({m: (arm, 1.0) for m, arm in recipe.decays.items()})
            curves[recipe.name] = {"lr": rates, "weight_decay": decays}
            of_rate, rate_passes = _optimum(rates, natural_end=None)
            of_decay, decay_passes = _optimum(decays, natural_end=0.0) if decays else ("none", True)
            passed = passed and rate_passes and decay_passes
            parts.append(f"{recipe.name}: learning rate {of_rate}, weight decay {of_decay}")
        return Line("tuned", passed, "; ".join(parts), {"curves": curves, "seeds": TUNING_SEEDS})

    def _curve(self, arms: Mapping[float, tuple[str, float]]) -> list[tuple[float, list[float]]]:
        """Return (multiple of the recipe's value, end points by seed) in ascending order."""
        return [
            (m, _plain(self._losses([Unit("pair", arm, s, rate) for s in range(TUNING_SEEDS)])))
            for m, (arm, rate) in sorted(arms.items())
        ]

    def _scale(self) -> Line:
        noise = self.deviation()
        best: dict[float, tuple[float, float]] = {}
        tried = {}
        for width, arm in self.layout.widths.items():
            rates = self._curve({m: (arm, m) for m in WIDTH_LR_MULTIPLIERS})
            tried[width] = rates
            best[width] = min((float(np.mean(losses)), m) for m, losses in rates)
        losses = [best[w][0] for w in WIDTHS]
        steps = [a - b for a, b in itertools.pairwise(losses)]
        passed = all(step > 3 * noise for step in steps)
        shown = ", ".join(f"x{w:g} {best[w][0]:.3f} (lr x{best[w][1]:g})" for w in WIDTHS)
        return Line(
            "scale",
            passed,
            f"widths {shown}: steps of {' and '.join(f'{s:.3f}' for s in steps)} nats, "
            f"{'' if passed else 'not '}above three paired standard deviations ({3 * noise:.4f})",
            {"curves": tried, "steps": steps, "noise": noise},
        )

    def _sensitivity(self) -> Line:
        noise = self.deviation()
        gain = smallest_gain(noise)
        slope = self.slope()
        ends = self._losses([self.base(s) for s in range(PAIRS)])
        minutes = self.minutes()
        tokens = 100 * math.expm1(gain / slope) if slope > 0 else math.inf
        unpaired = float(np.std(ends, ddof=1)) * math.sqrt(2)
        return Line(
            "sensitivity",
            True,
            f"a pair's difference deviates by {noise:.4f} nats (two runs with other seeds: "
            f"{unpaired:.4f}); {PAIRS} pairs detect {gain:.4f} nats between like models, the worth "
            f"of {tokens:.1f} % of the tokens, with {POWER:.0%} power, in "
            f"{2 * PAIRS * minutes:.0f} minutes",
            {
                "deviation_paired": noise,
                "deviation_unpaired": unpaired,
                "smallest_gain": gain,
                "smallest_gain_tokens_percent": tokens,
                "minutes_per_run": minutes,
                "differences": {arm: self.differences(arm, PAIRS) for arm in self.layout.equal},
            },
        )

    def _planted(self) -> Line:
        passed = True
        parts = []
        numbers = {}
        for share, word in ((SHORTER, HARMFUL), (LONGER, REAL)):
            own = self.differences(self.layout.baseline, PLANTED_PAIRS, share=share)
            verdict = self.verdict(own, PLANTED_PAIRS)
            expected = self.predicted(share)
            low, high = t_interval(own, 1 - self.design.level)
            # The prediction has the curve's own error, which is about a tenth of it.
            near = low - 0.1 * abs(expected) <= expected <= high + 0.1 * abs(expected)
            passed = passed and verdict.word == word and near
            parts.append(
                f"{share:.0%} of the tokens {verdict.word} by {np.mean(own):+.4f} nats (its curve "
                f"predicts {expected:+.4f})"
            )
            numbers[f"{share:g}"] = {"differences": own, "predicted": expected}
        for arm in self.layout.equal:
            verdict = self.verdict(self.differences(arm, PAIRS), TRIAL_PAIRS)
            passed = passed and verdict.word not in (REAL, HARMFUL)
            parts.append(f"{arm} {verdict.word}")
        return Line("planted effects", passed, "; ".join(parts), numbers)

    def _known(self) -> Line:
        found = {arm: self.differences(arm, PLANTED_PAIRS) for arm in self.layout.harmful}
        off = self.differences(self.layout.baseline, PLANTED_PAIRS, LR_OFF)
        found[f"learning rate x {LR_OFF:g}"] = off
        words = {}
        for arm, differences in found.items():
            finite = all(map(math.isfinite, differences))
            words[arm] = self.verdict(differences, PLANTED_PAIRS).word if finite else HARMFUL
        passed = all(word == HARMFUL for word in words.values())
        ended = {arm: d for arm, d in found.items() if all(map(math.isfinite, d))}
        spread = {arm: float(np.std(d, ddof=1)) for arm, d in ended.items()}
        unlike = float(np.median(list(spread.values()))) if spread else math.nan
        parts = [
            f"{a} {w} by {np.mean(found[a]):+.3f} ± {spread[a]:.3f}"
            if a in ended
            else f"{a} diverged"
            for a, w in words.items()
        ]
        return Line(
            "known answers",
            passed,
            f"{'; '.join(parts)} nats (standard deviation of a pair); between models so unlike, "
            f"{PAIRS} pairs detect {smallest_gain(unlike):.3f} nats",
            {"differences": found, "smallest_gain_unlike": smallest_gain(unlike)},
        )

    # ---------------------------------------------------------------- the report

    def report(self) -> dict[str, Any]:
        """Return the lines that are measured so far, as JSON."""
        return {"lines": {line.name: as_json(line) for line in self.measured()}}

    def measured(self) -> list[Line]:
        """Return every line; one whose runs are missing says how many."""
        found = []
        for name, units, read in self.lines():
            missing = sum(u.key not in self.results for u in dict.fromkeys(units))
            if missing:
                found.append(Line(name, None, f"not measured: {missing} runs are missing", {}))
            elif lost := self._baseline_that_diverged(units):
                found.append(Line(name, False, f"the baseline diverged: {lost}", {}))
            else:
                found.append(read())
        return found

    def _baseline_that_diverged(self, units: Sequence[Unit]) -> str:
        """Return the first run of the baseline, at its own rates, that diverged; "" if none did."""
        own = (self.layout.baseline, *self.layout.equal)
        ended = [u for u in units if u.arm in own and u.lr_multiplier == 1]
        return next((u.key for u in ended if not math.isfinite(self.results[u.key].loss)), "")


def _optimum(
    curve: Sequence[tuple[float, list[float]]], natural_end: float | None
) -> tuple[str, bool]:
    """Return in words where a curve's best value is, and whether the recipe's (1) is the best.

    A value as good as the best, within two standard errors of their paired difference, counts as
    the best. The recipe's must not be at an end of what was tried, or that end is natural, such as
    a weight decay of 0.
    """
    by_value = {m: np.array(losses) for m, losses in curve}
    best = min(by_value, key=lambda m: by_value[m].mean())
    ends = [m for m in (min(by_value), max(by_value)) if m != natural_end]
    if not np.isfinite(by_value[1.0]).all():
        return "diverged", False
    difference = by_value[1.0] - by_value[best]
    error = float(difference.std(ddof=1)) / math.sqrt(len(difference))
    if best == 1.0:
        return "at its best value", best not in ends
    if best not in ends and float(difference.mean()) <= 2 * error:
        return f"as good as the best (x{best:g}, {-difference.mean():+.4f})", True
    return f"not at its best (x{best:g} is {-difference.mean():+.4f})", False


def smallest_gain(deviation: float, pairs: int = PAIRS, power: float = POWER) -> float:
    """Return the smallest mean gain that `pairs` pairs detect with a power, at the first look.

    With so few pairs the sign-flip test is significant only if all differences have one sign, so
    the power is the normal probability of that, to the power of the pairs.
    """
    return float(deviation * NormalDist().inv_cdf(power ** (1 / pairs)))


def _plain(values: np.ndarray) -> list[float]:
    return [float(v) for v in values]


def _finite(value: Any) -> Any:
    """Return the value with None for what JSON cannot hold: the loss of a run that diverged."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    return [_finite(v) for v in value] if isinstance(value, list | tuple) else value


def as_json(line: Line) -> dict[str, Any]:
    """Return a line as a certificate keeps it."""
    return {"passed": line.passed, "sentence": line.sentence, **_finite(line.numbers)}
