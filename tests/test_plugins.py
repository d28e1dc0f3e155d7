"""A package with one file adds a source, a tokenizer, a metric or an optimizer.

Each test writes a package with metadata, as pip installs it, and runs the commands in a process
that can import it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pytest
from conftest import Command, write_plan
from forked import LIBRARIES, Forked, forked

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


TRAIN = ("--training-plan", "tiny.json")


@pytest.fixture(scope="module")
def warm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forked]:
    """Starts commands; lmplay is imported, and looks for plugins, in each of them anew."""
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    with forked(tmp_path_factory.mktemp("warm"), env, LIBRARIES) as commands:
        yield commands


def install(site: Path, text: str, entry_points: str) -> None:
    """Write the package `addition` and its metadata."""
    site.mkdir()
    (site / "addition.py").write_text(text)
    info = site / "addition-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: addition\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(entry_points)


def train(commands: Forked, folder: Path) -> RunFolder:
    done = commands.run("lmp_trainer", *TRAIN, cwd=folder, site=folder / "site")
    assert done.returncode == 0, done.stderr
    (record,) = (folder / "gpt_out").glob("tiny/*/run.json")
    return RunFolder(record.parent)


def test_a_source(tmp_path: Path, warm: Forked) -> None:
    site = tmp_path / "site"
    install(site, SOURCE, "[lmplay.sources]\ncounting = addition:Counting\n")
    write_plan(tmp_path, datasets={"words": {"source": "counting"}})
    run = train(warm, tmp_path)
    assert run.summary["val_loss"] < 6
    assert run.read()["plan"]["datasets"]["words"]["documents_per_set"] == 200
    write_plan(tmp_path, datasets={"words": {"source": "counting", "documents_per_sett": 2}})
    wrong = warm.run("lmp_trainer", *TRAIN, cwd=tmp_path, site=site)
    assert "did you mean documents_per_set?" in wrong.stderr
    schema = "from lmplay.plan import json_schema; print(json_schema())"
    found = warm.run("python", schema, cwd=tmp_path, site=site)
    assert "documents_per_set" in found.stdout, "editors complete it"


def test_a_tokenizer(tmp_path: Path, warm: Forked, command: Command) -> None:
    site = tmp_path / "site"
    install(site, TOKENIZER, "[lmplay.tokenizers]\nnibbles = addition:Nibbles\n")
    write_plan(tmp_path, tokenizer={"kind": "nibbles"})
    assert train(warm, tmp_path).read()["identity"]["config"]["vocab_size"] == 17
    text = warm.run("lmp_generator", "the", "--max-len", "4", cwd=tmp_path, site=site)
    assert text.returncode == 0, text.stderr
    without = command("lmp_generator", "the", "--max-len", "4")  # where it is not installed
    assert without.returncode == 1
    assert "there is no nibbles tokenizer" in without.stderr


def test_a_drawn_metric(tmp_path: Path, command: Command) -> None:
    """One experiment file logs a curve; it is a column, and a figure."""
    text = Path(find("gpt2ish")[0].path).read_text()
    before = (
        "    def build(self) -> nn.Module:\n"
        "        return start_as(self.config.init, GPT(self.config))\n"
    )
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
    trained = command("lmp_trainer", *TRAIN, "--exp", "mine.py")
    assert trained.returncode == 0, trained.stderr
    (record,) = (tmp_path / "gpt_out").glob("tiny/*/run.json")
    folder = RunFolder(record.parent)
    assert folder.curves("train")["gain_size"].iloc[0] == pytest.approx(4.0)
    drawn = command("lmp_plotstats", "--out", "figures")
    assert drawn.returncode == 0, drawn.stderr
    assert (tmp_path / "figures" / "log_gain_size.png").stat().st_size > 1000
    assert isinstance(folder.curves(), pd.DataFrame)


def test_an_optimizer(tmp_path: Path, warm: Forked) -> None:
    site = tmp_path / "site"
    install(site, OPTIMIZER, "[lmplay.optimizers]\nsigns = addition:SignDescent\n")
    write_plan(tmp_path, optimizer={"name": "signs", "lr": 0.001})
    curve = train(warm, tmp_path).curves()
    assert curve["loss"].iloc[-1] < curve["loss"].iloc[0] - 0.1
    write_plan(tmp_path, optimizer={"name": "signs", "dampin": 1.0})
    wrong = warm.run("lmp_trainer", *TRAIN, cwd=tmp_path, site=site)
    assert "unknown key (did you mean damping?)" in wrong.stderr
    write_plan(tmp_path, optimizer={"name": "sings"})
    unknown = warm.run("lmp_trainer", *TRAIN, cwd=tmp_path, site=site)
    assert unknown.returncode == 1
    assert "optimizer.name" in unknown.stderr


def test_a_broken_plugin_breaks_nothing_else(tmp_path: Path, warm: Forked) -> None:
    groups = ("sources", "tokenizers", "optimizers")
    entries = "\n".join(f"[lmplay.{group}]\nbroken = addition:Thing" for group in groups)
    uses = {
        "datasets": {"words": {"source": "broken"}},
        "tokenizer": {"kind": "broken"},
        "optimizer": {"name": "broken"},
    }
    site = tmp_path / "site"
    install(site, "1 / 0\n", entries)
    write_plan(tmp_path)
    train(warm, tmp_path)
    for key, value in uses.items():
        write_plan(tmp_path, **{key: value})
        used = warm.run("lmp_trainer", *TRAIN, cwd=tmp_path, site=site)
        assert used.returncode == 1
        assert "its plugin cannot be loaded: addition:Thing: ZeroDivisionError" in used.stderr
        assert len(used.stderr.strip().splitlines()) == 1, key
