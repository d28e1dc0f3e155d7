"""Synthetic probes: what counts can be told from the context, and nothing else."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import Command, one_line

from lmplay.data.packing import ValidationSet
from lmplay.data.prepare import prepare
from lmplay.data.probes import ProbeSource
from lmplay.data.stages import stages
from lmplay.ops import IGNORE
from lmplay.plan import find_plan, load_plan


def quiet(*_: object) -> None:
    pass


@pytest.mark.parametrize("task", ["recall", "copy"])
def test_the_context_tells_every_target(task: str) -> None:
    """By brute force: after the same token earlier in the sequence came the target, whenever."""
    plan = load_plan(find_plan(f"probe_{task}"))
    prepared = prepare(plan, quiet)
    length = plan.model.max_len
    assert length is not None
    batches = [stages(plan, prepared, length)[0].batch(i, 16) for i in range(4)]
    batches += list(ValidationSet(plan, prepared, length).batches(64))[:2]
    seen = set()
    for batch in batches:
        for ids, targets in zip(batch.ids, batch.targets, strict=True):
            seen.add(ids.tobytes())
            counted = np.flatnonzero(targets != IGNORE)
            assert len(counted) >= length // 4
            for t in counted:
                before = [ids[i + 1] for i in range(t) if ids[i] == ids[t]]
                if task == "recall":  # keys come at even places; a value may equal a key
                    before = [ids[i + 1] for i in range(0, t, 2) if ids[i] == ids[t]]
                assert before, "what is asked for was shown"
                assert set(before) == {targets[t]}
    assert len(seen) == 4 * 16 + 2 * 64, "no sequence comes twice"


def test_in_a_long_sequence_the_answer_is_far_back() -> None:
    probe = ProbeSource(task="recall")
    ids, counted = probe.generate(np.random.default_rng(0), 8, 512)
    assert ids.shape == counted.shape == (8, 512)
    dense, asked = probe.generate(np.random.default_rng(0), 8, 104)
    letters = ids[ids != ord(".")].reshape(8, 104)
    assert np.array_equal(letters, dense)
    assert (ids[:, 26 : 26 + 408] == ord(".")).all()
    assert np.array_equal(counted[:, 26 + 408 :], asked[:, 26:])
    assert not counted[:, : 26 + 408].any()


def test_a_longer_plan_reads_more_of_the_same_probe() -> None:
    plan = load_plan(find_plan("probe_copy"))
    short, long = (
        prepare(plan.with_budget(n, None, None), quiet).tokens["copy"] for n in (65536, 131072)
    )
    assert len(long.train) == pytest.approx(2 * len(short.train), rel=0.01)
    assert np.array_equal(long.train[: len(short.train) - 1], short.train[:-1])
    assert np.array_equal(long.val, short.val)
    assert not np.array_equal(long.val[: 2**12], long.train[: 2**12])
    one, other = (
        ProbeSource(task="copy", seed=s).generate(np.random.default_rng(s), 8, 64)[0]
        for s in (0, 1)
    )
    assert not np.array_equal(one, other)


def test_a_probe_says_whether_it_is_solved(command: Command, tmp_path: Path) -> None:
    plan = json.loads(find_plan("probe_recall").read_text())
    plan["steps"][0]["tokens"] = 4096
    plan["validation"]["tokens"] = 2048
    (tmp_path / "p.json").write_text(json.dumps(plan))
    done = command("lmp_trainer", "--exp", "modern", "--training-plan", "p.json")
    assert done.returncode == 0, done.stderr
    assert "not solved:" in done.stdout + done.stderr
    assert "solved: False" in done.stdout
    plan["validation"]["solved"] = 1e-9
    plan["seed"] = 1
    (tmp_path / "easy.json").write_text(json.dumps(plan))
    done = command("lmp_trainer", "--exp", "modern", "--training-plan", "easy.json")
    assert "solved: True" in done.stdout


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"tokenizer": {"kind": "chars"}}, "it needs the tokenizer bytes"),
        ({"model": {"num_blocks": 1, "embed_dim": 8, "max_len": 30}}, "a multiple of 8"),
        ({"steps": [{"datasets": ["recall"], "epochs": 1}]}, "a probe has no end"),
    ],
)
def test_what_a_probe_cannot_be_is_one_line(
    change: dict[str, object], says: str, command: Command, tmp_path: Path
) -> None:
    plan = {**json.loads(find_plan("probe_recall").read_text()), **change}
    (tmp_path / "p.json").write_text(json.dumps(plan))
    one_line(command("lmp_trainer", "--training-plan", "p.json"), says)
