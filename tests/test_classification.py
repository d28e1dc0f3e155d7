"""Labeled examples: heads and texts, splits by time, streams, adapters, and what is reported."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import Command, assert_equal_to_the_bit, one_line, stopped_at
from pytorch_optimizer import SWATS
from sklearn import metrics as reference
from starlette.testclient import TestClient

from lmplay import discover, python, testing
from lmplay.adapt import Adaptation, Adapted, without_effect
from lmplay.api import IGNORE, Batch
from lmplay.classification import metrics, predict
from lmplay.classification.report import PREDICTIONS
from lmplay.data.examples import Example, Examples, seconds_of
from lmplay.data.prepare import prepare
from lmplay.data.stages import stages
from lmplay.data.windows import Windows
from lmplay.errors import LmplayError
from lmplay.files import read_json
from lmplay.model import build_model, parameter_counts
from lmplay.plan import Plan, load_plan
from lmplay.serving.engine import Engine, Request
from lmplay.serving.http import make_app
from lmplay.training.stream import backward_transfer, progressive, record_of
from lmplay.training.swats import Swats

SOURCES = discover.list_sources()
IDEAS = [next(iter(s.variants)) for s in SOURCES]
NO_LINEAR_HEAD = {"tied"}
NO_PLAIN_LAYERS = {"uw1", "sac1", "modern_uw"}


def write_examples(folder: Path, count: int = 120, days: bool = True) -> None:
    """Moods that one word tells, an hour apart; from the middle on other words tell them."""
    rows = []
    for i in range(count):
        mood = ("bad", "good", "so-so")[i * 7 % 3]
        word = {"bad": "rain", "good": "sun", "so-so": "fog"}[mood]
        text = f"number {i} " + " ".join(["and"] * (i % 5)) + f" {word if i < count / 2 else mood}"
        rows.append({"text": text, "mood": mood, "date": f"2024-03-{1 + i // 24:02d} {i % 24}:00"})
    (folder / "moods.jsonl").write_text("\n".join(map(json.dumps, rows)))


def write_plan(folder: Path, **changes: Any) -> Path:
    write_examples(folder)
    columns = {"prompt": "text", "label": "mood", "time": "date"}
    plan: dict[str, Any] = {
        "tokenizer": {"kind": "bytes"},
        "model": {"num_blocks": 1, "embed_dim": 16, "num_heads": 2, "max_len": 32, "dropout": 0.1},
        "datasets": {"moods": {"source": "files", "path": "moods.jsonl", "columns": columns}},
        "classify": {"labels": ["bad", "so-so", "good"]},
        "optimizer": {"name": "adamw", "lr": 3e-3},
        "batch": {"batch_size": 8},
        "validation": {"fraction": 0.2, "tokens": 4096, "every_tokens": 2048},
        "steps": [{"step_name": "moods", "datasets": ["moods"], "steps": 12}],
    }
    plan.update(changes)
    path = folder / "moods.json"
    path.write_text(json.dumps(plan))
    return path


STREAM = [{"step_name": "moods", "datasets": ["moods"], "stream": {"window": "1d"}}]


def prepared(path: Path) -> tuple[Plan, Any]:
    plan = load_plan(path)
    return plan, prepare(plan, lambda what, count: None)


# ---------------------------------------------------------------- metrics


def test_metrics_are_those_of_scikit_learn() -> None:
    random = np.random.default_rng(0)
    probabilities = random.dirichlet(np.ones(4), size=300)
    labels = random.integers(4, size=300)
    guesses = probabilities.argmax(1)
    known = {
        "accuracy": reference.accuracy_score(labels, guesses),
        "macro_f1": reference.f1_score(labels, guesses, average="macro"),
        "log_loss": reference.log_loss(labels, probabilities),
    }
    for name, value in known.items():
        assert metrics.METRICS[name](probabilities, labels) == pytest.approx(value)
    theirs = reference.confusion_matrix(labels, guesses)
    assert (metrics.confusion(probabilities, labels) == theirs).all()


def test_calibration_error_by_hand() -> None:
    """Two of three are right at 60 %, and one of one at 90 %."""
    probabilities = np.array([[0.6, 0.4], [0.6, 0.4], [0.4, 0.6], [0.9, 0.1]])
    labels = np.array([0, 1, 1, 0])
    expected = 3 / 4 * abs(2 / 3 - 0.6) + 1 / 4 * abs(1 - 0.9)
    assert metrics.calibration_error(probabilities, labels) == pytest.approx(expected)


def test_a_tie_is_no_hit() -> None:
    assert metrics.accuracy(np.full((3, 2), 0.5), np.array([0, 1, 0])) == 0


@pytest.mark.parametrize("block", [1, 10])
def test_intervals_are_as_wide_as_repetitions(block: int) -> None:
    """Of independent examples, drawn alone; of runs of ten equal ones, drawn in blocks."""
    random = np.random.default_rng(1)

    def draw() -> tuple[np.ndarray, np.ndarray]:
        p = np.repeat(random.dirichlet(np.ones(3), size=600 // block), block, axis=0)
        return p, np.repeat(random.integers(3, size=600 // block), block)

    spread = np.std([metrics.accuracy(*draw()) for _ in range(200)])
    found = [metrics.estimates(*draw(), block=block)["accuracy"] for _ in range(5)]
    width = np.mean([e.high - e.low for e in found]) / 3.92
    assert width == pytest.approx(spread, rel=0.25)
    assert all(e.low <= e.value <= e.high for e in found)


# ---------------------------------------------------------------- data


def test_an_example_is_a_sequence_and_its_padding_counts_nothing(tmp_path: Path) -> None:
    plan, data = prepared(write_plan(tmp_path))
    tokens = data.tokens["moods"]
    examples = Examples(tokens, "train", 32, as_text=False)
    rows = [json.loads(line) for line in (tmp_path / "moods.jsonl").read_text().splitlines()]
    texts = {f"{row['text']}\n\n": row["mood"] for row in rows}
    for number in range(len(examples)):
        ids, targets = examples.sequence(number)
        (place,) = np.flatnonzero(targets != IGNORE)
        prompt = bytes(ids[: place + 1].tolist()).decode()
        (complete,) = [text for text in texts if text.endswith(prompt)]
        assert len(prompt) == min(32, len(complete)), "a long prompt loses its beginning"
        assert plan.classify is not None
        assert plan.classify.labels[targets[place]] == texts[complete]
        assert not ids[place + 1 :].any()


def test_the_label_as_text_is_what_is_predicted(tmp_path: Path) -> None:
    plan, data = prepared(
        write_plan(tmp_path, classify={"labels": ["bad", "so-so", "good"], "label_as": "text"})
    )
    examples = Examples(data.tokens["moods"], "val", 32, as_text=True)
    for number in range(len(examples)):
        ids, targets = examples.sequence(number)
        places = np.flatnonzero(targets != IGNORE)
        assert (np.diff(places) == 1).all()
        label = bytes(targets[places[:-1]].tolist()).decode()
        assert plan.classify is not None
        assert plan.classify.labels[examples.records[number]["label"]] == label
        assert targets[places[-1]] == data.tokenizer.eot
        assert (ids[places[1:]] == targets[places[:-1]]).all()


def test_what_was_known_only_after_the_split_is_not_trained_on() -> None:
    from lmplay.data.examples import _split_of

    def of(time: float, known: float | None = None) -> str | None:
        return _split_of(Example("a", "b", time, known), 100.0, 0.5)

    assert [of(99), of(100), of(90, 99), of(90, 100), of(101, 200)] == [
        "train",
        "val",
        "train",
        None,
        "val",
    ]


def test_split_by_time_holds_out_the_end(tmp_path: Path) -> None:
    validation = {"fraction": 0.25, "tokens": 4096, "every_tokens": 2048, "split": "time"}
    _, data = prepared(write_plan(tmp_path, validation=validation))
    tokens = data.tokens["moods"]
    assert len(tokens.val_records) == 30
    assert tokens.train_records["time"].max() < tokens.val_records["time"].min()


@pytest.mark.parametrize(
    ("value", "seconds"),
    [(12, 12.0), (1.5, 1.5), ("1970-01-02", 86400.0), ("1970-01-01T01:00:00+01:00", 0.0)],
)
def test_times(value: object, seconds: float) -> None:
    assert seconds_of(value) == seconds


@pytest.mark.parametrize("value", ["soon", None, True, math.nan, [1]])
def test_what_is_no_time_is_said(value: object) -> None:
    with pytest.raises(LmplayError, match="is no time"):
        seconds_of(value)


# ---------------------------------------------------------------- streams


def test_windows_are_read_in_order_and_labels_of_the_future_are_not(tmp_path: Path) -> None:
    plan, data = prepared(
        write_plan(
            tmp_path,
            steps=STREAM,
            batch={"batch_size": 8, "replay": 0.25},
        )
    )
    (windows,) = stages(plan, data, 32)
    assert isinstance(windows, Windows)
    times = windows.train.records["time"]
    assert len(windows.windows) == 5
    seen: set[int] = set()
    for number, window in enumerate(windows.windows):
        assert window.replayed == (2 if number else 0)
        last = window.first_step + window.steps
        for index in range(window.first_step, last):
            assert windows.at(index) is window
            ids = windows.batch(index, 8).ids
            assert len(ids) == 8
            both = [windows.batch(index, 8, rank, 2).ids for rank in range(2)]
            assert (np.concatenate(both) == ids).all()
        inside = times[window.examples]
        assert inside.min() >= window.start
        assert inside.max() < window.start + 86400
        seen |= set(window.examples.tolist())
    assert seen == set(range(len(times)))
    assert windows.steps() == last


def test_an_example_whose_label_comes_later_is_tested_and_not_trained_on(tmp_path: Path) -> None:
    plan, data = prepared(write_plan(tmp_path, steps=STREAM))
    tokens = data.tokens["moods"]
    later = np.array(tokens.train_records)
    later["known"] += 6 * 3600
    (windows,) = stages(plan, data, 32)
    assert isinstance(windows, Windows)
    windows.train.records = later
    again = Windows(plan, plan.steps[0], 0, windows.train, windows.held_out)
    for window in again.windows:
        hours = (later["time"][window.known] - window.start) / 3600
        assert hours.max() < 18
        assert len(window.examples) > len(window.known)


def test_progressive_loss_and_backward_transfer_by_hand() -> None:
    rows = pd.DataFrame(
        # window, trained, held_out, examples, loss
        [
            (0, 0, 0, 10, 9.0),
            (0, 1, 1, 2, 1.0),
            (1, 1, 0, 10, 2.0),
            (1, 2, 1, 2, 0.5),
            (2, 2, 0, 30, 1.0),
            (2, 3, 1, 2, 0.7),
            (0, 3, 1, 2, 1.3),
            (1, 3, 1, 2, 0.4),
        ],
        columns=["window", "trained", "held_out", "examples", "loss"],
    ).assign(accuracy=0.5)
    loss, correct, count = progressive(rows)
    assert (loss, correct, count) == (50.0, 20.0, 40), "without the first window"
    assert backward_transfer(rows) == pytest.approx(((1.3 - 1.0) + (0.4 - 0.5)) / 2)
    without = rows[rows["held_out"] == 0]
    assert record_of(without) == {"windows": 3}, "JSON has no NaN"


def test_the_schedule_begins_again_in_each_window(command: Command, tmp_path: Path) -> None:
    plan = write_plan(tmp_path, steps=STREAM)
    schedule = ("--set", "schedule.name=cosine", "--set", "schedule.per=window")
    done = command("lmp_trainer", "--exp", "gpt2ish", "--training-plan", str(plan), *schedule)
    assert done.returncode == 0, done.stderr
    run = next((tmp_path / "gpt_out" / "moods").iterdir())
    lr = pd.read_csv(run / "train.csv")["lr"]
    assert (lr.diff() > 0).sum() == 4, "it rises at the beginning of the other four windows"


# ---------------------------------------------------------------- training


@pytest.mark.parametrize("label_as", ["head", "text"])
def test_it_learns_resumes_and_reports(
    label_as: str, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    labels = ["bad", "so-so", "good"]
    steps = [{"step_name": "moods", "datasets": ["moods"], "steps": 60}]
    plan = write_plan(tmp_path, classify={"labels": labels, "label_as": label_as}, steps=steps)
    train = ("lmp_trainer", "--exp", "llama", "--training-plan", str(plan))
    with stopped_at(7, monkeypatch):
        assert command(*train, "--mini-batch-size", "8").returncode == 130
    done = command(*train, "--mini-batch-size", "8")
    assert done.returncode == 0, done.stderr
    assert "label_macro_f1: " in done.stdout
    assert "held-out examples: accuracy" in done.stdout
    other = command(*train, "--mini-batch-size", "8", "--out", "other")
    assert other.returncode == 0, other.stderr
    one, two = (tmp_path / out / "moods" / "llama-s0" for out in ("gpt_out", "other"))
    assert_equal_to_the_bit(one, two)
    assert (one / PREDICTIONS).read_bytes() == (two / PREDICTIONS).read_bytes()
    record = read_json(one / "run.json")
    found = record["classification"]
    predictions = pd.read_csv(one / PREDICTIONS)
    probabilities = predictions[[f"p({name})" for name in labels]].to_numpy()
    assert np.allclose(probabilities.sum(1), 1)
    numbers = np.array([labels.index(name) for name in predictions["label"]])
    for name, metric in metrics.METRICS.items():
        assert metric(probabilities, numbers) == pytest.approx(found["metrics"][name]["value"])
        assert record["summary"][f"label_{name}"] == found["metrics"][name]["value"]
    if label_as == "head":
        assert record["summary"]["val_loss"] == pytest.approx(record["summary"]["label_log_loss"])
        assert "val_bpb" not in done.stdout
        assert found["metrics"]["log_loss"]["value"] < found["frequencies"]["log_loss"]
    drawn = command("lmp_plotstats", "gpt_out", "--out", "plots")
    assert drawn.returncode == 0, drawn.stderr
    assert (tmp_path / "plots" / "confusion.png").stat().st_size > 5000


def test_a_stream_resumes_and_reports(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = write_plan(tmp_path, steps=STREAM)
    train = ("lmp_trainer", "--exp", "gpt2ish", "--training-plan", str(plan))
    with stopped_at(7, monkeypatch):
        assert command(*train, "--mini-batch-size", "8").returncode == 130
    done = command(*train, "--mini-batch-size", "8")
    assert done.returncode == 0, done.stderr
    assert "4 windows tested before training on them" in done.stdout
    assert "backward_transfer: " in done.stdout
    assert command(*train, "--mini-batch-size", "8", "--out", "other").returncode == 0
    one, two = (tmp_path / out / "moods" / "gpt2ish-s0" for out in ("gpt_out", "other"))
    assert_equal_to_the_bit(one, two)
    assert (one / "windows.csv").read_bytes() == (two / "windows.csv").read_bytes()
    rows = pd.read_csv(one / "windows.csv")
    assert len(rows) == 5 + 5 + 4, "each tested, held out after training, and at the end"
    loss, _, count = progressive(rows)
    assert read_json(one / "run.json")["summary"]["val_loss"] == pytest.approx(loss / count)
    drawn = command("lmp_plotstats", "gpt_out", "--out", "plots")
    assert drawn.returncode == 0, drawn.stderr
    assert (tmp_path / "plots" / "windows.png").stat().st_size > 5000


def test_a_trial_judges_labels(command: Command, tmp_path: Path) -> None:
    plan = write_plan(tmp_path)
    arm = ("--exp", "gpt2ish", "--arm", "gpt2ish optimizer.lr=0.01", "--max-seeds", "2")
    done = command("lmp_trial", *arm, "--training-plan", str(plan), "--lr", "fixed")
    assert done.returncode == 0, done.stderr
    assert "UNDECIDED" in done.stdout
    assert "bits per byte" not in done.stdout


# ---------------------------------------------------------------- models


def tiny(variant: str, adaptation: Adaptation) -> testing.Subject:
    subject = testing.tiny(variant)
    experiment = discover.Experiment(
        subject.experiment.source, variant, subject.experiment.module, adaptation
    )
    return testing.Subject(experiment, subject.config, "cpu")


@pytest.mark.parametrize("variant", [v for v in IDEAS if v not in NO_LINEAR_HEAD])
def test_a_head_for_labels_sees_no_padding_and_learns(variant: str) -> None:
    """The loss is that of the last real tokens' logits, decoded without padding, folded or not."""
    s = tiny(variant, Adaptation(("a", "b", "c")))
    model = build_model(s.runner, 0).eval()
    length = s.config.max_len
    ends = (length // 3, length // 2, length)
    ids = torch.randint(s.config.vocab_size, (3, length))
    targets = torch.full((3, length), IGNORE)
    for row, end in enumerate(ends):
        targets[row, end - 1] = row
    out = s.runner.step(model, Batch(ids, targets))
    prompts = [ids[row, :end].tolist() for row, end in enumerate(ends)]
    expected = metrics.log_loss(predict.with_head(s.runner, model, prompts), np.arange(3))
    assert float(out.loss_sum.detach() / out.n_tokens) == pytest.approx(expected, abs=1e-4)
    other = ids.clone()
    for row, end in enumerate(ends):
        other[row, end:] = 0
    padded = s.runner.step(model, Batch(other, targets))
    assert float(padded.loss_sum.detach()) == pytest.approx(float(out.loss_sum.detach()), abs=1e-4)
    out.loss_sum.backward()
    assert model.get_parameter("head.weight").grad is not None
    folded = s.runner.fold(model)
    again = predict.with_head(s.runner, folded.eval(), prompts)
    assert metrics.log_loss(again, np.arange(3)) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("variant", [v for v in IDEAS if v not in NO_PLAIN_LAYERS])
def test_adapters_change_nothing_at_first_and_merge(variant: str) -> None:
    s = tiny(variant, Adaptation((), 2))
    plain = testing.tiny(variant)
    model = build_model(s.runner, 0).eval()
    ids = torch.randint(s.config.vocab_size, (2, s.config.max_len))
    with torch.no_grad():
        before = s.runner.logits(model, ids)[0]
        torch.testing.assert_close(
            before, plain.runner.logits(build_model(plain.runner, 0).eval(), ids)[0]
        )
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained
    assert all(name.endswith((".lora_a", ".lora_b")) for name in trained)
    idle = without_effect(model)
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, Adapted) and name not in idle:
                module.lora_b.normal_(std=0.1)
    model = model.double()
    with torch.no_grad():
        folded = s.runner.fold(model).eval()
        torch.testing.assert_close(
            s.runner.logits(model, ids)[0], s.runner.logits(folded, ids)[0], rtol=0, atol=1e-9
        )
    assert not any(isinstance(m, Adapted) for m in folded.modules())
    assert parameter_counts(s.runner, model)[0] > sum(p.numel() for p in folded.parameters())


def test_an_adapted_layer_by_hand() -> None:
    s = tiny("llama", Adaptation((), 3))
    model = build_model(s.runner, 0)
    layer = next(m for m in model.modules() if isinstance(m, Adapted))
    torch.nn.init.normal_(layer.lora_b)
    x = torch.randn(4, layer.in_features)
    expected = x @ layer.weight.T + 2 * (x @ layer.lora_a.T) @ layer.lora_b.T
    torch.testing.assert_close(layer(x), expected)


def test_adapters_train_resume_and_start_from_a_run(command: Command, tmp_path: Path) -> None:
    plan = write_plan(tmp_path)
    train = ("lmp_trainer", "--exp", "llama", "--training-plan", str(plan))
    assert command(*train).returncode == 0
    done = command(*train, "--lora", "2", "--initial-model", "gpt_out/moods/llama-s0")
    assert done.returncode == 0, done.stderr
    assert "11 of 11 tensors" in done.stdout or "tensors" in done.stdout
    run = next((tmp_path / "gpt_out" / "moods").glob("llama-model.lora=2*"))
    assert read_json(run / "run.json")["plan"]["model"]["lora"] == 2


def test_swats_is_the_maintained_one_where_there_is_one_parameter() -> None:
    """Theirs compares each parameter's rate, as the paper does that of all."""
    torch.manual_seed(0)
    start = torch.randn(6, dtype=torch.float64)
    scales = torch.tensor([1.0, 2.0, 3.0, 1.5, 0.5, 1.0], dtype=torch.float64)
    found = []
    for make in (
        lambda p: Swats([p], lr=0.05, betas=(0.9, 0.99), eps=1e-8, tolerance=1e-5),
        lambda p: SWATS([p], lr=0.05, betas=(0.9, 0.99), eps=1e-8),
    ):
        p = torch.nn.Parameter(start.clone())
        optimizer = make(p)
        path = []
        for _ in range(8):
            optimizer.zero_grad()
            (scales * p**2).sum().backward()
            optimizer.step()
            path.append(p.detach().clone())
        found.append((path, optimizer))
    (ours, own), (theirs, _) = found
    state = next(iter(own.state.values()))
    assert float(state["rate"]) == 0, "still Adam"
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_swats_becomes_sgd_with_the_rate_that_it_found() -> None:
    p = torch.nn.Parameter(torch.randn(6))
    optimizer = Swats([p], lr=0.05, tolerance=10.0)  # the second step's rate is near enough
    momentum = torch.zeros(6)
    for k in range(5):
        optimizer.zero_grad()
        (p**2).sum().backward()
        assert p.grad is not None
        before, gradient = p.detach().clone(), p.grad.clone()
        optimizer.step()
        rate = float(optimizer.state[p]["rate"])
        if k < 1:
            assert rate == 0
        elif k > 1:
            momentum = 0.9 * momentum + gradient
            torch.testing.assert_close(p.detach(), before - 0.1 * rate * momentum)


# ---------------------------------------------------------------- errors that a user can fix


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"classify": {"labels": ["bad", "fine", "good"]}}, "its label 'so-so' is not one of"),
        ({"classify": {"labels": ["bad"]}}, "at least 2"),
        ({"classify": {"labels": ["bad", "bad"]}}, "labels must be different"),
        ({"classify": None, "steps": STREAM}, "a stream needs labeled examples"),
        ({"batch": {"batch_size": 8, "replay": 0.5}}, "batch.replay is for a stream"),
        (
            {"steps": [{**STREAM[0], "stream": {"window": "5 minutes"}}]},
            "a number and a unit are wanted",
        ),
        ({"steps": [{**STREAM[0], "epochs": 2}]}, "a stream ends with its data"),
        (
            {"steps": [{**STREAM[0], "stream": {"window": "365d"}}]},
            "a stream needs two or more",
        ),
        ({"datasets": {"moods": {"source": "bundled"}}}, "has no labels, which classify needs"),
    ],
)
def test_what_does_not_fit_is_one_line(
    changes: dict[str, Any], says: str, command: Command, tmp_path: Path
) -> None:
    plan = write_plan(tmp_path, **changes)
    one_line(command("lmp_trainer", "--exp", "gpt2ish", "--training-plan", str(plan)), says)


def test_a_stream_that_is_not_sorted_is_one_line(command: Command, tmp_path: Path) -> None:
    plan = write_plan(tmp_path, steps=STREAM)
    lines = (tmp_path / "moods.jsonl").read_text().splitlines()
    (tmp_path / "moods.jsonl").write_text("\n".join([lines[5], *lines[:5], *lines[6:]]))
    done = command("lmp_trainer", "--exp", "gpt2ish", "--training-plan", str(plan))
    one_line(done, "example 2 is 18000 s earlier", "sort the data by time")


def test_a_classifier_writes_no_text(command: Command, tmp_path: Path) -> None:
    plan = write_plan(tmp_path)
    assert command("lmp_trainer", "--exp", "gpt2ish", "--training-plan", str(plan)).returncode == 0
    run = "gpt_out/moods/gpt2ish-s0"
    done = command("lmp_generator", "number 7", "--model", run)
    one_line(done, "tells labels (bad, so-so, good)")
    one_line(command("lmp_cleanmodel", run, "--format", "hf"), "tells labels")
    one_line(command("lmp_evaluate", "--model", run), "tells labels")


def test_a_server_answers_with_labels(command: Command, tmp_path: Path) -> None:
    """Their probabilities are those of the run's own report; a prompt that is too long is an
    error."""
    plan = write_plan(tmp_path)
    assert command("lmp_trainer", "--exp", "llama", "--training-plan", str(plan)).returncode == 0
    run = tmp_path / "gpt_out" / "moods" / "llama-s0"
    rows = [json.loads(line) for line in (tmp_path / "moods.jsonl").read_text().splitlines()]
    plan_read, data = prepared(plan)
    examples = Examples(data.tokens["moods"], "val", 32, as_text=False)
    predictions = pd.read_csv(run / PREDICTIONS)
    engine = Engine(python.load(run), slots=2)
    compared = 0
    for number in range(len(examples)):
        prompt = data.tokenizer.decode(examples.prompt(number).tolist())
        (row,) = [row for row in rows if f"{row['text']}\n\n".endswith(prompt)]
        if len(row["text"]) > 30:
            continue
        answer = engine.add(Request(row["text"]))
        assert engine.step() == []
        assert plan_read.classify is not None
        expected = [predictions[f"p({name})"][number] for name in plan_read.classify.labels]
        assert list(answer.probabilities.values()) == pytest.approx(expected, abs=1e-6)
        assert answer.text == plan_read.classify.labels[int(np.argmax(expected))]
        assert answer.reason == "label"
        compared += 1
    assert compared > 3
    with pytest.raises(LmplayError, match="prompt: it has 52 tokens, and 32 are the limit"):
        engine.add(Request("x" * 50))
    with TestClient(make_app(engine, "moods")) as client:
        done = client.post("/v1/completions", json={"prompt": rows[0]["text"]}).json()
    (choice,) = done["choices"]
    assert choice["finish_reason"] == "label"
    assert sum(choice["probabilities"].values()) == pytest.approx(1)


def test_a_trial_judges_streams_and_changes_their_length_for_no_arm(
    command: Command, tmp_path: Path
) -> None:
    plan = write_plan(tmp_path, steps=STREAM)
    arms = ("--exp", "gpt2ish", "--arm", "gpt2ish batch.replay=0.5", "--max-seeds", "2")
    done = command("lmp_trial", *arms, "--training-plan", str(plan), "--lr", "fixed")
    assert done.returncode == 0, done.stderr
    assert "UNDECIDED" in done.stdout
    runs = sorted((tmp_path / "gpt_out").glob("trial-moods-*/moods/*"))
    runs = runs or sorted(p.parent for p in (tmp_path / "gpt_out").glob("trial-*/**/windows.csv"))
    assert len(runs) == 4
    for run in runs:
        loss, _, count = progressive(pd.read_csv(run / "windows.csv"))
        assert read_json(run / "run.json")["summary"]["val_loss"] == pytest.approx(loss / count)
    done = command("lmp_trial", *arms, "--training-plan", str(plan), "--budget", "flops")
    one_line(done, "a stream ends with its data")


def test_sizes_are_those_with_the_head_for_labels(command: Command, tmp_path: Path) -> None:
    plan = write_plan(tmp_path)
    described = command(
        "lmp_trainer", "--exp", "value_norm", "--training-plan", str(plan), "--describe"
    )
    assert described.returncode == 0, described.stderr
    done = command("lmp_trainer", "--exp", "value_norm", "--training-plan", str(plan))
    assert done.returncode == 0, done.stderr
    (line,) = [x for x in done.stdout.splitlines() if x.startswith("parameters: ")]
    assert f"{line} " in described.stdout
    control = ("--match", "flops", "--mini-batch-size", "8")
    done = command("lmp_trainer", "--exp", "value_norm", "--training-plan", str(plan), *control)
    assert done.returncode == 0, done.stderr
