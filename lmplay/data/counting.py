"""Losses of count tables: what counting pairs and triples of tokens alone would reach.

A run that ends above the bigram table has learned less than which token follows which. Each data
set has tables of its own, counted from its training tokens and tested on its part of the validation
set. They use
interpolated Kneser-Ney smoothing with one discount (Kneser and Ney 1995; Chen and Goodman 1999,
section 2.8, eq. 16 in the interpolated form of section 4.1.6):

    p(w | c) = (max(n(c w) - d, 0) + d N(c) p(w | c')) / n(c)

where n counts, N(c) is the number of different tokens after the context c, and c' is c without its
first token. Below the longest context, n(c w) is the number of different tokens in front of c w.
The last level mixes with 1 / vocabulary. A context that was never seen has p(w | c').
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np

from ..files import read_json, write_json
from ..ops import IGNORE
from ..plan import Plan
from .packing import ValidationSet
from .prepare import Prepared
from .token_files import Progress, cache_folder

VERSION = 2  # of the tables; a new one counts again
DISCOUNT = 0.75
NAMES = ("unigram", "bigram", "trigram")
LARGEST_VOCABULARY = 2**21 - 1  # a triple is one int64
NONE = -1  # in place of a token that is not there
MOST_TOKENS = 20_000_000  # of a data set are counted, the first ones


@dataclass(frozen=True)
class Level:
    """Counts of n-grams and of their contexts, as sorted arrays.

    grams (n,) int64: the tokens of an n-gram as digits of a number; counts (n,). contexts (m,)
    int64, totals (m,): the sum of the counts after each context; kinds (m,): how many different
    tokens follow it.
    """

    grams: np.ndarray
    counts: np.ndarray
    contexts: np.ndarray
    totals: np.ndarray
    kinds: np.ndarray

    @classmethod
    def of(cls, grams: np.ndarray, counts: np.ndarray, vocab: int) -> Level:
        """Return the level of sorted, different n-grams and their counts."""
        contexts, first = np.unique(grams // vocab, return_index=True)
        totals = np.add.reduceat(counts, first) if len(first) else counts[:0]
        kinds = np.diff(np.append(first, len(grams)))
        return cls(grams, counts, contexts, totals, kinds)

    def probability(self, context: np.ndarray, gram: np.ndarray, lower: np.ndarray) -> np.ndarray:
        """Return p(w | context), given `lower` p(w | shorter context); all (k,)."""
        count = _lookup(self.grams, self.counts, gram)
        total = _lookup(self.contexts, self.totals, context)
        kinds = _lookup(self.contexts, self.kinds, context)
        mixed = np.maximum(count - DISCOUNT, 0) + DISCOUNT * kinds * lower
        return np.where(total > 0, mixed / np.maximum(total, 1), lower)


def _lookup(keys: np.ndarray, values: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Return the value of each wanted key as float64, 0 for those that are not there."""
    if not len(keys):
        return np.zeros(len(wanted))
    place = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[place] == wanted, values[place], 0).astype(np.float64)


class CountTables:
    """Unigram, bigram and trigram tables.

    Args:
        sequences: (m, T) int64, the tokens that are counted; NONE where there is none. No n-gram
            reaches from one row into the next.
        vocab: number of different tokens.

    Raises:
        ValueError: the vocabulary is so large that a triple does not fit into an int64.
    """

    def __init__(self, sequences: np.ndarray, vocab: int):
        if vocab > LARGEST_VOCABULARY:
            raise ValueError(f"count tables take up to {LARGEST_VOCABULARY} tokens, not {vocab}")
        self.vocab = vocab
        raw = [self._count(sequences, order) for order in (1, 2, 3)]
        seen_after = [self._continuations(grams, order) for order, (grams, _) in enumerate(raw, 1)]
        self.levels = [
            [Level.of(*raw[0], vocab)],
            [Level.of(*seen_after[1], vocab), Level.of(*raw[1], vocab)],
            [
                Level.of(*seen_after[1], vocab),
                Level.of(*seen_after[2], vocab),
                Level.of(*raw[2], vocab),
            ],
        ]

    def _count(self, sequences: np.ndarray, order: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the different n-grams, sorted, and how often each occurs."""
        length = sequences.shape[1] - order + 1
        grams = np.zeros((len(sequences), max(0, length)), np.int64)
        there = np.ones(grams.shape, bool)
        for i in range(order):
            part = sequences[:, i : i + max(0, length)]
            grams *= self.vocab
            grams += part
            there &= part != NONE
        grams = grams[there]
        grams.sort()
        return _runs(grams)

    def _continuations(self, grams: np.ndarray, order: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the n-grams without their first token, and in how many of `grams` each is."""
        rest = grams % self.vocab ** (order - 1)
        rest.sort()
        return _runs(rest)

    def probabilities(self, before: np.ndarray, last: np.ndarray, token: np.ndarray) -> np.ndarray:
        """Return p(token) (3, k) of the three tables.

        Args:
            before, last: the two tokens in front, (k,). `before` may be NONE: the trigram table
                then answers as the bigram table.
            token: (k,).
        """
        v = self.vocab
        uniform = np.full(len(token), 1 / v)
        none = np.zeros(len(token), np.int64)  # the empty context
        pair = last * v + token
        triple = (before * v + last) * v + token
        (one,) = self.levels[0]
        unigram = one.probability(none, token, uniform)
        kinds, two = self.levels[1]
        bigram = two.probability(last, pair, kinds.probability(none, token, uniform))
        kinds, pairs, three = self.levels[2]
        shorter = pairs.probability(last, pair, kinds.probability(none, token, uniform))
        trigram = three.probability(before * v + last, triple, shorter)
        return np.stack([unigram, bigram, np.where(before == NONE, bigram, trigram)])

    def loss_sums(self, ids: np.ndarray, targets: np.ndarray) -> np.ndarray:
        """Return the loss of each table, (3,) nats, summed over the counted targets.

        Args:
            ids, targets: (m, T) int64, as a model gets them; targets are IGNORE where no loss is
                counted.
        """
        before = np.full_like(ids, NONE)
        before[:, 1:] = ids[:, :-1]
        counted = targets != IGNORE
        p = self.probabilities(before[counted], ids[counted], targets[counted])
        return -np.log(p).sum(1)


@dataclass(frozen=True)
class TableLosses:
    """Losses of the count tables on a plan's validation set, in nats per token.

    losses: of the unigram, bigram and trigram tables, over all data sets.
    datasets: the same by data set; each has tables of its own.
    tokens: how many training tokens were counted.
    complete: whether these are all; otherwise they are the first ones of a data set.
    """

    losses: tuple[float, float, float]
    datasets: dict[str, tuple[float, float, float]]
    tokens: int
    complete: bool


def table_losses(plan: Plan, prepared: Prepared, length: int, progress: Progress) -> TableLosses:
    """Return the losses of the tables that are counted from a plan's data sets.

    They are kept in the cache.

    Args:
        length: tokens in a sequence.
    """
    names = plan.used_datasets
    parts = [VERSION, prepared.fingerprint, prepared.tokenizer.vocab_size, length]
    key = json.dumps([*parts, names, plan.validation.tokens, MOST_TOKENS])
    digest = hashlib.sha256(key.encode()).hexdigest()[:16]
    path = cache_folder() / "counts" / f"{digest}.json"
    try:
        known = read_json(path)
        return TableLosses(
            tuple(known["losses"]),
            {name: tuple(losses) for name, losses in known["datasets"].items()},
            int(known["tokens"]),
            bool(known["complete"]),
        )
    except FileNotFoundError:
        pass
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        progress(f"{path} is damaged ({e}); the count tables are made again", None)
    progress("counting pairs and triples of tokens", 0)
    found = _count(names, prepared, ValidationSet(plan, prepared, length))
    write_json(path, asdict(found), sealed=True)
    return found


def _count(names: Sequence[str], prepared: Prepared, validation: ValidationSet) -> TableLosses:
    sums = np.zeros(3)
    counted = 0
    tokens = 0
    by_dataset = {}
    for name in names:
        train = np.asarray(prepared.tokens[name].train[:MOST_TOKENS]).astype(np.int64)
        tokens += len(train)
        tables = CountTables(train[np.newaxis], prepared.tokenizer.vocab_size)
        pairs = validation.sequences(name)
        own = np.zeros(3)
        n = 0
        for start in range(0, len(pairs), 4096):
            chunk = pairs[start : start + 4096]
            targets = np.stack([t for _, t in chunk])
            own += tables.loss_sums(np.stack([i for i, _ in chunk]), targets)
            n += int((targets != IGNORE).sum())
        by_dataset[name] = _three(own / max(1, n))
        sums += own
        counted += n
    complete = all(len(prepared.tokens[name].train) <= MOST_TOKENS for name in names)
    return TableLosses(_three(sums / max(1, counted)), by_dataset, tokens, complete)


def _three(losses: np.ndarray) -> tuple[float, float, float]:
    unigram, bigram, trigram = (float(x) for x in losses)
    return unigram, bigram, trigram


def _runs(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the different values of a sorted array, and how often each occurs."""
    if not len(values):
        return values, np.zeros(0, np.int64)
    starts = np.flatnonzero(np.append(True, values[1:] != values[:-1]))
    return values[starts], np.diff(np.append(starts, len(values)))


def standing(loss: float, tables: Sequence[float]) -> str:
    """Return in words how a loss compares with the losses of the three tables, in nats."""
    beaten = [(name, x) for name, x in zip(NAMES, tables, strict=True) if loss < x]
    missed = [(name, x) for name, x in zip(NAMES, tables, strict=True) if loss >= x]
    parts = []
    if beaten:
        name, value = min(beaten, key=lambda entry: entry[1])
        parts.append(f"below the {name} table ({value:.2f})")
    if missed:
        name, value = max(missed, key=lambda entry: entry[1])
        parts.append(f"above the {name} table ({value:.2f})")
    return f"{loss:.2f} nats: {', '.join(parts)}"
