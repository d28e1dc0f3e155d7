"""Certificates: what each line says in a world whose truth is known, and when one is stale."""

from __future__ import annotations

import json
import math
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ROOT, Command, one_line, write_plan
from scipy import stats

from lmplay.discover import list_sources
from lmplay.plan import find_plan, load_plan, plan_files
from lmplay.trial import arena, certificate, measure, transfer, work
from lmplay.trial.arena import Arena, Layout, Recipe
from lmplay.trial.design import FixedDesign, Result, Unit
from lmplay.trial.statistics import HARMFUL, judge

TRUTH = {"again": 0.0, "worse": 0.05, "narrow": 0.1, "wide": -0.1}
NOISE = 0.001
SLOPE = 0.5  # nats for e times the tokens


def world(unit: Unit, **changes: float) -> Result:
    """What a run would end with: the seed's luck, a little of its own, and what is so."""
    truth = {**TRUTH, **changes}
    own = np.random.default_rng(zlib.crc32(unit.key.encode())).normal(0, NOISE / math.sqrt(2))
    seed = np.random.default_rng(unit.seed).normal(0, 0.02)
    loss = 3.8 + seed + own + truth.get(unit.arm, 0.0)
    loss += 0.02 * math.log2(unit.lr_multiplier) ** 2 - SLOPE * math.log(unit.share)
    loss += 0.05 * abs(math.log10(float(unit.arm.partition("decay=")[2] or 1)))
    return Result(loss, loss / 2, [0, 1000], [5.0, loss], 30.0, 10.0, "f")


LAYOUT = Layout(
    baseline="base",
    recipes=(
        Recipe("the plan's recipe", "base", {0.0: "decay=0.1", 1.0: "base", 10.0: "decay=10"}),
    ),
    widths={0.5: "narrow", 1.0: "base", 2.0: "wide"},
    harmful=("worse",),
    equal=("again",),
    tables=(6.0, 4.1, 3.4),
)


def design() -> FixedDesign:
    return FixedDesign(
        plan="p",
        plan_fingerprint="0" * 16,
        against="base",
        arms=("again", "worse"),
        level=0.01,
        max_pairs=arena.PAIRS,
        smallest_effect=0.005,
        tuned=False,
        controls=(),
        tokens=1000,
        precision="fp32",
        device="cpu",
        data="d",
        sources={},
        last=1,
    )


def lines_of(layout: Layout = LAYOUT, **changes: float) -> dict[str, arena.Line]:
    results: dict[str, Result] = {}
    while units := Arena(layout, design(), results).needed():
        for unit in units:
            assert unit.key not in results
            results[unit.key] = world(unit, **changes)
    return {line.name: line for line in Arena(layout, design(), results).measured()}


def test_every_line_passes_where_it_should() -> None:
    lines = lines_of()
    assert {name: line.passed for name, line in lines.items()} == dict.fromkeys(lines, True)
    found = lines["sensitivity"].numbers
    assert found["deviation_paired"] == pytest.approx(NOISE, rel=0.7)
    assert found["deviation_unpaired"] > 10 * NOISE
    assert found["minutes_per_run"] == 0.5
    gain = found["smallest_gain"]
    assert found["smallest_gain_tokens_percent"] == pytest.approx(
        100 * math.expm1(gain / SLOPE), rel=0.05
    )
    planted = lines["planted effects"].numbers
    assert planted["0.9"]["predicted"] == pytest.approx(-SLOPE * math.log(0.9), rel=0.1)
    assert np.mean(planted["1.1"]["differences"]) == pytest.approx(-SLOPE * math.log(1.1), rel=0.1)
    assert "bigram table" in lines["beyond counting"].sentence, "the runs are short"


@pytest.mark.parametrize(
    ("changes", "layout", "failing"),
    [
        ({}, {"tables": (6.0, 3.6, 3.4)}, "beyond counting"),
        ({"wide": 0.02}, {}, "scale"),
        ({"again": 0.05}, {}, "planted effects"),
        ({"worse": -0.05}, {}, "known answers"),
        ({"worse": 0.0}, {}, "known answers"),
        ({"decay=10": -0.3}, {}, "tuned"),
    ],
)
def test_each_line_fails_where_it_should(
    changes: dict[str, float], layout: dict[str, Any], failing: str
) -> None:
    lines = lines_of(replace(LAYOUT, **layout), **changes)
    assert lines[failing].passed is False, lines[failing].sentence


def test_runs_that_diverge_leave_a_certificate_that_json_can_hold() -> None:
    """A learning rate that is far off may well diverge: that is a known answer, not a crash."""
    results: dict[str, Result] = {}
    while units := Arena(LAYOUT, design(), results).needed():
        for unit in units:
            lost = unit.lr_multiplier == 4.0
            results[unit.key] = replace(world(unit), loss=math.inf) if lost else world(unit)
    state = Arena(LAYOUT, design(), results)
    lines = {line.name: line for line in state.measured()}
    assert lines["known answers"].passed
    assert "learning rate x 4 diverged" in lines["known answers"].sentence
    assert lines["tuned"].passed
    json.dumps(state.report(), allow_nan=False)
    results = {
        k: replace(r, loss=math.inf) if " base " in k or "again" in k else r
        for k, r in results.items()
    }
    state = Arena(LAYOUT, design(), results)
    assert not any(line.passed for line in state.measured())
    assert "the baseline diverged: pair base s0" in state.measured()[0].sentence
    json.dumps(state.report(), allow_nan=False)


def test_a_line_with_missing_runs_is_open() -> None:
    results = {u.key: world(u) for u in Arena(LAYOUT, design(), {}).needed()}
    lines = {line.name: line for line in Arena(LAYOUT, design(), results).measured()}
    assert lines["beyond counting"].passed
    assert lines["tuned"].passed is None
    assert "runs are missing" in lines["tuned"].sentence


def test_the_smallest_gain_is_found_with_the_power_it_says() -> None:
    random = np.random.default_rng(0)
    gain = arena.smallest_gain(0.01)
    words = [
        judge({"": random.normal(gain, 0.01, arena.PAIRS).tolist()}, 1e-9, 20)[""].word
        for _ in range(400)
    ]
    share = np.mean([word == HARMFUL for word in words])
    assert share == pytest.approx(arena.POWER, abs=3 * math.sqrt(0.8 * 0.2 / 400) + 0.01)


def test_rank_correlation_is_spearmans(tmp_path: Path) -> None:
    gains = {f"idea{i}": float(i) for i in range(9)}
    for plan, sign in (("small", 1.0), ("large", 0.5)):
        folder = tmp_path / "trials" / plan
        folder.mkdir(parents=True)
        arms = {name: {"gain": sign * gain**2} for name, gain in gains.items()}
        report = {"design": {"plan": plan, "against": "base"}, "over": True, "arms": arms}
        (folder / "trial.json").write_text(json.dumps(report))
    line = transfer.transfer(tmp_path, "small", tmp_path / "large.json")
    assert line.passed
    assert "9 ideas" in line.sentence
    a, b = np.random.default_rng(0).normal(size=(2, 20)).tolist()
    assert transfer.rank_correlation(a, b) == pytest.approx(stats.spearmanr(a, b).statistic)
    few = transfer.transfer(tmp_path, "small", tmp_path / "other.json")
    assert few.passed is None


def test_the_interval_of_a_rank_correlation_covers_it() -> None:
    """Of normal pairs with a known correlation, in 95 of 100 samples."""
    random = np.random.default_rng(0)
    r = 0.7
    truth = 6 / math.pi * math.asin(r / 2)  # Spearman's, of the bivariate normal distribution
    covered = 0
    for _ in range(600):
        a, b = random.multivariate_normal([0, 0], [[1, r], [r, 1]], size=20).T
        found = transfer.rank_correlation(a.tolist(), b.tolist())
        low, high = transfer.correlation_interval(found, 20)
        covered += low <= truth <= high
    assert covered / 600 == pytest.approx(0.95, abs=0.03)


# ---------------------------------------------------------------- the command


def arena_plan(folder: Path) -> Path:
    return write_plan(
        folder,
        steps=[{"step_name": "words", "datasets": ["words"], "tokens": 3072}],
        contexts={"same": {}, "fast": {"optimizer.lr": 0.003}},
    )


@pytest.fixture
def faked(monkeypatch: pytest.MonkeyPatch) -> list[Unit]:
    """Runs take no time; the list holds those that were made."""
    made: list[Unit] = []

    def run_unit(
        unit: Unit, fixed: FixedDesign, jobs: dict[str, Any], until: float | None
    ) -> Result:
        made.append(unit)
        known = {"half_attention": 0.1, "no_position": 0.1, "random_tokens": 0.1}
        # Wider is better, and a decay of the plan's is best.
        width = float(unit.arm.partition("embed_dim=")[2] or 16)
        own = world(replace(unit, arm="base"), **known)
        decayed = 0.05 * ("weight_decay" in unit.arm)
        loss = own.loss + known.get(unit.arm, 0.0) - 0.1 * math.log2(width / 16) + decayed
        loss += float(np.random.default_rng(zlib.crc32(unit.key.encode())).normal(0, 1e-4))
        return replace(own, loss=loss)

    monkeypatch.setattr(work, "run_unit", run_unit)
    return made


def test_a_certificate_is_measured_quoted_and_goes_stale(
    command: Command, tmp_path: Path, faked: list[Unit]
) -> None:
    path = arena_plan(tmp_path)
    half = command("lmp_arena", "tiny.json", "--status")
    assert half.returncode == 0, half.stderr
    assert "open" in half.stdout
    done = command("lmp_arena", "tiny.json")
    assert done.returncode == 0, done.stderr
    assert len({u.key for u in faked}) == len(faked), "each run once"
    found = certificate.read_certificates(path)["fp32"]
    assert found.missing() == ["transfer"]
    assert found.failed() in ([], ["beyond counting"])  # the losses are made up, the tables not
    count = len(faked)
    again = command("lmp_arena", "tiny.json")
    assert again.returncode == 0
    assert len(faked) == count, "everything was there"

    trial = (
        "lmp_trial",
        "--exp",
        "half_attention",
        "--training-plan",
        "tiny.json",
        "--lr",
        "fixed",
    )
    said = command(*trial, "--max-seeds", "2", "--no-panel")
    assert said.returncode == 0, said.stderr
    word = "measured" if found.failed() else "certified"
    assert f"arena {word} {found.date} in fp32" in said.stdout
    other = command(*trial, "--max-seeds", "2", "--no-panel", "--tokens", "2048", "--name", "x")
    assert "it holds for the plan's own budget" in other.stdout
    described = command("lmp_trainer", "--training-plan", "tiny.json", "--describe")
    assert f"arena {word} {found.date}" in described.stdout

    raw = json.loads(path.read_text())
    raw["batch"]["batch_size"] = 16
    path.write_text(json.dumps(raw))
    stale = command(*trial, "--max-seeds", "2", "--no-panel", "--name", "edited")
    assert "uncertified arena" in stale.stdout
    assert "the plan was edited since" in stale.stdout

    certificate.certificate_file(path).write_text("{")
    damaged = command(*trial, "--max-seeds", "2", "--no-panel", "--name", "damaged")
    assert damaged.returncode == 0
    assert "this certificate is damaged" in damaged.stdout


def test_what_a_user_can_mend_is_one_line(command: Command, tmp_path: Path) -> None:
    arena_plan(tmp_path)
    one_line(command("lmp_arena", "sketchh"), "did you mean sketch?")
    one_line(command("lmp_arena", "tiny.json", "--exp", "modernn"), "did you mean modern?")
    write_plan(tmp_path, steps=[{"step_name": "words", "datasets": ["words"], "minutes": 1}])
    one_line(command("lmp_arena", "tiny.json"), "a budget in tokens or optimizer steps")


def test_a_real_run_of_each_kind_is_made(tmp_path: Path) -> None:
    """One run for each way in which the runs of a certificate differ."""
    path = arena_plan(tmp_path)
    part = measure.Measurement(str(path), out=tmp_path / "out", log=lambda text: None).part
    units = {u.key: u for _, line, _ in part.state().lines() for u in line}.values()
    kinds = {}
    for unit in units:
        kinds.setdefault((unit.arm, unit.lr_multiplier == 1, unit.share), unit)
    losses = {}
    for kind, unit in kinds.items():
        losses[kind] = work.run_unit(replace(unit, seed=0), part.design, part.jobs)
    assert all(math.isfinite(r.loss) for r in losses.values())
    base = losses["modern", True, 1.0]
    assert losses["modern", True, 0.9].tokens[-1] == pytest.approx(0.9 * base.tokens[-1], rel=0.1)
    again = losses["modern_again", True, 1.0]
    assert 0 < abs(again.loss - base.loss) < 0.1
    assert len({r.loss for r in losses.values()}) == len(losses), "no two kinds are the same"


# ---------------------------------------------------------------- what is shipped

CERTIFIED = [name for name, path in plan_files().items() if certificate.read_certificates(path)]


@pytest.mark.parametrize("name", CERTIFIED)
def test_shipped_certificates_hold(name: str) -> None:
    path = find_plan(name)
    for precision, found in certificate.read_certificates(path).items():
        plan = load_plan(path).for_precision(found.device, precision)
        current, sentence = certificate.valid(path, plan, precision, found.device)
        assert current == found, sentence
        assert set(found.lines) == set(certificate.LINES)


def test_the_known_answers_are_of_a_baseline() -> None:
    known = [s for s in list_sources() if s.harmful or s.equal]
    assert [s.path.parent for s in known] == [ROOT / "experiments"]
    (source,) = known
    assert set(source.harmful) | set(source.equal) == set(source.variants)
