"""What a finished run says of its classification: metrics, confusions and predictions."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pandas as pd
from torch import nn

from ..api import ModelRunner
from ..data.packing import ValidationSet
from ..data.prepare import Prepared
from ..plan import Plan
from ..scoring import Scorer
from . import metrics, predict

PREDICTIONS = "predictions.csv"


@dataclass(frozen=True)
class Report:
    """A classification of the held-out examples.

    record: for run.json: metrics with intervals, those of the labels' frequencies, confusions.
    predictions: one row per example: its label, and the probability of every label.
    """

    record: dict[str, Any]
    predictions: pd.DataFrame

    @property
    def sentence(self) -> str:
        record = self.record
        return metrics.sentence(record["metrics"], record["frequencies"], record["examples"])

    @property
    def summary(self) -> dict[str, float]:
        """The figures that a run's last lines print."""
        return {f"label_{name}": found["value"] for name, found in self.record["metrics"].items()}


def evaluate(
    plan: Plan,
    prepared: Prepared,
    runner: ModelRunner,
    model: nn.Module,
    validation: ValidationSet,
) -> Report:
    """Classify the examples of the validation set, with the model in evaluation mode."""
    assert plan.classify is not None
    names = plan.classify.labels
    prompts: list[np.ndarray] = []
    labels: list[int] = []
    train: list[np.ndarray] = []
    for name in plan.used_datasets:
        examples, numbers = validation.examples[name]
        prompts += [examples.prompt(int(n)) for n in numbers]
        labels += [int(examples.records[n]["label"]) for n in numbers]
        records = prepared.tokens[name].train_records
        assert records is not None
        train.append(np.asarray(records["label"]))
    probabilities = probabilities_of(plan, prepared, runner, model, prompts)
    target = np.array(labels)
    # Neighbors in time are alike; the cube root is the usual size of a block.
    block = round(len(target) ** (1 / 3)) if plan.validation.split == "time" else 1
    found = metrics.estimates(probabilities, target, block)
    record = {
        "labels": names,
        "examples": len(target),
        "metrics": {name: asdict(estimate) for name, estimate in found.items()},
        "frequencies": metrics.by_frequency(np.concatenate(train), target, len(names)),
        "confusion": metrics.confusion(probabilities, target).tolist(),
    }
    table = pd.DataFrame(probabilities, columns=pd.Index([f"p({name})" for name in names]))
    table.insert(0, "label", [names[i] for i in labels])
    return Report(record, table)


def probabilities_of(
    plan: Plan,
    prepared: Prepared,
    runner: ModelRunner,
    model: nn.Module,
    prompts: list[np.ndarray],
) -> np.ndarray:
    """Return the probability of every label for each prompt, (n, C)."""
    assert plan.classify is not None
    ids = [prompt.tolist() for prompt in prompts]
    if plan.classify.label_as == "head":
        return predict.with_head(runner, model, ids)
    tokenizer = prepared.tokenizer
    scorer = Scorer(runner, model, runner.config.max_len, tokenizer.eot, "the model")
    labels = [[*tokenizer.encode(name), tokenizer.eot] for name in plan.classify.labels]
    return predict.with_text(scorer, ids, labels)
