"""From records to messages: replaying a trading session, with what is wrong in it named or counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Literal

from ..errors import LmplayError
from .book import Order
from .events import ADD, CANCEL, EXECUTE, EXECUTE_AT, MAX_SECONDS, MAX_SIZE, REPLACE, Event, Market, Message

Errors = Literal["stop", "skip"]


@dataclass
class Findings:
    """What a session's records had wrong with them: the first is an error, or all are counted."""

    name: str
    errors: Errors = "stop"
    counts: Counter[str] = field(default_factory=Counter)

    def wrong(self, line: int, what: str, text: str) -> None:
        """Raises LmplayError, or counts `what` where errors are skipped."""
        if self.errors == "stop":
            raise LmplayError(f"{self.name}: line {line}: {text}; 'errors': 'skip' leaves such lines out")
        self.counts[f"skipped: {what}"] += 1


Events = Callable[[Market, Findings], Iterator[tuple[int, Event]]]


@dataclass(frozen=True)
class Session:
    """One ticker over one stretch of time.

    `events` yields (line, event), and is asked for the next only when the last was applied to the market that it was
    given: it may look at the book.
    """

    name: str
    ticker: str
    time: int
    orders: list[Order]  # resting at the beginning, in the order of arrival
    events: Events
    tick: int = 100  # the price grid in 1/10000, for writing LOBSTER files


def replay(session: Session, findings: Findings, ticker: int = 0) -> Iterator[tuple[Event, Message, Market]]:
    """Every event of a session that messages can tell, with its message and the market, to which it was applied.

    Sizes above 9999 are clipped, orders further than 999 ticks from the mid left out with all that happens to them,
    gaps above 999 seconds clipped: all are counted in `findings`. Until the book has had both sides, events shape it
    and are not yielded.

    Raises:
        LmplayError: a record is wrong and errors are not skipped.
    """
    market = Market(ticker, session.orders, session.time)
    left_out: set[int] = set()
    clipped: set[int] = set()
    for line, raw in session.events(market, findings):
        if raw.time < market.time:
            findings.wrong(line, "out of order", f"its time is {market.time - raw.time} ns before the last one's")
            continue
        event = _expressible(raw, market, findings, left_out, clipped, line)
        if event is None:
            continue
        if market.book.mid() is None:
            market.apply(event)
            findings.counts["before both sides"] += 1
            continue
        message = market.describe(event)
        if message.dt > MAX_SECONDS * 10**9:
            findings.counts["clipped: time since the last"] += 1
            message = message._replace(dt=MAX_SECONDS * 10**9)
        if (
            event.kind == EXECUTE
            and market.book.front(message.side, event.price) is not market.book.orders[event.order]
        ):
            findings.counts["trades behind the front of a queue"] += 1
        market.apply(event)
        yield event, message, market
    if market.book.pruned:
        findings.counts["orders that the mid left behind"] = len(market.book.pruned)


def _expressible(
    event: Event, market: Market, findings: Findings, left_out: set[int], clipped: set[int], line: int
) -> Event | None:
    """The event as a message can tell it, or None where it cannot be told."""
    book, counts = market.book, findings.counts
    if event.kind in (ADD, REPLACE):
        if event.size > MAX_SIZE:
            counts["clipped: size"] += 1
            clipped.add(event.order if event.kind == ADD else event.new)
            event = event._replace(size=MAX_SIZE)
        if event.size <= 0:
            findings.wrong(line, "size", f"its size is {event.size}")
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
                findings.wrong(line, "reference", f"order {event.order} is not in the book")
            return None
        if event.kind != REPLACE and event.size > order.size:
            if order.id in clipped or order.size == MAX_SIZE:
                counts["clipped: size"] += 1
                event = event._replace(size=order.size)
            else:
                findings.wrong(line, "size", f"{event.size} of order {event.order} go, and it has {order.size} left")
                return None
    if event.kind == EXECUTE_AT and book.beyond(event.price):
        counts["clipped: price of a trade"] += 1
        assert order is not None
        event = event._replace(kind=EXECUTE, price=order.price)
    if event.kind in (ADD, REPLACE):
        side = event.side if order is None else order.side
        id = event.order if order is None else event.new
        if id in book.orders and (order is None or id != event.order):
            findings.wrong(line, "reference", f"order {id} is in the book already")
            return None
        beyond = book.beyond(event.price)
        if beyond or book.crosses(side, event.price):
            counts["dropped: price" if beyond else "dropped: would trade at once"] += 1
            left_out.add(id)
            if order is None:
                return None
            return Event(event.time, CANCEL, side, order.price, order.size, order.id)  # what a replace leaves of it
    return event


def rebuild(messages: Iterator[Message], start: Market) -> Iterator[Market]:
    """Play messages into a market that holds what rested at their beginning: the way back of :func:`replay`.

    Raises:
        BookError: a message names an order that is not there.
    """
    for message in messages:
        start.apply(start.interpret(message))
        yield start
