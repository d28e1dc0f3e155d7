"""The learning rate range test, on losses whose best rate is known, and the command."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import Command, write_plan

from lmplay.errors import LmplayError
from lmplay.training.lr_finder import range_test


def quadratic(lr: float) -> tuple[float, float, float]:
    """Gradient descent on x^2 / 2, which diverges at a rate of 2, wherever it begins."""
    x = 10.0

    def step(index: int, factor: float) -> float:
        nonlocal x
        loss = x * x / 2 + 1
        x -= lr * factor * x
        return loss

    found = range_test(step, lr, 200)
    assert found.suggested_lr is not None
    return found.steepest_lr, found.suggested_lr, float(found.rates[-1])


def test_the_points_are_below_the_rate_that_diverges() -> None:
    steepest_lr, suggested_lr, last = quadratic(1.0)
    assert 0.005 < steepest_lr < 2
    assert suggested_lr < 2, "beyond it this descent diverges"
    assert 2 < last < 100, "it went on until the loss blew up, and not to the end"


def test_the_steepest_point_is_where_the_slope_is() -> None:
    """A loss that falls by a logistic curve of the rate's logarithm, whose middle is at a factor of
    0.1."""
    found = range_test(lambda i, f: 5 - 2 / (1 + math.exp(-6 * math.log10(f / 0.1))), 1.0, 2000)
    assert found.steepest_lr == pytest.approx(0.1, rel=0.15)
    assert found.suggested_lr is None, "the loss still falls at the end"


def test_a_loss_that_never_falls_is_an_error() -> None:
    with pytest.raises(LmplayError, match="fell at no learning rate"):
        range_test(lambda i, f: 5 + f, 1.0, 50)
    with pytest.raises(LmplayError, match="fell at no learning rate"):
        range_test(lambda i, f: math.nan, 1.0, 50)


def test_too_few_steps_are_an_error() -> None:
    with pytest.raises(LmplayError, match="20 steps or more"):
        range_test(lambda i, f: 5.0, 1.0, 2)


def test_the_command_draws_and_trains_nothing(command: Command, tmp_path: Path) -> None:
    write_plan(tmp_path)
    done = command(
        "lmp_trainer", "--exp", "ue", "--training-plan", "tiny.json", "--find-lr", "--steps", "40"
    )
    assert done.returncode == 0, done.stderr
    said = dict(line.split(": ", 1) for line in done.stdout.splitlines() if ": " in line)
    values = pd.read_csv(tmp_path / said["values"])
    lowest = int(np.argmin(values["smoothed"]))
    if lowest < len(values) - 1:
        assert float(said["suggested_lr"]) == pytest.approx(0.1 * values["lr"][lowest], rel=0.01)
    else:
        assert said["suggested_lr"].startswith("unknown: the loss still fell at ")
    assert 1e-6 < float(said["steepest_lr"]) < 0.1
    assert (tmp_path / said["picture"]).stat().st_size > 5000
    made = {path.name for path in (tmp_path / "gpt_out").iterdir()}
    assert made == {".gitignore", Path(said["values"]).name, Path(said["picture"]).name}, (
        "no run was begun"
    )
