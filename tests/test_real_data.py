"""Data as people have it: odd names, other types, long documents, and markets seen in part."""

from __future__ import annotations

import json
import os
import struct
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import Command, write_plan
from hypothesis import given
from hypothesis import strategies as st

from lmplay.data.files import read_rows
from lmplay.data.parts import batches, parts_of
from lmplay.data.prepare import prepare
from lmplay.data.sources import FilesSource, HubSource
from lmplay.data.tokenizers import Tiktoken, train_bpe
from lmplay.errors import LmplayError
from lmplay.market import lobster
from lmplay.market.events import Market
from lmplay.market.sessions import DataIssues, replay
from lmplay.market.source import MarketSource
from lmplay.plan import load_plan


def files(path: Path, **changes: Any) -> FilesSource:
    return FilesSource.model_validate({"path": str(path), **changes})


def texts(source: FilesSource, skipped: Counter[str] | None = None) -> list[str]:
    found = source.read(Counter() if skipped is None else skipped)
    return ["".join(text for text, _ in document) for document in found]


# ---------------------------------------------------------------- files


@pytest.mark.parametrize("name", ["p[1].txt", "b [v2].txt", "a*b.txt", "q?.txt", "ä::c.txt"])
def test_names_with_special_characters_are_read_once(tmp_path: Path, name: str) -> None:
    (tmp_path / "p1.txt").write_text("one")
    (tmp_path / name).write_text("two")
    assert sorted(texts(files(tmp_path))) == ["one", "two"]
    assert texts(files(tmp_path / name)) == ["two"]


def table(path: Path, **columns: Any) -> Path:
    pq.write_table(pa.table(columns), path)
    return path


WORDS = [f"document {i} has café and plain words" for i in range(5)]


@pytest.mark.parametrize(
    ("column", "says"),
    [
        ([[w, w] for w in WORDS], "holds lists instead of text"),
        ([{"body": w} for w in WORDS], "holds structs instead of text"),
        (pa.array([b"\xff\xfe" for _ in WORDS], pa.binary()), "bytes that are not UTF-8"),
    ],
)
def test_a_column_that_is_no_text_is_refused(tmp_path: Path, column: Any, says: str) -> None:
    source = files(table(tmp_path / "t.parquet", text=column))
    with pytest.raises(LmplayError, match=f"row 1: column text .*{says}"):
        texts(source)


@pytest.mark.parametrize(
    ("column", "expected"),
    [
        (pa.array([w.encode() for w in WORDS], pa.binary()), WORDS),
        ([1, 2, 3, 4, 5], ["1", "2", "3", "4", "5"]),
        (pa.array(WORDS, pa.large_string()), WORDS),
    ],
)
def test_a_column_that_is_text_in_another_form_is_read(
    tmp_path: Path, column: Any, expected: list[str]
) -> None:
    assert texts(files(table(tmp_path / "t.parquet", text=column))) == expected


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ([{"type": "image", "url": "x"}], "with image instead of text"),
        ([3], "with int instead of text"),
        ({"text": "x"}, "with None instead of text"),
    ],
)
def test_parts_of_a_chat_that_are_no_text_are_refused(
    tmp_path: Path, content: Any, says: str
) -> None:
    path = tmp_path / "chat.jsonl"
    path.write_text(json.dumps({"messages": [{"role": "user", "content": content}]}))
    source = files(path, columns={"messages": "messages"})
    if isinstance(content, dict):  # one part that is no list of parts
        says = "instead of text"
    with pytest.raises(LmplayError, match=says):
        texts(source)


def test_text_parts_of_a_chat_are_joined(tmp_path: Path) -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}, "c"]
    path = tmp_path / "chat.jsonl"
    path.write_text(json.dumps({"messages": [{"role": "user", "content": parts}]}))
    assert texts(files(path, columns={"messages": "messages"})) == ["user: abc\n\n"]


def test_what_is_left_out_is_counted_and_named(tmp_path: Path) -> None:
    rows = [{"text": "a"}, {"text": None}, {"text": "  "}, {"other": 1}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for name in ("b.pdf", "c.csv", "d", "e.zip"):
        (tmp_path / name).write_text("?")
    skipped: Counter[str] = Counter()
    assert texts(files(tmp_path), skipped) == ["a"]
    assert skipped["rows without text"] == 3
    assert skipped["file of another kind: b.pdf"] == 1
    assert skipped["more files of other kinds"] == 1
    source = {"source": "files", "path": str(tmp_path / "folder")}
    (tmp_path / "folder").mkdir()
    lines = [json.dumps({"text": f"text {i}"}) for i in range(90)] + [json.dumps({"text": ""})]
    (tmp_path / "folder" / "a.jsonl").write_text("\n".join(lines))
    plan = load_plan(write_plan(tmp_path, datasets={"words": source}))
    said: list[str] = []
    prepare(plan, lambda what, done: said.append(what) if done is None else None)
    assert said == ["data set words: left out: 1 rows without text"]


@pytest.mark.parametrize("way", ["other folder", "replaced", "touched back"])
def test_other_texts_of_equal_name_size_and_time_are_other_data(tmp_path: Path, way: str) -> None:
    def write(folder: str, letter: str) -> Path:
        path = tmp_path / folder / "t.txt"
        path.parent.mkdir(exist_ok=True)
        path.write_text(letter * 100)
        os.utime(path, (1e9, 1e9))
        return path

    first = write("a", "x")
    before = files(first).fingerprint
    if way == "other folder":
        assert files(write("b", "y")).fingerprint != before
        return
    if way == "replaced":
        write("b", "y").replace(first)
    else:
        write("a", "y")
    assert files(first).fingerprint != before


@pytest.mark.parametrize(
    ("unit", "expected"),
    [
        ("paragraphs", ["a\nb", "c\nd\n"]),
        ("lines", ["a", "b", "c", "d"]),
        ("file", ["a\nb\n\nc\nd\n"]),
    ],
)
def test_units_of_a_text_file(tmp_path: Path, unit: str, expected: list[str]) -> None:
    (tmp_path / "t.txt").write_text("a\nb\n\nc\nd\n")
    assert texts(files(tmp_path / "t.txt", documents=unit)) == expected


def test_the_default_unit_does_not_change_a_plan_s_fingerprint(tmp_path: Path) -> None:
    """Plans of versions without the key keep their runs."""
    source = {"source": "files", "path": "data.jsonl"}
    plans = []
    for extra in ({}, {"documents": "paragraphs"}, {"documents": "lines"}):
        plans.append(load_plan(write_plan(tmp_path, datasets={"words": {**source, **extra}})))
    assert plans[0].fingerprint == plans[1].fingerprint != plans[2].fingerprint
    assert "unit" not in plans[0].datasets["words"].identity()


@given(st.lists(st.text("ab\n", max_size=9), max_size=9), st.integers(1, 7))
def test_paragraphs_do_not_depend_on_the_chunks_in_which_they_are_read(
    parts: list[str], chunk: int
) -> None:
    import io

    from lmplay.data import files as module

    text = "\n\n".join(parts)
    before = module.CHUNK
    module.CHUNK = chunk
    try:
        assert list(module._split(io.StringIO(text), "\n\n")) == text.split("\n\n")
    finally:
        module.CHUNK = before


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("t.txt", b"caf\xe9 and more", "is not UTF-8"),
        ("t.jsonl", b'{"text": "a"}\n{"text": "b"\n', "line 2 is not JSON"),
        ("t.jsonl", b'"a"\n', "line 1 is not a JSON object"),
        ("t.jsonl", b'[{"text": "a"}, 3]', "item 2 is not a JSON object"),
        ("t.jsonl", b'{"text": "\xff"}', "line 1 is not UTF-8"),
        ("t.parquet", b"PAR1 nothing", "could not be read"),
        ("t.arrow", b"ARROW1 nothing", "could not be read"),
    ],
)
def test_a_damaged_file_is_named_with_its_place(
    tmp_path: Path, name: str, content: bytes, says: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(LmplayError, match=says):
        texts(files(tmp_path / name))


def test_files_give_what_the_datasets_library_reads(tmp_path: Path) -> None:
    import datasets

    rows = [{"text": f"text {i}", "n": i} for i in range(600)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    table(tmp_path / "a.parquet", text=[r["text"] for r in rows], n=[r["n"] for r in rows])
    made = datasets.Dataset.from_list(rows)
    made.save_to_disk(tmp_path / "saved")
    paragraphs = "\n\n".join(f"line {i}\nand {i}" for i in range(600))
    (tmp_path / "a.txt").write_text(paragraphs)
    theirs = datasets.load_dataset(
        "text", data_files=str(tmp_path / "a.txt"), split="train", sample_by="paragraph"
    )["text"]
    assert texts(files(tmp_path / "a.txt")) == list(theirs)
    expected = [r["text"] for r in rows]
    for path in ("a.jsonl", "a.parquet", "saved"):
        assert texts(files(tmp_path / path)) == expected
    (arrow,) = (tmp_path / "saved").glob("*.arrow")
    assert [r["text"] for r in read_rows(arrow, "arrow", "paragraphs")] == expected


def test_half_a_surrogate_pair_is_replaced_and_counted(tmp_path: Path) -> None:
    lines = ['{"text": "half \\ud83d of ' + str(i) + '"}' for i in range(60)]
    (tmp_path / "mine.jsonl").write_text("\n".join(lines))
    source = {"source": "files", "path": "mine.jsonl"}
    said: list[str] = []
    plan = load_plan(write_plan(tmp_path, datasets={"words": source}))
    prepared = prepare(plan, lambda what, done: said.append(what) if done is None else None)
    assert said == [
        "data set words: left out: 60 documents with half a surrogate pair, replaced by U+FFFD"
    ]
    assert "half \ufffd of" in prepared.tokenizer.decode(prepared.tokens["words"].train[:40])


def test_folders_behind_links_are_read_and_loops_are_not_followed(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk" / "a.txt").write_text("one")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "linked").symlink_to(tmp_path / "disk")
    (tmp_path / "data" / "loop").symlink_to(tmp_path / "data")
    (tmp_path / "data" / "file.txt").symlink_to(tmp_path / "disk" / "a.txt")
    assert texts(files(tmp_path / "data")) == ["one", "one"]


def test_the_size_of_a_download_is_said_before_it(tmp_path: Path) -> None:
    """A local folder is a data set for the library, as one of the hub is."""
    (tmp_path / "repo").mkdir()
    table(tmp_path / "repo" / "train.parquet", text=[f"text {i} and more" for i in range(90)])
    source = HubSource(path=str(tmp_path / "repo"))
    assert "to download from the hub, unless its cache has it" in source.announcement()
    said: list[str] = []
    datasets = {"words": {"source": "hub", "path": str(tmp_path / "repo")}}
    for tokenizer in ({"kind": "bytes"}, {"kind": "bpe", "vocab_size": 280}):
        plan = load_plan(write_plan(tmp_path, datasets=datasets, tokenizer=tokenizer))
        prepare(plan, lambda what, done: said.append(what) if done is None else None)
    assert len(said) == 3  # for the bytes, for training the BPE, and for its tokens
    assert all("to download" in line for line in said)


@pytest.mark.parametrize(
    ("size", "says"),
    [(None, "an unknown amount"), (5_000_000, "5 MB"), (20_300_000_000, "20,300 MB")],
)
def test_an_announcement_names_the_size(
    monkeypatch: pytest.MonkeyPatch, size: int | None, says: str
) -> None:
    builder = SimpleNamespace(info=SimpleNamespace(download_size=size))
    monkeypatch.setattr("datasets.load_dataset_builder", lambda *_, **__: builder)
    source = HubSource(path="a/b", name="c")
    assert source.announcement().startswith(f"a/b c is {says} to download")


# ---------------------------------------------------------------- long documents

LONG = {
    "blanks": " " * 300_000 + "x",
    "a word": "x" * 300_000,
    "letters": "".join(chr(97 + i * i % 26) for i in range(100_000)),
    "no blanks": "漢字かな" * 50_000,
    "lines": "a line\n" * 50_000,
    "mixed": ("words and words " * 4000 + "=" * 40_000 + "\n") * 3,
}


@pytest.mark.parametrize("name", LONG)
def test_parts_are_bounded_and_make_up_the_text(name: str) -> None:
    text = LONG[name]
    parts = parts_of(text, size=10_000, line=5000)
    assert "".join(parts) == text
    assert max(map(len, parts)) <= 15_000


@pytest.mark.parametrize("name", LONG)
def test_long_documents_become_tokens(tmp_path: Path, name: str) -> None:
    """tiktoken alone panics on a megabyte of blanks, and needs minutes for a long word."""
    (tmp_path / "long.txt").write_text(
        "\n\n".join([LONG[name], *(f"short {i} text" for i in range(60))])
    )
    source = {"source": "files", "path": "long.txt"}
    plan = load_plan(
        write_plan(tmp_path, datasets={"words": source}, tokenizer={"kind": "tiktoken"})
    )
    prepared = prepare(plan, lambda what, done: None)
    tokens = prepared.tokens["words"]
    decoded = [prepared.tokenizer.decode(np.asarray(t)) for t in (tokens.train, tokens.val)]
    assert LONG[name] in decoded[0] + decoded[1]
    assert tokens.documents["train"] + tokens.documents["val"] == 61


def test_parts_of_ordinary_text_have_the_ids_of_all_of_it() -> None:
    text = "".join(f"Sentence {i}, it's one of many;\n\t and  two blanks. " for i in range(3000))
    bpe = train_bpe([text[:20_000]], 400)
    for tokenizer in (Tiktoken("gpt2"), bpe):
        parts = parts_of(text, size=2000, line=500)
        assert len(parts) > 20
        joined = [i for part in parts for i in tokenizer.encode(part)]
        assert joined == tokenizer.encode(text)


def test_a_batch_of_documents_is_bounded_in_length() -> None:
    long = [[("x" * 200_000, True)] for _ in range(7)]
    assert [len(b) for b in batches(long)] == [2, 2, 2, 1]
    short = [[("x", True)] for _ in range(2500)]
    assert [len(b) for b in batches(short)] == [1024, 1024, 452]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("\n".join(f"name{i}" for i in range(3000)), "its text is one document"),
        ("x " * 4000, "its text is one document"),
        ("\n\n".join(f"word {i} " * 300 for i in range(2)), "of its 2 documents none fell into"),
    ],
)
def test_text_that_cannot_be_split_says_why(
    tmp_path: Path, command: Command, content: str, says: str
) -> None:
    (tmp_path / "mine.txt").write_text(content)
    source = {"source": "files", "path": "mine.txt"}
    write_plan(tmp_path, datasets={"words": source})
    done = command("lmp_trainer", "--training-plan", "tiny.json")
    assert done.returncode == 1
    assert says in done.stderr
    assert '"documents": "lines"' in done.stderr
    if "name1" in content:
        write_plan(tmp_path, datasets={"words": {**source, "documents": "lines"}})
        assert command("lmp_trainer", "--training-plan", "tiny.json").returncode == 0


# ---------------------------------------------------------------- the tokenizer of a run


@pytest.mark.parametrize(
    "tokenizer", [{"kind": "bpe", "vocab_size": 280}, {"kind": "chars"}, {"kind": "bytes"}]
)
def test_a_run_goes_on_with_other_data_and_its_own_tokenizer(
    tmp_path: Path, command: Command, tokenizer: dict[str, Any]
) -> None:
    write_plan(tmp_path, tokenizer=tokenizer)
    assert command("lmp_trainer", "--training-plan", "tiny.json").returncode == 0
    lines = [json.dumps({"text": f"{i} the brown dog jumps over the fox " * 3}) for i in range(90)]
    (tmp_path / "other.jsonl").write_text("\n".join(lines))
    other = {"words": {"source": "files", "path": "other.jsonl"}}
    run = "gpt_out/tiny/gpt2ish-s0"
    go_on = ("lmp_trainer", "--training-plan", "other.json", "--initial-model", run)
    write_plan(tmp_path, tokenizer=tokenizer, datasets=other).rename(tmp_path / "other.json")
    if tokenizer["kind"] != "bytes":
        refused = command(*go_on)
        assert refused.returncode == 1
        assert '"kind": "run"' in refused.stderr
    of_run = {"kind": "run", "path": run}
    write_plan(tmp_path, tokenizer=of_run, datasets=other).rename(tmp_path / "other.json")
    done = command(*go_on)
    assert done.returncode == 0, done.stderr
    missing = {"kind": "run", "path": "nowhere"}
    write_plan(tmp_path, tokenizer=missing).rename(tmp_path / "other.json")
    done = command("lmp_trainer", "--training-plan", "other.json")
    assert done.returncode == 1
    assert "is no folder of a run with a tokenizer" in done.stderr


# ---------------------------------------------------------------- markets

Rows = list[tuple[str, tuple[int, ...]]]
NAME = "AAPL_2012-06-21_34200000_57600000_message_1.csv"


def write_lobster(folder: Path, rows: Rows, name: str = NAME) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text("".join(f"{message}\n" for message, _ in rows))
    books = "".join(",".join(map(str, book)) + "\n" for _, book in rows)
    (folder / name.replace("message", "orderbook")).write_text(books)
    return folder


def read_lobster(folder: Path, errors: str = "stop") -> tuple[int, Counter[str], Market]:
    source = MarketSource.model_validate({"data": "lobster", "path": str(folder), "errors": errors})
    (session,) = source.sessions(("AAPL",))
    issues = DataIssues(session.name, source.errors)
    count = 0
    market = Market()
    for _, _, market in replay(session, issues):  # noqa: B007 (the last one is wanted)
        count += 1
    return count, issues.counts, market


HIDDEN = [
    ("34199.9,5,0,1,1000050,1", (1000200, 100, 999900, 100)),
    ("34200.0,1,1,100,1000100,-1", (1000100, 100, 999900, 100)),
    ("34200.1,1,2,50,1000000,-1", (1000000, 50, 999900, 100)),
    ("34200.2,4,2,50,1000000,-1", (1000100, 100, 999900, 100)),
]


@pytest.mark.parametrize(
    ("more", "best"),
    [
        # Another order came in for 1 while the level was out of view.
        ([("34200.3,4,3,100,1000100,-1", (1000200, 100, 999900, 100))], [9999, 10002]),
        # It took part of the level only.
        ([("34200.3,4,3,60,1000100,-1", (1000100, 40, 999900, 100))], [9999, 10001]),
        # The known order is larger than what is known of it.
        (
            [
                ("34200.3,1,4,10,1000000,-1", (1000000, 10, 999900, 100)),
                ("34200.4,3,4,10,1000000,-1", (1000100, 300, 999900, 100)),
                ("34200.5,4,1,250,1000100,-1", (1000100, 50, 999900, 100)),
            ],
            [9999, 10001],
        ),
        # A message about a level that the file does not show.
        ([("34200.3,3,9,10,1000900,-1", (1000100, 100, 999900, 100))], [9999, 10001]),
    ],
)
def test_what_the_view_hides_does_not_break_the_book(
    tmp_path: Path, more: Rows, best: list[int]
) -> None:
    rows = [*HIDDEN, *more, ("34201,1,7,10,999900,1", (*more[-1][1][:3], more[-1][1][3] + 10))]
    _, _, market = read_lobster(write_lobster(tmp_path / "lob", rows))
    assert [market.book.best(0), market.book.best(1)] == best
    ask, size, bid, volume = rows[-1][1]
    assert market.book.volume[1][ask // 100] == size
    assert market.book.volume[0][bid // 100] == volume


@pytest.mark.parametrize("first", [100, 20_000])
def test_a_large_level_that_vanished_is_gone(tmp_path: Path, first: int) -> None:
    rows = [
        ("34200.0,1,1,100,999800,1", (1000100, 100, 999800, first)),
        ("34200.1,1,2,20000,999900,1", (1000100, 100, 999900, 20000)),
        ("34200.2,1,3,100,1000000,1", (1000100, 100, 1000000, 100)),
        ("34200.3,3,3,100,1000000,1", (1000100, 100, 999800, 100)),
        ("34200.4,1,5,100,999900,-1", (999900, 100, 999800, 100)),
        ("34200.5,1,6,100,999900,-1", (999900, 200, 999800, 100)),
    ]
    _, counts, market = read_lobster(write_lobster(tmp_path / "lob", rows))
    assert [market.book.best(0), market.book.best(1)] == [9998, 9999]
    assert market.book.volume[1][9999] == 200
    assert counts["levels that would trade at once"] == 0


GOOD = [
    ("34200.0,1,1,100,999800,1", (1000100, 100, 999800, 100)),
    ("34200.1,1,3,100,999800,1", (1000100, 100, 999800, 200)),
]


@pytest.mark.parametrize(
    "head",
    [
        ("time,type,id,size,price,direction", ("ask", "size", "bid", "size")),
        ("34199.0,1,1,100,999855,1", (1000100, 100, 999855, 100)),  # off the grid
        ("34199.0,1", (1000100, 100)),
    ],
)
def test_a_first_line_that_cannot_be_read_is_skipped_on_request(tmp_path: Path, head: Any) -> None:
    folder = write_lobster(tmp_path / "lob", [head, *GOOD])
    count, counts, _ = read_lobster(folder, "skip")
    assert count == 1
    assert counts["skipped: cannot be read"] == 1
    with pytest.raises(LmplayError, match="line 1"):
        read_lobster(folder)


@pytest.mark.parametrize(
    "damage", [b"34200.2,1,\xff,1,1,1\n", b"1," * 70_000 + b"\n", b'"' + b"x" * 140_000 + b"\n"]
)
def test_bytes_that_are_no_csv_are_one_line(tmp_path: Path, damage: bytes) -> None:
    folder = write_lobster(tmp_path / "lob", [*GOOD, GOOD[-1]])
    path = folder / NAME
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:2], damage]))
    with pytest.raises(LmplayError, match=r"line \d"):
        read_lobster(folder)


@pytest.mark.parametrize("ticker", ["ÄÖ", "名前", "A B"])
def test_a_ticker_that_the_vocabulary_lacks_is_named(tmp_path: Path, ticker: str) -> None:
    folder = write_lobster(tmp_path / "lob", GOOD, NAME.replace("AAPL", ticker))
    with pytest.raises(LmplayError, match=f"no ticker {ticker}"):
        read_lobster(folder)


@pytest.mark.parametrize("minutes", ["0.2", "1"])
def test_what_we_generate_is_read_as_lobster_data(
    tmp_path: Path, command: Command, minutes: str
) -> None:
    done = command("lmp_market", "generate", "--minutes", minutes, "--seed", "7", "--save", "lob")
    assert done.returncode == 0, done.stderr
    (session,) = lobster.sessions(tmp_path / "lob", 100)
    issues = DataIssues(session.name, "stop")
    assert sum(1 for _ in replay(session, issues)) > 100


def itch_day() -> bytes:
    def add(ref: int, side: bytes, price: int) -> bytes:
        clock = 34_200 * 10**9 + ref
        head = struct.pack("!HHHI", 7, 0, clock >> 32, clock & 0xFFFFFFFF)
        return b"A" + head + struct.pack("!QcI8sI", ref, side, 100, b"AAPL    ", price)

    day = [add(1, b"B", 1000000), add(2, b"S", 1000300)]
    day += [add(10 + i, b"B", 999000 - 100 * i) for i in range(50)]
    return b"".join(b"\0" + bytes([len(m)]) + m for m in day)


@pytest.mark.parametrize("missing", [1, 11, 36, 37])
def test_an_itch_file_that_ends_inside_a_message_is_reported(tmp_path: Path, missing: int) -> None:
    path = tmp_path / "day.itch"
    path.write_bytes(itch_day()[:-missing])
    source = MarketSource(data="itch", path=str(path))
    (session,) = source.sessions(("AAPL",))
    with pytest.raises(LmplayError, match="truncated"):
        list(replay(session, DataIssues(session.name)))
    issues = DataIssues(session.name, "skip")
    assert sum(1 for _ in replay(session, issues)) == 49
    assert issues.counts["skipped: truncated"] == 1
    path.write_bytes(itch_day())
    assert sum(1 for _ in replay(session, DataIssues(session.name))) == 50
