"""Metrics of a classification, with intervals over the examples."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

BINS = 15  # of the calibration error
RESAMPLES = 1000
LEVEL = 0.95
SMALLEST = 1e-12  # a probability below it counts as this in the log loss


def accuracy(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """Return the share of examples whose most likely label is right.

    Args:
        probabilities: (n, C). A tie of two labels is no hit.
        labels: (n,) numbers of the right ones.
    """
    return float(_hits(probabilities, labels).mean())


def _hits(probabilities: np.ndarray, labels: np.ndarray) -> np.ndarray:
    own = probabilities[np.arange(len(labels)), labels]
    return (probabilities >= own[:, None]).sum(1) == 1


def confusion(probabilities: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return how many examples of each label (row) were given each label (column), (C, C)."""
    classes = probabilities.shape[1]
    pairs = labels * classes + probabilities.argmax(1)
    return np.bincount(pairs, minlength=classes**2).reshape(classes, classes)


def macro_f1(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """Return the mean over the labels of 2 TP / (2 TP + FP + FN); 0 for a label without any."""
    counts = confusion(probabilities, labels)
    right = np.diag(counts)
    both = counts.sum(0) + counts.sum(1)
    return float(np.where(both > 0, 2 * right / np.maximum(both, 1), 0.0).mean())


def log_loss(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """Return the mean of -ln p(right label), in nats."""
    own = probabilities[np.arange(len(labels)), labels]
    return float(-np.log(np.maximum(own, SMALLEST)).mean())


def calibration_error(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """Return how far the probability of the given label is from the share of right ones.

    The expected calibration error of Guo et al. 2017 (arXiv 1706.04599, equation 3), with bins of
    equal width.
    """
    confidence = probabilities.max(1)
    right = probabilities.argmax(1) == labels
    number = np.minimum(np.ceil(confidence * BINS).astype(int) - 1, BINS - 1)
    gaps = np.bincount(number, right.astype(float) - confidence, minlength=BINS)
    return float(np.abs(gaps).sum() / len(labels))


METRICS: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
    "accuracy": accuracy,
    "macro_f1": macro_f1,
    "log_loss": log_loss,
    "calibration_error": calibration_error,
}


@dataclass(frozen=True)
class Estimate:
    """A metric, and the 95 % interval that contains it in resampled examples."""

    value: float
    low: float
    high: float


def estimates(
    probabilities: np.ndarray, labels: np.ndarray, block: int = 1, seed: int = 0
) -> dict[str, Estimate]:
    """Return every metric with a percentile interval of the bootstrap over the examples.

    Args:
        probabilities: (n, C).
        labels: (n,).
        block: examples that are drawn together. Neighbors in time are alike; blocks keep that in
            the interval (Kuensch 1989).
    """
    n = len(labels)
    generator = np.random.default_rng(seed)
    size = min(block, n)
    starts = generator.integers(n - size + 1, size=(RESAMPLES, -(-n // size)))
    tail = (1 - LEVEL) / 2
    found = {}
    draws: dict[str, list[float]] = {name: [] for name in METRICS}
    for row in starts:
        chosen = (row[:, None] + np.arange(size)).ravel()[:n]
        for name, metric in METRICS.items():
            draws[name].append(metric(probabilities[chosen], labels[chosen]))
    for name, metric in METRICS.items():
        low, high = np.quantile(draws[name], [tail, 1 - tail])
        found[name] = Estimate(metric(probabilities, labels), float(low), float(high))
    return found


def by_frequency(train: np.ndarray, labels: np.ndarray, classes: int) -> dict[str, float]:
    """Return the metrics of an answer that knows only how frequent each label is in training.

    Args:
        train: (m,) labels of the training examples.
        labels: (n,) those to tell.
    """
    shares = (np.bincount(train, minlength=classes) + 1) / (len(train) + classes)
    always = np.tile(shares, (len(labels), 1))
    return {name: metric(always, labels) for name, metric in METRICS.items()}


def sentence(found: dict[str, Any], frequency: dict[str, float], examples: int) -> str:
    """Return the metrics in words, next to those of the frequencies alone."""

    def of(name: str, form: str = ".3f", more: str = "") -> str:
        value, low, high = (format(found[name][key], form) for key in ("value", "low", "high"))
        return f"{value} ({low} to {high}{more})"

    always = f"; the most frequent label: {frequency['accuracy']:.1%}"
    shares = f"; the labels' frequencies: {frequency['log_loss']:.3f}"
    return (
        f"{examples} held-out examples: accuracy {of('accuracy', '.1%', always)}, "
        f"macro F1 {of('macro_f1')}, log loss {of('log_loss', more=shares)}, "
        f"calibration error {of('calibration_error')}"
    )
