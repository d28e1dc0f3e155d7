"""Sources, token files and the order of sequences."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import write_plan, write_text

from lmplay.data import columns, packing, stages, token_files
from lmplay.data.columns import Columns
from lmplay.data.prepare import prepare
from lmplay.data.sources import FilesSource
from lmplay.data.tokenizers import Bytes
from lmplay.errors import LmplayError
from lmplay.plan import Plan, PlanStage, load_plan, parse_plan


def quiet(what: str, done: int) -> None:
    pass


@pytest.mark.parametrize("n", [1, 2, 3, 5, 17, 64, 1000])
def test_permute_is_a_permutation_that_depends_on_its_key(n: int) -> None:
    index = np.arange(n)
    assert sorted(packing.permute(index, n, 1)) == list(range(n))
    one_by_one = [int(packing.permute(np.array([i]), n, 1)[0]) for i in index]
    assert one_by_one == list(packing.permute(index, n, 1))
    if n >= 17:
        assert list(packing.permute(index, n, 1)) != list(packing.permute(index, n, 2))


def test_permute_leaves_no_order_behind() -> None:
    n = 4000
    values = packing.permute(np.arange(n), n, 7).astype(float)
    assert abs(np.corrcoef(np.arange(n), values)[0, 1]) < 0.06
    assert abs(np.corrcoef(values[:-1], values[1:])[0, 1]) < 0.06


def tokens(name: str, n: int, mask: np.ndarray | None = None) -> token_files.Tokens:
    return token_files.Tokens(
        name, np.arange(n, dtype=np.uint32), np.arange(50, dtype=np.uint32), mask, None, name
    )


def mixture(*sizes: int, **step: Any) -> stages.Mixture:
    """Data sets of so many sequences of 4 tokens."""
    names = [f"d{i}" for i in range(len(sizes))]
    sets = [
        packing.Packed(tokens(name, 4 * size + 1), "train", 4)
        for name, size in zip(names, sizes, strict=True)
    ]
    return stages.Mixture(PlanStage(step_name="s", datasets=names, **step), 0, sets, seed=3)


def test_an_epoch_reads_every_sequence_once_and_the_next_in_another_order() -> None:
    m = mixture(10)
    which, first = m.locate(np.arange(10))
    assert set(which) == {0}
    _, second = m.locate(np.arange(10, 20))
    assert sorted(first) == sorted(second) == list(range(10))
    assert list(first) != list(second)
    assert m.sequences == 10


def test_targets_are_the_next_tokens_and_inputs_never_overlap() -> None:
    m = mixture(10)
    batch = m.batch(0, 10)
    assert np.array_equal(batch.targets, batch.ids + 1)
    assert sorted(batch.ids.flatten()) == list(range(40))


@pytest.mark.parametrize(
    ("interleave", "sequences"), [("first_exhausted", 8), ("all_exhausted", 24)]
)
def test_equal_turns(interleave: str, sequences: int) -> None:
    m = mixture(4, 12, interleave=interleave)
    assert m.sequences == sequences
    which, index = m.locate(np.arange(sequences))
    assert list(which) == [0, 1] * (sequences // 2)
    assert sorted(set(index[which == 0])) == [0, 1, 2, 3]
    if interleave == "all_exhausted":
        assert sorted(index[which == 1]) == list(range(12))


def test_weights_and_concatenation() -> None:
    m = mixture(1000, 3000, weights=[1, 3], interleave="all_exhausted")
    which, _ = m.locate(np.arange(400))
    assert (which == 0).sum() == 100
    assert max(np.diff(np.flatnonzero(which == 0))) <= 5, "turns are spread evenly"
    m = mixture(3, 5, interleave="concatenate")
    which, index = m.locate(np.arange(8))
    assert sorted(zip(which, index, strict=True)) == [(0, i) for i in range(3)] + [
        (1, i) for i in range(5)
    ]


def test_order_is_independent_of_batch_size_and_processes() -> None:
    m = mixture(7, 9, interleave="all_exhausted")
    whole = m.batch(0, 12).ids
    assert np.array_equal(np.concatenate([m.batch(i, 4).ids for i in range(3)]), whole)
    for world in (2, 3, 5):
        shares = [m.batch(0, 12, rank, world).ids for rank in range(world)]
        assert np.array_equal(np.concatenate(shares), whole)


def test_masked_and_missing_targets_are_not_counted() -> None:
    mask = np.ones(9, np.uint8)
    mask[2:4] = 0
    ids, targets = packing.window(np.arange(9), mask, 0, 4)
    assert list(ids) == [0, 1, 2, 3]
    assert list(targets) == [1, packing.IGNORE, packing.IGNORE, 4]
    ids, targets = packing.window(np.arange(7), None, 1, 4)
    assert list(targets) == [5, 6, packing.IGNORE, packing.IGNORE]


def test_a_document_is_on_one_side_only_and_nothing_is_lost(tmp_path: Path) -> None:
    lines = [json.dumps({"text": f"document {i % 300}"}) for i in range(600)]  # each twice
    (tmp_path / "data.jsonl").write_text("\n".join(lines))
    plan = load_plan(write_plan_of(tmp_path, "data.jsonl"))
    prepared = prepare(plan, quiet)
    t = prepared.tokens["d"]
    eot = prepared.tokenizer.eot
    sides = [
        np.split(np.asarray(s), np.flatnonzero(np.asarray(s) == eot) + 1)[:-1]
        for s in (t.train, t.val)
    ]
    train, val = ({tuple(d) for d in side} for side in sides)
    assert not train & val
    assert len(train | val) == 300
    assert sum(len(side) for side in sides) == 600
    assert 10 < len(val) < 90


def write_plan_of(folder: Path, file: str, **dataset: Any) -> Path:
    path = folder / "plan.json"
    spec = {"source": "files", "path": file, **dataset}
    plan = {
        "tokenizer": {"kind": "bytes"},
        "datasets": {"d": spec},
        "validation": {"fraction": 0.15},
        "steps": [{"step_name": "s", "datasets": ["d"]}],
    }
    path.write_text(json.dumps(plan))
    return path


def test_formats_give_the_same_documents(tmp_path: Path) -> None:
    import datasets

    texts = [f"some text, number {i}" for i in range(40)]
    table = datasets.Dataset.from_dict({"text": texts})
    table.to_parquet(tmp_path / "a.parquet")
    table.to_json(tmp_path / "a.jsonl")
    table.save_to_disk(str(tmp_path / "saved"))
    (tmp_path / "a.txt").write_text("\n\n".join(texts))
    found = {}
    for file in ("a.parquet", "a.jsonl", "saved", "a.txt"):
        plan = load_plan(write_plan_of(tmp_path, file))
        source = plan.datasets["d"]
        found[file] = [d[0][0].strip() for d in source.documents()]
    assert all(documents == texts for documents in found.values()), found


def test_columns_make_pieces_that_count_or_do_not() -> None:
    row = {
        "q": "What?",
        "a": "That.",
        "text": "body",
        "title": "head",
        "m": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}],
    }
    of = columns.document_of
    assert of(row, Columns(text="text", title="title")) == [("head\n\nbody", True)]
    assert of(row, Columns(prompt="q", truth="a")) == [("What?\n\n", False), ("That.", True)]
    assert of(row, Columns(prompt="q", truth="a", prompt_loss=True))[0][1] is True
    assert of({"text": None}, Columns(text="text")) == []
    assert of({"q": "What?", "a": None}, Columns(prompt="q", truth="a")) == []
    chat = of(row, Columns(messages="m"))
    assert [text for text, counted in chat if counted] == ["ho\n\n"]


def test_a_chat_of_another_form_is_named(tmp_path: Path) -> None:
    row = json.dumps({"talk": [{"from": "human", "value": "hi"}]})
    (tmp_path / "chat.jsonl").write_text(row)
    plan = load_plan(write_plan_of(tmp_path, "chat.jsonl", columns={"messages": "talk"}))
    with pytest.raises(LmplayError, match="column talk is no chat, which is a list of"):
        prepare(plan, quiet)


def test_a_glob_reaches_into_folders(tmp_path: Path) -> None:
    folder = tmp_path / "a folder [1]"
    for name in ("a/b/x.jsonl", "y.jsonl", "a/z.txt"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps({"text": name}))
    found = FilesSource(path=str(folder / "**" / "*.jsonl"), columns=Columns(text="text"))
    assert [p.name for p in found._files()] == ["x.jsonl", "y.jsonl"]
    with pytest.raises(LmplayError, match="there are no files"):
        _ = FilesSource(path=str(folder / "nowhere" / "*.jsonl")).fingerprint


def test_the_faster_of_two_preparations_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_text(tmp_path)
    plan = load_plan(write_plan(tmp_path))
    first = prepare(plan, quiet)
    path = Path(first.tokens["words"].train.filename)  # type: ignore[attr-defined]
    inode = path.stat().st_ino
    looked = []
    real = token_files._open

    def blind_at_first(name: str, folder: Path) -> Any:
        looked.append(folder)
        return None if len(looked) == 1 else real(name, folder)

    monkeypatch.setattr(
        token_files, "_open", blind_at_first
    )  # as if the other one finished in between
    prepare(plan, quiet)
    assert path.stat().st_ino == inode


def test_prompts_are_left_out_of_the_loss(tmp_path: Path) -> None:
    rows = [json.dumps({"q": f"question {i}", "a": f"answer {i}"}) for i in range(60)]
    (tmp_path / "qa.jsonl").write_text("\n".join(rows))
    plan = load_plan(write_plan_of(tmp_path, "qa.jsonl", columns={"prompt": "q", "truth": "a"}))
    prepared = prepare(plan, quiet)
    t = prepared.tokens["d"]
    assert t.train_mask is not None
    counted = Bytes().decode(np.asarray(t.train)[np.asarray(t.train_mask) == 1])
    assert "answer" in counted
    assert "question" not in counted


def test_prepared_tokens_are_found_again_and_made_again_when_damaged(tmp_path: Path) -> None:
    write_text(tmp_path)
    plan = load_plan(write_plan(tmp_path))
    calls: list[str] = []
    first = prepare(plan, lambda what, done: calls.append(what))
    assert calls
    calls.clear()
    assert prepare(plan, lambda what, done: calls.append(what)).fingerprint == first.fingerprint
    assert not calls
    path = Path(first.tokens["words"].train.filename)  # type: ignore[attr-defined]
    path.write_bytes(path.read_bytes()[:-10])
    assert prepare(plan, lambda what, done: calls.append(what)).fingerprint == first.fingerprint
    assert calls, "a file that was cut short is prepared again"


def test_interrupted_preparation_leaves_nothing_that_looks_finished(tmp_path: Path) -> None:
    plan = load_plan(write_plan(tmp_path, tokenizer={"kind": "bpe", "vocab_size": 260}))

    def interrupt(what: str, done: int) -> None:
        if what.startswith("tokenizing"):
            raise KeyboardInterrupt

    before = set((token_files.cache_folder() / "tokens").glob("*"))
    with pytest.raises(KeyboardInterrupt):
        prepare(plan, interrupt)
    assert set((token_files.cache_folder() / "tokens").glob("*")) == before
    assert not list((token_files.cache_folder() / "tokens").glob(".*"))


def bins(folder: Path, train: np.ndarray, **spec: Any) -> Plan:
    folder.mkdir(exist_ok=True)
    train.tofile(folder / "train.bin")
    np.arange(40, dtype=train.dtype).tofile(folder / "val.bin")
    raw = {
        "tokenizer": {"kind": "bytes"},
        "datasets": {"b": {"source": "bins", "path": str(folder), **spec}},
        "steps": [{"datasets": ["b"]}],
    }
    return parse_plan(raw, "test")


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
def test_bins_are_read_in_place(tmp_path: Path, dtype: str) -> None:
    plan = bins(tmp_path / "b", np.arange(200, dtype=dtype), dtype=dtype)
    prepared = prepare(plan, quiet)
    assert np.array_equal(prepared.tokens["b"].train, np.arange(200))


def test_bins_of_another_vocabulary_are_refused(tmp_path: Path) -> None:
    with pytest.raises(LmplayError, match="vocabulary does not match"):
        prepare(bins(tmp_path / "b", np.array([1, 2, 999], dtype=np.uint16)), quiet)


def test_missing_data_says_what_to_do(tmp_path: Path) -> None:
    def prepare_one(spec: dict[str, Any]) -> None:
        raw = {
            "tokenizer": {"kind": "bytes"},
            "datasets": {"d": spec},
            "steps": [{"datasets": ["d"]}],
        }
        prepare(parse_plan(raw, "test"), quiet)

    with pytest.raises(LmplayError, match="no files at"):
        prepare_one({"source": "files", "path": str(tmp_path / "none")})
    with pytest.raises(LmplayError, match="plans laptop, smoke"):
        prepare_one({"source": "hub", "path": "nobody/nothing"})
    with pytest.raises(LmplayError, match="did you mean es"):
        prepare_one({"source": "bundled", "language": "esp"})
    write_text(tmp_path)
    with pytest.raises(LmplayError, match="did you mean text"):
        prepare_one(
            {"source": "files", "path": str(tmp_path / "data.jsonl"), "columns": {"text": "txt"}}
        )


def test_source_code_of_packages_is_text_by_version() -> None:
    code = {"source": "python", "packages": ["numpy", "python"]}
    plan = parse_plan({"datasets": {"d": code}, "steps": [{"datasets": ["d"]}]}, "test")
    source = plan.datasets["d"]
    documents = [text for d in source.documents() for text, _ in d]
    assert len(documents) > 500
    assert Path(np.__file__).read_text() in documents
    assert Path(json.__file__).read_text() in documents
    assert not any("class TestArrayEqual" in text for text in documents), "no tests"
    assert source.fingerprint == plan.datasets["d"].fingerprint
    other = parse_plan(
        {
            "datasets": {"d": {**code, "packages": ["numpy"]}},
            "steps": [{"datasets": ["d"]}],
        },
        "test",
    )
    assert other.datasets["d"].fingerprint != source.fingerprint
    missing = {"source": "python", "packages": ["no-such-package"]}
    with pytest.raises(LmplayError, match="pip install no-such-package"):
        prepare(
            parse_plan({"datasets": {"d": missing}, "steps": [{"datasets": ["d"]}]}, "t"), print
        )


def test_bundled_text_is_real() -> None:
    plan = parse_plan(
        {"datasets": {"d": {"source": "bundled"}}, "steps": [{"datasets": ["d"]}]}, "test"
    )
    source = plan.datasets["d"]
    documents = list(source.documents())
    assert len(documents) > 10_000
    assert sum(len(text) for d in documents for text, _ in d) > 4_900_000
