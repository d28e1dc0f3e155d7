"""The learning rate range test: raise the rate with every step, and see where the loss falls.

Source: Smith 2017, arXiv 1506.01186, section 3.3.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ..errors import LmplayError

LOWEST = 1e-3  # multiplier of the plan's learning rates
HIGHEST = 1e2
MEMORY = 0.9  # of the exponential mean that smooths the loss
DIVERGED = 1.5  # times the best loss: the test ends
MIN_STEPS = 20
SUGGESTED = 0.1  # of the rate at the lowest loss


@dataclass(frozen=True)
class Range:
    """Result of the test.

    rates, losses (nats per token), smoothed: (n,) each.
    steepest_lr: where the smoothed loss falls fastest.
    suggested_lr: a tenth of the rate at the lowest loss; None if the loss still fell at the last
        rate, so that the minimum was not reached.
    """

    rates: np.ndarray
    losses: np.ndarray
    smoothed: np.ndarray
    steepest_lr: float
    suggested_lr: float | None


def range_test(
    step: Callable[[int, float], float],
    lr: float,
    steps: int,
    show: Callable[[str, float], None] | None = None,
) -> Range:
    """Run up to `steps` optimizer steps at rates from LOWEST to HIGHEST times `lr`.

    Ends early when the loss diverges.

    Args:
        step: makes one step, given its number and the multiplier of the learning rates; returns
            the loss before the update.
        show: shows a line and the share that is done.

    Raises:
        LmplayError: there are too few steps, or the loss never fell.
    """
    if steps < MIN_STEPS:
        raise LmplayError(f"--find-lr needs {MIN_STEPS} steps or more, not {steps}")
    multipliers = np.geomspace(LOWEST, HIGHEST, steps)
    losses: list[float] = []
    smoothed: list[float] = []
    mean = 0.0
    for i, multiplier in enumerate(multipliers):
        loss = step(i, float(multiplier))
        if not math.isfinite(loss):
            break
        losses.append(loss)
        mean = MEMORY * mean + (1 - MEMORY) * loss
        smoothed.append(mean / (1 - MEMORY ** (i + 1)))  # without the bias of the zero start
        if show is not None:
            show(f"rate {lr * multiplier:.2e} · loss {loss:.3f}", (i + 1) / steps)
        if smoothed[-1] > DIVERGED * min(smoothed):
            break
    return read(lr * multipliers[: len(losses)], np.array(losses), np.array(smoothed))


def read(rates: np.ndarray, losses: np.ndarray, smoothed: np.ndarray) -> Range:
    """Read the two rates off the curve.

    The steepest point is before the minimum, by the rate's logarithm. A tenth of the rate at the
    minimum is suggested because the loss lags behind the rate and a full run must survive it.
    """
    lowest = int(np.argmin(smoothed)) if len(smoothed) else 0
    if lowest < 2:
        raise LmplayError(
            "the loss fell at no learning rate: is the plan's rate far too high, or is nothing "
            "trained?"
        )
    slopes = np.gradient(smoothed, np.log(rates))
    descent = int(np.argmin(slopes[: lowest + 1]))
    suggested = float(SUGGESTED * rates[lowest]) if lowest < len(rates) - 1 else None
    return Range(rates, losses, smoothed, float(rates[descent]), suggested)
