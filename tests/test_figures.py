"""Figures of odd runs: long, short, of one point, and with names as people choose them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from conftest import Command

from lmplay.analysis import compare, figures


@pytest.mark.parametrize(
    ("low", "high", "some"),
    [
        (5_000, 26_000, {6_000, 10_000, 20_000}),
        (1, 1_000_000, {1, 1000, 1_000_000}),
        (950, 1100, {950, 1000}),
        (0.3, 40, {1, 10}),
    ],
)
def test_ticks_are_round_and_few(low: float, high: float, some: set[float]) -> None:
    ticks = figures.round_ticks(low, high)
    assert some <= {round(t, 6) for t in ticks}
    assert 2 <= len(ticks) <= 9


@pytest.mark.parametrize(
    ("tokens", "losses"),
    [
        ([1, 2, 3], [3.0, 2.0, 1.0]),
        ([1, 2, 2, 3], [3.0, 2.0, 1.5, 1.0]),
        ([1, 3, 2], [3.0, 1.0, 2.0]),
        ([1, 2, None, 4], [3.0, float("nan"), 2.0, 1.0]),
    ],
)
def test_series_are_those_that_pandas_groups(tokens: list[Any], losses: list[float]) -> None:
    frame = pd.DataFrame({"tokens": tokens, "loss": losses})
    curve = compare.RunCurve("run", "p", "f", "v", Path("x.csv"), frame)
    expected = frame.dropna().groupby("tokens", as_index=False).last()
    found = compare.series(curve, "tokens", "loss")
    assert found is not None
    np.testing.assert_array_equal(found[0], expected["tokens"])
    np.testing.assert_array_equal(found[1], expected["loss"])


def test_long_curves_are_thinned_evenly_and_keep_their_ends() -> None:
    x = np.arange(0.0, 50_000.0)
    y = np.sin(x)
    places, values = figures.thinned(x, y)
    assert len(places) <= figures.MAX_POINTS + 2
    assert places[0] == 0
    assert places[-1] == x[-1]
    assert np.array_equal(values, np.sin(places))
    short = np.arange(9.0)
    assert figures.thinned(short, short)[0] is short


Make = Callable[..., Path]


@pytest.fixture
def curves_of(tmp_path: Path) -> Make:
    """Writes a run with a given plan's name, seed and validation curve."""

    def make(name: str, plan: str, seed: int, losses: list[float], tokens: list[int]) -> Path:
        folder = tmp_path / "runs" / f"p{abs(hash(plan)) % 1000}" / f"{name}-s{seed}"
        folder.mkdir(parents=True)
        identity = {"variant": name, "plan": plan[:8], "seed": seed, "config": {}, "data": "d"}
        record = {"identity": identity, "plan_name": plan, "baseline": "gpt2ish"}
        (folder / "run.json").write_text(json.dumps(record))
        rows = [
            f"{i},{t},{t},{i}.0,{x},{x},0.5"
            for i, (t, x) in enumerate(zip(tokens, losses, strict=True))
        ]
        header = "step,tokens,flops,seconds,loss,bpb,accuracy"
        (folder / "validate.csv").write_text("\n".join([header, *rows]) + "\n")
        return folder

    return make


@pytest.mark.parametrize("plan", ["a $x_{$ b", "$$", "100 % & <b> \\frac", ":smile: [bold]"])
def test_names_are_drawn_as_they_are(
    tmp_path: Path, command: Command, curves_of: Make, plan: str
) -> None:
    for name in ("gpt2ish", "idea"):
        curves_of(name, plan, 0, [3.0, 2.0], [0, 100])
    done = command("lmp_plotstats", "runs", "--out", "f", "--out-type", "svg")
    assert done.returncode == 0, done.stderr
    assert plan in done.stdout
    svg = (tmp_path / "f" / "log_loss.svg").read_text()
    escaped = plan.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    assert escaped in svg


@pytest.mark.parametrize("tokens", [[100], [0, 100], [0, 1_000_000]])
def test_a_single_point_is_drawn(
    tmp_path: Path, command: Command, curves_of: Make, tokens: list[int]
) -> None:
    curves_of("gpt2ish", "p", 0, [3.0, 2.0][-len(tokens) :], tokens)
    done = command("lmp_plotstats", "runs", "--out", "f", "--out-type", "svg")
    assert done.returncode == 0, done.stderr
    assert "<use " in (tmp_path / "f" / "log_loss.svg").read_text(), "a marker"


def test_means_and_intervals_are_in_the_table_and_in_final_csv(
    tmp_path: Path, command: Command, curves_of: Make
) -> None:
    import pandas as pd
    from scipy import stats

    base = [3.0, 3.1, 3.3]
    idea = [2.8, 3.0, 3.0]
    for seed in range(3):
        curves_of("gpt2ish", "p", seed, [5.0, base[seed]], [0, 100])
        curves_of("idea", "p", seed, [5.0, idea[seed]], [0, 100])
    done = command("lmp_plotstats", "runs", "--out", "f")
    assert done.returncode == 0, done.stderr
    table = pd.read_csv(tmp_path / "f" / "final.csv")
    row = table[table["kind"] == "setting"].set_index("run").loc["idea"]
    differences = np.array(idea) - np.array(base)
    interval = stats.t.interval(0.95, 2, differences.mean(), stats.sem(differences))
    assert row["seeds"] == 3
    assert row["loss"] == pytest.approx(np.mean(idea))
    assert row["loss_difference"] == pytest.approx(differences.mean())
    assert row["loss_difference_interval"] == pytest.approx((interval[1] - interval[0]) / 2)
    assert f"{differences.mean():+.4f}" in done.stdout
    assert f"± {(interval[1] - interval[0]) / 2:.4f}" in done.stdout
