"""A run's identity and its folder under gpt_out/.

The identity is everything that decides the numbers. A folder belongs to one identity: starting the same
command again resumes it, a different run that would land in the same folder is refused.
"""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import json
import re
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from . import tokenizers
from .checkpoint import Checkpoint, newest
from .discover import Experiment, find, load
from .errors import BusyError, LmplayError
from .files import write_json, write_text
from .plan import Plan

RUN_FILE = "run.json"
MOVED = "~"  # marks a run that --fresh moved aside


def source_digest(path: Path) -> str:
    """16 hex digits of the experiment's code: the file, or all of its folder."""
    files = sorted(path.parent.rglob("*.py")) if path.name == "__init__.py" else [path]
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:16]


def folder_name(variant: str, overrides: Mapping[str, str], extras: list[str], seed: int) -> str:
    """<variant>[-<override>…]-s<seed>, with nothing in it that a file system minds."""
    parts = [variant, *(f"{k}={v}" for k, v in sorted(overrides.items())), *extras, f"s{seed}"]
    return "-".join(re.sub(r"[^\w.=+]", "_", part) for part in parts)


def identity(
    plan: Plan, experiment: Experiment, config: Any, seed: int, precision: str, tokenizer: str, data: str
) -> dict[str, Any]:
    """What decides a run's numbers, as JSON."""
    return {
        "plan": plan.fingerprint,
        "variant": experiment.variant,
        "experiment": source_digest(experiment.source.path),
        "config": dataclasses.asdict(config),
        "seed": seed,
        "precision": precision,
        "tokenizer": tokenizer,
        "data": data,
    }


def make_out(out: Path) -> None:
    """Make the folder for runs, where there is none, and let git leave it alone: results make no tree dirty.

    Raises:
        LmplayError: it cannot be written.
    """
    try:
        if not out.exists():
            write_text(out / ".gitignore", "*\n")
    except OSError as e:
        raise LmplayError(f"{out}: this folder cannot be written: {e.strerror}") from e


class RunFolder:
    """One run's folder; while `locked`, no other process trains in it."""

    def __init__(self, path: Path):
        self.path = path
        self._lock: IO[str] | None = None

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    def read(self) -> dict[str, Any]:
        """run.json.

        Raises:
            LmplayError: there is none, or it cannot be read.
        """
        try:
            return json.loads((self.path / RUN_FILE).read_text(encoding="utf-8"))
        except FileNotFoundError as e:
            raise LmplayError(f"{self.path}: this is not a run: it has no {RUN_FILE}") from e
        except (OSError, ValueError) as e:
            raise LmplayError(f"{self.path / RUN_FILE}: it cannot be read: {e}") from e

    def update(self, **fields: Any) -> None:
        write_json(self.path / RUN_FILE, {**self.read(), **fields})

    def differs(self, wanted: dict[str, Any]) -> list[str]:
        """In which parts of its identity the run that is there, if any, is not `wanted`."""
        if not (self.path / RUN_FILE).exists():
            return []
        held = self.read().get("identity", {})
        return [k for k in wanted if held.get(k) != json.loads(json.dumps(wanted[k]))]

    def open(self, wanted: dict[str, Any], fresh: bool) -> bool:
        """Claim the folder for the run with identity `wanted`; True when it already holds that run.

        Raises:
            LmplayError: another process trains here; the folder holds another run; it cannot be written.
        """
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if fresh and self.path.exists():
                self._claim()  # a run that another process trains is not moved
                self.close()
                n = 1
                while (aside := self.path.with_name(f"{self.path.name}{MOVED}{n}")).exists():
                    n += 1
                self.path.rename(aside)
            self.path.mkdir(exist_ok=True)
            self._claim()
        except OSError as e:
            raise LmplayError(f"{self.path}: this folder cannot be written: {e.strerror}") from e
        if not (self.path / RUN_FILE).exists():
            if self.checkpoints.exists():
                raise LmplayError(
                    f"{self.path} holds checkpoints of an unknown run (no {RUN_FILE}); --fresh moves it aside"
                )
            return False
        differs = self.differs(wanted)
        if differs:
            raise LmplayError(
                f"{self.path} holds another run: not the same {' and '.join(differs)}; "
                "--fresh moves it aside and starts anew"
            )
        return True

    def _claim(self) -> None:
        self._lock = open(self.path / ".lock", "w")  # noqa: SIM115 (held as long as the run)
        _lock_or_refuse(self._lock, self.path)

    def close(self) -> None:
        """Let other processes train in the folder."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def create(self, content: dict[str, Any], experiment: Experiment, tokenizer: tokenizers.Tokenizer) -> None:
        """Write what makes the run repeatable: run.json last, after the source and the tokenizer."""
        source = experiment.source.path
        copy = self.path / "experiment"
        shutil.rmtree(copy, ignore_errors=True)
        if source.name == "__init__.py":
            shutil.copytree(source.parent, copy / source.parent.name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            copy.mkdir()
            shutil.copy2(source, copy / source.name)
        (self.path / "tokenizer").mkdir(exist_ok=True)
        tokenizer.save(self.path / "tokenizer")
        write_json(self.path / RUN_FILE, content)

    def tokenizer(self) -> tokenizers.Tokenizer:
        """The tokenizer that the run was trained with.

        Raises:
            LmplayError: it is not the one that run.json names.
        """
        found = tokenizers.load(self.path / "tokenizer")
        if found.fingerprint != self.read()["identity"]["tokenizer"]:
            raise LmplayError(f"{self.path}: the tokenizer in this run is not the one it was trained with")
        return found

    def experiment(self) -> Experiment:
        """The experiment from the run's own copy of its source."""
        content = self.read()
        copies = sorted((self.path / "experiment").glob("*.py")) + sorted(
            (self.path / "experiment").glob("*/__init__.py")
        )
        if not copies:
            raise LmplayError(f"{self.path}: the copy of the experiment's source is missing")
        return load(*find(f"{copies[0]}:{content['identity']['variant']}"))

    def newest(self, say: Any) -> Checkpoint | None:
        return newest(self.checkpoints, say)


def _lock_or_refuse(file: IO[str], path: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as e:
        raise BusyError(f"{path}: another process is training this run") from e


def find_runs(root: Path) -> list[RunFolder]:
    """Every run below `root` that was not moved aside, oldest first."""
    found = [p.parent for p in root.glob(f"**/{RUN_FILE}") if MOVED not in p.parent.name]
    return [RunFolder(p) for p in sorted(found, key=lambda p: ((p / RUN_FILE).stat().st_mtime, p.name))]


def git_state(folder: Path) -> tuple[str | None, str | None]:
    """The commit that `folder` is at, and its uncommitted changes as a diff; None where there is no git.

    Untracked files appear in the diff as a list of their names.
    """

    def git(*args: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", *args], cwd=folder, capture_output=True, encoding="utf-8", errors="replace", check=False
            )
        except OSError:
            return None
        return done.stdout if done.returncode == 0 else None

    commit = git("rev-parse", "HEAD")
    if commit is None:
        return None, None
    diff = git("diff", "HEAD") or ""
    untracked = (git("ls-files", "--others", "--exclude-standard") or "").split("\n")
    return commit.strip(), diff + "".join(f"untracked: {name}\n" for name in untracked if name)
