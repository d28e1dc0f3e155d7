"""Sizes are counted, and the controls that are matched to them are as large as they say."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from conftest import Command, write_plan

from lmplay import discover, testing
from lmplay import model as probe
from lmplay.api import Batch
from lmplay.training import match

CPU = torch.device("cpu")


def batch(config: object, size: int = 1) -> Batch:
    ids = torch.randint(config.vocab_size, (size, config.max_len))
    return Batch(ids, ids)


def test_flops_are_those_of_the_formula() -> None:
    """gpt2ish: 2 a weight of each product and 4 T D a block for scores and reading; backward twice,
    and the scores once more, as the fused attention computes them again."""
    s = testing.tiny("gpt2ish", num_blocks=3, embed_dim=32, max_len=64, vocab_size=50)
    size = match.measure(s.runner, batch(s.config, 2))
    products = 2 * (3 * 12 * 32 * 32 + 32 * 50)
    attention = 3 * 4 * 64 * 32
    assert size.inference_flops == products + attention
    assert size.flops == 3 * products + (1 + 2.5) * attention
    assert (size.parameters, size.training_only) == (size.folded, 0)


def test_what_weights_alone_decide_counts_once_an_optimizer_step() -> None:
    s = testing.tiny("uw2")
    one, ten = (match.measure(s.runner, batch(s.config), passes).flops for passes in (1, 10))
    base = match.measure(testing.tiny("gpt2ish").runner, batch(s.config)).flops
    assert base < ten < one
    assert (ten - base) == pytest.approx((one - base) / 10, rel=1e-6)


def test_folded_size_is_the_baselines() -> None:
    base = match.measure(testing.tiny("gpt2ish").runner, batch(testing.tiny("gpt2ish").config))
    for variant in ("ue", "uw3", "sac1"):
        s = testing.tiny(variant)
        size = match.measure(s.runner, batch(s.config))
        assert size.parameters > size.folded == base.parameters
        assert size.inference_flops == base.inference_flops


@pytest.mark.parametrize("wanted", [1, 7, 8, 9, 50, 1234])
@pytest.mark.parametrize("start", [1, 6, 40])
def test_nearest_by_brute_force(wanted: int, start: int) -> None:
    def cost(n: int) -> float:
        return n * n / 3 + n

    found, reached = match._nearest(cost, wanted, start)
    assert abs(reached - wanted) == min(abs(cost(n) - wanted) for n in range(1, 200))
    assert reached == cost(found)


@pytest.mark.parametrize("what", match.UNITS)
@pytest.mark.parametrize("variant", ["ue", "sac1", "nnm_weights", "nnm_select"])
def test_a_control_is_as_large_as_it_says(variant: str, what: str) -> None:
    sizes = {
        "num_blocks": 2,
        "embed_dim": 64,
        "num_heads": 2,
        "max_len": 32,
        "vocab_size": 300,
        "dropout": 0.0,
    }
    experiment, baseline = (discover.load(*discover.find(name)) for name in (variant, "gpt2ish"))
    config = experiment.config(sizes, {})[0]
    base = baseline.config(sizes, {})[0]
    wanted = match.measure(experiment.runner(config), batch(config, 2))
    found = match.match(wanted, variant, baseline, base, what, CPU)
    assert abs(found.off) <= match.TOLERANCE
    control = match.measure(
        baseline.runner(dataclasses.replace(base, **{found.field: found.value})), batch(base)
    )
    goal = (
        (wanted.parameters, control.parameters)
        if what == "params"
        else (wanted.flops, control.flops)
    )
    assert goal[1] == pytest.approx(goal[0], rel=match.TOLERANCE)
    assert f"{found.before} -> {found.value}" in found.sentence()


def test_trains_the_control(command: Command, tmp_path: Path) -> None:
    plan = write_plan(tmp_path)
    done = command(
        "lmp_trainer", "--exp", "ue4x", "--match", "params", "--training-plan", str(plan)
    )
    assert done.returncode == 0, done.stderr
    assert "matched to ue4x in parameters: " in done.stdout
    run = json.loads((tmp_path / "gpt_out/tiny/gpt2ish-match_params=ue4x-s0/run.json").read_text())
    assert run["identity"]["variant"] == "gpt2ish"
    assert run["match"]["reached"] == run["summary"]["parameters"]
    assert run["label"] == "gpt2ish, params of ue4x"
    command("lmp_trainer", "--exp", "ue4x", "--training-plan", str(plan))
    drawn = command("lmp_plotstats")
    assert "no run of gpt2ish" in drawn.stdout  # a control is not taken for the baseline


def test_a_changed_idea_is_matched_anew(command: Command, tmp_path: Path) -> None:
    text = discover.find("gpt2ish")[0].path.read_text()
    text = (
        text[: text.index("BASELINE")]
        + 'BASELINE = "gpt2ish"\nVARIANTS: dict[str, dict] = {"mine": {}}\n'
    )
    (tmp_path / "mine.py").write_text(text)
    plan = str(write_plan(tmp_path))
    train = (
        "lmp_trainer",
        "--exp",
        "mine.py",
        "--match",
        "params",
        "--training-plan",
        plan,
        "--steps",
        "1",
    )
    assert "+0.00%" in command(*train).stdout
    (tmp_path / "mine.py").write_text(text + "\n# the same\n")
    assert "is finished" in command(*train).stdout
    (tmp_path / "mine.py").write_text(text.replace('{"mine": {}}', '{"mine": {"num_blocks": 5}}'))
    done = command(*train)
    assert done.returncode == 1
    assert "holds another run: not the same config" in done.stderr


def test_says_how_a_run_stands_beside_its_baseline(command: Command, tmp_path: Path) -> None:
    plan = write_plan(tmp_path)
    done = command("lmp_trainer", "--exp", "nnm_select", "--training-plan", str(plan))
    assert "compared with gpt2ish: parameters " in done.stdout
    sizes = json.loads((tmp_path / "gpt_out/tiny/nnm_select-s0/run.json").read_text())["sizes"]
    assert sizes["inference_flops"] < sizes["flops"]


def test_a_baseline_in_the_experiments_own_file(command: Command, tmp_path: Path) -> None:
    text = Path(discover.find("gpt2ish")[0].path).read_text()
    text = text[: text.index("BASELINE")]
    own = 'BASELINE = "my_base"\n'
    own += 'VARIANTS: dict[str, dict] = {"my_base": {}, "wide": {"embed_dim": 24}}\n'
    (tmp_path / "mine.py").write_text(text + own)
    plan = str(write_plan(tmp_path))
    done = command("lmp_trainer", "--exp", "mine.py:wide", "--training-plan", plan, "--steps", "1")
    assert done.returncode == 0, done.stderr
    assert "compared with my_base: parameters +" in done.stdout
    lost = text + 'BASELINE = "nowhere"\nVARIANTS: dict[str, dict] = {"alone": {}}\n'
    (tmp_path / "alone.py").write_text(lost)
    done = command("lmp_trainer", "--exp", "alone.py", "--training-plan", plan, "--steps", "1")
    assert done.returncode == 0, done.stderr
    assert "not compared with its baseline" in done.stdout


@pytest.mark.parametrize("other", ["--describe", "--check-grads", "--profile"])
def test_what_does_not_go_together_is_refused(command: Command, tmp_path: Path, other: str) -> None:
    done = command("lmp_trainer", "--exp", "ue", "--match", "params", other)
    assert done.returncode == 1
    assert "do not go together" in done.stderr


def test_the_baseline_has_no_control(command: Command, tmp_path: Path) -> None:
    done = command("lmp_trainer", "--match", "flops", "--training-plan", str(write_plan(tmp_path)))
    assert done.returncode == 1
    assert "gpt2ish is its own baseline" in done.stderr


def test_describe_tells_training_and_use_apart(command: Command, tmp_path: Path) -> None:
    done = command(
        "lmp_trainer", "--exp", "ue", "--describe", "--training-plan", str(write_plan(tmp_path))
    )
    figures = dict(line.split(": ", 1) for line in done.stdout.splitlines() if ": " in line)
    count = {
        k: float(figures[k].split()[0])
        for k in ("parameters", "training_only_parameters", "folded_parameters")
    }
    assert count["folded_parameters"] < count["parameters"]
    assert float(figures["inference_flops_per_token"].split()[0]) < float(
        figures["flops_per_token"].split()[0]
    )


def test_probe_is_undisturbing() -> None:
    s = testing.tiny("uw1")
    model = s.model()
    before = torch.get_rng_state()
    probe.count_flops(s.runner, model, s.batch(), 3)
    assert torch.equal(before, torch.get_rng_state())
    assert model.cached is None
    assert all(p.grad is None for p in model.parameters())
