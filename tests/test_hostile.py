"""Files and folders from elsewhere, and damage: named in one line, never used, never executed."""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import re
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Command, call_command, edit_record, one_line, write_plan
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st

from lmplay.analysis.page import serve
from lmplay.data.prepare import prepare
from lmplay.data.token_files import cache_folder
from lmplay.data.tokenizers import load, train_bpe
from lmplay.discover import source_digest
from lmplay.errors import LmplayError
from lmplay.files import atomic_folder, read_json, remove_abandoned, write_json
from lmplay.plan import load_plan
from lmplay.training import checkpoint
from lmplay.training.record import check_state
from lmplay.training.run_folder import RUN_FILE, RunFolder, safe_name
from lmplay.trial.queue import has_ended, open_storage, process_mark

TRAIN = ("--training-plan", "tiny.json", "--mini-batch-size", "8")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished run, to be copied."""
    folder = tmp_path_factory.mktemp("finished")
    write_plan(folder)
    done = call_command("lmp_trainer", *TRAIN, "--save-minutes", "0", cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def trained(tmp_path: Path, finished: Path) -> Path:
    """A finished run in tmp_path; returns its folder."""
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    return tmp_path / "gpt_out" / "tiny" / "gpt2ish-s0"


# ---------------------------------------------------------------- code from elsewhere


@pytest.mark.parametrize(
    "where", ["redis://h/0", "rediss://h:1/2", "redis+sentinel://h", "unix://s"]
)
def test_a_storage_that_unpickles_is_refused(where: str) -> None:
    with pytest.raises(LmplayError, match="Redis is not used"):
        open_storage(where)


def edit_source(run: Path) -> None:
    with open(run / "experiment" / "gpt2ish.py", "a") as file:
        file.write("\nimport pathlib\npathlib.Path('EXECUTED').touch()\n")


def write_digest(run: Path) -> None:
    """Make run.json name the edited source, as whoever edited it would."""
    digest = source_digest(run / "experiment" / "gpt2ish.py")
    edit_record(run, lambda record: record["identity"].update(experiment=digest))


USES = (
    ("lmp_generator", "the", "--max-len", "2", "--model"),
    ("lmp_cleanmodel",),
    ("lmp_trainer", *TRAIN, "--steps", "1", "--initial-model"),
)


@pytest.mark.parametrize("words", USES, ids=lambda w: w[0])
def test_edited_source_is_never_executed(
    trained: Path, command: Command, tmp_path: Path, words: tuple[str, ...]
) -> None:
    edit_source(trained)
    one_line(command(*words, str(trained)), "is not the source that was trained")
    one_line(command(*words, str(trained), "--trust"), "is not the source that was trained")
    assert not (tmp_path / "EXECUTED").exists()


@pytest.mark.parametrize("words", USES, ids=lambda w: w[0])
def test_source_from_elsewhere_needs_trust(
    trained: Path, command: Command, tmp_path: Path, words: tuple[str, ...]
) -> None:
    edit_source(trained)
    write_digest(trained)
    one_line(command(*words, str(trained)), "comes from elsewhere", "--trust")
    assert not (tmp_path / "EXECUTED").exists()
    assert command(*words, str(trained), "--trust").returncode == 0
    assert (tmp_path / "EXECUTED").exists()


def test_own_and_shipped_source_is_trusted(
    trained: Path, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("lmp_generator", "the", "--max-len", "2", "--model", str(trained))
    assert command(*words).returncode == 0
    monkeypatch.setenv("LMP_CACHE", str(tmp_path / "another user's"))
    assert command(*words).returncode == 0  # of another user, but the shipped gpt2ish
    mine = (trained / "experiment" / "gpt2ish.py").read_text() + "\n# mine\n"
    (tmp_path / "mine.py").write_text(mine)
    assert command("lmp_trainer", *TRAIN, "--exp", "mine.py", "--fresh").returncode == 0
    (tmp_path / "mine.py").unlink()
    assert (trained / "experiment" / "mine.py").exists()
    own = ("lmp_generator", "the", "--max-len", "2", "--model", str(trained))
    assert command(*own).returncode == 0  # made here: it is signed
    monkeypatch.setenv("LMP_CACHE", str(tmp_path / "a third user's"))
    one_line(command(*own), "comes from elsewhere")


# ---------------------------------------------------------------- places


@pytest.mark.parametrize("name", [".lock", "log.txt", "train.csv", "validate.csv", "samples.jsonl"])
def test_nothing_is_written_through_a_link(tmp_path: Path, command: Command, name: str) -> None:
    write_plan(tmp_path)
    run = tmp_path / "gpt_out" / "tiny" / "gpt2ish-s0"
    run.mkdir(parents=True)
    target = tmp_path / "precious.txt"
    target.write_text("precious")
    (run / name).symlink_to(target)
    one_line(command("lmp_trainer", *TRAIN), "is a symbolic link")
    assert target.read_text() == "precious"


@pytest.mark.parametrize("name", ["...json", "....json", ". .json", " .json"])
def test_a_plan_s_name_stays_below_out(tmp_path: Path, command: Command, name: str) -> None:
    write_plan(tmp_path).rename(tmp_path / name)
    done = command("lmp_trainer", "--training-plan", f"./{name}", "--steps", "1", "--out", "a/out")
    assert done.returncode == 0, done.stderr
    (record,) = tmp_path.rglob(RUN_FILE)
    assert (tmp_path / "a" / "out") in record.resolve().parents
    assert len(record.resolve().relative_to(tmp_path / "a" / "out").parts) == 3


@pytest.mark.parametrize("text", ["..", ".", "...", " ", "a/b", "/etc", "a\0b", "..\\x"])
def test_a_safe_name_is_one_name(text: str) -> None:
    name = safe_name(text)
    assert (Path("/top") / name).resolve().parent == Path("/top")


# ---------------------------------------------------------------- the page's server


@pytest.fixture
def port(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    monkeypatch.setattr(serve, "PATIENCE", 1.0)
    monkeypatch.setattr(serve, "CONNECTIONS", 6)
    content = {"arenas": [], "trials": [], "sizes": [], "preset": {}}
    found = serve.server(serve.LiveContent(lambda: dict(content)), "127.0.0.1", 0)
    thread = threading.Thread(target=found.serve_forever, daemon=True)
    thread.start()
    yield found.server_address[1]
    found.shutdown()
    found.server_close()


def status_of(port: int, head: bytes) -> bytes:
    with socket.create_connection(("127.0.0.1", port), timeout=5) as connection:
        connection.sendall(head)
        return connection.recv(100)


@pytest.mark.parametrize("host", ["[", "[::1", "]", "a[b", "[]:80", "\xff", "evil.example"])
def test_an_odd_host_is_refused_without_a_traceback(
    port: int, capfd: pytest.CaptureFixture[str], host: str
) -> None:
    head = f"GET /data.json HTTP/1.1\r\nHost: {host}\r\n\r\n".encode("latin-1")
    assert b" 403 " in status_of(port, head)
    assert "Traceback" not in capfd.readouterr().err


def test_idle_connections_do_not_keep_others_out(port: int) -> None:
    before = threading.active_count()
    idle = []
    for _ in range(40):
        with suppress(OSError):
            idle.append(socket.create_connection(("127.0.0.1", port)))
            idle[-1].sendall(b"GET / HTTP/1.1\r\nX: ")
    time.sleep(0.3)
    assert threading.active_count() - before <= 6
    time.sleep(1.5)  # they are closed, and a reader is served
    assert b" 200 " in status_of(port, b"GET /data.json HTTP/1.1\r\nHost: localhost\r\n\r\n")
    for connection in idle:
        connection.close()


@pytest.mark.parametrize(("path", "status"), [("/", 200), ("/data.json", 200), ("/x", 404)])
def test_head_has_no_body(port: int, path: str, status: int) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    connection.request("HEAD", path)
    answer = connection.getresponse()
    assert answer.status == status
    assert int(answer.headers["Content-Length"]) > 0
    assert answer.read() == b""


# ---------------------------------------------------------------- prepared tokens


def masked_plan(folder: Path) -> Path:
    """A plan whose prompts do not count, so that there are masks."""
    lines = [json.dumps({"q": f"question {i}", "a": f"answer {i} " * 8}) for i in range(80)]
    (folder / "qa.jsonl").write_text("\n".join(lines))
    columns = {"prompt": "q", "truth": "a"}
    source = {"source": "files", "path": "qa.jsonl", "columns": columns}
    return write_plan(folder, datasets={"words": source})


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("file", ["train.bin", "val.bin", "train.mask", "val.mask"])
@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_damaged_tokens_are_prepared_again_and_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str, damage: str
) -> None:
    monkeypatch.setenv("LMP_CACHE", str(tmp_path / "cache"))
    plan = load_plan(masked_plan(tmp_path))
    first = prepare(plan, lambda what, done: None)
    before = {
        name: np.array(getattr(first.tokens["words"], name)) for name in ("train", "val_mask")
    }
    (path,) = cache_folder().glob(f"tokens/*/{file}")
    if damage == "flip":
        flip(path)
    elif damage == "cut":
        os.truncate(path, path.stat().st_size - 2)
    else:
        path.unlink()
    said: list[str] = []
    again = prepare(plan, lambda what, done: said.append(what) if done is None else None)
    assert len(said) == 1
    assert file in said[0]
    assert "prepared again" in said[0]
    assert again.fingerprint == first.fingerprint
    for name, values in before.items():
        np.testing.assert_array_equal(getattr(again.tokens["words"], name), values)


@pytest.mark.parametrize(
    "content", ["{}", "[]", "null", '"x"', "", "{", '{"dtype": "uint16", "train": 1, "val": 2}']
)
def test_a_damaged_manifest_is_prepared_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str
) -> None:
    monkeypatch.setenv("LMP_CACHE", str(tmp_path / "cache"))
    plan = load_plan(write_plan(tmp_path))
    first = prepare(plan, lambda what, done: None)
    (path,) = cache_folder().glob("tokens/*/manifest.json")
    path.write_text(content)
    said: list[str] = []
    again = prepare(plan, lambda what, done: said.append(what) if done is None else None)
    assert again.fingerprint == first.fingerprint
    assert len(said) == 1
    assert "manifest.json" in said[0]


# ---------------------------------------------------------------- tokenizers


def test_a_fingerprint_covers_all_that_changes_the_ids() -> None:
    """The same tokens, in the same order: other rules give other ids."""
    texts = ["the quick brown fox jumps over the lazy dog"] * 20
    tokenizer = train_bpe(texts, 280)
    state = tokenizer.state()
    changed = []
    fewer = json.loads(json.dumps(state))
    fewer["tokenizer"]["model"]["merges"].pop()
    changed.append(fewer)
    swapped = json.loads(json.dumps(state))
    merges = swapped["tokenizer"]["model"]["merges"]
    merges[0], merges[-1] = merges[-1], merges[0]
    changed.append(swapped)
    prefixed = json.loads(json.dumps(state))
    prefixed["tokenizer"]["pre_tokenizer"]["add_prefix_space"] = True
    changed.append(prefixed)
    prints = {type(tokenizer).from_state(s).fingerprint for s in changed}
    assert len(prints) == 3
    assert tokenizer.fingerprint not in prints
    assert {type(tokenizer).from_state(s).old_fingerprint for s in changed} == {
        tokenizer.old_fingerprint
    }


@pytest.mark.parametrize("key", ["merges", "add_prefix_space", "eot"])
def test_a_changed_tokenizer_is_refused(tmp_path: Path, key: str) -> None:
    train_bpe(["the quick brown fox jumps over the lazy dog"] * 20, 280).save(tmp_path)
    path = tmp_path / "tokenizer.json"
    content = json.loads(path.read_text())
    inner = content["state"]["tokenizer"]
    if key == "merges":
        inner["model"]["merges"].pop()
    elif key == "add_prefix_space":
        inner["pre_tokenizer"][key] = True
    else:
        content["state"] = {"kind": "bytes"}
    path.write_text(json.dumps(content))
    with pytest.raises(LmplayError, match="fingerprint differs"):
        load(tmp_path)


def test_a_run_of_an_older_version_keeps_its_fingerprint(trained: Path, command: Command) -> None:
    tokenizer = RunFolder(trained).tokenizer()
    old = tokenizer.old_fingerprint
    edit_record(trained, lambda record: record["identity"].update(tokenizer=old))
    saved = json.loads((trained / "tokenizer" / "tokenizer.json").read_text())
    saved["fingerprint"] = tokenizer.old_fingerprint
    (trained / "tokenizer" / "tokenizer.json").write_text(json.dumps(saved))
    done = command("lmp_trainer", *TRAIN)
    assert done.returncode == 0, done.stderr
    assert "is finished" in done.stdout
    assert command("lmp_generator", "the", "--max-len", "2").returncode == 0


@pytest.mark.parametrize("old", ['"val_loss": ', '"val_bpb": ', '"plan_name": "ti'])
def test_an_edited_record_is_named(trained: Path, command: Command, old: str) -> None:
    text = (trained / RUN_FILE).read_text()
    assert text.count(old) == 1
    (trained / RUN_FILE).write_text(text.replace(old, old + "9"))
    one_line(command("lmp_trainer", *TRAIN), f"{RUN_FILE}: it cannot be read: it is damaged")


@pytest.mark.parametrize("name", ["train.csv", "validate.csv"])
def test_a_damaged_curve_is_not_continued(trained: Path, command: Command, name: str) -> None:
    edit_record(trained, lambda record: record.pop("summary"))  # as if killed just before the end
    flip(trained / name)
    one_line(command("lmp_trainer", *TRAIN), name, "it is damaged", "--fresh starts over")


def test_damaged_samples_are_dropped(trained: Path, command: Command) -> None:
    edit_record(trained, lambda record: record.pop("summary"))
    flip(trained / "samples.jsonl")
    done = command("lmp_trainer", *TRAIN)
    assert done.returncode == 0, done.stderr
    assert "samples.jsonl: it is damaged" in done.stdout
    assert (trained / "samples.jsonl").read_text() == ""


def test_a_run_of_an_older_version_has_no_digests(trained: Path, command: Command) -> None:
    record = read_json(trained / RUN_FILE)
    del record["summary"]
    write_json(trained / RUN_FILE, record)
    (trained / "digests.json").unlink()
    done = command("lmp_trainer", *TRAIN)
    assert done.returncode == 0, done.stderr
    assert len(RunFolder(trained).curves("train")) == 12


# ---------------------------------------------------------------- checkpoints and records


@pytest.mark.parametrize(
    "content",
    [
        {},
        [],
        {"model.safetensors": {"size": 1}},
        {"model.safetensors": 1, "state.json": 2},
        {"../../run.json": {"size": 1, "sha256": "x"}},
    ],
)
def test_a_manifest_that_leaves_something_out_verifies_nothing(
    tmp_path: Path, content: object
) -> None:
    path = checkpoint.save(tmp_path, 3, {"model": {"w": torch.ones(4)}}, {"a": 1})
    flip(path / "model.safetensors")
    (path / "manifest.json").write_text(json.dumps(content))
    with pytest.raises(LmplayError, match=r"manifest\.json|an object belongs"):
        checkpoint.verify(path)


@pytest.mark.parametrize(
    "place", [None, [], {"step": "3"}, {"plan_step": -1}, {"tokens": 1.5}, {"seconds": "nan"}]
)
def test_a_state_of_another_shape_is_skipped_for_the_older_one(
    tmp_path: Path, place: object
) -> None:
    good = {
        "plan_step": 0,
        "index": 1,
        "step_seconds": 0.1,
        "step": 1,
        "tokens": 8,
        "seconds": 0.1,
        "validated_at": -1,
    }
    state = {"place": good, "train_bytes": 0, "validate_bytes": 0, "grad_scaler": {}}
    check_state(state)
    checkpoint.save(tmp_path, 1, {"model": {"w": torch.ones(4)}}, state)
    bad = {**good, **place} if isinstance(place, dict) else place
    checkpoint.save(tmp_path, 2, {"model": {"w": torch.ones(4)}}, {**state, "place": bad})
    said: list[str] = []
    found = checkpoint.newest(tmp_path, said.append, check_state)
    assert found is not None
    assert found.step == 1
    assert "000000002 skipped: place" in said[0]


def test_untrained_weights_do_not_stand_in_for_damaged_ones(
    trained: Path, command: Command
) -> None:
    for path in (trained / "checkpoints").glob("*/model.safetensors"):
        assert path.parent.name != "000000000"
        flip(path)
    one_line_of_many = command("lmp_generator", "the", "--model", str(trained))
    assert one_line_of_many.returncode == 1
    assert "none of" in one_line_of_many.stderr.strip().splitlines()[-1]


RUN_FILES = (
    RUN_FILE,
    "tokenizer/tokenizer.json",
    "checkpoints/*/manifest.json",
    "checkpoints/*/state.json",
    "checkpoints/*/model.safetensors",
    "validate.csv",
    "train.csv",
    "samples.jsonl",
    "digests.json",
)
RUN = "gpt_out/tiny/gpt2ish-s0"
READERS = (
    ("lmp_generator", "the", "--max-len", "8", "--model", RUN),
    ("lmp_plotstats", "gpt_out", "--html", "page.html"),
    ("lmp_trainer", *TRAIN),
)
CACHE_FILES = ("tokens/*/train.bin", "tokens/*/val.bin", "tokens/*/manifest.json", "tokenizers/*")
SHAPES = ("{}", "[]", "null", '"x"', "1e999", "[[[[", '{"identity": 3}', '{"state": {"kind": []}}')
DAMAGE = ("flip", "cut", "empty", "shape", "key")
FUZZ: Any = {  # each example runs up to three commands
    "deadline": None,
    "derandomize": True,
    "phases": [Phase.explicit, Phase.generate],
    "suppress_health_check": list(HealthCheck),
}


def damaged(content: bytes, how: str, at: float, shape: str) -> bytes:
    """Return a file's content after an accident at a place in [0, 1)."""
    place = int(at * len(content))
    if how == "flip" and content:
        return content[:place] + bytes([content[place] ^ 0x15]) + content[place + 1 :]
    if how == "cut":
        return content[:place]
    if how == "empty":
        return b""
    if how == "key":
        try:
            parsed = json.loads(content)
            parsed[sorted(parsed)[int(at * len(parsed))]] = json.loads(shape.replace("[[[[", "[]"))
            return json.dumps(parsed).encode()
        except (ValueError, AttributeError, TypeError):
            return shape.encode()
    return shape.encode()


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished run and the cache that it read, to be copied and damaged."""
    folder = tmp_path_factory.mktemp("pristine")
    write_plan(folder, tokenizer={"kind": "bpe", "vocab_size": 280})
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LMP_CACHE", str(folder / "cache"))
        done = call_command("lmp_trainer", *TRAIN, "--save-minutes", "0", cwd=folder)
        assert done.returncode == 0, done.stderr
        read = {words[0]: call_command(*words, cwd=folder) for words in READERS}
    results = {name: outcome(name, done, folder) for name, done in read.items()}
    (folder / "outcomes.json").write_text(json.dumps(results))
    (folder / "page.html").unlink()
    return folder


def outcome(
    command: str, done: subprocess.CompletedProcess[str], folder: Path
) -> list[str | list[Any]]:
    """Return what a command printed, and what it made of a run."""
    assert done.returncode == 0, done.stderr
    if command == "lmp_trainer":  # its final figures, without notes on the data's preparation
        return [done.stdout.partition(" is finished; ")[2]]
    if command == "lmp_generator":
        return [done.stdout]
    page = (folder / "page.html").read_text()
    (content,) = re.findall(r'<script type="application/json" id="content">(.*)</script>', page)
    arenas = json.loads(content)["arenas"]
    for arena in arenas:
        del arena["changed"]  # the time of a file
    return [done.stdout, arenas]


def copy_with_damage(
    pristine: Path, folder: Path, pattern: str, damage: tuple[str, float, str]
) -> bool:
    """Copy the folder and damage the newest file of a pattern; return whether it changed."""
    shutil.copytree(pristine, folder, dirs_exist_ok=True)
    path = max(folder.glob(pattern))
    content = path.read_bytes()
    path.write_bytes(damaged(content, *damage))
    return path.read_bytes() != content


@settings(max_examples=14, **FUZZ)
@given(
    file=st.sampled_from(RUN_FILES),
    damage=st.tuples(
        st.sampled_from(DAMAGE), st.floats(0, 1, exclude_max=True), st.sampled_from(SHAPES)
    ),
)
@example(file=RUN_FILE, damage=("shape", 0.0, "{}"))
@example(file="tokenizer/tokenizer.json", damage=("shape", 0.0, "[]"))
@example(file="checkpoints/*/manifest.json", damage=("shape", 0.0, "{}"))
@example(file="checkpoints/*/state.json", damage=("empty", 0.0, "{}"))
@example(file="checkpoints/*/model.safetensors", damage=("flip", 0.9, ""))
@example(file="validate.csv", damage=("cut", 0.5, ""))
@example(file="validate.csv", damage=("flip", 0.9, ""))
@example(file="train.csv", damage=("flip", 0.7, ""))
@example(file="samples.jsonl", damage=("flip", 0.5, ""))
@example(file="digests.json", damage=("key", 0.5, "null"))
@example(file=RUN_FILE, damage=("flip", 0.9, ""))  # in its figures
@example(file=RUN_FILE, damage=("key", 0.99, "{}"))
def test_a_run_s_files_may_be_damaged(
    pristine: Path,
    tmp_path_factory: pytest.TempPathFactory,
    file: str,
    damage: tuple[str, float, str],
) -> None:
    """One line that names it, or what the undamaged file gives: never a traceback, never silent
    use."""
    folder = tmp_path_factory.mktemp("damaged")
    copy_with_damage(pristine, folder, f"{RUN}/{file}", damage)
    expected = json.loads((folder / "outcomes.json").read_text())
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LMP_CACHE", str(folder / "cache"))
        for words in READERS:
            done = call_command(*words, cwd=folder)
            assert done.returncode in (0, 1), done.stderr
            if done.returncode:
                last = done.stderr.strip().splitlines()[-1]
                assert last.startswith(f"{words[0]}: "), done.stderr
            elif not any(w in done.stdout + done.stderr for w in (Path(file).name, "skipped")):
                assert outcome(words[0], done, folder) == expected[words[0]], "silent use"
    shutil.rmtree(folder)


@settings(max_examples=8, **FUZZ)
@given(
    file=st.sampled_from(CACHE_FILES),
    damage=st.tuples(
        st.sampled_from(DAMAGE), st.floats(0, 1, exclude_max=True), st.sampled_from(SHAPES)
    ),
)
@example(file="tokenizers/*", damage=("flip", 0.5, ""))
@example(file="tokenizers/*", damage=("shape", 0.0, '{"state": {"kind": []}}'))
def test_what_the_cache_keeps_may_be_damaged(
    pristine: Path,
    tmp_path_factory: pytest.TempPathFactory,
    file: str,
    damage: tuple[str, float, str],
) -> None:
    """It is made again, and the run is that of the undamaged cache."""
    folder = tmp_path_factory.mktemp("damaged")
    copy_with_damage(pristine, folder, f"cache/{file}", damage)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LMP_CACHE", str(folder / "cache"))
        done = call_command("lmp_trainer", *TRAIN, "--out", "again", cwd=folder)
    assert done.returncode == 0, done.stderr
    before, after = (
        RunFolder(folder / out / "tiny" / "gpt2ish-s0").read() for out in ("gpt_out", "again")
    )
    assert after["identity"] == before["identity"]
    assert after["summary"]["val_loss"] == before["summary"]["val_loss"]
    shutil.rmtree(folder)


@settings(max_examples=60, **FUZZ)
@given(
    how=st.sampled_from(DAMAGE),
    at=st.floats(0, 1, exclude_max=True),
    shape=st.sampled_from(SHAPES),
)
def test_a_journal_may_be_damaged(
    tmp_path_factory: pytest.TempPathFactory, how: str, at: float, shape: str
) -> None:
    """What is before the damage is read, or a line names the file."""
    import optuna

    path = tmp_path_factory.mktemp("journal") / "journal.log"
    content = journal_of_a_study(path)
    path.write_bytes(damaged(content, how, at, shape))
    try:
        study = optuna.load_study(storage=open_storage(str(path)), study_name="s")
    except (LmplayError, KeyError):  # KeyError: no study of this name
        return
    expected = {f"key{i}": {"value": i} for i in range(4)}
    for key, value in study.user_attrs.items():
        assert expected[key] == value


# ---------------------------------------------------------------- journals and owners


def journal_of_a_study(path: Path) -> bytes:
    import optuna

    study = optuna.create_study(storage=open_storage(str(path)), study_name="s")
    for i in range(4):
        study.set_user_attr(f"key{i}", {"value": i})
    return path.read_bytes()


@pytest.mark.parametrize("rest", [b'{"op_code": 2, "wor', b"{", b"\0" * 50, b"not json\n"])
def test_a_journal_whose_last_line_was_cut_goes_on(tmp_path: Path, rest: bytes) -> None:
    import optuna

    path = tmp_path / "journal.log"
    content = journal_of_a_study(path)
    path.write_bytes(content + rest)
    study = optuna.load_study(storage=open_storage(str(path)), study_name="s")
    assert path.read_bytes() == content
    study.set_user_attr("more", 1)
    again = optuna.load_study(storage=open_storage(str(path)), study_name="s")
    assert again.user_attrs == {**{f"key{i}": {"value": i} for i in range(4)}, "more": 1}


@pytest.mark.parametrize("middle", [b"{broken", b"[1, 2]", b"\0\0\0"])
def test_a_journal_that_is_damaged_inside_is_named(tmp_path: Path, middle: bytes) -> None:
    path = tmp_path / "journal.log"
    lines = journal_of_a_study(path).splitlines(keepends=True)
    path.write_bytes(b"".join([lines[0], middle + b"\n", *lines[1:]]))
    with pytest.raises(LmplayError, match=r"journal\.log: line 2 is damaged"):
        open_storage(str(path))


def test_the_end_of_a_process_is_known_at_once() -> None:
    process = subprocess.Popen(["sleep", "60"])
    mark = process_mark(process.pid)
    assert mark is not None
    assert not has_ended(mark)
    assert not has_ended(process_mark(os.getpid()))
    process.kill()
    process.wait()
    assert has_ended(mark)
    boot, space, pid, start = mark.split()
    assert has_ended(f"{boot} {space} {os.getpid()} {start}")  # the number is used again
    for elsewhere in (
        f"other-boot {space} {pid} {start}",
        f"{boot} pid:[1] {pid} {start}",
        None,
        3,
    ):
        assert not has_ended(elsewhere)


# ---------------------------------------------------------------- unfinished folders


def test_folders_of_killed_processes_are_removed_and_others_stay(tmp_path: Path) -> None:
    dead = tmp_path / ".tokens.1234abcd.tmp"
    dead.mkdir()
    (dead / "train.bin").write_bytes(b"x" * 100)
    suffixed = tmp_path / ".a.1234abcd.tmp.d"
    suffixed.mkdir()
    linked = tmp_path / ".link.1234abcd.tmp"
    linked.symlink_to(tmp_path / "user")
    (tmp_path / "user").mkdir()
    (tmp_path / "user" / "file").write_text("mine")
    users = [tmp_path / name for name in (".mine.tmp", ".tmp", ".a.tmp.d", ".notes.12345678.tmpx")]
    for folder in users:
        folder.mkdir()
    with atomic_folder(tmp_path / "alive") as alive:
        assert not dead.exists()
        assert not suffixed.exists()
        (alive / "file").write_text("kept")
        with atomic_folder(tmp_path / "other"):
            assert alive.exists(), "its owner is alive"
        remove_abandoned(tmp_path)
        assert alive.exists()
    assert all(folder.exists() for folder in users), "no names of ours"
    assert (tmp_path / "alive" / "file").read_text() == "kept"
    assert (tmp_path / "user" / "file").read_text() == "mine"


def test_a_digest_is_what_it_says(trained: Path) -> None:
    """The signature and the digest cover every byte of the source."""
    source = trained / "experiment" / "gpt2ish.py"
    expected = hashlib.sha256(b"gpt2ish.py\0" + source.read_bytes()).hexdigest()[:16]
    assert source_digest(source) == expected
