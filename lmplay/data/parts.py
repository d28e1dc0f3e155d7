"""Long texts in parts, for tokenizers whose time or memory grows faster than the text."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator

Document = list[tuple[str, bool]]
"""Pieces (text, counted): the loss counts only pieces that are counted."""

BATCH = 1024  # documents that are encoded together, at most
CHARACTERS = 2**18  # of them, about; a longer document is encoded in parts
LINE = 2**14  # characters without a place to part them that a tokenizer gets at most
BETWEEN_WORDS = re.compile(r"(?<=\S) (?=\S)")


def parts_of(text: str, size: int = CHARACTERS, line: int = LINE) -> list[str]:
    """Return a text in parts of about `size` characters.

    A part ends before a single blank between two other characters. There the tokens of byte-level
    BPE (GPT-2's and tiktoken's patterns) end anyway, so the ids are those of the complete text. A
    stretch of `line` characters without such a place is cut, and its ids may differ.
    """
    if len(text) <= line:
        return [text]
    parts = []
    start = 0
    last = 0  # the last place where the text may be parted
    places = (found.start() for found in BETWEEN_WORDS.finditer(text))
    for place in (*places, len(text)):
        while place - last > line:
            last += line
            parts.append(text[start:last])
            start = last
        if place - start > size:
            parts.append(text[start:place])
            start = place
        last = place
    return [*parts, text[start:]] if start < len(text) else parts


def batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Yield lists of documents that are bounded in number and, but for the last, in length."""
    batch: list[Document] = []
    length = 0
    for document in documents:
        batch.append(document)
        length += sum(len(text) for text, _ in document)
        if len(batch) == BATCH or length >= CHARACTERS:
            yield batch
            batch = []
            length = 0
    if batch:
        yield batch


def without_surrogates(documents: Iterable[Document], skipped: Counter[str]) -> Iterator[Document]:
    """Yield documents with U+FFFD for half surrogate pairs: JSON can hold them, UTF-8 cannot."""
    for document in documents:
        for number, (text, counted) in enumerate(document):
            try:
                text.encode("utf-8")
            except UnicodeEncodeError:
                fixed = re.sub("[\ud800-\udfff]", "\ufffd", text)
                document[number] = (fixed, counted)
                skipped["documents with half a surrogate pair, replaced by U+FFFD"] += 1
        yield document
