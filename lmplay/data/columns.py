"""Rows become documents: which columns hold the text, and what counts in the loss."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from pydantic import Field, model_validator

from ..errors import LmplayError, did_you_mean
from ..schema import Strict
from .parts import Document

HEAD = 1000  # rows of which at least one must have every column


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

    Raises:
        LmplayError: a column holds something else than text, or messages are no chat.
    """
    main = c.messages or c.truth or c.text
    assert main is not None  # Columns has one of them
    if row.get(main) is None:
        return []
    if c.messages is not None:
        return _chat(row[c.messages], c)
    if c.truth is not None:
        question = _text(row, c.prompt)
        prompt = [(f"{question}\n\n", c.prompt_loss)] if question is not None else []
        return [*prompt, (_text(row, c.truth) or "", True)]
    text = _text(row, main)
    title = _text(row, c.title)
    return [(text or "" if title is None else f"{title}\n\n{text}", True)]


def _text(row: Mapping[str, Any], column: str | None) -> str | None:
    """Return a row's text in a column; None if it is null. A number, such as a label, is text."""
    value = None if column is None else row.get(column)
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, int | float):
        return str(value)
    if isinstance(value, bytes):
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError as e:
            raise LmplayError(f"column {column} holds bytes that are not UTF-8") from e
    kind = {"dict": "structs", "list": "lists"}.get(type(value).__name__, type(value).__name__)
    raise LmplayError(f"column {column} holds {kind} instead of text: {str(value)[:60]}")


def _chat(messages: Any, c: Columns) -> Document:
    if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
        raise LmplayError(f"column {c.messages} is no chat, which is a list of {{role, content}}")
    pieces: Document = []
    for message in messages:
        role = message.get("role")
        if not isinstance(role, str) or "content" not in message:
            raise LmplayError(
                f"column {c.messages} is no chat, which is a list of {{role, content}}: a message "
                f"has the keys {', '.join(map(str, message))}"
            )
        pieces.append((f"{role}: ", c.prompt_loss))
        answer = role == "assistant"
        pieces.append((f"{_content(message, c)}\n\n", answer or c.prompt_loss))
    return pieces


def _content(message: Mapping[str, Any], c: Columns) -> str:
    """Return a message's text: its content, or the text parts of it."""
    content = message["content"]
    if content is None:
        return ""
    parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
    texts = []
    for part in parts:
        text = part.get("text") if isinstance(part, dict) else part
        if not isinstance(text, str):
            kind = part.get("type") if isinstance(part, dict) else type(text).__name__
            raise LmplayError(f"column {c.messages} holds a message with {kind} instead of text")
        texts.append(text)
    return "".join(texts)


def documents_of(
    rows: Iterable[Mapping[str, Any]], c: Columns, skipped: Counter[str]
) -> Iterator[Document]:
    """Yield rows as documents, without empty ones, which are counted in `skipped`.

    Raises:
        LmplayError: a column is missing, or holds no text.
    """
    columns = {x for x in (c.text, c.title, c.prompt, c.truth, c.messages) if x is not None}
    keys: dict[str, None] = {}
    number = 0
    for number, row in enumerate(rows, 1):
        if number <= HEAD:
            keys |= dict.fromkeys(row)
        if number == HEAD:
            _check_columns(columns, keys)
        try:
            document = document_of(row, c)
        except LmplayError as e:
            raise LmplayError(f"row {number}: {e}") from e
        if any(text.strip() for text, _ in document):
            yield document
        elif columns & set(keys):
            skipped["rows without text"] += 1
    if 0 < number < HEAD:
        _check_columns(columns, keys)


def _check_columns(columns: Iterable[str], keys: Iterable[str]) -> None:
    for column in sorted(columns):
        if column not in keys:
            raise LmplayError(f"there is no column {column}{did_you_mean(column, keys)}")
