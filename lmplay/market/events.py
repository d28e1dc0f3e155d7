"""Events that change a book, and messages that describe them relative to the book.

An event names its order by an id. A message (:mod:`lmplay.market.messages`) has no ids: it names an
order by side, price, size and time. :class:`Market` converts between them and is the only place
where prices become distances to the mid: the same code encodes data and simulates.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from .book import ASK, BID, Book, BookError, Order

ADD, EXECUTE, EXECUTE_AT, CANCEL, REPLACE = range(5)
KINDS = ("add", "execute", "execute_at", "cancel", "replace")
NA = -(2**40)
"""What a message's field holds that its kind does not have."""

MAX_PRICE = 999
MAX_SIZE = 9999
MAX_SECONDS = 999
DAY = 86_400 * 10**9


class Event(NamedTuple):
    """One change of the book.

    price, size: of the new order (ADD, REPLACE) or of the trade (EXECUTE_AT has another price than
    its order); for CANCEL the size that is cancelled, where all that is left is a delete.
    order: the id. new: the id that a REPLACE gives.
    """

    time: int
    kind: int
    side: int  # of the resting order
    price: int
    size: int
    order: int
    new: int = 0


class Message(NamedTuple):
    """An event without ids. Prices are ticks from the mid before the event; `ref_*` name its order.

    `remaining` is what is left of that order after an EXECUTE, EXECUTE_AT or CANCEL; NA for kinds
    without the field. The last three are :meth:`Market.touch` before the event.
    """

    ticker: int
    kind: int
    side: int
    price: int
    size: int
    remaining: int
    dt: int
    time: int
    ref_price: int
    ref_size: int
    ref_time: int
    spread: int = NA
    bid_volume: int = NA
    ask_volume: int = NA


class Market:
    """A live book with a clock.

    Args:
        ticker: the number of its ticker in the vocabulary.
        orders: orders that rest at the start, in the order of arrival.
        time: the clock at the start.
    """

    def __init__(self, ticker: int = 0, orders: list[Order] | None = None, time: int = 0):
        self.ticker = ticker
        self.time = time
        self.book = Book()
        self.next_id = 1
        for o in orders or []:
            if not self.book.crosses(o.side, o.price):
                self.book.add(o.id, o.side, o.price, o.size, o.time)
                self.next_id = max(self.next_id, o.id + 1)
        self.book.set_horizon(MAX_PRICE)  # not before: half a book has another mid price

    def copy(self) -> Market:
        """Return an independent market in the same state."""
        queues = [
            o for side in (0, 1) for p in self.book.prices[side] for o in self.book.queue(side, p)
        ]
        other = Market(
            self.ticker, [Order(o.id, o.side, o.price, o.size, o.time) for o in queues], self.time
        )
        other.book.seen = self.book.seen
        other.next_id = self.next_id
        return other

    @property
    def mid(self) -> int:
        """The mid price. Raises BookError if the book never had two sides."""
        mid = self.book.mid()
        if mid is None:
            raise BookError(
                "the book has never had both sides: there is no mid price to count from"
            )
        return mid

    def touch(self) -> tuple[int, int, int]:
        """Return spread in ticks, and volume at the best bid and at the best ask.

        Volumes are rounded down to their leading digit (4711 is 4000). All are limited to what a
        message can hold, and NA if a side is empty.
        """
        bid = self.book.best(BID)
        ask = self.book.best(ASK)
        spread = NA if bid is None or ask is None else min(ask - bid, MAX_PRICE)
        volumes = [
            NA if best is None else _leading_digit(min(self.book.volume[side][best], MAX_SIZE))
            for side, best in ((BID, bid), (ASK, ask))
        ]
        return spread, volumes[0], volumes[1]

    def describe(self, event: Event) -> Message:
        """Return the message of an event that is about to happen.

        Raises:
            BookError: its order does not exist, or less is left than it takes.
        """
        mid = self.mid
        dt = event.time - self.time
        if event.kind == ADD:
            return Message(
                self.ticker,
                ADD,
                event.side,
                event.price - mid,
                event.size,
                NA,
                dt,
                event.time,
                NA,
                NA,
                NA,
                *self.touch(),
            )
        order = self.book.orders.get(event.order)
        if order is None:
            raise BookError(f"order {event.order} is not in the book")
        remaining = NA
        if event.kind != REPLACE:
            remaining = order.size - event.size
            if remaining < 0:
                raise BookError(
                    f"order {event.order} has {order.size} left, {event.size} cannot be taken"
                )
        return Message(
            self.ticker,
            event.kind,
            order.side,
            event.price - mid,
            event.size,
            remaining,
            dt,
            event.time,
            order.price - mid,
            order.size,
            order.time,
            *self.touch(),
        )

    def interpret(self, message: Message, order: Order | None = None) -> Event:
        """Return the event of a message. Its order is looked up in the book, unless it is given.

        Raises:
            BookError: no resting order has that side, price, size and time, or less is left.
        """
        mid = self.mid
        price = mid + message.price
        if message.kind == ADD:
            return Event(message.time, ADD, message.side, price, message.size, self.next_id)
        if order is None:
            ref = mid + message.ref_price
            order = self.book.find(message.side, ref, message.ref_size, message.ref_time)
            if order is None:
                raise BookError("no resting order has that side, price, size and time")
        if message.kind == REPLACE:
            return Event(
                message.time, REPLACE, message.side, price, message.size, order.id, self.next_id
            )
        if message.kind == CANCEL and (message.size > order.size or message.remaining == 0):
            # of at least what is left, or all of it by its own word
            message = message._replace(size=order.size)
        if not 0 < message.size <= order.size:
            raise BookError(
                f"order {order.id} has {order.size} left, {message.size} cannot be taken"
            )
        if message.kind != EXECUTE_AT:
            price = order.price
        return Event(message.time, message.kind, message.side, price, message.size, order.id)

    def apply(self, event: Event) -> None:
        """Apply an event; an order that crosses trades with the other side.

        Raises:
            BookError: as :class:`Book`. The market is unchanged then.
        """
        if event.kind == ADD:
            self.book.add(event.order, event.side, event.price, event.size, event.time)
        elif event.kind == REPLACE:
            self.book.replace(event.order, event.new, event.price, event.size, event.time)
        else:
            self.book.reduce(event.order, event.size)
        self.time = event.time
        self.next_id = max(self.next_id, event.order + 1, event.new + 1)

    def steps(self, event: Event) -> Iterator[Event]:
        """Yield the event as single adds, trades and cancels, as exchanges publish them.

        Apply each before asking for the next; together they do what the event does.
        """
        if event.kind == REPLACE:
            order = self.book.orders[event.order]
            yield Event(event.time, CANCEL, order.side, order.price, order.size, order.id)
            event = Event(event.time, ADD, event.side, event.price, event.size, event.new)
        while event.kind == ADD and self.book.crosses(event.side, event.price):
            best = self.book.best(1 - event.side)
            front = self.book.front(1 - event.side, best) if best is not None else None
            assert front is not None
            taken = min(front.size, event.size)
            left = event.size - taken
            yield Event(event.time, EXECUTE, front.side, front.price, taken, front.id)
            if not left:
                return
            event = event._replace(size=left)
        yield event


def _leading_digit(number: int) -> int:
    tens = 10 ** (len(str(number)) - 1)
    return number // tens * tens
