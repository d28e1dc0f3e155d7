"""The search for the fastest mini-batch, on a clock that the test turns."""

import pytest
import torch
from torch import nn

from lmplay.errors import LmplayError
from lmplay.model import find_mini_batch


class Machine:
    """Takes `cost(size)` seconds for a trial; the trial number `hiccup` takes half as long
    again."""

    def __init__(self, cost, hiccup=None):
        self.cost = cost
        self.hiccup = hiccup
        self.now = 0.0
        self.trials = []

    def trial(self, size):
        self.trials.append(size)
        self.now += self.cost(size) * (1.5 if len(self.trials) == self.hiccup else 1)

    def find(self, batch_size=64, length=16, **options):
        model = nn.Linear(2, 2)
        return find_mini_batch(
            self.trial,
            model,
            torch.device("cpu"),
            batch_size,
            length,
            clock=lambda: self.now,
            **options,
        )


def fastest_at_8(size):
    return 0.01 * size * (1 + abs(size - 8) / 8)


def test_the_fastest_is_found():
    machine = Machine(fastest_at_8)
    assert machine.find() == 8
    assert 64 not in machine.trials  # two slower in a row were enough


@pytest.mark.parametrize("hiccup", [2, 4, 6])
def test_one_slow_moment_does_not_decide(hiccup):
    def cost(size):  # 2 is best, 4 a little behind
        return size * {1: 0.012, 2: 0.010, 4: 0.0104}.get(size, 0.03)

    assert Machine(cost, hiccup).find() == 2


def test_equal_rates_take_the_smallest():
    assert Machine(lambda size: 0.01 * size).find() == 1


def test_time_is_kept():
    machine = Machine(fastest_at_8, None)
    machine.find(seconds=0.05)
    assert machine.now < 0.2


def test_a_pass_on_a_cpu_stays_small():
    machine = Machine(lambda size: 1.0)
    machine.find(length=1024)
    assert max(machine.trials) == 4


def test_nothing_fits():
    def full(size):
        raise torch.OutOfMemoryError("full")

    with pytest.raises(LmplayError, match="not even one sequence"):
        Machine(full).find()
