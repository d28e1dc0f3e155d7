"""Run a model against live order books: many independent markets, one message at a time.

A round samples one message for every market. The market's book accepts it, or it is repaired, or it
is rejected and sampled again. If a message does not happen as it was sampled, the model's memory is
rolled back to the start of the message: it remembers only what happened.

One module, because sampling, judging and remembering a message are one loop.
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
    """How messages are sampled, and what becomes of those that do not fit the book."""

    grammar: bool = True  # only the tokens that a field has
    book: bool = True  # only orders that are there, and times that can be; needs grammar
    repair: bool = True
    temperature: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.book and not self.grammar:
            raise LmplayError(
                "the book mask needs the grammar mask: leave --no-grammar away, or add --no-book"
            )
        if self.temperature <= 0:
            raise LmplayError(f"--temperature {self.temperature}: it must be above 0")


@dataclass
class Tally:
    """Counts of sampled messages by kind and outcome.

    `verdicts` counts (kind, verdict): "valid", or the first error in the order grammar, ticker,
    gap, reference, front, size. `loose` counts messages that name a side and price at which
    something rests, `repaired` those that could be repaired.
    """

    verdicts: Counter[tuple[str, str]] = field(default_factory=Counter)
    loose: Counter[str] = field(default_factory=Counter)
    repaired: Counter[str] = field(default_factory=Counter)
    # of each round: strictly valid, loosely, sampled
    by_round: list[list[int]] = field(default_factory=list)

    def over_time(self, every: int) -> list[tuple[int, float, float]]:
        """Return (rounds so far, strictly valid share, loosely valid share) of every `every`
        rounds."""
        ends = range(every, len(self.by_round) + 1, every)
        sums = [np.sum(self.by_round[end - every : end], 0) for end in ends]
        return [
            (end, float(strict / max(1, count)), float(loose / max(1, count)))
            for end, (strict, loose, count) in zip(ends, sums, strict=True)
        ]

    def table(self) -> dict[str, dict[str, float]]:
        """Return, by kind and for all: messages, valid shares (strict, loose, repaired), and
        errors."""
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
                "messages": count,
                "strict": total[VALID] / count,
                "loose": loose / count,
                "after_repair": (total[VALID] + repaired) / count,
                **{
                    f"no_{reason}": n / count
                    for reason, n in sorted(total.items())
                    if reason != VALID
                },
            }
        return out


def check_message(market: Market, message: Message, readable: bool) -> tuple[str, Order | None]:
    """Return "valid" or the first error of a message, and the order that it is about."""
    if not readable:
        return "grammar", None
    if message.ticker != market.ticker:
        return "ticker", None
    if message.dt > LONGEST_GAP:
        return "gap", None
    if message.kind == ADD:
        return (VALID if message.size > 0 else "size"), None
    order = market.book.find(
        message.side, market.mid + message.ref_price, message.ref_size, message.ref_time
    )
    if order is None:
        return "reference", None
    if (
        message.kind in (EXECUTE, EXECUTE_AT)
        and market.book.front(order.side, order.price) is not order
    ):
        return "front", order
    if message.size <= 0 or (message.kind in (EXECUTE, EXECUTE_AT) and message.size > order.size):
        return "size", order  # a cancel of more than rests is a delete
    return VALID, order


def is_loose(market: Market, message: Message) -> bool:
    """Return whether something rests at the side and the price that a message names."""
    return (
        message.kind == ADD
        or market.book.front(message.side, market.mid + message.ref_price) is not None
    )


def repaired(market: Market, message: Message) -> Event | None:
    """Return the most similar event that fits the book, or None if nothing rests at its price.

    Its order has the message's size, or its time, or is the front of the queue.
    """
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
class PriceDraw:
    """The state before a message's price was drawn."""

    position: int
    mark: Any
    logits: Tensor
    masks: list[BookMask]


class Simulator:
    """B live markets, and a model that continues all of them.

    Args:
        reader: of B streams.
        messages: the model's vocabulary.
        markets: each changes during the simulation.
        context: for each market, the ids (n, width) of earlier messages; the latest that fit are
            read.

    Raises:
        LmplayError: 100 messages in a row were rejected in one market.
    """

    def __init__(
        self,
        reader: Reader,
        messages: Messages,
        markets: list[Market],
        context: list[np.ndarray],
        settings: Settings,
    ):
        self.reader = reader
        self.m = messages
        self.markets = markets
        self.settings = settings
        self.grammar = Grammar(messages)
        self.generator = torch.Generator().manual_seed(settings.seed)
        self.tally = Tally()
        self.refused = [0] * len(markets)
        self.sampled = self.happened = 0
        # prices; and those of which none stood in MOST_DRAWS draws
        self.redrawn = self.undecided = 0
        shortest = min(len(c) for c in context)
        if shortest < 1:
            raise LmplayError(
                "a market cannot be continued from its first message: there is nothing to read "
                "before it"
            )
        read = np.stack([c[len(c) - shortest :] for c in context]).astype(np.int64)  # (B, n, width)
        self._first = read.reshape(len(markets), -1)
        self._mark: object = None
        self._begun = self._unread_from = 0
        self._saved: Tensor | None = None
        self._rejected = torch.zeros(len(markets), dtype=torch.bool)
        self._unread = self._prefill()

    def _prefill(self) -> np.ndarray:
        """Read the sink and the context except its last token, which is returned (B, 1)."""
        sink = np.full((len(self.markets), 1), SINK, np.int64)
        ids = torch.from_numpy(np.concatenate([sink, self._first[:, :-1]], 1))
        for part in ids.split(PREFILL, 1):
            self.reader.read(part)
        return self._first[:, -1:]

    # ---------------------------------------------------------------- a round

    def round(self, active: list[bool]) -> Iterator[tuple[int, Message, Event]]:
        """Sample a message for every market; yield (market, message, event) of those that happen.

        Apply each event to its market before asking for the next. Markets that are not `active` do
        not change.
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
                ids = self.m.encode_messages(np.array([market.describe(event)]))
                corrected[b] = ids[0]
            if active[b]:
                self.refused[b] = 0 if event is not None else self.refused[b] + 1
                if self.refused[b] == MOST_REJECTED:
                    raise LmplayError(
                        f"market {b}: {MOST_REJECTED} messages in a row were rejected; the last "
                        "one: "
                        f"{self.m.decode(tokens[b].tolist()).strip()}"
                    )
        self._remember(tokens, corrected, torch.tensor([e is None for e in happens]))
        for b, event in enumerate(happens):
            if event is not None:
                self.happened += 1
                yield b, Message(*(int(v) for v in rows[b])), event

    def _event(self, market: Market, message: Message, readable: bool) -> Event | None:
        """Count a sampled message and return its event, or None if it is rejected."""
        self.sampled += 1
        verdict, order = check_message(market, message, readable)
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
        """Return (B, width) sampled tokens. Certain tokens are read together with what follows
        them."""
        batch = len(self.markets)
        width = self.m.width
        tokens = np.zeros((batch, width), np.int64)
        self.reader.make_room(self._unread.shape[1] + width)
        book = self.m.book_tokens(self.markets)
        position = book.shape[1]
        tokens[:, :position] = book
        if self.settings.grammar and self.m.layout[position][0] == "ticker":
            tokens[:, position] = [self.m.token("ticker", m.ticker) for m in self.markets]
            position += 1
        self._begun = position
        logits = self.reader.read(
            torch.from_numpy(np.concatenate([self._unread, tokens[:, :position]], 1))
        )
        if self._saved is not None and bool(self._rejected.any()):
            self.reader.roll_back(self._mark, self._rejected)
            logits[self._rejected] = self._saved[self._rejected]
        self._mark = self.reader.mark()
        self._saved = logits
        masks = [BookMask(self.m, m) for m in self.markets] if self.settings.book else None
        unread = position  # the first position that was not read yet
        prices, sizes = (
            [self.m.first[f] for f in fields]
            for fields in (("price", "ref_price"), ("size", "ref_size"))
        )
        while True:
            forced = [self._forced(b, position, tokens[b]) for b in range(batch)]
            if None in forced:
                if position > unread:
                    logits = self.reader.read(torch.from_numpy(tokens[:, unread:position]))
                    unread = position
                if masks is not None and position in prices:
                    before = PriceDraw(
                        position, self.reader.mark(), logits, [copy(mask) for mask in masks]
                    )
                elif masks is not None and position in sizes:
                    logits = self._redraw(tokens, position, logits, masks, before)
                drawn = self._draw(logits, position, masks)
            else:
                drawn = np.zeros(batch, np.int64)
            tokens[:, position] = [
                d if f is None else f for d, f in zip(drawn, forced, strict=True)
            ]
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
        self,
        tokens: np.ndarray,
        size_at: int,
        logits: Tensor,
        masks: list[BookMask],
        before: PriceDraw,
    ) -> Tensor:
        """Draw prices again in rows whose size would name no resting order; return the size's
        logits.

        A mask alone would distort the model: at a price where it expects many orders to come and
        go, only the one that never moves may rest, and the mask would make every size its own.
        Instead a draw of a price is accepted with the probability that the model gives to the sizes
        that rest there. With enough draws, an accepted price and size are as likely as under the
        model. (On the bias of masks without this: Park et al. 2024, arXiv 2405.21047.) If none of
        MOST_DRAWS is accepted, one is taken at random (importance resampling, Rubin 1988) by the
        odds of its share, because rejected draws are rarely of prices that are mostly accepted.
        """
        prices = slice(before.position, size_at)

        def read_again(rows: np.ndarray, choose: Callable[[int, Tensor], np.ndarray]) -> Tensor:
            """Set prices of `rows` by `choose` (position, logits) and read all rows' prices
            again."""
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
            # (rows left, draws), all below 1
            shares = torch.stack([share[left] for _, share in draws], 1)
            odds = (shares / (1 - shares)).clamp(min=1e-30)
            for b, pick in zip(
                left, torch.multinomial(odds, 1, generator=self.generator).squeeze(1), strict=True
            ):
                tokens[b, prices] = draws[pick][0][b]
            logits = read_again(left, lambda position, _: tokens[:, position])
        return logits

    def _stand(
        self, logits: Tensor, position: int, masks: list[BookMask]
    ) -> tuple[np.ndarray, Tensor]:
        """Return (B,) whether each row's price is accepted, and the share of the model's sizes that
        rest.

        The share is 1 if the message names no order.
        """
        start, count = self.grammar.group(position)
        shares = (logits[:, start : start + count] / self.settings.temperature).softmax(-1)
        drawn = torch.rand(len(masks), generator=self.generator)
        rests = torch.ones(len(masks))
        for b, mask in enumerate(masks):
            if mask.names_an_order(position):
                rests[b] = shares[b, mask.allowed(position)].sum()
        return (drawn < rests).numpy(), rests

    def _forced(self, b: int, position: int, tokens: np.ndarray) -> int | None:
        """Return the token of a position that is not sampled, else None. The time is the last one's
        plus dt."""
        name, _, _ = self.m.layout[position]
        if name == "time":
            digits = time_tokens(self.m, tokens, self.markets[b].time)
            return None if digits is None else int(digits[position - self.m.first["time"]])
        return self.grammar.forced(position, tokens) if self.settings.grammar else None

    def _draw(self, logits: Tensor, position: int, masks: list[BookMask] | None) -> np.ndarray:
        """Return a token (B,) for each row; rows with a forced token get one that is not used."""
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
        """Read corrected messages again and forget rejected ones, so that the memory is what
        happened."""
        tail = self._unread_from
        changed = torch.from_numpy((tokens != corrected).any(1)) & ~rejected
        if bool(changed.any()) and tail > self._begun:
            # In every row: those that were right read the same again.
            self.reader.roll_back(self._mark, torch.ones_like(rejected))
            self.reader.read(torch.from_numpy(corrected[:, self._begun : tail]))
        self.reader.roll_back(self._mark, rejected)
        self._rejected = rejected
        self._unread = corrected[:, tail:]
