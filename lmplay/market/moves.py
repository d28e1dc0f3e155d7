"""The plan's source `market_moves`: does the mid price fall, stay or rise over the next events?

A prompt is text: the last events, one a line, and the book after them. Prices are ticks from the
mid before the event (half ticks are rounded down), sizes have two digits, and times are the
milliseconds since the event before, rounded down to 1, 2 or 5 of their power of ten. So few numbers
occur, and those of a price or an hour say nothing of the day.

    + b -1 70 20       an order to buy, 1 tick below the mid, 70 lots, 20 ms after the last event
    x a 0 12 0         an order to sell was hit: 12 lots of it
    - b -4 300 500     300 lots of an order to buy were cancelled
    = 1 b 70 5 300 a 12 40 1   spread, volumes of the best bids, volumes of the best asks
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from ..data.examples import Example
from ..data.source import digest
from ..data.token_files import Document
from ..errors import LmplayError
from .book import ASK, BID
from .events import ADD, CANCEL, EXECUTE, EXECUTE_AT, NA, REPLACE, Market, Message
from .sessions import DataIssues, Session, replay
from .source import EventSource

if TYPE_CHECKING:
    from ..plan import Plan

LABELS = ("fall", "stay", "rise")
SIGNS = {ADD: "+", EXECUTE: "x", EXECUTE_AT: "x", CANCEL: "-", REPLACE: "~"}
SIDES = {BID: "b", ASK: "a"}
LEVELS = 5  # of the book in a prompt, on each side
NANOS = 10**9


class MovesSource(EventSource):
    """Labeled examples of a market: events and the book, and where the mid price goes next."""

    source: Literal["market_moves"] = "market_moves"
    data: Literal["generator", "bitstamp", "lobster"]
    events: int = Field(16, gt=0, le=1024, description="in a prompt")
    horizon: int = Field(256, gt=0, description="events until the label is known")
    every: int = Field(16, gt=0, description="events from one example to the next")

    def check_plan(self, plan: Plan) -> None:
        unknown = [] if plan.classify is None else sorted({*LABELS} - {*plan.classify.labels})
        if unknown:
            raise ValueError(f"market_moves has the labels {', '.join(LABELS)}")

    @property
    def has_labels(self) -> bool:
        return True

    @property
    def fingerprint(self) -> str:
        return digest(self.cache_key(), self.events, self.horizon, self.every)

    def read(self, skipped: Counter[str]) -> Iterator[Document]:
        for example in self.examples(skipped):
            yield example.document

    def examples(self, skipped: Counter[str]) -> Iterator[Example]:
        for session in self.sessions():
            issues = DataIssues(session.name, self.errors)
            found = 0
            for example in self._of(session, issues):
                found += 1
                yield example
            if not found:
                raise LmplayError(
                    f"{session.name}: it has too few events for {self.events} of a prompt and "
                    f"{self.horizon} until the label"
                )
            skipped.update(issues.counts)

    def _of(self, session: Session, issues: DataIssues) -> Iterator[Example]:
        lines: deque[str] = deque(maxlen=self.events)
        open_prompts: deque[tuple[str, int, int]] = deque()  # text, twice the mid, time
        for number, (event, message, market) in enumerate(replay(session, issues), 1):
            lines.append(line_of(message))
            now = twice_the_mid(market)
            if number % self.every:
                open_prompts.append(("", 0, 0))
            else:
                text = "\n".join([*lines, book_line(market)])
                open_prompts.append((text, now, event.time))
            if len(open_prompts) > self.horizon:
                text, before, time = open_prompts.popleft()
                if text and number - self.horizon >= self.events:
                    move = (now > before) - (now < before)
                    yield Example(text, LABELS[1 + move], time / NANOS, event.time / NANOS)


def twice_the_mid(market: Market) -> int:
    """Return best bid + best ask, in ticks; with an empty side twice the last mid."""
    bid, ask = market.book.best(BID), market.book.best(ASK)
    return 2 * market.mid if bid is None or ask is None else bid + ask


def line_of(message: Message) -> str:
    """Return an event as a line of a prompt."""
    price = message.ref_price if message.price == NA else message.price
    parts = [SIGNS[message.kind], SIDES[message.side], price, two_digits(message.size)]
    return " ".join(map(str, [*parts, coarse(message.dt // 10**6)]))


def book_line(market: Market) -> str:
    """Return spread and volumes of a book as the last line of a prompt."""
    book = market.book
    bid, ask = book.best(BID), book.best(ASK)
    words: list[object] = ["=", "-" if bid is None or ask is None else ask - bid]
    for side in (BID, ASK):
        words.append(SIDES[side])
        words += [two_digits(volume) for _, volume in book.depth(side, LEVELS)]
    return " ".join(map(str, words))


def two_digits(n: int) -> int:
    """Return n >= 0 with zeros behind its first two digits."""
    zeros = 10 ** max(0, len(str(n)) - 2)
    return n // zeros * zeros


def coarse(n: int) -> int:
    """Return the largest of 0, 1, 2, 5, 10, 20, 50, ... that is not above n."""
    power = 10 ** (len(str(n)) - 1)
    return 0 if n < 1 else max(m * power for m in (1, 2, 5) if m * power <= n)
