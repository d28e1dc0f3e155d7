"""Evaluations: lm-eval's own model gives the same results, and comparisons are paired."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Command, one_line, write_plan
from test_pretrained import MODELS, save

pytest.importorskip("lm_eval")

from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from lmplay import testing
from lmplay.errors import LmplayError
from lmplay.evaluation import continuations
from lmplay.evaluation.adapter import Model
from lmplay.evaluation.evaluate import (
    BITS,
    TaskResult,
    compare,
    correct_bits,
    evaluate,
    find_tasks,
)
from lmplay.pretrained.source import load_pretrained
from lmplay.training.restore import LoadedModel

PAIRS = [
    ("the quick brown", " fox jumps"),
    ("the quick brown", " dog"),
    ("the quick brown", " lazy dog and the fox"),
    ("the lazy ", "dog"),  # its space belongs to the answer
    ("", "the quick fox"),
    ("naïve fox", " jumps"),
    ("the quick brown " * 40, " fox"),  # longer than the window
]


def requests(kind: str, arguments: list[tuple[Any, ...]]) -> list[Instance]:
    return [
        Instance(request_type=kind, doc={}, arguments=args, idx=i)  # type: ignore[arg-type]
        for i, args in enumerate(arguments)
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("models") / "theirs", "gpt2")


@pytest.fixture(scope="module")
def ours(folder: Path) -> LoadedModel:
    return load_pretrained(f"hf:{folder}")


@pytest.fixture(scope="module")
def theirs(folder: Path, ours: LoadedModel) -> HFLM:
    return HFLM(pretrained=str(folder), device="cpu", batch_size=3, max_length=ours.config.max_len)


def close(own: list[tuple[float, bool]], other: list[tuple[float, bool]]) -> None:
    for (a, x), (b, y) in zip(own, other, strict=True):
        assert a == pytest.approx(b, rel=1e-5, abs=1e-4)
        assert x == y


def test_log_likelihoods_are_those_of_lm_evals_own_model(ours: LoadedModel, theirs: HFLM) -> None:
    expected = theirs.loglikelihood(requests("loglikelihood", PAIRS), disable_tqdm=True)
    for batch_size in (1, 4):
        for shared in (True, False):
            own = Model(ours, batch_size, shared=shared)
            close(own.loglikelihood(requests("loglikelihood", PAIRS), disable_tqdm=True), expected)


def test_rolling_log_likelihoods_are_those_of_lm_evals_own_model(
    ours: LoadedModel, theirs: HFLM
) -> None:
    texts = [("the quick brown fox",), ("the lazy dog jumps over " * 30,), ("a",)]
    kind = "loglikelihood_rolling"
    expected = theirs.loglikelihood_rolling(requests(kind, texts), disable_tqdm=True)
    own = Model(ours).loglikelihood_rolling(requests(kind, texts))
    assert own == pytest.approx(expected, rel=1e-5)


def test_generated_texts_are_those_of_lm_evals_own_model(ours: LoadedModel, theirs: HFLM) -> None:
    options = {"until": ["o"], "max_gen_toks": 12, "do_sample": False}
    arguments = [(text, options) for text in ("the quick", "lazy dog jumps", "over")]
    expected = theirs.generate_until(requests("generate_until", arguments), disable_tqdm=True)
    assert Model(ours).generate_until(requests("generate_until", arguments)) == expected


def test_the_task_gives_lm_evals_own_results(ours: LoadedModel, theirs: HFLM) -> None:
    from lm_eval.evaluator import evaluate as run

    manager, tasks = find_tasks([continuations.NAME], {}, None)
    task = tasks[continuations.NAME]
    own = evaluate(ours, continuations.NAME, task, manager, 8, 4, lambda done, total: None)
    found = run(lm=theirs, task_dict=manager.load([task]), limit=8)
    expected = found["results"][continuations.NAME]
    for metric in ("acc", "acc_norm"):
        assert own.metrics[metric][0] == expected[f"{metric},none"]
        assert own.metrics[metric][1] == pytest.approx(expected[f"{metric}_stderr,none"])
    assert len(own.items[BITS]) == 8


@pytest.mark.parametrize("variant", ["modern", "mamba2", "gqa", "softcap", "sac2_head"])
def test_every_way_to_score_gives_the_same(variant: str, ours: LoadedModel) -> None:
    """Shared contexts, padded batches, and the runner's own loss."""
    subject = testing.tiny(variant, vocab_size=320, max_len=48)
    model = subject.runner.fold(subject.model().eval())
    loaded = LoadedModel(
        variant, subject.experiment, subject.config, subject.runner, model, ours.tokenizer, True
    )
    found = []
    for shared, plain in ((True, None), (False, None), (False, False)):
        own = Model(loaded, 4, shared=shared)
        if plain is False:
            own.scorer.has_plain_head = False
        found.append(own.loglikelihood(requests("loglikelihood", PAIRS), disable_tqdm=True))
    assert Model(loaded).scorer.has_plain_head == (variant not in ("softcap", "sac2_head"))
    close(found[0], found[2])
    close(found[1], found[2])


def test_items_are_held_out_and_have_one_right_answer() -> None:
    items = list(continuations.make_items("en"))
    assert len(items) > 300
    labels = [item["label"] for item in items]
    assert {0, 1, 2, 3} == set(labels)
    assert max(labels.count(i) for i in range(4)) < 0.35 * len(items)
    assert all(len(set(item["choices"])) == 4 for item in items)
    assert items == list(continuations.make_items("en")), "the same everywhere"
    with pytest.raises(LmplayError, match="did you mean"):
        continuations.task("ens")


@pytest.mark.parametrize(
    ("text", "expected"),
    [("short", None), ("a" * 400, None), ("word " * 80, ("word " * 44 + "word", " word" * 20))],
)
def test_a_text_is_cut_between_words(text: str, expected: tuple[str, str] | None) -> None:
    found = continuations.split(text)
    assert (found is None) == (expected is None)
    if found is not None:
        assert text.startswith("".join(found))
        assert not found[0].endswith(" ")
        assert found[1].startswith(" ")


def test_bits_per_byte_are_those_of_the_right_answer() -> None:
    sample = {
        "target": 1,
        "arguments": [("context", " a"), ("context", " bcd")],
        "resps": [[(-1.0, False)], [(-2.0, False)]],
    }
    assert correct_bits(sample) == pytest.approx(2 / math.log(2) / 4)
    assert correct_bits({**sample, "target": "text"}) is None


def result(name: str, values: list[float], metric: str = "acc") -> TaskResult:
    return TaskResult(name, "task", "", {}, {metric: values})


def test_models_are_compared_item_by_item() -> None:
    a = [1.0] * 30 + [0.0] * 10
    b = [1.0] * 20 + [0.0] * 20
    (found,) = compare(result("a", a), result("b", b))
    assert found.mean == pytest.approx(0.25)
    assert found.p == pytest.approx(2 * 0.5**10), "ten items differ, all in one direction"
    assert found.low > 0
    (same,) = compare(result("a", a), result("b", a))
    assert (same.mean, same.p) == (0, 1)
    x = [1.0, 1.2, 1.1, 1.4]
    y = [0.9, 1.0, 0.95, 1.1]
    from scipy.stats import ttest_rel

    (bits,) = compare(result("a", x, BITS), result("b", y, BITS))
    assert bits.p == pytest.approx(ttest_rel(x, y).pvalue)
    with pytest.raises(LmplayError, match="other items"):
        compare(result("a", a), result("b", b[1:]))


HELLASWAG = [
    {
        "ind": i,
        "activity_label": "Cooking",
        "ctx_a": "A man stirs a pot.",
        "ctx_b": "he",
        "endings": ["adds salt.", "flies away.", "is a table.", "reads the moon."],
        "label": str(i % 4),
        "source_id": f"{i}",
        "split": "val",
        "ctx": "",
    }
    for i in range(6)
]


def test_a_local_copy_of_a_task_is_evaluated_and_compared(command: Command, tmp_path: Path) -> None:
    for name in ("a", "b"):
        save(tmp_path / name, "gpt2" if name == "a" else "llama1")
    (tmp_path / "items.json").write_text(json.dumps(HELLASWAG))
    local = ("--tasks", "hellaswag", "--data", "hellaswag=items.json")
    done = command("lmp_evaluate", "--model", "hf:a", "hf:b", *local)
    assert done.returncode == 0, done.stderr
    assert "hellaswag, 6 items" in done.stdout
    assert "  hf:b less hf:a, paired by item:" in done.stdout
    assert "bits_per_byte" in done.stdout
    assert (tmp_path / "gpt_out" / "evaluations" / "hellaswag.png").stat().st_size > 5000


def test_a_result_is_kept(command: Command, tmp_path: Path) -> None:
    save(tmp_path / "a", "gpt2")
    run = ("lmp_evaluate", "--model", "hf:a", "--limit", "3")
    done = command(*run)
    assert done.returncode == 0, done.stderr
    kept = tmp_path / "gpt_out" / "evaluations" / "a" / "continuations.json"
    before = kept.stat().st_mtime_ns
    again = command(*run)
    assert kept.stat().st_mtime_ns == before, "not computed again"
    assert again.stdout == done.stdout[done.stdout.index("continuations, 3 items") :]
    kept.write_text(kept.read_text()[:50])
    command(*run)
    assert json.loads(kept.read_text())["task"] == "continuations", "damaged, so computed again"


def test_a_run_that_was_trained_on_items_is_named(command: Command, tmp_path: Path) -> None:
    plan = write_plan(
        tmp_path,
        model={"num_blocks": 1, "embed_dim": 16, "num_heads": 2, "max_len": 256, "dropout": 0.0},
        datasets={"words": {"source": "bundled", "language": "es"}},
        validation={"fraction": 0.01, "tokens": 512, "every_tokens": 4096},
        steps=[{"step_name": "words", "datasets": ["words"], "steps": 1}],
    )
    done = command("lmp_trainer", "--exp", "gpt2ish", "--training-plan", str(plan))
    assert done.returncode == 0, done.stderr
    run = "gpt_out/tiny/gpt2ish-s0"
    task = ("--tasks", "continuations_es", "--limit", "3")
    done = command("lmp_evaluate", "--model", run, *task)
    assert done.returncode == 0, done.stderr
    assert "it was trained on some of continuations" in done.stdout
    assert "continuations_es, 3 items" in done.stdout


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (("--tasks", "hellaswagg"), "did you mean hellaswag"),
        (("--tasks", "hellaswag", "--data", "hellaswag"), "TASK=FILE is wanted"),
        (("--tasks", "hellaswag", "--data", "hellaswag=nowhere"), "there is no such file"),
        (("--data", "arc=x.json"), "--tasks does not have it"),
    ],
)
def test_what_a_user_can_mend_is_one_line(
    args: tuple[str, ...], says: str, command: Command, tmp_path: Path
) -> None:
    save(tmp_path / "theirs", "gpt2")
    one_line(command("lmp_evaluate", "--model", "hf:theirs", *args), says)


def test_an_answer_that_does_not_fit_is_one_line(command: Command, tmp_path: Path) -> None:
    folder = save(tmp_path / "theirs", "llama1")
    assert MODELS["llama1"][1]["max_position_embeddings"] == 64
    done = command("lmp_evaluate", "--model", f"hf:{folder}", "--limit", "2")
    one_line(done, "does not fit into the 64 positions")
    assert torch.is_grad_enabled()
