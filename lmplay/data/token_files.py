"""Token files: documents become token ids once per source and tokenizer, then memory maps.

A folder of the cache holds train.bin and val.bin (token ids one after another, each document ended
by end-of-text), a mask next to each if some tokens do not count in the loss, the records of labeled
documents, and manifest.json.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from ..errors import LmplayError
from ..files import atomic_folder, read_json
from .parts import Document, batches, parts_of, without_surrogates
from .tokenizers import Tokenizer

VERSION = 2  # of the format; a new version prepares old folders again
Progress = Callable[[str, int | None], None]
"""Called with what is being done and the documents so far; with None: a line that stays."""


def cache_folder() -> Path:
    """Return $LMP_CACHE, or lmplay in the user's cache folder."""
    if os.environ.get("LMP_CACHE"):
        return Path(os.environ["LMP_CACHE"]).expanduser()
    if os.environ.get("XDG_CACHE_HOME"):
        return Path(os.environ["XDG_CACHE_HOME"]) / "lmplay"
    try:
        return Path.home() / ".cache" / "lmplay"
    except RuntimeError as e:
        raise LmplayError(
            "there is no home folder for prepared data: set LMP_CACHE to a folder that can be "
            "written"
        ) from e


RECORD = np.dtype(
    [
        ("start", np.int64),  # its first token in the file
        ("prompt", np.int32),  # tokens
        ("label_tokens", np.int32),  # tokens behind the prompt, with the end of text
        ("label", np.int32),  # its number in the plan
        ("time", np.float64),  # seconds since 1970; NaN if it has none
        ("known", np.float64),  # when the label was known
    ]
)
"""What is kept of a labeled document."""


@dataclass(frozen=True)
class Tokens:
    """Tokens of one data set.

    train, val: (n,) memory maps of token ids.
    train_mask, val_mask: (n,) 1 where a token counts in the loss; None if all count.
    fingerprint: digest of the content of both splits.
    documents: number of documents of each split; empty if unknown.
    train_records, val_records: (documents,) RECORD of labeled documents; else None.
    """

    name: str
    train: np.ndarray
    val: np.ndarray
    train_mask: np.ndarray | None
    val_mask: np.ndarray | None
    fingerprint: str
    documents: Mapping[str, int] = field(default_factory=dict)
    train_records: np.ndarray | None = None
    val_records: np.ndarray | None = None


def in_validation(document: Document, fraction: float) -> bool:
    """Return whether a document is for validation.

    The content decides, so copies of a document are in the same split.
    """
    text = "".join(text for text, _ in document).encode("utf-8", "replace")
    digest = hashlib.blake2b(text, digest_size=8).digest()
    return int.from_bytes(digest, "big") < fraction * 2**64


class SplitWriter:
    """Writes the tokens of one split, from the first token that does not count a mask, and the
    records of labeled documents."""

    def __init__(self, folder: Path, split: str, dtype: type):
        self.path = folder / f"{split}.bin"
        self.mask_path = folder / f"{split}.mask"
        self.records_path = folder / f"{split}.records"
        self.dtype = dtype
        self.file: BinaryIO = open(self.path, "wb")  # noqa: SIM115 (open as long as the writer)
        self.mask: BinaryIO | None = None
        self.records: BinaryIO | None = None
        self.digest = hashlib.sha256()  # of the content: ids and mask of one document after another
        self.file_digests = {self.path.name: hashlib.sha256()}
        self.tokens = 0
        self.documents = 0

    def write(
        self,
        ids: np.ndarray,
        counted: np.ndarray,
        labeled: tuple[int, int, float, float] | None = None,
    ) -> None:
        """Append one document: ids (n,) and whether each counts in the loss, (n,) bool.

        Args:
            labeled: how many of the tokens are the prompt, the label's number, the time, and when
                the label was known.
        """
        if labeled is not None:
            self._write_record(len(ids), *labeled)
        data = ids.astype(self.dtype).tobytes()
        self.file.write(data)
        self.digest.update(data)
        self.file_digests[self.path.name].update(data)
        if self.mask is None and not counted.all():
            self.mask = open(self.mask_path, "wb")  # noqa: SIM115
            self.file_digests[self.mask_path.name] = hashlib.sha256()
            self._write_mask(b"\1" * self.tokens)
        if self.mask is not None:
            data = counted.astype(np.uint8).tobytes()
            self._write_mask(data)
            self.digest.update(data)
        self.tokens += len(ids)
        self.documents += 1

    def _write_record(self, size: int, prompt: int, label: int, time: float, known: float) -> None:
        if self.records is None:
            self.records = open(self.records_path, "wb")  # noqa: SIM115
            self.file_digests[self.records_path.name] = hashlib.sha256()
        entry = (self.tokens, prompt, size - prompt, label, time, known)
        record = np.array([entry], RECORD).tobytes()
        self.records.write(record)
        self.digest.update(record)
        self.file_digests[self.records_path.name].update(record)

    def _write_mask(self, data: bytes) -> None:
        assert self.mask is not None
        self.mask.write(data)
        self.file_digests[self.mask_path.name].update(data)

    def close(self) -> dict[str, Any]:
        """Close the files; return the split's entry in the manifest."""
        for file in (self.file, self.mask, self.records):
            if file is not None:
                file.close()
        return {
            "tokens": self.tokens,
            "documents": self.documents,
            "sha256": self.digest.hexdigest(),
            "files": {name: digest.hexdigest() for name, digest in self.file_digests.items()},
        }


def encode(texts: Sequence[str], tokenizer: Tokenizer) -> list[np.ndarray]:
    """Return the ids of each text; long texts are encoded in parts."""
    parts = [parts_of(text) for text in texts]
    encoded = iter(tokenizer.encode_batch([part for of_text in parts for part in of_text]))
    joined = []
    for of_text in parts:
        ids = [next(encoded) for _ in of_text]
        joined.append(ids[0] if len(ids) == 1 else np.concatenate(ids))
    return joined


def tokenize(
    name: str,
    read: Callable[[Counter[str]], Iterator[Document]],
    fingerprint: str,
    tokenizer: Tokenizer,
    fraction: float,
    progress: Progress,
) -> Tokens:
    """Return the documents' tokens, from the cache or prepared now.

    Args:
        name: the data set's name in the plan.
        read: yields the documents, and counts what it leaves out.
        fingerprint: changes when the documents do.
        fraction: share of the documents that is for validation.
    """

    def fill(writers: dict[str, SplitWriter]) -> dict[str, Any]:
        done = 0
        skipped: Counter[str] = Counter()
        for batch in batches(without_surrogates(read(skipped), skipped)):
            encoded = iter(encode([text for d in batch for text, _ in d], tokenizer))
            for document in batch:
                ids = [next(encoded) for _ in document]
                counted = [np.full(len(i), c) for i, (_, c) in zip(ids, document, strict=True)]
                writer = writers["val" if in_validation(document, fraction) else "train"]
                writer.write(
                    np.append(np.concatenate(ids), tokenizer.eot),
                    np.append(np.concatenate(counted), True),
                )
            done += len(batch)
            progress(f"tokenizing {name}", done)
        for what, count in skipped.items():
            progress(f"data set {name}: left out: {count} {what}", None)
        return {"skipped": dict(skipped)}

    key = [fingerprint, tokenizer.fingerprint, fraction]
    return cached_tokens(name, key, tokenizer, fill, progress)


def cached_tokens(
    name: str,
    key: list[Any],
    tokenizer: Tokenizer,
    fill: Callable[[dict[str, SplitWriter]], dict[str, Any]],
    progress: Progress,
) -> Tokens:
    """Return the tokens that the cache keeps under `key`; `fill` writes both splits if needed.

    The manifest keeps what `fill` returns. Files are compared with the manifest's digests whenever
    they are opened; damaged ones are prepared again.
    """
    text = json.dumps([*key, VERSION])
    folder = cache_folder() / "tokens" / hashlib.sha256(text.encode()).hexdigest()[:16]
    if folder.exists():
        try:
            return _open(name, folder)
        except DamagedError as e:
            progress(f"{e}; {name} is prepared again", None)
    dtype = np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32
    with atomic_folder(folder, replace=True) as temporary:
        writers = {split: SplitWriter(temporary, split, dtype) for split in ("train", "val")}
        extra = fill(writers)
        manifest = {
            "version": VERSION,
            "source": key[0],
            "tokenizer": tokenizer.fingerprint,
            "dtype": np.dtype(dtype).name,
            **{split: writer.close() for split, writer in writers.items()},
            **extra,
        }
        (temporary / "manifest.json").write_text(json.dumps(manifest, indent=2))
        with suppress(DamagedError):  # another process was faster, and others may read its files
            found = _open(name, folder)
            shutil.rmtree(temporary)
            return found
    return _open(name, folder)


class DamagedError(LmplayError):
    """Prepared tokens are not what was written."""


class _Split(BaseModel):
    """A split in the manifest."""

    model_config = ConfigDict(strict=True)
    tokens: int = Field(ge=0)
    documents: int = Field(ge=0)
    sha256: str
    files: dict[str, str]


class _Manifest(BaseModel):
    """The parts of manifest.json that are read back."""

    model_config = ConfigDict(strict=True)
    dtype: Literal["uint16", "uint32"]
    train: _Split
    val: _Split


def _open(name: str, folder: Path) -> Tokens:
    """Return the folder's tokens.

    Raises:
        DamagedError: a file is missing, or is not what the manifest says.
    """
    path = folder / "manifest.json"
    try:
        manifest = _Manifest.model_validate(read_json(path))
    except (OSError, ValueError) as e:  # pydantic's errors are ValueErrors
        raise DamagedError(f"{path} is missing or damaged") from e
    arrays: dict[str, np.ndarray] = {}
    documents = {}
    for split, entry in (("train", manifest.train), ("val", manifest.val)):
        documents[split] = entry.documents
        if f"{split}.bin" not in entry.files:
            raise DamagedError(f"{path} is damaged: it does not list {split}.bin")
        for file, digest in entry.files.items():
            kinds = {
                f"{split}.bin": (np.dtype(manifest.dtype), entry.tokens),
                f"{split}.mask": (np.dtype(np.uint8), entry.tokens),
                f"{split}.records": (RECORD, entry.documents),
            }
            if file not in kinds:
                raise DamagedError(f"{path} is damaged: it lists {file}")
            arrays[file] = _verified(folder / file, *kinds[file], digest)
    both = manifest.train.sha256 + manifest.val.sha256
    return Tokens(
        name,
        arrays["train.bin"],
        arrays["val.bin"],
        arrays.get("train.mask"),
        arrays.get("val.mask"),
        hashlib.sha256(both.encode()).hexdigest()[:16],
        documents,
        arrays.get("train.records"),
        arrays.get("val.records"),
    )


def _verified(path: Path, dtype: np.dtype, count: int, digest: str) -> np.ndarray:
    """Return the memory map of a file after comparing every byte with its digest."""
    try:
        if path.stat().st_size != count * dtype.itemsize:
            raise DamagedError(f"{path} is damaged (its size differs)")
        with open(path, "rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != digest:
                raise DamagedError(f"{path} is damaged (its sha256 differs)")
        return np.memmap(path, dtype, "r") if count else np.empty(0, dtype)
    except OSError as e:
        raise DamagedError(f"{path} cannot be read: {e.strerror or e}") from e
