"""A plan's market data: its sessions, and their messages as packed tokens.

Of each session the last part is held out. Both parts are cut into samples of a sink token and as many whole messages
as fit; the sink is never a target. What the records had wrong, and what was dropped or clipped, is counted by field in
the manifest beside the tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ..data.shards import Progress, SplitWriter, Tokens, prepared
from ..errors import LmplayError, nearest
from ..plan import MarketSource, Plan
from ..tokenizers import Tokenizer
from . import bitstamp, itch, lobster, zero_intelligence
from .events import Event, Market, Message
from .messages import SINK, MessageError, Messages
from .sessions import Errors, Findings, Session, replay

CHUNK = 50_000  # messages that are encoded at a time


def open_sessions(spec: MarketSource, tickers: tuple[str, ...]) -> list[Session]:
    """The sessions that a data set describes.

    Raises:
        LmplayError: a package or a file is missing, or a ticker is none of `tickers`.
    """
    if spec.data == "generator":
        found = [zero_intelligence.session(spec.seed, spec.seconds, ticker=tickers[0])]
    elif spec.data == "bitstamp":
        found = [bitstamp.session()]
    elif spec.data == "lobster":
        found = lobster.sessions(Path(spec.path or ""), spec.tick)
    else:
        found = itch.sessions(Path(spec.path or ""), tickers, spec.tick)
    for session in found:
        if session.ticker not in tickers:
            hint = nearest(session.ticker, tickers)
            raise LmplayError(f"{session.name}: the ticker {session.ticker} is none of the tokenizer's{hint}")
    return found


def fingerprint(spec: MarketSource) -> list[Any]:
    """Changes when what the data set would give changes, as far as can be told without reading it all."""
    if spec.data == "bitstamp":
        return ["bitstamp", bitstamp.fingerprint(), bitstamp.LOT]
    path = Path(spec.path) if spec.path else None
    files = [] if path is None else [path] if path.is_file() else sorted(path.glob("*.csv"))
    stats = [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in files if p.is_file()]
    return [spec.model_dump(mode="json", exclude={"path"}), stats]


def prepare_market(name: str, spec: MarketSource, tokenizer: Tokenizer, plan: Plan, progress: Progress) -> Tokens:
    """The data set's tokens from the cache, prepared first where they are not there.

    Raises:
        LmplayError: a record is wrong and errors are not skipped, or there are too few messages for a sample.
    """
    assert isinstance(tokenizer, Messages)
    fraction, length = plan.validation.fraction, plan.model.max_len or 0
    per_sample = (length - 1) // tokenizer.width

    def fill(writers: dict[str, SplitWriter]) -> dict[str, Any]:
        told: dict[str, Any] = {}
        for session in open_sessions(spec, tokenizer.tickers):
            findings = Findings(session.name, spec.errors)
            chunks = list(_encoded(session, findings, tokenizer, lambda n: progress(f"reading {session.name}", n)))  # noqa: B023
            ids = np.concatenate(chunks) if chunks else np.empty((0, tokenizer.width), np.int64)
            held = held_out(len(ids), fraction)
            for split, part in (("train", ids[:held]), ("val", ids[held:])):
                samples = part[: len(part) // per_sample * per_sample].reshape(-1, per_sample * tokenizer.width)
                findings.counts[f"not in a whole sample of {split}"] += len(part) % per_sample
                for sample in samples:
                    counted = np.ones(length, bool)
                    counted[0] = False
                    writers[split].write(np.concatenate([[SINK], sample]), counted)
            told[session.name] = {"messages": len(ids), "held_out_from": held, "counts": dict(findings.counts)}
        for split, writer in writers.items():
            if not writer.documents:
                messages = sum(s["messages"] for s in told.values())
                raise LmplayError(
                    f"data set {name}: {messages} messages are too few for one {split} sample of {per_sample}"
                )
        return {"sessions": told}

    return prepared(name, [fingerprint(spec), tokenizer.fingerprint, fraction, length], tokenizer, fill)


def held_out(messages: int, fraction: float) -> int:
    """The number of the first message that is held out."""
    return messages - round(messages * fraction)


def _encoded(session: Session, findings: Findings, tokenizer: Messages, progress: Any) -> Iterator[np.ndarray]:
    rows: list[Message] = []
    done = 0
    number = tokenizer.tickers.index(session.ticker)
    for _, message, _ in replay(session, findings, number):
        rows.append(message)
        if len(rows) == CHUNK:
            done += len(rows)
            progress(done)
            yield _ids(session, rows, tokenizer)
            rows = []
    if rows:
        yield _ids(session, rows, tokenizer)


def _ids(session: Session, rows: list[Message], tokenizer: Messages) -> np.ndarray:
    try:
        return tokenizer.encode_messages(np.array(rows)).astype(np.uint16 if tokenizer.vocab_size < 2**16 else np.int64)
    except MessageError as e:
        raise LmplayError(f"{session.name}: {e}") from e


class Told:
    """A whole session as messages and events, of which the last part is held out.

    `messages` is (n, 14), the columns of Message; `start` is the number of the first that is held out.
    """

    def __init__(self, session: Session, number: int, fraction: float, errors: Errors = "skip"):
        self.session, self.number, self.errors = session, number, errors
        rows, self.events = [], []
        for event, message, _ in self.replay():
            rows.append(message)
            self.events.append(event)
        if not rows:
            raise LmplayError(f"{session.name}: it has no messages")
        self.messages = np.array(rows)
        self.start = held_out(len(rows), fraction)

    def replay(self) -> Iterator[tuple[Event, Message, Market]]:
        return replay(self.session, Findings(self.session.name, self.errors), self.number)

    def markets(self, starts: list[int]) -> list[Market]:
        """The live market before each of these messages (1 or later), as a copy of its own.

        Raises:
            LmplayError: there is no such message.
        """
        wanted, found = set(starts), {}
        for n, (_, _, market) in enumerate(self.replay(), 1):
            if n in wanted:
                found[n] = market.copy()
        for start in starts:
            if start not in found:
                raise LmplayError(f"{self.session.name}: message {start} is not between 1 and {len(self.messages)}")
        return [found[start].copy() for start in starts]
