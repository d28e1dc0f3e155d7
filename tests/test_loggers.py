"""Other people's trackers: real ones, offline, read back with their own readers."""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import pytest
from conftest import Command, write_plan
from rich.console import Console

from lmplay.training.curves import read_curve
from lmplay.training.progress import Reporter

RUN = ("--exp", "gpt2ish", "--training-plan", "tiny.json", "--mini-batch-size", "8")


def train(command: Command, folder: Path, name: str) -> Path:
    """A run of six steps with the tracker; its folder."""
    write_plan(folder, steps=[{"step_name": "words", "datasets": ["words"], "steps": 6}])
    done = command("lmp_trainer", *RUN, "--log", name)
    assert done.returncode == 0, done.stderr
    assert "logged to " in done.stdout
    assert "it failed" not in done.stdout
    return folder / "gpt_out" / "tiny" / "gpt2ish-s0"


def test_tensorboard_has_the_curves(command: Command, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = train(command, tmp_path, "tensorboard")
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    curve = read_curve(run / "train.csv")
    found = events.Scalars("train/loss")
    assert [e.step for e in found] == curve["step"].tolist()
    assert [e.value for e in found] == pytest.approx(curve["loss"].tolist(), rel=1e-6)
    assert events.Scalars("validate/bpb")[-1].value == pytest.approx(
        read_curve(run / "validate.csv")["bpb"].iloc[-1]
    )


def test_wandb_is_offline_and_has_the_curves(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WANDB_MODE", raising=False)
    run = train(command, tmp_path, "wandb")
    [data] = run.glob("wandb/offline-run-*/*.wandb")
    until = time.monotonic() + 30  # a process of wandb's own writes it
    while b"train/loss" not in (content := data.read_bytes()) and time.monotonic() < until:
        time.sleep(0.1)
    last = float(read_curve(run / "train.csv")["loss"].iloc[-1])
    assert repr(last)[:10].encode() in content


def test_trackio_has_the_curves(command: Command, tmp_path: Path) -> None:
    run = train(command, tmp_path, "trackio")
    with contextlib.closing(
        sqlite3.connect(Path(os.environ["TRACKIO_DIR"]) / "lmplay-tiny.db")
    ) as base:
        rows = base.execute("select run_name, step, metrics from metrics order by id").fetchall()
    assert {name.rpartition("-")[0] for name, _, _ in rows} == {"gpt2ish-s0"}
    losses = {
        step: found["train/loss"]
        for _, step, text in rows
        if "train/loss" in (found := json.loads(text))
    }
    curve = read_curve(run / "train.csv")
    assert losses == dict(zip(curve["step"], curve["loss"], strict=True))


@pytest.mark.parametrize("name", ["wandb", "trackio", "tensorboard"])
def test_a_missing_tracker_is_one_line_and_no_run(
    name: str, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_plan(tmp_path)
    monkeypatch.setitem(
        sys.modules, "torch.utils.tensorboard" if name == "tensorboard" else name, None
    )
    done = command("lmp_trainer", *RUN, "--log", name)
    assert done.returncode == 1
    assert done.stderr == f"lmp_trainer: --log {name} is not installed: pip install 'lmplay[log]'\n"
    assert not (tmp_path / "gpt_out" / "tiny").exists()


def test_a_tracker_that_fails_ends_no_run(capsys: pytest.CaptureFixture[str]) -> None:
    class Broken:
        where = "a tracker"
        rows = 0

        def row(self, kind: str, row: Mapping[str, float]) -> None:
            self.rows += 1
            raise ConnectionError("the disk is full")

        def close(self) -> None: ...

    report = Reporter(Console())
    broken = Broken()
    report.loggers.append(broken)
    row = {
        "step": 1,
        "tokens": 1,
        "loss": 1.0,
        "bpb": 1.0,
        "lr": 0.1,
        "tokens_per_second": 1.0,
        "accuracy": 0.1,
    }
    for _ in range(2):
        report.step(row, 0.5, 1.0, 1.0)
    assert broken.rows == 1
    assert (
        "a tracker: it failed (the disk is full); the run goes on without it"
        in capsys.readouterr().out
    )
