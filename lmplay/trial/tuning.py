"""Which settings an arm runs with: its learning rate by default, or any knobs, found by optuna.

Every arm gets equally many tries. As all of a trial, what to try next is a function of the results
so far: the samplers are seeded by the arm's name and are told the results in a fixed order.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping
from typing import Any

from .design import Results, Unit

SEED = 1000  # settings are chosen on another seed than the pairs'
REACH = 8.0  # a knob is tried from its own value / REACH to REACH times it
FROM_ZERO = (1e-3, 1.0)  # the range of a knob whose own value is 0
FREE = 0.5  # share of the tries that do not depend on earlier ones, and can run at the same time
DIGITS = 3


def try_range(value: float, is_allowed: Any) -> tuple[float, float]:
    """Return the range in which a knob is tried.

    Args:
        value: the arm's own.
        is_allowed: tells whether the plan takes a value.
    """
    if value == 0:
        return FROM_ZERO
    low, high = value / REACH, value * REACH
    if not is_allowed(high) and 0 < value < 1:
        high = 1 - (1 - value) / REACH  # a share, such as momentum
    return low, high


def settings_text(values: Mapping[str, float]) -> str:
    """Return values of knobs as a unit keeps them."""
    return ",".join(f"{key}={value:.{DIGITS}g}" for key, value in sorted(values.items()))


def parsed(text: str) -> dict[str, str]:
    """Return the settings in a unit's text."""
    return dict(part.split("=", 1) for part in text.split(",") if part)


def tune_knobs(
    arm: str,
    ranges: Mapping[str, tuple[float, float]],
    integers: tuple[str, ...],
    tries: int,
    share: float,
    results: Results,
) -> str | list[Unit]:
    """Return an arm's best settings, "" for its own, or the runs that are missing.

    The first try is the arm's own settings. The next ones are random; the rest are chosen by
    optuna's TPE sampler (Bergstra et al. 2011).

    Args:
        ranges: by knob, from :func:`try_range`.
        integers: the knobs that are integers.
        tries: runs of each arm.
        share: of the trial's budget that the arm has.
    """
    import optuna

    def unit(text: str) -> Unit:
        return Unit("knobs", arm, SEED, 1.0, share, settings=text)

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    free = max(1, math.ceil(FREE * (tries - 1)))
    sampler = optuna.samplers.TPESampler(seed=zlib.crc32(arm.encode()), n_startup_trials=free)
    study = optuna.create_study(sampler=sampler)
    space: dict[str, optuna.distributions.BaseDistribution] = {
        knob: optuna.distributions.IntDistribution(max(1, round(low)), round(high), log=True)
        if knob in integers
        else optuna.distributions.FloatDistribution(low, high, log=True)
        for knob, (low, high) in ranges.items()
    }
    texts = [""]
    asked = [study.ask(space) for _ in range(min(free, tries - 1))]
    texts += [settings_text(trial.params) for trial in asked]
    if missing := [unit(text) for text in texts if unit(text).key not in results]:
        return missing
    for trial, text in zip(asked, texts[1:], strict=True):
        study.tell(trial, _told(results[unit(text).key].loss))
    while len(texts) < tries:
        trial = study.ask(space)
        text = settings_text(trial.params)
        if unit(text).key not in results:
            return [unit(text)]
        study.tell(trial, _told(results[unit(text).key].loss))
        texts.append(text)
    return min(texts, key=lambda text: (results[unit(text).key].loss, text))


def _told(loss: float) -> float:
    """Return what the sampler is told: a run that diverged is bad, not missing."""
    return loss if math.isfinite(loss) else 1e3
