"""From documents to token files: once per source and tokenizer, memory-mapped afterwards.

A prepared folder holds train.bin and val.bin (token ids one after another, documents ended by end-of-text),
masks beside them where some tokens are not counted, and manifest.json. It is made under a temporary name
and renamed when it is whole: an interrupted preparation leaves nothing that looks finished.
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
from ..files import write_text
from ..plan import (
    BinsSource,
    BpeTokenizer,
    BytesTokenizer,
    CharsTokenizer,
    MarketSource,
    MarketTokenizer,
    Plan,
    TiktokenTokenizer,
)
from ..tokenizers import Bytes, Chars, Tiktoken, Tokenizer, from_state, train_bpe
from .sources import Document, Source, open_source

VERSION = 1  # of the folder's form: a new one makes old folders be prepared again
Progress = Callable[[str, int], None]  # (what, how many documents so far)


def cache_folder() -> Path:
    """Where prepared tokens are kept: $LMP_CACHE, or lmplay in the user's cache folder."""
    if os.environ.get("LMP_CACHE"):
        return Path(os.environ["LMP_CACHE"]).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lmplay"


@dataclass(frozen=True)
class Tokens:
    """One data set's tokens. `train` and `val` are (n,) memory maps; a mask is 1 where a token is counted."""

    name: str
    train: np.ndarray
    val: np.ndarray
    train_mask: np.ndarray | None
    val_mask: np.ndarray | None
    fingerprint: str  # of the content, both splits


@dataclass(frozen=True)
class Prepared:
    """All that a plan's data sets give: the tokenizer, and tokens by data set."""

    tokenizer: Tokenizer
    tokens: dict[str, Tokens]

    @property
    def fingerprint(self) -> str:
        parts = [f"{name} {t.fingerprint}" for name, t in sorted(self.tokens.items())]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def in_validation(document: Document, fraction: float) -> bool:
    """Whether a document belongs to validation: by its content alone, so copies stay together."""
    digest = hashlib.blake2b("".join(text for text, _ in document).encode("utf-8", "replace"), digest_size=8)
    return int.from_bytes(digest.digest(), "big") < fraction * 2**64


def prepare(plan: Plan, progress: Progress) -> Prepared:
    """The plan's tokenizer and tokens, made now or found in the cache.

    Raises:
        LmplayError: a source is missing, a disk is full, a vocabulary does not fit.
    """
    specs = {name: plan.datasets[name] for name in plan.used_datasets}
    sources = {name: open_source(name, s) for name, s in specs.items() if not isinstance(s, BinsSource | MarketSource)}
    fraction = plan.validation.fraction
    try:
        tokenizer = _tokenizer(plan.tokenizer, list(sources.values()), fraction, progress)
        tokens = {}
        for name, spec in specs.items():
            if isinstance(spec, BinsSource):
                tokens[name] = open_bins(name, spec, tokenizer)
            elif isinstance(spec, MarketSource):
                from ..market.data import prepare_market  # it writes by this module

                tokens[name] = prepare_market(name, spec, tokenizer, plan, progress)
            else:
                tokens[name] = tokenize(sources[name], tokenizer, fraction, progress)
    except OSError as e:
        raise LmplayError(f"preparing the data failed: {e.strerror or e} ({e.filename or cache_folder()})") from e
    return Prepared(tokenizer, tokens)


def vocab_size(plan: Plan, progress: Progress) -> int:
    """How many ids the plan's tokenizer has, without its data where that can be told beforehand."""
    if isinstance(plan.tokenizer, BpeTokenizer):
        return plan.tokenizer.vocab_size
    if isinstance(plan.tokenizer, CharsTokenizer):
        return prepare(plan, progress).tokenizer.vocab_size
    return _tokenizer(plan.tokenizer, [], plan.validation.fraction, progress).vocab_size


def _tokenizer(
    spec: BytesTokenizer | CharsTokenizer | TiktokenTokenizer | BpeTokenizer | MarketTokenizer,
    sources: list[Source],
    fraction: float,
    progress: Progress,
) -> Tokenizer:
    if isinstance(spec, BytesTokenizer):
        return Bytes()
    if isinstance(spec, TiktokenTokenizer):
        return Tiktoken(spec.name)
    if isinstance(spec, MarketTokenizer):
        return from_state(spec.model_dump())
    if not sources:
        raise LmplayError(f"tokenizer {spec.kind} is made from documents, and this plan has none but token files")
    key = json.dumps([spec.model_dump(), fraction, [s.fingerprint for s in sources], VERSION])
    path = cache_folder() / "tokenizers" / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"
    try:
        return from_state(json.loads(path.read_text(encoding="utf-8")))
    except (FileNotFoundError, ValueError, KeyError):  # not there yet, or damaged: it is made again
        pass
    progress(f"training the {spec.kind} tokenizer", 0)
    tokenizer: Tokenizer
    if isinstance(spec, CharsTokenizer):
        # Of validation documents too: a character without a token could not be counted in bits per byte.
        tokenizer = Chars("".join({c for s in sources for d in s.documents() for text, _ in d for c in text}))
    else:
        tokenizer = train_bpe(_training_texts(sources, fraction, spec.train_characters), spec.vocab_size)
    write_text(path, json.dumps(tokenizer.state(), ensure_ascii=False))
    return tokenizer


def _training_texts(sources: list[Source], fraction: float, characters: int) -> Iterator[str]:
    """Training documents of all sources, an equal share of characters from each."""
    for source in sources:
        left = characters // len(sources)
        for document in source.documents():
            if left <= 0:
                break
            if not in_validation(document, fraction):
                text = "".join(text for text, _ in document)
                left -= len(text)
                yield text


class SplitWriter:
    """Writes one split's tokens and, once a token is not counted, its mask."""

    def __init__(self, folder: Path, split: str, dtype: type):
        self.path, self.mask_path, self.dtype = folder / f"{split}.bin", folder / f"{split}.mask", dtype
        self.file: BinaryIO = open(self.path, "wb")  # noqa: SIM115 (open as long as the writer)
        self.mask: BinaryIO | None = None
        self.digest = hashlib.sha256()
        self.tokens = self.documents = 0

    def write(self, ids: np.ndarray, counted: np.ndarray) -> None:
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
        for file in (self.file, self.mask):
            if file is not None:
                file.flush()
                os.fsync(file.fileno())
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


def tokenize(source: Source, tokenizer: Tokenizer, fraction: float, progress: Progress) -> Tokens:
    """The source's tokens from the cache, prepared first where they are not there."""

    def fill(writers: dict[str, SplitWriter]) -> None:
        done = 0
        for documents in _batches(source.documents()):
            encoded = iter(tokenizer.encode_batch([text for d in documents for text, _ in d]))
            for document in documents:
                ids = [next(encoded) for _ in document]
                counted = [np.full(len(i), c) for i, (_, c) in zip(ids, document, strict=True)]
                writer = writers["val" if in_validation(document, fraction) else "train"]
                writer.write(np.append(np.concatenate(ids), tokenizer.eot), np.append(np.concatenate(counted), True))
            done += len(documents)
            progress(f"tokenizing {source.name}", done)

    return prepared(source.name, [source.fingerprint, tokenizer.fingerprint, fraction], tokenizer, fill)


def prepared(
    name: str, key: list[Any], tokenizer: Tokenizer, fill: Callable[[dict[str, SplitWriter]], dict[str, Any] | None]
) -> Tokens:
    """The folder of the cache that `key` stands for; `fill` writes both splits where it is not there.

    What `fill` returns is kept in the manifest.
    """
    text = json.dumps([*key, VERSION])
    folder = cache_folder() / "tokens" / hashlib.sha256(text.encode()).hexdigest()[:16]
    found = _open(name, folder)
    if found is not None:
        return found
    dtype = np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        writers = {split: SplitWriter(temporary, split, dtype) for split in ("train", "val")}
        extra = fill(writers)
        manifest = {
            "version": VERSION, "source": key[0], "tokenizer": tokenizer.fingerprint,
            "dtype": np.dtype(dtype).name, **{split: writer.close() for split, writer in writers.items()},
            **(extra or {}),
        }  # fmt: skip
        (temporary / "manifest.json").write_text(json.dumps(manifest, indent=2))
        if (faster := _open(name, folder)) is not None:  # of another process, which may read it already
            return faster
        shutil.rmtree(folder, ignore_errors=True)  # it does not fit its manifest
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    made = _open(name, folder)
    if made is None:
        raise LmplayError(f"data set {name}: what was just written to {folder} cannot be read back")
    return made


def _open(name: str, folder: Path) -> Tokens | None:
    """The prepared folder, or None where it is missing or its files do not have the sizes of its manifest."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
    except (OSError, ValueError):
        return None
    arrays: dict[str, np.ndarray | None] = {}
    for split in ("train", "val"):
        for suffix, dtype in (("bin", np.dtype(manifest["dtype"])), ("mask", np.dtype(np.uint8))):
            path, count = folder / f"{split}.{suffix}", manifest[split]["tokens"]
            if suffix == "mask" and not manifest[split]["mask"]:
                arrays[f"{split}.mask"] = None
            elif not path.is_file() or path.stat().st_size != count * dtype.itemsize:
                return None
            else:
                empty = np.empty(0, dtype)
                arrays[f"{split}.{suffix}"] = np.memmap(path, dtype, "r") if count else empty
    fingerprint = hashlib.sha256((manifest["train"]["sha256"] + manifest["val"]["sha256"]).encode()).hexdigest()
    train, val = arrays["train.bin"], arrays["val.bin"]
    assert train is not None
    assert val is not None
    return Tokens(name, train, val, arrays["train.mask"], arrays["val.mask"], fingerprint[:16])


def open_bins(name: str, spec: BinsSource, tokenizer: Tokenizer) -> Tokens:
    """A user's own train.bin and val.bin, in place.

    Raises:
        LmplayError: a file is missing or odd in size, or holds ids that the plan's tokenizer does not have.
    """
    folder, dtype, arrays = Path(spec.path), np.dtype(spec.dtype), []
    digest = hashlib.sha256()
    for split in ("train", "val"):
        path = folder / f"{split}.bin"
        if not path.is_file():
            raise LmplayError(f"data set {name}: there is no {path}")
        if path.stat().st_size == 0 or path.stat().st_size % dtype.itemsize:
            raise LmplayError(f"data set {name}: {path} is empty or no whole number of {spec.dtype}")
        array = np.memmap(path, dtype, "r")
        for start in range(0, len(array), 2**24):
            part = array[start : start + 2**24]
            digest.update(part.tobytes())
            if int(part.max()) >= tokenizer.vocab_size:
                raise LmplayError(
                    f"data set {name}: {path} holds the id {int(part.max())}, but the plan's "
                    f"{tokenizer.kind} tokenizer has {tokenizer.vocab_size}: the vocabulary does not match"
                )
        arrays.append(array)
    return Tokens(name, arrays[0], arrays[1], None, None, digest.hexdigest()[:16])
