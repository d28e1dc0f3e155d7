"""Run a study: a grid, a list or a search of settings, shared and resumed like a trial.

python -m lmplay.trial.study JSON      # how a study starts its other workers

One module, because what runs next depends on what the results say.
"""

from __future__ import annotations

import hashlib
import json
import math
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..data.prepare import prepare
from ..devices import pick_device, pick_precision, tune_memory
from ..discover import source_digest
from ..errors import LmplayError
from ..files import write_json
from ..plan import Plan, find_plan, load_plan
from ..threads import given
from ..training.run_folder import make_out
from .design import Design, FixedDesign, Result, Results, Unit
from .queue import Queue, open_storage
from .resolve import Arm, job_for, tokens_of, with_end_point
from .study_plan import Range, distribution_of, find_study, load_study, shown
from .tuning import parsed
from .work import (
    Part,
    as_worker,
    deadline,
    hours_left,
    say_what_is_missing,
    share_out,
    start_worker,
)

ROUND = 4  # tries that a search makes without waiting for one another
FREE = 10  # tries of a TPE search that do not depend on earlier ones


@dataclass(frozen=True)
class StudyDesign(FixedDesign):
    """What a study fixes in one arena.

    length: of sequences; 0: the plan's own. space: by setting, the values or the range of a search.
    cells: by arm, its settings in a grid.
    """

    length: int = 0
    search: str = "grid"
    tries: int = 0
    seeds: tuple[int, ...] = (0,)
    accuracy: bool = False
    space: dict[str, Any] = field(default_factory=dict)
    cells: dict[str, dict[str, str]] = field(default_factory=dict)


@dataclass(frozen=True)
class StudyPart(Part):
    """The runs of a study in one arena."""

    def state(self) -> StudyState:
        assert isinstance(self.design, StudyDesign)
        return StudyState(self.design, self.queue.results())


class StudyState:
    """What the runs of one arena say so far, and which come next."""

    def __init__(self, design: StudyDesign, results: Results):
        self.design = design
        self.results = results

    def units(self, arm: str, settings: str = "") -> list[Unit]:
        """Return the runs of one cell."""
        return [Unit("study", arm, seed, settings=settings) for seed in self.design.seeds]

    def found(self, arm: str, settings: str = "") -> list[Result] | None:
        """Return the results of a cell, one per seed; None if one is missing."""
        keys = [unit.key for unit in self.units(arm, settings)]
        return [self.results[k] for k in keys] if all(k in self.results for k in keys) else None

    def needed(self) -> list[Unit]:
        """Return the runs to make next; [] when the study is over."""
        if self.design.search == "grid":
            cells = [u for arm in self.design.cells for u in self.units(arm)]
        else:
            (arm,) = self.design.cells
            cells = [u for text in self.tries() for u in self.units(arm, text)]
        return [unit for unit in cells if unit.key not in self.results]

    def tries(self) -> list[str]:
        """Return the settings of a search to try, by the results so far, as a unit keeps them.

        The sampler is seeded and gets the results in a fixed order. So all workers ask alike.
        """
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        design = self.design
        (arm,) = design.cells
        sampler: optuna.samplers.BaseSampler = (
            optuna.samplers.RandomSampler(seed=0)
            if design.search == "random"
            else optuna.samplers.TPESampler(seed=0, n_startup_trials=FREE)
        )
        study = optuna.create_study(sampler=sampler)
        space = {key: distribution_of(value) for key, value in design.space.items()}
        size = design.tries if design.search == "random" else ROUND
        texts: list[str] = []
        while len(texts) < design.tries:
            count = FREE if design.search == "tpe" and not texts else size
            asked = [study.ask(space) for _ in range(min(count, design.tries - len(texts)))]
            round_texts = [
                ",".join(f"{key}={shown(value)}" for key, value in sorted(trial.params.items()))
                for trial in asked
            ]
            texts += round_texts
            for trial, text in zip(asked, round_texts, strict=True):
                found = self.found(arm, text)
                if found is None:
                    return texts
                study.tell(trial, min(_mean(found), 1e3))
        return texts

    def report(self) -> dict[str, Any]:
        """Return every finished cell, the best first; `number` is when it was tried."""
        design = self.design
        if design.search == "grid":
            cells = [(arm, "", settings) for arm, settings in design.cells.items()]
        else:
            (arm,) = design.cells
            texts = dict.fromkeys(self.tries())
            cells = [(arm, text, {**design.cells[arm], **parsed(text)}) for text in texts]
        rows: list[dict[str, Any]] = []
        for number, (arm, text, settings) in enumerate(cells):
            found = self.found(arm, text)
            if found is None:
                continue
            loss = _mean(found)
            accuracies = [r.accuracy for r in found if r.accuracy is not None]
            rows.append(
                {
                    "arm": arm,
                    "number": number,
                    "settings": settings,
                    "loss": loss if math.isfinite(loss) else None,
                    "accuracy": sum(accuracies) / len(found) if accuracies else None,
                    "seconds": sum(r.seconds for r in found) / len(found),
                    "folder": found[0].folder,
                }
            )
        rows.sort(key=lambda row: math.inf if row["loss"] is None else row["loss"])
        return {
            "plan": design.plan,
            "length": design.length,
            "score": "accuracy" if design.accuracy else "loss",
            "search": design.search,
            "space": design.space,
            "missing": len(self.needed()),
            "cells": rows,
        }


class Study:
    """A study of settings, which can be stopped and continued.

    Args:
        study: name or file.
        out, storage, workers, threads, log, command, max_hours: as in :class:`lmplay.Trial`.

    Raises:
        LmplayError: a name is unknown, or values do not fit together.
    """

    def __init__(
        self,
        study: str,
        *,
        device: str = "auto",
        amp: bool = False,
        mini_batch_size: int = 4,
        out: Path | str = "gpt_out",
        storage: str | None = None,
        workers: int = 1,
        threads: int | None = None,
        create: bool = True,
        log: Callable[[str], None] = print,
        command: tuple[str, ...] = (),
        max_hours: float | None = None,
    ):
        self.until = deadline(max_hours)
        self.arguments = {
            "study": study,
            "device": device,
            "amp": amp,
            "mini_batch_size": mini_batch_size,
            "out": str(out),
            "storage": storage,
        }
        self.path = find_study(study)
        self.plan = load_study(self.path)
        self.out = Path(out)
        self.folder = self.out / "studies" / self.path.stem
        self.workers = workers
        self.log = log
        self.create = create
        memory = tune_memory()
        self.threads = threads or given() or max(1, torch.get_num_threads() // workers)
        torch.set_num_threads(self.threads)
        if create:
            make_out(self.out)
        self.parts: list[StudyPart] = []
        for name in self.plan.training_plans:
            plan_path = _beside(self.path, name)
            for length, plan in self.plan.arenas(load_plan(plan_path), str(self.path)):
                design = Design(exp=(), device=device, amp=amp, mini_batch_size=mini_batch_size)
                self.parts.append(
                    self._part(design, plan_path, length, plan, storage, command, memory)
                )

    def _part(
        self,
        design: Design,
        path: Path,
        length: int,
        plan: Plan,
        storage: str | None,
        command: tuple[str, ...],
        memory: str,
    ) -> StudyPart:
        """Return the runs in one arena: a plan with one length of sequences."""
        device = pick_device(design.device)
        precision = pick_precision(device, design.amp)
        plan = plan.for_precision(device.type, precision.name)
        tokens = tokens_of(plan, f"{path}: a study", '; "tokens" in the study gives one')
        plan, last = with_end_point(plan, tokens)
        arms = []
        for text in self.plan.arms:
            base = Arm.parse(text, f"{self.path}: arms")
            for settings in self.plan.combinations() if self.plan.search == "grid" else ({},):
                arms.append(
                    Arm(base.experiment, dict(sorted({**base.settings, **settings}.items())))
                )
        cells = {arm.label: arm.settings for arm in arms}
        shared = job_for(design, arms[0].experiment, path.stem, plan, self.out, command, memory)
        jobs = {arm.label: shared.with_arm(arm.experiment, arm.settings) for arm in arms}
        for job in jobs.values():  # a wrong setting is an error now, not after an hour
            job.experiment.config({**job.plan.sizes(), "vocab_size": 2**15}, job.overrides)
        with shared.reporter:
            prepared = prepare(plan, shared.reporter.preparing)
        searched = self.plan.search != "grid"
        fixed = StudyDesign(
            plan=path.stem,
            plan_fingerprint=plan.fingerprint,
            against="",
            arms=tuple(jobs),
            level=design.level,
            max_pairs=0,
            smallest_effect=design.smallest_effect,
            tuned=False,
            controls=(),
            tokens=tokens,
            precision=precision.name,
            device=device.type,
            data=prepared.fingerprint,
            sources={arm.label: source_digest(arm.experiment.source.path) for arm in arms},
            last=last,
            length=length,
            search=self.plan.search,
            tries=self.plan.tries if searched else 0,
            seeds=tuple(self.plan.seeds),
            accuracy=plan.validation.solved is not None,
            space={k: _plain(v) for k, v in self.plan.settings.items()} if searched else {},
            cells=cells,
        )
        # An edited study has a new journal. Its finished runs are found again in their folders.
        digest = hashlib.sha256(json.dumps(asdict(fixed), sort_keys=True).encode()).hexdigest()[:6]
        where = path.stem + (f"-{length}" if length else "")
        name = f"{self.path.stem}-{where}-{digest}"
        folder = self.folder / where
        journal = folder / f"journal-{digest}.log"
        if not self.create and not storage and not journal.exists():
            raise LmplayError(
                f"{self.out} has no runs of this version of the study {self.path.stem}; without "
                "--status it begins"
            )
        queue = Queue(open_storage(storage or str(journal)), name, fixed, create=self.create)
        return StudyPart(queue, fixed, jobs, folder)

    def run(self) -> dict[str, Any]:
        """Make the missing runs and return the report.

        Raises:
            lmplay.training.loop.Stopped: a signal asked for it; the same call continues.
        """
        share_out(self.parts, self.workers, self.start_worker, self.threads, self.log, self.until)
        say_what_is_missing(self.parts, self.until, self.log)
        return self.write()

    def start_worker(self) -> subprocess.Popen[bytes]:
        own = {"threads": self.threads, "max_hours": hours_left(self.until)}
        return start_worker(__name__, {**self.arguments, **own}, self.threads)

    def write(self) -> dict[str, Any]:
        """Write study.json and the pictures of the runs so far, and return the report."""
        from ..analysis.study_figures import draw_study

        parts = [part.state().report() for part in self.parts]
        if self.plan.by_position:
            self._measure_positions(parts)
        report = {"study": self.path.stem, "description": self.plan.description, "parts": parts}
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(self.folder / "study.json", report, sealed=True)
        report["pictures"] = [str(path) for path in draw_study(self.folder, report)]
        return report

    def _measure_positions(self, parts: list[dict[str, Any]]) -> None:
        """Add the loss by position to each cell, of its first seed."""
        from .positions import losses_of_run

        for part in parts:
            if part["score"] == "loss":
                for cell in part["cells"]:
                    cell["by_position"] = losses_of_run(Path(cell["folder"]))


def _beside(study: Path, name: str) -> Path:
    """Return a plan's file; a relative path starts at the study's folder."""
    if name.endswith(".json") and not Path(name).is_absolute():
        return find_plan(str(study.parent / name))
    return find_plan(name)


def _plain(value: Any) -> Any:
    return value.model_dump() if isinstance(value, Range) else list(value)


def _mean(results: list[Result]) -> float:
    return sum(r.loss for r in results) / len(results)


def main() -> int:
    """Share the runs of a study as a worker that another process started."""
    arguments = json.loads(sys.argv[1])

    def run() -> None:
        study = Study(**arguments, log=lambda text: None)
        share_out(study.parts, 1, study.start_worker, study.threads, study.log, study.until)

    return as_worker(run)


if __name__ == "__main__":
    sys.exit(main())
