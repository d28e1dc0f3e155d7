"""Read local files as rows: text, JSON lines, parquet and arrow, one row at a time.

No copy of the text is made, neither in memory nor on the disk.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from ..errors import LmplayError, first_line

Row = dict[str, Any]

SUFFIXES = {
    ".parquet": "parquet",
    ".jsonl": "jsonl",
    ".json": "jsonl",
    ".txt": "text",
    ".md": "text",
    ".arrow": "arrow",
}
CHUNK = 2**20  # characters, bytes or so that are read at a time
ROWS = 256  # of a parquet file, in memory at a time


def read_rows(path: Path, kind: str, documents: str) -> Iterator[Row]:
    """Yield the rows of a file.

    Args:
        kind: text, jsonl, parquet or arrow.
        documents: what is a row of a text file: paragraphs, lines or file.

    Raises:
        LmplayError: the file cannot be read, or is damaged; the message says where.
    """
    try:
        yield from READERS[kind](path, documents)
    except LmplayError:
        raise
    except (OSError, ValueError) as e:  # pyarrow's errors are ValueErrors and OSErrors
        raise LmplayError(f"{path} could not be read: {first_line(e)}") from e


def _text(path: Path, documents: str) -> Iterator[Row]:
    """Yield {"text": ...} for each paragraph (up to a blank line), line, or the file."""
    separator = {"paragraphs": "\n\n", "lines": "\n", "file": None}[documents]
    try:
        with open(path, encoding="utf-8-sig") as file:
            if separator is None:
                yield {"text": file.read()}
                return
            for text in _split(file, separator):
                if text:
                    yield {"text": text}
    except UnicodeDecodeError as e:
        raise LmplayError(f"{path} is not UTF-8: {e.reason} (byte {e.object[e.start]:#04x})") from e


def _split(file: IO[str], separator: str) -> Iterator[str]:
    parts: list[str] = []  # of the current text, which may be long
    last = ""
    while chunk := file.read(CHUNK):
        *complete, rest = (last + chunk).split(separator)
        for text in complete:
            yield "".join(parts) + text
            parts = []
        # A separator may begin in this chunk and end in the next.
        keep = len(separator) - 1
        parts.append(rest[: len(rest) - keep])
        last = rest[len(rest) - keep :]
    yield "".join(parts) + last


def _jsonl(path: Path, documents: str) -> Iterator[Row]:
    """Yield the objects of a file with one per line, or with a list of them."""
    with open(path, "rb") as file:
        head = file.read(64).lstrip(b"\xef\xbb\xbf \t\r\n")
        file.seek(0)
        if head.startswith(b"["):
            rows = _parsed(file.read(), path, 0)
            for number, row in enumerate(rows, 1):
                yield _object(row, path, f"item {number}")
            return
        for number, line in enumerate(file, 1):
            if line.strip():
                yield _object(_parsed(line, path, number), path, f"line {number}")


def _parsed(text: bytes, path: Path, line: int) -> Any:
    """Parse a line of the file, or with 0 all of it."""
    try:
        return json.loads(text.decode("utf-8-sig"))
    except UnicodeDecodeError as e:
        raise LmplayError(f"{path}: line {line or 1} is not UTF-8: {e.reason}") from e
    except json.JSONDecodeError as e:
        raise LmplayError(f"{path}: line {line or e.lineno} is not JSON: {e.msg}") from e
    except RecursionError as e:
        raise LmplayError(f"{path}: line {line} is nested too deeply") from e


def _object(row: Any, path: Path, where: str) -> Row:
    if not isinstance(row, dict):
        raise LmplayError(f"{path}: {where} is not a JSON object with the columns as its keys")
    return row


def _parquet(path: Path, documents: str) -> Iterator[Row]:
    from pyarrow import parquet

    with parquet.ParquetFile(path) as file:
        for batch in file.iter_batches(ROWS):
            yield from batch.to_pylist()


def _arrow(path: Path, documents: str) -> Iterator[Row]:
    """Read both of arrow's formats: files, and streams as the datasets library writes them."""
    import pyarrow

    with pyarrow.memory_map(str(path)) as memory:
        try:
            batches = iter(pyarrow.ipc.open_stream(memory))
        except pyarrow.ArrowInvalid:
            memory.seek(0)
            reader = pyarrow.ipc.open_file(memory)
            batches = (reader.get_batch(i) for i in range(reader.num_record_batches))
        for batch in batches:
            for start in range(0, batch.num_rows, ROWS):
                yield from batch.slice(start, ROWS).to_pylist()


READERS: dict[str, Callable[[Path, str], Iterator[Row]]] = {
    "text": _text,
    "jsonl": _jsonl,
    "parquet": _parquet,
    "arrow": _arrow,
}
