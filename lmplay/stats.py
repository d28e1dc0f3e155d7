"""What a run writes down while it trains: append-only CSV files that everybody's tools read."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

from .errors import LmplayError

CLOCK_COLUMNS = ("seconds", "tokens_per_second")
"""Columns that depend on the clock and so differ between two otherwise equal runs."""
AXES = ("step", "tokens", "flops", "seconds")
TRAIN = (*AXES, "loss", "bpb", "accuracy", "lr", "grad_norm", "tokens_per_second")
VALIDATE = (*AXES, "loss", "bpb", "accuracy")


class Lines:
    """A file that grows by whole lines, and can be cut back to what a checkpoint knows of."""

    def __init__(self, path: Path):
        self.path = path

    @property
    def size(self) -> int:
        """Bytes written: what a checkpoint remembers, so that a resume can cut off what came after it."""
        return self.path.stat().st_size if self.path.exists() else 0

    def cut(self, size: int) -> None:
        """Drop everything after the first `size` bytes.

        Raises:
            LmplayError: there are fewer: rows are missing.
        """
        if self.size < size:
            raise LmplayError(f"{self.path}: rows are missing that the checkpoint knows of; --fresh starts anew")
        if self.size > size:
            os.truncate(self.path, size)

    def sync(self) -> None:
        """Put what was written on the disk."""
        if self.path.exists():
            with open(self.path, "rb") as file:
                os.fsync(file.fileno())

    def write(self, text: str) -> None:
        """Append whole lines.

        Raises:
            LmplayError: the disk refuses.
        """
        try:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(text)
        except OSError as e:
            raise LmplayError(f"{self.path}: it could not be written: {e.strerror}") from e


class Samples(Lines):
    """Texts that the model wrote at its validations, as JSON lines."""

    def cut(self, size: int) -> None:
        super().cut(min(size, self.size))  # a text is no result: a run whose texts were deleted goes on

    def append(self, tokens: int, text: str) -> None:
        self.write(json.dumps({"tokens": tokens, "text": text}) + "\n")


class Curve(Lines):
    """One CSV file. Extra columns are fixed by the first row."""

    def __init__(self, path: Path, columns: tuple[str, ...]):
        super().__init__(path)
        self.columns = list(columns)

    def cut(self, size: int) -> None:
        super().cut(size)
        if self.size:
            with open(self.path, encoding="utf-8") as file:
                header = file.readline().strip()
            if header:
                self.columns = header.split(",")

    def append(self, row: Mapping[str, float]) -> None:
        """Write one row, whole.

        Raises:
            LmplayError: the columns differ from the first row's, or the disk refuses.
        """
        new = self.size == 0
        if new:
            self.columns += [k for k in row if k not in self.columns]
        if set(row) != set(self.columns):
            odd = sorted(set(row) ^ set(self.columns))[0]
            raise LmplayError(
                f"{self.path}: the curve {odd} is not in every step: an experiment must log the same ones"
            )
        # repr of a float is the shortest text that reads back as the same number.
        text = ",".join(repr(row[c]) for c in self.columns) + "\n"
        self.write(",".join(self.columns) + "\n" + text if new else text)
