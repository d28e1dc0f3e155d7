"""Checkpoints: whole or not there, verified, never unpickled."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest
import torch

from lmplay import files
from lmplay.errors import LmplayError
from lmplay.training import checkpoint


def save(folder: Path, step: int, value: float = 0.0, keep: int = 2) -> Path:
    return checkpoint.save(
        folder, step, {"model": {"w": torch.full((3,), value)}}, {"step": step}, keep
    )


def test_newest_whole_one_is_loaded_and_the_skipped_one_named(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step, float(step))
    assert [p.name for p in sorted(tmp_path.iterdir())] == ["000000002", "000000003"], (
        "the newest two are kept"
    )
    said: list[str] = []
    newest = tmp_path / "000000003" / "model.safetensors"
    content = bytearray(newest.read_bytes())
    content[-1] ^= 1  # one flipped bit, which safetensors alone would load
    newest.write_bytes(content)
    found = checkpoint.newest(tmp_path, said.append)
    assert found is not None
    assert found.step == 2
    assert found.tensors("model")["w"].tolist() == [2.0] * 3
    assert "000000003" in said[0]
    assert "damaged" in said[0]


@pytest.mark.parametrize("file", ["manifest.json", "state.json", "model.safetensors"])
def test_a_missing_or_cut_file_is_noticed(tmp_path: Path, file: str) -> None:
    path = save(tmp_path, 1)
    content = (path / file).read_bytes()
    (path / file).write_bytes(content[: len(content) // 2])
    with pytest.raises(LmplayError):
        checkpoint.verify(path)
    (path / file).unlink()
    with pytest.raises(LmplayError):
        checkpoint.verify(path)


def test_all_damaged_is_an_error_and_none_is_none(tmp_path: Path) -> None:
    assert checkpoint.newest(tmp_path / "none", print) is None
    (save(tmp_path, 1) / "manifest.json").unlink()
    with pytest.raises(LmplayError, match="none of 1"):
        checkpoint.newest(tmp_path, lambda text: None)


class Evil:
    def __reduce__(self):
        return os.system, ("touch ran",)


def test_one_that_a_trainer_takes_away_while_it_is_read_is_no_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (1, 2):
        checkpoint.save(tmp_path, step, {"model": {"w": torch.zeros(2)}}, {})
    verify = checkpoint.verify

    def late(path: Path) -> checkpoint.Checkpoint:
        if path.name == "000000002":  # meanwhile two newer ones were saved
            for step in (3, 4):
                checkpoint.save(tmp_path, step, {"model": {"w": torch.zeros(2)}}, {})
        return verify(path)

    monkeypatch.setattr(checkpoint, "verify", late)
    said: list[str] = []
    found = checkpoint.newest(tmp_path, said.append)
    assert found is not None
    assert found.step == 4
    assert said == []


def test_a_pickle_is_refused_and_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "000000001"
    folder.mkdir()
    torch.save(Evil(), folder / "model.pt")
    with pytest.raises(LmplayError, match="pickle"):
        checkpoint.verify(folder)
    assert not (tmp_path / "ran").exists()


def test_no_code_of_ours_can_unpickle() -> None:
    words = ("torch.load", "import pickle", "allow_pickle", "weights_only=False", "joblib", "dill")
    root = Path(checkpoint.__file__).parent
    for path in [*root.rglob("*.py"), *(root.parent / "experiments").glob("*.py")]:
        text = path.read_text()
        assert not [w for w in words if w in text], path


def test_a_full_disk_is_one_line_and_the_older_checkpoint_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 1)

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(LmplayError, match="No space left on device"):
        save(tmp_path, 2)
    monkeypatch.undo()
    assert [p.name for p in tmp_path.iterdir()] == ["000000001"]
    checkpoint.verify(tmp_path / "000000001")


def test_a_save_that_was_killed_leaves_nothing_in_the_way(tmp_path: Path) -> None:
    (tmp_path / ".000000005.1.tmp").mkdir(parents=True)
    (tmp_path / ".000000005.1.tmp" / "model.safetensors").write_bytes(b"half")
    assert checkpoint.newest(tmp_path, print) is None
    save(tmp_path, 6)
    assert [p.name for p in tmp_path.iterdir()] == ["000000006"]


def test_names_and_shapes_must_agree(tmp_path: Path) -> None:
    model = torch.nn.Linear(3, 2)
    tensors = checkpoint.model_tensors(model)
    with pytest.raises(LmplayError, match="bias is missing"):
        checkpoint.load_model_tensors(model, {"weight": tensors["weight"]}, tmp_path)
    wrong = {"weight": torch.zeros(4, 3), "bias": tensors["bias"]}
    with pytest.raises(LmplayError, match="another vocabulary or size"):
        checkpoint.load_model_tensors(model, wrong, tmp_path)


def test_json_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    files.write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        files.write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}
