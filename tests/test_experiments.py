"""Every experiment and variant passes the conformance suite, and every baseline lies where it can
be copied."""

from __future__ import annotations

import ast
import math
from pathlib import Path

import pytest
import torch
from conftest import Command, assert_equal_to_the_bit, stopped_at, write_plan

from lmplay import discover, testing
from lmplay.api import Batch
from lmplay.changes import check_marks
from lmplay.model import build_model

SOURCES = discover.list_sources()
VARIANTS = [v for s in SOURCES for v in s.variants]
IDEAS = [next(iter(s.variants)) for s in SOURCES]


@pytest.mark.parametrize("variant", VARIANTS)
def test_conformance(variant: str) -> None:
    testing.check_experiment(variant)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("variant", VARIANTS)
def test_conformance_on_a_gpu(variant: str) -> None:
    testing.check_experiment(variant, device="cuda")
    testing.check_fp16(testing.tiny(variant, "cuda"))
    testing.check_compiles(testing.tiny(variant, "cuda"))
    torch.compiler.reset()


@pytest.mark.parametrize("source", SOURCES, ids=lambda s: s.idea)
def test_changed_marks_tell_what_changed(source: discover.ExperimentFile) -> None:
    baseline, _ = discover.find_baseline(source)
    if baseline.path == source.path:
        assert "# CHANGED" not in source.path.read_text()
    else:
        assert check_marks(baseline.path, source.path) == []


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (("self.fc1 = Linear(", "self.fc1 = nn.Linear("), "is not marked as CHANGED"),
        (("self.dropout = c.dropout", "self.dropout = c.dropout  # CHANGED"), "covers no change"),
        (("class Block", "# CHANGED: to Attention\n\n\nclass Block"), "not defined below it"),
    ],
)
def test_wrong_marks_are_found(tmp_path: Path, change: tuple[str, str], problem: str) -> None:
    baseline = Path(discover.find("gpt2ish")[0].path)
    copy = tmp_path / "copy.py"
    copy.write_text(baseline.read_text().replace(*change))
    try:
        problems = check_marks(baseline, copy)
    except ValueError as e:
        problems = [str(e)]
    assert any(problem in p for p in problems), problems


@pytest.mark.parametrize("variant", IDEAS)
def test_compiles(variant: str) -> None:
    # One block holds all of an idea's code, but where two kinds of block alternate; compiling is
    # slow.
    fewer = {"num_chunks": 2} if variant == "rgpt2ish" else {}
    subject = testing.tiny(variant, num_blocks=2 if variant == "nnm_select" else 1, **fewer)
    testing.check_compiles(subject, "inductor" if variant == "gpt2ish" else "aot_eager")
    torch.compiler.reset()


# all go through the conformance suite; one of each idea here
FROM_THE_ORIGINAL = [next(iter(s.variants)) for s in SOURCES if "init" in s.config_fields]


@pytest.mark.parametrize("variant", FROM_THE_ORIGINAL)
def test_it_starts_as_torch_does_if_asked(variant: str) -> None:
    """The original's models start as torch's layers do: embeddings with deviation 1, linear layers
    uniform in 1 / sqrt(inputs)."""
    subject = testing.tiny(variant, init="torch", embed_dim=64, vocab_size=300)
    model = build_model(subject.runner, 0)
    layers = [m for m in model.modules() if type(m).__name__ in ("Linear", "Embedding")]
    assert len(layers) >= 2
    for layer in layers:
        weight = layer.weight.detach()
        if isinstance(layer, torch.nn.Linear):
            bound = layer.in_features**-0.5
            assert bound * 0.9 < float(weight.abs().max()) <= bound
            assert float(weight.std()) == pytest.approx(bound / 3**0.5, rel=0.1)
        else:
            assert float(weight.std()) == pytest.approx(1, rel=0.1)
    ids = torch.randint(300, (2, 12))
    assert math.isfinite(float(subject.runner.step(model, Batch(ids, ids)).loss_sum.detach()))


@pytest.mark.parametrize("variant", [*IDEAS, "hybrid"])
def test_trains_resumes_and_generates(
    variant: str, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped in the middle and resumed, a run is to the bit the one that was not."""
    plan = write_plan(
        tmp_path,
        validation={
            "fraction": 0.1,
            "tokens": 256,
            "every_tokens": 2048,  # one before the end, after the stop at step 5
            "sample_prompt": "the ",
        },
        steps=[{"step_name": "words", "datasets": ["words"], "steps": 10}],
    )
    train = (
        "lmp_trainer",
        "--exp",
        variant,
        "--training-plan",
        str(plan),
        "--mini-batch-size",
        "4",
    )
    with stopped_at(5, monkeypatch):
        assert command(*train).returncode == 130
    again = command(*train)
    assert again.returncode == 0, again.stderr
    assert "at step 5" in again.stdout
    assert "val_bpb:" in again.stdout
    whole = command(*train, "--out", "whole")
    assert whole.returncode == 0, whole.stderr
    assert_equal_to_the_bit(
        *(tmp_path / out / "tiny" / f"{variant}-s0" for out in ("gpt_out", "whole"))
    )
    text = command("lmp_generator", "the quick", "--max-len", "5")
    assert text.returncode == 0, text.stderr
    assert text.stdout.startswith("the quick")


@pytest.mark.parametrize("source", SOURCES, ids=lambda s: s.idea)
def test_file_stands_alone(source: discover.ExperimentFile) -> None:
    """Each says what it is, names a baseline that exists, and imports nothing but torch and
    lmplay.api."""
    assert not source.broken
    assert 10 < len(source.summary) <= 110
    assert source.baseline in VARIANTS
    assert "RESULT" not in source.doc, (
        "the docstring says what came out, or that nothing was run yet"
    )
    names = set()
    for node in ast.walk(ast.parse(source.path.read_text())):
        if isinstance(node, ast.ImportFrom):
            names.add(node.module)
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    standard = {
        "__future__",
        "math",
        "contextlib",
        "copy",
        "dataclasses",
        "typing",
        "collections.abc",
    }
    standard |= {"importlib", "importlib.util"}  # to ask for a kernel where one may be installed
    outside = {n for n in names if n not in standard and not n.startswith("torch")}
    assert outside == {"lmplay.api"}


def test_suite_finds_faults(tmp_path: Path) -> None:
    """The checks can fail: each fault planted in a copy of the baseline is found by the check that
    is for it."""
    text = Path(discover.find("gpt2ish")[0].path).read_text()
    faults = {
        "check_causal": (
            "is_causal",
            "causal_attention(q, k, v)",
            "F.scaled_dot_product_attention(q, k, v)",
        ),
        "check_cached_decoding": (
            "past",
            "past = 0 if cache is None else cache.length",
            "past = 0",
        ),
        "check_initialized_by_name": (
            "scale",
            "self.ln = nn.LayerNorm(c.embed_dim)",
            "self.ln = nn.LayerNorm(c.embed_dim)\n        self.scale = nn.Parameter(torch.ones(1))",
        ),
        "check_config_fields": ("head_bias", "bias=c.head_bias", "bias=True"),
    }
    for check, (name, before, after) in faults.items():
        assert text.count(before) == 1
        path = tmp_path / f"{name}.py"
        path.write_text(text.replace(before, after))
        with pytest.raises(AssertionError):
            getattr(testing, check)(testing.tiny(str(path)))
