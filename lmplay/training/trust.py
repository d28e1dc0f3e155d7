"""Whose code a run's folder holds.

A run keeps a copy of its experiment's source, and opening the run executes it. That is safe for
source that a user has in a place of their own, and for runs that were made here: these carry a
signature with a key that stays in the user's cache folder.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import sys
from pathlib import Path
from typing import Any

from ..data.token_files import cache_folder
from ..discover import list_sources, source_digest
from ..errors import LmplayError
from ..files import write_text

SIGNATURE = "signature"  # its key in run.json


def _key() -> bytes:
    """Return this user's key, made when it is first needed."""
    path = cache_folder() / "key"
    try:
        return bytes.fromhex(path.read_text(encoding="ascii"))
    except (FileNotFoundError, ValueError):
        key = secrets.token_bytes(32)
        write_text(path, key.hex())
        path.chmod(0o600)
        return key


def signature(digest: str) -> str:
    """Return the signature of an experiment's source, given its digest."""
    return hmac.new(_key(), digest.encode(), hashlib.sha256).hexdigest()


def is_own(digest: str, record: dict[str, Any]) -> bool:
    """Return whether source with this digest was trained here, or is that of an experiment file
    that `lmp_trainer --exp list` shows."""
    signed = record.get(SIGNATURE)
    if isinstance(signed, str) and hmac.compare_digest(signed, signature(digest)):
        return True
    known = (source.path for source in list_sources() if source.path.is_file())
    return any(source_digest(path) == digest for path in known)


def check_source(copy: Path, digest: str, record: dict[str, Any], trust: bool) -> None:
    """Raise LmplayError unless the source in a run's folder may be executed.

    On a terminal the user is asked.

    Args:
        copy: the file.
        digest: of the file's current content.
        trust: the user has allowed it.
    """
    recorded = record["identity"].get("experiment")
    if digest != recorded:
        raise LmplayError(
            f"{copy} is not the source that was trained: its digest is {digest}, and run.json says "
            f"{recorded}; it is not executed"
        )
    if trust or is_own(digest, record):
        return
    what = f"{copy} comes from elsewhere, and opening this run executes it as a program of yours"
    if sys.stdin is not None and sys.stdin.isatty() and sys.stderr.isatty():
        print(f"{what}. Read it first. Execute it? [y/N] ", end="", file=sys.stderr, flush=True)
        if sys.stdin.readline().strip().lower() in ("y", "yes"):
            return
        raise LmplayError("it was not executed")
    raise LmplayError(f"{what}: read it, and add --trust")
