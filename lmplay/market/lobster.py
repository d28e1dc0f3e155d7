"""LOBSTER's files, read and written: a message file, and a book file with the state after each
message.

Message columns: time (seconds after midnight, decimal), type (1 add, 2 partial cancel, 3 delete, 4
trade, 5 trade with a hidden order, 6 cross, 7 halt), order id, size, price times 10000, direction
(1 buy, -1 sell, of the resting order). Book columns, for each level: ask price, ask size, bid
price, bid size; an empty slot is 9999999999 or -9999999999 with size 0. Source:
https://lobsterdata.com/info/DataStructure.php.

A book file shows the best levels only, and the messages are about these only. What rests before the
first message has no add: it is seeded from the first row, one order to a level, with a negative id;
messages about orders that were never added are about these. A level that comes into view, or that
changed out of view and comes back, becomes a cancel of what was there and an add, which no line of
the message file says: they are counted.

The book file is the truth. What happened out of view is unknown: a level that was there may hold
other orders when it returns, so messages about unknown orders then take from what rests there.

One module, because reading and writing must agree on every column.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, NamedTuple

from ..errors import LmplayError, first_line
from .book import ASK, BID, Book, Order
from .events import ADD, CANCEL, EXECUTE, EXECUTE_AT, MAX_SIZE, Event, Market
from .sessions import DataIssues, Errors, Session

NAME = re.compile(r"(?P<ticker>[^_]+)_(?P<day>[^_]+)_(?P<rest>.*)message(?P<levels>_?\d*)\.csv")
TYPES = {1: ADD, 2: CANCEL, 3: CANCEL, 4: EXECUTE}
UNSEEN = {5: "trades with hidden orders", 6: "crosses", 7: "halts"}
EMPTY = 9999999999
PER_DOLLAR = 10_000


class Row(NamedTuple):
    """One line of a message file: time in nanoseconds, price in ticks."""

    time: int
    type: int
    order: int
    size: int
    price: int
    side: int


def sessions(path: Path, tick: int, errors: Errors = "stop") -> list[Session]:
    """Return the sessions of a message file, or of all message files in a folder, by name.

    Args:
        tick: the price grid in units of 1/10000: 100 is a cent.
        errors: "skip" leaves out lines at the beginning that cannot be read, such as a header.

    Raises:
        LmplayError: there is none, or a book file is missing.
    """
    files = (
        [path]
        if path.is_file()
        else sorted(p for p in path.glob("*.csv") if NAME.fullmatch(p.name))
    )
    if not files:
        raise LmplayError(f"{path}: there is no message file (TICKER_DAY_..._message_LEVELS.csv)")
    return [_session(file, tick, errors) for file in files]


def _session(path: Path, tick: int, errors: Errors) -> Session:
    match = NAME.fullmatch(path.name)
    if match is None:
        raise LmplayError(f"{path}: a message file's name is TICKER_DAY_..._message_LEVELS.csv")
    book_path = path.with_name(path.name.replace("message", "orderbook"))
    if not book_path.is_file():
        raise LmplayError(f"{path}: its book file is missing: {book_path.name}")
    start, view, first_line = _first(path, book_path, tick, errors)
    seeds = [
        Order(-1 - i, side, price, min(size, MAX_SIZE), start.time)
        for i, (side, price, size) in enumerate(
            (s, p, v) for s in (BID, ASK) for p, v in view[s].items()
        )
    ]

    def events(market: Market, issues: DataIssues) -> Iterator[tuple[int, Event]]:
        # The first message is part of the first row's state already.
        if first_line > 1:
            issues.counts["skipped: cannot be read"] += first_line - 1
        levels = Levels(market.book, view, next_seed=-1 - len(seeds))
        yield from _events(path, book_path, tick, issues, levels, first_line)

    return Session(path.name, match["ticker"], start.time, seeds, events, tick)


def _rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Yield the number and the fields of each line.

    Raises:
        LmplayError: it is no text, or no CSV.
    """
    line = 0
    try:
        with open(path, newline="", encoding="utf-8") as file:
            for line, fields in enumerate(csv.reader(file), 1):
                yield line, fields
    except (UnicodeDecodeError, csv.Error) as e:
        raise LmplayError(f"{path}: line {line + 1}: it cannot be read: {first_line(e)}") from e


def _first(
    path: Path, book_path: Path, tick: int, errors: Errors
) -> tuple[Row, list[dict[int, int]], int]:
    """Return the first message, the state after it, and the number of their line."""
    for (line, fields), (_, state) in zip(_rows(path), _rows(book_path), strict=False):
        try:
            return _row(fields, tick, path, line), _levels(state, tick, book_path, line), line
        except LmplayError:
            if errors == "stop":
                raise
    raise LmplayError(f"{path}: it has no line that can be read, or {book_path.name} has none")


def _events(
    path: Path,
    book_path: Path,
    tick: int,
    issues: DataIssues,
    levels: Levels,
    first: int,
) -> Iterator[tuple[int, Event]]:
    book_rows = _rows(book_path)
    line = 0
    for line, fields in _rows(path):
        _, state = next(book_rows, (0, None))
        if state is None:
            raise LmplayError(
                f"{book_path}: it ends after line {line - 1}, its message file goes on"
            )
        if line <= first:
            continue
        try:
            row = _row(fields, tick, path, line)
            after = _levels(state, tick, book_path, line)
        except LmplayError:
            if issues.errors == "stop":
                raise
            issues.counts["skipped: cannot be read"] += 1
            continue
        if row.type in UNSEEN:
            issues.counts[UNSEEN[row.type]] += 1
        elif row.type not in TYPES:
            issues.wrong(line, "type", f"there is no type {row.type}")
        else:
            for event in levels.events_of(row, issues):
                yield line, event
        for event in levels.corrections(row, after, tick, issues, line):
            yield line, event
    if next(book_rows, None) is not None:
        raise LmplayError(f"{path}: it ends after line {line}, its book file goes on")


class Levels:
    """What the two files together say about each level.

    before: price -> volume by side, as the book file showed it last.
    clipped: levels with an order or a stand-in whose size is above MAX_SIZE, and was cut.
    unsure: levels that were out of view, so that other orders than ours may rest there.
    """

    def __init__(self, book: Book, view: list[dict[int, int]], next_seed: int):
        self.book = book
        self.before = view
        self.clipped = {
            (side, p) for side in (BID, ASK) for p, v in view[side].items() if v > MAX_SIZE
        }
        self.unsure: set[tuple[int, int]] = set()
        self.next_seed = next_seed

    def events_of(self, row: Row, issues: DataIssues) -> list[Event]:
        """Return the events of a message: one, or several if several of our orders represent it."""
        kind = TYPES[row.type]
        level = (row.side, row.price)
        plain = Event(row.time, kind, row.side, row.price, row.size, row.order)
        if kind == ADD:
            if row.size > MAX_SIZE:
                self.clipped.add(level)
            return [plain]
        known = self.book.orders.get(row.order)
        if known is not None and (row.size <= known.size or level not in self.unsure):
            return [plain]
        rests = [] if known is None else [known]
        rests += [o for o in self.book.queue(*level) if o.id < 0 and o is not known]
        if level in self.unsure:
            rests += [o for o in self.book.queue(*level) if o.id >= 0 and o is not known]
        if not rests:
            if self._in_view(row.side, row.price, self.before):
                return [plain]  # reported: the message contradicts the book file
            issues.counts["about orders out of view"] += 1
            return []
        events = []
        left = row.size
        for order in rests:
            take = min(left, order.size)
            events.append(plain._replace(size=take, order=order.id))
            left -= take
            if not left:
                break
        if left:
            issues.counts["sizes beyond what is known to rest"] += 1
        return events

    def corrections(
        self,
        row: Row,
        after: list[dict[int, int]],
        tick: int,
        issues: DataIssues,
        line: int,
    ) -> Iterator[Event]:
        """Yield the events that make the book equal to its file, and remember the view.

        If a level was in view before and differs, the files contradict each other.
        """
        touched = (row.side, row.price) if row.type in TYPES else None
        for side in (BID, ASK):
            for price in list(self.book.prices[side]):
                if not self._in_view(side, price, after):
                    self.unsure.add((side, price))
                elif not self.book.beyond(price):
                    yield from self._removals(side, price, after, touched, tick, issues, line, row)
        for side in (BID, ASK):
            for price, volume in after[side].items():
                level = (side, price)
                if price in self.book.volume[side] or self.book.beyond(price):
                    continue
                is_known = price in self.before[side] or level == touched
                if is_known and level not in self.clipped | self.unsure:
                    text = f"the book file has {volume} at {price * tick}, the messages make 0"
                    issues.wrong(line, "book file disagrees", text)
                if self.book.crosses(side, price):
                    issues.counts["levels that would trade at once"] += 1
                    continue
                issues.counts["levels that came into view"] += 1
                if volume > MAX_SIZE:
                    self.clipped.add(level)
                else:
                    self.clipped.discard(level)
                yield Event(row.time, ADD, side, price, min(volume, MAX_SIZE), self.next_seed)
                self.next_seed -= 1
        gone = {x for x in self.unsure | self.clipped if x[1] not in self.book.volume[x[0]]}
        self.unsure -= gone
        self.clipped -= gone
        self.before = after

    def _in_view(self, side: int, price: int, after: list[dict[int, int]]) -> bool:
        """Return whether the book file would show a level."""
        shown = after[side]
        if not shown or len(shown) < len(self.before[side]):
            return True  # all that there is
        return price >= min(shown) if side == BID else price <= max(shown)

    def _removals(
        self,
        side: int,
        price: int,
        after: list[dict[int, int]],
        touched: tuple[int, int] | None,
        tick: int,
        issues: DataIssues,
        line: int,
        row: Row,
    ) -> Iterator[Event]:
        """Yield the cancels of a level that is in view with another volume than the file's."""
        level = (side, price)
        mine = self.book.volume[side].get(price, 0)
        theirs = after[side].get(price, 0)
        if mine == theirs or (level in self.clipped and theirs > mine):
            return  # a part of a large size is missing here, as it must be
        is_known = price in self.before[side] or level == touched
        if is_known and level not in self.clipped | self.unsure:
            text = f"the book file has {theirs} at {price * tick}, the messages make {mine}"
            issues.wrong(line, "book file disagrees", text)
        issues.counts["levels that changed out of view"] += 1
        for order in list(self.book.queue(side, price)):
            yield Event(row.time, CANCEL, side, price, order.size, order.id)


def _row(fields: Sequence[str], tick: int, path: Path, line: int) -> Row:
    if len(fields) < 6:  # some files have a seventh, empty one
        raise LmplayError(
            f"{path}: line {line}: 6 columns are wanted, it has {len(fields)}: is the file "
            "truncated?"
        )
    try:
        kind, order, size, price, direction = (int(f) for f in fields[1:6])
        time = parse_time(fields[0])
    except ValueError as e:
        raise LmplayError(f"{path}: line {line}: {e}") from e
    if kind in TYPES and price % tick:
        raise LmplayError(f"{path}: line {line}: the price {price} is off the grid of {tick}")
    return Row(time, kind, order, size, price // tick, BID if direction == 1 else ASK)


def _levels(fields: Sequence[str], tick: int, path: Path, line: int) -> list[dict[int, int]]:
    """Return price (ticks) -> volume, of the bids and of the asks."""
    if len(fields) % 4:
        raise LmplayError(
            f"{path}: line {line}: it has {len(fields)} columns, no multiple of 4: is it truncated?"
        )
    try:
        values = [int(f) for f in fields]
    except ValueError as e:
        raise LmplayError(f"{path}: line {line}: {e}") from e
    sides: list[dict[int, int]] = [{}, {}]
    for side, at in ((ASK, 0), (BID, 2)):
        for price, size in zip(values[at::4], values[at + 1 :: 4], strict=True):
            if size and abs(price) != EMPTY:
                if price % tick:
                    raise LmplayError(
                        f"{path}: line {line}: the price {price} is off the grid of {tick}"
                    )
                sides[side][price // tick] = size
    return sides


def parse_time(text: str) -> int:
    """Return nanoseconds for decimal seconds, without floating point."""
    seconds, _, decimals = text.partition(".")
    return int(seconds) * 10**9 + int((decimals + "0" * 9)[:9] or 0)


class Writer:
    """Writes events, and the states after them, as LOBSTER's pair of files.

    A replace becomes a delete and an add, as in LOBSTER's own files. Both files appear, complete,
    when the writer is closed.
    """

    def __init__(self, folder: Path, ticker: str, day: str, levels: int = 10, tick: int = 100):
        folder.mkdir(parents=True, exist_ok=True)
        self.levels = levels
        self.tick = tick
        self.paths = [
            folder / f"{ticker}_{day}_0_0_{kind}_{levels}.csv" for kind in ("message", "orderbook")
        ]
        self._temporary = [p.with_suffix(".tmp") for p in self.paths]
        self._files: list[IO[str]] = [open(p, "w", newline="") for p in self._temporary]  # noqa: SIM115
        self._messages, self._books = (csv.writer(f, lineterminator="\n") for f in self._files)

    def write(self, step: Event, left: int, book: Book) -> None:
        """Write one of :meth:`Market.steps` after it was applied; `left` is what is left of its
        order."""
        kind = {ADD: 1, EXECUTE: 4, EXECUTE_AT: 4, CANCEL: 2 if left else 3}[step.kind]
        time = f"{step.time // 10**9}.{step.time % 10**9:09d}"
        direction = 1 if step.side == BID else -1
        self._messages.writerow(
            [time, kind, step.order, step.size, step.price * self.tick, direction]
        )
        self._books.writerow(self._state(book))

    def _state(self, book: Book) -> list[int]:
        asks = book.depth(ASK, self.levels)
        bids = book.depth(BID, self.levels)
        out = []
        for i in range(self.levels):
            ask, bid = (side[i] if i < len(side) else None for side in (asks, bids))
            out += [ask[0] * self.tick, ask[1]] if ask else [EMPTY, 0]
            out += [bid[0] * self.tick, bid[1]] if bid else [-EMPTY, 0]
        return out

    def close(self) -> None:
        for file, temporary, path in zip(self._files, self._temporary, self.paths, strict=True):
            file.close()
            if temporary.stat().st_size:
                temporary.replace(path)
            else:  # nothing happened in this market: there is no file to read
                temporary.unlink()
