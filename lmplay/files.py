"""Atomic writes: a file or folder appears complete under its name, or not at all."""

from __future__ import annotations

import fcntl
import fnmatch
import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from .errors import LmplayError

TEMPORARY = re.compile(r"\..*\.[0-9a-f]{8}\.tmp(\..*)?|\.\d{9}\.\d+\.tmp")
"""The names of :func:`_temporary`, and of checkpoints up to version 0.2. Others next to them may be
a user's."""


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
    block itself deletes the folder, nothing is renamed. Temporary folders that killed processes
    left next to `path` are deleted first.

    Args:
        replace: an existing `path` is deleted once the new one is in its place.

    Raises:
        OSError: the folder cannot be written, or `path` exists and `replace` is False.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_abandoned(path.parent)
    temporary = _temporary(path)
    lock = _make_locked(temporary)
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
        os.close(lock)
        shutil.rmtree(temporary, ignore_errors=True)


def _make_locked(folder: Path) -> int:
    """Create a folder and lock it, so that others see that its owner is alive.

    Returns:
        A descriptor. Closing it, as the end of the process does, gives up the lock.
    """
    while True:
        folder.mkdir()
        try:
            descriptor = os.open(folder, os.O_RDONLY)
        except FileNotFoundError:  # taken for abandoned before it was locked
            continue
        with suppress(OSError):  # some network file systems cannot lock folders
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        if folder.exists():
            return descriptor
        os.close(descriptor)


def remove_abandoned(folder: Path) -> None:
    """Delete the temporary folders of :func:`atomic_folder` whose owner was killed."""
    for left in folder.glob(".*.tmp*"):
        if not TEMPORARY.fullmatch(left.name):  # a user's own
            continue
        try:
            descriptor = os.open(left, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except OSError:  # a file, a link, or gone meanwhile
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(left, ignore_errors=True)
        except OSError:  # its owner is alive, or the file system cannot tell
            pass
        finally:
            os.close(descriptor)


def refuse_link(path: Path) -> None:
    """Raise LmplayError if `path` is a symbolic link, which must not be written through."""
    if path.is_symlink():
        raise LmplayError(f"{path} is a symbolic link: it is not written through; remove it")


def open_own(path: Path) -> IO[str]:
    """Open a text file for appending, but not through a symbolic link.

    A run's folder may come from elsewhere, and a link in it may lead to any file of the user's.

    Raises:
        LmplayError: it is a symbolic link.
        OSError: it cannot be opened.
    """
    refuse_link(path)
    flags = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_APPEND
    return open(os.open(path, flags, 0o666), "a", encoding="utf-8")


def below(root: Path, pattern: str) -> list[Path]:
    """Return the files whose names match, in a folder and below it, also through links."""
    found = []
    seen: set[str] = set()  # a link may lead to a folder above it, or to one that was visited
    for folder, folders, names in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders.sort()
        found += [Path(folder) / name for name in fnmatch.filter(names, pattern)]
    return found


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


SEAL = "content_sha256"
"""A key of a sealed JSON object: the sha256 of everything else in it."""


def seal(content: dict[str, Any]) -> str:
    """Return the digest of a JSON object without its seal."""
    rest = {k: v for k, v in content.items() if k != SEAL}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def write_json(path: Path, content: Any, sealed: bool = False) -> None:
    """Write JSON atomically.

    Args:
        sealed: add the content's digest, which :func:`read_json` then checks.

    Raises:
        ValueError: a number is infinite or NaN, which JSON cannot hold. The old file stays.
    """
    if sealed:
        content = {**content, SEAL: seal(content)}
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object, and check its seal if it has one. The seal is not returned.

    Raises:
        ValueError: it is no JSON or no object, or was changed since it was sealed.
        OSError: it cannot be read.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except RecursionError as e:
        raise ValueError("it is nested too deeply") from e
    if not isinstance(content, dict):
        raise ValueError(f"it holds {type(content).__name__} where an object belongs")
    if SEAL in content and content[SEAL] != seal(content):
        raise ValueError(f"it is damaged or was edited: its {SEAL} differs")
    return {k: v for k, v in content.items() if k != SEAL}
