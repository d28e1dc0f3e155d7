"""Starting from a trained run, freezing, and the way back."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pandas as pd
import pytest
import torch
from conftest import Command, write_plan
from safetensors.torch import load_file, save_file

from lmplay import testing
from lmplay.errors import LmplayError
from lmplay.training import checkpoint
from lmplay.training import warm_start as initial


@pytest.fixture
def trained(command: Command, tmp_path: Path) -> Path:
    """A trained gpt2ish on the plan tiny.json, in gpt_out of the commands' folder."""
    plan = write_plan(tmp_path)
    assert command("lmp_trainer", "--training-plan", str(plan)).returncode == 0
    return tmp_path / "gpt_out/tiny/gpt2ish-s0"


def losses(run: Path) -> list[float]:
    return pd.read_csv(run / "validate.csv")["loss"].tolist()


def tensors(run: Path) -> dict[str, torch.Tensor]:
    return load_file(max((run / "checkpoints").iterdir()) / "model.safetensors")


def test_ue_starts_where_the_plain_model_ended(
    command: Command, tmp_path: Path, trained: Path
) -> None:
    done = command(
        "lmp_trainer",
        "--exp",
        "ue",
        "--training-plan",
        "tiny.json",
        "--initial-model",
        str(trained),
    )
    assert done.returncode == 0, done.stderr
    assert "fitted: remaining error" in done.stdout
    assert "38 of 38 tensors" in done.stdout
    run = tmp_path / "gpt_out/tiny/ue-from=gpt2ish_s0-s0"
    assert losses(run)[0] == pytest.approx(losses(trained)[-1], rel=1e-5)
    # and the way back: folded, the plain experiment takes it as it is
    assert command("lmp_cleanmodel", str(run)).returncode == 0
    clean = f"{run}-clean"
    back = command(
        "lmp_trainer", "--training-plan", "tiny.json", "--initial-model", clean, "--steps", "1"
    )
    assert back.returncode == 0, back.stderr
    assert "38 of 38 tensors" in back.stdout
    (plain,) = (tmp_path / "gpt_out/tiny").glob("gpt2ish-1steps-from*")
    assert losses(plain)[0] == pytest.approx(losses(run)[-1], rel=1e-6)


def test_what_is_not_loaded_is_listed(command: Command, trained: Path) -> None:
    done = command(
        "lmp_trainer",
        "--exp",
        "sac1",
        "--training-plan",
        "tiny.json",
        "--initial-model",
        str(trained),
    )
    assert done.returncode == 0, done.stderr
    assert "37 of 38 tensors" in done.stdout
    assert "not loaded: tok_embed.weight" in done.stdout
    assert "new here: predictors.0" in done.stdout


def test_another_start_is_another_run(command: Command, tmp_path: Path, trained: Path) -> None:
    train = ("lmp_trainer", "--training-plan", "tiny.json", "--initial-model", str(trained))
    assert command(*train).returncode == 0
    assert "is finished" in command(*train).stdout
    run = tmp_path / "gpt_out/tiny/gpt2ish-from=gpt2ish_s0-s0"
    assert run.is_dir()
    # A run that has begun needs its source no more.
    trained.rename(tmp_path / "elsewhere")
    assert "is finished" in command(*train).stdout
    # Without a name of its own it would pass for the baseline, or for another seed of it.
    assert json.loads((run / "run.json").read_text())["label"] == "gpt2ish, from gpt2ish"


def test_another_tokenizer_is_refused(command: Command, tmp_path: Path, trained: Path) -> None:
    write_plan(tmp_path, tokenizer={"kind": "chars"})
    done = command("lmp_trainer", "--training-plan", "tiny.json", "--initial-model", str(trained))
    assert done.returncode == 1
    assert "another tokenizer" in done.stderr
    assert len(list((tmp_path / "gpt_out/tiny").iterdir())) == 1


def test_frozen_parameters_stay(command: Command, tmp_path: Path, trained: Path) -> None:
    options = ("--freeze", "blocks.*", "--freeze", "pos_embed.*")
    train = (
        "lmp_trainer",
        "--training-plan",
        "tiny.json",
        "--initial-model",
        str(trained),
        *options,
    )
    assert command(*train).returncode == 0
    (run,) = (tmp_path / "gpt_out/tiny").glob("*freeze*")
    before = tensors(trained)
    after = tensors(run)
    for name in before:
        stays = name.startswith(("blocks.", "pos_embed."))
        assert torch.equal(before[name], after[name]) == stays, name
    assert command("lmp_generator", "the", "--model", str(run), "--max-len", "2").returncode == 0
    label = json.loads((run / "run.json").read_text())["label"]
    assert label == "gpt2ish, from gpt2ish, without blocks.* pos_embed.*"


def test_train_only() -> None:
    model = testing.tiny("gpt2ish").model()
    frozen = initial.freeze(model, ("blocks.0.*",), ("blocks.*", "ln.*"))
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        n for n, _ in model.named_parameters() if n.startswith(("blocks.1.", "ln."))
    }
    assert len(frozen) == sum(not p.requires_grad for p in model.parameters())


def test_what_the_experiment_does_not_train_stays_so() -> None:
    model = testing.tiny("gpt2ish").model()
    model.pos_embed.weight.requires_grad_(False)
    assert initial.freeze(model, ("blocks.0.*",), ()) == [
        n for n, _ in model.named_parameters() if n.startswith("blocks.0.")
    ]
    assert not model.pos_embed.weight.requires_grad


def test_another_source_of_the_same_name_is_another_run(
    command: Command, tmp_path: Path, trained: Path
) -> None:
    other = tmp_path / "other" / trained.name
    shutil.copytree(trained, other)
    train = ("lmp_trainer", "--training-plan", "tiny.json", "--initial-model")
    assert command(*train, str(trained)).returncode == 0
    newest = max((other / "checkpoints").iterdir())
    manifest = json.loads((newest / "manifest.json").read_text())
    changed = {k: v + 1 for k, v in load_file(newest / "model.safetensors").items()}
    save_file(changed, newest / "model.safetensors")
    content = (newest / "model.safetensors").read_bytes()
    manifest["model.safetensors"] = {
        "size": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
    }
    (newest / "manifest.json").write_text(json.dumps(manifest))
    done = command(*train, str(other))
    assert done.returncode == 1
    assert "holds another run: not the same initial" in done.stderr


def test_a_pattern_that_matches_nothing(command: Command, tmp_path: Path) -> None:
    done = command(
        "lmp_trainer", "--training-plan", str(write_plan(tmp_path)), "--freeze", "block.*"
    )
    assert done.returncode == 1
    assert "--freeze block.*: no parameter has such a name" in done.stderr
    assert not list(tmp_path.glob("gpt_out/tiny/*"))
    with pytest.raises(LmplayError, match="nothing is left"):
        initial.freeze(testing.tiny("gpt2ish").model(), ("*",), ())


@pytest.mark.parametrize("act", ["gelu", "relu", "elu", "identity"])
@pytest.mark.parametrize("mid", [1.0, 2.5])
def test_fit_undoes_a_fold(act: str, mid: float) -> None:
    s = testing.tiny("ue", front_act=act, mid_mul=mid)
    plain = testing.tiny("gpt2ish").moved()
    model = s.model()
    said = []
    used = s.runner.warm_start(
        model, {"tok_embed.weight": plain.tok_embed.weight.detach()}, said.append
    )
    assert used == {"tok_embed.weight"}
    torch.testing.assert_close(
        model.tok_embed.table(), plain.tok_embed.weight.detach(), rtol=1e-4, atol=1e-6
    )
    assert "remaining error" in said[-1]
    # What is beside the copied columns is alive: it gets gradients at once.
    s.runner.step(model, s.batch()).loss_sum.backward()
    grad = model.tok_embed.front.weight.grad.to_dense()
    assert bool(grad[:, 16:].abs().sum() > 0)
    assert (
        checkpoint.model_tensors(s.runner.fold(model)).keys()
        == checkpoint.model_tensors(plain).keys()
    )
