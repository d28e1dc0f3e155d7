"""The order book against one that is obviously right, against an independent library, and against
its own rules."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyorderbook import Book as TheirBook
from pyorderbook import ask, bid

from lmplay.market.book import ASK, BID, Book, BookError

# Few prices and sizes, so that queues form, orders cross and ids are asked for that are gone.
ADD = st.tuples(
    st.just("add"), st.sampled_from((BID, ASK)), st.integers(95, 105), st.integers(1, 6)
)
REDUCE = st.tuples(st.just("reduce"), st.integers(0, 30), st.integers(1, 6))
REPLACE = st.tuples(st.just("replace"), st.integers(0, 30), st.integers(95, 105), st.integers(1, 6))
ACTIONS = st.lists(st.one_of(ADD, ADD, REDUCE, REPLACE), max_size=60)


class Naive:
    """A list of orders in the order of arrival; everything is looked for in all of it."""

    def __init__(self, horizon: int | None = None) -> None:
        self.orders: list[list[int]] = []  # [id, side, price, size, time]
        self.horizon = horizon
        self.seen: int | None = None  # the last mid price

    def add(
        self, id: int, side: int, price: int, size: int, time: int
    ) -> list[tuple[int, int, int, int]]:
        fills = []
        while size:
            others = [
                o
                for o in self.orders
                if o[1] != side and (o[2] <= price if side == BID else o[2] >= price)
            ]
            if not others:
                break
            best = (min if side == BID else max)(o[2] for o in others)
            hit = next(o for o in others if o[2] == best)
            taken = min(size, hit[3])
            size -= taken
            self.take(hit[0], taken)
            fills.append((hit[0], best, taken, hit[3]))
        far = (
            self.horizon is not None
            and self.seen is not None
            and abs(price - self.seen) > self.horizon
        )
        if size and not far:
            self.orders.append([id, side, price, size, time])
        self.prune()
        return fills

    def take(self, id: int, size: int) -> bool:
        found = next((o for o in self.orders if o[0] == id), None)
        if found is None or not 0 < size <= found[3]:
            return False
        found[3] -= size
        self.orders = [o for o in self.orders if o[3]]
        self.prune()
        return True

    def prune(self) -> None:
        bids, asks = ([o[2] for o in self.orders if o[1] == s] for s in (BID, ASK))
        if bids and asks:
            self.seen = mid = (max(bids) + min(asks)) // 2
            if self.horizon is not None:
                self.orders = [o for o in self.orders if abs(o[2] - mid) <= self.horizon]

    def state(self) -> tuple[Any, ...]:
        return tuple(
            [
                (p, [(o[3], o[4]) for o in self.orders if o[1] == side and o[2] == p])
                for p in sorted({o[2] for o in self.orders if o[1] == side})
            ]
            for side in (BID, ASK)
        )


def check_rules(book: Book) -> None:
    best = book.best(BID), book.best(ASK)
    assert None in best or best[0] < best[1], "crossed"
    assert sum(len(q) for levels in book.levels for q in levels.values()) == len(book.orders)
    for side in (BID, ASK):
        assert book.prices[side] == sorted(book.levels[side])
        for price, queue in book.levels[side].items():
            assert queue, "an empty level"
            assert book.volume[side][price] == sum(o.size for o in queue.values())
            assert all(o.size > 0 and o.price == price and o.side == side for o in queue.values())
            times = [o.time for o in queue.values()]
            assert times == sorted(times), "a later order stands in front"


@pytest.mark.parametrize("horizon", [None, 3])
@settings(max_examples=150, deadline=None)
@given(actions=ACTIONS)
def test_against_brute_force(horizon: int | None, actions: list[tuple[Any, ...]]) -> None:
    book = Book()
    naive = Naive(horizon)
    if horizon is not None:
        book.set_horizon(horizon)
    entered = left = 0
    for time, action in enumerate(actions):
        if action[0] == "add":
            fills = book.add(time, *action[1:], time)
            assert [(f.id, f.price, f.size, f.left) for f in fills] == naive.add(
                time, *action[1:], time
            )
            entered += action[3]
            left += 2 * sum(f.size for f in fills)
        elif action[0] == "reduce":
            did = naive.take(action[1], action[2])
            if did:
                book.reduce(action[1], action[2])
                left += action[2]
            else:
                with pytest.raises(BookError):
                    book.reduce(action[1], action[2])
        else:
            old = next((o for o in naive.orders if o[0] == action[1]), None)
            if old is None:
                with pytest.raises(BookError):
                    book.replace(action[1], time, *action[2:], time)
            else:
                left += old[3]
                side = old[1]
                naive.take(old[0], old[3])
                expected = naive.add(time, side, action[2], action[3], time)
                fills = book.replace(action[1], time, *action[2:], time)
                assert [(f.id, f.price, f.size, f.left) for f in fills] == expected
                entered += action[3]
                left += 2 * sum(f.size for f in fills)
        assert book.state() == naive.state()
        check_rules(book)
        if horizon is None:
            assert sum(o.size for o in book.orders.values()) == entered - left, (
                "volume came from or went nowhere"
            )
        else:
            mid = book.mid()
            assert mid is None or all(abs(o.price - mid) <= horizon for o in book.orders.values())


@settings(max_examples=100, deadline=None)
@given(
    actions=st.lists(
        st.one_of(ADD, ADD, st.tuples(st.just("cancel"), st.integers(0, 30))), max_size=50
    )
)
def test_against_an_independent_library(actions: list[tuple[Any, ...]]) -> None:
    """pyorderbook: the same trades at the same prices against the same orders, and the same
    depth."""
    book = Book()
    theirs = TheirBook()
    orders = {}
    ids = {}
    for time, action in enumerate(actions):
        if action[0] == "add":
            _, side, price, size = action
            order = (bid if side == BID else ask)("X", price, size)
            orders[time] = order
            ids[order.id] = time
            blotter = theirs.match(order)
            fills = book.add(time, side, price, size, time)
            # Their names for the two sides of a trade depend on the version; the resting order's is
            # the other one.
            assert [(f.price, f.size) for f in fills] == [
                (int(t.fill_price), t.fill_quantity) for t in blotter.trades
            ]
            assert [f.id for f in fills] == [ids[t.standing_order_id] for t in blotter.trades]
        elif action[1] in book.orders:
            rest = book.orders[action[1]]
            level = list(book.queue(rest.side, rest.price))
            if len(level) == 1:
                continue  # it keeps an empty level, and then trades against it
            book.reduce(action[1], rest.size)
            theirs.cancel(orders[action[1]])
        for side, their_side in ((BID, "bid"), (ASK, "ask")):
            depth = {
                int(level.price): sum(o.quantity for o in level.orders.values())
                for s, levels in theirs.levels["X"].items()
                if str(s) == their_side
                for level in levels
            }
            assert dict(book.depth(side, 100)) == depth


def test_what_the_book_refuses_leaves_it_as_it_was() -> None:
    book = Book()
    book.add(1, BID, 100, 5, 0)
    before = book.state()
    for refused in (
        lambda: book.add(1, BID, 99, 5, 1),
        lambda: book.add(2, BID, 99, 0, 1),
        lambda: book.reduce(1, 6),
        lambda: book.reduce(1, 0),
        lambda: book.reduce(9, 1),
        lambda: book.replace(9, 10, 99, 1, 1),
        lambda: book.replace(1, 2, 99, 0, 1),
    ):
        with pytest.raises(BookError):
            refused()
        assert book.state() == before


def test_a_replaced_order_goes_to_the_end_of_its_queue() -> None:
    book = Book()
    for id in (1, 2):
        book.add(id, ASK, 100, 5, id)
    book.replace(1, 3, 100, 5, 3)
    assert [o.id for o in book.queue(ASK, 100)] == [2, 3]


def test_the_last_mid_is_kept_for_when_a_side_is_empty() -> None:
    book = Book()
    assert book.mid() is None
    book.add(1, BID, 99, 1, 0)
    assert book.mid() is None
    book.add(2, ASK, 102, 1, 0)
    assert book.mid() == 100
    book.reduce(2, 1)
    assert book.mid() == 100
