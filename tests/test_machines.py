"""Odd machines and hard ends: signals, pipes, encodings, threads, missing homes and compilers."""

from __future__ import annotations

import io
import json
import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Command, one_line, run_command, write_plan

from lmplay import devices, threads
from lmplay.cli import is_out_of_memory, trainer
from lmplay.training import checkpoint
from lmplay.training.curves import read_curve
from lmplay.training.run_folder import RunFolder, git_state

TRAIN = ("--training-plan", "tiny.json", "--mini-batch-size", "8")
VALIDATION = {"fraction": 0.1, "tokens": 512, "every_tokens": 10_240, "sample_prompt": "the "}


def long_plan(folder: Path) -> None:
    steps = [{"step_name": "words", "datasets": ["words"], "steps": 4000}]
    write_plan(folder, steps=steps, validation=VALIDATION)


def start(folder: Path, **options: Any) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "lmplay.cli.trainer", *TRAIN]
    return subprocess.Popen(command, cwd=folder, text=True, **options)


def until_it_trains(folder: Path, process: subprocess.Popen[str]) -> Path:
    run = folder / "gpt_out" / "tiny" / "gpt2ish-s0"
    while not (run / "train.csv").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    return run


# ---------------------------------------------------------------- ends


def test_a_closed_terminal_saves(tmp_path: Path) -> None:
    long_plan(tmp_path)
    process = start(tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    run = until_it_trains(tmp_path, process)
    process.send_signal(signal.SIGHUP)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGHUP, err
    found = checkpoint.newest(run / "checkpoints", print)
    assert found is not None
    assert found.step == len(read_curve(run / "train.csv")) < 4000


def test_nohup_goes_on(tmp_path: Path) -> None:
    steps = [{"step_name": "words", "datasets": ["words"], "steps": 150}]
    write_plan(tmp_path, steps=steps, validation=VALIDATION)

    def ignore() -> None:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)

    process = start(tmp_path, stdout=subprocess.DEVNULL, preexec_fn=ignore)
    run = until_it_trains(tmp_path, process)
    process.send_signal(signal.SIGHUP)
    assert process.wait(60) == 0
    assert len(read_curve(run / "train.csv")) == 150


def test_a_closed_pipe_saves(tmp_path: Path) -> None:
    long_plan(tmp_path)
    process = start(tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    run = until_it_trains(tmp_path, process)
    assert process.stdout is not None
    process.stdout.close()
    assert process.stderr is not None
    err = process.stderr.read()
    assert process.wait(60) == 128 + signal.SIGPIPE, err
    assert "Traceback" not in err
    found = checkpoint.newest(run / "checkpoints", print)
    assert found is not None
    assert found.step == len(read_curve(run / "train.csv"))


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252"])
def test_an_encoding_without_a_sample_s_characters_stops_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, encoding: str
) -> None:
    lines = [json.dumps({"text": f"漢字かな交じり文 {i} " * 5}) for i in range(90)]
    (tmp_path / "kanji.jsonl").write_text("\n".join(lines))
    source = {"source": "files", "path": "kanji.jsonl"}
    write_plan(tmp_path, datasets={"words": source}, tokenizer={"kind": "chars"})
    monkeypatch.chdir(tmp_path)
    output = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(output, encoding=encoding))
    assert trainer.main([*TRAIN, "--steps", "2"]) == 0
    sys.stdout.flush()
    assert b"\\u" in output.getvalue(), "what it cannot say is escaped"


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_an_interrupted_preparation_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, signum: signal.Signals
) -> None:
    monkeypatch.setenv("LMP_CACHE", str(tmp_path / "cache"))
    write_plan(tmp_path)
    rows = "\n".join(json.dumps({"text": f"{i} " + "word " * 400}) for i in range(30_000))
    (tmp_path / "data.jsonl").write_text(rows)
    process = start(tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    tokens = tmp_path / "cache" / "tokens"
    until = time.monotonic() + 60
    while not list(tokens.glob(".*.tmp")):
        assert time.monotonic() < until
        time.sleep(0.01)
    process.send_signal(signum)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + signum
    assert len(err.strip().splitlines()) == 1, err
    assert list(tokens.iterdir()) == []


# ---------------------------------------------------------------- what a model shares


class Shared(torch.nn.Module):
    """Two layers with one buffer, a view of it, and tied weights."""

    def __init__(self) -> None:
        super().__init__()
        table = torch.arange(12.0)
        self.a = torch.nn.Linear(2, 2)
        self.b = torch.nn.Linear(2, 2)
        for layer in (self.a, self.b):
            layer.register_buffer("table", table)
        self.b.register_buffer("part", table[4:8])
        self.b.weight = self.a.weight


def test_buffers_that_layers_share_are_saved_and_come_back(tmp_path: Path) -> None:
    model = Shared()
    saved = {"model": checkpoint.model_tensors(model)}
    path = checkpoint.save(tmp_path, 1, saved, {})
    other = Shared()
    with torch.no_grad():
        other.a.table.zero_()
        other.a.weight.zero_()
    checkpoint.load_model_tensors(other, checkpoint.verify(path).tensors("model"), path)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name


def test_a_model_that_cannot_be_saved_is_known_before_it_trains(
    tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_plan(tmp_path)

    def refuse(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", refuse)
    one_line(command("lmp_trainer", *TRAIN), "checkpoint could not be written")
    run = tmp_path / "gpt_out" / "tiny" / "gpt2ish-s0"
    assert not (run / "train.csv").exists()


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o077])
def test_weights_have_the_permissions_of_other_files(tmp_path: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        path = checkpoint.save(tmp_path / "c", 1, {"model": {"w": torch.ones(2)}}, {})
    finally:
        os.umask(before)
    modes = {stat.S_IMODE(file.stat().st_mode) for file in path.iterdir()}
    assert modes == {0o666 & ~mask}


# ---------------------------------------------------------------- environments


@pytest.mark.parametrize(
    "words",
    [
        ("lmp_trainer", *TRAIN),
        ("lmp_trainer", *TRAIN, "--find-lr"),
        ("lmp_trial", "--exp", "ue", "--training-plan", "tiny.json", "--tokens", "2048"),
    ],
)
def test_without_a_home_the_line_says_what_to_set(
    tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...]
) -> None:
    write_plan(tmp_path)
    for name in ("HOME", "LMP_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)

    def no_entry(*_: object) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", no_entry)
    one_line(command(*words), "there is no home folder", "LMP_CACHE")


@pytest.mark.parametrize("backend", ["module://not_here", "nbAgg", "TkAgg"])
def test_figures_do_not_need_the_backend_of_a_notebook(
    tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch, backend: str
) -> None:
    write_plan(tmp_path)
    assert command("lmp_trainer", *TRAIN, "--steps", "1").returncode == 0
    monkeypatch.setenv("MPLBACKEND", backend)
    done = run_command("lmp_plotstats", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "gpt_out" / "plots" / "log_loss.png").exists()


def test_figures_do_not_replace_a_user_s_files(tmp_path: Path, command: Command) -> None:
    write_plan(tmp_path)
    assert command("lmp_trainer", *TRAIN, "--steps", "1").returncode == 0
    for name in ("final.csv", "log_loss.png"):
        (tmp_path / name).write_text("mine")
    assert command("lmp_plotstats").returncode == 0
    assert command("lmp_plotstats", "gpt_out/tiny").returncode == 0
    for name in ("final.csv", "log_loss.png"):
        assert (tmp_path / name).read_text() == "mine"
    assert (tmp_path / "gpt_out" / "tiny" / "plots" / "final.csv").exists()


@pytest.mark.parametrize("compiler", ["/nonexistent/g++", "no-such-clang++", "/etc/hostname"])
def test_without_a_compiler_compiling_is_refused_in_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compiler: str
) -> None:
    monkeypatch.setenv("CXX", compiler)
    write_plan(tmp_path)
    done = run_command("lmp_trainer", *TRAIN, "--compile-model", cwd=tmp_path)
    one_line(done, "torch finds no C++ compiler")
    devices.check_compiler(torch.device("meta"))  # others bring their own


def test_out_of_memory_is_known_in_all_its_forms() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**55)
    assert is_out_of_memory(caught.value)
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA"))
    assert not is_out_of_memory(RuntimeError("shapes do not match"))


def test_runs_behind_links_are_found(tmp_path: Path, command: Command) -> None:
    write_plan(tmp_path)
    (tmp_path / "disk").mkdir()
    (tmp_path / "gpt_out").mkdir()
    (tmp_path / "gpt_out" / "tiny").symlink_to(tmp_path / "disk")
    (tmp_path / "disk" / "loop").symlink_to(tmp_path / "gpt_out")
    assert command("lmp_trainer", *TRAIN, "--steps", "1").returncode == 0
    assert command("lmp_plotstats").returncode == 0
    assert command("lmp_generator", "the", "--max-len", "2").returncode == 0


@pytest.mark.parametrize(
    "setting", ["color.ui=always", "diff.external=false", "diff.noprefix=true", "core.pager=false"]
)
def test_the_diff_of_a_run_can_be_applied(tmp_path: Path, setting: str) -> None:
    def git(*words: str, cwd: Path = tmp_path) -> None:
        who = ("-c", "user.name=a", "-c", "user.email=a@b")
        subprocess.run(["git", *who, *words], cwd=cwd, check=True, capture_output=True)

    git("init", "-q", ".")
    (tmp_path / "note.py").write_text("a = 1\n")
    (tmp_path / "picture.bin").write_bytes(bytes(range(256)))
    git("add", "-A")
    git("commit", "-qm", "x")
    (tmp_path / "note.py").write_text("a = 2\n")
    (tmp_path / "picture.bin").write_bytes(bytes(range(255, -1, -1)))
    git("config", *setting.split("=", 1))
    _, diff = git_state(tmp_path)
    assert diff is not None
    git("clone", "-q", str(tmp_path), str(tmp_path / "clone"))
    (tmp_path / "uncommitted.diff").write_text(diff)
    git("apply", str(tmp_path / "uncommitted.diff"), cwd=tmp_path / "clone")
    assert (tmp_path / "clone" / "note.py").read_text() == "a = 2\n"
    assert (tmp_path / "clone" / "picture.bin").read_bytes() == bytes(range(255, -1, -1))


# ---------------------------------------------------------------- threads


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine of eight idle cores, on which the user gives no count."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(threads, "cores", lambda: 8)
    monkeypatch.setattr(threads, "busy_cores", lambda: 0.0)
    monkeypatch.setattr(threads, "EVERY", 0.0)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)


@pytest.mark.usefixtures("free")
def test_processes_divide_the_cores(tmp_path: Path) -> None:
    said: list[str] = []
    with threads.Share(None, tmp_path) as first:
        assert first.count == 8
        with threads.Share(None, tmp_path) as second:
            assert second.count == 4
            first.adapt(said.append)
            assert first.count == 4
            with threads.Share(None, tmp_path) as third:
                assert third.count == 2
        first.adapt(said.append)
        assert first.count == 8
    assert [line.split(",")[0] for line in said] == ["threads: 8 -> 4", "threads: 4 -> 8"]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("free")
@pytest.mark.parametrize("how", ["option", "environment", "both"])
def test_a_count_that_the_user_gives_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    if how != "option":
        monkeypatch.setenv("OMP_NUM_THREADS", "3")
    wanted = None if how == "environment" else 5
    with threads.Share(None, tmp_path), threads.Share(wanted, tmp_path) as own:
        assert own.count == (5 if wanted else 3)
        own.adapt(print)
        own.choose(lambda: 1.0)
        assert own.count == (5 if wanted else 3)


@pytest.mark.usefixtures("free")
@pytest.mark.parametrize(("load", "count"), [(0.2, 8), (3.4, 5), (7.9, 1), (30.0, 1)])
def test_a_busy_machine_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, load: float, count: int
) -> None:
    monkeypatch.setattr(threads, "busy_cores", lambda: load)
    with threads.Share(None, tmp_path) as share:
        assert share.count == count


@pytest.mark.usefixtures("free")
@pytest.mark.parametrize(
    ("speeds", "count"),
    [({1: 100, 4: 105, 8: 110}, 1), ({1: 100, 4: 190, 8: 200}, 4), ({1: 100, 4: 120, 8: 300}, 8)],
)
def test_the_fewest_threads_that_are_about_as_fast_are_chosen(
    tmp_path: Path, speeds: dict[int, float], count: int
) -> None:
    with threads.Share(None, tmp_path) as share:
        share.choose(lambda: speeds[share.count])
        assert share.count == share.chosen == count
        with threads.Share(None, tmp_path):
            share.adapt(print)
            assert share.count == min(count, 4)


@pytest.mark.usefixtures("free")
def test_a_killed_process_does_not_count(tmp_path: Path) -> None:
    (tmp_path / "left by a killed one").touch()
    (tmp_path / "a folder").mkdir()
    (tmp_path / "link").symlink_to("/etc/passwd")
    with threads.Share(None, tmp_path) as share:
        assert share.count == 8
    assert not (tmp_path / "left by a killed one").exists()
    assert (tmp_path / "link").is_symlink()


def test_load_is_measured() -> None:
    assert 0 <= threads.busy_cores() <= (os.cpu_count() or 1) + 0.5


@pytest.mark.parametrize(("limit", "threads"), [(None, 1), (0.0, 2), (1e12, 1)])
def test_a_tiny_model_has_one_thread_whatever_else_runs(
    tmp_path: Path,
    command: Command,
    monkeypatch: pytest.MonkeyPatch,
    limit: float | None,
    threads: int,
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("lmplay.threads.cores", lambda: 2)
    monkeypatch.setattr("lmplay.threads.busy_cores", lambda: 0.0)
    monkeypatch.setattr("lmplay.threads.folder", lambda: tmp_path / "others")
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    if limit is not None:
        monkeypatch.setattr("lmplay.training.loop.ONE_THREAD_FLOPS", limit)
    write_plan(tmp_path)
    try:
        assert command("lmp_trainer", *TRAIN, "--steps", "1").returncode == 0
    finally:
        torch.set_num_threads(before)
    run = tmp_path / "gpt_out" / "tiny" / "gpt2ish-1steps-s0"
    assert RunFolder(run).read()["threads"] == threads


def test_a_resume_keeps_the_threads_it_began_with(tmp_path: Path, command: Command) -> None:
    write_plan(tmp_path)
    done = command("lmp_trainer", *TRAIN, "--threads", "1", "--steps", "2")
    assert done.returncode == 0, done.stderr
    (run,) = (tmp_path / "gpt_out" / "tiny").glob("gpt2ish-*")
    assert RunFolder(run).read()["threads"] == 1


@pytest.mark.parametrize(
    "words",
    [
        ("lmp_trainer",),
        ("lmp_trial",),
        ("lmp_generator",),
        ("lmp_cleanmodel",),
        ("lmp_plotstats",),
        ("lmp_market", "simulate"),
        ("lmp_market", "perplexity"),
        ("lmp_market", "score"),
        ("lmp_market", "generate"),
    ],
)
def test_every_command_takes_threads(command: Command, words: tuple[str, ...]) -> None:
    assert "--threads N" in command(*words, "--help").stdout
    wrong = command(*words, "--threads", "0")
    assert wrong.returncode == 2
    assert "argument --threads: 0 is not an integer above 0" in wrong.stderr
