"""Finding experiments by name, path, folder; listing broken ones; errors that name the nearest."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, Command

from lmplay import discover
from lmplay.errors import LmplayError

BASE = (ROOT / "experiments" / "gpt2ish.py").read_text()


def write(folder: Path, name: str, text: str) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_text(text)
    return path


def renamed(variant: str) -> str:
    return BASE[: BASE.index("VARIANTS")] + f'VARIANTS = {{"{variant}": {{}}}}\n'


def test_listing_imports_no_torch() -> None:
    code = (
        "import sys; from lmplay.cli.trainer import main; "
        "main(['--exp', 'list']); assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for word in ("gpt2ish", "value_norm", "ue16x", "shipped"):
        assert word in done.stdout


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("def f(:\n", "line 1"),
        ("import no_such_module\n" + renamed("x"), "no module named no_such_module"),
        (
            renamed("x").replace(" KVCache,", " KVCash,", 1),
            "no KVCash (did you mean KVCache?)",
        ),
        ('"""Doc."""\nX = 1\n', "defines no Config"),
        (
            BASE.replace('{"num_blocks": 12}', '{"num_block": 12}'),
            "Config has no num_block (did you mean num_blocks?)",
        ),
    ],
)
def test_a_broken_file_is_listed_with_its_reason_and_takes_no_other_down(
    tmp_path: Path, command: Command, text: str, reason: str
) -> None:
    write(tmp_path / "experiments", "mine.py", text)
    listed = command("lmp_trainer", "--exp", "list")
    assert listed.returncode == 0
    assert reason in listed.stdout
    assert "value_norm" in listed.stdout
    used = command("lmp_trainer", "--exp", "mine")
    assert used.returncode == 1
    assert reason in used.stderr
    assert len(used.stderr.strip().splitlines()) == 1


def test_own_folder_path_variant_and_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = write(tmp_path / "experiments", "mine.py", renamed("mine"))
    assert discover.find("mine")[0].path == path
    assert discover.find("mine")[0].origin == "./experiments"
    assert discover.find("experiments/mine.py") == (
        discover.find("experiments/mine.py:mine")[0],
        "mine",
    )
    colon = write(tmp_path / "10:30", "late.py", renamed("late"))
    assert discover.find(str(colon)) == discover.find(f"{colon}:late"), (
        "a folder's colon is not the variant's"
    )
    other = write(tmp_path / "elsewhere", "theirs.py", renamed("theirs"))
    monkeypatch.setenv("LMP_EXPERIMENTS", str(tmp_path / "elsewhere"))
    assert discover.find("theirs")[0].path == other


def test_the_same_name_twice_names_both_places(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = write(tmp_path / "experiments", "again.py", renamed("ue"))
    with pytest.raises(LmplayError, match="two places") as error:
        discover.find("ue")
    assert str(path) in str(error.value)
    assert str(ROOT / "experiments" / "ue.py") in str(error.value)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("value_nrom", "did you mean value_norm?"),
        ("no_such.py", "there is no file"),
        (str(ROOT / "experiments/ue.py") + ":ue7x", "did you mean ue"),
    ],
)
def test_unknown_names(name: str, says: str) -> None:
    with pytest.raises(LmplayError, match=r".") as error:
        discover.find(name)
    assert says in str(error.value)


def test_an_import_that_fails_names_file_and_error(tmp_path: Path) -> None:
    path = write(tmp_path, "late.py", renamed("late") + "\n1 / 0\n")
    with pytest.raises(LmplayError, match=r"late\.py: importing it failed: ZeroDivisionError"):
        discover.load(*discover.find(str(path)))


def test_entry_points_are_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import importlib.metadata

    write(tmp_path, "plugged.py", renamed("plugged"))
    monkeypatch.syspath_prepend(tmp_path)
    entry = importlib.metadata.EntryPoint("plugged", "plugged", discover.ENTRY_POINTS)
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: [entry])
    assert discover.find("plugged")[0].origin == "entry point plugged"


def test_config_takes_plan_then_variant_then_overrides() -> None:
    experiment = discover.load(*discover.find("gpt2ish_12"))
    config, without = experiment.config(
        {"num_blocks": 4, "embed_dim": 96, "num_kv_heads": 3}, {"tied": "true", "head_bias": "0"}
    )
    assert (config.num_blocks, config.embed_dim, config.tied, config.head_bias) == (
        12,
        96,
        True,
        False,
    )
    assert without == ["num_kv_heads"]
    for override, says in (
        ({"num_block": "3"}, "did you mean num_blocks"),
        ({"num_blocks": "many"}, "num_blocks=many"),
        ({"num_heads": "7"}, "not a multiple"),
        ({"num_heads": "0"}, "do not go together"),
        ({"num_blocks": "0"}, "1 or more"),
        ({"vocab_size": "100"}, "the plan's (300)"),
    ):
        with pytest.raises(LmplayError) as error:
            experiment.config({"vocab_size": 300}, override)
        assert says in str(error.value)


def test_describe_needs_no_hub(command: Command) -> None:
    done = command(
        "lmp_trainer", "--exp", "gpt2ish_tiny", "--describe", "--training-plan", "tinystories"
    )
    assert done.returncode == 0, done.stderr
    assert "vocab_size = 50257" in done.stdout


def test_describe(command: Command) -> None:
    done = command(
        "lmp_trainer", "--exp", "ue", "--describe", "--training-plan", "smoke", "--set", "mid_mul=2"
    )
    assert done.returncode == 0, done.stderr
    assert "mid_mul = 2.0   (default 1.0)" in done.stdout
    assert "tok_embed.front.weight [257, 256]" in done.stdout
    flops = float(done.stdout.split("flops_per_token: ")[1].split()[0])
    assert 1e5 < flops < 1e7


def test_an_ideas_name_stands_for_its_first_variant() -> None:
    for idea, variant in (("uw", "uw1"), ("combined", "all1"), ("sacrificial", "sac1")):
        source, found = discover.find(idea)
        assert (source.idea, found) == (idea, variant)
