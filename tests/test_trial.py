"""Trials: which runs come next, what is shared, what survives a kill, and what is said."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
import zlib
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from conftest import Command, one_line, write_plan
from scipy import stats

from lmplay.cli.trial import exit_status
from lmplay.errors import LmplayError
from lmplay.training.run_folder import RunFolder
from lmplay.trial import queue, work
from lmplay.trial import state as trial
from lmplay.trial.design import FixedDesign, Result, Unit
from lmplay.trial.overview import over_sizes
from lmplay.trial.state import TrialState
from lmplay.trial.statistics import HARMFUL, REAL, UNDECIDED, WITHIN_NOISE


def design(**changes: Any) -> FixedDesign:
    fixed: dict[str, Any] = {
        "plan": "p",
        "plan_fingerprint": "0" * 16,
        "against": "base",
        "arms": ("good", "bad", "same"),
        "level": 0.01,
        "max_pairs": 16,
        "smallest_effect": 0.02,
        "tuned": False,
        "controls": (),
        "tokens": 1000,
        "precision": "fp32",
        "device": "cpu",
        "data": "d",
        "sources": {},
    }
    return FixedDesign(**{**fixed, **changes})


EFFECT = {"base": 0.0, "good": -0.1, "bad": 0.1, "same": 0.0}


def outcome(unit: Unit) -> Result:
    """What a run would end with: noise that pairs share, a little of its own, and the arm's effect;
    learning rates have their best at the factor that the arm's name says, 1 but for "good", whose
    is 8."""
    own = np.random.default_rng(zlib.crc32(unit.key.encode())).normal(0, 0.002)
    shared = np.random.default_rng(unit.seed).normal(0, 0.05)
    best = 8.0 if unit.arm == "good" else 1.0
    off = 0.05 * np.log2(unit.lr_multiplier / best) ** 2 if unit.role == "lr" else 0.0
    control = -0.2 if unit.match == "flops" else 0.0
    loss = 3 + shared + own + EFFECT[unit.arm] + off + control
    return Result(
        loss,
        loss / 2,
        [0, 500, 1000],
        [loss + 1, loss + 0.2, loss],
        2.0 if unit.arm == "good" else 1.0,
        10.0,
        "f",
    )


def play(d: FixedDesign, most: int = 1000) -> dict[str, Result]:
    results: dict[str, Result] = {}
    while units := TrialState(d, results).needed():
        assert not {u.key for u in units} & set(results), "asked for what is there"
        unit = units[len(results) * 7 % len(units)]  # in any order
        results[unit.key] = outcome(unit)
        assert len(results) < most
    return results


def test_pairs_are_added_until_each_arm_is_settled() -> None:
    d = design()
    report = TrialState(d, play(d)).report()
    assert {a: v["word"] for a, v in report["arms"].items()} == {
        "good": REAL,
        "bad": HARMFUL,
        "same": WITHIN_NOISE,
    }
    assert report["over"]
    good = report["arms"]["good"]
    assert good["gain"] == pytest.approx(0.1, abs=0.01)
    assert good["deviation_paired"] < 0.01 < good["deviation_unpaired"]
    assert good["correlation"] > 0.9
    assert good["tokens_ratio"] > 1
    assert good["seconds_ratio"] == pytest.approx(good["tokens_ratio"] / 2)
    base = [r.loss for k, r in play(d).items() if k.startswith("pair base ")]
    half = stats.t.ppf(0.995, len(base) - 1) * np.std(base, ddof=1) * math.sqrt(2 / len(base))
    assert report["null"] == {"runs": len(base), "half": pytest.approx(half)}


def test_an_arm_that_is_settled_gets_no_more_pairs() -> None:
    d = design(arms=("good", "same"), smallest_effect=1e-6)
    results = play(d)
    seeds = {a: sum(f"pair {a} " in k for k in results) for a in ("base", "good", "same")}
    assert d.looks == [10, 14, 16]
    assert seeds["good"] in (10, 14)
    assert seeds["base"] == seeds["same"] == 16
    report = TrialState(d, results).report()
    assert report["arms"]["same"]["word"] == UNDECIDED
    assert report["arms"]["same"]["more"] > 0
    assert report["arms"]["good"]["pairs"] == seeds["good"]


def test_learning_rates_are_found_first_and_the_range_grows() -> None:
    d = design(arms=("good",), tuned=True)
    first = TrialState(d, {}).needed()
    assert {u.role for u in first} == {"lr"}
    assert (
        len([u for u in first if u.arm == "base"])
        == len([u for u in first if u.arm == "good"])
        == 5
    )
    assert {u.seed for u in first} == {trial.LR_SEED}
    results = play(d)
    report = TrialState(d, results).report()
    assert report["arms"]["good"]["lr_multiplier"] == 8.0, "beyond the range that was begun with"
    assert trial.tuning("base", results) == 1.0
    tried = {
        share: [f for s, f, _ in report["sensitivity"]["good"] if s == share]
        for share in trial.RUNGS
    }
    assert {0.25, 1.0, 8.0, 16.0} <= set(tried[0.25])
    assert (len(tried[0.5]), len(tried[1.0])) == trial.KEPT, "the others were stopped"
    assert all(f"lr{8:g}" in k for k in results if "pair good" in k)


def test_a_rate_that_only_looks_good_in_short_runs_is_not_taken() -> None:
    """As seen on real runs: while all rates still learn how often each token comes, a rate that
    later blows up leads by a hair."""
    results: dict[str, Result] = {}
    while isinstance(units := trial.tuning("base", results), list):
        for u in units:
            loss = (
                6 - 0.001 * u.lr_multiplier
                if u.share < 0.5
                else 5 + (u.lr_multiplier - 1) ** 2 / u.share
            )
            results[u.key] = Result(loss, loss / 2, [1], [loss], 1.0, 1.0, "f")
    assert units == 1.0
    assert sum(u.endswith("x1") for u in results) == trial.KEPT[1]


def test_gains_over_sizes_are_fitted_by_seed_and_told_by_their_sign() -> None:
    random = np.random.default_rng(0)
    flops = (1e9, 4e9, 16e9)
    gains = np.array([0.1 - 0.02 * np.log2(f / 1e9) for f in flops])[:, None] + random.normal(
        0, 0.005, (3, 9)
    )
    design = {"arms": ["good"], "level": 0.01}

    def report(sign: float) -> list[dict[str, Any]]:
        return [
            {"design": design, "arms": {"good": {"flops": f, "gains": (sign * g).tolist()}}}
            for f, g in zip(flops, gains, strict=True)
        ]

    found = over_sizes(report(1))["good"]
    slopes = [stats.linregress(np.log2(flops), gains[:, seed]).slope for seed in range(9)]
    assert found["slope"] == pytest.approx(np.mean(slopes))
    interval = stats.t.interval(0.99, 8, loc=np.mean(slopes), scale=stats.sem(slopes))
    assert found["interval"] == pytest.approx(list(interval))
    assert "the gain shrinks" in found["sentence"]
    assert "the harm shrinks" in over_sizes(report(-1))["good"]["sentence"]
    assert over_sizes(report(1)[:1])["good"]["slope"] is None


def test_a_run_that_diverges_ends_its_arm_and_no_other() -> None:
    d = design(arms=("good", "same"))
    inf = math.inf

    def lost(unit: Unit) -> bool:
        return unit.arm == "good" and unit.seed == 2

    results: dict[str, Result] = {}
    while units := TrialState(d, results).needed():
        for unit in units:
            results[unit.key] = (
                replace(outcome(unit), loss=inf, bpb=inf) if lost(unit) else outcome(unit)
            )
    assert sum("pair good " in key for key in results) == d.looks[0], (
        "no run after the look that saw it"
    )
    report = TrialState(d, results).report()
    good = report["arms"]["good"]
    assert (good["word"], good["more"], good["pairs"]) == (UNDECIDED, None, 2)
    assert "good diverged with seed 2" in good["why"]
    assert report["arms"]["same"]["word"] == WITHIN_NOISE
    assert report["over"]
    json.dumps(report, allow_nan=False)
    results |= {k: replace(r, loss=inf, bpb=inf) for k, r in results.items() if "base s0" in k}
    assert {a["pairs"] for a in TrialState(d, results).report()["arms"].values()} == {0}


def test_a_run_that_diverges_between_two_looks_ends_its_arm_with_the_reason() -> None:
    d = design(arms=("good",), max_pairs=20, smallest_effect=1e-6)
    late = d.looks[0]  # the first pair after the first look

    def outcome_of(unit: Unit) -> Result:
        if unit.arm == "good":  # not settled at the first look
            unit = replace(unit, arm="same")
            return (
                replace(outcome(unit), loss=math.inf, bpb=math.inf)
                if unit.seed == late
                else outcome(unit)
            )
        return outcome(unit)

    results: dict[str, Result] = {}
    while units := TrialState(d, results).needed():
        results[units[0].key] = outcome_of(units[0])  # one at a time, as a worker takes them
    assert len(d.looks) > 1
    assert sum("pair good " in key for key in results) == late + 1
    report = TrialState(d, results).report()
    assert report["over"]
    assert f"good diverged with seed {late}" in report["arms"]["good"]["why"]


def test_a_control_that_diverges_shows_nothing() -> None:
    d = design(arms=("good",), controls=("params",))
    results: dict[str, Result] = {}
    while units := TrialState(d, results).needed():
        for unit in units:
            results[unit.key] = outcome(unit)
            if unit.role == "control" and unit.seed == 1:
                results[unit.key] = replace(outcome(unit), loss=math.inf)
    good = TrialState(d, results).report()["arms"]["good"]
    assert good["word"] == UNDECIDED
    assert good["why"] == "the baseline of equal params diverged with seed 1"


def test_a_control_that_is_better_takes_the_verdict_away() -> None:
    fine = design(arms=("good",), controls=("params", "seconds"))
    results = play(fine)
    report = TrialState(fine, results).report()["arms"]["good"]
    assert report["word"] == REAL
    assert set(report["controls"]) == {"params", "seconds"}
    assert any("x2 seconds good" in k for k in results), (
        "the arm took twice the time: its control gets twice the tokens"
    )
    beaten = design(arms=("good",), controls=("flops",))
    report = TrialState(beaten, play(beaten)).report()["arms"]["good"]
    assert report["word"] == UNDECIDED
    assert "equal flops" in report["why"]


# ---------------------------------------------------------------- the board


@pytest.fixture(params=["journal", "sqlite"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    where = (
        str(tmp_path / "journal.log")
        if request.param == "journal"
        else f"sqlite:///{tmp_path}/trials.db"
    )
    return queue.open_storage(where)


def test_each_unit_is_claimed_once_and_comes_back_with_its_result(storage: Any) -> None:
    d = design()
    one = queue.Queue(storage, "t", d)
    two = queue.Queue(storage, "t", d)
    units = [Unit("pair", "good", s) for s in range(3)]
    one.offer(units)
    two.offer(units)  # of what is there already nothing
    claims = [b.claim(name) for b, name in ((one, "a"), (two, "b"), (one, "a"))]
    assert sorted(u.seed for _, u in claims if u) == [0, 1, 2]  # type: ignore[misc]
    assert two.claim("b") is None
    number, unit = claims[0]  # type: ignore[misc]
    one.done(number, outcome(unit))
    assert two.results() == {unit.key: outcome(unit)}
    assert {state for _, state, _ in two.status()} == {"done", "running"}


def test_what_was_put_up_twice_at_once_runs_once(storage: Any) -> None:
    b = queue.Queue(storage, "t", design())
    unit = Unit("pair", "good", 0)
    for _ in range(2):  # two workers that looked at the same moment
        b.study.enqueue_trial({}, user_attrs={"unit": unit.key, "fields": unit.__dict__})
    assert b.claim("a") is not None
    assert b.claim("b") is None


def test_the_work_of_a_dead_owner_is_given_to_another(
    storage: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(queue, "BEAT", 0.05)
    monkeypatch.setattr(queue, "DEAD", 0.6)
    alive, dead = (queue.Queue(storage, "t", design()) for _ in range(2))
    units = [Unit("pair", "good", s) for s in range(2)]
    alive.offer(units)
    first = alive.claim("alive")
    lost = dead.claim("dead")
    assert first is not None
    assert lost is not None
    with alive.heartbeat(first[0]):
        until = time.monotonic() + 10
        found: list[str] = []
        while not found and time.monotonic() < until:
            found = alive.reclaim_stale()
            time.sleep(0.1)
    assert found == [lost[1].key], "who shows that it lives keeps its work"
    alive.offer(units)
    again = alive.claim("alive")
    assert again is not None
    assert again[1] == lost[1]
    assert not dead.give_up(lost[0])


def test_the_work_of_an_ended_process_of_this_machine_is_given_up_at_once(
    storage: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(queue, "DEAD", 1e6)
    alive, dead = (queue.Queue(storage, "t", design()) for _ in range(2))
    units = [Unit("pair", "good", s) for s in range(3)]
    alive.offer(units)
    process = subprocess.Popen(["sleep", "100"])
    with monkeypatch.context() as changed:
        changed.setattr(queue.os, "getpid", lambda: process.pid)
        lost = dead.claim("host 1")
    mine = alive.claim("host 2")
    assert lost is not None
    assert mine is not None
    assert alive.reclaim_stale() == []
    process.kill()
    process.wait()
    assert alive.reclaim_stale() == [lost[1].key]


@pytest.mark.parametrize("owner", ["elsewhere 7", "host 12345", "a container 1"])
def test_a_worker_says_for_whom_it_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, storage: Any, owner: str
) -> None:
    """Once, and not at every look."""
    monkeypatch.setattr(work, "WAIT", 0.0)
    other = queue.Queue(storage, "t", design())
    units = [Unit("pair", "good", 0)]
    other.offer(units)
    claimed = other.claim(owner)
    assert claimed is not None
    asked = iter([units, units, units, []])

    class State:
        def needed(self) -> list[Unit]:
            return next(asked)

    part = SimpleNamespace(
        queue=queue.Queue(storage, "t", design()), state=State, folder=tmp_path, design=design()
    )
    said: list[str] = []
    work.work(part, said.append)
    assert said == [f"waiting for {units[0].key} ({owner}); a worker silent for 30 s loses its run"]


def test_another_design_under_the_same_name_is_refused(storage: Any) -> None:
    queue.Queue(storage, "t", design())
    with pytest.raises(LmplayError, match="began with another smallest_effect"):
        queue.Queue(storage, "t", design(smallest_effect=0.5))


def test_a_storage_that_cannot_be_opened_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(LmplayError, match="it cannot be opened"):
        queue.open_storage("nosuch://x")


# ---------------------------------------------------------------- the command


TRIAL = ("--exp", "value_norm", "--training-plan", "tiny.json", "--max-seeds", "4", "--lr", "fixed")


def tiny_plan(folder: Path) -> None:
    steps = [{"step_name": "words", "datasets": ["words"], "steps": 6}]
    write_plan(
        folder, steps=steps, model={"num_blocks": 1, "embed_dim": 16, "num_heads": 2, "max_len": 32}
    )


def test_a_trial_says_its_verdict_and_the_same_command_says_it_again(
    command: Command, tmp_path: Path
) -> None:
    tiny_plan(tmp_path)
    first = command("lmp_trial", *TRIAL)
    assert first.returncode == 0, first.stderr
    assert "value_norm against gpt2ish: " in first.stdout
    assert "(untuned" in first.stdout
    assert "runs: 8" in first.stdout
    [path] = (tmp_path / "gpt_out" / "trials").glob("*/trial.json")
    report = json.loads(path.read_text())
    assert report["arms"]["value_norm"]["pairs"] == 4
    assert json.loads((path.parent / "design.json").read_text()) == report["design"]
    again = command("lmp_trial", *TRIAL)
    assert again.returncode == 0
    assert json.loads(path.read_text()) == report
    assert "runs done; now" not in again.stdout
    status = command("lmp_trial", *TRIAL, "--status")
    assert "8 runs done, 0 queued" in status.stdout
    other = command("lmp_trial", *TRIAL, "--smallest-effect", "0.5")
    assert other.returncode == 1
    assert "fixed before its first run" in other.stderr


def test_several_sizes_are_a_trial_each_and_a_fit(command: Command, tmp_path: Path) -> None:
    tiny_plan(tmp_path)
    done = command("lmp_trial", *TRIAL, "--max-seeds", "2", "--sizes", "0.5,1")
    assert done.returncode == 0, done.stderr
    assert "value_norm over sizes: the gain" in done.stdout
    folders = sorted(p.name for p in (tmp_path / "gpt_out" / "trials").iterdir())
    assert folders == [f"tiny-value_norm-against-gpt2ish{x}" for x in ("", "-x0.5", "-x1")]
    whole = json.loads((tmp_path / "gpt_out" / "trials" / folders[0] / "sizes.json").read_text())
    (small, _), (large, _) = whole["fits"]["value_norm"]["points"]
    assert small < large
    wrong = command("lmp_trial", *TRIAL, "--sizes", "0.01,1")
    assert wrong.returncode == 1
    assert "--sizes 0.01" in wrong.stderr


def test_an_arm_may_be_any_recipe(command: Command, tmp_path: Path) -> None:
    tiny_plan(tmp_path)
    arm = "gpt2ish optimizer.lr=0.01 batch.batch_size=4"
    plan = ("--training-plan", "tiny.json", "--max-seeds", "2", "--lr", "fixed")
    done = command("lmp_trial", "--exp", "gpt2ish", "--arm", arm, *plan)
    assert done.returncode == 0, done.stderr
    label = "gpt2ish-batch.batch_size=4-optimizer.lr=0.01"
    assert f"{label} against gpt2ish: UNDECIDED" in done.stdout
    (path,) = (tmp_path / "gpt_out" / "trials").glob("*/trial.json")
    report = json.loads(path.read_text())
    assert list(report["arms"]) == [label]
    runs = [RunFolder(tmp_path / "gpt_out" / r).read() for r in report["arms"][label]["runs"]]
    assert {r["plan"]["optimizer"]["lr"] for r in runs} == {0.01}
    assert {r["summary"]["tokens"] for r in runs} == {6 * 8 * 32}  # as the baseline's
    assert len(report["runs"]) == len(runs) == 2


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (("--arm", "gpt2ish"), "this is the baseline; add an idea or --arm"),
        (("--arm", "gpt2ish optimizer.lr"), "write settings as KEY=VALUE"),
        (("--arm", "gpt2ish optimizer.lrr=1"), "did you mean optimizer.lr?"),
        (("--arm", ""), "the name of an experiment is missing"),
        ((), "--exp or --arm names what is judged"),
    ],
)
def test_a_wrong_arm_is_one_line(
    args: tuple[str, ...], says: str, command: Command, tmp_path: Path
) -> None:
    tiny_plan(tmp_path)
    one_line(command("lmp_trial", *args, "--training-plan", "tiny.json"), says)


def test_a_killed_worker_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three workers on one storage, one of them killed in the middle: each run once, the same
    verdict to the bit."""
    tiny_plan(tmp_path)
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    quick = (
        "import sys, lmplay.trial.queue as q; q.BEAT, q.DEAD = 0.5, 6.0; "
        "from lmplay.cli.trial import main; sys.exit(main())"
    )

    def start(out: str) -> subprocess.Popen[str]:
        words = [sys.executable, "-c", quick, *TRIAL, "--out", out]
        return subprocess.Popen(
            words, cwd=tmp_path, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )

    alone = start("one")
    assert alone.wait(200) == 0
    several = [start("three") for _ in range(3)]
    victim = several[1]
    runs = tmp_path / "three"
    until = time.monotonic() + 100
    while len(list(runs.glob("*/*/run.json"))) < 3 and time.monotonic() < until:
        time.sleep(0.05)
    victim.send_signal(signal.SIGKILL)
    outputs = [p.communicate(timeout=200) for p in several]
    assert [p.returncode for p in several if p is not victim] == [0, 0], outputs
    one, three = (
        json.loads(next((tmp_path / o / "trials").glob("*/trial.json")).read_text())
        for o in ("one", "three")
    )
    for report in (one, three):
        assert report["cost"]["runs"] == 8
        report["arms"]["value_norm"].pop("seconds_ratio")
    assert one["arms"] == three["arms"]
    assert one["null"] == three["null"]
    owners = [line for out, _ in outputs for line in out.splitlines() if "; now " in line]
    units = [line.split("now ")[1] for line in owners]
    assert len(units) - len(set(units)) <= 1, "only what the killed one had begun was begun again"


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (("--exp", "gpt2ish"), "this is the baseline"),
        (("--exp", "ue", "--controls", "speed"), "there is no such control"),
        (("--exp", "uee"), "there is no such experiment"),
        (("--exp", "ue", "--training-plan", "default"), "a budget in tokens or optimizer steps"),
        (("--exp", "ue", "--level", "0.7"), "--level must be in"),
    ],
)
def test_what_a_user_can_mend_is_one_line(
    args: tuple[str, ...], says: str, command: Command
) -> None:
    result = command("lmp_trial", *args)
    assert result.returncode == 1
    assert says in result.stderr
    assert "Traceback" not in result.stderr


# ---------------------------------------------------------------- for scripts


def test_the_exit_status_is_the_verdicts() -> None:
    def of(*reports: dict[str, str]) -> int:
        return exit_status([{"arms": {a: {"word": w} for a, w in r.items()}} for r in reports])

    words = {REAL: 0, HARMFUL: 10, WITHIN_NOISE: 11, UNDECIDED: 12}
    for word, status in words.items():
        assert of({"a": word}) == of({"a": word}, {"a": word}) == status
    assert of({"a": REAL}, {"a": HARMFUL}) == 12, "its contexts do not agree"
    assert of({"a": HARMFUL, "b": REAL}) == 0, "of several ideas the best"
    assert of({"a": HARMFUL, "b": UNDECIDED}) == 12
    assert of({"a": HARMFUL, "b": WITHIN_NOISE}) == 11


def test_a_trial_stops_when_its_time_is_up_and_goes_on(command: Command, tmp_path: Path) -> None:
    tiny_plan(tmp_path)
    done = command("lmp_trial", *TRIAL, "--max-hours", "1e-9", "--exit-code")
    assert done.returncode == 12, done.stderr
    assert "--max-hours: the time is up, and 8 runs are missing" in done.stdout
    assert "runs: 0" in done.stdout
    done = command("lmp_trial", *TRIAL, "--max-hours", "1", "--exit-code")
    assert done.returncode == 12, "four pairs are too few for a verdict"
    assert "missing" not in done.stdout
    assert "runs: 8" in done.stdout


def test_a_run_is_stopped_and_kept_when_the_time_is_up(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first run's length is unknown: it begins, and a checkpoint is all that it leaves."""
    steps = [{"step_name": "words", "datasets": ["words"], "steps": 100_000}]
    write_plan(
        tmp_path,
        steps=steps,
        model={"num_blocks": 1, "embed_dim": 16, "num_heads": 2, "max_len": 32},
    )
    began = time.monotonic()
    done = command("lmp_trial", *TRIAL, "--max-hours", "0.002")
    assert done.returncode == 0, done.stderr
    assert "--max-hours: the time is up" in done.stdout
    assert time.monotonic() - began < 60
    (run,) = (tmp_path / "gpt_out").glob("trial-*/*/run.json")
    assert any((run.parent / "checkpoints").iterdir())
    assert "summary" not in json.loads(run.read_text())


@pytest.mark.parametrize("name", ["lmp_arena", "lmp_study"])
def test_other_shared_work_stops_as_well(name: str, command: Command, tmp_path: Path) -> None:
    steps = [{"step_name": "words", "datasets": ["words"], "tokens": 4096}]
    write_plan(tmp_path, steps=steps)
    study = {
        "arms": ["gpt2ish"],
        "training_plans": ["tiny.json"],
        "settings": {"optimizer.lr": [0.001, 0.002]},
    }
    (tmp_path / "study.json").write_text(json.dumps(study))
    what = "study.json" if name == "lmp_study" else "tiny.json"
    done = command(name, what, "--max-hours", "1e-9")
    assert done.returncode == 0, done.stderr
    assert "--max-hours: the time is up" in done.stdout
