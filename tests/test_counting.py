"""Count tables, against a brute force over dictionaries and against an example done by hand."""

from __future__ import annotations

import math
from collections import Counter
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from conftest import Command, write_plan
from hypothesis import given, settings
from hypothesis import strategies as st

from lmplay.analysis.compare import count_tables, own_curve
from lmplay.analysis.page.gather import gather
from lmplay.data.counting import NAMES, NONE, CountTables, standing
from lmplay.ops import IGNORE
from lmplay.training.run_folder import RunFolder

D = Fraction(3, 4)


def kneser_ney(rows: list[list[int]], context: tuple[int, ...], w: int, vocab: int) -> Fraction:
    """The definition, over all n-grams of the rows, in exact arithmetic."""

    def level(order: int, context: tuple[int, ...]) -> Fraction:
        grams = Counter(
            tuple(row[i : i + order])
            for row in rows
            for i in range(len(row) - order + 1)
            if NONE not in row[i : i + order]
        )
        if order < longest:  # how many different tokens precede each
            wider = {
                tuple(row[i : i + order + 1])
                for row in rows
                for i in range(len(row) - order)
                if NONE not in row[i : i + order + 1]
            }
            grams = Counter(gram[1:] for gram in wider)
        after = {gram: n for gram, n in grams.items() if gram[:-1] == context}
        lower = level(order - 1, context[1:]) if order > 1 else Fraction(1, vocab)
        if not after:
            return lower
        count = max(after.get((*context, w), 0) - D, Fraction(0))
        return (count + D * len(after) * lower) / sum(after.values())

    longest = len(context) + 1
    return level(longest, context)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    rows=st.lists(st.lists(st.integers(0, 4), min_size=7, max_size=7), min_size=1, max_size=5),
    gone=st.booleans(),
)
def test_it_is_the_definition(rows: list[list[int]], gone: bool) -> None:
    if gone:
        rows[0][-1] = NONE
    tables = CountTables(np.array(rows), 6)
    for u, v, w in [(0, 1, 2), (1, 1, 1), (5, 0, 0), (2, 5, 3), (rows[0][0], rows[0][1], 4)]:
        found = tables.probabilities(np.array([u]), np.array([v]), np.array([w]))[:, 0]
        for p, context in zip(found, [(), (v,), (u, v)], strict=True):
            assert p == pytest.approx(float(kneser_ney(rows, context, w, 6)), rel=1e-12)


def test_probabilities_sum_to_one() -> None:
    rng = np.random.default_rng(0)
    tables = CountTables(rng.integers(0, 9, (30, 12)), 11)
    every = np.arange(11)
    for u, v in ((0, 1), (3, 3), (10, 2), (4, 10), (NONE, 5)):
        p = tables.probabilities(np.full(11, u), np.full(11, v), every)
        np.testing.assert_allclose(p.sum(1), 1, rtol=1e-12)


def test_an_example_by_hand() -> None:
    """The text 0 1 0 2 with three tokens.

    Unigrams: 0 twice, 1 and 2 once, of 4; three kinds. p(0) = (1.25 + .75 * 3 / 3) / 4 = .5.
    Pairs: 01, 10, 02. In front of 0, 1, 2 stands one token each, so of 3 continuations
    p'(0) = (.25 + .75 * 3 / 3) / 3 = 1/3, and so p'(2).
    After 0 come 1 and 2: p(2 | 0) = (.25 + .75 * 2 / 3) / 2 = .375.
    Triples: 010, 102. Continuations 10 and 02, one each. p'(2 | 0) = (.25 + .75 / 3) / 1 = .5.
    p(2 | 1 0) = (.25 + .75 * .5) / 1 = .625.
    """
    tables = CountTables(np.array([[0, 1, 0, 2]]), 3)
    p = tables.probabilities(np.array([1]), np.array([0]), np.array([0]))
    assert p[0, 0] == pytest.approx(0.5)
    p = tables.probabilities(np.array([1]), np.array([0]), np.array([2]))
    assert p[1, 0] == pytest.approx(0.375)
    assert p[2, 0] == pytest.approx(0.625)
    loss = tables.loss_sums(np.array([[1, 0]]), np.array([[IGNORE, 2]]))
    assert loss[2] == pytest.approx(-math.log(0.625))


def test_a_vocabulary_without_end_is_refused() -> None:
    with pytest.raises(ValueError, match="2097151"):
        CountTables(np.zeros((1, 4), np.int64), 2**21)


@pytest.mark.parametrize(
    ("loss", "says"),
    [
        (4.46, "4.46 nats: below the bigram table (4.52), above the trigram table (3.99)"),
        (7.0, "7.00 nats: above the unigram table (6.69)"),
        (3.5, "3.50 nats: below the trigram table (3.99)"),
        (5.0, "5.00 nats: below the unigram table (6.69), above the bigram table (4.52)"),
    ],
)
def test_a_sentence_says_where_a_loss_stands(loss: float, says: str) -> None:
    assert standing(loss, (6.69, 4.52, 3.99)) == says


def test_a_run_says_where_it_stands_and_its_figures_show_it(
    tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LMP_CACHE", str(tmp_path / "cache"))
    write_plan(tmp_path, datasets={"words": {"source": "files", "path": "data.jsonl"}})
    train = ("lmp_trainer", "--training-plan", "tiny.json", "--mini-batch-size", "8")
    done = command(*train)
    assert done.returncode == 0, done.stderr
    run = tmp_path / "gpt_out" / "tiny" / "gpt2ish-s0"
    record = RunFolder(run).read()
    losses = record["tables"]["losses"]
    assert losses[0] > losses[1] > losses[2] > 0
    assert record["tables"]["datasets"] == {"words": losses}
    assert record["tables"]["tokens"] > 10_000
    assert record["tables"]["complete"]
    assert standing(record["summary"]["val_loss"], losses) in done.stdout
    assert count_tables([own_curve(run / "validate.csv")]) == dict(zip(NAMES, losses, strict=True))
    content, _ = gather([tmp_path / "gpt_out"], 10)
    assert content["arenas"][0]["tables"]["bigram"] == losses[1]
    # Counted once: another run of the plan finds them in the cache.
    (cache,) = (tmp_path / "cache" / "counts").glob("*.json")
    before = cache.stat().st_mtime_ns
    assert command(*train, "--seed", "1").returncode == 0
    assert cache.stat().st_mtime_ns == before
