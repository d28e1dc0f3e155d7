"""Bad input through the commands: one clear line, an exit status that is not 0, and nothing
lost."""

from __future__ import annotations

import json
import os
import resource
import signal
from pathlib import Path

import pytest
import torch
from conftest import Command, call_command, edit_record, one_line, write_plan

from lmplay.files import read_json
from lmplay.training.curves import read_curve
from lmplay.training.run_folder import RunFolder


@pytest.fixture
def trained(tmp_path: Path, command: Command) -> Path:
    """A finished run of a tiny plan in tmp_path; returns its folder."""
    write_plan(tmp_path)
    done = command(
        "lmp_trainer",
        "--training-plan",
        "tiny.json",
        "--mini-batch-size",
        "8",
        "--save-minutes",
        "0",
    )
    assert done.returncode == 0, done.stderr
    return tmp_path / "gpt_out" / "tiny" / "gpt2ish-s0"


def test_unknown_experiment(command: Command) -> None:
    one_line(command("lmp_trainer", "--exp", "value_nrom"), "did you mean value_norm?")


def test_unknown_plan_and_plan_key(command: Command, tmp_path: Path) -> None:
    one_line(command("lmp_trainer", "--training-plan", "laptp"), "did you mean laptop?")
    write_plan(tmp_path, optimiser={})
    one_line(
        command("lmp_trainer", "--training-plan", "tiny.json"),
        "did you mean optimizer?",
        "tiny.json",
    )


def test_missing_data_set(command: Command, tmp_path: Path) -> None:
    write_plan(tmp_path)
    (tmp_path / "data.jsonl").unlink()
    one_line(command("lmp_trainer", "--training-plan", "tiny.json"), "data set words", "no files")
    # the hub's client may warn on its own; the last line is ours
    done = command("lmp_trainer", "--training-plan", "tinystories")
    assert done.returncode == 1
    assert "the plans laptop, smoke" in done.stderr.strip().splitlines()[-1]
    assert "Traceback" not in done.stderr


def test_corrupt_newest_checkpoint_falls_back(command: Command, trained: Path) -> None:
    summary = read_json(trained / "run.json")["summary"]
    # as if killed just before the end
    edit_record(trained, lambda record: record.pop("summary"))
    newest = sorted((trained / "checkpoints").iterdir())[-1]
    weights = newest / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"oops")
    done = command("lmp_trainer", "--training-plan", "tiny.json", "--save-minutes", "0")
    assert done.returncode == 0, done.stderr
    assert f"{newest.name} skipped: model.safetensors is damaged" in done.stdout
    assert "at step 11" in done.stdout
    again = json.loads((trained / "run.json").read_text())["summary"]
    assert again["val_loss"] == summary["val_loss"]
    assert len(read_curve(trained / "train.csv")) == 12


def test_a_checkpoint_is_named_by_its_step(command: Command, trained: Path) -> None:
    newest = sorted((trained / "checkpoints").iterdir())[-1]
    here = call_command("lmp_cleanmodel", ".", cwd=newest)
    assert here.returncode == 0, here.stderr
    best = newest.rename(newest.parent / "best")
    one_line(command("lmp_generator", "x", "--model", str(best)), "the number of its step")


def test_what_no_generator_of_numbers_takes_is_no_seed(command: Command, trained: Path) -> None:
    for seed in ("-1", str(2**63), "one"):
        done = command("lmp_generator", "x", "--do-sample", "--seed", seed)
        assert done.returncode == 2
        assert f"{seed} is not an integer" in done.stderr


def test_a_pickle_is_refused(command: Command, trained: Path, tmp_path: Path) -> None:
    torch.save({"w": torch.zeros(2)}, tmp_path / "model.pt")
    one_line(command("lmp_generator", "x", "--model", "model.pt"), "pickle", "refused")
    newest = sorted((trained / "checkpoints").iterdir())[-1]
    (newest / "manifest.json").unlink()
    torch.save({"w": torch.zeros(2)}, newest / "model.pt")
    one_line(command("lmp_generator", "x", "--model", str(newest)), "pickle", "refused")


def test_vocabulary_that_does_not_match(command: Command, trained: Path) -> None:
    edit_record(trained, lambda record: record["identity"]["config"].update(vocab_size=99))
    done = command("lmp_generator", "x")
    assert done.returncode == 1
    assert "vocabulary does not match" in done.stderr
    assert "99" in done.stderr


def test_another_tokenizer_is_refused(command: Command, trained: Path) -> None:
    path = trained / "tokenizer" / "tokenizer.json"
    content = json.loads(path.read_text())
    content["state"] = {"kind": "chars", "characters": "abc"}
    path.write_text(json.dumps(content))
    done = command("lmp_generator", "x", "--model", str(trained))
    one_line(done, "not the tokenizer that was saved")


def test_a_run_of_other_code_is_refused_and_fresh_moves_it_aside(
    command: Command, tmp_path: Path
) -> None:
    write_plan(tmp_path)
    text = (Path(__file__).parent.parent / "experiments" / "gpt2ish.py").read_text()
    text = text.replace('"gpt2ish": {}', '"mine": {}').replace('"gpt2ish_', '"mine_')
    (tmp_path / "mine.py").write_text(text)
    arguments = (
        "lmp_trainer",
        "--exp",
        "mine.py",
        "--training-plan",
        "tiny.json",
        "--mini-batch-size",
        "8",
    )
    assert command(*arguments).returncode == 0
    folder = tmp_path / "gpt_out" / "tiny" / "mine-s0"
    curve = (folder / "train.csv").read_text()
    (tmp_path / "mine.py").write_text(text + "\n# changed\n")
    one_line(command(*arguments), "holds another run", "experiment", "--fresh")
    assert (folder / "train.csv").read_text() == curve
    assert command(*arguments, "--fresh").returncode == 0
    assert (tmp_path / "gpt_out" / "tiny" / "mine-s0~1" / "train.csv").read_text() == curve


@pytest.mark.skipif(os.name == "nt", reason="POSIX permissions")
def test_no_permission_to_write(command: Command, tmp_path: Path) -> None:
    write_plan(tmp_path)
    (tmp_path / "file").write_text("a file where a folder is wanted")  # refuses root as well
    done = command("lmp_trainer", "--training-plan", "tiny.json", "--out", "file/out")
    one_line(done, "cannot be written", "file/out")
    if os.geteuid() != 0:
        (tmp_path / "locked").mkdir(mode=0o500)
        one_line(
            command("lmp_trainer", "--training-plan", "tiny.json", "--out", "locked"),
            "cannot be written",
        )


def test_two_processes_do_not_train_one_run(command: Command, trained: Path) -> None:
    folder = RunFolder(trained)
    assert folder.open({}, fresh=False)
    one_line(command("lmp_trainer", "--training-plan", "tiny.json"), "another process")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_disk_full_while_training(command: Command, tmp_path: Path) -> None:
    write_plan(tmp_path)
    words = ("lmp_trainer", "--training-plan", "tiny.json", "--mini-batch-size", "8")
    assert command(*words, "--steps", "1").returncode == 0  # the data are prepared
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(
        resource.RLIMIT_FSIZE, (16_000, before[1])
    )  # as a full disk, for this process
    try:
        done = command(*words)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    one_line(done, "File too large", "checkpoint could not be written")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--set", "num_blocks"), "KEY=VALUE"),
        (("--set", "num_blokcs=3"), "did you mean num_blocks"),
        (("--set", "dropout=2"), "not in [0, 1)"),
        (("--device", "cuda"), "no such device"),
    ],
)
def test_bad_settings(command: Command, arguments: tuple[str, ...], says: str) -> None:
    if "cuda" in arguments and torch.cuda.is_available():
        pytest.skip("a GPU is here")
    one_line(command("lmp_trainer", "--training-plan", "smoke", *arguments), says)


def test_without_a_plan_one_is_taken_that_downloads_nothing_and_said(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    for has_card in (False, True):
        monkeypatch.setattr("torch.cuda.is_available", lambda answer=has_card: answer)
        done = command("lmp_trainer", "--exp", "gpt2ish_tiny", "--describe", "--device", "cpu")
        assert done.returncode == 0, done.stderr
        assert "training plan: laptop (--training-plan list" in done.stdout


def test_amp_says_when_the_hardware_has_none(command: Command, tmp_path: Path) -> None:
    from lmplay.devices import pick_precision

    write_plan(tmp_path)
    done = command(
        "lmp_trainer", "--training-plan", "tiny.json", "--amp", "--steps", "2", "--device", "cpu"
    )
    assert done.returncode == 0, done.stderr
    native = pick_precision(torch.device("cpu"), amp=True).name == "bf16"
    assert ("float32 is used" in done.stdout) != native
    (folder,) = (tmp_path / "gpt_out" / "tiny").iterdir()
    assert folder.name == ("gpt2ish-2steps-bf16-s0" if native else "gpt2ish-2steps-s0")


def test_usage_errors_have_their_own_status(command: Command) -> None:
    for arguments in (("--steps", "0"), ("--minutes", "soon"), ("--no-such-flag",)):
        assert command("lmp_trainer", *arguments).returncode == 2


def test_generator_and_plots_without_runs(command: Command, tmp_path: Path) -> None:
    one_line(command("lmp_generator", "hello"), "no run with a checkpoint")
    one_line(command("lmp_plotstats"), "no such folder")
    (tmp_path / "gpt_out").mkdir()
    one_line(command("lmp_plotstats"), "no runs with curves")
    one_line(command("lmp_generator", "hello", "--model", "nowhere"), "no such folder")
    one_line(command("lmp_generator", "hello", "--do-sample", "--temperature", "0"), "above 0")
    one_line(command("lmp_generator", "hello", "--top-k", "5"), "--top-k goes with --do-sample")
    one_line(command("lmp_plotstats", "--plot-raw"), "nothing is smoothed")
    one_line(
        command("lmp_plotstats", "--html", "p.html", "--port", "9000"), "--port goes with --serve"
    )


@pytest.mark.parametrize(
    ("mode", "option"),
    [
        ("--describe", "--seed=1"),
        ("--check-grads", "--amp"),
        ("--profile", "--steps=3"),
        ("--find-lr", "--tokens=9"),
    ],
)
def test_options_that_a_mode_would_ignore_are_refused(
    command: Command, mode: str, option: str
) -> None:
    one_line(
        command("lmp_trainer", mode, option),
        f"{mode} and {option.split('=')[0]} do not go together",
    )


def test_a_full_device_is_one_line(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    for module in ("match", "loop"):
        monkeypatch.setattr(f"lmplay.training.{module}.count_flops", full)
    for mode in ("--describe", "--fresh", "--profile"):
        done = command("lmp_trainer", "--training-plan", str(write_plan(tmp_path)), mode)
        one_line(done, "the device ran out of memory: a smaller --mini-batch-size, or model?")


def test_a_text_shorter_than_a_sequence(command: Command, tmp_path: Path) -> None:
    plan = write_plan(
        tmp_path, model={"num_blocks": 1, "embed_dim": 16, "num_heads": 2, "max_len": 100_000}
    )
    one_line(
        command("lmp_trainer", "--exp", "ue", "--training-plan", str(plan)),
        "too few for a sequence of 100000",
    )


def test_check_grads_and_profile(command: Command, tmp_path: Path) -> None:
    write_plan(tmp_path)
    text = (Path(__file__).parent.parent / "experiments" / "gpt2ish.py").read_text()
    text = text.replace(
        "        self.ln = nn", "        self.idle = Linear(3, 3)\n        self.ln = nn"
    )
    (tmp_path / "idle.py").write_text(text)
    done = command(
        "lmp_trainer", "--exp", "idle.py", "--training-plan", "tiny.json", "--check-grads"
    )
    assert done.returncode == 1
    assert "no gradient: idle.weight" in done.stdout
    assert "parameters_without_gradient: 2 of" in done.stdout
    done = command(
        "lmp_trainer", "--training-plan", "tiny.json", "--profile", "--mini-batch-size", "8"
    )
    assert done.returncode == 0, done.stderr
    assert "aten::" in done.stdout
    (trace,) = (tmp_path / "gpt_out").glob("profile-*.json")
    assert json.loads(trace.read_text())["traceEvents"]
