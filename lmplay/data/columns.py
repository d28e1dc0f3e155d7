"""Rows become documents: which columns hold the text, what counts in the loss, and the labels."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar

from pydantic import (
    Field,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

from ..errors import LmplayError, did_you_mean
from ..schema import Strict
from .examples import Example, seconds_of
from .parts import Document

HEAD = 1000  # rows of which at least one must have every column


class Columns(Strict):
    """Columns that make a document: text (with title), truth (with prompt), chat messages, or a
    label (with prompt)."""

    text: str | None = None
    title: str | None = None
    prompt: str | None = None
    truth: str | None = None
    messages: str | None = None
    label: str | None = Field(None, description="what a classification has to tell of the prompt")
    time: str | None = Field(None, description="seconds since 1970, or an ISO 8601 date")
    prompt_loss: bool = Field(
        False, description="whether the loss counts prompts and what users say"
    )

    @model_serializer(mode="wrap")
    def _as_before_there_were_labels(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        content: dict[str, Any] = dump(self)
        return {k: v for k, v in content.items() if v is not None or k not in ("label", "time")}

    @model_validator(mode="after")
    def _one_form(self) -> Columns:
        forms = [x is not None for x in (self.text, self.truth, self.messages, self.label)]
        if sum(forms) != 1:
            raise ValueError(
                "columns: give one of text, truth (with prompt), messages and label (with prompt)"
            )
        if self.title and not self.text:
            raise ValueError("columns: title goes with text")
        if self.prompt and not (self.truth or self.label):
            raise ValueError("columns: prompt goes with truth or label")
        if self.label and not self.prompt:
            raise ValueError("columns: a label needs the prompt that it is of")
        if self.time and not self.label:
            raise ValueError("columns: time goes with label")
        return self


def document_of(row: Mapping[str, Any], c: Columns) -> Document:
    """Return one row as a document.

    Prompts, and messages of others than the assistant, count only with prompt_loss. A row whose
    text, truth or messages are null gives an empty document.

    Raises:
        LmplayError: a column holds something else than text, or messages are no chat.
    """
    main = c.messages or c.truth or c.label or c.text
    assert main is not None  # Columns has one of them
    if row.get(main) is None:
        return []
    if c.messages is not None:
        return _chat(row[c.messages], c)
    if c.label is not None:
        return example_of(row, c).document
    if c.truth is not None:
        question = _text(row, c.prompt)
        prompt = [(f"{question}\n\n", c.prompt_loss)] if question is not None else []
        return [*prompt, (_text(row, c.truth) or "", True)]
    text = _text(row, main)
    title = _text(row, c.title)
    return [(text or "" if title is None else f"{title}\n\n{text}", True)]


def example_of(row: Mapping[str, Any], c: Columns) -> Example:
    """Return one row as a labeled example.

    Raises:
        LmplayError: a column holds something else than text, or its time is none.
    """
    label = _text(row, c.label) or ""
    time = None if c.time is None else seconds_of(row.get(c.time))
    return Example(_text(row, c.prompt) or "", label, time)


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

    def has_text(document: Document) -> bool:
        return any(text.strip() for text, _ in document)

    return _read(rows, c, skipped, document_of, has_text)


def examples_of(
    rows: Iterable[Mapping[str, Any]], c: Columns, skipped: Counter[str]
) -> Iterator[Example]:
    """Yield rows as labeled examples, without those that lack a prompt or a label, which are
    counted in `skipped`.

    Raises:
        LmplayError: a column is missing, or does not hold what it should.
    """

    def is_complete(example: Example) -> bool:
        return bool(example.prompt.strip() and example.label.strip())

    return _read(rows, c, skipped, example_of, is_complete)


Item = TypeVar("Item")


def _read(
    rows: Iterable[Mapping[str, Any]],
    c: Columns,
    skipped: Counter[str],
    read: Callable[[Mapping[str, Any], Columns], Item],
    is_complete: Callable[[Item], bool],
) -> Iterator[Item]:
    names = (c.text, c.title, c.prompt, c.truth, c.messages, c.label, c.time)
    columns = {x for x in names if x is not None}
    keys: dict[str, None] = {}
    number = 0
    for number, row in enumerate(rows, 1):
        if number <= HEAD:
            keys |= dict.fromkeys(row)
        if number == HEAD:
            _check_columns(columns, keys)
        try:
            item = read(row, c)
        except LmplayError as e:
            raise LmplayError(f"row {number}: {e}") from e
        if is_complete(item):
            yield item
        elif columns & set(keys):
            skipped["rows without text" if c.label is None else "rows without text or label"] += 1
    if 0 < number < HEAD:
        _check_columns(columns, keys)


def _check_columns(columns: Iterable[str], keys: Iterable[str]) -> None:
    for column in sorted(columns):
        if column not in keys:
            raise LmplayError(f"there is no column {column}{did_you_mean(column, keys)}")
