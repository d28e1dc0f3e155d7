"""Checkpoints: folders of tensors (safetensors) and JSON. Nothing is ever unpickled.

The manifest of a checkpoint holds the size and the sha256 of every file. A folder gets its name
only when all its files are on the disk. Loading takes the newest checkpoint that verifies.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import load_file, save_file

from ..errors import LmplayError
from ..files import atomic_folder, read_json, write_json

MANIFEST = "manifest.json"
STATE = "state.json"


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint: its JSON state, and tensors that are read on demand."""

    path: Path
    state: dict[str, Any]

    @property
    def step(self) -> int:
        return int(self.path.name)

    @property
    def fingerprint(self) -> str:
        """The sha256 of the model's tensors."""
        return str(read_manifest(self.path)["model.safetensors"]["sha256"])

    def tensors(self, name: str) -> dict[str, torch.Tensor]:
        """Return the tensors of the file `name`.safetensors, on the CPU."""
        try:
            return load_file(self.path / f"{name}.safetensors")
        except (OSError, safetensors.SafetensorError) as e:
            raise LmplayError(f"{self.path / name}.safetensors: it cannot be read: {e}") from e


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def save(
    folder: Path,
    step: int,
    tensors: dict[str, dict[str, torch.Tensor]],
    state: dict[str, Any],
    keep: int = 2,
) -> Path:
    """Write checkpoint `step` in `folder`, then remove all but the newest `keep`, and step 0.

    Args:
        tensors: by file and name.

    Raises:
        LmplayError: the disk is full or refuses. Older checkpoints stay.
    """
    final = folder / f"{step:09d}"
    try:
        with atomic_folder(final, replace=True) as temporary:
            for name, content in tensors.items():
                save_file(unshared(content), temporary / f"{name}.safetensors")
            write_json(temporary / STATE, state)
            for file in temporary.glob("*.safetensors"):
                # safetensors writes for the owner alone, whatever the umask says.
                file.chmod((temporary / STATE).stat().st_mode)
            manifest = {
                file.name: {"size": file.stat().st_size, "sha256": _sha256(file)}
                for file in sorted(temporary.iterdir())
            }
            write_json(temporary / MANIFEST, manifest)
        numbered = _numbered(folder)
        # Untrained weights must not be loaded where trained ones are damaged.
        untrained = [old for old in numbered[:-1] if int(old.name) == 0]
        for old in dict.fromkeys([*numbered[:-keep], *untrained]):
            shutil.rmtree(old)
    except (OSError, safetensors.SafetensorError) as e:
        reason = getattr(e, "strerror", None) or str(e)
        raise LmplayError(
            f"{final}: the checkpoint could not be written: {reason}; older ones are kept"
        ) from e
    return final


def unshared(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the tensors on the CPU, each with memory of its own, as safetensors wants them.

    Layers may share a buffer, such as a table of rotary angles.
    """
    found: dict[str, torch.Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        on_cpu = tensor.contiguous().cpu()
        memory = on_cpu.untyped_storage().data_ptr()
        found[name] = on_cpu.clone() if memory in seen else on_cpu
        seen.add(memory)
    return found


def _numbered(folder: Path) -> list[Path]:
    return sorted(p for p in folder.glob("[0-9]*") if p.is_dir()) if folder.is_dir() else []


def verify(path: Path) -> Checkpoint:
    """Return the checkpoint in the folder `path` after comparing every byte with its manifest.

    Raises:
        LmplayError: what is wrong with it, in a few words.
    """
    try:
        pickles = [
            p.name for p in path.iterdir() if p.suffix in (".pt", ".pth", ".bin", ".pkl", ".ckpt")
        ]
        if not (path / MANIFEST).is_file():
            if pickles:
                raise LmplayError(
                    f"{pickles[0]} is a pickle, which can run code when it is read: refused"
                )
            raise LmplayError("it has no manifest")
        manifest = read_manifest(path)
        for name, expected in manifest.items():
            file = path / name
            if not file.is_file() or file.stat().st_size != expected["size"]:
                raise LmplayError(f"{name} is missing or truncated")
            if _sha256(file) != expected["sha256"]:
                raise LmplayError(f"{name} is damaged (its sha256 differs)")
        return Checkpoint(path, read_json(path / STATE))
    except (OSError, ValueError) as e:
        raise LmplayError(f"it cannot be read: {e}") from e


def read_manifest(path: Path) -> dict[str, dict[str, Any]]:
    """Return size and sha256 of each file of the checkpoint `path`.

    Raises:
        ValueError: the manifest is damaged, or leaves out a file that is read.
        OSError: it cannot be read.
    """
    manifest = read_json(path / MANIFEST)
    for name in {STATE, "model.safetensors", *(p.name for p in path.glob("*.safetensors"))}:
        if name not in manifest:
            raise ValueError(f"{MANIFEST} does not list {name}")
    for name, entry in manifest.items():
        valid = isinstance(entry, dict) and Path(name).name == name
        if not valid or not isinstance(entry.get("size"), int):
            raise ValueError(f"{MANIFEST} has no size of {name}")
        if not isinstance(entry.get("sha256"), str):
            raise ValueError(f"{MANIFEST} has no sha256 of {name}")
    return manifest


def newest(
    folder: Path,
    log: Callable[[str], None],
    check: Callable[[dict[str, Any]], None] | None = None,
) -> Checkpoint | None:
    """Return the newest checkpoint that verifies, or None if there is no checkpoint.

    Args:
        log: prints why a checkpoint is skipped.
        check: raises ValueError for a state that cannot be used; the checkpoint is skipped.

    Raises:
        LmplayError: there are checkpoints, and none verifies.
    """
    numbered = _numbered(folder)
    for path in reversed(numbered):
        try:
            found = verify(path)
            if check is not None:
                check(found.state)
            return found
        except (LmplayError, ValueError) as e:
            if not path.exists():  # a trainer removed it and wrote newer ones
                return newest(folder, log, check)
            log(f"checkpoint {path} skipped: {e}")
    if numbered:
        raise LmplayError(
            f"{folder}: none of {len(numbered)} checkpoints can be used; --fresh starts over"
        )
    return None


def model_tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return parameters and persistent buffers by name; a shared parameter has its first name
    only."""
    persistent = model.state_dict()
    parameters = dict(model.named_parameters())
    shared = {n for n, _ in model.named_parameters(remove_duplicate=False)} - set(parameters)
    return {n: t.detach() for n, t in persistent.items() if n not in shared}


def load_model_tensors(
    model: torch.nn.Module, tensors: dict[str, torch.Tensor], where: Path
) -> None:
    """Copy tensors into the model. Names and shapes must agree.

    Raises:
        LmplayError: the first difference.
    """
    own = model_tensors(model)
    for name in sorted(set(own) ^ set(tensors)):
        raise LmplayError(
            f"{where}: the tensor {name} is {'missing' if name in own else 'not in this model'}"
        )
    for name, tensor in tensors.items():
        if own[name].shape != tensor.shape:
            shapes = f"{list(tensor.shape)}, the model's is {list(own[name].shape)}"
            raise LmplayError(f"{where}: {name} has the shape {shapes}: another vocabulary or size")
        own[name].copy_(tensor)
