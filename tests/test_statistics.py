"""The statistics against scipy and statsmodels, and the promises of the stopping rule by
simulation."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from statsmodels.stats.multitest import multipletests

from lmplay.trial import statistics as verdict
from lmplay.trial.statistics import HARMFUL, REAL, UNDECIDED, WITHIN_NOISE, judge

NUMBERS = st.lists(
    st.floats(-2, 2, allow_nan=False).map(lambda x: round(x, 3)), min_size=1, max_size=9
)


@settings(max_examples=60, deadline=None)
@given(NUMBERS)
def test_sign_flip_tries_all_signs(d: list[float]) -> None:
    sums = [
        abs(sum(s * x for s, x in zip(signs, d, strict=True)))
        for signs in product((1, -1), repeat=len(d))
    ]
    expected = np.mean([s >= abs(sum(d)) - 1e-9 for s in sums])
    assert verdict.sign_flip(d) == pytest.approx(expected, abs=1e-12)


def test_sign_flip_is_scipys_exact_permutation_test() -> None:
    d = np.random.default_rng(1).normal(0.4, 1, 11)
    theirs = stats.permutation_test((d,), np.mean, permutation_type="samples", n_resamples=np.inf)
    assert verdict.sign_flip(d) == pytest.approx(theirs.pvalue)
    assert verdict.sign_flip([1.0] * 20) == pytest.approx(2 / 2**20)
    assert verdict.sign_flip([]) == 1.0


def test_holm_is_statsmodels() -> None:
    random = np.random.default_rng(2)
    for n in (1, 2, 5, 9):
        p = {str(i): float(v) for i, v in enumerate(random.uniform(0, 0.2, n))}
        theirs = multipletests(list(p.values()), method="holm")[1]
        assert [verdict.holm(p)[k] for k in p] == pytest.approx(list(theirs))


def test_t_interval_is_scipys() -> None:
    v = np.random.default_rng(3).normal(1, 2, 12)
    theirs = stats.ttest_1samp(v, 0).confidence_interval(0.99)
    assert verdict.t_interval(v) == pytest.approx((theirs.low, theirs.high))


def test_bca_is_as_worked_out_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """Efron's formulas, on a skewed sample; with other resamples the ends agree to what chance
    leaves."""
    monkeypatch.setattr(verdict, "RESAMPLES", 200_000)
    d = np.random.default_rng(4).exponential(1, 15)
    random = np.random.default_rng(99)
    means = d[random.integers(0, len(d), (200_000, len(d)))].mean(1)
    z0 = stats.norm.ppf((means < d.mean()).mean() + (means == d.mean()).mean() / 2)
    jack = np.array([np.delete(d, i).mean() for i in range(len(d))])
    away = jack.mean() - jack
    a = (away**3).sum() / 6 / (away**2).sum() ** 1.5
    ends = [stats.norm.cdf(z0 + (z0 + z) / (1 - a * (z0 + z))) for z in stats.norm.ppf([0.1, 0.9])]
    assert list(verdict.bca(d, 0.8)) == pytest.approx(list(np.quantile(means, ends)), abs=0.008)
    assert verdict.bca([1.0]) == (-math.inf, math.inf)
    assert verdict.bca([2.0, 2.0]) == (2.0, 2.0)


def test_looks_and_what_they_spend() -> None:
    assert verdict.looks(20) == [9, 12, 16, 20]
    assert verdict.looks(9) == [9]
    assert verdict.looks(4) == [4]
    for most in (4, 9, 13, 20, 40):
        spent = verdict.spending(len(verdict.looks(most)))
        assert sum(spent) == pytest.approx(0.01)
        assert min(spent) > 0
    for arms in (1, 2, 5, 15):
        for level in (0.05, 0.01, 0.001):
            first = verdict.looks(40, level, arms)[0]
            assert arms * 2 / 2**first <= verdict.spending(4, level)[0], (
                "the first look can find something"
            )
            assert arms * 2 / 2 ** (first - 1) > verdict.spending(4, level)[0], (
                "and no earlier one could"
            )


def word(d: np.ndarray, most: int = 20, smallest: float = 1e-9) -> str:
    """The verdict where pairs are added until it is known."""
    for n in verdict.looks(most):
        found = judge({"x": d[:n]}, smallest, most)["x"]
        if found.settled:
            return found.word
    return UNDECIDED


@pytest.fixture
def _fast_intervals(monkeypatch: pytest.MonkeyPatch) -> None:
    """Thousands of trials: the bootstrap, which the test alone would not need, with fewer
    resamples."""
    monkeypatch.setattr(verdict, "RESAMPLES", 199)


@pytest.mark.usefixtures("_fast_intervals")
@pytest.mark.parametrize("noise", ["normal", "heavy"])
def test_under_the_null_real_is_as_rare_as_promised(noise: str) -> None:
    """Of 2000 trials in which nothing differs, REAL or HARMFUL together come out in at most .01,
    with room for simulation: three standard deviations are .0067."""
    random = np.random.default_rng(5)
    draws = (
        random.normal(size=(2000, 20)) if noise == "normal" else random.standard_t(2, (2000, 20))
    )
    plan = verdict.looks(20)
    spent = dict(zip(plan, verdict.spending(len(plan)), strict=True))
    # No look that the test alone does not pass is worth a bootstrap.
    wrong = [
        word(d) in (REAL, HARMFUL)
        for d in draws
        if any(verdict.sign_flip(d[:n]) <= spent[n] for n in plan)
    ]
    assert 0 < len(wrong) < 100
    assert sum(wrong) / len(draws) <= 0.01 + 0.0067


@pytest.mark.usefixtures("_fast_intervals")
def test_a_gain_of_one_and_a_half_deviations_is_found() -> None:
    random = np.random.default_rng(6)
    found = [word(d) for d in random.normal(-1.5, 1, (300, 20))]
    assert np.mean([w == REAL for w in found]) >= 0.8
    assert HARMFUL not in found


@pytest.mark.usefixtures("_fast_intervals")
def test_within_noise_is_rarely_said_of_an_effect_that_matters() -> None:
    """The true effect is just the smallest of interest: in at most .01 of trials is it called
    noise."""
    random = np.random.default_rng(11)
    found = [word(d, 16, 1.0) for d in random.normal(1.0, 0.6, (400, 16))]
    assert np.mean([w == WITHIN_NOISE for w in found]) <= 0.01 + 3 * np.sqrt(0.01 * 0.99 / 400)


def test_words_and_their_reasons() -> None:
    random = np.random.default_rng(7)
    noise = random.normal(0, 0.001, 20)
    better = judge({"x": -0.05 + noise}, 0.01, 20)["x"]
    assert (better.word, better.pairs) == (REAL, 20)
    assert better.low < better.gain < better.high
    assert better.gain == pytest.approx(0.05, abs=0.001)
    assert judge({"x": 0.05 + noise}, 0.01, 20)["x"].word == HARMFUL
    assert judge({"x": noise}, 0.01, 20)["x"].word == WITHIN_NOISE
    few = judge({"x": -0.05 + noise[:5]}, 0.01, 20)["x"]
    assert (few.word, few.more) == (UNDECIDED, 4)
    wide = judge({"x": [-1.3, 0.7] * 10}, 0.01, 20)["x"]
    assert wide.word == UNDECIDED
    assert wide.more is not None
    assert wide.more > 5


def test_a_gain_that_a_control_takes_away_is_not_real() -> None:
    noise = np.random.default_rng(8).normal(0, 0.001, 12)
    d = {"x": -0.05 + noise}
    assert judge(d, 0.01, 20, controls={"x": {"params": [-0.02, -0.01]}})["x"].word == REAL
    contrary = judge(
        d, 0.01, 20, controls={"x": {"params": [-0.02, -0.01], "flops": [0.03, 0.02]}}
    )["x"]
    assert contrary.word == UNDECIDED
    assert "flops" in contrary.why
    assert contrary.settled, "more pairs would not change it"


def test_with_several_arms_each_has_to_stand_for_all() -> None:
    """A p-value that is enough for one arm is not for one of three."""
    # 9 pairs: p = 2/512 = .0039, and .005 may be spent
    d = [
        -0.9,
        -1.1,
        -1.0,
        -0.8,
        -1.2,
        -1.0,
        -0.9,
        -1.1,
        -1.0,
    ]
    nothing = np.random.default_rng(9).normal(0, 1, 9)
    assert judge({"a": d}, 0.01, 20)["a"].word == REAL
    assert judge({"a": d, "b": nothing, "c": -nothing}, 0.01, 20)["a"].word == UNDECIDED


def test_pairs_after_the_last_look_are_not_looked_at() -> None:
    d = list(np.random.default_rng(10).normal(0, 1, 11))
    assert judge({"x": d}, 0.01, 20)["x"] == judge({"x": d[:9]}, 0.01, 20)["x"]


def test_tokens_to_reach_a_loss() -> None:
    assert verdict.tokens_to_reach([0, 10, 20], [3, 2, 1], 1.5) == 15
    assert verdict.tokens_to_reach([0, 10, 20, 30], [3, 1, 2, 1], 1.5) == 25, (
        "for good: it rose again"
    )
    assert verdict.tokens_to_reach([0, 10], [3, 2], 1.5) == math.inf
    assert verdict.correlation([1, 2, 3], [2, 4, 6]) == pytest.approx(1)
    assert math.isnan(verdict.correlation([1, 1, 1], [1, 2, 3]))


def test_the_fewest_pairs_are_what_can_be_significant() -> None:
    for n in range(5, 12):
        word = judge({"a": [-1.0 - 0.01 * i for i in range(n)]}, 0.005, n)["a"].word
        assert (word == REAL) == (n >= 8), n
    assert (verdict.fewest(spent=1.0), verdict.fewest()) == (8, 9)
