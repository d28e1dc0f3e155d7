"""Token files: documents become token ids once per source and tokenizer, then memory maps.

A folder of the cache holds train.bin and val.bin (token ids one after another, each document ended
by end-of-text), a mask next to each if some tokens do not count in the loss, and manifest.json.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ..errors import LmplayError
from ..files import atomic_folder
from .tokenizers import Tokenizer

Document = list[tuple[str, bool]]
"""Pieces (text, counted): the loss counts only pieces that are counted."""

VERSION = 1  # of the format; a new version prepares old folders again
Progress = Callable[[str, int], None]  # (what is being done, documents so far)


def cache_folder() -> Path:
    """Return $LMP_CACHE, or lmplay in the user's cache folder."""
    if os.environ.get("LMP_CACHE"):
        return Path(os.environ["LMP_CACHE"]).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lmplay"


@dataclass(frozen=True)
class Tokens:
    """Tokens of one data set.

    train, val: (n,) memory maps of token ids.
    train_mask, val_mask: (n,) 1 where a token counts in the loss; None if all count.
    fingerprint: digest of the content of both splits.
    """

    name: str
    train: np.ndarray
    val: np.ndarray
    train_mask: np.ndarray | None
    val_mask: np.ndarray | None
    fingerprint: str


def in_validation(document: Document, fraction: float) -> bool:
    """Return whether a document is for validation.

    The content decides, so copies of a document are in the same split.
    """
    text = "".join(text for text, _ in document).encode("utf-8", "replace")
    digest = hashlib.blake2b(text, digest_size=8).digest()
    return int.from_bytes(digest, "big") < fraction * 2**64


class SplitWriter:
    """Writes the tokens of one split and, from the first token that does not count, a mask."""

    def __init__(self, folder: Path, split: str, dtype: type):
        self.path = folder / f"{split}.bin"
        self.mask_path = folder / f"{split}.mask"
        self.dtype = dtype
        self.file: BinaryIO = open(self.path, "wb")  # noqa: SIM115 (open as long as the writer)
        self.mask: BinaryIO | None = None
        self.digest = hashlib.sha256()
        self.tokens = 0
        self.documents = 0

    def write(self, ids: np.ndarray, counted: np.ndarray) -> None:
        """Append one document: ids (n,) and whether each counts in the loss, (n,) bool."""
        data = ids.astype(self.dtype).tobytes()
        self.file.write(data)
        self.digest.update(data)
        if self.mask is None and not counted.all():
            self.mask = open(self.mask_path, "wb")  # noqa: SIM115
            self.mask.write(b"\1" * self.tokens)
        if self.mask is not None:
            data = counted.astype(np.uint8).tobytes()
            self.mask.write(data)
            self.digest.update(data)
        self.tokens += len(ids)
        self.documents += 1

    def close(self) -> dict[str, Any]:
        """Close the files; return the split's entry in the manifest."""
        for file in (self.file, self.mask):
            if file is not None:
                file.close()
        return {
            "tokens": self.tokens,
            "documents": self.documents,
            "sha256": self.digest.hexdigest(),
            "mask": self.mask is not None,
        }


def _batches(documents: Iterable[Document], size: int = 1024) -> Iterator[list[Document]]:
    iterator = iter(documents)
    while batch := list(islice(iterator, size)):
        yield batch


def tokenize(
    name: str,
    documents: Callable[[], Iterator[Document]],
    fingerprint: str,
    tokenizer: Tokenizer,
    fraction: float,
    progress: Progress,
) -> Tokens:
    """Return the documents' tokens, from the cache or prepared now.

    Args:
        name: the data set's name in the plan.
        fingerprint: changes when the documents do.
        fraction: share of the documents that is for validation.
    """

    def fill(writers: dict[str, SplitWriter]) -> None:
        done = 0
        for batch in _batches(documents()):
            encoded = iter(tokenizer.encode_batch([text for d in batch for text, _ in d]))
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

    return cached_tokens(name, [fingerprint, tokenizer.fingerprint, fraction], tokenizer, fill)


def cached_tokens(
    name: str,
    key: list[Any],
    tokenizer: Tokenizer,
    fill: Callable[[dict[str, SplitWriter]], dict[str, Any] | None],
) -> Tokens:
    """Return the tokens that the cache keeps under `key`; `fill` writes both splits if needed.

    The manifest keeps what `fill` returns.
    """
    text = json.dumps([*key, VERSION])
    folder = cache_folder() / "tokens" / hashlib.sha256(text.encode()).hexdigest()[:16]
    found = _open(name, folder)
    if found is not None:
        return found
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
            **(extra or {}),
        }
        (temporary / "manifest.json").write_text(json.dumps(manifest, indent=2))
        found = _open(name, folder)
        if found is not None:  # another process was faster, and others may read its files
            shutil.rmtree(temporary)
            return found
    made = _open(name, folder)
    if made is None:
        raise LmplayError(f"what was just written to {folder} cannot be read back")
    return made


def _open(name: str, folder: Path) -> Tokens | None:
    """Return the folder's tokens; None if it is missing or its sizes differ from its manifest."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
    except (OSError, ValueError):
        return None
    arrays: dict[str, np.ndarray | None] = {}
    for split in ("train", "val"):
        for suffix, dtype in (("bin", np.dtype(manifest["dtype"])), ("mask", np.dtype(np.uint8))):
            path = folder / f"{split}.{suffix}"
            count = manifest[split]["tokens"]
            if suffix == "mask" and not manifest[split]["mask"]:
                arrays[f"{split}.mask"] = None
            elif not path.is_file() or path.stat().st_size != count * dtype.itemsize:
                return None
            else:
                empty = np.empty(0, dtype)
                arrays[f"{split}.{suffix}"] = np.memmap(path, dtype, "r") if count else empty
    both = manifest["train"]["sha256"] + manifest["val"]["sha256"]
    fingerprint = hashlib.sha256(both.encode()).hexdigest()[:16]
    train = arrays["train.bin"]
    val = arrays["val.bin"]
    assert train is not None
    assert val is not None
    return Tokens(name, train, val, arrays["train.mask"], arrays["val.mask"], fingerprint)
