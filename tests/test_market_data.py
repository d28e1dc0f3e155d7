"""Messages, sources and the way there and back: events -> tokens -> events rebuilds the same book,
state by state."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from conftest import Command
from hypothesis import given, settings
from hypothesis import strategies as st

from lmplay.data.tokenizers import from_state
from lmplay.errors import LmplayError
from lmplay.market import bitstamp, lobster, zero_intelligence
from lmplay.market.book import ASK, BID, Order
from lmplay.market.events import (
    ADD,
    CANCEL,
    EXECUTE,
    EXECUTE_AT,
    KINDS,
    NA,
    REPLACE,
    Event,
    Market,
    Message,
)
from lmplay.market.messages import NA_TOKEN, SINK, MessageError, Messages
from lmplay.market.record import EventRecorder
from lmplay.market.recorded import RecordedSession
from lmplay.market.sessions import DataIssues, Session, rebuild, replay
from lmplay.market.source import MarketSource
from lmplay.plan import load_plan, plan_files

# ---------------------------------------------------------------- messages


@pytest.mark.parametrize(
    ("tickers", "form", "unpadded", "padded", "width"),
    [
        (503, "full", 12515, 12544, 24),
        (99, "full", 12111, 12160, 24),
        (1, "lobs5", 12011, 12032, 22),
        (1, "book", 12013, 12032, 27),
    ],
)
def test_vocabularies_have_the_published_sizes(
    tickers: int, form: Any, unpadded: int, padded: int, width: int
) -> None:
    m = Messages([f"T{i}" for i in range(tickers)], form)
    assert (m.unpadded, m.vocab_size, m.width) == (unpadded, padded, width)


TIME = st.integers(0, 86_399 * 10**9 + 10**9 - 1)
PRICE = st.integers(-999, 999)
SIZE = st.integers(0, 9999)


@st.composite
def message(draw: Callable[[Any], Any]) -> Message:
    kind = draw(st.integers(0, len(KINDS) - 1))
    about = kind != ADD
    return Message(
        draw(st.integers(0, 1)),
        kind,
        draw(st.integers(0, 1)),
        draw(PRICE),
        draw(SIZE),
        draw(SIZE) if kind in (EXECUTE, EXECUTE_AT, CANCEL) else NA,
        draw(st.integers(0, 1000 * 10**9 - 1)),
        draw(TIME),
        draw(PRICE) if about else NA,
        draw(SIZE) if about else NA,
        draw(TIME) if about else NA,
    )


@pytest.mark.parametrize("form", ["full", "book"])
@settings(max_examples=60, deadline=None)
@given(
    st.lists(message(), min_size=1, max_size=8),
    st.tuples(*[st.just(NA) | SIZE] * 2),
    st.just(NA) | st.integers(1, 999),
)
def test_messages_come_back_from_their_tokens(
    form: Any, rows: list[Message], volumes: tuple[int, int], spread: int
) -> None:
    m = Messages(["A", "B"], form)
    if form == "book":
        rows = [
            r._replace(spread=spread, bid_volume=volumes[0], ask_volume=volumes[1]) for r in rows
        ]
    ids = m.encode_messages(np.array(rows))
    back, ok = m.decode_messages(ids)
    assert ok.all()
    assert (back == np.array(rows)).all()
    # each token is of its position's group, or NA
    for position, (_, group, _) in enumerate(m.layout):
        start = m.start[group]
        count = m.count[group]
        column = ids[:, position]
        assert (((column >= start) & (column < start + count)) | (column == NA_TOKEN)).all()
    text = m.decode(ids[0].tolist())
    assert m.encode(text) == ids[0].tolist()


@settings(max_examples=40, deadline=None)
@given(st.lists(message().filter(lambda x: x.kind != EXECUTE_AT), min_size=1, max_size=4))
def test_lobs5_loses_the_ticker_only(rows: list[Message]) -> None:
    """What is left of an order follows from its size."""
    rows = [
        r._replace(ticker=0, remaining=NA if r.remaining == NA else r.ref_size - r.size)
        for r in rows
    ]
    m = Messages([], "lobs5")
    back, ok = m.decode_messages(m.encode_messages(np.array(rows)))
    assert ok.all()
    assert (back == np.array(rows)).all()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("price", 1000),
        ("price", -1000),
        ("size", 10_000),
        ("size", -1),
        ("dt", 1000 * 10**9),
        ("dt", -1),
        ("ticker", 2),
        ("kind", 5),
        ("side", 2),
        ("remaining", 10_000),
        ("ref_price", 1000),
        ("time", NA),
    ],
)
def test_a_value_out_of_range_is_an_error_that_names_it(field: str, value: int) -> None:
    good = Message(0, CANCEL, 0, 5, 100, 0, 1, 2, 5, 100, 1)
    with pytest.raises(MessageError, match=f"message 1: {field}"):
        Messages(["A", "B"]).encode_messages(np.array([good, good._replace(**{field: value})]))


def test_tokens_that_are_no_message_are_told() -> None:
    m = Messages(["A"])
    good = m.encode_messages(np.array([Message(0, CANCEL, 0, 5, 100, 0, 1, 2, 5, 100, 1)]))[0]
    for position in range(m.width):
        bad = good.copy()
        bad[position] = SINK
        assert not m.decode_messages(bad)[1][0], position
    partly = good.copy()
    partly[16] = NA_TOKEN  # a price that is half NA
    assert not m.decode_messages(partly)[1][0]


def test_the_tokenizer_is_saved_and_a_word_it_lacks_is_named() -> None:
    m = Messages(["AAPL", "GOOG"])
    again = from_state(json.loads(json.dumps(m.state())))
    assert again.fingerprint == m.fingerprint
    assert again.pieces == m.pieces
    assert Messages(["AAPL", "GOOG"], "lobs5").fingerprint != m.fingerprint
    with pytest.raises(LmplayError, match="did you mean cancel"):
        m.encode("AAPL cancle bid")
    with pytest.raises(LmplayError, match="named twice"):
        Messages(["AAPL", "bid"])


# ---------------------------------------------------------------- there and back


def generated(seconds: float = 40, seed: int = 3) -> Session:
    return zero_intelligence.session(seed, seconds)


def write_lobster(folder: Path, session: Session, levels: int = 60) -> list[Event]:
    """The session as LOBSTER files that show the whole book."""
    market = Market(0, session.orders, session.time)
    tape = EventRecorder(folder, market, session.ticker, "2020-01-02")
    tape.writer.close()
    for path in tape.writer.paths:
        path.unlink(missing_ok=True)
    tape.writer = lobster.Writer(folder, session.ticker, "2020-01-02", levels)
    events = []
    for _, event in session.events(market, DataIssues("x")):
        tape.apply(event)
        events.append(event)
    tape.close()
    return events


def bitstamp_part() -> Session:
    return bitstamp.session_of(bitstamp.read().iloc[:30_000].reset_index(drop=True))


@pytest.mark.parametrize("form", ["full", "lobs5", "book"])
@pytest.mark.parametrize("source", ["generator", "bitstamp", "lobster"])
def test_there_and_back_rebuilds_the_same_book_state_by_state(
    source: str, form: Any, tmp_path: Path
) -> None:
    if source == "generator":
        session = generated()
    elif source == "bitstamp":
        session = bitstamp_part()
    else:
        write_lobster(tmp_path, generated())
        [session] = lobster.sessions(tmp_path, 100)
    m = Messages([session.ticker], form)
    recorded = list(replay(session, DataIssues(session.name)))  # errors stop
    rows = np.array([message for _, message, _ in recorded])
    back, ok = m.decode_messages(m.encode_messages(rows))
    assert ok.all()
    start = Market(0, session.orders, session.time)
    rebuilt = rebuild((Message(*map(int, row)) for row in back), start)
    count = 0
    for (event, _, market), other in zip(
        replay(session, DataIssues(session.name)), rebuilt, strict=True
    ):
        assert other.time == event.time == market.time
        if count % 7 == 0 or count < 200:
            assert other.book.state() == market.book.state(), f"message {count}"
        count += 1
    assert count == len(recorded)
    assert other.book.state() == market.book.state()
    assert count > 1500
    kinds = {int(k) for k in rows[:, 1]}
    assert kinds >= (
        {ADD, EXECUTE, CANCEL, REPLACE} if source == "generator" else {ADD, EXECUTE, CANCEL}
    )


def test_lobster_files_say_what_was_written(tmp_path: Path) -> None:
    """Read back, our own files give the adds, cancels and trades that were written."""
    session = generated()
    events = write_lobster(tmp_path, session)
    [read] = lobster.sessions(tmp_path, 100)
    theirs = [e for e, _, _ in replay(read, DataIssues("x"))]
    market = Market(0, session.orders, session.time)
    ours = []
    for event in events:
        for step in market.steps(event):
            market.apply(step)
            ours.append(step)
    ours = ours[1:]  # the first row's effect is in the state that the file begins with
    assert [(e.time, e.kind, e.side, e.price, e.size) for e in theirs] == [
        (e.time, e.kind, e.side, e.price, e.size) for e in ours
    ]


def test_bitstamp_is_read_as_its_statistics_say() -> None:
    issues = DataIssues("b")
    session = bitstamp_part()
    mix = pd.Series([e.kind for e, _, _ in replay(session, issues)]).value_counts(normalize=True)
    assert mix[ADD] == pytest.approx(0.5, abs=0.03)
    assert mix[CANCEL] == pytest.approx(0.49, abs=0.03)
    assert 0 < mix[EXECUTE] < 0.02
    assert issues.counts["dropped: price"] > 0
    assert issues.counts["orders that came across the other side"] > 1000


def test_the_generator_is_seeded_and_has_the_shape_it_was_made_for() -> None:
    """The figures that the settings gave when they were chosen, with room for four minutes'
    luck."""
    session = generated(240, seed=5)
    events = []
    gaps = []
    spreads = []
    for event, message, market in replay(session, DataIssues("z")):
        events.append(event)
        gaps.append(message.dt / 1e9)
        spreads.append((market.book.best(ASK) or 0) - (market.book.best(BID) or 0))
    again = [e for e, _, _ in replay(generated(240, seed=5), DataIssues("z"))]
    assert events == again
    assert [e for e, _, _ in replay(generated(20, seed=5), DataIssues("z"))] == events[
        : sum(e.time < session.time + 20 * 10**9 for e in events)
    ]
    mix = pd.Series([e.kind for e in events]).value_counts(normalize=True)
    assert mix[ADD] + mix[REPLACE] / 2 == pytest.approx(0.49, abs=0.02)
    assert mix[EXECUTE] == pytest.approx(0.044, abs=0.012)
    wait = np.array(gaps[1:])
    between = wait[wait > 0]
    assert between.std() / between.mean() == pytest.approx(2.0, abs=0.5)
    weights = np.append(wait, 0)[: len(spreads)]
    assert np.average(spreads, weights=weights) == pytest.approx(1.27, abs=0.1)
    signs = pd.Series(
        [e.side * 2.0 - 1 for e in events if e.kind == EXECUTE],
        [e.time for e in events if e.kind == EXECUTE],
    )
    signs = signs[~signs.index.duplicated()]
    assert signs.autocorr(1) > 0.1
    plain = zero_intelligence.session(5, 240, zero_intelligence.Realism.none())
    flow = [e for e, _, _ in replay(plain, DataIssues("z"))]
    random_signs = pd.Series(
        [e.side * 2.0 - 1 for e in flow if e.kind == EXECUTE],
        [e.time for e in flow if e.kind == EXECUTE],
    )
    assert abs(random_signs[~random_signs.index.duplicated()].autocorr(1)) < 0.12


def test_fitted_rates_are_those_that_made_the_session() -> None:
    plain = zero_intelligence.session(1, 300, zero_intelligence.Realism.none())
    rates = zero_intelligence.fit(replay(plain, DataIssues("z")))
    for side in (BID, ASK):
        assert rates.limit[side][:5] == pytest.approx(zero_intelligence.CST_LIMIT[:5], rel=0.3)
        assert rates.cancel[side][:4] == pytest.approx(zero_intelligence.CST_CANCEL[:4], rel=0.4)
    with pytest.raises(LmplayError, match="no rates"):
        zero_intelligence.fit(iter([]))


# ---------------------------------------------------------------- what is wrong in files

GOOD_MESSAGES = [
    "34200.000000001,1,11,100,1000000,1",
    "34200.5,1,12,50,1000200,-1",
    "34200.6,2,11,30,1000000,1",
    "34201.0,4,12,50,1000200,-1",
    "34202.0,3,11,70,1000000,1",
]
E10 = "9999999999"
E = "-9999999999"
GOOD_BOOK = [
    f"1000300,10,1000000,100,{E10},0,999900,5",
    "1000200,50,1000000,100,1000300,10,999900,5",
    "1000200,50,1000000,70,1000300,10,999900,5",
    f"1000300,10,1000000,70,{E10},0,999900,5",
    f"1000300,10,999900,5,{E10},0,{E},0",
]


def sample(folder: Path, messages: list[str], book: list[str]) -> Path:
    folder.mkdir(exist_ok=True)
    for kind, lines in (("message", messages), ("orderbook", book)):
        (folder / f"AAPL_2020-01-02_34200000_57600000_{kind}_2.csv").write_text(
            "\n".join(lines) + "\n"
        )
    return folder


def test_levels_that_change_out_of_view_become_what_the_file_shows(tmp_path: Path) -> None:
    """Two levels are shown. A better bid hides the worse one, which is cancelled unseen; a better
    one comes back."""
    recorded = [
        "34200.0,1,1,10,1000000,1",
        "34200.1,1,2,5,1000100,1",
        "34200.2,3,2,5,1000100,1",
        "34200.3,1,3,7,1000200,-1",
    ]
    states = [
        "1000300,4,1000000,10,1000400,6,999900,5",
        "1000300,4,1000100,5,1000400,6,1000000,10",
        "1000300,4,1000000,10,1000400,6,999800,8",
        "1000200,7,1000000,10,1000300,4,999800,8",
    ]
    [session] = lobster.sessions(sample(tmp_path, recorded, states), 100)
    issues = DataIssues(session.name)
    for _, _, market in replay(session, issues):  # noqa: B007
        pass
    assert dict(market.book.depth(BID, 9)) == {10000: 10, 9998: 8}, (
        "what was at 9999 went while it could not be seen"
    )
    assert issues.counts["levels that changed out of view"] == 1
    assert issues.counts["levels that came into view"] == 1


def test_sizes_above_what_can_be_told_are_clipped_and_their_rest_is_no_error(
    tmp_path: Path,
) -> None:
    recorded = [
        "34200.0,1,1,10,1000000,1",
        "34200.1,1,2,25000,999900,1",
        "34200.2,4,2,3000,999900,1",
        "34200.3,2,2,15000,999900,1",
        "34200.4,4,9,40000,1000300,-1",
    ]
    states = [
        "1000300,70000,1000000,10,1000400,6,999800,5",
        "1000300,70000,1000000,10,1000400,6,999900,25000",
        "1000300,70000,1000000,10,1000400,6,999900,22000",
        "1000300,70000,1000000,10,1000400,6,999900,7000",
        "1000300,30000,1000000,10,1000400,6,999900,7000",
    ]
    [session] = lobster.sessions(sample(tmp_path, recorded, states), 100)
    issues = DataIssues(session.name)
    rows = np.array([m for _, m, _ in replay(session, issues)])
    assert issues.counts["clipped: size"] >= 2
    assert Messages(["AAPL"]).decode_messages(Messages(["AAPL"]).encode_messages(rows))[1].all()


def read_sample(folder: Path, errors: Any = "stop") -> tuple[list[Event], DataIssues]:
    [session] = lobster.sessions(folder, 100)
    issues = DataIssues(session.name, errors)
    return [e for e, _, _ in replay(session, issues)], issues


def test_a_good_sample_is_read(tmp_path: Path) -> None:
    events, issues = read_sample(sample(tmp_path, GOOD_MESSAGES, GOOD_BOOK))
    assert [(e.kind, e.size) for e in events] == [
        (ADD, 50),
        (CANCEL, 30),
        (EXECUTE, 50),
        (CANCEL, 70),
    ]
    assert events[0].time == 34200 * 10**9 + 5 * 10**8
    assert not issues.counts


@pytest.mark.parametrize(
    ("line", "messages", "book", "says"),
    [
        (3, "34200.6,2,11", None, "line 3: 6 columns are wanted, it has 3: is the file truncated"),
        (3, "34199.0,2,11,30,1000000,1", None, "line 3: its time is"),
        (2, "34200.5,1,12,50,1000250,-1", None, "line 2: the price 1000250 is off the grid of 100"),
        (
            3,
            None,
            "1000200,50,1000000,71,1000300,10,999900,5",
            "line 3: the book file has 71 at 1000000",
        ),
        (3, "34200.6,2,99,30,1000100,1", None, "line 3: order 99 is not in the book"),
        (
            3,
            "34200.6,2,11,300,1000000,1",
            None,
            "the book file has 70 at 1000000, the messages make 0",
        ),
        (3, "34200.6,9,11,30,1000000,1", None, "line 3: there is no type 9"),
        (3, "34200.6,2,11,abc,1000000,1", None, "line 3: invalid literal"),
        (3, None, "1000200,50,1000000", "line 3: it has 3 columns"),
    ],
)
def test_what_is_wrong_in_a_lobster_file_is_one_line_or_counted(
    line: int, messages: str | None, book: str | None, says: str, tmp_path: Path
) -> None:
    recorded = list(GOOD_MESSAGES)
    states = list(GOOD_BOOK)
    if messages is not None:
        recorded[line - 1] = messages
    if book is not None:
        states[line - 1] = book
    folder = sample(tmp_path, recorded, states)
    with pytest.raises(LmplayError) as error:
        read_sample(folder)
    assert says in str(error.value)
    assert "\n" not in str(error.value)
    _, issues = read_sample(folder, "skip")
    assert any(k.startswith("skipped") for k in issues.counts), issues.counts


def test_files_that_end_before_each_other_and_files_that_are_missing(tmp_path: Path) -> None:
    with pytest.raises(LmplayError, match="it ends after line 4, its message file goes on"):
        read_sample(sample(tmp_path / "a", GOOD_MESSAGES, GOOD_BOOK[:4]))
    with pytest.raises(LmplayError, match="it ends after line 4, its book file goes on"):
        read_sample(sample(tmp_path / "b", GOOD_MESSAGES[:4], GOOD_BOOK))
    folder = sample(tmp_path / "c", GOOD_MESSAGES, GOOD_BOOK)
    next(folder.glob("*orderbook*")).unlink()
    with pytest.raises(LmplayError, match="its book file is missing"):
        lobster.sessions(folder, 100)
    with pytest.raises(LmplayError, match="there is no message file"):
        lobster.sessions(tmp_path, 100)


def test_an_unknown_ticker_names_the_nearest(tmp_path: Path) -> None:
    sample(tmp_path, GOOD_MESSAGES, GOOD_BOOK)
    spec = MarketSource(data="lobster", path=str(tmp_path))
    with pytest.raises(LmplayError, match="the tokenizer has no ticker AAPL"):
        spec.sessions(("AAPLE", "GOOG"))


def test_nanoseconds_are_never_floats() -> None:
    assert lobster.parse_time("34200.017459617") == 34_200_017_459_617
    assert lobster.parse_time("57599.999999999") == 57_599_999_999_999
    assert lobster.parse_time("34200") == 34_200 * 10**9


# ---------------------------------------------------------------- ITCH


def itch_file(path: Path) -> None:
    """A day of two tickers, written by the reader's own package."""
    import struct

    from itch import messages as theirs

    def body(kind: bytes, form: str, *fields: Any) -> bytes:
        time = int(34_200 * 1e9 + body.clock)  # type: ignore[attr-defined]
        body.clock += 1000  # type: ignore[attr-defined]
        head = struct.pack("!HHHI", 7, 0, time >> 32, time & 0xFFFFFFFF)
        return kind + head + struct.pack("!" + form, *fields)

    body.clock = 0  # type: ignore[attr-defined]
    stock = b"AAPL    "
    other = b"MSFT    "
    parts = [
        body(b"A", "QcI8sI", 1, b"B", 100, stock, 1000000),
        body(b"A", "QcI8sI", 2, b"S", 80, stock, 1000300),
        body(b"A", "QcI8sI", 3, b"S", 60, stock, 1000300),
        body(b"A", "QcI8sI", 4, b"B", 10, other, 5000000),
        body(b"F", "QcI8sI4s", 5, b"B", 40, stock, 999900, b"ABCD"),
        body(b"E", "QIQ", 2, 30, 1),
        body(b"C", "QIQcI", 2, 10, 2, b"Y", 1000200),
        body(b"X", "QI", 3, 20),
        body(b"U", "QQII", 5, 6, 70, 1000100),
        body(b"D", "Q", 4),
        body(b"D", "Q", 1),
    ]
    for part in parts:
        assert theirs.messages[part[:1]](part).to_bytes() == part, (
            "not the form that the reader writes"
        )
    path.write_bytes(b"".join(b"\x00" + bytes([len(p)]) + p for p in parts))


def test_itch_is_read_for_the_tickers_that_are_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "day.itch"
    itch_file(path)
    [session] = MarketSource(data="itch", path=str(path)).sessions(("AAPL",))
    recorded = list(replay(session, DataIssues(session.name)))
    assert [(e.kind, e.size, e.price) for e, _, _ in recorded] == [
        (ADD, 60, 10003),
        (ADD, 40, 9999),
        (EXECUTE, 30, 10003),
        (EXECUTE_AT, 10, 10002),
        (CANCEL, 20, 10003),
        (REPLACE, 70, 10001),
        (CANCEL, 100, 10000),
    ]
    market = recorded[-1][2]
    assert [(p, [s for s, _ in q]) for p, q in market.book.state()[BID]] == [(10001, [70])]
    assert [(p, [s for s, _ in q]) for p, q in market.book.state()[ASK]] == [(10003, [40, 40])]
    m = Messages(["AAPL"])
    assert m.decode_messages(m.encode_messages(np.array([x for _, x, _ in recorded])))[1].all()
    path.write_bytes(b"\x01\x02\x03\x04 no itch")
    with pytest.raises(LmplayError, match="this is not ITCH"):
        list(replay(session, DataIssues(session.name)))


# ---------------------------------------------------------------- plans and prepared tokens


def market_plan(folder: Path, **changes: Any) -> Path:
    """market_zi at a size that trains in seconds."""
    plan = json.loads(plan_files()["market_zi"].read_text())
    plan["model"] = {
        "num_blocks": 1,
        "embed_dim": 16,
        "num_heads": 2,
        "max_len": 1 + 24 * 8,
        "dropout": 0.0,
    }
    plan["datasets"]["generator"]["seconds"] = 40
    plan["batch"]["batch_size"] = 2
    plan["validation"] |= {"tokens": 2000, "every_tokens": 2000}
    plan["steps"][0] = {"step_name": "zi", "datasets": ["generator"], "steps": 6}
    plan |= changes
    path = folder / "zi.json"
    path.write_text(json.dumps(plan))
    return path


def test_samples_begin_with_the_sink_and_hold_whole_messages(tmp_path: Path) -> None:
    from lmplay.data.prepare import prepare
    from lmplay.data.token_files import cache_folder

    plan = load_plan(market_plan(tmp_path))
    prepared = prepare(plan, lambda what, n: None)
    tokens = prepared.tokens["generator"]
    m = prepared.tokenizer
    assert isinstance(m, Messages)
    length = plan.model.max_len or 0
    for part, mask in ((tokens.train, tokens.train_mask), (tokens.val, tokens.val_mask)):
        assert mask is not None
        samples = np.asarray(part).reshape(-1, length)
        counted = np.asarray(mask).reshape(-1, length)
        assert (samples[:, 0] == SINK).all()
        assert not counted[:, 0].any()
        assert counted[:, 1:].all()
        assert m.decode_messages(samples[:, 1:])[1].all()
    recorded = RecordedSession(generated_session(plan), 0, plan.validation.fraction)
    ids = m.encode_messages(recorded.messages)
    first = np.asarray(tokens.val)[1:length]
    assert (first == ids[recorded.start :].reshape(-1)[: length - 1]).all(), (
        "validation is what was held out"
    )
    manifests = [json.loads(p.read_text()) for p in cache_folder().glob("tokens/*/manifest.json")]
    mine = [
        x["sessions"]["generator 0"]
        for x in manifests
        if "sessions" in x and "generator 0" in x["sessions"]
    ]
    assert any(x["messages"] == len(ids) and x["held_out_from"] == recorded.start for x in mine)
    assert all("not in a complete sample of train" in x["counts"] for x in mine)


def generated_session(plan: Any) -> Session:
    [session] = plan.datasets["generator"].sessions(("ZI",))
    return session


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"model": {"max_len": 100}}, "1 + a multiple of 24"),
        ({"tokenizer": {"kind": "bytes"}}, "go together"),
        ({"datasets": {"generator": {"source": "market", "data": "lobster"}}}, "needs a path"),
        (
            {"datasets": {"generator": {"source": "market", "data": "generator", "path": "x"}}},
            "has no path",
        ),
    ],
)
def test_what_is_wrong_in_a_market_plan_is_named(
    change: dict[str, Any], says: str, tmp_path: Path
) -> None:
    with pytest.raises(LmplayError) as error:
        load_plan(market_plan(tmp_path, **change))
    assert says in str(error.value)


def test_too_few_messages_for_a_sample_is_one_line(tmp_path: Path, command: Command) -> None:
    path = market_plan(
        tmp_path, datasets={"generator": {"source": "market", "data": "generator", "seconds": 0.5}}
    )
    result = command("lmp_trainer", "--exp", "market_modern", "--training-plan", str(path))
    assert result.returncode == 1
    assert "too few for one" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_copy_of_a_market_goes_its_own_way() -> None:
    market = Market(0, [Order(1, BID, 99, 5, 0), Order(2, ASK, 101, 5, 0), Order(3, BID, 99, 7, 1)])
    other = market.copy()
    assert other.book.state() == market.book.state()
    other.apply(Event(5, CANCEL, BID, 99, 5, 1))
    assert market.book.orders[1].size == 5
    assert [o.id for o in other.book.queue(BID, 99)] == [3]
