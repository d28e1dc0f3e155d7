"""Which tokens may come next: by the grammar of messages, and by the orders in a live book."""

from __future__ import annotations

import numpy as np

from .book import ASK, BID, Order
from .events import ADD, CANCEL, EXECUTE, EXECUTE_AT, MAX_PRICE, MAX_SIZE, REPLACE, Market
from .messages import NA_TOKEN, SECOND, Messages

LONGEST_GAP = 10 * SECOND  # between two messages
REFERENCE = ("ref_price", "ref_size", "ref_time")


class Grammar:
    """What the table in :mod:`messages` allows at each position, given the start of the message."""

    def __init__(self, messages: Messages):
        self.m = messages

    def group(self, position: int) -> tuple[int, int]:
        """Return the first id and the number of ids of the position's group of tokens."""
        _, group, _ = self.m.layout[position]
        return self.m.start[group], self.m.count[group]

    def kind(self, tokens: np.ndarray) -> int:
        """Return the kind (index in KINDS) of a message with these tokens; -1 if its token is
        none."""
        value = int(tokens[self.m.first["kind"]]) - self.m.start["kind"]
        return int(self.m._token_to_kind[value]) if 0 <= value < self.m.count["kind"] else -1

    def forced(self, position: int, tokens: np.ndarray) -> int | None:
        """Return NA if the message's kind does not have the position's field, else None."""
        field = self.m.layout[position][0]
        if field in REFERENCE and self.kind(tokens) == ADD:
            return NA_TOKEN
        if field == "remaining" and self.kind(tokens) in (ADD, REPLACE):
            return NA_TOKEN
        return None


def time_tokens(messages: Messages, tokens: np.ndarray, before: int) -> np.ndarray | None:
    """Return the tokens (5,) of a message's time, from `before` and its dt; None past the last
    second."""
    at = messages.first["dt"]
    digits = tokens[at : at + 4].astype(np.int64) - messages.start["time"]
    if (digits < 0).any() or (digits >= 1000).any():
        return None
    now = (
        before
        + int(digits[0]) * SECOND
        + int(digits[1]) * 10**6
        + int(digits[2]) * 1000
        + int(digits[3])
    )
    if now >= 10**6 * SECOND:
        return None
    return messages.start["time"] + _digits(np.array([now]))[0]


def _digits(times: np.ndarray) -> np.ndarray:
    """(n,) nanoseconds -> (n, 5) digits in base 1000: two of seconds, three of nanoseconds."""
    seconds = times // SECOND
    nanos = times % SECOND
    return np.stack(
        [seconds // 1000, seconds % 1000, nanos // 10**6, nanos // 1000 % 1000, nanos % 1000], 1
    )


class BookMask:
    """The tokens that still lead to an order in the book.

    `allowed` returns them for the next position; `take` follows the sampled token. The model
    decides what happens and when; the mask offers the orders to which it can happen. Trades can hit
    only the front of a queue and take no more than it has. A cancel can name the sizes that rest,
    and then what may be left of such an order: nothing, or the rest of a larger one. (If any size
    were allowed, most would name no resting order, and parts of what was meant to go would stay.)
    The next message comes within ten seconds. So every sampled message is valid.

    A new order may not cross the other side: an exchange reports one that trades by its trades, and
    data that report it otherwise are left out (:func:`lmplay.market.sessions.replay`).
    """

    def __init__(self, messages: Messages, market: Market):
        self.m = messages
        self.market = market
        self.kind = self.side = -1
        self.price: tuple[int, ...] = ()
        self.size = 0
        # (n, 8) numbers of sign, price, size, time of the orders still possible
        self.left: np.ndarray | None = None

    def allowed(self, position: int) -> np.ndarray | None:
        """Return the allowed numbers within the position's group; None if all are allowed."""
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
        """Return whether the size at this position decides which order the message is about."""
        field = self.m.layout[position][0]
        return (field == "size" and self.kind in (EXECUTE, CANCEL)) or (
            field == "ref_size" and self.kind in (EXECUTE_AT, REPLACE)
        )

    def take(self, position: int, number: int) -> None:
        """Follow the sampled token, given as its number within its group."""
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
        """Return the signs (inside 0) or distances (1) at which a new order rests without
        trading."""
        other = self.market.book.best(1 - self.side)
        if other is None:
            return None
        nearest = other - self.market.mid + (1 if self.side == ASK else -1)
        low, high = (nearest, MAX_PRICE) if self.side == ASK else (-MAX_PRICE, nearest)
        # a side has run empty, and the other has come up to the end of what a price can tell
        if low > high:
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
        book = self.market.book
        mid = self.market.mid
        orders: list[Order] = []
        for price in book.prices[self.side]:
            queue = book.queue(self.side, price)
            orders += [next(queue)] if self.kind in (EXECUTE, EXECUTE_AT) else list(queue)
        values = np.array([(o.price - mid, o.size, o.time) for o in orders], np.int64)
        distance = values[:, :1]
        return np.concatenate(
            [distance >= 0, np.abs(distance), values[:, 1:2], _digits(values[:, 2])], 1
        )
