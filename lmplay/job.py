"""From what a command asks for to a run: the model's size, its control, its folder, its provenance, its training."""

from __future__ import annotations

import math
import sys
import uuid
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from . import __version__, initial, loggers
from .api import Batch
from .data.packing import mixtures
from .data.shards import Prepared
from .devices import Precision, describe_device
from .discover import Experiment, find_baseline, load
from .errors import LmplayError, first_line
from .files import write_text
from .match import Match, Size, beside, match, measure
from .plan import Plan
from .probe import autocast, to_batch
from .report import Report
from .restore import Restored, locate, restore
from .runs import RUN_FILE, RunFolder, folder_name, git_state, identity, make_out, source_digest
from .trainer import Options, Start, Stopped, Trainer

MEASURED = 4  # sequences at most with which a model's cost is measured


@dataclass(frozen=True)
class Request:
    """How a run is to be carried out, as far as neither plan nor experiment say it."""

    out: Path = Path("gpt_out")
    seed: int | None = None
    tokens: int | None = None
    steps: int | None = None
    minutes: float | None = None
    mini_batch_size: int | None = None
    compile_model: bool = False
    save_minutes: float = 5.0
    fresh: bool = False
    no_dirty: bool = False
    initial_model: Path | None = None
    freeze: tuple[str, ...] = ()
    train_only: tuple[str, ...] = ()
    log: str | None = None  # a tracker's name
    command: tuple[str, ...] = ()
    memory: str = ""  # what devices.tune_memory said


@dataclass(frozen=True)
class Job:
    """One experiment on one plan: all that a run needs but the data."""

    experiment: Experiment
    overrides: dict[str, str]
    plan_name: str
    plan: Plan  # its budgets are the request's where that has any
    device: torch.device
    precision: Precision
    report: Report
    request: Request

    @property
    def seed(self) -> int:
        return self.plan.seed if self.request.seed is None else self.request.seed


def sized_config(job: Job, vocab: int) -> Any:
    """The experiment's Config at the plan's sizes."""
    config, without = job.experiment.config({**job.plan.sizes(), "vocab_size": vocab}, job.overrides)
    if without:
        job.report.note(f"{job.experiment.variant} has no {', '.join(without)}: the plan's is not used")
    return config


def sample_batch(job: Job, config: Any, prepared: Prepared) -> tuple[Batch, int]:
    """Real sequences to measure a model's cost with, and how many such passes an optimizer step has.

    What is shared by a mini-batch, as UE's distinct tokens, is counted as in one of so many sequences as were asked
    for, and of four at most: measuring takes no more memory than training.
    """
    whole = job.plan.batch.batch_size
    size = min(job.request.mini_batch_size or 1, MEASURED, whole)
    arrays = mixtures(job.plan, prepared, config.max_len)[0].batch(0, size)
    return to_batch(arrays, slice(None), job.device), math.ceil(whole / size)


def baseline_job(job: Job) -> Job:
    """The job's baseline on the same plan.

    Raises:
        LmplayError: there is no such experiment.
    """
    return replace(job, experiment=load(*find_baseline(job.experiment.source)), overrides={})


def run_folder(job: Job, settings: dict[str, str]) -> RunFolder:
    """Where the job's run lies: settings, and how it was budgeted and begun, are in the name."""
    asked = job.request
    budgets = ((asked.tokens, "tokens"), (asked.steps, "steps"), (asked.minutes, "min"))
    extras = [f"{value:g}{unit}" if unit == "min" else f"{value}{unit}" for value, unit in budgets if value]
    extras += [job.precision.name] if job.precision.name != "fp32" else []
    extras += [f"from={asked.initial_model.resolve().name}"] if asked.initial_model else []
    extras += [f"freeze={p}" for p in asked.freeze] + [f"train_only={p}" for p in asked.train_only]
    return RunFolder(asked.out / job.plan_name / folder_name(job.experiment.variant, settings, extras, job.seed))


def recorded(folder: RunFolder) -> dict[str, Any]:
    """What the folder's run.json says, or nothing where there is none."""
    return folder.read() if (folder.path / RUN_FILE).exists() else {}


def matched(job: Job, config: Any, what: str, prepared: Prepared) -> tuple[Job, Any, Match]:
    """The job that trains the baseline at the experiment's size, its Config, and how it was found.

    A run that is there already keeps the size it began with, as long as the code of both is the same.

    Raises:
        LmplayError: the experiment is the baseline.
    """
    source = job.experiment.source
    if job.experiment.variant == source.baseline:
        raise LmplayError(f"--match: {source.baseline} is its own baseline; --exp names what it is matched to")
    to = "-".join([job.experiment.variant, *(f"{k}={v}" for k, v in sorted(job.overrides.items()))])
    plain = baseline_job(job)
    known = {} if job.request.fresh else recorded(run_folder(plain, {f"match_{what}": to}))
    digest = "-".join(source_digest(path) for path in {source.path: 0, plain.experiment.source.path: 0})
    if "match" in known and known["match"].get("of") == digest:
        found = Match(**known["match"])
    else:
        job.report.note(f"looking for the size of {source.baseline} that matches {to} ...")
        wanted = size_of(job, config, prepared)
        base_config = sized_config(plain, prepared.tokenizer.vocab_size)
        found = replace(match(wanted, to, plain.experiment, base_config, what, job.device), of=digest)
    job.report.note(found.sentence())
    chosen = replace(plain, overrides={found.field: str(found.value)})
    return chosen, sized_config(chosen, prepared.tokenizer.vocab_size), found


class Run:
    """A job with its data: the folder it stands for and the trainer that fills it.

    Raises:
        LmplayError: the tree is not clean where that was asked for, or a pattern of parameters matches none.
    """

    def __init__(self, job: Job, config: Any, prepared: Prepared, match: Match | None = None):
        self.job, self.config, self.prepared, self.match = job, config, prepared, match
        asked = job.request
        self.commit, self.diff = git_state(Path.cwd())
        if asked.no_dirty and self.commit is None:
            raise LmplayError("--no-dirty: there is no git commit here that the tree could be compared with")
        if asked.no_dirty and self.diff:
            raise LmplayError(
                "--no-dirty: the tree has uncommitted changes (git status shows them); commit or stash them"
            )
        self.runner = job.experiment.runner(config)
        if asked.freeze or asked.train_only:
            with torch.device("meta"):  # a wrong pattern is told before a folder is made
                initial.freeze(self.runner.build(), asked.freeze, asked.train_only)
        self.folder = run_folder(job, {f"match_{match.what}": match.to} if match else job.overrides)
        self.identity = identity(
            job.plan, job.experiment, config, job.seed, job.precision.name,
            prepared.tokenizer.fingerprint, prepared.fingerprint,
        )  # fmt: skip
        if asked.freeze or asked.train_only:
            self.identity["frozen"] = [list(asked.freeze), list(asked.train_only)]
        self.initial = self._initial()

    def _initial(self) -> Restored | None:
        """The trained run to start from. One that has begun needs it no more, and it may have trained on since."""
        job, asked = self.job, self.job.request
        if asked.initial_model is None:
            return None
        known = {} if asked.fresh else recorded(self.folder)
        same = known.get("initial_model") == str(asked.initial_model.resolve())
        if same and any(self.folder.checkpoints.glob("[0-9]*")):
            self.identity["initial"] = known["identity"]["initial"]
            return None
        source = restore(*locate(asked.initial_model, asked.out, job.report.note, "--initial-model"))
        initial.check_tokenizer(source, self.prepared.tokenizer.fingerprint)
        self.identity["initial"] = source.found.fingerprint
        return source

    def trainer(self) -> Trainer:
        job, options = self.job, Options(self.job.request.compile_model, self.job.request.save_minutes)
        return Trainer(
            job.plan, self.prepared, self.runner, job.seed, job.device, job.precision, self.folder, job.report,
            options, Start(self.initial, self.job.request.freeze, self.job.request.train_only),
        )  # fmt: skip

    def train(self) -> dict[str, Any]:
        """Train, or go on with, the run; returns its summary, that of a finished one at once.

        Raises:
            Stopped: a signal asked to; everything is saved.
            LmplayError: the folder is another run's, or cannot be written.
        """
        report, folder = self.job.report, self.folder
        if self.job.request.log:
            loggers.check(self.job.request.log)
        new = self.job.request.fresh or not recorded(folder)
        size = sizes(self.job, self.config, self.prepared) if new else {}  # before a folder is made, or memory taken
        make_out(self.job.request.out)
        try:
            exists = folder.open(self.identity, self.job.request.fresh)
            report.log_to(folder.path / "log.txt")
            known = folder.read() if exists else {}
            if known.get("summary"):
                report.note(f"{folder.path} is finished; --fresh trains it again")
                return known["summary"]
            with report:
                try:
                    trainer = self._begin(known, size)
                    self._open_logger(trainer.place.step)
                    folder.update(**trainer.prepare(self.job.request.mini_batch_size, known))
                    summary = trainer.train()
                except Stopped as e:
                    report.note(f"{e}; saved at step {trainer.place.step}. The same command goes on from there.")
                    raise
            folder.update(summary=summary)
            report.note(f"finished: {folder.path}")
            return summary
        finally:
            report.close_loggers()
            report.log_to(None)
            folder.close()

    def _open_logger(self, step: int) -> None:
        """The tracker that was asked for; the run keeps one identity in it, however often it is resumed."""
        report, asked = self.job.report, self.job.request
        if asked.log is None:
            return
        record = self.folder.read()
        if "log_id" not in record:
            self.folder.update(log_id=uuid.uuid4().hex[:12])
            record = self.folder.read()
        config = {k: v for k, v in record["identity"].items() if k != "config"} | dict(record["identity"]["config"])
        path, plan = self.folder.path, self.job.plan_name
        try:
            logger = loggers.open_logger(asked.log, path, plan, record["log_id"], config, step)
        except Exception as e:  # each tracker has errors of its own
            raise LmplayError(f"--log {asked.log}: it could not begin: {first_line(e)}") from e
        report.loggers.append(logger)
        report.note(f"logged to {logger.where}")

    def _begin(self, known: dict[str, Any], size: dict[str, Any]) -> Trainer:
        """The trainer, where the run stands; a new run's folder is filled. `known` is run.json, if there is one."""
        job, report = self.job, self.job.report
        where = f"seed {job.seed}, {describe_device(job.device)}, {job.precision.name}"
        report.note(f"{job.experiment.variant} on {job.plan_name}, {where}")
        notes = self.runner.notes(job.device)
        for line in notes:
            report.note(line)
        trainer = self.trainer()
        if not known:
            content = {
                "identity": self.identity,
                **provenance(job, self.match, self.initial, self.commit, self.diff, notes),
                **size,
            }
            if self.diff:  # before run.json, which says that there is one
                write_text(self.folder.path / "uncommitted.diff", self.diff)
            self.folder.create(content, job.experiment, self.prepared.tokenizer)
        elif known.get("threads") != torch.get_num_threads():
            report.note(f"this run began with {known.get('threads')} threads: equal from here on but for rounding")
        if known and known.get("compiled") != job.request.compile_model:
            report.note("this run began " + ("compiled" if known.get("compiled") else "without --compile-model"))
        if trainer.resume():
            report.note(f"resuming {self.folder.path} at step {trainer.place.step}, {trainer.place.tokens} tokens")
        self.initial = None  # its memory is not needed any more
        return trainer


def provenance(
    job: Job, match: Match | None, source: Restored | None, commit: str | None, diff: str | None, notes: list[str]
) -> dict[str, Any]:
    """What run.json says about where a run comes from."""
    told: dict[str, Any] = {
        "plan_name": job.plan_name,
        "plan": job.plan.model_dump(mode="json", by_alias=True),
        "baseline": job.experiment.source.baseline,
        "idea": job.experiment.source.idea,
        "overrides": job.overrides,
        "command": list(job.request.command),
        "device": describe_device(job.device),
        "memory": job.request.memory,
        "versions": {"lmplay": __version__, "torch": torch.__version__, "python": sys.version.split()[0]},
        "threads": torch.get_num_threads(),
        "compiled": job.request.compile_model,
        "notes": notes,
        "git": {"commit": commit, "dirty": bool(diff)},
    }
    # What comparisons call it, where it is not simply its variant: or it would pass for another seed of that.
    label = job.experiment.variant
    if match is not None:
        told["match"] = asdict(match)
        label += f", {match.what} of {match.to}"
    if source is not None and job.request.initial_model is not None:
        told["initial_model"] = str(job.request.initial_model.resolve())
        label += f", from {source.experiment.variant}"
    for title, patterns in (("without", job.request.freeze), ("only", job.request.train_only)):
        label += f", {title} {' '.join(patterns)}" if patterns else ""
    if label != job.experiment.variant:
        told["label"] = label
    return told


def size_of(job: Job, config: Any, prepared: Prepared) -> Size:
    """What the job's model costs."""
    with autocast(job.device, job.precision):
        return measure(job.experiment.runner(config), *sample_batch(job, config, prepared))


def sizes(job: Job, config: Any, prepared: Prepared) -> dict[str, Any]:
    """What the model costs, for run.json; said aloud beside the baseline's where it has another one's."""
    own = size_of(job, config, prepared)
    try:
        if job.experiment.variant != job.experiment.source.baseline:
            base = baseline_job(job)
            base_config = sized_config(base, prepared.tokenizer.vocab_size)
            base_size = size_of(base, base_config, prepared)
            job.report.note(beside(own, base_size, job.experiment.source.baseline))
    except LmplayError as e:
        job.report.note(f"not compared with its baseline: {e}")
    except torch.OutOfMemoryError:
        job.report.note("not compared with its baseline, which does not fit into the device's memory")
    return {"sizes": asdict(own)}
