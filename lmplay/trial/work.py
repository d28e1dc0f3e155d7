"""Run the units of a trial or a certificate: claim one, train it, and say how it ended."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from ..analysis.compare import TRIALS
from ..data.prepare import prepare
from ..errors import BusyError, LmplayError, NotFiniteError
from ..files import write_json
from ..plan import Plan
from ..threads import Share
from ..training.curves import read_curve
from ..training.loop import Stopped
from ..training.run import Job, PreparedRun, matched, sized_config
from .design import FixedDesign, Result, Unit
from .queue import DEAD, Queue
from .state import TrialState
from .tuning import parsed

WAIT = 1.0  # seconds between two polls of a queue in which nothing waits


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


def share_out(
    parts: Sequence[Part],
    workers: int,
    start: Callable[[], subprocess.Popen[bytes]],
    threads: int,
    log: Callable[[str], None],
    until: float | None = None,
) -> None:
    """Run all units of the parts, in this process and in `workers` - 1 that `start` starts.

    Args:
        until: seconds since 1970 at which the work stops, also if something is missing.
    """
    with Share(threads):  # so that runs outside the trial make room
        others = [start() for _ in range(1, workers)]
        finished = False
        try:
            for part in parts:
                work(part, log, until)
            finished = True
        except Stopped:
            if until is None or time.time() < until:
                raise
            finished = True  # the time is up; the other workers stop as well
        finally:
            for worker in others:
                if not finished:
                    worker.terminate()
                if worker.wait() and finished:
                    log(f"a worker ended with status {worker.returncode}")


def deadline(hours: float | None) -> float | None:
    """Return the time, in seconds since 1970, at which work with this limit in hours stops."""
    return None if hours is None else time.time() + 3600 * hours


def hours_left(until: float | None) -> float | None:
    """Return the hours until a deadline, for a worker that starts now."""
    return None if until is None else max(0.0, until - time.time()) / 3600


def say_what_is_missing(
    parts: Sequence[Part], until: float | None, log: Callable[[str], None]
) -> None:
    """Print how many runs the work still needs that stopped because its time was up."""
    if until is None:
        return
    missing = sum(len(part.state().needed()) for part in parts)
    if missing:
        log(
            f"--max-hours: the time is up, and {missing} runs are missing (more may follow from "
            "what they show); the same command continues"
        )


def start_worker(module: str, arguments: Any, threads: int) -> subprocess.Popen[bytes]:
    """Start one more worker process, which starts no others and prints nothing."""
    command = [sys.executable, "-m", module, json.dumps(arguments)]
    env = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, env=env)


def work(part: Part, log: Callable[[str], None], until: float | None = None) -> None:
    """Claim and run units until the trial is over, or until the time leaves no room for a run.

    The report is written after every run, so that a page shows the progress.

    Raises:
        Stopped: a signal asked for it; the claimed unit is given up.
    """
    queue = part.queue
    owner = f"{socket.gethostname()} {os.getpid()}"
    waiting_for = ""
    while units := part.state().needed():
        longest = max((result.seconds for result in queue.results().values()), default=0.0)
        if until is not None and time.time() + longest > until:
            return
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
                result = run_unit(unit, part.design, part.jobs, until)
        except BusyError:  # a worker that was taken for dead still trains this run
            queue.give_up(number)
            time.sleep(WAIT)
            continue
        except BaseException:
            queue.give_up(number)
            raise
        queue.done(number, result)
        write_json(part.folder / "trial.json", part.state().report(), sealed=True)


def run_unit(
    unit: Unit, design: FixedDesign, jobs: dict[str, Job], until: float | None = None
) -> Result:
    """Train one run of a trial, or resume it, and return its end point.

    The loss of a run that diverges is infinite.

    Raises:
        Stopped: a signal asked for it, or the time `until` (seconds since 1970) has come.
    """
    matches_size = unit.match in ("params", "flops")
    job = placed(jobs[unit.arm], unit, design)
    job = replace(job, options=replace(job.options, until=until))
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
        return Result(inf, inf, [], [], seconds=0.0, flops=0.0, folder=where, accuracy=0.0)
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
        accuracy=float(last["accuracy"]),
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
    if unit.share != 1 and stage.stream is None:  # a stream ends with its data
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
