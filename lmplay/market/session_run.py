"""A simulation from a trained run: where it starts, its progress, and the files it writes."""

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
from .decode import Reader
from .events import DAY, Market
from .messages import Messages
from .record import EventRecorder, write_parquet
from .recorded import RecordedSession
from .sessions import DataIssues, Session
from .simulate import Settings, Simulator, Tally

MINUTE = 60 * 10**9
REPORT = "report.json"
Show = Callable[[float, str], None]  # (progress in [0, 1], a line)


@dataclass(frozen=True)
class SimulationSize:
    """How many markets, and how long each is simulated.

    minutes: market time. messages: at most, per market. context: held-out messages that the model
    reads first; None: as many as it can hold.
    """

    markets: int = 8
    minutes: float = 10.0
    messages: int | None = None
    context: int | None = None


def beginnings(recorded: RecordedSession, markets: int) -> list[int]:
    """Return evenly spaced numbers of held-out messages, before which the markets begin.

    Raises:
        LmplayError: too few messages are held out.
    """
    available = len(recorded.messages) - recorded.start
    if available < markets or recorded.start < 1:
        raise LmplayError(
            f"{recorded.session.name}: {available} messages are held out, "
            f"too few to begin {markets} markets from"
        )
    return [recorded.start + i * available // markets for i in range(markets)]


def context_of(
    recorded: RecordedSession,
    messages: Messages,
    begin: int,
    length: int,
    wanted: int | None = None,
) -> np.ndarray:
    """Return the ids (n, width) of the messages before a beginning.

    As many as wanted, or as `length` positions hold next to a sink and one more message.

    Raises:
        LmplayError: more are wanted than that.
    """
    most = max(1, (length - 1) // messages.width - 1)
    if wanted is not None and wanted > most:
        raise LmplayError(
            f"--context {wanted}: the model holds {most} messages besides the one that is sampled"
        )
    return messages.encode_messages(recorded.messages[max(0, begin - (wanted or most)) : begin])


def simulate(
    recorded: RecordedSession,
    messages: Messages,
    reader: Reader,
    length: int,
    size: SimulationSize,
    settings: Settings,
    folder: Path,
    show: Show,
) -> dict[str, Any]:
    """Simulate, write the files to `folder`/generated, and return the report.

    The held-out part is written to `folder`/real first, so that a simulation that ends early can be
    compared, too. Files of an earlier simulation are removed once this one can begin. Ctrl-C ends
    it after the round; what was simulated is written, and "interrupted" is True in the report.

    Raises:
        LmplayError: too many messages in a row were rejected. What was simulated is written.
    """
    begins = beginnings(recorded, size.markets)
    markets = recorded.markets(begins)
    contexts = [context_of(recorded, messages, b, length, size.context) for b in begins]
    simulator = Simulator(reader, messages, markets, contexts, settings)
    for part in ("generated", "baseline"):
        clear(folder / part)
    write_real(recorded, folder / "real")
    folder = folder / "generated"
    (folder / REPORT).unlink(missing_ok=True)
    ends = [min(m.time + int(size.minutes * MINUTE), DAY) for m in markets]
    starts = [m.time for m in markets]
    tapes = [_tape(folder, m, recorded.session, i) for i, m in enumerate(markets)]
    began = time.perf_counter()
    read_before = reader.seconds
    interrupted = False
    shown = 0.0
    failure: LmplayError | None = None
    try:
        active = [True] * len(markets)
        with deferred_interrupt() as asked:
            while any(active) and not asked:
                for b, _, event in simulator.round(active):
                    if event.time < ends[b]:
                        tapes[b].apply(event)
                    if event.time >= ends[b] or tapes[b].messages == size.messages:
                        active[b] = False
                if time.perf_counter() - shown > 1 or not any(active):
                    shown = time.perf_counter()
                    progress = [
                        max(
                            (m.time - s) / (e - s),
                            t.messages / size.messages if size.messages else 0.0,
                        )
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
        "interrupted": interrupted,
        "markets": size.markets,
        "settings": asdict(settings),
        "cache": reader.cached,
        "messages": happened,
        "sampled": simulator.sampled,
        "prices_redrawn": simulator.redrawn,
        "prices_undecided": simulator.undecided,
        "seconds": seconds,
        "messages_per_second": happened / seconds,
        "tokens_per_second": messages.width * happened / seconds,
        "seconds_in_the_model": reader.seconds - read_before,
        "share_outside_the_model": 1 - (reader.seconds - read_before) / seconds,
        "market_seconds": market_seconds,
        "messages_per_market_second": happened / max(market_seconds, 1e-9),
        "validity": simulator.tally.table(),
        "context": min(len(c) for c in contexts),
        "valid_by_round": simulator.tally.over_time(_stretch(length, messages, simulator.tally)),
    }


def _stretch(length: int, messages: Messages, tally: Tally) -> int:
    """Return the rounds per row of the validity table: half a context, or so that ten rows are
    left."""
    half = max(1, (length - 1) // messages.width // 2)
    return half * -(-len(tally.by_round) // (10 * half))


def _line(simulator: Simulator, markets: list[Market], seconds: float) -> str:
    of_all = simulator.tally.table().get("all", {})
    mids = ", ".join(str(m.mid) for m in markets[:3]) + (", ..." if len(markets) > 3 else "")
    return (
        f"{simulator.happened} messages · {simulator.happened / seconds:.1f}/s · valid "
        f"{of_all.get('strict', 0):.1%}, "
        f"with repairs {of_all.get('after_repair', 0):.1%} · mid {mids}"
    )


def _tape(folder: Path, market: Market, session: Session, number: int) -> EventRecorder:
    return EventRecorder(folder, market, session.ticker, f"market{number:02}", number, session.tick)


def clear(folder: Path) -> None:
    """Delete the files of an earlier simulation, which `score` would read; other files stay."""
    ours = "*_market[0-9][0-9]*_0_0_{}_*.{}"
    patterns = [
        ours.format(kind, end) for kind in ("message", "orderbook") for end in ("csv", "tmp")
    ]
    for pattern in (*patterns, "events.parquet"):
        for path in folder.glob(pattern):
            path.unlink()


@contextmanager
def deferred_interrupt() -> Iterator[list[int]]:
    """Put Ctrl-C into the list instead of raising it; a second Ctrl-C raises KeyboardInterrupt."""
    asked: list[int] = []

    def ask(signum: int, frame: FrameType | None) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(signum)

    # only the main thread hears signals
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return
    before = signal.signal(signal.SIGINT, ask)
    try:
        yield asked
    finally:
        signal.signal(signal.SIGINT, before)


def write_real(recorded: RecordedSession, folder: Path) -> None:
    """Write the held-out part as it was."""
    clear(folder)
    [market] = recorded.markets([recorded.start])
    tape = _tape(folder, market, recorded.session, 0)
    for event in recorded.events[recorded.start :]:
        tape.apply(event)
    tape.close()
    write_parquet(folder / "events.parquet", [tape])


def write_baseline(
    recorded: RecordedSession, size: SimulationSize, folder: Path, seed: int
) -> None:
    """Write zero-intelligence markets with the same beginnings, at the rates of the training
    part."""
    clear(folder)
    rates = zero_intelligence.fit(islice(recorded.replay(), recorded.start))
    tapes = []
    for i, market in enumerate(recorded.markets(beginnings(recorded, size.markets))):
        tape = _tape(folder, market, recorded.session, i)
        end = min(market.time + int(size.minutes * MINUTE), DAY)
        random = np.random.default_rng([seed, i])
        for event in zero_intelligence.events(
            market, rates, random, zero_intelligence.Realism.none()
        ):
            if event.time >= end or tape.messages == size.messages:
                break
            if not market.book.beyond(event.price):
                tape.apply(event)
        tape.close()
        tapes.append(tape)
    write_parquet(folder / "events.parquet", tapes)


def write_generated(seed: int, minutes: float, folder: Path) -> int:
    """Write a market of the built-in generator; return the number of its messages."""
    clear(folder)
    session = zero_intelligence.session(seed, 60 * minutes)
    market = Market(0, session.orders, session.time)
    tape = _tape(folder, market, session, 0)
    for _, event in session.events(market, DataIssues(session.name)):
        tape.apply(event)
    tape.close()
    write_parquet(folder / "events.parquet", [tape])
    return tape.messages
