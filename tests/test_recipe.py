"""Recipes: dotted settings, what they change, and what stays comparable."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import Command, one_line, write_plan

from lmplay import recipe
from lmplay.analysis.compare import arena_of, collect
from lmplay.errors import LmplayError
from lmplay.plan import Plan, load_plan
from lmplay.training.run_folder import RunFolder

VALUES: dict[str, str] = {  # another value than the plan's, for each key of a recipe
    "model.num_blocks": "1",
    "model.embed_dim": "24",
    "model.num_heads": "4",
    "model.num_kv_heads": "1",
    "model.dropout": "0.2",
    "model.init": "torch",
    "model.lora": "2",
    "optimizer.name": "adam",
    "optimizer.lr": "0.004",
    "optimizer.weight_decay": "0.3",
    "optimizer.betas": "[0.8, 0.9]",
    "optimizer.momentum": "0.5",
    "optimizer.eps": "1e-6",
    "optimizer.other_lr": "0.005",
    "optimizer.lazy": "true",
    "optimizer.tolerance": "0.5",
    "schedule.name": "wsd",
    "schedule.warmup": "0.3",
    "schedule.floor": "0.5",
    "schedule.decay": "0.5",
    "schedule.per": "window",
    "batch.batch_size": "4",
    "batch.grad_clip": "0.5",
    "batch.replay": "0.5",
}
OF_A_STREAM = ("schedule.per", "batch.replay")
STREAM: dict[str, Any] = {
    "datasets": {
        "words": {
            "source": "files",
            "path": "data.jsonl",
            "columns": {"prompt": "text", "label": "title", "time": "text"},
        }
    },
    "classify": {"labels": ["a", "b"]},
    "steps": [{"step_name": "words", "datasets": ["words"], "stream": {"window": "5m"}}],
}
TRAIN = ("lmp_trainer", "--training-plan", "tiny.json", "--mini-batch-size", "4")


def tiny(folder: Path, **changes: Any) -> Plan:
    return load_plan(write_plan(folder, **changes))


def tokens_budget() -> list[dict[str, Any]]:
    return [{"step_name": "words", "datasets": ["words"], "tokens": 3072}]


def test_every_key_is_here() -> None:
    assert set(VALUES) == set(recipe.every_key())


@pytest.mark.parametrize("key", VALUES)
def test_a_setting_changes_its_key_and_not_the_arena(tmp_path: Path, key: str) -> None:
    plan = tiny(tmp_path, **(STREAM if key in OF_A_STREAM else {"steps": tokens_budget()}))
    changed = recipe.apply(plan, {key: VALUES[key]}, "--set")
    part, _, name = key.partition(".")
    found = getattr(getattr(changed, part), name)
    assert found != getattr(getattr(plan, part), name)
    value = VALUES[key] if isinstance(found, str) else json.loads(VALUES[key])
    assert found == (tuple(value) if isinstance(value, list) else value)
    assert changed.fingerprint != plan.fingerprint
    assert recipe.arena_fingerprint(changed) == recipe.arena_fingerprint(plan)


@pytest.mark.parametrize(
    "changes",
    [
        {"seed": 1},
        {"tokenizer": {"kind": "chars"}},
        {"model": {"num_blocks": 2, "embed_dim": 16, "num_heads": 2, "max_len": 16}},
        {"validation": {"fraction": 0.2}},
        {"steps": [{"step_name": "words", "datasets": ["words"], "steps": 13}]},
    ],
    ids=lambda c: next(iter(c)),
)
def test_another_arena_is_another_arena(tmp_path: Path, changes: dict[str, Any]) -> None:
    before = recipe.arena_fingerprint(tiny(tmp_path))
    assert recipe.arena_fingerprint(tiny(tmp_path, **changes)) != before


def test_a_budget_in_steps_has_as_many_tokens_as_its_batches(tmp_path: Path) -> None:
    plan = tiny(tmp_path)
    changed = recipe.apply(plan, {"batch.batch_size": 4}, "--set")
    assert recipe.arena_fingerprint(changed) != recipe.arena_fingerprint(plan)


def test_another_optimizer_starts_from_its_own_defaults(tmp_path: Path) -> None:
    plan = tiny(tmp_path)
    same = recipe.apply(plan, {"optimizer.name": "adamw"}, "--set")
    assert same.optimizer == plan.optimizer
    other = recipe.apply(plan, {"optimizer.name": "muon", "optimizer.other_lr": 0.5}, "--set")
    assert other.optimizer.lr == 0.02
    assert other.optimizer.weight_decay == 0
    assert getattr(other.optimizer, "other_lr") == 0.5  # noqa: B009 (not of every optimizer)


@pytest.mark.parametrize("key", OF_A_STREAM)
def test_what_is_for_a_stream_needs_one(tmp_path: Path, key: str) -> None:
    with pytest.raises(LmplayError, match="is for a stream, and no step of the plan is one"):
        recipe.apply(tiny(tmp_path), {key: VALUES[key]}, "--set")


@pytest.mark.parametrize("text", ["0.004", ".004", "4e-3", "4E-03"])
def test_a_number_may_be_written_as_python_writes_it(tmp_path: Path, text: str) -> None:
    changed = recipe.apply(tiny(tmp_path), {"optimizer.lr": text}, "--set")
    assert changed.optimizer.lr == 0.004


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("optimizer.lrr=1", "optimizer.lrr: there is no such setting (did you mean optimizer.lr?)"),
        ("optimiser.lr=1", "optimiser.lr: there is no such setting (did you mean optimizer.lr?)"),
        ("batch.size=8", "batch.size: there is no such setting"),
        ("schedule.name=cosin", "--set schedule.name=cosin: Input should be 'constant'"),
        ("optimizer.lr=fast", "--set optimizer.lr=fast: lr: a number is wanted"),
        ("optimizer.lr=nan", "--set optimizer.lr=nan: "),
        ("optimizer.lr=-1", "--set optimizer.lr=-1: Input should be greater than 0"),
        ("model.max_len=64", "the length of a sequence is the arena's"),
        ("model.embed_dim=0", "model.embed_dim=0: Input should be greater than 0"),
    ],
)
def test_a_wrong_setting_is_one_line(
    tmp_path: Path, command: Command, setting: str, says: str
) -> None:
    write_plan(tmp_path)
    one_line(command(*TRAIN, "--set", setting), says)


@pytest.mark.parametrize(
    ("own", "setting"),
    [
        ({"lr": 0.1}, "optimizer.lr"),
        ({"optimizer": {"name": "sgd"}}, "optimizer.name"),
        ({"schedule": {"name": "wsd"}}, "schedule.name"),
    ],
)
def test_a_stage_with_a_part_of_its_own_is_named(
    tmp_path: Path, own: dict[str, Any], setting: str
) -> None:
    plan = tiny(tmp_path, steps=[{"datasets": ["words"], "steps": 2, **own}])
    with pytest.raises(LmplayError, match="has its own"):
        recipe.apply(plan, {setting: VALUES[setting]}, "--set")


def test_runs_of_other_recipes_are_compared_and_named(tmp_path: Path, command: Command) -> None:
    write_plan(tmp_path, steps=tokens_budget())
    (tmp_path / "wide.json").write_text(
        json.dumps(
            {
                **json.loads((tmp_path / "tiny.json").read_text()),
                "optimizer": {"name": "sgd", "lr": 0.1},
            }
        )
    )
    for words in (
        TRAIN,
        (*TRAIN, "--set", "optimizer.name=muon", "--set", "batch.batch_size=4"),
        (*TRAIN[:2], "wide.json", *TRAIN[3:]),
    ):
        done = command(*words)
        assert done.returncode == 0, done.stderr
    folder = tmp_path / "gpt_out" / "tiny" / "gpt2ish-batch.batch_size=4-optimizer.name=muon-s0"
    record = RunFolder(folder).read()
    assert record["plan"]["optimizer"]["name"] == "muon"
    assert record["summary"]["steps"] == 24
    curves, _ = collect([tmp_path / "gpt_out"], "validate", 10)
    assert len({c.arena for c in curves}) == 1
    assert sorted(c.name for c in curves) == [
        "gpt2ish (wide)-s0",
        "gpt2ish-batch.batch_size=4-optimizer.name=muon-s0",
        "gpt2ish-s0",
    ]
    done = command("lmp_plotstats", "gpt_out/tiny", "--target", "gpt2ish")
    assert done.returncode == 0, done.stderr
    assert "optimizer.name=muon" in done.stdout


def test_a_run_of_before_there_were_arenas_has_one(tmp_path: Path, command: Command) -> None:
    write_plan(tmp_path)
    assert command(*TRAIN, "--steps", "1").returncode == 0
    record = RunFolder(tmp_path / "gpt_out" / "tiny" / "gpt2ish-1steps-s0").read()
    known = record.pop("arena")
    assert arena_of(record) == known
    assert arena_of({**record, "plan": None}) == record["identity"]["plan"]


def copy_of_baseline(folder: Path, variants: str) -> Path:
    """The baseline's file with other VARIANTS."""
    from lmplay.discover import find

    text = find("gpt2ish")[0].path.read_text()
    path = folder / "hot.py"
    path.write_text(text.partition("VARIANTS:")[0] + f"VARIANTS: dict[str, dict] = {variants}\n")
    return path


def test_a_variant_may_be_a_recipe(tmp_path: Path, command: Command) -> None:
    write_plan(tmp_path)
    copy_of_baseline(tmp_path, '{"hot": {"num_blocks": 1, "optimizer.lr": 0.5}}')
    done = command(*TRAIN, "--exp", "hot.py", "--set", "schedule.name=wsd")
    assert done.returncode == 0, done.stderr
    record = RunFolder(tmp_path / "gpt_out" / "tiny" / "hot-schedule.name=wsd-s0").read()
    assert record["plan"]["optimizer"]["lr"] == 0.5
    assert record["plan"]["schedule"]["name"] == "wsd"
    assert record["identity"]["config"]["num_blocks"] == 1


@pytest.mark.parametrize(
    ("variants", "says"),
    [
        ('{"hot": {"optimiser.lr": 1}}', "optimiser.lr is no setting of a recipe"),
        ('{"hot": {"optimizer.lrr": 1}}', "did you mean optimizer.lr?"),
        ('{"hot": {"batch.batch_size": 0}}', "variant hot: batch.batch_size=0: Input should be"),
    ],
)
def test_a_wrong_recipe_of_a_variant_is_one_line(
    tmp_path: Path, command: Command, variants: str, says: str
) -> None:
    write_plan(tmp_path)
    copy_of_baseline(tmp_path, variants)
    one_line(command(*TRAIN, "--exp", "hot.py"), says)
