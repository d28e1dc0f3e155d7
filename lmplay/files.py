"""Atomic writes: a file or folder appears complete under its name, or not at all."""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def _temporary(path: Path) -> Path:
    """A hidden name next to `path` that no other process uses, with the same suffix."""
    # Process ids are not unique: containers that share a disk may have the same ones.
    return path.with_name(f".{path.stem}.{secrets.token_hex(4)}.tmp{path.suffix}")


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a temporary path next to `path`, and rename it to `path` on success.

    The content is synced to the disk before the rename: after a power failure either the old or
    the new file is there. On an exception the temporary file is deleted.

    Raises:
        OSError: the file cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary(path)
    try:
        yield temporary
        sync_file(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path, replace: bool = False) -> Iterator[Path]:
    """Yield a temporary folder next to `path`, and rename it to `path` on success.

    All files are synced before the rename. On an exception the temporary folder is deleted. If the
    block itself deletes the folder, nothing is renamed.

    Args:
        replace: an existing `path` is deleted once the new one is in its place.

    Raises:
        OSError: the folder cannot be written, or `path` exists and `replace` is False.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary(path)
    temporary.mkdir()
    try:
        yield temporary
        if not temporary.exists():
            return
        for file in temporary.rglob("*"):
            if file.is_file():
                sync_file(file)
        sync_folder(temporary)
        old = _temporary(path)
        if path.exists():
            if not replace:
                raise FileExistsError(17, "File exists", str(path))
            path.rename(old)
        temporary.rename(path)
        sync_folder(path.parent)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def sync_file(path: Path) -> None:
    """Flush a file's content to the disk."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """Flush a folder's list of names to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Write text atomically."""
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, content: Any) -> None:
    """Write JSON atomically.

    Raises:
        ValueError: a number is infinite or NaN, which JSON cannot hold. The old file stays.
    """
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
