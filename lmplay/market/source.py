"""The plan's source `market`: recorded or generated sessions, as packed tokens of messages.

The last part of each session is held out. Both parts are cut into samples: a sink token and as many
messages as fit. The sink is never a target. The manifest next to the tokens counts, by field, what
was wrong in the records and what was dropped or clipped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np
from pydantic import Field, model_validator

from ..data.source import LocalSource
from ..data.token_files import Progress, SplitWriter, Tokens, cached_tokens
from ..data.tokenizers import Tokenizer
from ..errors import LmplayError, did_you_mean
from .events import Message
from .messages import SINK, MarketTokenizer, MessageError, Messages
from .sessions import DataIssues, Session, replay

if TYPE_CHECKING:
    from ..plan import Plan

CHUNK = 50_000  # messages encoded at a time


class EventSource(LocalSource):
    """Recorded or generated order events."""

    data: Literal["generator", "bitstamp", "lobster", "itch"]
    path: str | None = Field(
        None, description="lobster: a message file or a folder of them; itch: a file"
    )
    tick: int = Field(
        100, gt=0, description="lobster, itch: the price grid in 1/10000; 100: a cent"
    )
    seed: int = Field(0, ge=0, description="generator")
    seconds: float = Field(3600, gt=0, description="generator: market time")
    errors: Literal["stop", "skip"] = Field("stop", description="what a wrong record does")

    @model_validator(mode="after")
    def _path_fits(self) -> Self:
        if (self.path is None) == (self.data in ("lobster", "itch")):
            raise ValueError(
                f"data {self.data} {'needs a path' if self.path is None else 'has no path'}"
            )
        return self

    def sessions(self, tickers: tuple[str, ...] = ()) -> list[Session]:
        """Return the data's sessions.

        Args:
            tickers: those that a tokenizer has; (): any.

        Raises:
            LmplayError: a package or file is missing, or a ticker is not one of `tickers`.
        """
        # Plans are read without these: some of them need pandas.
        from . import bitstamp, itch, lobster, zero_intelligence

        if self.data == "generator":
            ticker = tickers[0] if tickers else zero_intelligence.TICKER
            found = [zero_intelligence.session(self.seed, self.seconds, ticker=ticker)]
        elif self.data == "bitstamp":
            found = [bitstamp.session()]
        elif self.data == "lobster":
            found = lobster.sessions(Path(self.path or ""), self.tick, self.errors)
        else:
            found = itch.sessions(Path(self.path or ""), tickers, self.tick)
        for session in found:
            if tickers and session.ticker not in tickers:
                hint = did_you_mean(session.ticker, tickers)
                raise LmplayError(
                    f"{session.name}: the tokenizer has no ticker {session.ticker}{hint}"
                )
        return found

    def cache_key(self) -> list[Any]:
        """Changes whenever the events change, as far as that is known without reading them."""
        from . import bitstamp

        if self.data == "bitstamp":
            return ["bitstamp", bitstamp.fingerprint(), bitstamp.LOT]
        path = Path(self.path) if self.path else None
        files = [] if path is None else [path] if path.is_file() else sorted(path.glob("*.csv"))
        found = [(str(p.resolve()), p.stat()) for p in files if p.is_file()]
        stats = [(name, s.st_size, s.st_mtime_ns, s.st_ctime_ns) for name, s in found]
        return [self.model_dump(mode="json", exclude={"path"}), stats]


class MarketSource(EventSource):
    """Events of a market. The last part of each session (validation.fraction) is held out."""

    source: Literal["market"] = "market"

    def check_plan(self, plan: Plan) -> None:
        if not isinstance(plan.tokenizer, MarketTokenizer):
            raise ValueError(
                "market data sets and the market tokenizer go together, and with no others"
            )

    def tokens(self, name: str, tokenizer: Tokenizer, plan: Plan, progress: Progress) -> Tokens:
        """Return the sessions' messages as tokens, from the cache or prepared now.

        Raises:
            LmplayError: a record is wrong and errors are not skipped, or there are too few messages
                for a sample.
        """
        assert isinstance(tokenizer, Messages)
        fraction = plan.validation.fraction
        length = plan.model.max_len or 0
        per_sample = (length - 1) // tokenizer.width

        def fill(writers: dict[str, SplitWriter]) -> dict[str, Any]:
            report: dict[str, Any] = {}
            for session in self.sessions(tokenizer.tickers):
                issues = DataIssues(session.name, self.errors)
                ids = _encode(session, issues, tokenizer, progress)
                start = held_out(len(ids), fraction)
                for split, part in (("train", ids[:start]), ("val", ids[start:])):
                    samples = part[: len(part) // per_sample * per_sample]
                    issues.counts[f"not in a complete sample of {split}"] += len(part) % per_sample
                    for sample in samples.reshape(-1, per_sample * tokenizer.width):
                        counted = np.ones(length, bool)
                        counted[0] = False
                        writers[split].write(np.concatenate([[SINK], sample]), counted)
                report[session.name] = {
                    "messages": len(ids),
                    "held_out_from": start,
                    "counts": dict(issues.counts),
                }
            for split, writer in writers.items():
                if not writer.documents:
                    messages = sum(s["messages"] for s in report.values())
                    raise LmplayError(
                        f"{messages} messages are too few for one {split} sample of {per_sample}"
                    )
            return {"sessions": report}

        key = [self.cache_key(), tokenizer.fingerprint, fraction, length]
        return cached_tokens(name, key, tokenizer, fill, progress)


def held_out(messages: int, fraction: float) -> int:
    """Return the number of the first message that is held out."""
    return messages - round(messages * fraction)


def _encode(
    session: Session, issues: DataIssues, tokenizer: Messages, progress: Progress
) -> np.ndarray:
    """Return a session's messages as ids (n, width)."""

    def show(done: int) -> None:
        progress(f"reading {session.name}", done)

    chunks = list(_encoded(session, issues, tokenizer, show))
    return np.concatenate(chunks) if chunks else np.empty((0, tokenizer.width), np.int64)


def _encoded(
    session: Session, issues: DataIssues, tokenizer: Messages, progress: Callable[[int], None]
) -> Iterator[np.ndarray]:
    rows: list[Message] = []
    done = 0
    number = tokenizer.tickers.index(session.ticker)
    for _, message, _ in replay(session, issues, number):
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
        return tokenizer.encode_messages(np.array(rows)).astype(
            np.uint16 if tokenizer.vocab_size < 2**16 else np.int64
        )
    except MessageError as e:
        raise LmplayError(f"{session.name}: {e}") from e
