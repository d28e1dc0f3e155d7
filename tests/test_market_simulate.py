"""Simulating: what is sampled, judged, repaired, rejected, remembered and written."""

from __future__ import annotations

import json
import math
from copy import copy
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import Command
from test_market_data import generated, market_plan

from lmplay.api import ModelRunner
from lmplay.errors import LmplayError
from lmplay.market import masks, score, session_run, simulate
from lmplay.market.book import ASK, BID, Order
from lmplay.market.decode import Reader
from lmplay.market.events import ADD, CANCEL, EXECUTE, NA, REPLACE, Event, Market, Message
from lmplay.market.messages import Messages
from lmplay.market.recorded import RecordedSession
from lmplay.market.session_run import SimulationSize, beginnings, context_of
from lmplay.market.sessions import DataIssues, replay
from lmplay.market.simulate import PriceDraw, Settings, Simulator, check_message, is_loose, repaired
from lmplay.testing import tiny

M = Messages(["ZI"])
WITH_BOOK = Messages(["ZI"], "book")


class Hasty(ModelRunner):
    """A model that was not trained, but for that time passes slowly and prices are near: else every
    message would come too late and be about nothing."""

    def __init__(self, inner: ModelRunner):
        super().__init__(inner.config)
        self.inner = inner
        self.bias = torch.zeros(M.vocab_size, dtype=torch.float64)
        self.bias[M.token("time", 0)] = 40.0
        self.bias[M.token("price", 0) : M.token("price", 8)] = 20.0

    def logits(
        self, model: torch.nn.Module, ids: torch.Tensor, cache: Any = None
    ) -> tuple[torch.Tensor, Any]:
        logits, cache = self.inner.logits(model, ids, cache)
        return 3 * logits + self.bias, cache

    def new_stream(self, model: torch.nn.Module, batch_size: int, max_len: int) -> Any:
        return self.inner.new_stream(model, batch_size, max_len)


@pytest.fixture(scope="module")
def recorded() -> RecordedSession:
    return RecordedSession(generated(30), 0, 0.5)


def length_of(m: Messages) -> int:
    return 1 + 6 * m.width


def simulator(
    recorded: RecordedSession,
    settings: Settings,
    markets: int = 3,
    cached: bool = True,
    variant: str = "market_modern",
    m: Messages = M,
) -> Simulator:
    length = length_of(m)
    s = tiny(variant, vocab_size=m.vocab_size, max_len=length)
    model = s.moved(torch.float64).eval()
    reader = Reader(Hasty(s.runner), model, markets, length, m.width, cached)
    begins = beginnings(recorded, markets)
    return Simulator(
        reader,
        m,
        recorded.markets(begins),
        [context_of(recorded, m, b, length) for b in begins],
        settings,
    )


def fresh_reader(recorded: RecordedSession, markets: int) -> Reader:
    used = simulator(recorded, Settings(), markets).reader
    return Reader(used.runner, used.model, markets, length_of(M), M.width)


def run(sim: Simulator, rounds: int) -> list[tuple[int, Message, Any]]:
    out = []
    for _ in range(rounds):
        for b, message, event in sim.round([True] * len(sim.markets)):
            sim.markets[b].apply(event)
            out.append((b, message, event))
    return out


@pytest.mark.parametrize("variant", ["market_modern", "market_mamba"])
def test_with_both_masks_every_message_fits_its_book(
    recorded: RecordedSession, variant: str
) -> None:
    sim = simulator(recorded, Settings(), variant=variant)
    happened = run(sim, 40)
    table = sim.tally.table()
    assert table["all"]["strict"] == 1.0
    assert len(happened) == 3 * 40
    kinds = {m.kind for _, m, _ in happened}
    assert kinds >= {ADD, CANCEL, EXECUTE, REPLACE}
    for market in sim.markets:
        bid = market.book.best(BID)
        ask = market.book.best(ASK)
        assert bid is None or ask is None or bid < ask


@pytest.mark.parametrize("variant", ["market_modern", "market_mamba"])
@pytest.mark.parametrize("settings", [Settings(book=False), Settings()])
@pytest.mark.parametrize("m", [M, WITH_BOOK], ids=["full", "book"])
def test_what_the_model_remembers_is_what_happened(
    recorded: RecordedSession,
    m: Messages,
    settings: Settings,
    variant: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With rejections, repairs and roll-backs in it, a cached simulation samples what one samples
    that reads the true history anew for each token, as long as nothing has left the window."""
    # so that draws that do not stand are taken as well
    monkeypatch.setattr(simulate, "MOST_DRAWS", 2)
    # before the first of the context leaves; a Mamba never forgets
    few = 4 if variant == "market_modern" else 2
    fast, slow = (
        simulator(recorded, settings, cached=c, variant=variant, m=m) for c in (True, False)
    )
    for sim in (fast, slow):  # a context of two messages leaves room for four
        sim._first = sim._first[:, -2 * m.width :]
        sim.reader = Reader(
            sim.reader.runner, sim.reader.model, 3, length_of(m), m.width, sim is fast
        )
        sim._unread = sim._prefill()
    a = run(fast, few)
    b = run(slow, few)
    assert [(i, m, e) for i, m, e in a] == [(i, m, e) for i, m, e in b]
    assert fast.tally.verdicts == slow.tally.verdicts
    assert fast.undecided == slow.undecided
    assert (fast.undecided > 0) == settings.book
    if not settings.book:
        assert sum(fast.tally.repaired.values()) > 0 or variant == "market_mamba"
        assert sum(n for (_, v), n in fast.tally.verdicts.items() if v != "valid") > 0


def test_a_repaired_message_is_remembered_as_it_happened(recorded: RecordedSession) -> None:
    sim = simulator(recorded, Settings(book=False), markets=2)
    for _ in range(30):
        events = []
        for b, _, event in sim.round([True, True]):
            events.append((b, sim.markets[b].describe(event)))
            sim.markets[b].apply(event)
        for b, message in events:
            tail = M.encode_messages(np.array([message]))[0][-sim._unread.shape[1] :]
            assert (sim._unread[b] == tail).all()
    assert sum(sim.tally.repaired.values()) > 0
    assert sim.happened < sim.sampled


@pytest.mark.parametrize(
    "settings", [Settings(grammar=False, book=False), Settings(book=False), Settings()]
)
def test_each_message_is_told_beside_the_best_prices_that_it_meets(
    recorded: RecordedSession, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The three tokens are the harness's to give, whatever the masks, and after a message that did
    not happen too."""
    sim = simulator(recorded, settings, markets=2, m=WITH_BOOK)
    sampled: list[np.ndarray] = []
    sample = sim._sample

    def spy() -> np.ndarray:
        sampled.append(sample())
        return sampled[-1]

    monkeypatch.setattr(sim, "_sample", spy)
    for _ in range(12):
        rows = np.zeros((2, len(Message._fields)), np.int64)
        rows[:, -3:] = [market.touch() for market in sim.markets]
        run(sim, 1)
        assert (sampled[-1][:, :3] == WITH_BOOK.encode_messages(rows)[:, :3]).all()
    assert len(sampled) == 12


def test_without_masks_what_is_no_message_is_counted_and_rejected(
    recorded: RecordedSession,
) -> None:
    sim = simulator(recorded, Settings(grammar=False, book=False), markets=1)
    with pytest.raises(LmplayError, match="100 messages in a row were rejected"):
        run(sim, 200)
    assert sim.tally.table()["unreadable"]["no_grammar"] == 1.0
    assert sim.happened == 0


def book_of_three() -> Market:
    return Market(
        0, [Order(1, BID, 99, 5, 10), Order(2, BID, 99, 7, 20), Order(3, ASK, 101, 4, 30)], time=100
    )


def test_the_touch_is_the_spread_and_the_leading_digits_of_the_best_volumes() -> None:
    market = book_of_three()
    assert market.touch() == (2, 10, 4)  # 5 + 7 at the bid
    market.apply(Event(101, ADD, ASK, 100, 4711, 5))
    assert market.touch() == (1, 10, 4000)
    market.apply(Event(102, ADD, ASK, 100, 60000, 6))
    assert market.touch() == (1, 10, 9000)
    for order in (1, 2):
        market.apply(Event(103, CANCEL, BID, 99, market.book.orders[order].size, order))
    assert market.touch() == (NA, NA, 9000)
    assert market.describe(Event(104, ADD, BID, 90, 1, 7))[-3:] == (NA, NA, 9000)


CANCEL_OF_2 = Message(0, CANCEL, BID, -1, 7, 0, 5, 105, -1, 7, 20)


@pytest.mark.parametrize(
    ("change", "verdict", "loose", "becomes"),
    [
        ({}, "valid", True, (CANCEL, 2, 7)),
        ({"ticker": 1}, "ticker", True, None),
        ({"dt": 10**10 + 1}, "gap", True, None),
        ({"ref_price": -2}, "reference", False, None),
        ({"ref_time": 21}, "reference", True, (CANCEL, 2, 7)),  # of its size
        ({"ref_size": 6}, "reference", True, (CANCEL, 2, 7)),  # of its time
        (
            {"ref_size": 6, "ref_time": 21},
            "reference",
            True,
            (CANCEL, 1, 5),
        ),  # the front, and no more than it has
        ({"size": 8}, "valid", True, (CANCEL, 2, 7)),  # at least what is left: a delete
        ({"size": 3}, "valid", True, (CANCEL, 2, 7)),  # nothing remains, it says
        ({"size": 3, "remaining": 4}, "valid", True, (CANCEL, 2, 3)),
        (
            {"kind": EXECUTE, "ref_size": 5, "ref_time": 10, "size": 6},
            "size",
            True,
            (EXECUTE, 1, 5),
        ),
        ({"size": 0}, "size", True, None),
        ({"kind": EXECUTE}, "front", True, (EXECUTE, 1, 5)),
        (
            {"kind": EXECUTE, "ref_size": 5, "ref_time": 10, "size": 3},
            "valid",
            True,
            (EXECUTE, 1, 3),
        ),
        (
            {"kind": REPLACE, "remaining": NA, "price": -3, "size": 50},
            "valid",
            True,
            (REPLACE, 2, 50),
        ),
        (
            {"kind": REPLACE, "remaining": NA, "price": -3, "size": 50, "ref_time": 1},
            "reference",
            True,
            (REPLACE, 2, 50),
        ),
        (
            {
                "kind": ADD,
                "price": 0,
                "remaining": NA,
                "ref_price": NA,
                "ref_size": NA,
                "ref_time": NA,
            },
            "valid",
            True,
            (ADD, 4, 7),
        ),
    ],
)
def test_verdicts_and_repairs(
    change: dict[str, int], verdict: str, loose: bool, becomes: Any
) -> None:
    market = book_of_three()
    message = CANCEL_OF_2._replace(**change)
    assert check_message(market, message, True)[0] == verdict
    assert check_message(market, message, False)[0] == "grammar"
    assert is_loose(market, message) == loose
    if verdict == "valid":
        event = market.interpret(message)
    elif verdict in ("ticker", "gap"):
        return
    else:
        event = repaired(market, message)
    assert (event and (event.kind, event.order, event.size)) == becomes
    if event is not None:
        market.apply(event)


def masked(market: Market, *taken: tuple[int, int]) -> masks.BookMask:
    mask = masks.BookMask(M, market)
    for position, number in taken:
        mask.take(position, number)
    return mask


def allowed(mask: masks.BookMask, position: int) -> list[int] | None:
    found = mask.allowed(position)
    return None if found is None else found.tolist()


def test_a_book_mask_leaves_only_what_rests() -> None:
    market = book_of_three()
    start = ((1, CANCEL), (2, BID), (3, 0), (4, 1))
    assert allowed(masked(market, start[0]), 2) == [BID, ASK]
    mask = masked(market, *start[:2])
    assert allowed(mask, 3) == [0], "something rests there"
    mask.take(3, 0)
    assert allowed(mask, 4) == [1]
    mask.take(4, 1)
    assert allowed(mask, 5) == [5, 7], "the sizes that rest there"
    mask.take(5, 5)
    assert allowed(mask, 6) == [0, 2], "all of the one, or a part of the other"
    part = masked(market, *start, (5, 5), (6, 2))
    assert [allowed(part, p) for p in (16, 17, 18, 23)] == [[0], [1], [7], [20]]
    mask.take(6, 0)
    assert [allowed(mask, p) for p in (16, 17, 18, 23)] == [[0], [1], [5], [10]]
    trades = masked(market, (1, EXECUTE), (2, BID), (3, 0), (4, 1))
    assert allowed(trades, 18) == [5], "a trade is offered the front only"
    assert allowed(trades, 5) == [1, 2, 3, 4, 5]
    trades.take(5, 2)
    assert allowed(trades, 6) == [3]
    empty = Market(0, [], time=1)
    assert allowed(masked(empty), 1) == [ADD]


class LastToken:
    """Stands in for a reader: what comes next depends on the last token alone, so nothing has to be
    remembered."""

    def __init__(self, table: torch.Tensor):
        self.table = table

    def read(self, ids: torch.Tensor) -> torch.Tensor:
        return self.table[ids[:, -1]]

    def mark(self) -> None:
        return None

    def roll_back(self, mark: None, rows: torch.Tensor) -> None:
        pass


@pytest.mark.parametrize("draws", [16, 5])
def test_a_cancel_names_what_rests_as_often_as_the_model_would(
    recorded: RecordedSession, draws: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Price and size of masked samples against the model's own probabilities of the orders that
    rest: a price is not more likely for having few orders. Also where few draws are made, and one
    of those that did not stand is taken."""
    monkeypatch.setattr(simulate, "MOST_DRAWS", draws)
    rows = 1500
    sim = simulator(recorded, Settings())
    orders = [(99, 5), (99, 7), (98, 5), (97, 3), (90, 400)]
    market = Market(
        0,
        [Order(i, BID, p, s, i) for i, (p, s) in enumerate(orders, 1)] + [Order(9, ASK, 101, 4, 9)],
        100,
    )
    sim.markets = [market] * rows
    table = torch.full((M.vocab_size, M.vocab_size), -30.0)
    # ticks from the mid of 100
    minus = M.token("sign", 0)
    likely = {1: 3.0, 2: 1.0, 3: 2.0, 10: 0.5}
    sizes = {
        1: {5: 2.0, 7: 0.5, 9: 3.0},
        2: {5: 1.0, 6: 1.5},
        3: {3: 0.0, 4: 2.5, 5: 1.0},
        10: {300: 1.0, 400: 0.0},
    }
    for distance, logit in likely.items():
        table[minus, M.token("price", distance)] = logit
        for size, logit_of_size in sizes[distance].items():
            table[M.token("price", distance), M.token("size", size)] = logit_of_size
    sim.reader = LastToken(table)  # type: ignore[assignment]
    price_at = M.first["price"]
    size_at = M.first["size"]
    kind = (M.first["kind"], M.kind_token(CANCEL) - M.start["kind"])
    book_masks = [masked(market, kind, (M.first["side"], BID)) for _ in range(rows)]
    first = torch.zeros(rows, M.vocab_size)
    before = PriceDraw(price_at, None, first, [copy(mask) for mask in book_masks])
    tokens = np.zeros((rows, M.width), np.int64)
    logits = first
    for position in range(price_at, size_at + 1):
        if position == size_at:
            logits = sim._redraw(tokens, position, logits, book_masks, before)
        tokens[:, position] = sim._draw(logits, position, book_masks)
        for mask, token in zip(book_masks, tokens[:, position], strict=True):
            mask.take(position, int(token) - M.start[M.layout[position][1]])
        logits = sim.reader.read(torch.from_numpy(tokens[:, position : position + 1]))
    named = [
        (100 - int(p), int(s))
        for p, s in tokens[:, [price_at + 1, size_at]] - [M.start["price"], M.start["size"]]
    ]
    weights = {
        (p, s): math.exp(likely[100 - p] + sizes[100 - p][s])
        / sum(map(math.exp, sizes[100 - p].values()))
        for p, s in orders
    }
    for order in orders:
        assert named.count(order) / rows == pytest.approx(
            weights[order] / sum(weights.values()), abs=0.04
        ), order
    assert sim.redrawn > rows / 2
    assert (sim.undecided > rows / 20) == (draws == 5)


@pytest.mark.parametrize("kind", [ADD, REPLACE])
@pytest.mark.parametrize("side", [BID, ASK])
@pytest.mark.parametrize(
    "orders",
    [
        [(BID, 100), (ASK, 101)],
        [(BID, 100), (ASK, 102)],
        [(BID, 90), (ASK, 117)],
        [(BID, 100)],
        [(ASK, 101)],
    ],
)
def test_a_new_order_is_offered_every_price_at_which_it_rests_and_no_other(
    kind: int, side: int, orders: list[tuple[int, int]]
) -> None:
    market = Market(0, [Order(1, BID, 100, 5, 1), Order(2, ASK, 101, 5, 1)], time=1)
    for id in (1, 2):  # so that there is a mid price where only one side is left
        market.book.reduce(id, 5)
    for n, (of, price) in enumerate(orders, 3):
        market.book.add(n, of, price, 5, 2)
    if kind == REPLACE and not market.book.prices[side]:
        assert side not in (allowed(masked(market, (1, kind)), 2) or []), (
            "there is nothing to replace"
        )
        return
    offered = set()
    for sign in allowed(masked(market, (1, kind), (2, side)), 3) or [0, 1]:
        distances = allowed(masked(market, (1, kind), (2, side), (3, sign)), 4)
        offered |= {d if sign else -d for d in (range(1000) if distances is None else distances)}
    assert offered == {
        d for d in range(-999, 1000) if not market.book.crosses(side, market.mid + d)
    }


def test_files_are_written_and_read_as_what_happened(
    recorded: RecordedSession, tmp_path: Path
) -> None:
    shown: list[str] = []
    reader = fresh_reader(recorded, 2)
    mine = tmp_path / "generated" / "AAPL_2012-06-21_34200000_57600000_message_10.csv"
    mine.parent.mkdir()
    mine.touch()
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "report.json").touch()

    def show(progress: float, line: str) -> None:
        shown.append(line)

    result = session_run.simulate(
        recorded, M, reader, length_of(M), SimulationSize(2, 10.0, 25), Settings(), tmp_path, show
    )
    assert mine.exists(), "somebody's own market in the same folder"
    assert (tmp_path / "real" / "report.json").exists()
    mine.unlink()
    assert result["messages"] == 50
    assert not result["interrupted"]
    assert 0 <= result["share_outside_the_model"] <= 1
    assert result["valid_by_round"][-1] == (24, 1.0, 1.0), "by half contexts of three messages"
    assert "mid" in shown[-1]
    frame = pd.read_parquet(tmp_path / "generated" / "events.parquet")
    tapes = score.read(tmp_path / "generated")
    assert len(tapes) == 2
    assert sum(len(t.messages) for t in tapes) == len(frame)
    assert frame.groupby("market")["message"].nunique().tolist() == [25, 25]
    first = frame[frame["market"] == 0].reset_index(drop=True)
    assert (first["time"] == tapes[0].messages["time"]).all()
    assert (first["price"] == tapes[0].messages["price"]).all()
    [real] = score.read(tmp_path / "real")
    assert len(real.messages) >= len(recorded.messages) - recorded.start
    session_run.write_baseline(recorded, SimulationSize(2, 10.0, 25), tmp_path / "baseline", 0)
    assert len(score.read(tmp_path / "baseline")) == 2
    assert not list(tmp_path.rglob("*.tmp*"))
    with pytest.raises(LmplayError, match="--context 6: the model holds 5 messages"):
        session_run.simulate(
            recorded,
            M,
            reader,
            length_of(M),
            SimulationSize(2, 10.0, 25, context=6),
            Settings(),
            tmp_path,
            show,
        )
    with pytest.raises(LmplayError):  # it cannot begin: nothing goes
        session_run.simulate(
            recorded,
            M,
            reader,
            length_of(M),
            SimulationSize(10**6, 10.0, 25),
            Settings(),
            tmp_path,
            show,
        )
    assert len(score.read(tmp_path / "generated")) == 2
    again = session_run.simulate(
        recorded,
        M,
        fresh_reader(recorded, 1),
        length_of(M),
        SimulationSize(1, 10.0, 5, 2),
        Settings(),
        tmp_path,
        show,
    )
    assert (again["messages"], again["context"]) == (5, 2)
    assert len(score.read(tmp_path / "generated")) == 1, "the second market of before is gone"
    assert not list((tmp_path / "baseline").glob("*.csv")), (
        "or it would be compared with another simulation"
    )


def test_an_interrupt_leaves_whole_files_of_what_was_simulated(
    recorded: RecordedSession, tmp_path: Path
) -> None:
    def stop(progress: float, line: str) -> None:
        raise KeyboardInterrupt

    reader = fresh_reader(recorded, 2)
    result = session_run.simulate(
        recorded, M, reader, length_of(M), SimulationSize(2, 10.0, 25), Settings(), tmp_path, stop
    )
    assert result["interrupted"]
    assert len(score.read(tmp_path / "real")) == 1, "to compare it with"
    assert (
        sum(len(t.messages) for t in score.read(tmp_path / "generated")) >= result["messages"] == 2
    )
    assert not list(tmp_path.rglob("*.tmp*"))


# ---------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of both market models, trained for a moment."""
    from conftest import call_command

    folder = tmp_path_factory.mktemp("market")
    plan = market_plan(folder)
    for variant in ("market_modern", "market_vanilla", "market_mamba"):
        settings = ["--seed", "1"] if variant == "market_modern" else []
        result = call_command(
            "lmp_trainer", "--exp", variant, "--training-plan", str(plan), *settings, cwd=folder
        )
        assert result.returncode == 0, result.stderr
    return folder


def run_of(trained: Path, variant: str) -> str:
    [path] = (trained / "gpt_out" / "zi").glob(f"{variant}-*")
    return str(path)


def test_simulate_score_and_perplexity_run_and_say_what_they_found(
    trained: Path, command: Command, tmp_path: Path
) -> None:
    model = run_of(trained, "market_modern")
    result = command(
        "lmp_market",
        "simulate",
        "--model",
        model,
        "--markets",
        "2",
        "--messages",
        "30",
        "--save",
        "out",
    )
    assert result.returncode == 0, result.stderr
    assert "messages/s" in result.stdout
    report = json.loads((tmp_path / "out" / "generated" / "report.json").read_text())
    assert report["validity"]["all"].get("no_reference", 0.0) == 0.0
    scored = command("lmp_market", "score", "out/real", "out/generated")
    assert scored.returncode == 0, scored.stderr
    table = pd.read_csv(tmp_path / "out" / "score" / "distances.csv", index_col=0)
    assert set(table.index) == {*score.STATISTICS, *score.CONDITIONALS, "mean"}
    assert {"generated l1", "baseline l1", "generated w1_high"} <= set(table.columns)
    assert (tmp_path / "out" / "score" / "index.html").exists()
    for name in ("book", "paths", "distributions", "impact", "divergence"):
        assert (tmp_path / "out" / "score" / f"{name}.png").stat().st_size > 10_000
    recorded = command(
        "lmp_market",
        "perplexity",
        "--model",
        model,
        "--times",
        "2",
        "--streams",
        "2",
        "--save",
        "out",
    )
    assert recorded.returncode == 0, recorded.stderr
    fields = pd.read_csv(tmp_path / "out" / "perplexity_by_field.csv", index_col=0)
    assert fields["tokens"].iloc[:-1].sum() == 24
    whole = pd.read_csv(Path(model) / "validate.csv")["loss"].iloc[-1]
    # the validation set has more samples
    assert fields.loc["all", "nats per token"] == pytest.approx(whole, rel=0.05)


def test_mamba_runs_a_market_too(trained: Path, command: Command) -> None:
    few = ("--markets", "2", "--messages", "3", "--no-baseline", "--save", "out")
    result = command("lmp_market", "simulate", "--model", run_of(trained, "market_mamba"), *few)
    assert result.returncode == 0, result.stderr
    assert "slow" not in result.stdout


def test_a_model_without_an_endless_cache_says_that_it_is_slow(
    trained: Path, command: Command
) -> None:
    few = ("--markets", "1", "--messages", "2", "--no-baseline", "--save", "out")
    result = command("lmp_market", "simulate", "--model", run_of(trained, "market_vanilla"), *few)
    assert result.returncode == 0, result.stderr
    assert "market_vanilla has no cache for endless texts" in result.stdout


def test_another_setting_of_the_same_weights_is_another_model(
    trained: Path, command: Command, tmp_path: Path
) -> None:
    recorded = {}
    few = ("--model", run_of(trained, "market_modern"), "--times", "2", "--streams", "2")
    for name, words in (("with", ()), ("without", ("--set", "sink=false"))):
        result = command("lmp_market", "perplexity", *few, "--save", name, *words)
        assert result.returncode == 0, result.stderr
        recorded[name] = pd.read_csv(tmp_path / name / "perplexity_by_position.csv")[
            "nats per token"
        ]
    assert not recorded["with"].equals(recorded["without"])


def test_generate_is_a_market_by_itself(command: Command, tmp_path: Path) -> None:
    assert command("lmp_market", "generate", "--minutes", "0.2", "--save", "zi").returncode == 0
    [tape] = score.read(tmp_path / "zi")
    assert len(tape.messages) > 200


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (("simulate", "--model", "nowhere"), "there is no such folder"),
        (("simulate", "--no-grammar", "--model", "RUN"), "the book mask needs the grammar mask"),
        (("simulate", "--temperature", "0", "--model", "RUN"), "must be above 0"),
        (
            ("perplexity", "--set", "snk=false", "--model", "RUN"),
            "no such field (did you mean sink?)",
        ),
        (
            ("perplexity", "--set", "embed_dim=32", "--model", "RUN"),
            "the trained weights do not go with these settings",
        ),
        (
            ("simulate", "--ticker", "ZJ", "--model", "RUN"),
            "the model knows no such ticker (did you mean ZI?)",
        ),
        (
            ("simulate", "--training-plan", "market_btc", "--model", "RUN"),
            "the tokenizer has no ticker BTCUSD",
        ),
        (("simulate", "--training-plan", "smoke", "--model", "RUN"), "its data are no market's"),
        (("simulate", "--markets", "100000", "--model", "RUN"), "too few to begin 100000 markets"),
        (("perplexity", "--times", "1000", "--model", "RUN"), "lower --times"),
        (("score", "nowhere", "nowhere"), "there is no LOBSTER message file"),
    ],
)
def test_what_a_user_can_mend_is_one_line(
    args: tuple[str, ...], says: str, trained: Path, command: Command
) -> None:
    result = command(
        "lmp_market", *(run_of(trained, "market_modern") if a == "RUN" else a for a in args)
    )
    assert result.returncode == 1
    [line] = [x for x in result.stderr.splitlines() if x.startswith("lmp_market:")]
    assert says in line
    assert "Traceback" not in result.stderr


def test_a_model_of_text_is_refused(command: Command, tmp_path: Path) -> None:
    from conftest import write_plan

    assert (
        command(
            "lmp_trainer", "--exp", "gpt2ish", "--training-plan", str(write_plan(tmp_path))
        ).returncode
        == 0
    )
    result = command("lmp_market", "simulate")
    assert result.returncode == 1
    assert "its vocabulary is bytes, not a market's messages" in result.stderr


def test_replay_of_the_real_part_is_what_was_held_out(recorded: RecordedSession) -> None:
    [market] = recorded.markets([recorded.start])
    for n, (_, _, other) in enumerate(replay(recorded.session, DataIssues("x")), 1):
        if n == recorded.start:
            assert market.book.state() == other.book.state()
            break
