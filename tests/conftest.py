"""What the tests share: a cache of prepared data of their own, and the commands as a user runs
them."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from lmplay.files import read_json, write_json
from lmplay.training import checkpoint
from lmplay.training.curves import CLOCK_COLUMNS, read_curve
from lmplay.training.loop import Trainer

ROOT = Path(__file__).resolve().parent.parent
Command = Callable[..., subprocess.CompletedProcess[str]]


LONG = ("test_commands_run_as_printed_in_their_order", "test_killed_at_random_moments")


def pytest_configure() -> None:
    """No test uses a network. The libraries read this when tests import them."""
    os.environ["HF_HUB_OFFLINE"] = "1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest first: with several workers, one of them would otherwise end alone with it."""
    items.sort(key=lambda item: not item.name.startswith(LONG))


@pytest.fixture(scope="session", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Prepared tokens go to a folder of this session, not to the user's."""
    os.environ["LMP_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    os.environ["HF_HOME"] = str(tmp_path_factory.mktemp("hf"))
    os.environ["TRACKIO_DIR"] = str(tmp_path_factory.mktemp("trackio"))
    os.environ.pop("LMP_EXPERIMENTS", None)


@pytest.fixture(scope="session", autouse=True)
def _signals() -> None:
    """A suite in the background ignores these signals, and so would the commands it starts."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(autouse=True)
def _short_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs write a few tokens at each validation: forty take longer than a tiny model's training.
    Commands in processes of their own write all."""
    sample = Trainer.sample
    monkeypatch.setattr(Trainer, "sample", lambda trainer: sample(trainer, new_tokens=3))


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@contextlib.contextmanager
def stopped_at(step: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Runs in this process end at an optimizer step, as by Ctrl-C."""
    finish_step = Trainer.finish_step

    def stop(trainer: Trainer, *args: Any) -> None:
        finish_step(trainer, *args)
        trainer.stop_signal = signal.SIGINT if trainer.state.step == step else None

    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "finish_step", stop)
        yield


def run_command(
    name: str, *args: str, cwd: Path, timeout: float = 240
) -> subprocess.CompletedProcess[str]:
    """One of our commands in a process of its own, its output captured."""
    command = [sys.executable, "-m", f"lmplay.cli.{name.removeprefix('lmp_')}", *args]
    return subprocess.run(
        command, cwd=cwd, capture_output=True, text=True, timeout=timeout, check=False
    )


def call_command(name: str, *args: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """The same in this process, which spares importing torch; an error that nobody catches is a
    traceback."""
    module = importlib.import_module(f"lmplay.cli.{name.removeprefix('lmp_')}")
    out = io.StringIO()
    err = io.StringIO()
    with contextlib.chdir(cwd), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = module.main(list(args))
        except SystemExit as e:  # argparse
            status = e.code
    return subprocess.CompletedProcess(args, status, out.getvalue(), err.getvalue())


@pytest.fixture
def command(tmp_path: Path) -> Command:
    """Calls a command in an empty folder."""

    def run(name: str, *args: str) -> subprocess.CompletedProcess[str]:
        return call_command(name, *args, cwd=tmp_path)

    return run


def one_line(done: subprocess.CompletedProcess[str], *says: str, status: int = 1) -> None:
    """Assert that a command failed with one line, which contains these words."""
    assert done.returncode == status, done.stderr
    (line,) = done.stderr.strip().splitlines()
    for word in says:
        assert word in line


def edit_record(run: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    """Edit a run's run.json and seal it again, as lmplay itself would."""
    record = read_json(run / "run.json")
    edit(record)
    write_json(run / "run.json", record, sealed=True)


WORDS = (
    "the",
    "quick",
    "brown",
    "fox",
    "jumps",
    "over",
    "a",
    "lazy",
    "dog",
    "and",
    "seven",
    "wizards",
    "box",
)


def write_text(folder: Path, documents: int = 120) -> Path:
    """A small jsonl data set: sentences that differ from each other."""
    lines = []
    for i in range(documents):
        words = [WORDS[(i * 7 + j * (i % 5 + 1)) % len(WORDS)] for j in range(30)]
        lines.append(json.dumps({"text": f"{i} " + " ".join(words), "title": f"number {i}"}))
    path = folder / "data.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


def write_plan(folder: Path, **changes: Any) -> Path:
    """A plan that trains in a second on :func:`write_text`'s file."""
    write_text(folder)
    plan: dict[str, Any] = {
        "tokenizer": {"kind": "bytes"},
        "model": {"num_blocks": 2, "embed_dim": 16, "num_heads": 2, "max_len": 32, "dropout": 0.1},
        "datasets": {"words": {"source": "files", "path": "data.jsonl"}},
        "optimizer": {"name": "adamw", "lr": 1e-3, "weight_decay": 0.1},
        "schedule": {"name": "cosine", "warmup": 0.1},
        "batch": {"batch_size": 8, "grad_clip": 1.0},
        "validation": {
            "fraction": 0.1,
            "tokens": 512,
            "every_tokens": 1024,
            "sample_prompt": "the ",
        },
        "steps": [{"step_name": "words", "datasets": ["words"], "steps": 12}],
    }
    plan.update(changes)
    path = folder / "tiny.json"
    path.write_text(json.dumps(plan))
    return path


def assert_equal_to_the_bit(a: Path, b: Path) -> None:
    """Weights, optimizer, random numbers and curves (but for the clock's columns) of two runs."""
    one, two = (checkpoint.newest(p / "checkpoints", print) for p in (a, b))
    assert one is not None
    assert two is not None
    assert one.step == two.step
    for name in ("model", "optimizer", "rng"):
        x = one.tensors(name)
        y = two.tensors(name)
        assert x.keys() == y.keys()
        assert all(torch.equal(x[k], y[k]) for k in x), name
    for name in ("train.csv", "validate.csv"):
        x, y = (
            read_curve(p / name).drop(columns=list(CLOCK_COLUMNS), errors="ignore") for p in (a, b)
        )
        pd.testing.assert_frame_equal(x, y, check_exact=True)
