"""Every shipped plan loads; what is wrong in a plan is named; the ancestor's plans load
unchanged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT

from lmplay.data.sources import BundledSource, HubSource
from lmplay.discover import find, load
from lmplay.errors import LmplayError
from lmplay.plan import json_schema, load_plan, parse_plan, plan_files

SHIPPED = {
    "sketch",
    "laptop",
    "desk",
    "probe_recall",
    "probe_copy",
    "smoke",
    "default",
    "wiki_en_es",
    "l_wiki_en_es",
    "tinystories",
    "pretrain",
    "bigpretrain",
    "full_v1",
    "full",
    "openorca",
    "instruction_ft",
    "openwebtext",
    "fineweb_edu_10b",
    "char",
    "bins",
    "market_smoke",
    "market_zi",
    "market_btc",
    "market_lobster",
}


def test_all_are_shipped() -> None:
    assert set(plan_files()) >= SHIPPED


@pytest.mark.parametrize("name", sorted(plan_files()))
def test_shipped_plan(name: str) -> None:
    plan = load_plan(plan_files()[name])
    assert plan.description
    experiment = load(*find("gpt2ish"))
    config, without = experiment.config({**plan.sizes(), "vocab_size": 300}, {})
    assert not without
    assert config.max_len == plan.model.max_len
    again = parse_plan(plan.model_dump(mode="json", by_alias=True), name)
    assert again.fingerprint == plan.fingerprint


def test_laptop_and_smoke_need_no_hub() -> None:
    for name in ("market_smoke", "market_zi", "market_btc"):
        assert all(
            d.source == "market" and not d.path
            for d in load_plan(plan_files()[name]).datasets.values()
        )
    for name in ("laptop", "smoke", "char"):
        assert all(
            isinstance(d, BundledSource) for d in load_plan(plan_files()[name]).datasets.values()
        )


def test_schema_file_is_the_one_the_code_makes() -> None:
    shipped = json.loads((ROOT / "training_plans" / "plan.schema.json").read_text())
    assert shipped == json.loads(json.dumps(json_schema())), "make schema writes it anew"


ANCESTOR = {
    "datasets": {
        "wiki_en": {"ds_loader": "wiki", "args": ["en"]},
        "wiki_es": {"ds_loader": "wiki", "args": ["es"]},
        "openorca": {"ds_loader": "openorca"},
        "math": {
            "ds_loader": "hf",
            "args": ["math", "microsoft/orca-math-word-problems-200k"],
            "kwargs": {"truth_column": "answer", "prompt_column": "question"},
        },
        "stories": {
            "ds_loader": "hf",
            "args": ["s", "roneneldan/TinyStories"],
            "kwargs": {"truth_column": "text"},
        },
        "smol": {
            "ds_loader": "hf",
            "args": ["smol", "HuggingFaceTB/smoltalk", "all"],
            "kwargs": {"truth_column": "messages"},
        },
        "cosmo": {
            "ds_loader": "hf",
            "args": ["c", "HuggingFaceTB/smollm-corpus", "cosmopedia-v2"],
            "kwargs": {"text_column": "text"},
        },
    },
    "seed": 0,
    "steps": [
        {"datasets": ["wiki_en", "wiki_es"], "epochs": 1.0, "step_name": "l_wiki_en_es"},
        {
            "datasets": ["stories", "cosmo"],
            "epochs": 0.5,
            "interleve_stopping_strategy": "all_exhausted",
        },
    ],
}


def test_ancestors_plans_load_unchanged() -> None:
    plan = parse_plan(ANCESTOR, "ancestor.json")
    spec = plan.datasets
    assert all(isinstance(s, HubSource) for s in spec.values())
    wiki, math, smol, stories = (spec[n] for n in ("wiki_es", "math", "smol", "stories"))
    assert (wiki.path, wiki.name) == ("wikimedia/wikipedia", "20231101.es")  # type: ignore[union-attr]
    assert (math.columns.prompt, math.columns.truth) == ("question", "answer")  # type: ignore[union-attr]
    assert smol.columns.messages == "messages"  # type: ignore[union-attr]
    assert stories.columns.text == "text"  # type: ignore[union-attr]
    assert plan.steps[1].interleave == "all_exhausted"
    assert [s.step_name for s in plan.steps] == ["l_wiki_en_es", "1"]
    assert (plan.optimizer.name, plan.optimizer.lr, plan.batch.batch_size) == ("adagrad", 6e-4, 50)
    assert plan.sizes() == {
        "num_blocks": 6,
        "embed_dim": 768,
        "num_heads": 12,
        "max_len": 1024,
        "dropout": 0.1,
    }


GOOD: dict[str, Any] = {"datasets": {"d": {"source": "bundled"}}, "steps": [{"datasets": ["d"]}]}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"optimiser": {}}, "optimiser: unknown key (did you mean optimizer?)"),
        ({"optimizer": {"learning_rate": 1}}, "optimizer.learning_rate: unknown key"),
        ({"datasets": {"d": {"source": "bundled", "langage": "en"}}}, "(did you mean language?)"),
        (
            {"steps": [{"datasets": ["d"], "epoch": 1}]},
            "steps.0.epoch: unknown key (did you mean epochs?)",
        ),
        ({"steps": [{"datasets": ["e"]}]}, "uses the data set e, which the plan does not define"),
        ({"optimizer": {"name": "adamx"}}, "optimizer.name"),
        ({"batch": {"batch_size": 0}}, "greater than 0"),
        ({"datasets": {"d": {"source": "hup"}}}, "hup"),
        ({"steps": [{"datasets": ["d"], "weights": [1, 2]}]}, "weights must be one number"),
        ({"datasets": {"d": {"ds_loader": "hff", "args": ["a", "b"]}}}, "did you mean hf"),
        ({"datasets": {"d": {"ds_loader": "wiki", "args": ["de", "more"]}}}, "takes 1 args, not 2"),
        (
            {
                "datasets": {
                    "d": {"ds_loader": "wiki", "args": ["de"], "kwargs": {"spli": "train[:1%]"}}
                }
            },
            "unknown key",
        ),
        (
            {"datasets": {"d": {"source": "files", "path": "x", "columns": {"prompt_loss": True}}}},
            "datasets.d.columns: columns: give one of text",
        ),
        ({"datasets": {"d": {"path": "x"}}}, "datasets.d: the key 'source' is missing"),
    ],
)
def test_what_is_wrong_is_named(change: dict[str, Any], says: str) -> None:
    with pytest.raises(LmplayError) as error:
        parse_plan({**GOOD, **change}, "my_plan.json")
    assert says in str(error.value)
    assert str(error.value).startswith("my_plan.json: ")
    assert "\n" not in str(error.value)


def test_not_json_names_the_line(tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    path.write_text('{\n "datasets": {},,\n}')
    with pytest.raises(LmplayError, match="line 2"):
        load_plan(path)


def test_description_does_not_change_the_arena_but_everything_else_does() -> None:
    base = parse_plan(GOOD, "x")
    assert parse_plan({**GOOD, "description": "words"}, "x").fingerprint == base.fingerprint
    assert parse_plan({**GOOD, "seed": 1}, "x").fingerprint != base.fingerprint


def test_budgets_replace_the_plans() -> None:
    plan = parse_plan(
        {**GOOD, "steps": [{"datasets": ["d"], "epochs": 2, "step_name": s} for s in "ab"]}, "x"
    )
    halved = plan.with_budget(tokens=None, steps=10, minutes=None)
    assert [(s.steps, s.epochs) for s in halved.steps] == [(5, None), (5, None)]
    assert plan.with_budget(None, None, None) is plan
    assert [(s.tokens, s.steps) for s in plan.with_budget(7, 3, None).steps] == [(4, 2), (3, 1)], (
        "none is lost"
    )
    with pytest.raises(LmplayError, match="the plan has 2 steps"):
        plan.with_budget(None, 1, None)
