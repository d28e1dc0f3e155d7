"""What a trial may be asked for beyond pairs: screening, budgets, knobs and contexts."""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Command, one_line, write_plan

from lmplay.analysis.answer import Row, draw_answer, rows_of_trials
from lmplay.analysis.page.gather import TrialReport, find_reports
from lmplay.analysis.sensitivity import draw_sensitivity, panels
from lmplay.errors import LmplayError
from lmplay.plan import find_plan, load_plan, parse_plan, plan_files
from lmplay.recipe import in_context
from lmplay.trial.design import FixedDesign, Result, Unit
from lmplay.trial.overview import over_contexts
from lmplay.trial.state import LR_SEED, TrialState
from lmplay.trial.statistics import HARMFUL, REAL, UNDECIDED, WITHIN_NOISE
from lmplay.trial.tuning import parsed, settings_text, try_range


def design(**changes: Any) -> FixedDesign:
    fixed: dict[str, Any] = {
        "plan": "p",
        "plan_fingerprint": "0" * 16,
        "against": "base",
        "arms": ("idea",),
        "level": 0.01,
        "max_pairs": 20,
        "smallest_effect": 0.005,
        "tuned": False,
        "controls": (),
        "tokens": 1000,
        "precision": "fp32",
        "device": "cpu",
        "data": "d",
        "sources": {},
    }
    return FixedDesign(**{**fixed, **changes})


def result(loss: float, **changes: Any) -> Result:
    return Result(
        **{
            "loss": loss,
            "bpb": loss / 2,
            "tokens": [0, 1000],
            "losses": [5.0, loss],
            "seconds": 10.0,
            "flops": 1e9,
            "folder": "f",
            **changes,
        }
    )


def play(d: FixedDesign, outcome: Callable[[Unit], Result]) -> dict[str, Result]:
    results: dict[str, Result] = {}
    while units := TrialState(d, results).needed():
        for unit in units:
            assert unit.key not in results
            results[unit.key] = outcome(unit)
    return results


# ---------------------------------------------------------------- screening


def simulated(gains: dict[str, float], trials: int, **changes: Any) -> list[dict[str, str]]:
    """Verdicts of trials in which pairs differ by the gains and by noise of .01."""
    found = []
    for number in range(trials):
        random = np.random.default_rng([number, len(gains)])
        noise = {
            (arm, seed): random.normal(-gain, 0.01)
            for arm, gain in gains.items()
            for seed in range(20)
        }

        def outcome(unit: Unit, noise: dict[tuple[str, int], float] = noise) -> Result:
            return result(3.0 + noise.get((unit.arm, unit.seed), 0.0))

        d = design(arms=tuple(gains), **changes)
        report = TrialState(d, play(d, outcome)).report()
        words = {arm: v["word"] for arm, v in report["arms"].items()}
        found.append(words | {"runs": str(report["cost"]["runs"])})
    return found


def test_screening_adds_no_error_and_saves_runs_where_nothing_is_better() -> None:
    """Under the null, three ideas: no more false verdicts than the level allows, fewer runs."""
    null = dict.fromkeys("abc", 0.0)
    screened = simulated(null, 40, screen=True)
    plain = simulated(null, 40)
    wrong = sum(any(words[a] in (REAL, HARMFUL) for a in null) for words in screened)
    assert wrong <= 2, "0.4 are expected at the level .01 in 40 trials"
    runs = [np.mean([int(words["runs"]) for words in found]) for found in (screened, plain)]
    assert runs[0] <= runs[1]
    harmful = dict.fromkeys("abc", -0.03)
    runs = [
        np.mean([int(words["runs"]) for words in simulated(harmful, 10, screen=s)])
        for s in (True, False)
    ]
    assert runs[0] < 0.5 * runs[1], "12 runs instead of 36 and more"


def test_screening_keeps_what_is_better() -> None:
    found = simulated({"good": 0.02, "bad": -0.02}, 30, screen=True)
    power = np.mean([words["good"] == REAL for words in found])
    plain = np.mean([words["good"] == REAL for words in simulated({"good": 0.02, "bad": 0.0}, 30)])
    assert power >= plain - 0.1
    assert power > 0.8
    dropped = [words["bad"] for words in found]
    assert set(dropped) <= {UNDECIDED, HARMFUL}
    assert dropped.count(UNDECIDED) > 15


def test_a_screened_arm_says_so_and_its_noise_is_at_least_the_certificates() -> None:
    def outcome(unit: Unit) -> Result:
        own = zlib.crc32(unit.key.encode()) % 100 * 1e-6
        return result(3.0 + own + (0.01 if unit.arm == "idea" else 0.0))

    d = design(screen=True)
    report = TrialState(d, play(d, outcome)).report()
    assert "screened out: after 3 pairs" in report["arms"]["idea"]["why"]
    assert report["over"]
    assert report["cost"]["runs"] == 6
    noisy = design(screen=True, noise=0.1)
    assert TrialState(noisy, play(noisy, outcome)).report()["arms"]["idea"]["word"] == HARMFUL


# ---------------------------------------------------------------- budgets


@pytest.mark.parametrize("budget", ["flops", "seconds"])
def test_both_arms_get_the_same_compute_or_time(budget: str) -> None:
    """The idea's tokens cost twice as much, so that it gets half of them."""

    def outcome(unit: Unit) -> Result:
        twice = 2.0 if unit.arm == "idea" else 1.0
        tokens = 1000 * unit.share
        cost = {"flops": 1e6 * tokens, "seconds": 0.01 * tokens}
        cost[budget] *= twice
        loss = 3 - math.log(unit.share) + zlib.crc32(unit.key.encode()) % 100 * 1e-6
        return result(loss, tokens=[0, tokens], losses=[5, loss], **cost)

    d = design(budget=budget, tuned=True)
    results = play(d, outcome)
    report = TrialState(d, results).report()
    assert report["arms"]["idea"]["share"] == 0.5
    assert report["arms"]["idea"]["word"] == HARMFUL, "it has seen half of the text"
    pairs = {k: r for k, r in results.items() if k.startswith("pair")}
    spent = {getattr(r, budget) for r in pairs.values()}
    assert max(spent) == pytest.approx(min(spent))
    rungs = {k.split(" ")[4] for k in results if k.startswith("lr idea")}
    assert rungs == {"x0.125", "x0.25", "x0.5"}, "its rates are chosen at its own budget"
    assert sum(k.startswith("cost") for k in results) == 2


# ---------------------------------------------------------------- knobs

RANGES = {"optimizer.lr": (0.001, 0.064), "optimizer.weight_decay": (0.01, 0.64)}


def bowl(unit: Unit) -> Result:
    """Best at lr .02 and, for the idea, a weight decay of .3."""
    values = {"optimizer.lr": 0.008, "optimizer.weight_decay": 0.08}
    values |= {k: float(v) for k, v in parsed(unit.settings).items()}
    best = {"optimizer.lr": 0.02, "optimizer.weight_decay": 0.3 if unit.arm == "idea" else 0.05}
    off = sum(math.log(values[k] / best[k]) ** 2 for k in best)
    return result(3 + 0.1 * off + np.random.default_rng(unit.seed).normal(0, 0.01))


def test_knobs_are_tuned_with_as_many_tries_for_each_arm() -> None:
    knobs = {"base": RANGES, "idea": RANGES}
    d = design(tuned=True, knobs=knobs, tune_tries=16)
    results = play(d, bowl)
    tries = {arm: [k for k in results if k.startswith(f"knobs {arm}")] for arm in knobs}
    assert {arm: len(t) for arm, t in tries.items()} == {"base": 16, "idea": 16}
    assert all(f"s{LR_SEED}" in k for k in results if k.startswith("knobs"))
    report = TrialState(d, results).report()
    chosen = {k: float(v) for k, v in parsed(report["arms"]["idea"]["settings"]).items()}
    own = bowl(Unit("knobs", "idea", LR_SEED)).loss
    assert min(r.loss for k, r in results.items() if k in tries["idea"]) < own - 0.1
    assert 0.007 < chosen["optimizer.lr"] < 0.06
    assert chosen["optimizer.weight_decay"] > 0.1
    assert len(report["knobs"]["idea"]) == 16
    assert ({}, pytest.approx(own)) in [(v, loss) for v, loss in report["knobs"]["idea"]]
    pairs = [k for k in results if k.startswith("pair idea")]
    assert all(k.endswith(report["arms"]["idea"]["settings"]) for k in pairs)
    again = TrialState(d, dict(reversed(results.items())))
    assert again.settings == TrialState(d, results).settings, "whatever the order of the results"


def test_the_sensitivity_of_each_knob_is_drawn(tmp_path: Path) -> None:
    d = design(tuned=True, knobs={"base": RANGES, "idea": RANGES}, tune_tries=6)
    report = TrialState(d, play(d, bowl)).report()
    shown = panels(report)
    assert {knob: {a: len(c[0][1]) for a, c in arms.items()} for knob, arms in shown.items()} == {
        knob: {"base": 5, "idea": 5} for knob in RANGES
    }
    assert draw_sensitivity(tmp_path / "knobs.png", report)
    rates = design(tuned=True)
    report = TrialState(rates, play(rates, bowl)).report()
    (curves,) = panels(report).values()
    assert [share for share, _ in curves["idea"]] == [0.25, 0.5, 1.0]
    assert draw_sensitivity(tmp_path / "rates.png", report)
    fixed = design()
    report = TrialState(fixed, play(fixed, bowl)).report()
    assert not draw_sensitivity(tmp_path / "none.png", report)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["knobs.png", "rates.png"]


def test_the_range_of_a_knob() -> None:
    assert try_range(0.02, lambda _: True) == (0.0025, 0.16)
    assert try_range(0.0, lambda _: True) == (1e-3, 1.0)
    low, high = try_range(0.9, lambda v: v < 1)
    assert low == pytest.approx(0.1125)
    assert high == pytest.approx(0.9875)
    assert settings_text({"b.c": 0.123456, "a.b": 2}) == "a.b=2,b.c=0.123"


# ---------------------------------------------------------------- contexts


def tiny(folder: Path, **changes: Any) -> Path:
    steps = [{"step_name": "words", "datasets": ["words"], "steps": 6}]
    contexts = {"slow": {}, "fast": {"optimizer.lr": 0.01}}
    return write_plan(folder, **{"steps": steps, "contexts": contexts, **changes})


TRIAL = ("lmp_trial", "--training-plan", "tiny.json", "--max-seeds", "2", "--lr", "fixed")


def test_a_trial_asks_in_every_context_of_the_plan(command: Command, tmp_path: Path) -> None:
    tiny(tmp_path)
    done = command(*TRIAL, "--exp", "value_norm")
    assert done.returncode == 0, done.stderr
    for context in ("slow", "fast"):
        assert f"value_norm against gpt2ish, context {context}: UNDECIDED" in done.stdout
    assert "value_norm: UNDECIDED in slow, UNDECIDED in fast" in done.stdout
    trials = tmp_path / "gpt_out" / "trials"
    reports, odd = find_reports([tmp_path / "gpt_out"], "trial.json", TrialReport)
    assert not odd
    assert {r.design.context for _, r in reports} == {"slow", "fast"}
    assert {len(r.arms["value_norm"].runs) for _, r in reports} == {2}
    (panel,) = trials.glob("*/panel.json")
    assert json.loads(panel.read_text())["panel"]["value_norm"]["robust"] is False
    rates = {
        json.loads((tmp_path / "gpt_out" / run / "run.json").read_text())["plan"]["optimizer"]["lr"]
        for _, r in reports
        for run in r.runs
    }
    assert rates == {1e-3, 1e-2}
    runs = len(list((tmp_path / "gpt_out").glob("*/*/run.json")))
    assert runs == 8

    one = command(*TRIAL, "--exp", "value_norm", "--context", "fast")
    assert one.returncode == 0, one.stderr
    plain = command(*TRIAL, "--exp", "value_norm", "--no-panel")
    assert "against gpt2ish: UNDECIDED" in plain.stdout
    assert len(list((tmp_path / "gpt_out").glob("*/*/run.json"))) == runs, "all are shared"

    drawn = command("lmp_plotstats", "gpt_out")
    assert drawn.returncode == 0, drawn.stderr
    assert "plots/answer.png" in drawn.stdout


def test_an_arm_that_is_the_baseline_in_a_context_is_left_out_there(
    command: Command, tmp_path: Path
) -> None:
    tiny(tmp_path)
    arm = ("--exp", "gpt2ish", "--arm", "gpt2ish optimizer.lr=0.01")
    done = command(*TRIAL, *arm)
    assert done.returncode == 0, done.stderr
    assert "context fast: every arm is the baseline; it is left out" in done.stdout
    assert "context slow: UNDECIDED" in done.stdout
    one_line(command(*TRIAL, *arm, "--context", "fast"), "nothing can be judged")


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (("--context", "fsat"), "did you mean fast?"),
        (("--panel", "--sizes", "1,2"), "--sizes does not go with --panel"),
        (("--tune", "optimizer.lrr"), "did you mean optimizer.lr?"),
        (("--tune", "optimizer.name"), "only numbers are tuned"),
        (("--budget", "seconds", "--workers", "2"), "it needs --workers 1"),
        (("--budget", "flops", "--controls", "flops"), "the same already"),
    ],
)
def test_what_a_user_can_mend_is_one_line(
    args: tuple[str, ...], says: str, command: Command, tmp_path: Path
) -> None:
    tiny(tmp_path)
    trial = ("lmp_trial", "--training-plan", "tiny.json", "--max-seeds", "2", "--exp", "value_norm")
    one_line(command(*trial, *args), says)


def test_a_wrong_context_in_a_plan_names_the_nearest_setting(tmp_path: Path) -> None:
    raw = json.loads(tiny(tmp_path, contexts={"fast": {"batch.size": 3}}).read_text())
    with pytest.raises(LmplayError, match=r"context fast: batch.size .*did you mean batch"):
        parse_plan(raw, "test")
    tiny(tmp_path)
    plan = load_plan(tmp_path / "tiny.json")
    assert in_context(plan, "fast").optimizer.lr == 0.01
    without = plan.model_copy(update={"contexts": {}})
    assert plan.fingerprint == without.fingerprint, "contexts change no run"


@pytest.mark.parametrize("name", plan_files())
def test_the_contexts_of_shipped_plans_fit(name: str) -> None:
    plan = load_plan(find_plan(name))
    for context in plan.contexts:
        in_context(plan, context)


def test_an_idea_is_robust_if_every_context_says_the_same_word() -> None:
    def report(word: str) -> dict[str, Any]:
        return {"arms": {"idea": {"word": word}}}

    same = over_contexts({"a": report(REAL), "b": report(REAL)})["idea"]
    assert same["robust"]
    assert same["sentence"] == "ROBUST: REAL in a and b"
    for words in ((REAL, HARMFUL), (REAL, WITHIN_NOISE), (UNDECIDED, UNDECIDED)):
        other = over_contexts({"a": report(words[0]), "b": report(words[1])})["idea"]
        assert not other["robust"]
        assert other["sentence"] == f"{words[0]} in a, {words[1]} in b"


def test_the_budget_in_float32_is_named(command: Command, tmp_path: Path) -> None:
    steps = [{"step_name": "words", "datasets": ["words"], "tokens": 4096, "fp32_tokens": 2048}]
    path = write_plan(tmp_path, steps=steps)
    done = command("lmp_trainer", "--exp", "gpt2ish", "--training-plan", "tiny.json")
    assert done.returncode == 0, done.stderr
    assert "float32 on a CPU: the plan's budget for it, 2,048 tokens" in done.stdout + done.stderr
    assert "tokens: 2048" in done.stdout
    plan = load_plan(path)
    assert plan.for_precision("cpu", "bf16").steps[0].tokens == 4096
    assert plan.for_precision("cuda", "fp32").steps[0].tokens == 4096
    assert plan.with_budget(1024, None, None).for_precision("cpu", "fp32").steps[0].tokens == 1024
    raw = json.loads(path.read_text())
    del raw["steps"][0]["tokens"]
    with pytest.raises(LmplayError, match="fp32_tokens replaces tokens"):
        parse_plan(raw, "test")


# ---------------------------------------------------------------- the answer


def test_the_answer_figure_draws_rows_with_and_without_verdicts(tmp_path: Path) -> None:
    rows = [
        Row("good", 0.02, 0.01, 0.03, "9 pairs", REAL),
        Row("alone", -0.01, None, None, "1 seed", ""),
    ]
    draw_answer(tmp_path / "a.png", "plan", "base", rows, None)
    draw_answer(tmp_path / "b.png", "plan", "base", rows[:1], None, theme="dark")
    assert (tmp_path / "a.png").stat().st_size > 10_000
    assert (tmp_path / "a.png").read_bytes() != (tmp_path / "b.png").read_bytes()


def test_a_row_of_a_trial_has_its_interval_and_word() -> None:
    def outcome(unit: Unit) -> Result:
        own = np.random.default_rng(zlib.crc32(unit.key.encode())).normal(0, 1e-3)
        return result(3.0 + own - (0.02 if unit.arm == "idea" else 0.0))

    d = replace(design(), context="adamw")
    report = TrialState(d, play(d, outcome), {"sentence": "s", "arena": "a"}).report()
    (row,) = rows_of_trials([TrialReport.model_validate(json.loads(json.dumps(report)))])
    assert row.name == "idea, adamw (untuned)"
    assert row.word == REAL
    assert row.low is not None
    assert row.high is not None
    assert row.low < row.gain < row.high
    assert row.gain == pytest.approx(0.02, abs=2e-3)
