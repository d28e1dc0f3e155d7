"""A trial's journal file. Each line holds the digest of its content, so that damage is noticed."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from optuna.storages.journal import JournalFileBackend, JournalFileSymlinkLock

from ..errors import LmplayError
from ..files import SEAL, seal


class SealedJournal(JournalFileBackend):
    """optuna's journal file with sealed lines. Lines of older versions have no seal.

    Raises:
        LmplayError: a line before the last is damaged.
    """

    def __init__(self, path: str):
        lock = JournalFileSymlinkLock(path)
        if Path(path).exists():
            lock.acquire()
            try:
                check_journal(Path(path))
            finally:
                lock.release()
        super().__init__(path, lock)

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        super().append_logs([{**log, SEAL: seal(log)} for log in logs])

    def read_logs(self, log_number_from: int) -> Iterator[dict[str, Any]]:  # type: ignore[override]
        for number, log in enumerate(super().read_logs(log_number_from), log_number_from + 1):
            if not _is_sound(log):
                raise _damage(Path(self._file_path), number)
            yield {k: v for k, v in log.items() if k != SEAL}


def check_journal(path: Path) -> None:
    """Check every line. Drop an incomplete last line: power may have failed while it was written.

    Raises:
        LmplayError: a line before the last is damaged, or the last one was changed.
    """
    content = path.read_bytes()
    *lines, rest = content.split(b"\n")
    for number, line in enumerate(lines, 1):
        try:
            log = json.loads(line)
        except ValueError as e:
            if number < len(lines) or rest:
                raise _damage(path, number) from e
            rest = line + b"\n"
            break
        if not _is_sound(log):
            raise _damage(path, number)
    if rest:
        print(f"{path}: its last line is incomplete: it is dropped", file=sys.stderr)
        os.truncate(path, len(content) - len(rest))


def _is_sound(log: Any) -> bool:
    return isinstance(log, dict) and (SEAL not in log or log[SEAL] == seal(log))


def _damage(path: Path, line: int) -> LmplayError:
    return LmplayError(
        f"{path}: line {line} is damaged, and later ones depend on it; --name starts another "
        "trial, which uses the finished runs again"
    )
