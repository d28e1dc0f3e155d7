"""Run a trial: look up the names in its design, work through its queue, and report.

python -m lmplay.trial.runner JSON      # how a trial starts its other workers
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from ..analysis.sensitivity import draw_sensitivity
from ..devices import tune_memory
from ..errors import LmplayError
from ..files import write_json
from ..threads import given
from ..training.run_folder import make_out
from .design import Design, FixedDesign
from .overview import over_contexts, over_sizes
from .queue import Queue, open_storage
from .resolve import check, contexts_of, quoted, resolve
from .statistics import fewest
from .work import (
    Part,
    as_worker,
    deadline,
    hours_left,
    say_what_is_missing,
    share_out,
    start_worker,
)


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
        max_hours: after them the trial stops, with what it knows. The same call continues it.

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
        max_hours: float | None = None,
    ):
        self.until = deadline(max_hours)
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
        share_out(self.parts, self.workers, self._start_worker, self.threads, self.log, self.until)
        say_what_is_missing(self.parts, self.until, self.log)
        return self._report()

    def _start_worker(self) -> subprocess.Popen[bytes]:
        arguments = {
            "design": asdict(self.design),
            "out": str(self.out),
            "name": self.name,
            "storage": self.storage,
            "threads": self.threads,
            "command": self.command,
            "max_hours": hours_left(self.until),
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


def main() -> int:
    """Run a trial as a worker that another process started."""
    arguments = json.loads(sys.argv[1])
    fields = arguments.pop("design")
    lists = {key: tuple(value) for key, value in fields.items() if isinstance(value, list)}
    arguments["command"] = tuple(arguments["command"])
    return as_worker(lambda: Trial(Design(**{**fields, **lists}), **arguments).run())


if __name__ == "__main__":
    sys.exit(main())
