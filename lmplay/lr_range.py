"""The learning rate range test: raise the rate a little with every step, and see where the loss falls and where it
blows up (Smith 2017, arXiv 1506.01186, section 3.3)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from .errors import LmplayError

LOWEST, HIGHEST = 1e-3, 1e2  # factors on the plan's learning rates
MEMORY = 0.9  # of the exponential mean that the loss is smoothed with
BLOWN_UP = 1.5  # times the best loss: enough was seen
FEWEST = 20  # steps that show anything
SAFE = 0.1  # of the rate at the lowest loss


@dataclass(frozen=True)
class Range:
    """What the test saw: learning rates, losses (nats per token) and smoothed losses, each (n,), and where to go.

    `safest` is None where the loss still fell at the last rate: then its minimum was not seen.
    """

    rates: np.ndarray
    losses: np.ndarray
    smoothed: np.ndarray
    steepest: float
    safest: float | None


def range_test(
    step: Callable[[int, float], float], lr: float, steps: int, say: Callable[[str, float], None] | None = None
) -> Range:
    """Run up to `steps` optimizer steps at rates from LOWEST to HIGHEST times `lr`, as far as the loss allows.

    Args:
        step: makes one step; takes its number and the factor on the learning rates, returns the loss before it.
        say: is shown a line and the share that is done.

    Raises:
        LmplayError: the loss was not finite from the first steps on, or never fell; or these are too few steps.
    """
    if steps < FEWEST:
        raise LmplayError(f"--find-lr needs {FEWEST} steps or more, not {steps}")
    factors = np.geomspace(LOWEST, HIGHEST, steps)
    losses: list[float] = []
    smoothed: list[float] = []
    mean = 0.0
    for i, factor in enumerate(factors):
        loss = step(i, float(factor))
        if not math.isfinite(loss):
            break
        losses.append(loss)
        mean = MEMORY * mean + (1 - MEMORY) * loss
        smoothed.append(mean / (1 - MEMORY ** (i + 1)))  # without the bias towards 0 of the first ones
        if say is not None:
            say(f"rate {lr * factor:.2e} · loss {loss:.3f}", (i + 1) / steps)
        if smoothed[-1] > BLOWN_UP * min(smoothed):
            break
    return read(lr * factors[: len(losses)], np.array(losses), np.array(smoothed))


def read(rates: np.ndarray, losses: np.ndarray, smoothed: np.ndarray) -> Range:
    """The steepest point is where the smoothed loss falls fastest by the rate's logarithm, before its minimum; the
    safest is a tenth of the rate at that minimum: the loss lags, and a whole run has to live with the rate."""
    lowest = int(np.argmin(smoothed)) if len(smoothed) else 0
    if lowest < 2:
        raise LmplayError("the loss fell at no learning rate: is the plan's rate far too high, or is nothing trained?")
    slopes = np.gradient(smoothed, np.log(rates))
    steepest = int(np.argmin(slopes[: lowest + 1]))
    safest = float(SAFE * rates[lowest]) if lowest < len(rates) - 1 else None
    return Range(rates, losses, smoothed, float(rates[steepest]), safest)
