"""A run from request to summary: its job, size, control, folder, provenance and training.

One module, because the steps share the job, the config and the folder, in this order.
"""

from __future__ import annotations

import math
import sys
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from .. import __version__, recipe
from ..adapt import Adaptation
from ..api import Batch
from ..classification.report import PREDICTIONS
from ..data.counting import LARGEST_VOCABULARY, standing, table_losses
from ..data.prepare import Prepared, prepare
from ..data.stages import stages
from ..devices import Precision, describe_device, pick_device, pick_precision
from ..discover import Experiment, find, find_baseline, load, source_digest
from ..errors import LmplayError, first_line
from ..files import write_text
from ..model import autocast, to_batch
from ..plan import ModelSizes, Plan, find_plan, load_plan
from ..pretrained.library import is_pretrained
from ..pretrained.source import Pretrained
from ..threads import Share
from . import loggers, stream, warm_start
from .extend import Extended, find_shorter
from .loop import Options, Start, Stopped, Trainer
from .match import Match, Size, compare_sizes, match, measure
from .progress import Reporter
from .restore import locate, restore
from .run_folder import (
    RUN_FILE,
    RunFolder,
    folder_name,
    git_state,
    identity,
    make_out,
    safe_name,
)

DEFAULT_PLAN = "laptop"  # on every device; it downloads nothing
MAX_MEASURED = 4  # sequences with which a model's cost is measured


@dataclass(frozen=True)
class RunOptions:
    """How a run is executed, besides plan and experiment."""

    out: Path = Path("gpt_out")
    seed: int | None = None  # default: the plan's
    tokens: int | None = None  # budgets instead of the plan's
    steps: int | None = None
    minutes: float | None = None
    mini_batch_size: int | None = None  # default: the fastest is searched
    compile_model: bool = False
    save_minutes: float = 5.0
    fresh: bool = False  # move an existing run aside
    extend: bool = False  # continue a finished run that has a smaller budget
    no_dirty: bool = False  # refuse to run with uncommitted changes
    initial_model: Path | str | None = None  # a run's folder, or hf:... or gguf:...
    trust: bool = False  # execute the source in the folder of initial_model, wherever it is from
    freeze: tuple[str, ...] = ()
    train_only: tuple[str, ...] = ()
    log: str | None = None  # name of a tracker
    command: tuple[str, ...] = ()  # for run.json
    memory: str = ""  # result of devices.tune_memory
    threads: int | None = None  # default: OMP_NUM_THREADS, or a share of the cores
    until: float | None = None  # seconds since 1970, when the run is stopped as by SIGTERM
    divide_cores: bool = True  # with other processes that train; False: threads stay as they are


@dataclass(frozen=True)
class Job:
    """One experiment on one plan: all that a run needs but the data."""

    experiment: Experiment
    overrides: dict[str, str]
    plan_name: str
    plan: Plan  # with the options' budgets, and the settings of the experiment and the overrides
    device: torch.device
    precision: Precision
    reporter: Reporter
    options: RunOptions = field(default_factory=RunOptions)
    base_plan: Plan | None = None  # without those settings; None: the same

    def with_arm(self, experiment: Experiment, overrides: Mapping[str, str]) -> Job:
        """Return the job of another arm in the same arena.

        Raises:
            LmplayError: a setting of the recipe is unknown, or does not fit.
        """
        base = self.base_plan or self.plan
        plan = recipe.apply(base, experiment.recipe, f"variant {experiment.variant}:")
        plan = recipe.apply(plan, recipe.split(overrides)[1], "--set")
        adaptation = Adaptation.of(plan.model_dump(include={"classify", "model"}))
        return replace(
            self,
            experiment=replace(experiment, adaptation=adaptation),
            overrides=dict(overrides),
            plan=plan,
            base_plan=base,
        )

    @property
    def initial_model(self) -> Path | str | None:
        """The run or the pretrained model that the run starts from."""
        return self.options.initial_model or self.plan.initial_model

    def pretrained(self) -> Pretrained | None:
        """Return the pretrained model whose sizes the model has."""
        model = self.initial_model
        return Pretrained(str(model)) if is_pretrained(model) else None

    @property
    def seed(self) -> int:
        return self.plan.seed if self.options.seed is None else self.options.seed


def make_job(
    exp: str,
    training_plan: str | None,
    overrides: Mapping[str, str],
    device: str,
    amp: bool,
    options: RunOptions,
    reporter: Reporter,
) -> Job:
    """Return the job for names as a user gives them.

    Raises:
        LmplayError: a name is unknown, or this machine does not have the device.
    """
    experiment = load(*find(exp))
    torch_device = pick_device(device)
    precision = pick_precision(torch_device, amp)
    if precision.note:
        reporter.note(precision.note)
    name = training_plan or DEFAULT_PLAN
    if training_plan is None:
        reporter.note(f"training plan: {name} (--training-plan list shows the others)")
    path = find_plan(name)
    plan = load_plan(path).with_budget(options.tokens, options.steps, options.minutes)
    if is_pretrained(options.initial_model):
        plan = plan.starting_from(str(options.initial_model))
    wanted = plan
    plan = plan.for_precision(torch_device.type, precision.name)
    for before, after in zip(wanted.steps, plan.steps, strict=True):
        if after.tokens != before.tokens:
            reporter.note(
                f"float32 on a CPU: the plan's budget for it, {after.tokens:,} tokens "
                f"(with bf16, which --amp uses: {before.tokens:,})"
            )
    job = Job(
        experiment,
        {},
        path.stem,
        plan,
        torch_device,
        precision,
        reporter,
        options,
    )
    return job.with_arm(experiment, overrides)


def sized_config(job: Job, vocab: int) -> Any:
    """Return the experiment's Config at the plan's sizes."""
    sizes = {**job.plan.sizes(), "vocab_size": vocab}
    if (pretrained := job.pretrained()) is not None:
        max_len = pretrained.max_len(job.plan.model.max_len)
        theirs = pretrained.fields(job.experiment, max_len)
        sizes |= theirs
    config, unused = job.experiment.config(sizes, job.overrides)
    try:  # sizes from --set have the plan's limits
        own = {f: getattr(config, f, None) for f in ModelSizes.model_fields}
        ModelSizes(**own)
    except ValidationError as e:
        error = e.errors()[0]
        raise LmplayError(f"{error['loc'][0]} = {error['input']}: {error['msg']}") from e
    if unused:
        names = ", ".join(unused)
        job.reporter.note(f"{job.experiment.variant} has no {names}: the plan's is not used")
    return config


def sample_batch(job: Job, config: Any, prepared: Prepared) -> tuple[Batch, int]:
    """Return real sequences to measure a model's cost, and the passes of an optimizer step.

    The batch is as large as the requested mini-batch (default 1), because sequences of a mini-batch
    may share work. It has at most MAX_MEASURED sequences, to need no more memory than training.
    """
    batch_size = job.plan.batch.batch_size
    size = min(job.options.mini_batch_size or 1, MAX_MEASURED, batch_size)
    arrays = stages(job.plan, prepared, config.max_len)[0].batch(0, size)
    return to_batch(arrays, slice(None), job.device), math.ceil(batch_size / size)


def baseline_job(job: Job) -> Job:
    """Return the job of the baseline in the same arena, with the recipe that the user set.

    Raises:
        LmplayError: there is no such experiment.
    """
    return job.with_arm(load(*find_baseline(job.experiment.source)), recipe.split(job.overrides)[1])


def run_folder(job: Job, settings: dict[str, str]) -> RunFolder:
    """Return the job's folder. Its name contains settings, budgets and the warm start."""
    options = job.options
    extras = []
    if options.tokens:
        extras.append(f"{options.tokens}tokens")
    if options.steps:
        extras.append(f"{options.steps}steps")
    if options.minutes:
        extras.append(f"{options.minutes:g}min")
    if job.precision.name != "fp32":
        extras.append(job.precision.name)
    if options.extend:
        extras.append("extended")
    if options.initial_model:
        extras.append(f"from={initial_name(options.initial_model)}")
    extras += [f"freeze={p}" for p in options.freeze]
    extras += [f"train_only={p}" for p in options.train_only]
    name = folder_name(job.experiment.variant, settings, extras, job.seed)
    return RunFolder(options.out / safe_name(job.plan_name) / name)


def initial_name(model: Path | str) -> str:
    """Return the part of an initial model's name that goes into a run's."""
    return Path(str(model).partition(":")[2] if is_pretrained(model) else model).resolve().name


def initial_record(model: Path | str) -> str:
    """Return an initial model's name for run.json."""
    return str(model) if is_pretrained(model) else str(Path(model).resolve())


def recorded(folder: RunFolder) -> dict[str, Any]:
    """Return the folder's run.json, or {} if there is none."""
    return folder.read() if (folder.path / RUN_FILE).exists() else {}


def matched(
    job: Job, config: Any, what: str, prepared: Prepared, plain: Job | None = None
) -> tuple[Job, Any, Match]:
    """Return the job of the baseline at the experiment's size, its Config, and the match.

    An existing run keeps the size it started with while the code of both is the same.

    Args:
        plain: the baseline's job at its own size. Default: on the job's plan.

    Raises:
        LmplayError: the experiment is the baseline.
    """
    source = job.experiment.source
    if job.experiment.variant == source.baseline:
        raise LmplayError(
            f"--match: {source.baseline} is its own baseline; --exp names what it is matched to"
        )
    overrides = [f"{k}={v}" for k, v in sorted(job.overrides.items())]
    to = "-".join([job.experiment.variant, *overrides])
    plain = plain or baseline_job(job)
    is_new = job.options.fresh
    known = {} if is_new else recorded(run_folder(plain, {f"match_{what}": to}))
    files = dict.fromkeys([source.path, plain.experiment.source.path])
    digest = "-".join(source_digest(path) for path in files)
    if "match" in known and known["match"].get("of") == digest:
        found = Match(**known["match"])
    else:
        job.reporter.note(f"looking for the size of {source.baseline} that matches {to} ...")
        wanted = size_of(job, config, prepared)
        base_config = sized_config(plain, prepared.tokenizer.vocab_size)
        found = match(wanted, to, plain.experiment, base_config, what, job.device)
        found = replace(found, of=digest)
    job.reporter.note(found.sentence())
    chosen = replace(plain, overrides=plain.overrides | {found.field: str(found.value)})
    return chosen, sized_config(chosen, prepared.tokenizer.vocab_size), found


def prepare_run(job: Job, match_by: str | None = None) -> PreparedRun:
    """Prepare the job's data and return its run.

    Args:
        match_by: "params" or "flops": train the baseline at the experiment's size instead.

    Raises:
        LmplayError: the data cannot be prepared, or a setting does not fit.
    """
    with job.reporter:
        prepared = prepare(job.plan, job.reporter.preparing)
    config = sized_config(job, prepared.tokenizer.vocab_size)
    control = None
    if match_by:
        job, config, control = matched(job, config, match_by, prepared)
    return PreparedRun(job, config, prepared, control)


class PreparedRun:
    """A job with its data: its folder, and the trainer that fills it.

    Raises:
        LmplayError: the tree has uncommitted changes although the options refuse them, or a pattern
            matches no parameter.
    """

    def __init__(self, job: Job, config: Any, prepared: Prepared, match: Match | None = None):
        self.job = job
        self.config = config
        self.prepared = prepared
        self.match = match
        self.share: Share | None = None
        options = job.options
        self.commit, self.diff = git_state(Path.cwd())
        if options.no_dirty and self.commit is None:
            raise LmplayError("--no-dirty: there is no git commit to compare the tree with")
        if options.no_dirty and self.diff:
            raise LmplayError(
                "--no-dirty: the tree has uncommitted changes (git status shows them); commit or "
                "stash them"
            )
        self.runner = job.experiment.runner(config)
        self.freezes = bool(options.freeze or options.train_only)
        if self.freezes:
            with torch.device("meta"):  # report a wrong pattern before there is a folder
                warm_start.freeze(self.runner.build(), options.freeze, options.train_only)
        settings = {f"match_{match.what}": match.to} if match else job.overrides
        self.folder = run_folder(job, settings)
        self.identity = identity(
            job.plan,
            job.experiment,
            config,
            job.seed,
            job.precision.name,
            prepared.tokenizer.fingerprint,
            prepared.fingerprint,
        )
        known = {} if options.fresh else recorded(self.folder)
        known_tokenizer = str(known.get("identity", {}).get("tokenizer"))
        if prepared.tokenizer.is_known_as(known_tokenizer):  # written by an older version
            self.identity["tokenizer"] = known_tokenizer
        if self.freezes:
            self.identity["frozen"] = [list(options.freeze), list(options.train_only)]
        self.initial = self._initial()
        self.extended = self._extended()

    def _extended(self) -> Extended | None:
        """Return the finished run to continue; None without --extend, or if this run has begun.

        Its weights are part of the identity: the longer run is not that of a single start.
        """
        options = self.job.options
        if not options.extend:
            return None
        if not (options.tokens or options.steps or options.minutes):
            raise LmplayError("--extend needs the larger budget: --tokens, --steps or --minutes")
        if self.job.initial_model is not None:
            raise LmplayError("--extend and --initial-model do not go together")
        known = {} if options.fresh else recorded(self.folder)
        if known and any(self.folder.checkpoints.glob("[0-9]*")):
            self.identity["extends"] = known["identity"].get("extends")
            return None
        found = find_shorter(self.folder, self.identity, self.job.plan, self.job.reporter.note)
        self.identity["extends"] = found.found.fingerprint
        return found

    def _initial(self) -> warm_start.InitialWeights | None:
        """Return the weights to start from; None if there are none, or if this run has begun.

        The run that they are from may have trained on since this run began.
        """
        options = self.job.options
        model = self.job.initial_model
        if model is None:
            return None
        known = {} if options.fresh else recorded(self.folder)
        same = known.get("initial_model") == initial_record(model)
        if same and any(self.folder.checkpoints.glob("[0-9]*")):
            self.identity["initial"] = known["identity"]["initial"]
            return None
        note = self.job.reporter.note
        if (pretrained := self.job.pretrained()) is not None:
            note(f"loading {pretrained.spec} ...")
            weights = pretrained.weights(self.job.experiment, self.config.max_len)
        else:
            run, found = locate(Path(model), options.out, note, "--initial-model")
            source = restore(run, found, options.trust)
            warm_start.check_tokenizer(source, self.prepared.tokenizer.fingerprint)
            weights = warm_start.InitialWeights.of(source)
        self.identity["initial"] = weights.fingerprint
        return weights

    def trainer(self) -> Trainer:
        job = self.job
        return Trainer(
            job.plan,
            self.prepared,
            self.runner,
            job.seed,
            job.device,
            job.precision,
            self.folder,
            job.reporter,
            Options(
                job.options.compile_model, job.options.save_minutes, self.share, job.options.until
            ),
            Start(self.initial, job.options.freeze, job.options.train_only),
        )

    def train(self) -> dict[str, Any]:
        """Train or resume the run; return its summary, at once if it is finished.

        Raises:
            Stopped: a signal asked for it. Everything is saved.
            LmplayError: the folder belongs to another run, or cannot be written.
        """
        job = self.job
        reporter = job.reporter
        options = job.options
        folder = self.folder
        if options.log:
            loggers.check(options.log)
        is_new = options.fresh or not recorded(folder)
        # Measured before there is a folder, or memory is used.
        size = {**self._measure_sizes(), **self._count_tables()} if is_new else {}
        make_out(options.out)
        try:
            exists = folder.open(self.identity, options.fresh)
            reporter.log_to(folder.path / "log.txt")
            known = folder.read() if exists else {}
            if known.get("summary"):
                reporter.note(f"{folder.path} is finished; --fresh trains it again")
                return known["summary"]
            with reporter, self._shared_cores():
                try:
                    trainer = self._begin(known, size)
                    self._open_logger(trainer.state.step)
                    folder.update(**trainer.set_up(options.mini_batch_size, known))
                    summary = trainer.train()
                except Stopped as e:
                    reporter.note(
                        f"{e}; saved at step {trainer.state.step}. The same command continues it."
                    )
                    raise
            if job.plan.classify is not None:
                found = trainer.classification()
                summary |= found.summary
                write_text(folder.path / PREDICTIONS, found.predictions.to_csv(index=False))
                folder.update(classification=found.record)
                reporter.note(found.sentence)
            if trainer.windows is not None and job.plan.classify is not None:
                rows = trainer.stream_log.rows()
                labels = len(job.plan.classify.labels)
                reporter.note(stream.sentence(rows, trainer.windows, labels))
            folder.update(summary=summary)
            if tables := folder.read().get("tables"):
                reporter.note(standing(summary["val_loss"], tables["losses"]))
            if bar := job.plan.validation.solved:
                word = "solved" if summary["solved"] else "not solved"
                reporter.note(
                    f"{word}: {summary['val_accuracy']:.1%} of the answers are right ({bar:.0%} "
                    "counts as solved)"
                )
            reporter.note(f"finished: {folder.path}")
            return summary
        finally:
            reporter.close_loggers()
            reporter.log_to(None)
            folder.close()

    @contextmanager
    def _shared_cores(self) -> Iterator[None]:
        """Use the requested number of threads, or a share of the cores while the run trains."""
        if not self.job.options.divide_cores:
            yield
            return
        before = torch.get_num_threads()
        with Share(self.job.options.threads) as self.share:
            if self.share.count < before and not self.share.fixed:
                self.job.reporter.note(
                    f"threads: {self.share.count} of {before}: other processes use the cores"
                )
            try:
                yield
            finally:
                torch.set_num_threads(before)

    def _open_logger(self, step: int) -> None:
        """Open the requested tracker. The run keeps one identity in it when it is resumed."""
        reporter = self.job.reporter
        name = self.job.options.log
        if name is None:
            return
        record = self.folder.read()
        if "log_id" not in record:
            self.folder.update(log_id=uuid.uuid4().hex[:12])
            record = self.folder.read()
        config = {k: v for k, v in record["identity"].items() if k != "config"}
        config |= record["identity"]["config"]
        plan = self.job.plan_name
        path = self.folder.path
        try:
            logger = loggers.open_logger(name, path, plan, record["log_id"], config, step)
        except Exception as e:  # each tracker raises types of its own
            raise LmplayError(f"--log {name}: it could not begin: {first_line(e)}") from e
        reporter.loggers.append(logger)
        reporter.note(f"logged to {logger.where}")

    def _begin(self, known: dict[str, Any], size: dict[str, Any]) -> Trainer:
        """Return the trainer at the run's current state; fill the folder of a new run.

        Args:
            known: run.json of an existing run.
            size: the model's costs, for run.json of a new run.
        """
        job = self.job
        reporter = job.reporter
        where = f"seed {job.seed}, {describe_device(job.device)}, {job.precision.name}"
        reporter.note(f"{job.experiment.variant} on {job.plan_name}, {where}")
        notes = self.runner.notes(job.device)
        for line in notes:
            reporter.note(line)
        trainer = self.trainer()
        if not known:
            content = {"identity": self.identity, **self._provenance(notes), **size}
            if self.diff:  # before run.json, which mentions it
                write_text(self.folder.path / "uncommitted.diff", self.diff)
            self.folder.create(content, job.experiment, self.prepared.tokenizer)
            if self.extended is not None:
                self.extended.copy_to(self.folder)
        elif (self.share is None or self.share.fixed) and (
            known.get("threads") != torch.get_num_threads()
        ):
            reporter.note(
                f"this run began with {known.get('threads')} threads: rounding will differ"
            )
        if known and known.get("compiled") != job.options.compile_model:
            how = "compiled" if known.get("compiled") else "without --compile-model"
            reporter.note(f"this run began {how}")
        if trainer.resume():
            state = trainer.state
            if self.extended is not None:
                if trainer.progress() >= 1:
                    raise LmplayError(
                        f"--extend: {self.extended.run.path} has {self.extended.tokens} tokens "
                        "already: the budget must be larger"
                    )
                reporter.note(self.extended.schedule(job.plan, trainer.progress()))
            reporter.note(
                f"resuming {self.folder.path} at step {state.step}, {state.tokens} tokens"
            )
        self.initial = None  # frees its memory
        return trainer

    def _provenance(self, notes: list[str]) -> dict[str, Any]:
        """Return what run.json says about the origin of a run."""
        job = self.job
        content: dict[str, Any] = {
            "plan_name": job.plan_name,
            "plan": job.plan.model_dump(mode="json", by_alias=True),
            "arena": recipe.arena_fingerprint(job.plan),
            "baseline": job.experiment.source.baseline,
            "idea": job.experiment.source.idea,
            "overrides": job.overrides,
            "command": list(job.options.command),
            "device": describe_device(job.device),
            "memory": job.options.memory,
            "versions": {
                "lmplay": __version__,
                "torch": torch.__version__,
                "python": sys.version.split()[0],
            },
            "threads": torch.get_num_threads(),
            "compiled": job.options.compile_model,
            "notes": notes,
            "git": {"commit": self.commit, "dirty": bool(self.diff)},
        }
        if self.match is not None:
            content["match"] = asdict(self.match)
        if self.initial is not None and job.initial_model is not None:
            content["initial_model"] = initial_record(job.initial_model)
        label = self._label()
        if label != job.experiment.variant:
            content["label"] = label
        return content

    def _label(self) -> str:
        """Return the run's name in comparisons: more than the variant if more differs."""
        options = self.job.options
        label = self.job.experiment.variant
        if self.match is not None:
            label += f", {self.match.what} of {self.match.to}"
        if options.extend:
            label += ", extended"
        if self.initial is not None and options.initial_model is not None:
            label += f", from {self.initial.name}"
        if options.freeze:
            label += f", without {' '.join(options.freeze)}"
        if options.train_only:
            label += f", only {' '.join(options.train_only)}"
        return label

    def _measure_sizes(self) -> dict[str, Any]:
        """Return the model's costs for run.json; print them next to the baseline's."""
        job = self.job
        own = size_of(job, self.config, self.prepared)
        try:
            if job.experiment.variant != job.experiment.source.baseline:
                base = baseline_job(job)
                base_config = sized_config(base, self.prepared.tokenizer.vocab_size)
                base_size = size_of(base, base_config, self.prepared)
                baseline = job.experiment.source.baseline
                job.reporter.note(compare_sizes(own, base_size, baseline))
        except LmplayError as e:
            job.reporter.note(f"not compared with its baseline: {e}")
        except torch.OutOfMemoryError:
            job.reporter.note("not compared with its baseline: it does not fit into memory")
        return {"sizes": asdict(own)}

    def _count_tables(self) -> dict[str, Any]:
        """Return the losses of count tables for run.json; {} for a vocabulary beyond them, and for
        synthetic tasks and classifications, whose bars are others."""
        vocab = self.prepared.tokenizer.vocab_size
        is_synthetic = self.job.plan.validation.solved is not None
        classifies = self.job.plan.classify is not None
        if vocab > LARGEST_VOCABULARY or is_synthetic or classifies:
            return {}
        job = self.job
        with job.reporter:
            found = table_losses(
                job.plan, self.prepared, self.config.max_len, job.reporter.preparing
            )
        if not found.complete:
            job.reporter.note(
                f"count tables: of {found.tokens} training tokens, the first of each data set"
            )
        return {"tables": asdict(found)}


def size_of(job: Job, config: Any, prepared: Prepared) -> Size:
    """Return what the job's model costs."""
    with autocast(job.device, job.precision):
        return measure(job.experiment.runner(config), *sample_batch(job, config, prepared))
