"""--extend: a finished run goes on with a larger budget."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Command, write_plan

from lmplay.training.curves import read_curve
from lmplay.training.run_folder import RunFolder

TRAIN = ("--training-plan", "tiny.json", "--mini-batch-size", "8")


def start(folder: Path, **options: Any) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "lmplay.cli.trainer", *TRAIN]
    return subprocess.Popen(command, cwd=folder, text=True, **options)


@pytest.mark.parametrize("budget", [("--steps", "20"), ("--tokens", "5120"), ("--minutes", "0.05")])
def test_a_finished_run_is_extended(
    tmp_path: Path, command: Command, budget: tuple[str, str]
) -> None:
    write_plan(tmp_path)
    assert command("lmp_trainer", *TRAIN).returncode == 0
    done = command("lmp_trainer", *TRAIN, "--extend", *budget)
    assert done.returncode == 0, done.stderr
    assert "resuming" in done.stdout
    assert "at step 12" in done.stdout
    assert "the schedule cosine is that of the longer run" in done.stdout
    (run,) = (tmp_path / "gpt_out" / "tiny").glob("*extended*")
    record = RunFolder(run).read()
    assert record["label"] == "gpt2ish, extended"
    curve = read_curve(run / "train.csv")
    assert list(curve["step"]) == list(range(1, len(curve) + 1))
    short = read_curve(tmp_path / "gpt_out" / "tiny" / "gpt2ish-s0" / "train.csv")
    assert len(curve) > len(short) == 12
    assert curve["loss"].iloc[:12].tolist() == short["loss"].tolist()
    if budget[0] == "--steps":
        assert len(curve) == 20
        longer = command("lmp_trainer", *TRAIN, "--steps", "20", "--out", "longer")
        assert longer.returncode == 0
        (other,) = (tmp_path / "longer").glob("tiny/*")
        # From where it is extended, the rates are those of the run that was long from the start.
        theirs = read_curve(other / "train.csv")["lr"]
        np.testing.assert_allclose(curve["lr"].iloc[12:], theirs.iloc[12:])
    again = command("lmp_trainer", *TRAIN, "--extend", *budget)
    assert again.returncode == 0
    assert "is finished" in again.stdout


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--extend",), "needs the larger budget"),
        (("--extend", "--steps", "3"), "the budget must be larger"),
        (("--extend", "--steps", "20", "--seed", "5"), "has no finished run"),
        (("--extend", "--steps", "20", "--set", "dropout=0.3"), "has no finished run"),
    ],
)
def test_what_cannot_be_extended_is_said(
    tmp_path: Path, command: Command, words: tuple[str, ...], says: str
) -> None:
    write_plan(tmp_path)
    assert command("lmp_trainer", *TRAIN).returncode == 0
    done = command("lmp_trainer", *TRAIN, *words)
    assert done.returncode == 1
    assert says in done.stderr
