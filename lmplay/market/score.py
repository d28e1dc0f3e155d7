"""How close generated markets are to a real one: LOB-Bench's distances, stylized facts, impact
curves.

Everything is computed from folders of LOBSTER files, real or generated. The scores follow LOB-Bench
(Nagy et al. 2025, arXiv 2502.09172, section 3): the distribution of each statistic over all events
is compared by L1 (half the sum of |p - q| over Freedman-Diaconis bins, or over the values
themselves if they are integers) and by the Wasserstein-1 distance of z-scores. Intervals come
from 100 bootstraps over events. Events depend on each other, so the intervals are too narrow for a
claim about other days.

One module, because the scores share their statistics.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from ..errors import LmplayError
from .lobster import EMPTY, NAME

LEVELS = 10
BOOTSTRAPS = 100
COVERAGE = 0.99
SEQUENCE = 500  # messages over which the volatility is taken that a conditional is given
MOST_BINS = 2000
LAGS = 199
HORIZON = 100  # messages


@dataclass(frozen=True)
class SessionData:
    """One session.

    messages: columns time (ns), type, order, size, price (ticks), direction.
    book: (n, 40) ask price, ask size, bid price, bid size of ten levels; nan for an empty level.
    """

    messages: pd.DataFrame
    book: np.ndarray

    @property
    def mid(self) -> np.ndarray:
        return (self.book[:, 0] + self.book[:, 2]) / 2


def read(folder: Path, tick: int = 100) -> list[SessionData]:
    """Read all sessions in a folder of LOBSTER files.

    Raises:
        LmplayError: there is none, or a pair of files does not fit together.
    """
    files = sorted(p for p in folder.glob("*.csv") if NAME.fullmatch(p.name))
    if not files:
        raise LmplayError(
            f"{folder}: there is no LOBSTER message file; lmp_market simulate writes some"
        )
    return [_read(file, tick) for file in files]


def _read(path: Path, tick: int) -> SessionData:
    names = ["time", "type", "order", "size", "price", "direction"]
    book_path = path.with_name(path.name.replace("message", "orderbook"))
    try:
        messages = pd.read_csv(
            path, header=None, names=names, usecols=range(6), dtype={"time": str}
        )
        book = pd.read_csv(book_path, header=None).to_numpy(float)
        parts = messages["time"].str.partition(".")
        times = parts[0].astype(np.int64) * 10**9 + (parts[2] + "0" * 9).str[:9].astype(np.int64)
    except (ValueError, OSError) as e:
        raise LmplayError(f"{path}: it cannot be read: {e}") from e
    if len(messages) != len(book):
        raise LmplayError(
            f"{path}: {len(messages)} messages, but {len(book)} rows in {book_path.name}"
        )
    messages["time"] = times
    off = messages["type"].isin((1, 2, 3, 4)) & (messages["price"] % tick != 0)
    if off.any():
        line = int(off.argmax())
        raise LmplayError(
            f"{path}, line {line + 1}: the price {messages['price'][line]} is off the grid of "
            f"{tick}: another --tick?"
        )
    messages["price"] //= tick
    wide = np.full((len(book), 4 * LEVELS), np.nan)
    wide[:, : min(book.shape[1], 4 * LEVELS)] = book[:, : 4 * LEVELS]
    wide[:, 0::2] /= tick
    empty = np.abs(wide[:, 0::2]) >= EMPTY / tick
    wide[:, 0::2][empty] = np.nan
    wide[:, 1::2][empty] = np.nan
    return SessionData(messages, wide)


# ---------------------------------------------------------------- statistics


def _spread(t: SessionData) -> np.ndarray:
    return t.book[:, 0] - t.book[:, 2]


def _imbalance(t: SessionData) -> np.ndarray:
    ask = t.book[:, 1]
    bid = t.book[:, 3]
    return (bid - ask) / (bid + ask)


def _inter_arrival(t: SessionData) -> np.ndarray:
    ms = np.diff(t.messages["time"].to_numpy()) / 1e6
    return np.log(np.where(ms <= 0, 1e-9, ms))


def _time_to_cancel(t: SessionData) -> np.ndarray:
    m = t.messages
    born = m[m["type"] == 1].drop_duplicates("order").set_index("order")["time"]
    ends = m[m["type"].isin((2, 3))].drop_duplicates("order").set_index("order")["time"]
    seconds = ((ends - born).dropna() / 1e9).to_numpy(float)
    return np.log(np.where(seconds <= 0, 1e-9, seconds))


def _volume(side: int, levels: int) -> Callable[[SessionData], np.ndarray]:
    return lambda t: np.nansum(t.book[:, 1 + 2 * side : 4 * levels : 4], 1)


def _depth(types: tuple[int, ...], direction: int) -> Callable[[SessionData], np.ndarray]:
    def depth(t: SessionData) -> np.ndarray:
        mine = (
            t.messages["type"].isin(types).to_numpy()
            & (t.messages["direction"] == direction).to_numpy()
        )
        return np.abs(t.messages["price"].to_numpy()[mine] - t.mid[mine])

    return depth


def _level(
    types: tuple[int, ...], direction: int, before: bool
) -> Callable[[SessionData], np.ndarray]:
    """Return the level (1 is the best) of a message's price; a cancel's in the book before it."""

    def level(t: SessionData) -> np.ndarray:
        book = np.roll(t.book, 1, axis=0) if before else t.book
        mine = (
            t.messages["type"].isin(types).to_numpy()
            & (t.messages["direction"] == direction).to_numpy()
        )
        mine[0] &= not before
        prices = book[mine, 0 if direction == -1 else 2 :: 4]
        hit = prices == t.messages["price"].to_numpy()[mine, None]
        return hit.argmax(1)[hit.any(1)] + 1.0

    return level


def _volume_per_minute(t: SessionData) -> np.ndarray:
    trades = t.messages[t.messages["type"] == 4]
    if trades.empty:
        return np.empty(0)
    second = trades["time"] // 10**9
    return 60.0 * trades.groupby(second)["size"].sum().to_numpy(float)


def _order_flow_imbalance(t: SessionData, window: int = 100) -> np.ndarray:
    """Cont, Kukanov and Stoikov 2014, equation 4, averaged over 100 messages."""
    ask = t.book[:, 0]
    ask_size = t.book[:, 1]
    bid = t.book[:, 2]
    bid_size = t.book[:, 3]
    up = np.diff(bid)
    down = np.diff(ask)
    flow = (
        (up >= 0) * bid_size[1:]
        - (up <= 0) * bid_size[:-1]
        - (down <= 0) * ask_size[1:]
        + (down >= 0) * ask_size[:-1]
    )
    if len(flow) < window:
        return np.empty(0)
    total = np.concatenate([[0.0], np.cumsum(np.nan_to_num(flow))])
    return (total[window:] - total[:-window]) / window


def _hour(t: SessionData) -> np.ndarray:
    return (t.messages["time"].to_numpy() // (3600 * 10**9)).astype(float)


def _volatility(t: SessionData) -> np.ndarray:
    """Return, for each message, the standard deviation of .1 s returns (ticks) in its block of
    500."""
    out = np.zeros(len(t.messages))
    times = t.messages["time"].to_numpy()
    mid = t.mid
    for start in range(0, len(out), SEQUENCE):
        part = slice(start, start + SEQUENCE)
        grid = np.arange(times[part][0], times[part][-1] + 1, 10**8)
        at = np.searchsorted(times[part], grid, side="right") - 1
        out[part] = np.nan_to_num(np.diff(mid[part][at])).std() if len(grid) > 2 else 0.0
    return out


# (values, whether they are integers)
Statistic = tuple[Callable[[SessionData], np.ndarray], bool]

STATISTICS: dict[str, Statistic] = {
    "spread": (_spread, True),
    "imbalance": (_imbalance, False),
    "log inter-arrival time": (_inter_arrival, False),
    "log time to cancel": (_time_to_cancel, False),
    "ask volume, touch": (_volume(0, 1), False),
    "bid volume, touch": (_volume(1, 1), False),
    "ask volume, 10 levels": (_volume(0, 10), False),
    "bid volume, 10 levels": (_volume(1, 10), False),
    "depth of ask limits": (_depth((1,), -1), False),
    "depth of bid limits": (_depth((1,), 1), False),
    "depth of ask cancels": (_depth((2, 3), -1), False),
    "depth of bid cancels": (_depth((2, 3), 1), False),
    "level of ask limits": (_level((1,), -1, False), True),
    "level of bid limits": (_level((1,), 1, False), True),
    "level of ask cancels": (_level((2, 3), -1, True), True),
    "level of bid cancels": (_level((2, 3), 1, True), True),
    "volume per minute": (_volume_per_minute, False),
    "order-flow imbalance": (_order_flow_imbalance, False),
}
CONDITIONALS: dict[str, tuple[Statistic, Statistic]] = {
    "ask volume | spread": ((_volume(0, 1), False), (_spread, True)),
    "spread | hour": ((_spread, True), (_hour, True)),
    "spread | volatility": ((_spread, True), (_volatility, False)),
}


def values(tapes: list[SessionData], statistic: Callable[[SessionData], np.ndarray]) -> np.ndarray:
    """Return a statistic's values over all sessions, without undefined ones."""
    every = np.concatenate([statistic(t) for t in tapes if len(t.messages) > 1] or [np.empty(0)])
    return every[np.isfinite(every)]


# ---------------------------------------------------------------- distances


@dataclass(frozen=True)
class Distance:
    """A distance with its interval; nan if one of the two markets has no values."""

    value: float
    low: float
    high: float


def edges(real: np.ndarray, generated: np.ndarray, discrete: bool) -> np.ndarray:
    """Return the edges of common bins: Freedman and Diaconis's width, or one bin per value."""
    pooled = np.concatenate([real, generated])
    if discrete:
        found = np.unique(pooled)
        return np.append(found, found[-1] + 1)
    low = pooled.min()
    high = pooled.max()
    quartiles = np.percentile(pooled, (25, 75))
    width = 2 * (quartiles[1] - quartiles[0]) / len(pooled) ** (1 / 3)
    bins = (
        min(MOST_BINS, int(np.ceil((high - low) / width)))
        if width > 0
        else int(np.sqrt(len(pooled)))
    )
    return np.linspace(low, high, max(2, bins + 1)) if high > low else np.array([low, low + 1])


def l1(p: np.ndarray, q: np.ndarray) -> float:
    """Return half the sum of |p - q| of two histograms that are scaled to sum to 1."""
    return float(np.abs(p / p.sum() - q / q.sum()).sum() / 2)


def wasserstein(x: np.ndarray, p: np.ndarray, q: np.ndarray) -> float:
    """Return the area between the distribution functions of two weightings of ascending values
    x."""
    apart = np.abs(np.cumsum(p) / p.sum() - np.cumsum(q) / q.sum())
    return float((apart[:-1] * np.diff(x)).sum())


def distances(
    real: np.ndarray,
    generated: np.ndarray,
    discrete: bool,
    random: np.random.Generator,
    bootstraps: int = BOOTSTRAPS,
) -> tuple[np.ndarray, np.ndarray]:
    """Return (1 + bootstraps,) L1 and W1: of the samples first, then of resampled ones.

    If one side has no values, L1 is 1 and W1 is nan.
    """
    if not len(real) or not len(generated):
        return np.ones(1 + bootstraps), np.full(1 + bootstraps, np.nan)
    borders = edges(real, generated, discrete)
    pooled = np.concatenate([real, generated])
    x, inverse = np.unique(pooled, return_inverse=True)
    deviation = pooled.std()
    z = (x - pooled.mean()) / deviation if deviation > 0 else x * 0.0
    of_bin = np.clip(np.searchsorted(borders, x, side="right") - 1, 0, len(borders) - 2)
    p, q = (
        np.bincount(part, minlength=len(x)).astype(float) for part in np.split(inverse, [len(real)])
    )
    both = []
    for number in range(1 + bootstraps):
        a, b = (
            (p, q)
            if number == 0
            else (random.multinomial(int(c.sum()), c / c.sum()).astype(float) for c in (p, q))
        )
        bins = [np.bincount(of_bin, c, len(borders) - 1) for c in (a, b)]
        both.append((l1(*bins), wasserstein(z, a, b)))
    ones, twos = np.array(both).T
    return ones, twos


def conditional_distances(
    real: tuple[np.ndarray, np.ndarray],
    generated: tuple[np.ndarray, np.ndarray],
    discrete: bool,
    given_discrete: bool,
    random: np.random.Generator,
) -> tuple[np.ndarray, np.ndarray]:
    """Return :func:`distances` within deciles (or values) of a condition, weighted by their events.

    Both inputs are (values, condition). Where only one market has events, L1 is 1 and W1 is left
    out; W1 is nan if nothing is left.
    """
    given = np.concatenate([real[1], generated[1]])
    if not len(real[1]) or not len(generated[1]):
        return distances(real[0], generated[0], discrete, random)
    borders = np.unique(given if given_discrete else np.quantile(given, np.arange(0, 1, 0.1)))
    groups = [np.searchsorted(borders, g, side="right") for g in (real[1], generated[1])]
    total = len(given)
    out = np.zeros((2, 1 + BOOTSTRAPS))
    both = 0
    for group in np.unique(np.concatenate(groups)):
        parts = [v[0][g == group] for v, g in zip((real, generated), groups, strict=True)]
        count = len(np.concatenate(parts))
        found = distances(parts[0], parts[1], discrete, random)
        out[0] += count / total * found[0]
        if len(parts[0]) and len(parts[1]):
            out[1] += count * found[1]
            both += count
    return out[0], out[1] / both if both else np.full(1 + BOOTSTRAPS, np.nan)


def interval(draws: np.ndarray) -> Distance:
    """Return the basic bootstrap interval (Davison and Hinkley 1997, section 5.2).

    Resampling adds to a distance, so the resampled distances are reflected at the value.
    """
    tail = 50 * (1 - COVERAGE)
    if np.isnan(draws).any():
        return Distance(float(draws[0]), float("nan"), float("nan"))
    low, high = np.percentile(draws, (tail, 100 - tail))
    value = float(draws[0])
    return Distance(value, max(0.0, 2 * value - float(high)), max(value, 2 * value - float(low)))


def compare(real: list[SessionData], generated: list[SessionData], seed: int = 0) -> pd.DataFrame:
    """Return l1, l1_low, l1_high, w1, w1_low, w1_high for each statistic, and their mean as last
    row."""
    random = np.random.default_rng(seed)
    rows = {}
    draws = []
    for name, (statistic, discrete) in STATISTICS.items():
        draws.append(
            distances(values(real, statistic), values(generated, statistic), discrete, random)
        )
        rows[name] = draws[-1]
    for name, ((statistic, discrete), (given, given_discrete)) in CONDITIONALS.items():
        pairs = [_given(tapes, statistic, given) for tapes in (real, generated)]
        draws.append(conditional_distances(pairs[0], pairs[1], discrete, given_discrete, random))
        rows[name] = draws[-1]
    rows["mean"] = tuple(np.nanmean([d[i] for d in draws], 0) for i in (0, 1))
    table = {}
    for name, (ones, twos) in rows.items():
        a = interval(ones)
        b = interval(twos)
        table[name] = (a.value, a.low, a.high, b.value, b.low, b.high)
    return pd.DataFrame.from_dict(
        table, orient="index", columns=["l1", "l1_low", "l1_high", "w1", "w1_low", "w1_high"]
    )


def _given(
    tapes: list[SessionData],
    statistic: Callable[[SessionData], np.ndarray],
    given: Callable[[SessionData], np.ndarray],
) -> tuple[np.ndarray, np.ndarray]:
    tapes = [t for t in tapes if len(t.messages) > 1]
    pairs = [(statistic(t), given(t)) for t in tapes]
    v, g = (np.concatenate([p[i] for p in pairs] or [np.empty(0)]) for i in (0, 1))
    kept = np.isfinite(v) & np.isfinite(g)
    return v[kept], g[kept]


def divergence(real: list[SessionData], generated: list[SessionData]) -> pd.DataFrame:
    """Return L1 to the real market by hundreds of messages since the start of the simulation."""
    rows = []
    furthest = min((len(t.messages) for t in generated), default=0)
    for start in range(0, furthest - HORIZON + 1, HORIZON):
        part = [
            SessionData(
                t.messages.iloc[start : start + HORIZON].reset_index(drop=True),
                t.book[start : start + HORIZON],
            )
            for t in generated
        ]
        row: dict[str, float] = {"messages": start + HORIZON}
        for name in (
            "spread",
            "imbalance",
            "log inter-arrival time",
            "ask volume, touch",
            "bid volume, touch",
        ):
            statistic, discrete = STATISTICS[name]
            a = values(real, statistic)
            b = values(part, statistic)
            row[name] = distances(a, b, discrete, np.random.default_rng(0), bootstraps=0)[0][0]
        rows.append(row)
    return pd.DataFrame(rows)


# ---------------------------------------------------------------- impact and stylised facts

EVENT_TYPES = ("MO0", "MO1", "LO0", "LO1", "CA0", "CA1")


def impact(tapes: list[SessionData], lags: int = LAGS) -> pd.DataFrame:
    """Return the mean mid-price move after events, in ticks in the event's direction.

    Rows are lags 1 to 199. Columns are market orders, limit orders and cancels that leave the mid
    (0) or move it (1). Eisler, Bouchaud and Kockelkoren 2012, section 2: R(l) = E[(m_{t+l} - m_t)
    e_t] with the mid before the event, and e = +1 for what buys: a trade at the ask, a bid, the
    cancel of an ask.
    """
    sums = {k: np.zeros(lags) for k in EVENT_TYPES}
    counts = dict.fromkeys(EVENT_TYPES, 0)
    for t in tapes:
        mid = t.mid
        kind = t.messages["type"].to_numpy()
        direction = t.messages["direction"].to_numpy()
        n = len(mid)
        if n <= lags + 1:
            continue
        sign = np.where(kind == 1, direction, -direction)
        moved = np.concatenate([[False], np.diff(mid) != 0]) & np.isfinite(mid)
        for label, types in (("MO", (4,)), ("LO", (1,)), ("CA", (2, 3))):
            for moves in (0, 1):
                at = np.flatnonzero(np.isin(kind, types) & (moved == bool(moves)))
                at = at[(at >= 1) & (at + lags - 1 < n)]
                at = at[np.isfinite(mid[at - 1])]
                if not len(at):
                    continue
                ahead = mid[at[:, None] + np.arange(lags)] - mid[at - 1][:, None]
                sums[f"{label}{moves}"] += np.nansum(ahead * sign[at][:, None], 0)
                counts[f"{label}{moves}"] += len(at)
    curves = {k: sums[k] / counts[k] if counts[k] else np.full(lags, np.nan) for k in EVENT_TYPES}
    return pd.DataFrame(curves, index=pd.RangeIndex(1, lags + 1, name="lag"))


def autocorrelation(x: np.ndarray, lag: int) -> float:
    """Return a series' correlation with itself `lag` later; nan if it is too short or constant."""
    if len(x) <= lag + 1 or x.std() == 0:
        return float("nan")
    x = x - x.mean()
    return float((x[:-lag] * x[lag:]).mean() / (x * x).mean())


def hill(x: np.ndarray, share: float = 0.05) -> float:
    """Return the tail exponent of |x| by Hill's estimator over the largest `share`."""
    ordered = np.sort(np.abs(x))[::-1]
    k = int(len(ordered) * share)
    if k < 10 or ordered[k] <= 0:
        return float("nan")
    return float(1 / np.log(ordered[:k] / ordered[k]).mean())


def returns(tape: SessionData, seconds: float = 1.0) -> np.ndarray:
    """Return the mid price's moves (ticks) from second to second."""
    times = tape.messages["time"].to_numpy()
    grid = np.arange(times[0], times[-1] + 1, int(seconds * 1e9))
    mids = tape.mid[np.searchsorted(times, grid, side="right") - 1]
    return np.diff(mids[np.isfinite(mids)])


def trade_signs(tape: SessionData) -> np.ndarray:
    """Return +1 for each market order that bought, -1 for others. Trades at one time are one
    order's."""
    trades = tape.messages[tape.messages["type"] == 4].drop_duplicates("time")
    return -trades["direction"].to_numpy(float)


def facts(tapes: list[SessionData]) -> dict[str, float]:
    """Return stylized facts: means over sessions; those about messages are weighted by messages."""
    every = pd.concat([t.messages for t in tapes])
    mix = {
        name: float(every["type"].isin(types).mean())
        for name, types in (("adds", (1,)), ("cancels", (2, 3)), ("trades", (4,)))
    }
    long = [t for t in tapes if len(t.messages) > 10]
    moves = [returns(t) for t in long]
    pooled = np.concatenate(moves) if moves else np.empty(0)
    seconds = sum((t.messages["time"].iloc[-1] - t.messages["time"].iloc[0]) / 1e9 for t in long)
    deviation = pooled.std() if len(pooled) else 0.0

    def over(function: Callable[[np.ndarray], float], series: list[np.ndarray]) -> float:
        found = [v for v in (function(s) for s in series) if np.isfinite(v)]
        return float(np.mean(found)) if found else float("nan")

    signs = [trade_signs(t) for t in long]
    return {
        "messages": float(len(every)),
        "messages per second": len(every) / seconds if seconds else float("nan"),
        **mix,
        "mean spread": float(np.nanmean(np.concatenate([_spread(t) for t in tapes]))),
        "deviation of 1 s returns": float(deviation),
        "kurtosis of 1 s returns": float((pooled**4).mean() / deviation**4)
        if deviation > 0
        else float("nan"),
        "tail exponent of 1 s returns": hill(pooled),
        "autocorrelation of returns, 1 s": over(lambda x: autocorrelation(x, 1), moves),
        "autocorrelation of |returns|, 1 s": over(lambda x: autocorrelation(np.abs(x), 1), moves),
        "autocorrelation of |returns|, 10 s": over(lambda x: autocorrelation(np.abs(x), 10), moves),
        "autocorrelation of trade signs, 1": over(lambda x: autocorrelation(x, 1), signs),
        "autocorrelation of trade signs, 10": over(lambda x: autocorrelation(x, 10), signs),
    }
