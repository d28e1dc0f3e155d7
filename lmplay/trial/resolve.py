"""Look up what a design names: arms, contexts, plans and knobs; and fix the design.

One module, because all workers must look up a design in the same way.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import recipe
from ..data.prepare import prepare
from ..data.stages import stages
from ..devices import pick_device, pick_precision
from ..discover import Experiment, find, find_baseline, load, source_digest
from ..errors import LmplayError, did_you_mean
from ..plan import Plan, find_plan, load_plan
from ..training.progress import Reporter
from ..training.run import Job, RunOptions
from .certificate import Certificate, valid
from .design import BUDGETS, CONTROLS, Design, FixedDesign
from .statistics import MOST_PAIRS
from .tuning import try_range

VALIDATIONS = 20  # at least, of a run whose end point is the mean of the last ones
LOW = 0.1  # share of the learning rate at which the loss no longer jumps


def check(design: Design, workers: int) -> None:
    """Check what needs no data.

    Raises:
        LmplayError: a value is out of range, or values do not fit together.
    """
    for control in design.controls:
        if control not in CONTROLS:
            known = ", ".join(CONTROLS)
            raise LmplayError(f"--controls {control}: there is no such control (there is: {known})")
    if design.budget not in BUDGETS:
        raise LmplayError(f"--budget {design.budget}: it is one of {', '.join(BUDGETS)}")
    for option, timed in (("controls", design.controls), ("budget", (design.budget,))):
        if "seconds" in timed and workers > 1:
            raise LmplayError(
                f"--{option} seconds: workers slow each other down; it needs --workers 1"
            )
    if design.budget in design.controls:
        raise LmplayError(
            f"--controls {design.budget}: --budget {design.budget} gives both arms the same already"
        )
    if design.tune and not design.tuned:
        raise LmplayError("--tune does not go with --lr fixed")
    if design.tune and design.tune_tries < 2:
        raise LmplayError(f"--tune-tries {design.tune_tries}: two at least")
    if design.max_pairs > MOST_PAIRS:
        raise LmplayError(
            f"--max-seeds {design.max_pairs}: {MOST_PAIRS} at most: the test enumerates all signs "
            "of the pairs, and more take gigabytes"
        )
    if not 0 < design.level < 0.5 or design.smallest_effect <= 0:
        raise LmplayError("--level must be in (0, 0.5), --smallest-effect above 0")


@dataclass(frozen=True)
class Arm:
    """An experiment with settings: fields of its Config, and dotted ones of the recipe."""

    experiment: Experiment
    settings: dict[str, str]

    @property
    def label(self) -> str:
        """The arm's name, without blanks."""
        return "-".join([self.experiment.variant, *(f"{k}={v}" for k, v in self.settings.items())])

    @classmethod
    def parse(cls, text: str, option: str) -> Arm:
        """Return the arm for "NAME KEY=VALUE ...".

        Raises:
            LmplayError: the name is unknown, or a setting has another form.
        """
        words = shlex.split(text)
        settings = {}
        for word in words[1:]:
            key, equals, value = word.partition("=")
            if not equals or not key or len(word.split()) != 1:
                raise LmplayError(f'{option} "{text}": write settings as KEY=VALUE, without blanks')
            settings[key] = value
        if not words:
            raise LmplayError(f"{option}: the name of an experiment is missing")
        return cls(load(*find(words[0])), dict(sorted(settings.items())))


def contexts_of(design: Design) -> tuple[str, ...]:
    """Return the contexts in which a design asks its question; () for the plan's own recipe.

    Raises:
        LmplayError: the plan has no such context, or a setting in one does not fit.
    """
    plan = load_plan(find_plan(design.training_plan))
    asked = design.contexts
    if asked is None:  # sizes are a question of their own
        asked = () if design.sizes else tuple(plan.contexts)
    for name in asked:
        recipe.in_context(plan, name)
    if asked and design.sizes:
        raise LmplayError("--sizes does not go with --panel or --context")
    return asked


def quoted(design: Design, fixed: FixedDesign) -> dict[str, Any]:
    """Return what the plan's certificate says, for a report."""
    found, sentence, plan = _certificate(design, fixed.device, fixed.precision)
    return {
        "sentence": sentence,
        "smallest_gain": found.smallest_gain if found else None,
        "arena": recipe.arena_fingerprint(plan),
    }


def resolve(
    design: Design,
    size: float,
    context: str,
    out: Path,
    command: tuple[str, ...],
    memory: str,
) -> tuple[dict[str, Job], FixedDesign] | None:
    """Return the job of each arm and the baseline, and the design that the trial fixes.

    An arm that does not differ from the baseline in this context is left out; None if none is left.

    Args:
        size: multiple of the plan's width.
        context: name of the plan's context; "" for the plan's own recipe.

    Raises:
        LmplayError: a name is unknown, an idea is its own baseline, or the plan has several stages
            or a budget in time.
    """
    device = pick_device(design.device)
    precision = pick_precision(device, design.amp)
    path = find_plan(design.training_plan)
    plan = load_plan(path).with_budget(design.tokens, None, None)
    plan = plan.for_precision(device.type, precision.name)
    if context:
        plan = recipe.in_context(plan, context)
    tokens = tokens_of(plan, f"{path}: a trial", "; --tokens gives one")
    if size != 1:
        plan = resized(plan, size, path)
    ideas = [Arm.parse(text, "--exp") for text in design.exp]
    if design.against:
        against = Arm.parse(design.against, "--against")
    else:
        against = Arm(load(*find_baseline(ideas[0].experiment.source)), {})
    ideas = [arm for arm in ideas if arm.label != against.label]
    names = [arm.label for arm in ideas]
    if not names or len(set(names)) < len(names):
        listed = ", ".join(design.exp)
        raise LmplayError(
            f"--exp {listed} against {against.label}: "
            + ("an arm is there twice" if names else "this is the baseline; add an idea or --arm")
        )
    for arm in ideas:
        own = arm.experiment.source.baseline
        if {"params", "flops"} & set(design.controls) and own != against.experiment.variant:
            raise LmplayError(
                f"--controls: {arm.label} is matched with its own baseline, {own}, not "
                f"{against.label}"
            )
    is_stream = plan.steps[0].stream is not None
    if is_stream and (design.budget != "tokens" or {"flops", "seconds"} & set(design.controls)):
        raise LmplayError(
            f"{path}: a stream ends with its data, so no arm can get more or less of it: no "
            "--budget, and of --controls only params"
        )
    changes_batch = any("batch.batch_size" in arm.settings | arm.experiment.recipe for arm in ideas)
    if changes_batch and not is_stream:
        plan = plan.with_budget(tokens, None, None)  # as many steps would be other tokens
    plan, last = with_end_point(plan, tokens)
    shared = job_for(design, against.experiment, path.stem, plan, out, command, memory)
    baseline = shared.with_arm(against.experiment, against.settings)
    jobs = {arm.label: shared.with_arm(arm.experiment, arm.settings) for arm in ideas}
    ideas = [arm for arm in ideas if not _is_same(jobs[arm.label], baseline)]
    if not ideas:
        return None
    arms = (against, *ideas)
    jobs = {against.label: baseline} | {arm.label: jobs[arm.label] for arm in ideas}
    with shared.reporter:
        prepared = prepare(plan, shared.reporter.preparing)
    certificate, _, _ = _certificate(design, device.type, precision.name)
    fixed = FixedDesign(
        plan=path.stem,
        plan_fingerprint=plan.fingerprint,
        against=against.label,
        arms=tuple(arm.label for arm in ideas),
        level=design.level,
        max_pairs=design.max_pairs,
        smallest_effect=design.smallest_effect,
        tuned=design.tuned,
        controls=design.controls,
        tokens=tokens,
        precision=precision.name,
        device=device.type,
        data=prepared.fingerprint,
        sources={arm.label: source_digest(arm.experiment.source.path) for arm in arms},
        last=last,
        context=context,
        budget=design.budget,
        screen=design.screen,
        noise=certificate.deviation_paired if design.screen and certificate else None,
        tune_tries=design.tune_tries if design.tune else 0,
        integers=tuple(k for k in design.tune if _is_integer(baseline.plan, k)),
        knobs={label: knob_ranges(job.plan, design.tune) for label, job in jobs.items()}
        if design.tune
        else {},
    )
    return jobs, fixed


def tokens_of(plan: Plan, who: str, remedy: str = "") -> int:
    """Return the budget of a plan of one stage, in tokens.

    Args:
        who: what needs such a plan, and remedy: what to do, for the message.

    Raises:
        LmplayError: the plan has several stages, or its budget is in minutes or epochs.
    """
    stage = plan.steps[0]
    if stage.stream is not None:
        return tokens_of_stream(plan)
    per_step = plan.batch.batch_size * (plan.model.max_len or 0)
    tokens = stage.tokens or (stage.steps or 0) * per_step
    if len(plan.steps) > 1 or stage.minutes or not tokens:
        raise LmplayError(
            f"{who} needs a plan of one stage with a budget in tokens or optimizer steps{remedy}"
        )
    return tokens


def _certificate(
    design: Design, device: str, precision: str
) -> tuple[Certificate | None, str, Plan]:
    """Return the certificate that holds for a design, one line about it, and the plan it is for."""
    path = find_plan(design.training_plan)
    plan = load_plan(path).with_budget(design.tokens, None, None).for_precision(device, precision)
    return (*valid(path, plan, precision, device), plan)


def knob_ranges(plan: Plan, keys: Sequence[str]) -> dict[str, tuple[float, float]]:
    """Return for each setting the range in which it is tried.

    Raises:
        LmplayError: a key is unknown, or its value is no number.
    """
    found = {}
    for key in keys:
        value = _value_of(plan, key)

        def is_allowed(other: float, key: str = key) -> bool:
            try:
                recipe.apply(plan, {key: f"{other:.6g}"}, "--tune")
            except LmplayError:
                return False
            return True

        found[key] = try_range(value, is_allowed)
    return found


def _value_of(plan: Plan, key: str) -> float:
    part, _, name = key.partition(".")
    known = recipe.every_key()
    if key not in known or (value := getattr(getattr(plan, part), name, None)) is None:
        raise LmplayError(f"--tune {key}: there is no such setting{did_you_mean(key, known)}")
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise LmplayError(f"--tune {key}: its value is {value}; only numbers are tuned")
    return float(value)


def _is_integer(plan: Plan, key: str) -> bool:
    part, _, name = key.partition(".")
    return isinstance(getattr(getattr(plan, part), name, None), int)


def job_for(
    design: Design,
    experiment: Experiment,
    plan_name: str,
    plan: Plan,
    out: Path,
    command: tuple[str, ...],
    memory: str,
) -> Job:
    """Return the job of an experiment with the device and the options of a design."""
    device = pick_device(design.device)
    options = RunOptions(
        out=out,
        mini_batch_size=design.mini_batch_size,
        command=command,
        memory=memory,
        divide_cores=False,  # as many threads for all runs, so that rounding and time compare
    )
    reporter = Reporter(brief=True)
    precision = pick_precision(device, design.amp)
    return Job(experiment, {}, plan_name, plan, device, precision, reporter, options)


def _is_same(one: Job, other: Job) -> bool:
    """Return whether two jobs train the same model with the same recipe."""
    own = [(job.experiment.variant, recipe.split(job.overrides)[0]) for job in (one, other)]
    return own[0] == own[1] and one.plan.fingerprint == other.plan.fingerprint


def tokens_of_stream(plan: Plan) -> int:
    """Return the tokens that a run of a plan reads whose one stage is a stream.

    Raises:
        LmplayError: its data cannot be prepared, or the plan sets no max_len.
    """
    length = plan.model.max_len
    if not length or len(plan.steps) > 1:
        raise LmplayError("a trial on a stream needs a plan of one stage that sets model.max_len")
    (windows,) = stages(plan, prepare(plan, lambda what, done: None), length)
    return int(windows.steps(plan.batch.batch_size, length)) * plan.batch.batch_size * length


def with_end_point(plan: Plan, tokens: int) -> tuple[Plan, int]:
    """Return the plan, and of how many last validations the end point is the mean.

    Where the learning rate comes down, and in a stream, the last validation says it all. Elsewhere
    the loss still jumps: the end point is a mean over three, of at least 20 in `tokens`, so that
    they are near the end.
    """
    if plan.steps[0].stream is not None:  # the last one is the mean over all windows
        return plan, 1
    schedule = plan.schedule_of(plan.steps[0])
    if schedule.name in ("cosine", "wsd", "one_cycle") and schedule.floor <= LOW:
        return plan, 1
    every = min(plan.validation.every_tokens, max(1, tokens // VALIDATIONS))
    validation = plan.validation.model_copy(update={"every_tokens": every})
    return plan.model_copy(update={"validation": validation}), 3


def resized(plan: Plan, size: float, path: Path) -> Plan:
    """Return the plan with a model `size` times as wide.

    The number of heads stays, and each head's width is even.

    Raises:
        LmplayError: the plan sets no width or heads, or the width would be 0.
    """
    if not plan.model.embed_dim or not plan.model.num_heads:
        raise LmplayError(f"{path}: --sizes needs embed_dim and num_heads in the plan's model")
    unit = 2 * plan.model.num_heads
    width = round(plan.model.embed_dim * size / unit) * unit
    if not width:
        raise LmplayError(
            f"--sizes {size:g}: {path} has a width of {plan.model.embed_dim} in heads of even width"
        )
    model = plan.model.model_copy(update={"embed_dim": width})
    return plan.model_copy(update={"model": model})
