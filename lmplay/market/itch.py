"""NASDAQ's ITCH 5.0 through the package itchfeed: the messages that change the displayed book of
chosen tickers.

Prices are in units of 1/10000, times in nanoseconds since midnight. Trades with hidden orders,
crosses and system events do not change the book and are counted.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from ..errors import LmplayError
from .book import ASK, BID
from .events import ADD, CANCEL, EXECUTE, EXECUTE_AT, REPLACE, Event, Market
from .sessions import DataIssues, Session


def sessions(path: Path, tickers: tuple[str, ...], tick: int) -> list[Session]:
    """Return one session per ticker; each reads the file once.

    Raises:
        LmplayError: there is no such file, or the reader is not installed.
    """
    if not path.is_file():
        raise LmplayError(f"{path}: there is no such file")
    if importlib.util.find_spec("itch") is None:
        raise LmplayError("ITCH files need a reader: pip install 'lmplay[market]'")
    return [
        Session(f"{path.name} {t}", t, 0, [], partial(_events, path, t, tick), tick)
        for t in tickers
    ]


def _events(
    path: Path, ticker: str, tick: int, market: Market, issues: DataIssues
) -> Iterator[tuple[int, Event]]:
    orders = market.book.orders
    mine: set[int] = set()  # every order of this ticker that was ever added
    for number, message in enumerate(_messages(path), 1):
        kind = message.message_type
        if kind in (b"A", b"F"):
            if message.stock.decode().strip() != ticker:
                continue
            mine.add(message.order_reference_number)
            side = BID if message.buy_sell_indicator == b"B" else ASK
            price = _ticks(message.price, tick, issues, number)
            if price is not None:
                yield (
                    number,
                    Event(
                        message.timestamp,
                        ADD,
                        side,
                        price,
                        message.shares,
                        message.order_reference_number,
                    ),
                )
            continue
        id = getattr(message, "order_reference_number", None)
        if id not in mine:
            continue
        order = orders.get(id)
        side, price, left = (order.side, order.price, order.size) if order else (BID, 0, 1)
        event = Event(message.timestamp, CANCEL, side, price, left, id)  # a delete
        if kind == b"U":
            price = _ticks(message.price, tick, issues, number)
            if price is not None:  # else the old order goes, and the new one never comes
                id = message.new_order_reference_number
                mine.add(id)
                event = event._replace(kind=REPLACE, price=price, size=message.shares, new=id)
        elif kind == b"X":
            event = event._replace(size=message.cancelled_shares)
        elif kind == b"E":
            event = event._replace(kind=EXECUTE, size=message.executed_shares)
        elif kind == b"C":
            at = _ticks(message.execution_price, tick, issues, number)
            event = event._replace(
                kind=EXECUTE_AT, size=message.executed_shares, price=price if at is None else at
            )
        elif kind != b"D":
            issues.counts[f"messages of type {kind.decode()}"] += 1
            continue
        yield number, event


def _messages(path: Path) -> Iterator[Any]:
    parser = importlib.import_module("itch.parser").MessageParser()
    with open(path, "rb") as file:
        try:
            yield from parser.parse_file(file)
        except ValueError as e:
            raise LmplayError(f"{path}: this is not ITCH 5.0: {e}") from e


def _ticks(price: int, tick: int, issues: DataIssues, number: int) -> int | None:
    if price % tick:
        issues.wrong(number, "price", f"the price {price} is off the grid of {tick}")
        return None
    return price // tick
