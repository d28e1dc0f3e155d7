"""What a plan, an experiment file or weights may not hold is named in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Command, one_line, write_plan

from lmplay.discover import find, read_source
from lmplay.errors import LmplayError
from lmplay.plan import load_plan, parse_plan
from lmplay.training import checkpoint

TRAIN = ("--training-plan", "tiny.json", "--mini-batch-size", "8")


def tiny(tmp_path: Path) -> dict[str, Any]:
    return json.loads(write_plan(tmp_path).read_text())


@pytest.mark.parametrize(
    ("part", "key", "value", "says"),
    [
        ("optimizer", "lr", "0.1", 'a number is wanted, not the text "0.1"'),
        ("optimizer", "lr", True, "a number is wanted, not true"),
        ("batch", "batch_size", "8", 'a number is wanted, not the text "8"'),
        ("batch", "batch_size", True, "a number is wanted, not true"),
        ("optimizer", "lazy", 1, "true or false is wanted"),
        ("optimizer", "lazy", "yes", "true or false is wanted"),
        ("optimizer", "betas", [0.9, 95], "less than 1"),
        ("optimizer", "betas", [0.9, "0.95"], "a number is wanted"),
        ("optimizer", "betas", [-0.1, 0.9], "greater than or equal to 0"),
        ("optimizer", "lr", float("inf"), "finite"),
        ("optimizer", "weight_decay", float("nan"), "finite"),
        ("schedule", "floor", float("-inf"), "finite"),
        ("validation", "sample_prompt", "hi \ud83d", "half of a surrogate pair"),
        ("model", "num_blocks", 10**9, "less than or equal to 10000"),
        ("model", "embed_dim", 4 * 10**8, "less than or equal to"),
        ("model", "max_len", 10**12, "less than or equal to"),
        ("batch", "batch_size", 10**9, "less than or equal to"),
    ],
)
def test_a_value_of_another_kind_is_named(
    tmp_path: Path, part: str, key: str, value: Any, says: str
) -> None:
    raw = tiny(tmp_path)
    raw[part][key] = value
    with pytest.raises(LmplayError, match=says) as caught:
        parse_plan(raw, "p.json")
    assert key in str(caught.value)


@pytest.mark.parametrize("value", [8.0, 1e1, 16])
def test_round_numbers_are_integers_however_they_are_written(tmp_path: Path, value: float) -> None:
    raw = tiny(tmp_path)
    raw["batch"]["batch_size"] = value
    assert parse_plan(raw, "p.json").batch.batch_size == int(value)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ('"lr": 0.001', '"lr": 0.001, "lr": 9.0'),
        ('"seed"', '"batch": {}, "seed"'),
        ('"path": "data.jsonl"', '"path": "data.jsonl", "path": "data.jsonl"'),
    ],
)
def test_a_key_that_appears_twice_is_refused(tmp_path: Path, before: str, after: str) -> None:
    path = write_plan(tmp_path, seed=0)
    text = path.read_text()
    assert before in text
    path.write_text(text.replace(before, after, 1))
    with pytest.raises(LmplayError, match="appears twice"):
        load_plan(path)


@pytest.mark.parametrize("content", ["[" * 100_000, '{"a":' * 50_000, "\xff", "", "[]", "3"])
def test_a_plan_that_is_none_is_one_line(tmp_path: Path, command: Command, content: str) -> None:
    (tmp_path / "p.json").write_text(content, encoding="latin-1")
    one_line(command("lmp_trainer", "--training-plan", "./p.json"), "p.json")


@pytest.mark.parametrize("setting", ["num_blocks=1000000000", "embed_dim=400000000", "max_len=-1"])
def test_sizes_of_the_command_have_the_plan_s_limits(
    tmp_path: Path, command: Command, setting: str
) -> None:
    write_plan(tmp_path)
    one_line(command("lmp_trainer", *TRAIN, "--set", setting), setting.split("=")[0])


MALFORMED = {
    "keys": 'VARIANTS = {1: {}}\nBASELINE = "a"',
    "inner keys": 'VARIANTS = {"a": {1: 2}}\nBASELINE = "a"',
    "inner": 'VARIANTS = {"a": [1]}\nBASELINE = "a"',
    "list": 'VARIANTS = ["a"]\nBASELINE = "a"',
    "empty": 'VARIANTS = {}\nBASELINE = "a"',
    "unhashable": 'VARIANTS = {[]: {}}\nBASELINE = "a"',
    "computed": 'VARIANTS = dict(a={})\nBASELINE = "a"',
    "baseline": 'VARIANTS = {"a": {}}\nBASELINE = 3',
    "no baseline": 'VARIANTS = {"a": {}}\nBASELINE = None',
    "name": 'VARIANTS = {"../a": {}}\nBASELINE = "a"',
    "null byte": 'VARIANTS = {"a": {}}\0',
    "nesting": "VARIANTS = " + "(" * 5000 + ")" * 5000 + '\nBASELINE = "a"',
}


@pytest.mark.parametrize("kind", MALFORMED)
def test_a_malformed_experiment_breaks_no_list(tmp_path: Path, command: Command, kind: str) -> None:
    (tmp_path / "experiments").mkdir()
    text = "class Config: pass\nclass Runner: pass\n" + MALFORMED[kind]
    path = tmp_path / "experiments" / "odd.py"
    path.write_text(text)
    assert read_source(path, "here").broken
    done = command("lmp_trainer", "--exp", "list")
    assert done.returncode == 0, done.stderr
    assert "broken" in done.stdout
    assert "value_norm" in done.stdout
    with pytest.raises(LmplayError):
        find(str(path))


@pytest.mark.parametrize("do_sample", [(), ("--do-sample",), ("--do-sample", "--top-p", "0.5")])
def test_weights_that_are_not_finite_are_said(
    tmp_path: Path, command: Command, do_sample: tuple[str, ...]
) -> None:
    write_plan(tmp_path)
    assert command("lmp_trainer", *TRAIN).returncode == 0
    (path,) = (tmp_path / "gpt_out" / "tiny" / "gpt2ish-s0" / "checkpoints").glob("0*")
    found = checkpoint.verify(path)
    tensors = {
        name: {
            k: torch.full_like(v, float("nan")) if v.is_floating_point() else v
            for k, v in t.items()
        }
        for name in ("model", "optimizer", "rng")
        for t in [found.tensors(name)]
    }
    checkpoint.save(path.parent, found.step + 1, tensors, found.state)
    one_line(
        command("lmp_generator", "the", "--model", "gpt_out/tiny/gpt2ish-s0", *do_sample),
        "not finite",
    )
