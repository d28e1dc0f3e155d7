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
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Command, run_command, write_plan

from lmplay import devices, threads
from lmplay.analysis import figures
from lmplay.cli import is_out_of_memory, trainer
from lmplay.discover import find, read_source
from lmplay.errors import LmplayError
from lmplay.plan import load_plan, parse_plan
from lmplay.training import checkpoint
from lmplay.training.curves import read_curve
from lmplay.training.run_folder import RunFolder, git_state

TRAIN = ("--training-plan", "tiny.json", "--mini-batch-size", "8")
VALIDATION = {"fraction": 0.1, "tokens": 512, "every_tokens": 10_240, "sample_prompt": "the "}


def one_line(done: subprocess.CompletedProcess[str], *says: str) -> None:
    assert done.returncode == 1, done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    for word in says:
        assert word in done.stderr


def long_plan(folder: Path) -> None:
    steps = [{"step_name": "words", "datasets": ["words"], "steps": 4000}]
    write_plan(folder, steps=steps, validation=VALIDATION)


def start(folder: Path, **options: Any) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "lmplay.cli.trainer", *TRAIN]
    return subprocess.Popen(command, cwd=folder, text=True, **options)


def until_it_trains(folder: Path) -> Path:
    run = folder / "gpt_out" / "tiny" / "gpt2ish-s0"
    until = time.monotonic() + 100
    while not (run / "train.csv").exists():
        assert time.monotonic() < until
        time.sleep(0.02)
    return run


# ---------------------------------------------------------------- ends


def test_a_closed_terminal_saves(tmp_path: Path) -> None:
    long_plan(tmp_path)
    process = start(tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    run = until_it_trains(tmp_path)
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
    run = until_it_trains(tmp_path)
    process.send_signal(signal.SIGHUP)
    assert process.wait(60) == 0
    assert len(read_curve(run / "train.csv")) == 150


def test_a_closed_pipe_saves(tmp_path: Path) -> None:
    long_plan(tmp_path)
    process = start(tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    run = until_it_trains(tmp_path)
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


def test_without_a_home_the_line_says_what_to_set(
    tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_plan(tmp_path)
    for name in ("HOME", "LMP_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)

    def no_entry(*_: object) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", no_entry)
    one_line(command("lmp_trainer", *TRAIN), "there is no home folder", "LMP_CACHE")


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


def test_without_a_compiler_compiling_is_refused_in_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "/nonexistent/g++")
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
    assert command(*words, "--threads", "0", *(["x"] * 0)).returncode == 2


# ---------------------------------------------------------------- plans


def tiny(tmp_path: Path) -> dict[str, Any]:
    return json.loads(write_plan(tmp_path).read_text())


@pytest.mark.parametrize(
    ("part", "key", "value", "says"),
    [
        ("optimizer", "lr", "0.1", 'a number is wanted, not the text "0.1"'),
        ("optimizer", "lr", True, "a number is wanted, not true"),
        ("batch", "batch_size", "8", 'a number is wanted, not the text "8"'),
        ("batch", "batch_size", True, "a number is wanted, not true"),
        ("optimizer", "lazy", 1, "true or false is wanted"),
        ("optimizer", "lazy", "yes", "true or false is wanted"),
        ("optimizer", "betas", [0.9, 95], "less than 1"),
        ("optimizer", "betas", [0.9, "0.95"], "a number is wanted"),
        ("optimizer", "betas", [-0.1, 0.9], "greater than or equal to 0"),
        ("optimizer", "lr", float("inf"), "finite"),
        ("optimizer", "weight_decay", float("nan"), "finite"),
        ("schedule", "floor", float("-inf"), "finite"),
        ("validation", "sample_prompt", "hi \ud83d", "half of a surrogate pair"),
        ("model", "num_blocks", 10**9, "less than or equal to 10000"),
        ("model", "embed_dim", 4 * 10**8, "less than or equal to"),
        ("model", "max_len", 10**12, "less than or equal to"),
        ("batch", "batch_size", 10**9, "less than or equal to"),
    ],
)
def test_a_value_of_another_kind_is_named(
    tmp_path: Path, part: str, key: str, value: Any, says: str
) -> None:
    raw = tiny(tmp_path)
    raw[part][key] = value
    with pytest.raises(LmplayError, match=says) as caught:
        parse_plan(raw, "p.json")
    assert key in str(caught.value)


@pytest.mark.parametrize("value", [8.0, 1e1, 16])
def test_round_numbers_are_integers_however_they_are_written(tmp_path: Path, value: float) -> None:
    raw = tiny(tmp_path)
    raw["batch"]["batch_size"] = value
    assert parse_plan(raw, "p.json").batch.batch_size == int(value)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ('"lr": 0.001', '"lr": 0.001, "lr": 9.0'),
        ('"seed"', '"batch": {}, "seed"'),
        ('"path": "data.jsonl"', '"path": "data.jsonl", "path": "data.jsonl"'),
    ],
)
def test_a_key_that_appears_twice_is_refused(tmp_path: Path, before: str, after: str) -> None:
    path = write_plan(tmp_path, seed=0)
    text = path.read_text()
    assert before in text
    path.write_text(text.replace(before, after, 1))
    with pytest.raises(LmplayError, match="appears twice"):
        load_plan(path)


@pytest.mark.parametrize("content", ["[" * 100_000, '{"a":' * 50_000, "\xff", "", "[]", "3"])
def test_a_plan_that_is_none_is_one_line(tmp_path: Path, command: Command, content: str) -> None:
    (tmp_path / "p.json").write_text(content, encoding="latin-1")
    one_line(command("lmp_trainer", "--training-plan", "./p.json"), "p.json")


@pytest.mark.parametrize("setting", ["num_blocks=1000000000", "embed_dim=400000000", "max_len=-1"])
def test_sizes_of_the_command_have_the_plan_s_limits(
    tmp_path: Path, command: Command, setting: str
) -> None:
    write_plan(tmp_path)
    one_line(command("lmp_trainer", *TRAIN, "--set", setting), setting.split("=")[0])


MALFORMED = {
    "keys": 'VARIANTS = {1: {}}\nBASELINE = "a"',
    "inner keys": 'VARIANTS = {"a": {1: 2}}\nBASELINE = "a"',
    "inner": 'VARIANTS = {"a": [1]}\nBASELINE = "a"',
    "list": 'VARIANTS = ["a"]\nBASELINE = "a"',
    "empty": 'VARIANTS = {}\nBASELINE = "a"',
    "unhashable": 'VARIANTS = {[]: {}}\nBASELINE = "a"',
    "computed": 'VARIANTS = dict(a={})\nBASELINE = "a"',
    "baseline": 'VARIANTS = {"a": {}}\nBASELINE = 3',
    "no baseline": 'VARIANTS = {"a": {}}\nBASELINE = None',
    "name": 'VARIANTS = {"../a": {}}\nBASELINE = "a"',
    "null byte": 'VARIANTS = {"a": {}}\0',
    "nesting": "VARIANTS = " + "(" * 5000 + ")" * 5000 + '\nBASELINE = "a"',
}


@pytest.mark.parametrize("kind", MALFORMED)
def test_a_malformed_experiment_breaks_no_list(tmp_path: Path, command: Command, kind: str) -> None:
    (tmp_path / "experiments").mkdir()
    text = "class Config: pass\nclass Runner: pass\n" + MALFORMED[kind]
    path = tmp_path / "experiments" / "odd.py"
    path.write_text(text)
    assert read_source(path, "here").broken
    done = command("lmp_trainer", "--exp", "list")
    assert done.returncode == 0, done.stderr
    assert "broken" in done.stdout
    assert "value_norm" in done.stdout
    with pytest.raises(LmplayError):
        find(str(path))


@pytest.mark.parametrize("do_sample", [(), ("--do-sample",), ("--do-sample", "--top-p", "0.5")])
def test_weights_that_are_not_finite_are_said(
    tmp_path: Path, command: Command, do_sample: tuple[str, ...]
) -> None:
    write_plan(tmp_path)
    assert command("lmp_trainer", *TRAIN).returncode == 0
    (path,) = (tmp_path / "gpt_out" / "tiny" / "gpt2ish-s0" / "checkpoints").glob("0*")
    found = checkpoint.verify(path)
    tensors = {
        name: {
            k: torch.full_like(v, float("nan")) if v.is_floating_point() else v
            for k, v in t.items()
        }
        for name in ("model", "optimizer", "rng")
        for t in [found.tensors(name)]
    }
    checkpoint.save(path.parent, found.step + 1, tensors, found.state)
    one_line(
        command("lmp_generator", "the", "--model", "gpt_out/tiny/gpt2ish-s0", *do_sample),
        "not finite",
    )


# ---------------------------------------------------------------- longer budgets


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


# ---------------------------------------------------------------- figures


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
