"""The loop: kills and resumes to the bit, accumulation, signals, numbers that are not finite."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import assert_equal_to_the_bit, call_command, write_plan
from forked import forked
from rich.console import Console

from lmplay.api import Batch, StepOut
from lmplay.data.prepare import prepare
from lmplay.devices import Precision
from lmplay.discover import find, load
from lmplay.errors import LmplayError, NotFiniteError
from lmplay.model import to_batch, without_gradient
from lmplay.plan import load_plan
from lmplay.training import checkpoint
from lmplay.training.curves import read_curve
from lmplay.training.loop import Options, Trainer
from lmplay.training.progress import Reporter
from lmplay.training.run_folder import RunFolder

TRAIN = [sys.executable, "-m", "lmplay.cli.trainer"]


def only_run(folder: Path) -> Path:
    (path,) = (p.parent for p in (folder / "gpt_out").rglob("run.json"))
    return path


def test_killed_at_random_moments_and_resumed_it_is_equal_to_the_bit(tmp_path: Path) -> None:
    """At least five SIGKILLs in one run, wherever they fall: between steps, in a save, in
    validation. benchmarks/kills.py makes two hundred."""
    steps = 100
    changes = {
        "steps": [{"datasets": ["words"], "steps": steps}],
        "optimizer": {"name": "adamw", "lr": 1e-3},
        "validation": {
            "fraction": 0.1,
            "tokens": 512,
            "every_tokens": 2560,
            "sample_prompt": "the ",
        },
    }
    folders = [tmp_path / n for n in ("whole", "killed")]
    for folder in folders:
        folder.mkdir()
        write_plan(folder, **changes)
    arguments = [
        "--exp",
        "ue",
        "--training-plan",
        "tiny.json",
        "--mini-batch-size",
        "4",
        "--save-minutes",
        "0",
    ]
    undisturbed = call_command("lmp_trainer", *arguments, cwd=folders[0])
    assert undisturbed.returncode == 0, undisturbed.stderr
    dice = random.Random(5)
    kills = 0
    train = folders[1] / "gpt_out" / "tiny" / "ue-s0" / "train.csv"
    with forked(tmp_path) as warm:
        for attempt in range(60):
            start = train.stat().st_size if train.exists() else 0
            pid = warm.start("lmp_trainer", *arguments, cwd=folders[1], output=tmp_path / "said")
            while (status := warm.poll()) is None and (
                not train.exists() or train.stat().st_size == start
            ):
                time.sleep(0.005)  # until it trains, so that the kill falls into the loop
            time.sleep(dice.uniform(0.0, 0.08))
            status = warm.poll() if status is None else status
            if attempt < 6 and status is None:
                os.kill(pid, signal.SIGKILL)
                kills += 1
            if (warm.wait() if status is None else status) == 0:
                break
    assert kills >= 5, f"only {kills} kills: the run is too short for this machine"
    assert len(read_curve(train)) == steps
    assert_equal_to_the_bit(only_run(folders[0]), only_run(folders[1]))


@pytest.mark.parametrize(("signum", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_says_how_to_go_on_and_the_same_command_does(
    tmp_path: Path, signum: signal.Signals, status: int
) -> None:
    validation = {"fraction": 0.1, "tokens": 512, "every_tokens": 10_240, "sample_prompt": "the "}
    write_plan(tmp_path, steps=[{"datasets": ["words"], "steps": 200}], validation=validation)
    arguments = [*TRAIN, "--training-plan", "tiny.json", "--mini-batch-size", "4"]
    process = subprocess.Popen(
        arguments, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    train = tmp_path / "gpt_out" / "tiny" / "gpt2ish-s0" / "train.csv"
    while not train.exists():
        time.sleep(0.01)
    process.send_signal(signum)
    out, err = process.communicate(timeout=120)
    assert process.returncode == status, err
    assert "The same command continues it" in out
    assert "Traceback" not in err
    done = len(read_curve(train))
    found = checkpoint.newest(train.parent / "checkpoints", print)
    assert found is not None
    assert found.step == done
    again = call_command("lmp_trainer", *arguments[3:], cwd=tmp_path)
    assert again.returncode == 0
    assert f"resuming gpt_out/tiny/gpt2ish-s0 at step {done}" in again.stdout
    assert len(read_curve(train)) == 200


def test_mini_batch_size_changes_rounding_only(tmp_path: Path) -> None:
    losses = []
    for size in ("1", "3", "8"):
        write_plan(
            tmp_path,
            model={"num_blocks": 1, "embed_dim": 16, "num_heads": 2, "max_len": 32, "dropout": 0.0},
        )
        arguments = (
            "--training-plan",
            "tiny.json",
            "--mini-batch-size",
            size,
            "--out",
            f"out{size}",
        )
        done = call_command("lmp_trainer", *arguments, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        losses.append(
            read_curve(tmp_path / f"out{size}" / "tiny" / "gpt2ish-s0" / "train.csv")["loss"]
        )
    for other in losses[1:]:
        assert (losses[0] - other).abs().max() < 1e-4


def test_seeds_change_weights_and_not_the_data(tmp_path: Path) -> None:
    """Two seeds read the same sequences: with a learning rate of nearly 0 the losses stay those of
    the start."""
    write_plan(tmp_path)
    for seed in ("0", "1"):
        arguments = ("--training-plan", "tiny.json", "--seed", seed, "--mini-batch-size", "8")
        assert call_command("lmp_trainer", *arguments, cwd=tmp_path).returncode == 0
    a, b = (read_curve(tmp_path / f"gpt_out/tiny/gpt2ish-s{s}/train.csv") for s in (0, 1))
    assert (a["loss"] != b["loss"]).all()
    # nats per token over bits per byte is bytes per token: a fingerprint of which tokens were read
    assert (a["loss"] / a["bpb"] - b["loss"] / b["bpb"]).abs().max() < 1e-9


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_what_is_not_finite_stops_before_the_update(tmp_path: Path, where: str) -> None:
    write_plan(tmp_path)
    text = (Path(__file__).parent.parent / "experiments" / "gpt2ish.py").read_text()
    poison = {
        "loss": "x = x * torch.where(self.count > 4, float('nan'), 1.0)",
        "gradient": (
            "x.requires_grad and x.register_hook(lambda g: g * (float('inf') if self.count "
            "> 4 else 1.0))"
        ),
    }[where]
    text = text.replace(
        "        return self.ln(x)",
        f"        self.count += self.training\n        {poison}\n        return self.ln(x)",
    ).replace(
        "        self.ln = nn",
        "        self.register_buffer('count', torch.zeros(()))\n        self.ln = nn",
    )
    (tmp_path / "bad.py").write_text(text)
    arguments = (
        "--exp",
        "bad.py",
        "--training-plan",
        "tiny.json",
        "--mini-batch-size",
        "8",
        "--save-minutes",
        "0",
    )
    done = call_command("lmp_trainer", *arguments, cwd=tmp_path)
    assert done.returncode == 3, done.stderr
    (line,) = done.stderr.strip().splitlines()
    assert "step 5" in line
    assert "000000004" in line, "the last good checkpoint is named"
    found = checkpoint.newest(only_run(tmp_path) / "checkpoints", print)
    assert found is not None
    assert all(bool(t.isfinite().all()) for t in found.tensors("model").values())


def test_steps_of_a_plan_follow_each_other_with_their_own_optimizers(tmp_path: Path) -> None:
    plan = write_plan(
        tmp_path,
        steps=[
            {
                "step_name": "first",
                "datasets": ["words"],
                "steps": 4,
                "lr": 0.01,
                "schedule": {"name": "constant"},
            },
            {
                "step_name": "second",
                "datasets": ["words"],
                "tokens": 1024,
                "optimizer": {"name": "adagrad", "lr": 0.1},
            },
            {"step_name": "third", "datasets": ["words"], "epochs": 0.5},
        ],
    )
    done = call_command(
        "lmp_trainer", "--training-plan", str(plan), "--mini-batch-size", "8", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    train = read_curve(only_run(tmp_path) / "train.csv")
    assert list(train["lr"][:4]) == [0.01] * 4
    assert train["lr"][4] > 0.05
    assert len(train) > 8
    assert "stage third begins" in done.stdout


def test_a_tied_model_trains_and_generates(tmp_path: Path) -> None:
    write_plan(tmp_path)
    arguments = (
        "--training-plan",
        "tiny.json",
        "--set",
        "tied=true",
        "--set",
        "head_bias=false",
        "--steps",
        "2",
    )
    assert call_command("lmp_trainer", *arguments, cwd=tmp_path).returncode == 0
    assert call_command("lmp_generator", "x" * 300, "--max-len", "2", cwd=tmp_path).returncode == 0


def test_compiled_training_runs(tmp_path: Path) -> None:
    write_plan(
        tmp_path,
        model={"num_blocks": 1, "embed_dim": 16, "num_heads": 2, "max_len": 32, "dropout": 0.0},
    )
    arguments = ("--training-plan", "tiny.json", "--mini-batch-size", "8", "--steps", "2")
    losses = []
    for extra in ((), ("--compile-model", "--fresh")):
        assert call_command("lmp_trainer", *arguments, *extra, cwd=tmp_path).returncode == 0
        losses.append(read_curve(tmp_path / "gpt_out/tiny/gpt2ish-2steps-s0/train.csv")["loss"])
    assert (losses[0] - losses[1]).abs().max() < 1e-4
    torch.compiler.reset()


def test_minutes_are_a_budget(tmp_path: Path) -> None:
    write_plan(tmp_path)
    done = call_command(
        "lmp_trainer", "--training-plan", "tiny.json", "--minutes", "0.03", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    train = read_curve(only_run(tmp_path) / "train.csv")
    assert 1.8 <= train["seconds"].iloc[-1] < 4
    assert train["lr"].iloc[-1] < 0.5 * train["lr"].max(), "the schedule ends with the budget"


def test_run_record_repeats_the_run(tmp_path: Path) -> None:
    write_plan(tmp_path)
    arguments = (
        "--exp",
        "ue",
        "--set",
        "front_embed_mul=2",
        "--training-plan",
        "tiny.json",
        "--steps",
        "3",
    )
    assert call_command("lmp_trainer", *arguments, cwd=tmp_path).returncode == 0
    run = only_run(tmp_path)
    assert run.name == "ue-front_embed_mul=2-3steps-s0"
    record = json.loads((run / "run.json").read_text())
    assert record["identity"]["config"]["front_embed_mul"] == 2.0
    assert {
        "plan",
        "versions",
        "threads",
        "mini_batch_size",
        "flops_per_token",
        "command",
        "git",
    } <= set(record)
    assert (run / "experiment" / "ue.py").read_text() == (
        Path(__file__).parent.parent / "experiments/ue.py"
    ).read_text()
    log = (run / "log.txt").read_text()
    assert "finished" in log


def test_uncommitted_changes_are_kept_or_refused(tmp_path: Path) -> None:
    write_plan(tmp_path)
    git = {
        **os.environ,
        "GIT_AUTHOR_NAME": "a",
        "GIT_AUTHOR_EMAIL": "a@b",
        "GIT_COMMITTER_NAME": "a",
        "GIT_COMMITTER_EMAIL": "a@b",
    }
    for words in (["init", "-q"], ["add", "tiny.json"], ["commit", "-qm", "x"]):
        subprocess.run(["git", *words], cwd=tmp_path, check=True, env=git)
    (tmp_path / ".git" / "info" / "exclude").write_text("data.jsonl\n")
    # results are no change of the tree
    for mode in (
        ["--find-lr", "--steps", "20"],
        ["--seed", "1"],
        ["--seed", "2"],
    ):
        clean = ("--training-plan", "tiny.json", "--steps", "1", "--no-dirty", *mode)
        done = call_command("lmp_trainer", *clean, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    shutil.rmtree(tmp_path / "gpt_out")
    (tmp_path / ".git" / "info" / "exclude").write_text("")
    (tmp_path / "tiny.json").write_text((tmp_path / "tiny.json").read_text() + "\n")
    refused = call_command(
        "lmp_trainer", "--training-plan", "tiny.json", "--no-dirty", cwd=tmp_path
    )
    assert refused.returncode == 1
    assert "uncommitted changes" in refused.stderr
    kept = call_command("lmp_trainer", "--training-plan", "tiny.json", "--steps", "2", cwd=tmp_path)
    assert kept.returncode == 0
    diff = (only_run(tmp_path) / "uncommitted.diff").read_text()
    assert "tiny.json" in diff
    assert "untracked: data.jsonl" in diff


def trainer_of(tmp_path: Path, precision: str, exp: str = "gpt2ish", **changes: Any) -> Trainer:
    """A Trainer on the tiny plan, as the command makes it, with a precision that this machine may
    not offer."""
    plan = load_plan(write_plan(tmp_path, **changes))
    prepared = prepare(plan, lambda what, done: None)
    experiment = load(*find(exp))
    config, _ = experiment.config({**plan.sizes(), "vocab_size": prepared.tokenizer.vocab_size}, {})
    run = RunFolder(tmp_path / "run")
    run.path.mkdir(exist_ok=True)
    made = Trainer(
        plan,
        prepared,
        experiment.runner(config),
        0,
        torch.device("cpu"),
        Precision(precision),
        run,
        Reporter(Console(quiet=True)),
        Options(),
    )
    made.set_up(8, {"flops_per_token": 1.0})
    return made


def test_an_experiments_own_figures_may_not_pass_for_the_harness(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, "fp32")
    own = trainer.runner.step

    def step(model: torch.nn.Module, batch: Batch, name: str) -> StepOut:
        return dataclasses.replace(own(model, batch), log={name: torch.ones(())})

    arrays = trainer.stages[0].batch(0, 8)
    for name in ("loss", "tokens", "a,b"):
        trainer.runner.step = partial(step, name=name)  # type: ignore[method-assign]
        with pytest.raises(LmplayError, match="cannot be a new column"):
            trainer.train_step(arrays)
    trainer.runner.step = partial(step, name="entropy")  # type: ignore[method-assign]
    assert trainer.train_step(arrays).log["entropy"] == 1


def test_a_loss_beside_the_loss_is_weighted_by_sequences_and_seen_by_check_grads(
    tmp_path: Path,
) -> None:
    """An experiment's aux_loss is a mean over sequences: the gradient is the same however the batch
    is cut."""
    trainer = trainer_of(tmp_path, "fp32")
    trainer.model.eval()  # no dropout
    scale = torch.nn.Parameter(torch.tensor(2.0))
    trainer.model.register_parameter("scale", scale)
    own = trainer.runner.step

    def step(model: torch.nn.Module, batch: Batch) -> StepOut:
        aux = scale * batch.ids.double().mean(1).mean().float()
        return dataclasses.replace(own(model, batch), aux_loss=aux)

    trainer.runner.step = step  # type: ignore[method-assign]
    arrays = trainer.stages[0].batch(0, 8)
    for size in (1, 3, 8):
        trainer.model.zero_grad(set_to_none=True)
        trainer.mini_batch_size = size
        trainer.accumulate(arrays)
        assert scale.grad is not None
        assert float(scale.grad) == pytest.approx(float(arrays.ids.mean()), rel=1e-5)
    batch = to_batch(arrays, slice(None), torch.device("cpu"))
    assert without_gradient(trainer.runner, trainer.model, batch) == []


def test_a_validation_that_is_not_finite_stops_the_run(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, "fp32")
    with torch.no_grad():
        next(trainer.model.parameters()).fill_(float("nan"))
    with pytest.raises(NotFiniteError, match="the validation loss is nan"):
        trainer.validate()
    assert not (trainer.run.path / "validate.csv").exists() or trainer.validate_curve.size == 0


def test_stopped_in_its_last_validation_it_ends_though_its_optimizer_was_another(
    tmp_path: Path,
) -> None:
    steps = [
        {"datasets": ["words"], "steps": 2, "optimizer": {"name": "adagrad", "lr": 0.01}},
        {"datasets": ["words"], "steps": 2, "optimizer": {"name": "sgd", "lr": 0.01}},
    ]
    trainer = trainer_of(tmp_path, "fp32", steps=steps)
    trainer.train()
    trainer.state.validated_at = 0  # as a checkpoint from before the last validation has it
    trainer.saved_state = None
    trainer.save()
    again = trainer_of(tmp_path, "fp32", steps=steps)
    assert again.resume()
    assert again.train()["steps"] == 4


def test_fp16_scales_the_loss_and_not_the_result(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    half, full = (trainer_of(tmp_path / n, p) for n, p in (("a", "fp16"), ("b", "fp32")))
    assert half.scaler is not None
    assert half.scaler.get_scale() > 1
    assert full.scaler is None
    summaries = [t.train() for t in (half, full)]
    assert summaries[0]["val_loss"] == pytest.approx(summaries[1]["val_loss"], rel=2e-3)


def test_fp16_halves_a_scale_that_is_too_large_and_stops_at_a_loss_that_is_not_finite(
    tmp_path: Path,
) -> None:
    trainer = trainer_of(tmp_path, "fp16")
    assert trainer.scaler is not None
    arrays = trainer.stages[0].batch(0, 8)
    weights = [p.detach().clone() for p in trainer.model.parameters()]
    trainer.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**100)
    trainer.train_step(arrays)
    assert trainer.scaler.get_scale() == 2.0**99
    assert all(torch.equal(a, b) for a, b in zip(weights, trainer.model.parameters(), strict=True))
    trainer.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    trainer.train_step(arrays)
    assert any(
        not torch.equal(a, b) for a, b in zip(weights, trainer.model.parameters(), strict=True)
    )
    with pytest.raises(NotFiniteError):
        trainer.gradients_are_finite(float("nan"), 1.0)


def test_two_processes_share_a_batch(tmp_path: Path) -> None:
    """The gradients of rank 0 and 1 of 2, each divided by the global count, add up to one
    process's."""
    trainer = trainer_of(tmp_path, "fp32")
    trainer.model.eval()  # no dropout
    stream = trainer.stages[0]
    total = stream.batch(0, 8).n_tokens
    trainer.global_sum = lambda count: total  # type: ignore[method-assign]
    gradients = []
    for parts in ([(0, 1)], [(0, 2), (1, 2)]):
        trainer.model.zero_grad(set_to_none=True)
        for rank, world in parts:
            trainer.accumulate(stream.batch(0, 8, rank, world))
        gradients.append([p.grad.clone() for p in trainer.model.parameters()])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_what_is_saved_is_the_average_and_a_resume_continues_at_y(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, "fp32", "schedule_free")
    trainer.train()
    found = checkpoint.newest(trainer.run.path / "checkpoints", print)
    assert found is not None
    saved = found.tensors("model")
    optimizer = found.tensors("optimizer")
    for name, p in trainer.model.named_parameters():
        torch.testing.assert_close(saved[name], optimizer[f"{name}|x"], rtol=0, atol=0)
        y = torch.lerp(optimizer[f"{name}|z"], optimizer[f"{name}|x"], 0.9)
        torch.testing.assert_close(p.detach(), y, rtol=0, atol=0)
