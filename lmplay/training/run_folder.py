"""The identity of a run, and its folder under gpt_out/.

The identity is everything that decides a run's numbers. A folder holds one identity: the same
command resumes the run in it, and a different run is refused.
"""

from __future__ import annotations

import dataclasses
import fcntl
import json
import re
import shutil
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from ..data import tokenizers
from ..discover import Experiment, find, load, source_digest
from ..errors import BusyError, LmplayError
from ..files import below, open_own, write_json, write_text
from ..plan import Plan
from .checkpoint import Checkpoint, newest
from .curves import read_curve
from .record import read_record
from .trust import SIGNATURE, check_source, signature

if TYPE_CHECKING:
    import pandas as pd

RUN_FILE = "run.json"
MOVED = "~"  # marks a run that --fresh moved aside


def folder_name(variant: str, overrides: Mapping[str, str], extras: list[str], seed: int) -> str:
    """Return <variant>[-<override>…]-s<seed>, with characters that every file system accepts."""
    parts = [variant, *(f"{k}={v}" for k, v in sorted(overrides.items())), *extras, f"s{seed}"]
    return "-".join(re.sub(r"[^\w.=+]", "_", part) for part in parts)


def safe_name(text: str) -> str:
    """Return a text as one name in a folder: no separator, and not one that leads upwards."""
    name = re.sub(r"[^\w.=+ -]", "_", text)
    return name if name.strip(". ") else "_" * len(name)


def identity(
    plan: Plan,
    experiment: Experiment,
    config: Any,
    seed: int,
    precision: str,
    tokenizer: str,
    data: str,
) -> dict[str, Any]:
    """Return what decides a run's numbers, as JSON."""
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
    """Create the folder for runs, if needed, with a .gitignore so that results keep a tree clean.

    Raises:
        LmplayError: it cannot be written.
    """
    try:
        if not out.exists():
            write_text(out / ".gitignore", "*\n")
    except OSError as e:
        raise LmplayError(f"{out}: this folder cannot be written: {e.strerror}") from e


class RunFolder:
    """The folder of one run. While it is claimed, no other process trains in it."""

    def __init__(self, path: Path | str):
        self.path = Path(path)
        self._lock: IO[str] | None = None

    def __repr__(self) -> str:
        return f"RunFolder({str(self.path)!r})"

    @property
    def summary(self) -> dict[str, Any]:
        """Final figures of the run; {} if it is not finished."""
        return self.read().get("summary") or {}

    def curves(self, kind: str = "validate") -> pd.DataFrame:
        """Return the curve of the validations, or with "train" of the optimizer steps.

        Raises:
            LmplayError: there is no such curve, or it has no rows yet.
        """
        return read_curve(self.path / f"{kind}.csv")

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    def read(self) -> dict[str, Any]:
        """Return run.json.

        Raises:
            LmplayError: it is missing or cannot be read.
        """
        try:
            return read_record(self.path / RUN_FILE)
        except FileNotFoundError as e:
            raise LmplayError(f"{self.path}: this is not a run: it has no {RUN_FILE}") from e
        except (OSError, ValueError) as e:
            raise LmplayError(f"{self.path / RUN_FILE}: it cannot be read: {e}") from e

    def update(self, **fields: Any) -> None:
        """Write these fields to run.json."""
        write_json(self.path / RUN_FILE, {**self.read(), **fields}, sealed=True)

    def differs(self, wanted: dict[str, Any]) -> list[str]:
        """Return the parts of its identity in which an existing run differs from `wanted`."""
        if not (self.path / RUN_FILE).exists():
            return []
        identity = self.read()["identity"]
        return [k for k in wanted if identity.get(k) != json.loads(json.dumps(wanted[k]))]

    def open(self, wanted: dict[str, Any], fresh: bool) -> bool:
        """Claim the folder for the run with the identity `wanted`; return whether it holds that run
        already.

        Args:
            fresh: move an existing run aside first.

        Raises:
            LmplayError: another process trains here, the folder holds another run, or it cannot be
                written.
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
                    f"{self.path} holds checkpoints of an unknown run (no {RUN_FILE}); --fresh "
                    "moves it aside"
                )
            return False
        differs = self.differs(wanted)
        if differs:
            raise LmplayError(
                f"{self.path} holds another run: not the same {' and '.join(differs)}; "
                "--fresh moves it aside and starts over"
            )
        return True

    def _claim(self) -> None:
        self._lock = open_own(self.path / ".lock")  # held as long as the run
        _lock_or_refuse(self._lock, self.path)

    def close(self) -> None:
        """Let other processes train in the folder."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def create(
        self, content: dict[str, Any], experiment: Experiment, tokenizer: tokenizers.Tokenizer
    ) -> None:
        """Write what makes the run repeatable: the source, the tokenizer, and run.json last."""
        source = experiment.source.path
        copy = self.path / "experiment"
        shutil.rmtree(copy, ignore_errors=True)
        if source.name == "__init__.py":
            shutil.copytree(
                source.parent,
                copy / source.parent.name,
                ignore=shutil.ignore_patterns("__pycache__"),
            )
        else:
            copy.mkdir()
            shutil.copy2(source, copy / source.name)
        (self.path / "tokenizer").mkdir(exist_ok=True)
        tokenizer.save(self.path / "tokenizer")
        signed = {SIGNATURE: signature(source_digest(source))}
        write_json(self.path / RUN_FILE, content | signed, sealed=True)

    def tokenizer(self) -> tokenizers.Tokenizer:
        """Return the tokenizer that the run was trained with.

        Raises:
            LmplayError: it is not the one that run.json names.
        """
        found = tokenizers.load(self.path / "tokenizer")
        if not found.is_known_as(str(self.read()["identity"].get("tokenizer"))):
            raise LmplayError(
                f"{self.path}: the tokenizer in this run is not the one it was trained with"
            )
        return found

    def experiment(self, trust: bool = False) -> Experiment:
        """Return the experiment from the run's own copy of its source, which is executed.

        Args:
            trust: the user has allowed it, although the source is from elsewhere.

        Raises:
            LmplayError: the copy is missing, is not what was trained, or is not trusted.
        """
        content = self.read()
        copies = sorted((self.path / "experiment").glob("*.py")) + sorted(
            (self.path / "experiment").glob("*/__init__.py")
        )
        if not copies:
            raise LmplayError(f"{self.path}: the copy of the experiment's source is missing")
        check_source(copies[0], source_digest(copies[0]), content, trust)
        return load(*find(f"{copies[0]}:{content['identity']['variant']}"))

    def newest(
        self,
        say: Callable[[str], None],
        check: Callable[[dict[str, Any]], None] | None = None,
    ) -> Checkpoint | None:
        """Return the newest valid checkpoint, or None.

        Args:
            check: raises ValueError for a state that cannot be used.
        """
        return newest(self.checkpoints, say, check)


def _lock_or_refuse(file: IO[str], path: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as e:
        raise BusyError(f"{path}: another process is training this run") from e


def find_runs(root: Path) -> list[RunFolder]:
    """Return every run below `root` that was not moved aside, oldest first."""
    found = [p.parent for p in below(root, RUN_FILE) if MOVED not in p.parent.name]
    return [
        RunFolder(p) for p in sorted(found, key=lambda p: ((p / RUN_FILE).stat().st_mtime, p.name))
    ]


def git_state(folder: Path) -> tuple[str | None, str | None]:
    """Return the commit of `folder` and its uncommitted changes as a diff; None without git.

    The diff ends with the names of untracked files.
    """

    def git(*args: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", *args],
                cwd=folder,
                capture_output=True,
                encoding="utf-8",
                errors="replace",
                check=False,
            )
        except OSError:
            return None
        return done.stdout if done.returncode == 0 else None

    commit = git("rev-parse", "HEAD")
    if commit is None:
        return None, None
    # The user's own settings (colors, an external diff, other prefixes) would make it no patch.
    plain = ("--no-color", "--no-ext-diff", "--no-textconv", "--binary", "--no-relative")
    diff = git("diff", *plain, "--src-prefix=a/", "--dst-prefix=b/", "HEAD") or ""
    untracked = (git("ls-files", "--others", "--exclude-standard") or "").split("\n")
    return commit.strip(), diff + "".join(f"untracked: {name}\n" for name in untracked if name)
