"""Running a model against live order books: many independent markets, a message at a time.

A round samples one message for every market. It is then held against the market's book: it happens, or is repaired
and happens, or is rejected and sampled again. Where a message does not stand as it was sampled the model's memory is
rolled back to the message's beginning: it remembers what happened, and nothing else.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from copy import copy
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import LmplayError
from .book import Order
from .decode import Reader
from .events import ADD, DAY, EXECUTE, EXECUTE_AT, KINDS, REPLACE, Event, Market, Message
from .masks import LONGEST_GAP, BookMask, Grammar, time_tokens
from .messages import SINK, Messages

MOST_REJECTED = 100
MOST_DRAWS = 16  # of a price, until the model's size is one that rests there
PREFILL = 256  # tokens of the context that are read at a time, of each market
VALID = "valid"


@dataclass(frozen=True)
class Settings:
    """How messages are sampled and what becomes of those that do not fit the book."""

    grammar: bool = True  # only the tokens that a field has
    book: bool = True  # only orders that are there, and times that can be; needs grammar
    repair: bool = True
    temperature: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.book and not self.grammar:
            raise LmplayError("the book mask needs the grammar mask: leave --no-grammar away, or add --no-book")
        if self.temperature <= 0:
            raise LmplayError(f"--temperature {self.temperature}: it must be above 0")


@dataclass
class Tally:
    """How many sampled messages of each kind there were, by what became of them.

    `verdicts` counts (kind, verdict): "valid", or the first thing that is wrong, in the order grammar, ticker, gap,
    reference, front, size. `loose` counts those that name a side and a price at which something rests, `repaired` those
    that could be made to fit.
    """

    verdicts: Counter[tuple[str, str]] = field(default_factory=Counter)
    loose: Counter[str] = field(default_factory=Counter)
    repaired: Counter[str] = field(default_factory=Counter)
    by_round: list[list[int]] = field(default_factory=list)  # of each round: strictly valid, loosely, sampled

    def over_time(self, every: int) -> list[tuple[int, float, float]]:
        """(rounds so far, the strictly and the loosely valid share of the last `every` rounds)."""
        ends = range(every, len(self.by_round) + 1, every)
        sums = [np.sum(self.by_round[end - every : end], 0) for end in ends]
        return [
            (end, float(strict / max(1, count)), float(loose / max(1, count)))
            for end, (strict, loose, count) in zip(ends, sums, strict=True)
        ]

    def table(self) -> dict[str, dict[str, float]]:
        """By kind, and for all: messages, shares that are strictly valid, loosely valid, valid after repair, and of
        each reason."""
        out: dict[str, dict[str, float]] = {}
        for kind in (*KINDS, "unreadable", "all"):
            total = Counter[str]()
            for (k, v), n in self.verdicts.items():
                if kind in (k, "all"):
                    total[v] += n
            count = sum(total.values())
            if not count:
                continue
            kinds = [kind] if kind != "all" else [*KINDS, "unreadable"]
            loose, repaired = (sum(c[k] for k in kinds) for c in (self.loose, self.repaired))
            out[kind] = {
                "messages": count, "strict": total[VALID] / count, "loose": loose / count,
                "after_repair": (total[VALID] + repaired) / count,
                **{f"no_{reason}": n / count for reason, n in sorted(total.items()) if reason != VALID},
            }  # fmt: skip
        return out


def judge(market: Market, message: Message, readable: bool) -> tuple[str, Order | None]:
    """What is wrong with a message first, or "valid", and the order that it is about."""
    if not readable:
        return "grammar", None
    if message.ticker != market.ticker:
        return "ticker", None
    if message.dt > LONGEST_GAP:
        return "gap", None
    if message.kind == ADD:
        return (VALID if message.size > 0 else "size"), None
    order = market.book.find(message.side, market.mid + message.ref_price, message.ref_size, message.ref_time)
    if order is None:
        return "reference", None
    if message.kind in (EXECUTE, EXECUTE_AT) and market.book.front(order.side, order.price) is not order:
        return "front", order
    if message.size <= 0 or (message.kind in (EXECUTE, EXECUTE_AT) and message.size > order.size):
        return "size", order  # a cancel of more than rests is a delete
    return VALID, order


def is_loose(market: Market, message: Message) -> bool:
    """Whether something rests at the side and the price that a message names."""
    return message.kind == ADD or market.book.front(message.side, market.mid + message.ref_price) is not None


def repaired(market: Market, message: Message) -> Event | None:
    """The event nearest to a message that does not fit: about an order at its side and price that has its size, or its
    time, or stands in front; None where nothing rests there."""
    if message.size <= 0 or message.kind == ADD:
        return None
    queue = list(market.book.queue(message.side, market.mid + message.ref_price))
    if not queue:
        return None
    order = queue[0]
    if message.kind not in (EXECUTE, EXECUTE_AT):  # trades hit the front
        alike = [o for o in queue if o.size == message.ref_size and o.time == message.ref_time]
        alike = alike or [o for o in queue if o.size == message.ref_size]
        alike = alike or [o for o in queue if o.time == message.ref_time]
        order = alike[0] if alike else order
    if message.kind != REPLACE:
        message = message._replace(size=min(message.size, order.size))
    return market.interpret(message, order)


@dataclass(frozen=True)
class Before:
    """What there was before a message's price was drawn."""

    position: int
    mark: Any
    logits: Tensor
    masks: list[BookMask]


class Simulator:
    """B live markets and a model that continues all of them.

    Args:
        reader: of B streams.
        messages: the model's vocabulary.
        markets: each is changed as the simulation goes on.
        context: for each market the (n, width) ids of what was told before; the latest are read, as many as fit.

    Raises:
        LmplayError: after 100 rejected messages in a row in one market.
    """

    def __init__(
        self, reader: Reader, messages: Messages, markets: list[Market], context: list[np.ndarray], settings: Settings
    ):
        self.reader, self.m, self.markets, self.settings = reader, messages, markets, settings
        self.grammar = Grammar(messages)
        self.generator = torch.Generator().manual_seed(settings.seed)
        self.tally = Tally()
        self.refused = [0] * len(markets)
        self.sampled = self.happened = 0
        self.redrawn = self.undecided = 0  # prices; and those of which none stood in MOST_DRAWS draws
        shortest = min(len(c) for c in context)
        if shortest < 1:
            raise LmplayError("a market cannot be continued from its first message: there is nothing to read before it")
        read = np.stack([c[len(c) - shortest :] for c in context]).astype(np.int64)  # (B, n, width)
        self._first = read.reshape(len(markets), -1)
        self._mark: object = None
        self._begun = self._unread_from = 0
        self._saved: Tensor | None = None
        self._rejected = torch.zeros(len(markets), dtype=torch.bool)
        self._unread = self._prefill()

    def _prefill(self) -> np.ndarray:
        """Read the sink and the context but for its last token; returns that, (B, 1)."""
        sink = np.full((len(self.markets), 1), SINK, np.int64)
        ids = torch.from_numpy(np.concatenate([sink, self._first[:, :-1]], 1))
        for part in ids.split(PREFILL, 1):
            self.reader.read(part)
        return self._first[:, -1:]

    # ---------------------------------------------------------------- a round

    def round(self, active: list[bool]) -> Iterator[tuple[int, Message, Event]]:
        """Sample a message for every market; yields (market, message, event) of those that are to happen.

        Each event has to be applied to its market before the next is asked for. Markets that are not `active` are
        left alone.
        """
        self.tally.by_round.append([0, 0, 0])
        tokens = self._sample()
        rows, readable = self.m.decode_messages(tokens)
        happens: list[Event | None] = []
        corrected = tokens.copy()
        for b, market in enumerate(self.markets):
            message = Message(*(int(v) for v in rows[b]))
            event = self._event(market, message, bool(readable[b])) if active[b] else None
            happens.append(event)
            if event is not None:
                told = self.m.encode_messages(np.array([market.describe(event)]))
                corrected[b] = told[0]
            if active[b]:
                self.refused[b] = 0 if event is not None else self.refused[b] + 1
                if self.refused[b] == MOST_REJECTED:
                    raise LmplayError(
                        f"market {b}: {MOST_REJECTED} messages in a row were rejected; the last one: "
                        f"{self.m.decode(tokens[b].tolist()).strip()}"
                    )
        self._remember(tokens, corrected, torch.tensor([e is None for e in happens]))
        for b, event in enumerate(happens):
            if event is not None:
                self.happened += 1
                yield b, Message(*(int(v) for v in rows[b])), event

    def _event(self, market: Market, message: Message, readable: bool) -> Event | None:
        """What a sampled message makes happen, counted; None where it is rejected."""
        self.sampled += 1
        verdict, order = judge(market, message, readable)
        name = KINDS[message.kind] if readable else "unreadable"
        self.tally.verdicts[name, verdict] += 1
        self.tally.by_round[-1][0] += verdict == VALID
        self.tally.by_round[-1][2] += 1
        if not readable or verdict in ("ticker", "gap") or message.time >= DAY:
            return None
        loose = is_loose(market, message)
        self.tally.loose[name] += loose
        self.tally.by_round[-1][1] += loose
        if verdict == VALID:
            return market.interpret(message, order)
        event = repaired(market, message)
        self.tally.repaired[name] += event is not None
        return event if self.settings.repair else None

    # ---------------------------------------------------------------- sampling

    def _sample(self) -> np.ndarray:
        """(B, width) tokens, sampled position by position; what is certain is read together with what follows."""
        batch, width = len(self.markets), self.m.width
        tokens = np.zeros((batch, width), np.int64)
        self.reader.make_room(self._unread.shape[1] + width)
        book = self.m.book_tokens(self.markets)
        position = book.shape[1]
        tokens[:, :position] = book
        if self.settings.grammar and self.m.layout[position][0] == "ticker":
            tokens[:, position] = [self.m.token("ticker", m.ticker) for m in self.markets]
            position += 1
        self._begun = position
        logits = self.reader.read(torch.from_numpy(np.concatenate([self._unread, tokens[:, :position]], 1)))
        if self._saved is not None and bool(self._rejected.any()):
            self.reader.roll_back(self._mark, self._rejected)
            logits[self._rejected] = self._saved[self._rejected]
        self._mark, self._saved = self.reader.mark(), logits
        masks = [BookMask(self.m, m) for m in self.markets] if self.settings.book else None
        unread = position  # the first position that was not read yet
        prices, sizes = ([self.m.first[f] for f in fields] for fields in (("price", "ref_price"), ("size", "ref_size")))
        while True:
            forced = [self._forced(b, position, tokens[b]) for b in range(batch)]
            if None in forced:
                if position > unread:
                    logits = self.reader.read(torch.from_numpy(tokens[:, unread:position]))
                    unread = position
                if masks is not None and position in prices:
                    before = Before(position, self.reader.mark(), logits, [copy(mask) for mask in masks])
                elif masks is not None and position in sizes:
                    logits = self._redraw(tokens, position, logits, masks, before)
                drawn = self._draw(logits, position, masks)
            else:
                drawn = np.zeros(batch, np.int64)
            tokens[:, position] = [d if f is None else f for d, f in zip(drawn, forced, strict=True)]
            if masks is not None:
                start, _ = self.grammar.group(position)
                for mask, token, known in zip(masks, tokens[:, position], forced, strict=True):
                    if known is None:
                        mask.take(position, int(token) - start)
            position += 1
            if position == width:
                self._unread_from = unread
                return tokens

    def _redraw(
        self, tokens: np.ndarray, size_at: int, logits: Tensor, masks: list[BookMask], before: Before
    ) -> Tensor:
        """Draw prices anew, of rows whose size behind it would name an order that does not rest; returns the size's
        logits.

        A mask alone would bend what the model means: of a price at which it sees many orders come and go, only the one
        that never moves may rest, and the mask would make every size its own. With as many draws as it takes, a price
        and a size that stand together are as likely as the model has them: a draw stands with the probability that the
        model gives to the sizes that rest there. (The bias of masks without this: Park et al. 2024, arXiv 2405.21047.)
        Where none of MOST_DRAWS stood, one of them is taken at random (importance resampling: Rubin 1988), by the odds
        of its share: draws that were refused are less often of prices that mostly stand.
        """
        prices = slice(before.position, size_at)

        def read_again(rows: np.ndarray, choose: Callable[[int, Tensor], np.ndarray]) -> Tensor:
            """Prices of `rows` by `choose` (position, logits); every row's are read again."""
            self.reader.roll_back(before.mark, torch.ones(len(masks), dtype=torch.bool))
            for b in rows:
                masks[b] = copy(before.masks[b])
            logits = before.logits
            for position in range(prices.start, prices.stop):
                start, _ = self.grammar.group(position)
                chosen = choose(position, logits)
                for b in rows:
                    tokens[b, position] = chosen[b]
                    masks[b].take(position, int(chosen[b]) - start)
                logits = self.reader.read(torch.from_numpy(tokens[:, position : position + 1]))
            return logits

        stands, share = self._stand(logits, size_at, masks)
        draws = [(tokens[:, prices].copy(), share)]
        while len(draws) < MOST_DRAWS and not stands.all():
            anew = np.flatnonzero(~stands)
            self.redrawn += len(anew)
            logits = read_again(anew, lambda position, seen: self._draw(seen, position, masks))
            stood, share = self._stand(logits, size_at, masks)
            stands |= stood
            draws.append((tokens[:, prices].copy(), share))
        left = np.flatnonzero(~stands)
        if len(left):
            self.undecided += len(left)
            shares = torch.stack([share[left] for _, share in draws], 1)  # (rows left, draws), all below 1
            odds = (shares / (1 - shares)).clamp(min=1e-30)
            for b, pick in zip(left, torch.multinomial(odds, 1, generator=self.generator).squeeze(1), strict=True):
                tokens[b, prices] = draws[pick][0][b]
            logits = read_again(left, lambda position, _: tokens[:, position])
        return logits

    def _stand(self, logits: Tensor, position: int, masks: list[BookMask]) -> tuple[np.ndarray, Tensor]:
        """(B,) whether each row's price is kept, at random by the share of the model's sizes that rest there; and that
        share, 1 where no order is named."""
        start, count = self.grammar.group(position)
        shares = (logits[:, start : start + count] / self.settings.temperature).softmax(-1)
        drawn = torch.rand(len(masks), generator=self.generator)
        rests = torch.ones(len(masks))
        for b, mask in enumerate(masks):
            if mask.names_an_order(position):
                rests[b] = shares[b, mask.allowed(position)].sum()
        return (drawn < rests).numpy(), rests

    def _forced(self, b: int, position: int, tokens: np.ndarray) -> int | None:
        """The token of a position that is not sampled: the time is the last one's and what passed since."""
        name, _, _ = self.m.layout[position]
        if name == "time":
            digits = time_tokens(self.m, tokens, self.markets[b].time)
            return None if digits is None else int(digits[position - self.m.first["time"]])
        return self.grammar.forced(position, tokens) if self.settings.grammar else None

    def _draw(self, logits: Tensor, position: int, masks: list[BookMask] | None) -> np.ndarray:
        """(B,) a token for each row; rows whose token is forced get one that is not used."""
        if not self.settings.grammar:
            return self._pick(logits)
        start, count = self.grammar.group(position)
        part = logits[:, start : start + count]
        if masks is not None:
            blocked = np.zeros((len(masks), count), bool)
            for row, mask in zip(blocked, masks, strict=True):
                allowed = mask.allowed(position)
                if allowed is not None:
                    row[:] = True
                    row[allowed] = False
            if blocked.any():
                part = part.masked_fill(torch.from_numpy(blocked), float("-inf"))
        return start + self._pick(part)

    def _pick(self, logits: Tensor) -> np.ndarray:
        probabilities = (logits / self.settings.temperature).softmax(-1)
        return torch.multinomial(probabilities, 1, generator=self.generator).squeeze(1).numpy()

    def _remember(self, tokens: np.ndarray, corrected: np.ndarray, rejected: Tensor) -> None:
        """Make the model's memory what happened: corrected messages are read again, rejected ones forgotten."""
        tail = self._unread_from
        changed = torch.from_numpy((tokens != corrected).any(1)) & ~rejected
        if bool(changed.any()) and tail > self._begun:
            # In every row: those that were right read the same again.
            self.reader.roll_back(self._mark, torch.ones_like(rejected))
            self.reader.read(torch.from_numpy(corrected[:, self._begun : tail]))
        self.reader.roll_back(self._mark, rejected)
        self._rejected = rejected
        self._unread = corrected[:, tail:]
