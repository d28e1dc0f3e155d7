"""NASDAQ's ITCH 5.0 through the package itchfeed: the messages that change the displayed book of
chosen tickers.

Prices are in units of 1/10000, times in nanoseconds since midnight. Trades with hidden orders,
crosses and system events do not change the book and are counted.
"""

from __future__ import annotations

import importlib
import importlib.util
import struct
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from ..errors import LmplayError, first_line
from .book import ASK, BID
from .events import ADD, CANCEL, EXECUTE, EXECUTE_AT, REPLACE, Event, Market
from .sessions import DataIssues, Session

HEADER = 2  # bytes before each message: a zero and the message's length


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
    for number, message in enumerate(_messages(path, issues), 1):
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


def _messages(path: Path, issues: DataIssues) -> Iterator[Any]:
    parser = importlib.import_module("itch.parser").MessageParser()
    number = 0
    consumed = 0
    with open(path, "rb") as file:
        try:
            for number, message in enumerate(parser.parse_file(file), 1):  # noqa: B007
                consumed += HEADER + message.message_size
                yield message
                if message.message_type == b"S" and message.event_code == b"C":
                    return  # the end of the day's messages
        except (ValueError, KeyError, IndexError, struct.error) as e:
            raise LmplayError(
                f"{path}: after message {number}: this is not ITCH 5.0: {first_line(e)}"
            ) from e
    if consumed < path.stat().st_size and _ends_inside_a_message(path):
        issues.wrong(
            number + 1,
            "truncated",
            "the file ends in the middle of a message: is it truncated?",
        )


def _ends_inside_a_message(path: Path) -> bool:
    """Walk over the messages by their lengths: the package's reader drops an incomplete last."""
    with open(path, "rb") as file:
        while header := file.read(HEADER):
            if len(header) < HEADER or len(file.read(header[1])) < header[1]:
                return True
    return False


def _ticks(price: int, tick: int, issues: DataIssues, number: int) -> int | None:
    if price % tick:
        issues.wrong(number, "price", f"the price {price} is off the grid of {tick}")
        return None
    return price // tick
