"""Which tokens may come next: by the grammar of messages, and by the orders that rest in a live book."""

from __future__ import annotations

import numpy as np

from .book import ASK, BID, Order
from .events import ADD, CANCEL, EXECUTE, EXECUTE_AT, MAX_PRICE, MAX_SIZE, REPLACE, Market
from .messages import NA_TOKEN, SECOND, Messages

LONGEST_GAP = 10 * SECOND  # between two messages
REFERENCE = ("ref_price", "ref_size", "ref_time")


class Grammar:
    """What the table of :mod:`messages` allows at each position, given the message's beginning."""

    def __init__(self, messages: Messages):
        self.m = messages

    def group(self, position: int) -> tuple[int, int]:
        """The first id and how many ids the position's own tokens have."""
        _, group, _ = self.m.layout[position]
        return self.m.start[group], self.m.count[group]

    def kind(self, tokens: np.ndarray) -> int:
        """The kind (of :data:`KINDS`) that a message of these tokens has; -1 where its kind's token is none."""
        value = int(tokens[self.m.first["kind"]]) - self.m.start["kind"]
        return int(self.m._token_to_kind[value]) if 0 <= value < self.m.count["kind"] else -1

    def forced(self, position: int, tokens: np.ndarray) -> int | None:
        """The only token that the message's beginning leaves at a position: NA, where its kind has no such field."""
        field = self.m.layout[position][0]
        if field in REFERENCE and self.kind(tokens) == ADD:
            return NA_TOKEN
        if field == "remaining" and self.kind(tokens) in (ADD, REPLACE):
            return NA_TOKEN
        return None


def time_tokens(messages: Messages, tokens: np.ndarray, before: int) -> np.ndarray | None:
    """(5,) the tokens of a message's time: `before` and the time since; None where that is past any clock."""
    at = messages.first["dt"]
    digits = tokens[at : at + 4].astype(np.int64) - messages.start["time"]
    if (digits < 0).any() or (digits >= 1000).any():
        return None
    now = before + int(digits[0]) * SECOND + int(digits[1]) * 10**6 + int(digits[2]) * 1000 + int(digits[3])
    if now >= 10**6 * SECOND:
        return None
    return messages.start["time"] + _digits(np.array([now]))[0]


def _digits(times: np.ndarray) -> np.ndarray:
    """(n,) nanoseconds -> (n, 5) digits: two of seconds and three of nanoseconds, base 1000."""
    seconds, nanos = times // SECOND, times % SECOND
    return np.stack([seconds // 1000, seconds % 1000, nanos // 10**6, nanos // 1000 % 1000, nanos % 1000], 1)


class BookMask:
    """The tokens of a message's reference that still lead to an order that rests in the book.

    `allowed` gives them for the next position; `take` follows the one that was sampled. What happens and when is the
    model's to say; which order it happens to is chosen among those that are there, at a price at which there are some.
    Trades are offered the front of each queue only, and take no more than it has. A cancel is offered the sizes that
    rest, and then what it may leave of an order: nothing, or what it would leave of a larger one. (Were it free to name
    any size, most would name none that rests, and what was meant to go would stay in part.) The next message comes
    within ten seconds. So every message that is sampled by it is valid.

    Nor does a new order cross the other side: an exchange tells of one that trades by its trades, and data in which one
    is told otherwise are left out (:func:`lmplay.market.sessions.replay`).
    """

    def __init__(self, messages: Messages, market: Market):
        self.m, self.market = messages, market
        self.kind = self.side = -1
        self.price: tuple[int, ...] = ()
        self.size = 0
        self.left: np.ndarray | None = None  # (n, 8) numbers of sign, price, size, time of the orders still possible

    def allowed(self, position: int) -> np.ndarray | None:
        """The numbers within the position's group that are possible; None where all are."""
        field, _, _ = self.m.layout[position]
        inside = position - self.m.first[field]
        if field == "dt" and inside == 0:
            return np.arange(LONGEST_GAP // SECOND)
        if field == "kind" and not self.market.book.orders:
            return np.array([self.m.kind_token(ADD) - self.m.start["kind"]])
        if field == "side" and self.kind != ADD:
            return np.array([s for s in (BID, ASK) if self.market.book.prices[s]])
        if field == "price" and self.kind in (ADD, REPLACE):
            return self._resting(inside)
        if field == "price" and self.left is not None and self.kind != EXECUTE_AT:
            return np.unique(self.left[:, inside])
        if field == "size":
            if self.left is None or self.kind == REPLACE:
                return np.arange(1, MAX_SIZE + 1)
            sizes = np.unique(self.left[:, 2])
            return sizes if self.kind == CANCEL else np.arange(1, int(sizes[-1]) + 1)
        if field == "remaining" and self.left is not None:
            return np.unique(self.left[:, 2] - self.size)
        if field in REFERENCE and self.left is not None:
            return np.unique(self.left[:, self._column(field, inside)])
        return None

    def names_an_order(self, position: int) -> bool:
        """Whether the size at a position says, after the price, which order the message is about."""
        field = self.m.layout[position][0]
        return (field == "size" and self.kind in (EXECUTE, CANCEL)) or (
            field == "ref_size" and self.kind in (EXECUTE_AT, REPLACE)
        )

    def take(self, position: int, number: int) -> None:
        """The token that was sampled for a position, as its number within its group."""
        field, _, _ = self.m.layout[position]
        inside = position - self.m.first[field]
        if field == "kind":
            self.kind = int(self.m._token_to_kind[number])
        elif field == "side":
            self.side = number
            if self.kind != ADD:
                self.left = self._orders()
        elif field == "price":
            self.price = (*self.price, number)
        if self.left is None:
            return
        if field == "price" and self.kind in (EXECUTE, CANCEL):
            self.left = self.left[self.left[:, inside] == number]
        elif field == "size" and self.kind != REPLACE:
            self.size = number
            self.left = self.left[self.left[:, 2] >= number]
        elif field == "remaining" and self.kind != REPLACE:
            self.left = self.left[self.left[:, 2] - self.size == number]
        elif field in REFERENCE:
            self.left = self.left[self.left[:, self._column(field, inside)] == number]

    def _resting(self, inside: int) -> np.ndarray | None:
        """The signs (inside 0) or the distances (1) at which an order of this side rests and does not trade."""
        other = self.market.book.best(1 - self.side)
        if other is None:
            return None
        nearest = other - self.market.mid + (1 if self.side == ASK else -1)
        low, high = (nearest, MAX_PRICE) if self.side == ASK else (-MAX_PRICE, nearest)
        if low > high:  # a side has run empty, and the other has come up to the end of what a price can tell
            return None
        if inside == 0:
            return np.array([sign for sign, possible in ((0, low < 0), (1, high >= 0)) if possible])
        if self.price[0] == 0:
            low, high = -high, -low
        return np.arange(max(low, 0), high + 1)

    @staticmethod
    def _column(field: str, inside: int) -> int:
        return {"ref_price": 0, "ref_size": 2, "ref_time": 3}[field] + inside

    def _orders(self) -> np.ndarray:
        book, mid = self.market.book, self.market.mid
        orders: list[Order] = []
        for price in book.prices[self.side]:
            queue = book.queue(self.side, price)
            orders += [next(queue)] if self.kind in (EXECUTE, EXECUTE_AT) else list(queue)
        values = np.array([(o.price - mid, o.size, o.time) for o in orders], np.int64)
        distance = values[:, :1]
        return np.concatenate([distance >= 0, np.abs(distance), values[:, 1:2], _digits(values[:, 2])], 1)
