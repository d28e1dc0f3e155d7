"""A simulation from a trained run: held-out data to begin with, the markets' way through time, the files it leaves."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np

from ..errors import LmplayError
from . import zero_intelligence
from .data import Told
from .decode import Reader
from .events import DAY, Market
from .messages import Messages
from .record import Tape, write_parquet
from .sessions import Findings, Session
from .simulate import Settings, Simulator, Tally

MINUTE = 60 * 10**9
REPORT = "report.json"
Show = Callable[[float, str], None]  # (progress in [0, 1], a line)


@dataclass(frozen=True)
class Extent:
    """How many markets, and how far each is simulated: minutes of its own time, and a number of messages at most.

    `context`: how many held-out messages the model reads before it samples; None: as many as it holds.
    """

    markets: int = 8
    minutes: float = 10.0
    messages: int | None = None
    context: int | None = None


def beginnings(told: Told, markets: int) -> list[int]:
    """Numbers of held-out messages, evenly apart, before which the markets begin.

    Raises:
        LmplayError: fewer messages are held out.
    """
    held = len(told.messages) - told.start
    if held < markets or told.start < 1:
        raise LmplayError(f"{told.session.name}: {held} messages are held out, too few to begin {markets} markets from")
    return [told.start + i * held // markets for i in range(markets)]


def context_of(told: Told, messages: Messages, begin: int, length: int, wanted: int | None = None) -> np.ndarray:
    """(n, width) ids of the messages before a beginning: as many as wanted, or as `length` positions hold beside a sink
    and one more message.

    Raises:
        LmplayError: more are wanted than that.
    """
    most = max(1, (length - 1) // messages.width - 1)
    if wanted is not None and wanted > most:
        raise LmplayError(f"--context {wanted}: the model holds {most} messages beside the one that is sampled")
    return messages.encode_messages(told.messages[max(0, begin - (wanted or most)) : begin])


def simulate(
    told: Told, messages: Messages, reader: Reader, length: int, extent: Extent, settings: Settings, folder: Path,
    show: Show,
) -> dict[str, Any]:  # fmt: skip
    """Simulate, write the files to `folder`/generated, and return what there is to tell.

    The held-out part is written to `folder`/real first: what ends early can be compared as well. What an earlier
    simulation left in `folder` goes when this one can begin, or `score` would compare with it.

    An interrupt (Ctrl-C) ends it after the round: what was simulated until then is written, and "interrupted" is True.

    Raises:
        LmplayError: too many messages in a row were rejected; what was simulated until then is written as well.
    """
    begins = beginnings(told, extent.markets)
    markets = told.markets(begins)
    contexts = [context_of(told, messages, b, length, extent.context) for b in begins]
    simulator = Simulator(reader, messages, markets, contexts, settings)
    for part in ("generated", "baseline"):
        clear(folder / part)
    write_real(told, folder / "real")
    folder = folder / "generated"
    (folder / REPORT).unlink(missing_ok=True)
    ends = [min(m.time + int(extent.minutes * MINUTE), DAY) for m in markets]
    starts = [m.time for m in markets]
    tapes = [_tape(folder, m, told.session, i) for i, m in enumerate(markets)]
    began, read_before, interrupted, shown = time.perf_counter(), reader.seconds, False, 0.0
    failure: LmplayError | None = None
    try:
        active = [True] * len(markets)
        with deferred_interrupt() as asked:
            while any(active) and not asked:
                for b, _, event in simulator.round(active):
                    if event.time < ends[b]:
                        tapes[b].apply(event)
                    if event.time >= ends[b] or tapes[b].messages == extent.messages:
                        active[b] = False
                if time.perf_counter() - shown > 1 or not any(active):
                    shown = time.perf_counter()
                    progress = [
                        max((m.time - s) / (e - s), t.messages / extent.messages if extent.messages else 0.0)
                        for m, s, e, t in zip(markets, starts, ends, tapes, strict=True)
                    ]
                    show(min(progress), _line(simulator, markets, shown - began))
            interrupted = bool(asked)
    except KeyboardInterrupt:
        interrupted = True
    except LmplayError as e:
        failure = e
    seconds = time.perf_counter() - began
    for tape in tapes:
        tape.close()
    write_parquet(folder / "events.parquet", tapes)
    if failure is not None:
        raise LmplayError(f"{failure}; what was simulated until then is in {folder}") from failure
    happened = sum(t.messages for t in tapes)
    market_seconds = sum((m.time - s) / 1e9 for m, s in zip(markets, starts, strict=True))
    return {
        "interrupted": interrupted, "markets": extent.markets, "settings": asdict(settings),
        "cache": reader.cached, "messages": happened, "sampled": simulator.sampled,
        "prices_redrawn": simulator.redrawn, "prices_undecided": simulator.undecided,
        "seconds": seconds, "messages_per_second": happened / seconds,
        "tokens_per_second": messages.width * happened / seconds,
        "seconds_in_the_model": reader.seconds - read_before,
        "share_outside_the_model": 1 - (reader.seconds - read_before) / seconds,
        "market_seconds": market_seconds, "messages_per_market_second": happened / max(market_seconds, 1e-9),
        "validity": simulator.tally.table(),
        "context": min(len(c) for c in contexts),
        "valid_by_round": simulator.tally.over_time(_stretch(length, messages, simulator.tally)),
    }  # fmt: skip


def _stretch(length: int, messages: Messages, tally: Tally) -> int:
    """Rounds over which validity is told: half a context, or as many of these as leave ten rows."""
    half = max(1, (length - 1) // messages.width // 2)
    return half * -(-len(tally.by_round) // (10 * half))


def _line(simulator: Simulator, markets: list[Market], seconds: float) -> str:
    of_all = simulator.tally.table().get("all", {})
    mids = ", ".join(str(m.mid) for m in markets[:3]) + (", ..." if len(markets) > 3 else "")
    return (
        f"{simulator.happened} messages · {simulator.happened / seconds:.1f}/s · valid {of_all.get('strict', 0):.1%}, "
        f"with repairs {of_all.get('after_repair', 0):.1%} · mid {mids}"
    )


def _tape(folder: Path, market: Market, session: Session, number: int) -> Tape:
    return Tape(folder, market, session.ticker, f"market{number:02}", number, session.tick)


def clear(folder: Path) -> None:
    """Take away what an earlier simulation left, of which `score` would read the files that are not written again.

    Nothing else: somebody's own market may lie in the same folder.
    """
    ours = "*_market[0-9][0-9]*_0_0_{}_*.{}"
    patterns = [ours.format(kind, end) for kind in ("message", "orderbook") for end in ("csv", "tmp")]
    for pattern in (*patterns, "events.parquet"):
        for path in folder.glob(pattern):
            path.unlink()


@contextmanager
def deferred_interrupt() -> Iterator[list[int]]:
    """Ctrl-C is put into the list instead of striking in the middle of a file; a second one strikes."""
    asked: list[int] = []

    def ask(signum: int, frame: FrameType | None) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(signum)

    if threading.current_thread() is not threading.main_thread():  # only the main thread hears signals
        yield asked
        return
    before = signal.signal(signal.SIGINT, ask)
    try:
        yield asked
    finally:
        signal.signal(signal.SIGINT, before)


def write_real(told: Told, folder: Path) -> None:
    """The held-out part as it was."""
    clear(folder)
    [market] = told.markets([told.start])
    tape = _tape(folder, market, told.session, 0)
    for event in told.events[told.start :]:
        tape.apply(event)
    tape.close()
    write_parquet(folder / "events.parquet", [tape])


def write_baseline(told: Told, extent: Extent, folder: Path, seed: int) -> None:
    """Zero-intelligence markets from the same beginnings over the same time, at the rates of what is not held out."""
    clear(folder)
    rates = zero_intelligence.fit(islice(told.replay(), told.start))
    tapes = []
    for i, market in enumerate(told.markets(beginnings(told, extent.markets))):
        tape = _tape(folder, market, told.session, i)
        end = min(market.time + int(extent.minutes * MINUTE), DAY)
        random = np.random.default_rng([seed, i])
        for event in zero_intelligence.events(market, rates, random, zero_intelligence.Realism.none()):
            if event.time >= end or tape.messages == extent.messages:
                break
            if not market.book.beyond(event.price):
                tape.apply(event)
        tape.close()
        tapes.append(tape)
    write_parquet(folder / "events.parquet", tapes)


def write_generated(seed: int, minutes: float, folder: Path) -> int:
    """The embedded generator's market; returns how many messages it has."""
    clear(folder)
    session = zero_intelligence.session(seed, 60 * minutes)
    market = Market(0, session.orders, session.time)
    tape = _tape(folder, market, session, 0)
    for _, event in session.events(market, Findings(session.name)):
        tape.apply(event)
    tape.close()
    write_parquet(folder / "events.parquet", [tape])
    return tape.messages
