"""The leaderboard: its rows are trials that exist, and its corrections are those of others."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from conftest import ROOT
from statsmodels.stats.multitest import multipletests

from lmplay import discover, recipe
from lmplay.plan import find_plan, load_plan
from lmplay.trial.resolve import Arm

SCRIPT = ROOT / "benchmarks" / "leaderboard.py"


@pytest.fixture(scope="module")
def board() -> ModuleType:
    spec = importlib.util.spec_from_file_location("leaderboard", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["leaderboard"] = module
    spec.loader.exec_module(module)
    return module


def test_every_row_can_be_judged(board: ModuleType) -> None:
    rows, plans = board.entries()
    for entry in rows.values():
        arm = Arm.parse(entry.arm, "row")
        against = Arm.parse(entry.against, "row") if entry.against else None
        assert against is None or against.label != arm.label
        for name in plans:
            plan = load_plan(find_plan(name))
            recipe.apply(plan, recipe.split(arm.settings)[1], "row")
            assert arm.experiment.config({**plan.sizes(), "vocab_size": 1024}, arm.settings)


def test_ideas_on_modern_are_rows(board: ModuleType) -> None:
    rows, _ = board.entries()
    judged = {Arm.parse(e.arm, "row").experiment.source.idea for e in rows.values()}
    ideas = {s.idea for s in discover.list_sources() if s.baseline == "modern"}
    assert ideas - {"modern", "ablations"} <= judged | {"modern_again"}


def test_false_discoveries_are_controlled_as_by_statsmodels(board: ModuleType) -> None:
    random = np.random.default_rng(0)
    for count in (1, 5, 40):
        p = np.concatenate([random.uniform(size=count), random.uniform(0, 0.01, size=count)])
        expected = np.flatnonzero(multipletests(p, 0.05, "fdr_bh")[0])
        assert board.surviving(dict(enumerate(p.tolist()))) == set(expected.tolist())
    assert board.surviving({}) == set()


def result(gain: float, p: float, word: str) -> dict[str, Any]:
    keys = {"tokens_ratio": 1.1, "seconds": 1.2, "memory": 1.0, "against": "modern"}
    return {"gain": gain, "low": gain - 0.01, "high": gain + 0.01, "p": p, "word": word, **keys}


def test_the_table_says_where_an_idea_holds(board: ModuleType) -> None:
    results = {
        "gqa": {"sketch muon": result(-0.02, 0.004, "HARMFUL")},
        "canon": {
            "sketch muon": result(0.04, 0.004, "REAL"),
            "sketch adamw": result(0.02, 0.4, "UNDECIDED"),
        },
        "swiglu": {
            "sketch muon": result(0.01, 0.004, "REAL"),
            "sketch adamw": result(0.01, 0.2, "REAL"),
        },
    }
    lines = board.table(results).splitlines()
    assert [line.split("`")[1] for line in lines[2:]] == ["canon", "swiglu", "gqa"]
    assert "**+0.0400** REAL | +0.0200 UNDECIDED |  | differs | +10 %" in lines[2]
    assert "+0.0100 REAL†" in lines[3], "not after the correction"
    assert "ROBUST" in lines[3]
    assert "eight are needed" in board.correlation(results)


def test_an_unknown_row_suggests_the_nearest(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, SCRIPT, "run", "gqaa"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "did you mean gqa?" in done.stdout
    assert json.loads((ROOT / "benchmarks" / "leaderboard.json").read_text())
