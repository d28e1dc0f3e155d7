"""A package with one file adds a source, a tokenizer, a metric or an optimizer.

Each test writes a package with metadata, as pip installs it, and runs the commands in a process
that can import it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from conftest import write_plan

from lmplay.discover import find
from lmplay.training.run_folder import RunFolder

SOURCE = '''
from typing import Literal

from lmplay.data.source import Source


class Counting(Source):
    """Documents that count."""

    source: Literal["counting"] = "counting"
    documents_per_set: int = 200

    def documents(self):
        for i in range(self.documents_per_set):
            yield [(" ".join(str(n) for n in range(i, i + 20)), True)]
'''
TOKENIZER = '''
from typing import Literal

import numpy as np

from lmplay.data.tokenizers import Tokenizer, TokenizerSchema


class Schema(TokenizerSchema):
    """Pairs of hexadecimal digits, one token each digit."""

    kind: Literal["nibbles"] = "nibbles"


class Nibbles(Tokenizer):
    Schema = Schema

    def __init__(self):
        self.pieces = [b""] * 16 + [b""]
        self.eot = 16

    @classmethod
    def from_plan(cls, schema):
        return cls()

    @classmethod
    def from_state(cls, state):
        return cls()

    def state(self):
        return {"kind": "nibbles"}

    def encode_batch(self, texts):
        data = [np.frombuffer(t.encode(), np.uint8) for t in texts]
        return [np.stack([d >> 4, d & 15], 1).reshape(-1).astype(np.int64) for d in data]
'''
OPTIMIZER = '''
from typing import Literal

import torch

from lmplay.training.optimizer_specs import OptimizerSpec


class SignDescent(OptimizerSpec):
    """Steps of equal size in the direction of the gradient's sign."""

    name: Literal["signs"] = "signs"
    damping: float = 0.0

    def make(self, groups):
        return Signs(groups, self.damping)


class Signs(torch.optim.Optimizer):
    def __init__(self, groups, damping):
        super().__init__(groups, {"damping": damping})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.sub_(group["lr"] * p.grad.sign())
'''


def install(site: Path, text: str, group: str, entry: str) -> dict[str, str]:
    """Write the package `addition` and its metadata; return an environment that finds it."""
    site.mkdir()
    (site / "addition.py").write_text(text)
    info = site / "addition-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: addition\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[{group}]\n{entry}\n")
    return {**os.environ, "PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"}


def run(
    folder: Path, env: dict[str, str], name: str, *words: str
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", f"lmplay.cli.{name}", *words]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False)


def train(folder: Path, env: dict[str, str], *words: str) -> RunFolder:
    done = run(folder, env, "trainer", "--training-plan", "tiny.json", *words)
    assert done.returncode == 0, done.stderr
    (record,) = (folder / "gpt_out").glob("tiny/*/run.json")
    return RunFolder(record.parent)


def test_a_source(tmp_path: Path) -> None:
    env = install(tmp_path / "site", SOURCE, "lmplay.sources", "counting = addition:Counting")
    write_plan(tmp_path, datasets={"words": {"source": "counting"}})
    assert train(tmp_path, env).summary["val_loss"] < 6
    write_plan(tmp_path, datasets={"words": {"source": "counting", "documents_per_sett": 2}})
    wrong = run(tmp_path, env, "trainer", "--training-plan", "tiny.json")
    assert "did you mean documents_per_set?" in wrong.stderr
    schema = "from lmplay.plan import json_schema; print(json_schema())"
    found = subprocess.run([sys.executable, "-c", schema], env=env, capture_output=True, text=True)
    assert "documents_per_set" in found.stdout, "editors complete it"


def test_a_tokenizer(tmp_path: Path) -> None:
    env = install(tmp_path / "site", TOKENIZER, "lmplay.tokenizers", "nibbles = addition:Nibbles")
    write_plan(tmp_path, tokenizer={"kind": "nibbles"})
    folder = train(tmp_path, env)
    assert folder.read()["identity"]["config"]["vocab_size"] == 17
    text = run(tmp_path, env, "generator", "the", "--max-len", "4")
    assert text.returncode == 0, text.stderr
    plain = {k: v for k, v in env.items() if k != "PYTHONPATH"}
    without = run(tmp_path, plain, "generator", "the", "--max-len", "4")
    assert without.returncode == 1
    assert "there is no nibbles tokenizer" in without.stderr


def test_a_drawn_metric(tmp_path: Path) -> None:
    """One experiment file logs a curve; it is a column, and a figure."""
    text = Path(find("gpt2ish")[0].path).read_text()
    before = "    def build(self) -> nn.Module:\n        return GPT(self.config)\n"
    after = before + (
        "\n    def step(self, model, batch):\n"
        "        out = super().step(model, batch)\n"
        "        size = model.ln.weight.detach().norm()\n"
        "        return dataclasses.replace(out, log={'gain_size': size})\n"
    )
    assert text.count(before) == 1
    text = text.replace(before, after).replace("import math\n", "import dataclasses\nimport math\n")
    start = text.index("VARIANTS: dict")
    (tmp_path / "mine.py").write_text(text[:start] + 'VARIANTS: dict[str, dict] = {"mine": {}}\n')
    write_plan(tmp_path)
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    folder = train(tmp_path, env, "--exp", "mine.py")
    assert folder.curves("train")["gain_size"].iloc[0] == pytest.approx(4.0)
    drawn = run(tmp_path, env, "plotstats", "--out", "figures")
    assert drawn.returncode == 0, drawn.stderr
    assert (tmp_path / "figures" / "log_gain_size.png").stat().st_size > 1000
    assert isinstance(folder.curves(), pd.DataFrame)


def test_an_optimizer(tmp_path: Path) -> None:
    env = install(tmp_path / "site", OPTIMIZER, "lmplay.optimizers", "signs = addition:SignDescent")
    write_plan(tmp_path, optimizer={"name": "signs", "lr": 0.001})
    curve = train(tmp_path, env).curves()
    assert curve["loss"].iloc[-1] < curve["loss"].iloc[0] - 0.1
    write_plan(tmp_path, optimizer={"name": "signs", "dampin": 1.0})
    wrong = run(tmp_path, env, "trainer", "--training-plan", "tiny.json")
    assert "unknown key (did you mean damping?)" in wrong.stderr
    write_plan(tmp_path, optimizer={"name": "sings"})
    unknown = run(tmp_path, env, "trainer", "--training-plan", "tiny.json")
    assert unknown.returncode == 1
    assert "optimizer.name" in unknown.stderr


@pytest.mark.parametrize("group", ["sources", "tokenizers", "optimizers"])
def test_a_broken_plugin_breaks_nothing_else(tmp_path: Path, group: str) -> None:
    env = install(tmp_path / "site", "1 / 0\n", f"lmplay.{group}", "broken = addition:Thing")
    write_plan(tmp_path)
    train(tmp_path, env)
    key = {"sources": "datasets", "tokenizers": "tokenizer", "optimizers": "optimizer"}[group]
    value = {"sources": {"words": {"source": "broken"}}, "tokenizers": {"kind": "broken"}}
    write_plan(tmp_path, **{key: value.get(group, {"name": "broken"})})
    used = run(tmp_path, env, "trainer", "--training-plan", "tiny.json")
    assert used.returncode == 1
    assert "its plugin cannot be loaded: addition:Thing: ZeroDivisionError" in used.stderr
    assert len(used.stderr.strip().splitlines()) == 1


def test_run_json_names_the_plugins_data(tmp_path: Path) -> None:
    env = install(tmp_path / "site", SOURCE, "lmplay.sources", "counting = addition:Counting")
    write_plan(tmp_path, datasets={"words": {"source": "counting"}})
    record = json.loads((train(tmp_path, env).path / "run.json").read_text())
    assert record["plan"]["datasets"]["words"]["documents_per_set"] == 200
