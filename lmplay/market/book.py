"""A limit order book with price-time priority (first in, first out at each price)."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator
from dataclasses import dataclass

BID = 0
ASK = 1


class BookError(ValueError):
    """The book does not allow this operation: the order does not exist, or less rests."""


@dataclass(slots=True)
class Order:
    """A resting order; `size` is what is left of it."""

    id: int
    side: int
    price: int
    size: int
    time: int


@dataclass(frozen=True, slots=True)
class Fill:
    """A resting order was hit: its id and price, the size that was taken, and what is left."""

    id: int
    price: int
    size: int
    left: int


class Book:
    """Orders by id, and by side and price in the order of their arrival.

    With a `horizon`, no order rests more than that many ticks from the mid price: those beyond are
    pruned. Replaying the same events prunes the same orders, so each resting order can be named by
    its distance to the mid. `seen` keeps the last mid price for when a side is empty.
    """

    def __init__(self) -> None:
        self.horizon: int | None = None
        self.orders: dict[int, Order] = {}
        # a dict keeps the order of arrival
        self.levels: tuple[dict[int, dict[int, Order]], ...] = (
            {},
            {},
        )
        self.volume: tuple[dict[int, int], ...] = ({}, {})
        self.prices: tuple[list[int], ...] = ([], [])  # ascending
        self.pruned: set[int] = set()  # ids
        self.seen: int | None = None

    # ---------------------------------------------------------------- what it looks like

    def best(self, side: int) -> int | None:
        """Return the highest bid or the lowest ask, or None."""
        prices = self.prices[side]
        return (prices[-1] if side == BID else prices[0]) if prices else None

    def mid(self) -> int | None:
        """Return (best bid + best ask) / 2, rounded down; the last one if a side is empty."""
        return self.seen

    def queue(self, side: int, price: int) -> Iterator[Order]:
        """Return the orders at a price in the order in which they trade."""
        return iter(self.levels[side].get(price, {}).values())

    def front(self, side: int, price: int) -> Order | None:
        return next(self.queue(side, price), None)

    def find(self, side: int, price: int, size: int, time: int) -> Order | None:
        """Return the first order of its queue with these attributes, or None."""
        return next((o for o in self.queue(side, price) if o.size == size and o.time == time), None)

    def depth(self, side: int, levels: int) -> list[tuple[int, int]]:
        """Return (price, volume) of the best levels, the best first."""
        prices = self.prices[side]
        volume = self.volume[side]
        best = prices[: -levels - 1 : -1] if side == BID else prices[:levels]
        return [(p, volume[p]) for p in best]

    def state(self) -> tuple[list[tuple[int, list[tuple[int, int]]]], ...]:
        """Return both sides as (price, [(size, time), ...] in queue order), ascending, without
        ids."""
        return tuple(
            [(p, [(o.size, o.time) for o in self.queue(side, p)]) for p in self.prices[side]]
            for side in (BID, ASK)
        )

    def crosses(self, side: int, price: int) -> bool:
        """Return whether an order would trade at once."""
        other = self.best(1 - side)
        return other is not None and (price >= other if side == BID else price <= other)

    # ---------------------------------------------------------------- what happens to it

    def add(self, id: int, side: int, price: int, size: int, time: int) -> list[Fill]:
        """Match an incoming limit order with the other side; the rest of it stays in the book.

        Raises:
            BookError: the id is in use, or the size is not above 0.
        """
        if id in self.orders:
            raise BookError(f"order {id} is in the book already")
        if size <= 0:
            raise BookError(f"order {id} has the size {size}")
        fills = []
        while size and self.crosses(side, price):
            best = self.best(1 - side)
            assert best is not None
            front = self.front(1 - side, best)
            assert front is not None
            taken = min(size, front.size)
            fills.append(Fill(front.id, best, taken, front.size - taken))
            self.reduce(front.id, taken)
            size -= taken
        # nothing may rest there; with both sides in place `_prune` would say so
        if size and self.beyond(price):
            self.pruned.add(id)
        elif size:
            order = Order(id, side, price, size, time)
            self.orders[id] = order
            level = self.levels[side].get(price)
            if level is None:
                self.levels[side][price] = {id: order}
                self.volume[side][price] = size
                insort(self.prices[side], price)
            else:
                level[id] = order
                self.volume[side][price] += size
        self._prune()
        return fills

    def reduce(self, id: int, size: int) -> int:
        """Take `size` from a resting order, by a trade or a cancel; return what is left of it.

        Raises:
            BookError: there is no such order, or less rests.
        """
        order = self.orders.get(id)
        if order is None:
            raise BookError(f"order {id} is not in the book")
        if not 0 < size <= order.size:
            raise BookError(f"order {id} has {order.size} left, {size} cannot be taken")
        order.size -= size
        side = order.side
        price = order.price
        if order.size:
            self.volume[side][price] -= size
            return order.size
        del self.orders[id]
        level = self.levels[side][price]
        if len(level) == 1:
            del self.levels[side][price], self.volume[side][price]
            prices = self.prices[side]
            del prices[bisect_left(prices, price)]
            self._prune()
        else:
            del level[id]
            self.volume[side][price] -= size
        return 0

    def replace(self, id: int, new_id: int, price: int, size: int, time: int) -> list[Fill]:
        """Remove an order and add another one on its side, at the end of its queue.

        Raises:
            BookError: there is no such order, the new id is in use, or the size is not above 0. The
                book is unchanged then.
        """
        order = self.orders.get(id)
        if order is None:
            raise BookError(f"order {id} is not in the book")
        if size <= 0 or (new_id in self.orders and new_id != id):
            raise BookError(f"order {id} cannot become order {new_id} of size {size}")
        self.reduce(id, order.size)
        return self.add(new_id, order.side, price, size, time)

    def set_horizon(self, ticks: int) -> None:
        """Let no order rest more than `ticks` from the mid price from now on."""
        self.horizon = ticks
        self._prune()

    def beyond(self, price: int) -> bool:
        """Return whether a price is outside of the horizon."""
        mid = self.mid()
        return self.horizon is not None and mid is not None and abs(price - mid) > self.horizon

    def _prune(self) -> None:
        bids, asks = self.prices
        if not bids or not asks:
            return
        mid = self.seen = (bids[-1] + asks[0]) // 2
        if self.horizon is None:
            return
        while bids and bids[0] < mid - self.horizon:
            self._drop(BID, bids.pop(0))
        while asks and asks[-1] > mid + self.horizon:
            self._drop(ASK, asks.pop())

    def _drop(self, side: int, price: int) -> None:
        for id in self.levels[side].pop(price):
            del self.orders[id]
            self.pruned.add(id)
        del self.volume[side][price]
