"""Measure an arena: make the runs that its certificate needs, and write it.

python -m lmplay.trial.measure JSON      # how a measurement starts its other workers
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

import torch

from .. import recipe
from ..data.counting import table_losses
from ..data.prepare import prepare
from ..devices import describe_device, tune_memory
from ..discover import Experiment, ExperimentFile, find, list_sources, load, source_digest
from ..errors import LmplayError, did_you_mean
from ..plan import Plan, find_plan, load_plan
from ..threads import given
from ..training.run_folder import make_out
from .arena import DECAY_MULTIPLIERS, PAIRS, WIDTHS, Arena, Layout, Recipe, as_json
from .certificate import LINES, Certificate, LineRecord, plan_print, write_certificate
from .design import Design, FixedDesign
from .queue import Queue, open_storage
from .resolve import Arm, job_for, resized, tokens_of, with_end_point
from .transfer import transfer
from .work import (
    Part,
    as_worker,
    deadline,
    hours_left,
    say_what_is_missing,
    share_out,
    start_worker,
)


@dataclass(frozen=True)
class ArenaPart(Part):
    """The work of one certificate."""

    layout: Layout | None = None

    def state(self) -> Arena:
        assert self.layout is not None
        return Arena(self.layout, self.design, self.queue.results())


class Measurement:
    """The measurement of a plan, which can be stopped and continued.

    Args:
        training_plan: name or file.
        exp: the baseline. Default: that of the experiment file that lists KNOWN_HARMFUL.
        larger: the next larger plan, for the line on transfer.
        out, storage, workers, threads, log, command: as in :class:`lmplay.Trial`.

    Raises:
        LmplayError: a name is unknown, or the plan does not suit.
    """

    def __init__(
        self,
        training_plan: str,
        *,
        exp: str | None = None,
        larger: str | None = None,
        device: str = "auto",
        amp: bool = False,
        mini_batch_size: int = 8,
        out: Path | str = "gpt_out",
        storage: str | None = None,
        workers: int = 1,
        threads: int | None = None,
        log: Callable[[str], None] = print,
        command: tuple[str, ...] = (),
        max_hours: float | None = None,
    ):
        self.until = deadline(max_hours)
        self.arguments = {
            "training_plan": training_plan,
            "exp": exp,
            "device": device,
            "amp": amp,
            "mini_batch_size": mini_batch_size,
            "out": str(out),
            "storage": storage,
        }
        self.path = find_plan(training_plan)
        self.larger = find_plan(larger) if larger else None
        self.out = Path(out)
        self.workers = workers
        self.log = log
        memory = tune_memory()
        self.threads = threads or given() or max(1, torch.get_num_threads() // workers)
        torch.set_num_threads(self.threads)
        make_out(self.out)
        design = Design(
            exp=(),
            training_plan=training_plan,
            max_pairs=PAIRS,
            device=device,
            amp=amp,
            mini_batch_size=mini_batch_size,
        )
        self.answers = known_answers(exp)
        self.part = self._part(design, storage, command, memory)

    def _part(
        self, design: Design, storage: str | None, command: tuple[str, ...], memory: str
    ) -> ArenaPart:
        source, variant = find(self.answers.baseline)
        baseline = load(source, variant)
        plan = load_plan(self.path)
        job = job_for(design, baseline, self.path.stem, plan, self.out, command, memory)
        self.plan = plan.for_precision(job.device.type, job.precision.name)
        tokens = tokens_of(self.plan, f"{self.path}: an arena")
        plan, last = with_end_point(self.plan, tokens)
        job = replace(job, plan=plan)
        with job.reporter:
            prepared = prepare(plan, job.reporter.preparing)
            tables = table_losses(plan, prepared, plan.model.max_len or 0, job.reporter.preparing)
        recipes, arms = recipes_of(plan, baseline)
        widths = widths_of(plan, self.path, baseline)
        arms += [*widths.values(), Arm(baseline, {})]
        arms += [
            Arm(load(self.answers, name), {})
            for name in (*self.answers.harmful, *self.answers.equal)
        ]
        jobs = {arm.label: job.with_arm(arm.experiment, arm.settings) for arm in arms}
        layout = Layout(
            variant,
            recipes,
            {multiple: arm.label for multiple, arm in widths.items()},
            self.answers.harmful,
            self.answers.equal,
            tables.losses,
        )
        fixed = FixedDesign(
            plan=self.path.stem,
            plan_fingerprint=plan.fingerprint,
            against=variant,
            arms=tuple(name for name in jobs if name != variant),
            level=design.level,
            max_pairs=PAIRS,
            smallest_effect=design.smallest_effect,
            tuned=False,
            controls=(),
            tokens=tokens,
            precision=job.precision.name,
            device=job.device.type,
            data=prepared.fingerprint,
            sources={name: source_digest(j.experiment.source.path) for name, j in jobs.items()},
            last=last,
        )
        name = f"{fixed.plan}-{fixed.plan_fingerprint[:6]}-{fixed.precision}"
        folder = self.out / "arenas" / name
        queue = Queue(open_storage(storage or str(folder / "journal.log")), name, fixed)
        self.machine = f"{describe_device(job.device)}, torch {torch.__version__}"
        return ArenaPart(queue, fixed, jobs, folder, layout=layout)

    def run(self) -> Certificate:
        """Make the missing runs, and write and return the certificate.

        Raises:
            lmplay.training.loop.Stopped: a signal asked for it; the same call continues.
        """
        parts = [self.part]
        share_out(parts, self.workers, self.start_worker, self.threads, self.log, self.until)
        say_what_is_missing(parts, self.until, self.log)
        return self.write()

    def start_worker(self) -> subprocess.Popen[bytes]:
        own = {"threads": self.threads, "max_hours": hours_left(self.until)}
        return start_worker(__name__, {**self.arguments, **own}, self.threads)

    def certificate(self) -> Certificate:
        """Return what the runs so far say."""
        lines = {line.name: line for line in self.part.state().measured()}
        records = {name: LineRecord.model_validate(as_json(line)) for name, line in lines.items()}
        records["transfer"] = transfer(self.out, self.path.stem, self.larger)
        sensitivity = as_json(lines["sensitivity"])
        known = as_json(lines["known answers"])
        return Certificate(
            plan=plan_print(self.plan),
            arena=recipe.arena_fingerprint(self.plan),
            baseline=self.part.design.against,
            baseline_source=self.part.design.sources[self.part.design.against],
            date=date.today().isoformat(),
            machine=self.machine,
            device=self.part.design.device,
            precision=self.part.design.precision,
            tokens=self.part.design.tokens,
            minutes_per_run=sensitivity.get("minutes_per_run"),
            smallest_gain=sensitivity.get("smallest_gain"),
            smallest_gain_unlike=known.get("smallest_gain_unlike"),
            deviation_paired=sensitivity.get("deviation_paired"),
            lines={name: records[name] for name in LINES},
        )

    def write(self) -> Certificate:
        """Write the certificate of the runs so far and return it."""
        found = self.certificate()
        self.log(f"certificate: {write_certificate(self.path, found)}")
        return found


def known_answers(exp: str | None) -> ExperimentFile:
    """Return the experiment file with known answers for a baseline.

    Raises:
        LmplayError: there is none.
    """
    files = [s for s in list_sources() if s.harmful and s.equal and not s.broken]
    by_baseline = {s.baseline: s for s in reversed(files)}
    if exp is None and files:
        return files[0]
    if exp not in by_baseline:
        hint = did_you_mean(exp or "", by_baseline)
        raise LmplayError(
            f"--exp {exp}: no experiment file lists KNOWN_HARMFUL and KNOWN_EQUAL for this "
            f"baseline{hint}; docs/arenas.md says what they are"
        )
    return by_baseline[exp]


def recipes_of(plan: Plan, baseline: Experiment) -> tuple[tuple[Recipe, ...], list[Arm]]:
    """Return the plan's recipe and its contexts', and the arms that measure them.

    A context with the settings of another recipe is that recipe, and is not measured twice.
    """
    arms: dict[str, Arm] = {}
    recipes: dict[str, Recipe] = {}
    for name, own in {"the plan's recipe": {}, **plan.contexts}.items():
        arm = _arm(baseline, own)
        if arm.label in recipes:
            continue
        optimizer = recipe.apply(plan, own, f"context {name}:").optimizer
        decay = getattr(optimizer, "weight_decay", 0.0)  # plugins' may have none
        decays = {}
        for m in DECAY_MULTIPLIERS if decay else ():
            value = {} if m == 1 else {"optimizer.weight_decay": decay * m}
            other = _arm(baseline, {**own, **value})
            decays[m] = other.label
            arms[other.label] = other
        arms[arm.label] = arm
        recipes[arm.label] = Recipe(name, arm.label, decays)
    return tuple(recipes.values()), list(arms.values())


def widths_of(plan: Plan, path: Path, baseline: Experiment) -> dict[float, Arm]:
    """Return the baseline's arm for each multiple of the plan's width."""
    found = {}
    for multiple in WIDTHS:
        width = resized(plan, multiple, path).model.embed_dim
        found[multiple] = _arm(baseline, {} if multiple == 1 else {"model.embed_dim": width})
    return found


def _arm(experiment: Experiment, settings: Mapping[str, Any]) -> Arm:
    text = {k: v if isinstance(v, str) else json.dumps(v) for k, v in settings.items()}
    return Arm(experiment, dict(sorted(text.items())))


def main() -> int:
    """Share the runs of a measurement as a worker that another process started."""
    arguments = json.loads(sys.argv[1])

    def run() -> None:
        measurement = Measurement(**arguments, log=lambda text: None)
        share_out(
            [measurement.part],
            1,
            measurement.start_worker,
            measurement.threads,
            measurement.log,
            measurement.until,
        )

    return as_worker(run)


if __name__ == "__main__":
    sys.exit(main())
