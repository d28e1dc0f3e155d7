"""Labeled examples: prompts with the label to predict, each a sequence of its own.

A document of a classification is a prompt and its label. Its tokens are stored like those of other
text (:mod:`.token_files`), with a record that says where it begins and which label it has.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import LmplayError, did_you_mean
from ..ops import IGNORE
from .parts import Document, batches, without_surrogates
from .token_files import Progress, SplitWriter, Tokens, cached_tokens, encode, in_validation
from .tokenizers import Tokenizer

if TYPE_CHECKING:
    from ..plan import Plan

BETWEEN = "\n\n"  # prompt and label
NO_TIME = math.nan


@dataclass(frozen=True)
class Example:
    """A prompt and its label.

    Attributes:
        time: seconds since 1970 when the prompt ends; None if it has no time.
        known: seconds since 1970 when the label was known; None: at `time`.
    """

    prompt: str
    label: str
    time: float | None = None
    known: float | None = None

    @property
    def document(self) -> Document:
        return [(f"{self.prompt}{BETWEEN}", False), (self.label, True)]


def seconds_of(value: Any) -> float:
    """Return a time as seconds since 1970. A time without a zone is UTC.

    Args:
        value: a number of seconds, an ISO 8601 text, or a datetime.

    Raises:
        LmplayError: it is none of these.
    """
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return float(value)
    import pandas as pd

    if isinstance(value, str | datetime):
        stamp = pd.to_datetime(value, utc=True, errors="coerce")
        if not pd.isna(stamp):
            return float(stamp.timestamp())
    raise LmplayError(f"{str(value)[:40]!r} is no time: seconds since 1970 or an ISO 8601 date are")


Read = Callable[[Counter[str]], Iterator[Example]]


def tokenize_examples(
    name: str, read: Read, fingerprint: str, tokenizer: Tokenizer, plan: Plan, progress: Progress
) -> Tokens:
    """Return the examples' tokens and records, from the cache or prepared now.

    Args:
        name: the data set's name in the plan.
        read: yields the examples, and counts what it leaves out.
        fingerprint: changes when the examples do.

    Raises:
        LmplayError: a label is not the plan's, or a time is missing or not in order.
    """
    assert plan.classify is not None
    labels = plan.classify.labels
    by_time = plan.validation.split == "time"
    in_order = any(stage.stream is not None for stage in plan.steps)
    fraction = plan.validation.fraction

    def fill(writers: dict[str, SplitWriter]) -> dict[str, Any]:
        examples = _checked(read, labels, by_time or in_order, in_order)
        start = _time_of_split([e.time for e in examples(Counter())], fraction) if by_time else None
        skipped: Counter[str] = Counter()
        done = 0
        for some in _in_batches(examples(skipped), skipped):
            ids = encode([text for e in some for text, _ in e.document], tokenizer)
            for number, example in enumerate(some):
                split = _split_of(example, start, fraction)
                if split is None:
                    skipped["examples whose label was known only in the time of validation"] += 1
                    continue
                prompt, label = ids[2 * number], np.append(ids[2 * number + 1], tokenizer.eot)
                counted = np.repeat([False, True], [len(prompt), len(label)])
                time = NO_TIME if example.time is None else example.time
                known = time if example.known is None else example.known
                record = (len(prompt), labels.index(example.label), time, known)
                writers[split].write(np.append(prompt, label), counted, record)
            done += len(some)
            progress(f"tokenizing {name}", done)
        for what, count in skipped.items():
            progress(f"data set {name}: left out: {count} {what}", None)
        return {"skipped": dict(skipped)}

    key = [fingerprint, tokenizer.fingerprint, fraction, plan.validation.split, labels, in_order]
    return cached_tokens(name, key, tokenizer, fill, progress)


def _checked(
    read: Read, labels: Sequence[str], needs_time: bool, in_order: bool
) -> Callable[[Counter[str]], Iterator[Example]]:
    def examples(skipped: Counter[str]) -> Iterator[Example]:
        last = -math.inf
        for number, example in enumerate(read(skipped), 1):
            if example.label not in labels:
                raise LmplayError(
                    f"example {number}: its label {example.label!r} is not one of the plan's "
                    f"({', '.join(labels)}){did_you_mean(example.label, labels)}"
                )
            if needs_time and example.time is None:
                raise LmplayError(
                    f"example {number} has no time: name a column (columns.time), or a source "
                    "whose examples have one"
                )
            if in_order and example.time is not None:
                if example.time < last:
                    raise LmplayError(
                        f"example {number} is {last - example.time:g} s earlier than the one "
                        "before it: a stream is read in order, so sort the data by time"
                    )
                last = example.time
            yield example

    return examples


def _in_batches(examples: Iterator[Example], skipped: Counter[str]) -> Iterator[list[Example]]:
    """Yield lists of examples that are bounded in number and length; half a surrogate pair is
    replaced in them."""
    kept: list[Example] = []  # those whose documents the batch holds

    def documents() -> Iterator[Document]:
        for example in examples:
            kept.append(example)
            yield example.document

    for batch in batches(without_surrogates(documents(), skipped)):
        some = kept[: len(batch)]
        del kept[: len(batch)]
        yield [
            Example(document[0][0].removesuffix(BETWEEN), e.label, e.time, e.known)
            for e, document in zip(some, batch, strict=True)
        ]


def _time_of_split(times: Sequence[float | None], fraction: float) -> float:
    """Return the time at which the last `fraction` of the examples begins."""
    known = sorted(t for t in times if t is not None)
    return known[len(known) - max(1, round(len(known) * fraction))] if known else 0.0


def _split_of(example: Example, start: float | None, fraction: float) -> str | None:
    """Return train, val, or None for an example between the two.

    An example from before `start` whose label was known only after it would tell the training what
    happens in the time of validation.
    """
    if start is None:
        return "val" if in_validation(example.document, fraction) else "train"
    assert example.time is not None
    if example.time >= start:
        return "val"
    known = example.time if example.known is None else example.known
    return "train" if known < start else None


class Examples:
    """Sequences of one split of labeled examples: one example each, padded behind its end.

    A prompt that is too long loses its beginning.

    Args:
        as_text: targets are the label's tokens behind the prompt. Otherwise the only target is the
            label's number, at the last token of the prompt.
    """

    def __init__(self, tokens: Tokens, split: str, length: int, as_text: bool):
        self.name = tokens.name
        self.length = length
        self.as_text = as_text
        self.ids, records = (
            (tokens.train, tokens.train_records)
            if split == "train"
            else (tokens.val, tokens.val_records)
        )
        assert records is not None
        self.records = records

    def __len__(self) -> int:
        return len(self.records)

    def prompt(self, number: int) -> np.ndarray:
        """Return the ids (n,) of a prompt, as many as fit."""
        record = self.records[number]
        start = int(record["start"])
        end = start + int(record["prompt"])
        room = self.length - (int(record["label_tokens"]) - 1 if self.as_text else 0)
        return np.asarray(self.ids[max(start, end - room) : end]).astype(np.int64)

    def sequence(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Return ids and targets (T,)."""
        record = self.records[number]
        ids = np.zeros(self.length, np.int64)
        targets = np.full(self.length, IGNORE, np.int64)
        prompt = self.prompt(number)
        n = len(prompt)
        ids[:n] = prompt
        if not self.as_text:
            targets[n - 1] = record["label"]
            return ids, targets
        end = int(record["start"]) + int(record["prompt"])
        label = np.asarray(self.ids[end : end + int(record["label_tokens"])])
        ids[n : n + len(label) - 1] = label[:-1]
        targets[n - 1 : n - 1 + len(label)] = label
        return ids, targets
