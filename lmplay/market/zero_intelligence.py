"""A market of random orders, whose rates depend on the price alone.

:func:`events` is the model of Cont, Stoikov and Talreja (Operations Research 58, 2010) on a real
book. The built-in generator adds traders that split large orders (Lillo, Mike and Farmer 2005), a
clock that runs fast and slow, and realistic sizes. :func:`fit` measures the rates of a session: a
baseline that knows all rates and nothing about the order of events.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np

from ..errors import LmplayError
from .book import ASK, BID, Order
from .events import ADD, CANCEL, EXECUTE, EXECUTE_AT, MAX_SIZE, REPLACE, Event, Market, Message
from .sessions import DataIssues, Session

# Cont, Stoikov and Talreja's table 1, by ticks from the opposite best price; further away its power
# law, and the last.
CST_LIMIT = (1.85, 1.51, 1.09, 0.88, 0.77, *(1.92 / i**0.52 for i in range(6, 21)))
CST_CANCEL = (0.71, 0.81, 0.68, 0.56, 0.47, 0.47, 0.37, 0.30, 0.26, 0.19)
CST_MARKET = 0.94

TICKER = "ZI"
OPEN = 34_200 * 10**9
CLOSE = 57_600 * 10**9
PRICE = 10_000  # ticks, where the embedded market opens


@dataclass(frozen=True)
class Rates:
    """Events per second.

    limit: limit orders by ticks from the opposite best price (the first is one tick; the last goes
    on). cancel: cancels of each resting order, by the same distance.
    market: market orders, by the side that they hit.
    """

    limit: tuple[np.ndarray, np.ndarray]
    cancel: tuple[np.ndarray, np.ndarray]
    market: tuple[float, float]
    sizes: np.ndarray | None = None  # drawn from; None for the embedded generator's
    market_sizes: np.ndarray | None = None


def cst() -> Rates:
    limit = np.array(CST_LIMIT)
    cancel = np.array(CST_CANCEL)
    return Rates((limit, limit), (cancel, cancel), (CST_MARKET, CST_MARKET))


@dataclass(frozen=True)
class Realism:
    """What the built-in generator adds to the rates; Realism.none() adds nothing."""

    parents: int = 3  # large orders at a time, whose children the market orders are
    tail: float = 1.5  # Pareto exponent of their lengths; 0 for signs at random
    # (seconds, deviation) of log-OU factors
    clock: tuple[tuple[float, float], ...] = (
        (1.0, 0.8),
        (120.0, 0.6),
    )
    partial: float = 0.002  # of the events: a part of an order is cancelled
    replace: float = 0.03
    day: bool = True  # more at the open and the close

    @staticmethod
    def none() -> Realism:
        return Realism(tail=0.0, clock=(), partial=0.0, replace=0.0, day=False)


def session(
    seed: int, seconds: float, realism: Realism | None = None, ticker: str = TICKER
) -> Session:
    """Return the built-in generator's market from 9:30. Fewer seconds give the start of the same
    market."""
    seeds = [
        Order(
            1 + 2 * (20 * k + i) + side,
            side,
            PRICE - 1 - i if side == BID else PRICE + i,
            100,
            OPEN,
        )
        for k in range(3)
        for i in range(20)
        for side in (BID, ASK)
    ]

    def source(market: Market, issues: DataIssues) -> Iterator[tuple[int, Event]]:
        end = OPEN + int(seconds * 10**9)
        numbered = enumerate(
            events(market, cst(), np.random.default_rng(seed), realism or Realism()), 1
        )
        for number, event in numbered:
            if event.time >= end:
                return
            yield number, event

    return Session(f"generator {seed}", ticker, OPEN, seeds, source)


@dataclass
class _Signs:
    """Which side the next market order hits: the parts of large orders that are split."""

    realism: Realism
    random: np.random.Generator
    parents: list[list[int]] = field(default_factory=list)  # [side, children left]

    def next(self) -> int:
        r = self.realism
        if not r.tail:
            return int(self.random.integers(2))
        while len(self.parents) < r.parents:
            length = math.ceil((1 - self.random.random()) ** (-1 / r.tail))
            self.parents.append([int(self.random.integers(2)), length])
        which = int(self.random.integers(r.parents))
        side = self.parents[which][0]
        self.parents[which][1] -= 1
        if not self.parents[which][1]:
            del self.parents[which]
        return side


def events(
    market: Market, rates: Rates, random: np.random.Generator, realism: Realism
) -> Iterator[Event]:
    """Yield events without end (Gillespie's algorithm). Apply each before asking for the next."""
    book = market.book
    signs = _Signs(realism, random)
    clock = np.zeros(len(realism.clock))
    limit_total = [float(rates.limit[side].sum()) for side in (BID, ASK)]
    limit_sums = [np.cumsum(rates.limit[side]) for side in (BID, ASK)]
    cancel = [rates.cancel[side].tolist() for side in (BID, ASK)]
    time = float(market.time)
    while True:
        opposite = [book.best(ASK), book.best(BID)]
        for side in (BID, ASK):
            if opposite[side] is None:
                opposite[side] = market.mid + (1 if side == BID else -1)
        by_level: list[list[tuple[int, float]]] = []
        for side in (BID, ASK):
            last = len(cancel[side]) - 1
            other = opposite[side] or 0
            levels = book.levels[side]
            by_level.append(
                [
                    (p, len(q) * cancel[side][min(abs(p - other) - 1, last)])
                    for p, q in levels.items()
                ]
            )
        cancels = [sum(rate for _, rate in levels) for levels in by_level]
        market_rate = [rates.market[side] if book.prices[side] else 0.0 for side in (BID, ASK)]
        total = sum(limit_total) + sum(cancels) + sum(market_rate)
        wait = random.exponential(1 / total) / _speed(clock, realism, time)
        # the factors' exact step (Ornstein-Uhlenbeck)
        for i, (tau, deviation) in enumerate(realism.clock):
            keep = math.exp(-wait / tau)
            clock[i] = (
                clock[i] * keep + deviation * math.sqrt(1 - keep * keep) * random.standard_normal()
            )
        time += wait * 1e9
        now = max(int(time), market.time + 1)
        u = random.random() * total
        for side in (BID, ASK):
            if u < limit_total[side]:
                distance = 1 + int(np.searchsorted(limit_sums[side], u, side="right"))
                price = (opposite[side] or 0) + (-distance if side == BID else distance)
                yield Event(now, ADD, side, price, _size(rates.sizes, random), market.next_id)
                break
            u -= limit_total[side]
            if u < cancels[side]:
                yield _cancel(market, side, by_level[side], u, now, realism, random)
                break
            u -= cancels[side]
            if u < market_rate[side]:
                hit = signs.next() if realism.tail else side
                yield from _trade(market, hit if book.prices[hit] else side, now, rates, random)
                break
            u -= market_rate[side]


def _speed(clock: np.ndarray, realism: Realism, time: float) -> float:
    variance = sum(deviation**2 for _, deviation in realism.clock)
    speed = math.exp(float(clock.sum()) - variance / 2) if len(clock) else 1.0
    if realism.day:  # 1.5 at the open and the close, .75 at noon: 1 in the mean
        part = (time - OPEN) / (CLOSE - OPEN)
        speed *= 0.75 + 3 * (part - 0.5) ** 2
    return speed


def _cancel(
    market: Market,
    side: int,
    levels: list[tuple[int, float]],
    u: float,
    now: int,
    realism: Realism,
    random: np.random.Generator,
) -> Event:
    for price, rate in levels:  # noqa: B007 (the last one stands where rounding leaves a rest)
        if u < rate:
            break
        u -= rate
    queue = list(market.book.queue(side, price))
    order = queue[int(random.integers(len(queue)))]
    v = random.random()
    if v < realism.replace * 2:  # cancels are half of all events
        new = price + int(random.integers(-2, 3))
        if not market.book.crosses(side, new):
            size = _size(None, random)
            return Event(now, REPLACE, side, new, size, order.id, market.next_id)
    if v > 1 - realism.partial * 2 and order.size > 1:
        return Event(now, CANCEL, side, price, int(random.integers(1, order.size)), order.id)
    return Event(now, CANCEL, side, price, order.size, order.id)


def _trade(
    market: Market, side: int, now: int, rates: Rates, random: np.random.Generator
) -> Iterator[Event]:
    """Yield a market order's trades at the best price of `side`."""
    price = market.book.best(side)
    assert price is not None
    left = _size(rates.market_sizes, random)
    while left and (front := market.book.front(side, price)) is not None:
        taken = min(left, front.size)
        left -= taken
        yield Event(now, EXECUTE, side, price, taken, front.id)


def _size(sizes: np.ndarray | None, random: np.random.Generator) -> int:
    """Return one of `sizes`; without them half are 100, a tenth 200 to 500, the rest log-normal."""
    if sizes is not None:
        return int(sizes[int(random.integers(len(sizes)))])
    u = random.random()
    if u < 0.5:
        return 100
    if u < 0.6:
        return 100 * int(random.integers(2, 6))
    return min(MAX_SIZE, max(1, round(random.lognormal(3.6, 1.1))))


def fit(replayed: Iterable[tuple[Event, Message, Market]], reach: int = 999) -> Rates:
    """Return the rates of a session's replay, by counting: events per second, or per order and
    second.

    Distances are those before an event, up to `reach` ticks. A replace counts as a cancel and an
    add.

    Raises:
        LmplayError: there are no events, or they take no time.
    """
    limit = np.zeros((2, reach))
    gone = np.zeros((2, reach))
    exposure = np.zeros((2, reach))  # orders times seconds
    trades = np.zeros(2)
    sizes = []
    trade_sizes = []
    seconds = 0.0
    before = None
    every = 16
    state = [np.zeros(reach), np.zeros(reach)]
    for number, (event, message, market) in enumerate(replayed):
        # The book's shape is sampled at every 16th event, and the distances are counted from the
        # state at hand.
        if number % every == 0:
            state = [_counts(market, side, reach) for side in (BID, ASK)]
        if before is not None:
            wait = (event.time - before) / 1e9
            seconds += wait
            for side in (BID, ASK):
                exposure[side] += state[side] * wait
        before = event.time
        other = market.book.best(1 - message.side)
        if other is None:
            continue
        mid = event.price - message.price
        if event.kind in (ADD, REPLACE):
            limit[message.side, min(abs(event.price - other), reach) - 1] += 1
            sizes.append(message.size)
        if event.kind in (CANCEL, REPLACE):
            price = event.price if event.kind == CANCEL else mid + message.ref_price
            gone[message.side, min(max(abs(price - other), 1), reach) - 1] += 1
        if event.kind in (EXECUTE, EXECUTE_AT):
            trades[message.side] += 1
            trade_sizes.append(message.size)
    if not sizes or seconds <= 0:
        raise LmplayError(
            "zero-intelligence markets: no order is added in the part that is not held out: no "
            "rates"
        )
    # Where few orders ever were, a ratio is noise: the side's total rate is blended in, with the
    # weight of 10 seconds.
    overall = gone.sum(1, keepdims=True) / np.maximum(exposure.sum(1, keepdims=True), 1e-9)
    cancel = (gone + 10 * overall) / (exposure + 10)
    return Rates(
        (limit[BID] / seconds, limit[ASK] / seconds),
        (cancel[BID], cancel[ASK]),
        (trades[BID] / seconds, trades[ASK] / seconds),
        np.array(sizes),
        np.array(trade_sizes or [1]),
    )


def _counts(market: Market, side: int, reach: int) -> np.ndarray:
    """Return (reach,) resting orders of a side by ticks from the opposite best price."""
    out = np.zeros(reach)
    other = market.book.best(1 - side)
    for price, queue in market.book.levels[side].items():
        if other is not None:
            out[min(abs(price - other), reach) - 1] += len(queue)
    return out
