"""Run a trial: look up the names in its design, work through its queue, and report.

python -m lmplay.trial.runner JSON      # how a trial starts its other workers

One module, because all workers must look up a design in the same way.
"""

from __future__ import annotations

import json
import os
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import torch

from .. import recipe
from ..analysis.compare import TRIALS
from ..analysis.sensitivity import draw_sensitivity
from ..data.prepare import prepare
from ..devices import pick_device, pick_precision, tune_memory
from ..discover import Experiment, find, find_baseline, load, source_digest
from ..errors import BusyError, LmplayError, NotFiniteError, did_you_mean
from ..files import write_json
from ..plan import Plan, find_plan, load_plan
from ..threads import Share, given
from ..training.curves import read_curve
from ..training.loop import Stopped
from ..training.progress import Reporter
from ..training.run import Job, PreparedRun, RunOptions, matched, sized_config
from ..training.run_folder import make_out
from .certificate import valid
from .design import BUDGETS, CONTROLS, Design, FixedDesign, Result, Unit
from .queue import DEAD, Queue, open_storage
from .state import TrialState, over_contexts, over_sizes
from .statistics import MOST_PAIRS, fewest
from .tuning import parsed, try_range

WAIT = 1.0  # seconds between two polls of a queue in which nothing waits
VALIDATIONS = 20  # at least, of a run whose end point is the mean of the last ones
LOW = 0.1  # share of the learning rate at which the loss no longer jumps


class State(Protocol):
    """What the runs so far say, and which come next."""

    def needed(self) -> list[Unit]: ...
    def report(self) -> dict[str, Any]: ...


@dataclass(frozen=True)
class Part:
    """A trial at one size of the model and in one context.

    jobs: by arm, the baseline's too. certificate: what is known about the arena.
    """

    queue: Queue
    design: FixedDesign
    jobs: dict[str, Job]
    folder: Path
    certificate: Mapping[str, Any] = field(default_factory=dict)

    def state(self) -> State:
        return TrialState(self.design, self.queue.results(), self.certificate)


class Trial:
    """A trial of one or several ideas against a baseline.

    Args:
        design: what to judge, and how.
        out: the folder for runs and trials.
        name: the trial's name. Default: made of the plan and the ideas.
        storage: where the work is shared: a journal file or a database's URL. Default: a
            journal in the trial's folder.
        workers: processes on this machine.
        threads: torch's threads in each worker, all the time, also if other processes use the
            cores. Default: OMP_NUM_THREADS, or all cores divided by the workers.
        create: False: raise LmplayError if there is no such trial.
        log: prints a line.
        command: the command line, which run.json keeps.

    Raises:
        LmplayError: a name is unknown, values do not fit together, or the trial has begun with
            another design.
    """

    def __init__(
        self,
        design: Design,
        *,
        out: Path | str = "gpt_out",
        name: str | None = None,
        storage: str | None = None,
        workers: int = 1,
        threads: int | None = None,
        create: bool = True,
        log: Callable[[str], None] = print,
        command: tuple[str, ...] = (),
    ):
        self.design = design
        self.out = Path(out)
        self.name = name
        self.storage = storage
        self.workers = workers
        self.log = log
        self.command = command
        self.memory = tune_memory()
        self.threads = threads or given() or max(1, torch.get_num_threads() // workers)
        check(design, workers)
        torch.set_num_threads(self.threads)
        if create:
            make_out(self.out)
        self.contexts = contexts_of(design)
        self.parts = []
        for context in self.contexts or ("",):
            for size in design.sizes or (1.0,):
                part = self._part(size, context, create)
                if part is None:
                    log(f"context {context}: every arm is the baseline; it is left out")
                else:
                    self.parts.append(part)
        if not self.parts:
            raise LmplayError("in every context the arms are the baseline: nothing can be judged")
        widths = [next(iter(part.jobs.values())).plan.model.embed_dim for part in self.parts]
        if design.sizes and len(set(widths)) < len(widths):
            sizes = ",".join(f"{s:g}" for s in design.sizes)
            raise LmplayError(f"--sizes {sizes}: two of them have the same width: {widths}")

    def _part(self, size: float, context: str, create: bool) -> Part | None:
        """Return the trial of one size and context; None if every arm is the baseline there."""
        found = resolve(self.design, size, context, self.out, self.command, self.memory)
        if found is None:
            return None
        jobs, fixed = found
        name = self._name_of(fixed)
        name += f"-x{size:g}" if self.design.sizes else ""
        name += f"-in-{context}" if context else ""
        folder = self.out / "trials" / name
        journal = folder / "journal.log"
        if not create and not self.storage and not journal.exists():
            raise LmplayError(f"there is no trial {name} in {self.out}; --name chooses another")
        queue = Queue(open_storage(self.storage or str(journal)), name, fixed, create=create)
        return Part(queue, fixed, jobs, folder, quoted(self.design, fixed))

    def _name_of(self, fixed: FixedDesign) -> str:
        return self.name or "-".join([fixed.plan, *fixed.arms, "against", fixed.against])

    def run(self) -> dict[str, Any]:
        """Run what the verdict needs, with all workers, and return the report.

        With several sizes the report holds `sizes` (a report each) and `fits` (for each idea, its
        gain in nats against the number of parameters). With contexts it holds `contexts` (a report
        each, by name) and `panel` (for each idea, where it holds).

        Raises:
            Stopped: a signal asked for it; the same call continues.
            LmplayError: a run fails.
        """
        for part in self.parts:
            write_json(part.folder / "design.json", part.queue.study.user_attrs["design"])
        # A test that is made only once, at the end, needs the fewest pairs.
        least = fewest(self.design.level, len(self.design.exp), spent=1.0)
        if self.design.max_pairs < least:
            self.log(
                f"with --max-seeds {self.design.max_pairs} the verdict cannot be REAL or HARMFUL: "
                f"that needs at least {least} pairs"
            )
        share_out(self.parts, self.workers, self._start_worker, self.threads, self.log)
        return self._report()

    def _start_worker(self) -> subprocess.Popen[bytes]:
        arguments = {
            "design": asdict(self.design),
            "out": str(self.out),
            "name": self.name,
            "storage": self.storage,
            "threads": self.threads,
            "command": self.command,
        }
        return start_worker(__name__, arguments, self.threads)

    def _report(self) -> dict[str, Any]:
        """Write the reports and return them."""
        reports = []
        for part in self.parts:
            reports.append(part.state().report())
            write_json(part.folder / "trial.json", reports[-1], sealed=True)
            draw_sensitivity(part.folder / "tuning.png", reports[-1])
        if self.contexts:
            by_name = {
                part.design.context: report
                for part, report in zip(self.parts, reports, strict=True)
            }
            panel = over_contexts(by_name)
            folder = self.out / "trials" / self._name_of(self.parts[0].design)
            write_json(folder / "panel.json", {"panel": panel}, sealed=True)
            return {"contexts": by_name, "panel": panel}
        if not self.design.sizes:
            return reports[0]
        fits = over_sizes(reports)
        folder = self.out / "trials" / self._name_of(self.parts[0].design)
        content = {"sizes": self.design.sizes, "fits": fits}
        write_json(folder / "sizes.json", content, sealed=True)
        return {"sizes": reports, "fits": fits}


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
    path = find_plan(design.training_plan)
    plan = load_plan(path).with_budget(design.tokens, None, None)
    plan = plan.for_precision(fixed.device, fixed.precision)
    found, sentence = valid(path, plan, fixed.precision, fixed.device)
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
    stage = plan.steps[0]
    if len(plan.steps) > 1 or stage.minutes or not (stage.tokens or stage.steps):
        raise LmplayError(
            f"{path}: a trial needs a plan of one stage with a budget in tokens or optimizer "
            "steps; --tokens gives one"
        )
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
    per_step = plan.batch.batch_size * (plan.model.max_len or 0)
    tokens = stage.tokens or (stage.steps or 0) * per_step
    if any("batch.batch_size" in arm.settings | arm.experiment.recipe for arm in ideas):
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
        noise=known_noise(path, design, device.type, precision.name) if design.screen else None,
        tune_tries=design.tune_tries if design.tune else 0,
        whole=tuple(k for k in design.tune if _is_whole(baseline.plan, k)),
        knobs={label: knob_ranges(job.plan, design.tune) for label, job in jobs.items()}
        if design.tune
        else {},
    )
    return jobs, fixed


def known_noise(path: Path, design: Design, device: str, precision: str) -> float | None:
    """Return the paired standard deviation of the plan's certificate, if one holds."""
    plan = load_plan(path).with_budget(design.tokens, None, None)
    found, _ = valid(path, plan.for_precision(device, precision), precision, device)
    return found.deviation_paired if found else None


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


def _is_whole(plan: Plan, key: str) -> bool:
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


def with_end_point(plan: Plan, tokens: int) -> tuple[Plan, int]:
    """Return the plan, and of how many last validations the end point is the mean.

    Where the learning rate comes down, the last validation says it all. Where it does not, the loss
    still jumps: the end point is a mean over three, of at least 20 in `tokens`, so that they are
    near the end.
    """
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


def share_out(
    parts: Sequence[Part],
    workers: int,
    start: Callable[[], subprocess.Popen[bytes]],
    threads: int,
    log: Callable[[str], None],
) -> None:
    """Run all units of the parts, in this process and in `workers` - 1 that `start` starts."""
    with Share(threads):  # so that runs outside the trial make room
        others = [start() for _ in range(1, workers)]
        finished = False
        try:
            for part in parts:
                work(part, log)
            finished = True
        finally:
            for worker in others:
                if not finished:
                    worker.terminate()
                if worker.wait() and finished:
                    log(f"a worker ended with status {worker.returncode}")


def start_worker(module: str, arguments: Any, threads: int) -> subprocess.Popen[bytes]:
    """Start one more worker process, which starts no others and prints nothing."""
    command = [sys.executable, "-m", module, json.dumps(arguments)]
    env = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, env=env)


def work(part: Part, log: Callable[[str], None]) -> None:
    """Claim and run units until the trial is over.

    The report is written after every run, so that a page shows the progress.

    Raises:
        Stopped: a signal asked for it; the claimed unit is given up.
    """
    queue = part.queue
    owner = f"{socket.gethostname()} {os.getpid()}"
    waiting_for = ""
    while units := part.state().needed():
        queue.offer(units)
        claimed = queue.claim(owner)
        if claimed is None:
            for key in queue.reclaim_stale():
                log(f"the worker of this run has stopped; the run is queued again: {key}")
            running = [f"{unit} ({of})" for unit, state, of in queue.status() if state == "running"]
            others = ", ".join(running)
            if others and others != waiting_for:
                log(f"waiting for {others}; a worker silent for {DEAD:g} s loses its run")
            waiting_for = others
            time.sleep(WAIT)
            continue
        number, unit = claimed
        log(f"{len(queue.results())} runs done; now {unit.key}")
        try:
            with queue.heartbeat(number):
                result = run_unit(unit, part.design, part.jobs)
        except BusyError:  # a worker that was taken for dead still trains this run
            queue.give_up(number)
            time.sleep(WAIT)
            continue
        except BaseException:
            queue.give_up(number)
            raise
        queue.done(number, result)
        write_json(part.folder / "trial.json", part.state().report(), sealed=True)


def run_unit(unit: Unit, design: FixedDesign, jobs: dict[str, Job]) -> Result:
    """Train one run of a trial, or resume it, and return its end point.

    The loss of a run that diverges is infinite.
    """
    matches_size = unit.match in ("params", "flops")
    job = placed(jobs[unit.arm], unit, design)
    with job.reporter:
        prepared = prepare(job.plan, job.reporter.preparing)
    control = None
    if matches_size:
        idea = placed(jobs[unit.of], unit, design)
        config = sized_config(idea, prepared.tokenizer.vocab_size)
        job, config, control = matched(idea, config, unit.match, prepared, job)
    else:
        config = sized_config(job, prepared.tokenizer.vocab_size)
    run = PreparedRun(job, config, prepared, control)
    if parts := run.folder.differs(run.identity):  # the idea was edited after it was trained
        # The trial's reporter prints no notes.
        which = " and ".join(parts)
        print(f"{run.folder.path} has another {which}: it is moved aside", file=sys.stderr)
        job = replace(job, options=replace(job.options, fresh=True))
        run = PreparedRun(job, config, prepared, control)
    try:
        run.train()
    except NotFiniteError:
        inf = float("inf")
        where = str(run.folder.path)
        return Result(loss=inf, bpb=inf, tokens=[], losses=[], seconds=0.0, flops=0.0, folder=where)
    curve = read_curve(run.folder.path / "validate.csv")
    end = curve.tail(design.last).fillna(float("inf"))
    last = curve.iloc[-1]
    return Result(
        loss=float(end["loss"].mean()),
        bpb=float(end["bpb"].mean()),
        tokens=[float(t) for t in curve["tokens"]],
        losses=[float(x) for x in curve["loss"]],
        seconds=float(last["seconds"]),
        flops=float(last["flops"]),
        folder=str(run.folder.path),
    )


def placed(job: Job, unit: Unit, design: FixedDesign) -> Job:
    """Return an arm's job with the unit's seed, data order, budget, settings and folder."""
    if unit.settings:
        job = job.with_arm(job.experiment, {**job.overrides, **parsed(unit.settings)})
    plan = scaled(job.plan, unit, design.tokens)
    # Another budget is part of the folder's name.
    tokens = None if unit.share == 1 else plan.steps[0].tokens
    options = replace(job.options, seed=unit.seed, tokens=tokens)
    return replace(job, plan=plan, plan_name=folder_of(unit, design), options=options)


def folder_of(unit: Unit, design: FixedDesign) -> str:
    """Return the folder of a unit's run. Trials of one plan share their runs.

    Runs on cpu, cuda and mps have separate folders. So have those of a trial with the control
    `seconds`, whose runs must not be timed while other work runs.
    """
    name = f"{TRIALS}{design.plan}-{design.plan_fingerprint[:6]}"
    name += "" if design.device == "cpu" else f"-{design.device}"
    name += "-timed" if "seconds" in (*design.controls, design.budget) else ""
    return name + ("" if unit.lr_multiplier == 1 else f"-lr{unit.lr_multiplier:g}")


def scaled(plan: Plan, unit: Unit, tokens: int) -> Plan:
    """Return the plan of a unit: its learning rates, its share of the budget, its data order."""
    multiplier = unit.lr_multiplier
    stage = plan.steps[0]
    changes: dict[str, Any] = {
        "optimizer": stage.optimizer.scaled(multiplier) if stage.optimizer else None,
        "lr": stage.lr * multiplier if stage.lr else None,
    }
    if unit.share != 1:
        budget = round(tokens * unit.share)
        changes |= {"tokens": budget, "steps": None, "epochs": None}
        every = {"every_tokens": max(1, round(plan.validation.every_tokens * unit.share))}
        plan = plan.model_copy(update={"validation": plan.validation.model_copy(update=every)})
    return plan.model_copy(
        update={
            "optimizer": plan.optimizer.scaled(multiplier),
            "steps": [stage.model_copy(update=changes)],
            "seed": plan.seed + unit.seed,  # the data's order; the options' seed is the weights'
        }
    )


def main() -> int:
    """Run a trial as a worker that another process started."""
    arguments = json.loads(sys.argv[1])
    fields = arguments.pop("design")
    lists = {key: tuple(value) for key, value in fields.items() if isinstance(value, list)}
    arguments["command"] = tuple(arguments["command"])
    return as_worker(lambda: Trial(Design(**{**fields, **lists}), **arguments).run())


def as_worker(run: Callable[[], object]) -> int:
    """Run a worker's part of the work; return the exit status."""
    try:
        run()
    except Stopped as e:
        return e.status
    except KeyboardInterrupt:
        return 130
    except LmplayError as e:
        print(f"trial worker: {e}", file=sys.stderr)
        return e.exit_status
    return 0


if __name__ == "__main__":
    sys.exit(main())
