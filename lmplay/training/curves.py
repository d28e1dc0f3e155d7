"""Curve files: append-only CSV, written while a run trains and read by anyone's tools."""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import LmplayError
from ..files import open_own, read_json, refuse_link, sync_file, write_json

if TYPE_CHECKING:
    import pandas as pd

CLOCK_COLUMNS = ("seconds", "tokens_per_second")
"""Columns that differ between two otherwise equal runs."""
AXIS_COLUMNS = ("step", "tokens", "flops", "seconds")
TRAIN = (*AXIS_COLUMNS, "loss", "bpb", "accuracy", "lr", "grad_norm", "tokens_per_second")
VALIDATE = (*AXIS_COLUMNS, "loss", "bpb", "accuracy")


DIGESTS = "digests.json"
"""Size and sha256 of a folder's curve files when they were last saved. They grow after that."""


def write_digests(files: Mapping[Path, int]) -> None:
    """Write the digests of the first bytes of files in one folder.

    Args:
        files: their sizes in bytes. A file that is not there has none.
    """
    content = {}
    for path, size in files.items():
        if path.exists():
            content[path.name] = {"size": size, "sha256": _digest(path, size)}
    folder = next(iter(files)).parent
    write_json(folder / DIGESTS, content, sealed=True)


def _digest(path: Path, size: int) -> str:
    with open(path, "rb") as file:
        return hashlib.sha256(file.read(size)).hexdigest()


def check_digest(path: Path) -> None:
    """Compare a curve file with the digest of its last saving. Older runs have none.

    Raises:
        LmplayError: they differ, or the digests cannot be read.
    """
    digests = path.with_name(DIGESTS)
    if not digests.exists():
        return
    try:
        saved = read_json(digests).get(path.name)
        if saved is None:
            return
        if path.stat().st_size < saved["size"]:
            raise LmplayError(f"{path}: it is damaged: rows are missing")
        if _digest(path, saved["size"]) != saved["sha256"]:
            raise LmplayError(f"{path}: it is damaged: its sha256 is not that of {DIGESTS}")
    except (OSError, ValueError, TypeError, KeyError) as e:
        raise LmplayError(f"{digests}: it cannot be read: {e}") from e


class AppendOnlyFile:
    """A file that grows by complete lines and can be truncated to what a checkpoint knows."""

    def __init__(self, path: Path):
        self.path = path

    @property
    def size(self) -> int:
        """Size in bytes. A checkpoint stores it, so that a resume can drop what came later."""
        return self.path.stat().st_size if self.path.exists() else 0

    def truncate(self, size: int) -> None:
        """Drop everything after the first `size` bytes.

        Raises:
            LmplayError: the file is shorter, so rows are missing.
        """
        refuse_link(self.path)
        if self.size < size:
            raise LmplayError(
                f"{self.path}: rows are missing that the checkpoint contains; --fresh starts over"
            )
        if self.size > size:
            os.truncate(self.path, size)

    def sync(self) -> None:
        """Flush the file to the disk."""
        if self.path.exists():
            sync_file(self.path)

    def write(self, text: str) -> None:
        """Append complete lines.

        Raises:
            LmplayError: the disk is full or refuses.
        """
        try:
            with open_own(self.path) as file:
                file.write(text)
        except OSError as e:
            raise LmplayError(f"{self.path}: it could not be written: {e.strerror}") from e


class Samples(AppendOnlyFile):
    """Texts that the model generated at its validations, as JSON lines."""

    def truncate(self, size: int) -> None:
        # Texts are no results: a run whose texts were deleted can continue.
        super().truncate(min(size, self.size))

    def append(self, tokens: int, text: str) -> None:
        self.write(json.dumps({"tokens": tokens, "text": text}) + "\n")


class CurveFile(AppendOnlyFile):
    """A CSV file whose columns are those of its first row."""

    def __init__(self, path: Path, columns: tuple[str, ...]):
        super().__init__(path)
        self.columns = list(columns)

    def truncate(self, size: int) -> None:
        super().truncate(size)
        if self.size:
            with open(self.path, encoding="utf-8") as file:
                header = file.readline().strip()
            if header:
                self.columns = header.split(",")

    def append(self, row: Mapping[str, float]) -> None:
        """Write one complete row.

        Raises:
            LmplayError: its columns differ from the first row's, or the disk refuses.
        """
        new = self.size == 0
        if new:
            self.columns += [k for k in row if k not in self.columns]
        if set(row) != set(self.columns):
            odd = sorted(set(row) ^ set(self.columns))[0]
            raise LmplayError(
                f"{self.path}: the curve {odd} is not in every step: "
                "an experiment must log the same ones"
            )
        # repr of a float is the shortest text that reads back as the same number.
        text = ",".join(repr(row[c]) for c in self.columns) + "\n"
        self.write(",".join(self.columns) + "\n" + text if new else text)


def read_curve(path: Path) -> pd.DataFrame:
    """Read a curve file, without a last line that is incomplete because the process was killed.

    Raises:
        LmplayError: it is empty, damaged or not CSV.
    """
    import pandas as pd

    try:
        check_digest(path)
        text = path.read_text(encoding="utf-8")
        complete = text[: text.rfind("\n") + 1]
        frame = pd.read_csv(io.StringIO(complete))
    except (OSError, ValueError, pd.errors.ParserError) as e:
        raise LmplayError(f"{path}: this curve cannot be read: {e}") from e
    if frame.empty:
        raise LmplayError(f"{path}: this curve has no rows yet")
    return frame
