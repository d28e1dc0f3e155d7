"""The scores against scipy, numpy and figures that can be worked out by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import scipy.stats
from test_market_data import GOOD_BOOK, GOOD_MESSAGES, sample

from lmplay.market import pictures, score
from lmplay.market.session_run import write_generated

RANDOM = np.random.default_rng(0)


@pytest.mark.parametrize("whole", [False, True])
def test_wasserstein_is_scipys_of_z_scores(whole: bool) -> None:
    a = RANDOM.normal(0, 1, 300)
    b = RANDOM.normal(0.5, 2, 200)
    if whole:
        a = a.round()
        b = b.round()
    _, w1 = score.distances(a, b, whole, np.random.default_rng(0), bootstraps=0)
    pooled = np.concatenate([a, b])
    z = [(x - pooled.mean()) / pooled.std() for x in (a, b)]
    assert w1[0] == pytest.approx(scipy.stats.wasserstein_distance(*z), rel=1e-10)


def test_l1_is_half_the_difference_of_histograms_over_numpys_bins() -> None:
    a = RANDOM.normal(0, 1, 3000)
    b = RANDOM.normal(0.5, 1, 2000)
    ones, _ = score.distances(a, b, False, np.random.default_rng(0), bootstraps=0)
    borders = np.histogram_bin_edges(np.concatenate([a, b]), "fd")
    p, q = (np.histogram(x, borders)[0] / len(x) for x in (a, b))
    assert ones[0] == pytest.approx(np.abs(p - q).sum() / 2, abs=1e-12)
    ones, _ = score.distances(
        np.array([1, 1, 2, 2.0]), np.array([2, 3.0]), True, np.random.default_rng(0), 0
    )
    assert ones[0] == pytest.approx(0.5)  # 1: 1/2 and 0; 2: 1/2 and 1/2; 3: 0 and 1/2


def test_distances_at_their_ends() -> None:
    a = RANDOM.normal(0, 1, 500)
    ones, twos = score.distances(a, a, False, np.random.default_rng(0))
    assert ones[0] == 0 == twos[0]
    assert ones[1:].min() > 0, "resampled ones differ"
    far, _ = score.distances(a, a + 100, False, np.random.default_rng(0), 0)
    assert far[0] == pytest.approx(1.0)
    none, nan = score.distances(a, np.empty(0), False, np.random.default_rng(0), 3)
    assert (none == 1).all()
    assert np.isnan(nan).all()


def test_intervals_hold_the_distance_of_other_samples() -> None:
    """Of samples of the same two distributions, most distances lie in the interval of the first."""

    def draw(seed: int) -> tuple[np.ndarray, np.ndarray]:
        random = np.random.default_rng(seed)
        return random.normal(0, 1, 800), random.normal(1, 1, 800)

    _, twos = score.distances(*draw(0), False, np.random.default_rng(0))
    found = score.interval(twos)
    others = [
        score.distances(*draw(s), False, np.random.default_rng(0), 0)[1][0] for s in range(1, 40)
    ]
    assert np.mean([found.low <= o <= found.high for o in others]) > 0.8
    assert found.low < found.value < found.high


def test_a_conditional_is_weighted_by_how_many_are_given_it() -> None:
    """Where the groups agree within, only what they are given differs, and the distance is 0."""
    same = (np.array([1.0, 1, 2, 2]), np.array([0.0, 0, 1, 1]))
    more = (np.array([1.0, 2, 2, 2]), np.array([0.0, 1, 1, 1]))
    ones, _ = score.conditional_distances(same, more, True, True, np.random.default_rng(0))
    assert ones[0] == 0
    plain, _ = score.distances(same[0], more[0], True, np.random.default_rng(0), 0)
    assert plain[0] > 0


def test_statistics_of_a_book_that_can_be_read_by_eye(tmp_path: Path) -> None:
    [tape] = score.read(sample(tmp_path, GOOD_MESSAGES, GOOD_BOOK))
    of = {name: score.values([tape], function) for name, (function, _) in score.STATISTICS.items()}
    assert of["spread"].tolist() == [3, 2, 2, 3, 4]
    assert of["imbalance"][0] == pytest.approx((100 - 10) / 110)
    assert of["ask volume, touch"].tolist() == [10, 50, 50, 10, 10]
    assert of["bid volume, 10 levels"].tolist() == [105, 105, 75, 75, 5]
    assert of["depth of ask limits"].tolist() == [1.0]  # 10002 beside a mid of 10001
    assert of["level of ask limits"].tolist() == [1.0]
    assert of["level of bid cancels"].tolist() == [1.0, 1.0]
    assert of["volume per minute"].tolist() == [3000.0]
    # its first cancel, .6 s after the add
    assert np.exp(of["log time to cancel"]) == pytest.approx([0.6], rel=1e-6)
    assert np.exp(of["log inter-arrival time"])[1] == pytest.approx(100.0)
    assert score.facts([tape])["trades"] == pytest.approx(0.2)


def test_impact_of_a_price_that_follows_every_trade() -> None:
    """Each buy lifts the mid by a tick for good: half of the events are buys, and R grows by half a
    tick an event."""
    n = 800
    kind = np.where(np.arange(n) % 2 == 0, 4, 1)
    direction = np.where(kind == 4, -1, 1)  # a trade at the ask; a bid
    mid = 100 + np.cumsum(kind == 4).astype(float)
    book = np.full((n, 40), np.nan)
    book[:, 0] = mid + 1
    book[:, 2] = mid - 1
    book[:, 1] = 5
    book[:, 3] = 5
    messages = pd.DataFrame(
        {
            "time": np.arange(n) * 10**9,
            "type": kind,
            "order": 0,
            "size": 1,
            "price": mid,
            "direction": direction,
        }
    )
    curves = score.impact([score.SessionData(messages, book)], lags=20)
    assert curves["MO1"].tolist() == [1 + lag // 2 for lag in range(20)]
    assert curves["LO0"].tolist() == [(1 + lag) // 2 for lag in range(20)]
    assert curves["MO0"].isna().all()


def test_autocorrelation_and_tails_are_those_of_the_series() -> None:
    x = RANDOM.normal(size=4000)
    y = np.convolve(x, [1, 0.5])[:4000]  # a moving average: .5 / 1.25 at lag 1
    assert score.autocorrelation(y, 1) == pytest.approx(0.4, abs=0.05)
    assert score.autocorrelation(y, 5) == pytest.approx(0.0, abs=0.06)
    assert np.isnan(score.autocorrelation(np.ones(50), 1))
    pareto = RANDOM.pareto(3.0, 50_000) + 1
    assert score.hill(pareto) == pytest.approx(3.0, rel=0.1)


def test_a_market_is_nearer_to_its_like_than_to_another_and_pictures_are_made(
    tmp_path: Path,
) -> None:
    for name, seed in (("real", 1), ("generated", 2)):
        write_generated(seed, 0.8, tmp_path / name)
    real = score.read(tmp_path / "real")
    like = score.read(tmp_path / "generated")
    other = [
        score.SessionData(t.messages.assign(size=t.messages["size"] * 3), t.book * 1.5)
        for t in like
    ]
    near = score.compare(real, like)
    far = score.compare(real, other)
    assert near["l1"]["mean"] < far["l1"]["mean"]
    assert near["w1"]["mean"] < far["w1"]["mean"]
    assert (near["l1_low"] <= near["l1_high"]).all()
    assert near["l1"].between(0, 1).all()
    markets = {"real": real, "generated": like}
    made = [
        pictures.book(markets, tmp_path / "a.png"),
        pictures.paths(markets, tmp_path / "b.png"),
        pictures.distributions(markets, near, tmp_path / "c.png"),
        pictures.impact_curves(
            {k: score.impact(v) for k, v in markets.items()}, tmp_path / "d.png"
        ),
        pictures.divergence_curves({"generated": score.divergence(real, like)}, tmp_path / "e.png"),
    ]
    assert all(p.stat().st_size > 10_000 for p in made)
