"""Record what happens in markets: a pair of LOBSTER files each, and one parquet file for all."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from ..files import atomic_write
from .events import ADD, KINDS, Event, Market
from .lobster import Writer

COLUMNS = ("market", "message", "time", "kind", "side", "price", "size", "order", "left")


class EventRecorder:
    """Applies events to a market and records their steps.

    `rows` has one row per step: market, number of the message, fields of the event, and what is
    left of its order.
    """

    def __init__(
        self, folder: Path, market: Market, ticker: str, name: str, number: int = 0, tick: int = 100
    ):
        self.market = market
        self.number = number
        self.writer = Writer(folder, ticker, name, tick=tick)
        self.rows: list[tuple[int, int, int, str, str, int, int, int, int]] = []
        self.messages = 0

    def apply(self, event: Event) -> None:
        for step in self.market.steps(event):
            self.market.apply(step)
            order = self.market.book.orders.get(step.order)
            left = order.size if order is not None else 0
            self.writer.write(step, left, self.market.book)
            self.rows.append(
                (
                    self.number,
                    self.messages,
                    step.time,
                    KINDS[step.kind],
                    "bid" if step.side == 0 else "ask",
                    step.price,
                    step.size,
                    step.order,
                    left if step.kind != ADD else step.size,
                )
            )
        self.market.next_id = max(self.market.next_id, event.order + 1, event.new + 1)
        self.messages += 1

    def close(self) -> None:
        self.writer.close()


def write_parquet(path: Path, tapes: list[EventRecorder]) -> None:
    """Write the rows of all recorders atomically."""
    frame = pd.DataFrame([row for tape in tapes for row in tape.rows], columns=list(COLUMNS))
    with atomic_write(path) as temporary:
        frame.to_parquet(temporary, index=False)
