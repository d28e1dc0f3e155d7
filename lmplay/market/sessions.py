"""Replay a trading session: records become messages, and errors are named or counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Literal

from ..errors import LmplayError
from .book import Order
from .events import (
    ADD,
    CANCEL,
    EXECUTE,
    EXECUTE_AT,
    MAX_SECONDS,
    MAX_SIZE,
    REPLACE,
    Event,
    Market,
    Message,
)

Errors = Literal["stop", "skip"]


@dataclass
class DataIssues:
    """What is wrong with a session's records: the first one raises, or all are counted."""

    name: str
    errors: Errors = "stop"
    counts: Counter[str] = field(default_factory=Counter)

    def wrong(self, line: int, what: str, text: str) -> None:
        """Raise LmplayError, or count `what` if errors are skipped."""
        if self.errors == "stop":
            raise LmplayError(
                f"{self.name}: line {line}: {text}; 'errors': 'skip' leaves such lines out"
            )
        self.counts[f"skipped: {what}"] += 1


Events = Callable[[Market, DataIssues], Iterator[tuple[int, Event]]]


@dataclass(frozen=True)
class Session:
    """One ticker over a stretch of time.

    `events` yields (line, event). It may look at the market that it is given, so each event must be
    applied before the next is requested.
    """

    name: str
    ticker: str
    time: int
    orders: list[Order]  # resting at the beginning, in the order of arrival
    events: Events
    tick: int = 100  # the price grid in 1/10000, for writing LOBSTER files


def replay(
    session: Session, issues: DataIssues, ticker: int = 0
) -> Iterator[tuple[Event, Message, Market]]:
    """Yield every event that a message can express, its message, and the market after it.

    Sizes above 9999 and gaps above 999 seconds are clipped. Orders more than 999 ticks from the mid
    are left out, with all their events. `issues` counts all of this. Events before the book has had
    both sides are applied and not yielded.

    Raises:
        LmplayError: a record is wrong and errors are not skipped.
    """
    market = Market(ticker, session.orders, session.time)
    left_out: set[int] = set()
    clipped: set[int] = set()
    for line, raw in session.events(market, issues):
        if raw.time < market.time:
            issues.wrong(
                line,
                "out of order",
                f"its time is {market.time - raw.time} ns before the last one's",
            )
            continue
        event = _expressible(raw, market, issues, left_out, clipped, line)
        if event is None:
            continue
        if market.book.mid() is None:
            market.apply(event)
            issues.counts["before both sides"] += 1
            continue
        message = market.describe(event)
        if message.dt > MAX_SECONDS * 10**9:
            issues.counts["clipped: time since the last"] += 1
            message = message._replace(dt=MAX_SECONDS * 10**9)
        if (
            event.kind == EXECUTE
            and market.book.front(message.side, event.price) is not market.book.orders[event.order]
        ):
            issues.counts["trades behind the front of a queue"] += 1
        market.apply(event)
        yield event, message, market
    if market.book.pruned:
        issues.counts["orders that the mid left behind"] = len(market.book.pruned)


def _expressible(
    event: Event,
    market: Market,
    issues: DataIssues,
    left_out: set[int],
    clipped: set[int],
    line: int,
) -> Event | None:
    """Return the event in the form that a message can express, or None."""
    book = market.book
    counts = issues.counts
    if event.kind in (ADD, REPLACE):
        if event.size > MAX_SIZE:
            counts["clipped: size"] += 1
            clipped.add(event.order if event.kind == ADD else event.new)
            event = event._replace(size=MAX_SIZE)
        if event.size <= 0:
            issues.wrong(line, "size", f"its size is {event.size}")
            return None
    order = None
    if event.kind != ADD:
        order = book.orders.get(event.order)
        if order is None:
            if event.order in left_out or event.order in book.pruned:
                counts["dropped: about an order that was left out"] += 1
                if event.kind == REPLACE:
                    left_out.add(event.new)
            else:
                issues.wrong(line, "reference", f"order {event.order} is not in the book")
            return None
        if event.kind != REPLACE and event.size > order.size:
            if order.id in clipped or order.size == MAX_SIZE:
                counts["clipped: size"] += 1
                event = event._replace(size=order.size)
            else:
                issues.wrong(
                    line,
                    "size",
                    f"{event.size} of order {event.order} go, and it has {order.size} left",
                )
                return None
    if event.kind == EXECUTE_AT and book.beyond(event.price):
        counts["clipped: price of a trade"] += 1
        assert order is not None
        event = event._replace(kind=EXECUTE, price=order.price)
    if event.kind in (ADD, REPLACE):
        side = event.side if order is None else order.side
        id = event.order if order is None else event.new
        if id in book.orders and (order is None or id != event.order):
            issues.wrong(line, "reference", f"order {id} is in the book already")
            return None
        beyond = book.beyond(event.price)
        if beyond or book.crosses(side, event.price):
            counts["dropped: price" if beyond else "dropped: would trade at once"] += 1
            left_out.add(id)
            if order is None:
                return None
            # what a replace leaves of it
            return Event(event.time, CANCEL, side, order.price, order.size, order.id)
    return event


def rebuild(messages: Iterator[Message], start: Market) -> Iterator[Market]:
    """Apply messages to a market, the reverse of :func:`replay`.

    Raises:
        BookError: a message names an order that does not exist.
    """
    for message in messages:
        start.apply(start.interpret(message))
        yield start
