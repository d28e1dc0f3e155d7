"""Prepare a plan's data: its tokenizer, and the tokens of each data set."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ..errors import LmplayError
from ..files import read_json, write_text
from ..plan import Plan
from .parts import Document, without_surrogates
from .source import Source
from .token_files import VERSION, Progress, Tokens, cache_folder, in_validation
from .tokenizers import Tokenizer, TokenizerSchema, saved_form, tokenizer_from, tokenizers


@dataclass(frozen=True)
class Prepared:
    """A plan's tokenizer, and its tokens by data set."""

    tokenizer: Tokenizer
    tokens: dict[str, Tokens]

    @property
    def fingerprint(self) -> str:
        parts = [f"{name} {t.fingerprint}" for name, t in sorted(self.tokens.items())]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class PlanTexts:
    """The documents of a plan's data sets, for training a tokenizer."""

    sources: list[Source]
    fraction: float  # share of the documents that is for validation

    @staticmethod
    def _documents(source: Source) -> Iterator[Document]:
        skipped: Counter[str] = Counter()  # reported when the text becomes tokens
        return without_surrogates(source.read(skipped), skipped)

    def every_document(self) -> Iterator[str]:
        """Yield all documents, those for validation too."""
        for source in self.sources:
            for document in self._documents(source):
                yield "".join(text for text, _ in document)

    def training_documents(self, characters: int) -> Iterator[str]:
        """Yield up to that many characters of training documents, the same share per data set."""
        for source in self.sources:
            left = characters // len(self.sources)
            for document in self._documents(source):
                if left <= 0:
                    break
                if not in_validation(document, self.fraction):
                    text = "".join(text for text, _ in document)
                    left -= len(text)
                    yield text


def prepare(plan: Plan, progress: Progress) -> Prepared:
    """Return the plan's tokenizer and tokens, from the cache or prepared now.

    Raises:
        LmplayError: a source is missing, the disk is full, or a vocabulary does not fit.
    """
    used = {name: plan.datasets[name] for name in plan.used_datasets}
    try:
        tokenizer = _tokenizer(plan, used, progress)
        tokens = {}
        for name, source in used.items():
            try:
                tokens[name] = source.tokens(name, tokenizer, plan, progress)
            except LmplayError as e:
                raise type(e)(f"data set {name}: {e}") from e
    except OSError as e:
        where = e.filename or cache_folder()
        raise LmplayError(f"preparing the data failed: {e.strerror or e} ({where})") from e
    return Prepared(tokenizer, tokens)


def vocab_size(plan: Plan, progress: Progress) -> int:
    """Return the size of the plan's vocabulary, without reading data if the plan tells it."""
    schema = plan.tokenizer
    known = tokenizers()[schema.kind].known_vocab_size(schema)
    return known if known is not None else prepare(plan, progress).tokenizer.vocab_size


def _tokenizer(plan: Plan, used: dict[str, Source], progress: Progress) -> Tokenizer:
    schema = plan.tokenizer
    kind = tokenizers()[schema.kind]
    if not kind.trained:
        return kind.from_plan(schema)
    documents = {name: source for name, source in used.items() if source.has_documents}
    if not documents:
        raise LmplayError(
            f"tokenizer {schema.kind} is made from documents, and this plan has only token files"
        )
    path = _tokenizer_file(schema, documents, plan.validation.fraction)
    try:
        found = tokenizer_from(read_json(path))
        if found.kind == schema.kind:
            return found
        progress(f"{path} is damaged; the tokenizer is trained again", None)
    except FileNotFoundError:
        pass
    except (OSError, ValueError, LmplayError) as e:
        progress(f"{path} is damaged ({e}); the tokenizer is trained again", None)
    for name, source in documents.items():
        if text := source.announcement():
            progress(f"data set {name}: {text}", None)
    progress(f"training the {schema.kind} tokenizer", 0)
    texts = PlanTexts(list(documents.values()), plan.validation.fraction)
    tokenizer = kind.train(schema, texts)
    write_text(path, json.dumps(saved_form(tokenizer), ensure_ascii=False))
    return tokenizer


def _tokenizer_file(schema: TokenizerSchema, used: dict[str, Source], fraction: float) -> Path:
    """Return where the cache keeps a trained tokenizer."""
    prints = []
    for name, source in used.items():
        try:
            prints.append(source.fingerprint)
        except LmplayError as e:
            raise LmplayError(f"data set {name}: {e}") from e
    key = json.dumps([schema.model_dump(), fraction, prints, VERSION])
    digest = hashlib.sha256(key.encode()).hexdigest()[:16]
    return cache_folder() / "tokenizers" / f"{digest}.json"
