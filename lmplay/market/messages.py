"""Messages as tokens: 24 to a message, the 22 of LOBS5, or 27 with the book that a message meets,
by lookup tables.

position  field                       tokens
0         ticker                      1
1         kind                        1
2         side                        1
3-4       price, ticks from the mid   sign + 1
5         size                        1
6         remaining size, or NA       1
7-10      time since the last         1 of seconds + 3 of nanoseconds, base 1000
11-15     time since midnight         2 of seconds + 3 of nanoseconds, base 1000
16-17     price of the order, or NA   sign + 1
18        size of the order, or NA    1
19-23     time of the order, or NA    2 + 3

LOBS5's form (Nagy et al. 2023, arXiv 2309.00638) leaves out the ticker and the remaining size and
knows four kinds.

The form "book" has three tokens before each message: the spread in ticks, and the volumes at the
best bid and the best ask, to their leading digit. Whoever has read them knows at which distances
from the mid the two sides begin, which a model that reads messages alone has to keep count of.
(LOBS5 reads volumes of many levels in a network of their own.)
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import Field, model_validator

from ..data.tokenizers import Tokenizer, TokenizerSchema
from ..errors import LmplayError, did_you_mean
from .events import ADD, KINDS, MAX_PRICE, MAX_SIZE, NA, REPLACE, Market, Message

if TYPE_CHECKING:
    from ..plan import Plan

MASK = 0
SINK = 1
NA_TOKEN = 2
SPECIALS = ("<mask>", "<sink>", "NA")
PAD_TO = 64
SECOND = 10**9

COLUMNS = Message._fields
GROUPS = {  # field: the kinds of its tokens
    "ticker": ("ticker",),
    "kind": ("kind",),
    "side": ("side",),
    "price": ("sign", "price"),
    "size": ("size",),
    "remaining": ("size",),
    "dt": ("time",) * 4,
    "time": ("time",) * 5,
    "ref_price": ("sign", "price"),
    "ref_size": ("size",),
    "ref_time": ("time",) * 5,
    "spread": ("price",),
    "bid_volume": ("size",),
    "ask_volume": ("size",),
}
BOOK = ("spread", "bid_volume", "ask_volume")
MAY_BE_NA = {"remaining", "ref_price", "ref_size", "ref_time", *BOOK}
LOBS5_LEAVES_OUT = {"ticker", "remaining"}
WORD = {"time": "t", "size": "s", "price": "p"}

Form = Literal["full", "lobs5", "book"]


class MessageError(ValueError):
    """A message without tokens, or tokens without message; `row` and `field` tell where."""

    def __init__(self, row: int, field: str, value: object):
        super().__init__(f"message {row}: {field} {value} is out of range")
        self.row = row
        self.field = field
        self.value = value


class MarketTokenizer(TokenizerSchema):
    """Messages of a market: 24 tokens each, 22 in LOBS5's form, or 27 with the best prices."""

    kind: Literal["market"] = "market"
    tickers: list[str] = Field(min_length=1, description="in the order of their tokens")
    form: Literal["full", "lobs5", "book"] = "full"

    @model_validator(mode="after")
    def _one_ticker(self) -> MarketTokenizer:
        if self.form == "lobs5" and len(self.tickers) > 1:
            raise ValueError("form lobs5 leaves the ticker out: it knows one")
        return self

    @property
    def width(self) -> int:
        """Tokens per message."""
        return {"full": 24, "lobs5": 22, "book": 27}[self.form]

    def check_plan(self, plan: Plan) -> None:
        if any(plan.datasets[name].source != "market" for name in plan.used_datasets):
            raise ValueError(
                "market data sets and the market tokenizer go together, and with no others"
            )
        messages, rest = divmod((plan.model.max_len or 0) - 1, self.width)
        if rest or messages < 1:
            raise ValueError(
                f"model.max_len must be 1 + a multiple of {self.width}: "
                "a sink and complete messages"
            )


class Messages(Tokenizer):
    """The vocabulary of messages, and a tokenizer of their text form, such as `add bid - p3 s100`.

    Ids: mask, sink, NA, then 1000 times, kinds, 10000 sizes, 1000 prices, 2 signs, 2 sides,
    tickers, and padding to a multiple of 64.

    Args:
        tickers: the names, in the order of their numbers.
        form: "full" (24 tokens), "lobs5" (22) or "book" (27).
    """

    Schema = MarketTokenizer

    def __init__(self, tickers: Sequence[str], form: Form = "full"):
        self.tickers = tuple(tickers)
        self.form = form
        kept = [
            f for f in COLUMNS if f not in BOOK and (form != "lobs5" or f not in LOBS5_LEAVES_OUT)
        ]
        self.fields = (*BOOK, *kept) if form == "book" else tuple(kept)
        kinds = KINDS if form != "lobs5" else tuple(k for k in KINDS if k != "execute_at")
        words = {
            "time": [f"t{i}" for i in range(1000)],
            "kind": list(kinds),
            "size": [f"s{i}" for i in range(MAX_SIZE + 1)],
            "price": [f"p{i}" for i in range(MAX_PRICE + 1)],
            "sign": ["-", "+"],
            "side": ["bid", "ask"],
        }
        if form != "lobs5":
            words["ticker"] = list(self.tickers)
        every = list(SPECIALS)
        self.start: dict[str, int] = {}
        for group, names in words.items():
            self.start[group] = len(every)
            every += names
        self.count = {group: len(names) for group, names in words.items()}
        self.unpadded = len(every)
        every += [""] * (-len(every) % PAD_TO)
        self.pieces = [f"{w} ".encode() if w else b"" for w in every]
        self.eot = SINK
        self.ids = {w: i for i, w in enumerate(every) if w}
        if len(self.ids) != self.unpadded:
            raise LmplayError(
                "tokenizer market: a ticker is named twice, or like another word of a message"
            )
        # By position: the field, the token's group, and the number of the column in Message.
        self.layout = [(f, g, COLUMNS.index(f)) for f in self.fields for g in GROUPS[f]]
        self.width = len(self.layout)
        self.first = {f: [name for name, _, _ in self.layout].index(f) for f in self.fields}
        self._kind_to_token = np.array(
            [kinds.index(k) if k in kinds else kinds.index("execute") for k in KINDS]
        )
        self._token_to_kind = np.array([KINDS.index(k) for k in kinds])

    @classmethod
    def from_plan(cls, schema: MarketTokenizer) -> Messages:
        return cls(schema.tickers, schema.form)

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> Messages:
        return cls(state["tickers"], state["form"])

    # ---------------------------------------------------------------- messages

    def encode_messages(self, rows: np.ndarray) -> np.ndarray:
        """(n, 14) int64, the columns of Message -> (n, width) int64 ids.

        Raises:
            MessageError: the first value that has no token.
        """
        rows = np.asarray(rows, np.int64).reshape(-1, len(COLUMNS))
        out = np.empty((len(rows), self.width), np.int64)
        for field in self.fields:
            column = rows[:, COLUMNS.index(field)]
            at = self.first[field]
            digits = self._digits(field, column)
            out[:, at : at + digits.shape[1]] = digits
        return out

    def _digits(self, field: str, values: np.ndarray) -> np.ndarray:
        """(n,) values of a field -> (n, k) ids."""
        na = values == NA
        if field not in MAY_BE_NA and na.any():
            raise MessageError(int(na.argmax()), field, "NA")
        plain = np.where(na, 0, values)
        parts: list[np.ndarray]
        if GROUPS[field] == ("sign", "price"):
            self._within(field, plain, -MAX_PRICE, MAX_PRICE)
            parts = [self.start["sign"] + (plain >= 0), self.start["price"] + np.abs(plain)]
        elif GROUPS[field][0] == "time":
            seconds = plain // SECOND
            nanos = plain % SECOND
            digits = len(GROUPS[field]) - 3
            self._within(field, plain, 0, 1000**digits * SECOND - 1)
            parts = [seconds] if digits == 1 else [seconds // 1000, seconds % 1000]
            parts = [
                self.start["time"] + p
                for p in (*parts, nanos // 10**6, nanos // 1000 % 1000, nanos % 1000)
            ]
        elif field == "kind":
            self._within(field, plain, 0, len(KINDS) - 1)
            parts = [self.start["kind"] + self._kind_to_token[plain]]
        else:
            group = GROUPS[field][0]
            self._within(field, plain, 0, self.count[group] - 1)
            parts = [self.start[group] + plain]
        return np.stack([np.where(na, NA_TOKEN, p) for p in parts], 1)

    def _within(self, field: str, values: np.ndarray, low: int, high: int) -> None:
        bad = (values < low) | (values > high)
        if bad.any():
            row = int(bad.argmax())
            raise MessageError(row, field, int(values[row]))

    def decode_messages(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return (n, 14) columns of Message for (n, width) ids, and (n,) whether each follows the
        grammar.

        Fields that the form does not have, and all fields of an ungrammatical row, are NA or 0.
        """
        ids = np.asarray(ids, np.int64).reshape(-1, self.width)
        rows = np.full((len(ids), len(COLUMNS)), NA, np.int64)
        ok = np.ones(len(ids), bool)
        for field in self.fields:
            at = self.first[field]
            groups = GROUPS[field]
            tokens = ids[:, at : at + len(groups)]
            values = np.stack([t - self.start[g] for t, g in zip(tokens.T, groups, strict=True)], 1)
            inside = np.all(
                [(v >= 0) & (v < self.count[g]) for v, g in zip(values.T, groups, strict=True)], 0
            )
            na = (tokens == NA_TOKEN).all(1) & (field in MAY_BE_NA)
            ok &= inside | na
            rows[:, COLUMNS.index(field)] = np.where(inside, self._value(field, values, inside), NA)
        if self.form == "lobs5":
            rows[:, COLUMNS.index("ticker")] = 0
        ok &= self._grammatical(rows)
        if self.form == "lobs5":
            taken = ok & np.isin(
                rows[:, 1], [k for k in range(len(KINDS)) if k not in (ADD, REPLACE)]
            )
            rows[taken, COLUMNS.index("remaining")] = (
                rows[:, COLUMNS.index("ref_size")] - rows[:, 4]
            )[taken]
        return rows, ok

    def _value(self, field: str, values: np.ndarray, inside: np.ndarray) -> np.ndarray:
        """(n, k) numbers within their groups -> (n,) the field's value."""
        groups = GROUPS[field]
        if groups == ("sign", "price"):
            return np.where(values[:, 0] == 1, values[:, 1], -values[:, 1])
        if groups[0] == "time":
            total = np.zeros(len(values), np.int64)
            for digit in values.T:
                total = total * 1000 + np.where(inside, digit, 0)
            return total
        if field == "kind":
            return self._token_to_kind[np.where(inside, values[:, 0], 0)]
        return values[:, 0]

    def _grammatical(self, rows: np.ndarray) -> np.ndarray:
        """Return whether NA is exactly where the kind requires it."""
        kind = rows[:, COLUMNS.index("kind")]
        ok = kind != NA
        about = (kind != ADD) & ok
        for field in ("ref_price", "ref_size", "ref_time"):
            ok &= (rows[:, COLUMNS.index(field)] != NA) == about
        if "remaining" in self.fields:
            ok &= (rows[:, COLUMNS.index("remaining")] != NA) == (about & (kind != REPLACE))
        return ok

    def book_tokens(self, markets: Sequence[Market]) -> np.ndarray:
        """Return the ids (n, k) before each market's next message: k is 3 in the form "book", else
        0."""
        if self.form != "book":
            return np.empty((len(markets), 0), np.int64)
        touches = np.array([market.touch() for market in markets], np.int64)
        return np.concatenate(
            [self._digits(f, values) for f, values in zip(BOOK, touches.T, strict=True)], 1
        )

    def token(self, group: str, value: int) -> int:
        return self.start[group] + value

    def kind_token(self, kind: int) -> int:
        return self.start["kind"] + int(self._kind_to_token[kind])

    # ---------------------------------------------------------------- a tokenizer of written
    # messages

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Raises LmplayError for a word that is in no message."""
        out = []
        for text in texts:
            words = text.split()
            unknown = next((w for w in words if w not in self.ids), None)
            if unknown is not None:
                raise LmplayError(
                    f"the word {unknown!r} is in no message{did_you_mean(unknown, self.ids)}"
                )
            out.append(np.array([self.ids[w] for w in words], dtype=np.int64))
        return out

    def state(self) -> dict[str, Any]:
        return {"kind": self.kind, "tickers": list(self.tickers), "form": self.form}

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(json.dumps(self.state()).encode()).hexdigest()[:16]
