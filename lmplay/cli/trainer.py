"""lmp_trainer: train an experiment on a training plan, or list and describe what there is."""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..discover import Source, find, list_sources, load
from ..errors import LmplayError
from . import ending

if TYPE_CHECKING:
    import torch
    from rich.console import Console

    from ..api import Batch
    from ..data.shards import Prepared
    from ..devices import Precision
    from ..discover import Experiment
    from ..match import Match
    from ..plan import Plan
    from ..report import Report
    from ..trainer import Start, Trainer

EPILOG = """examples:
  lmp_trainer --exp list                               what can be trained
  lmp_trainer --exp ue                                 train Unified Embeddings on the plan for this machine
  lmp_trainer --exp ue --training-plan smoke           the same in seconds, to see that it runs
  lmp_trainer --exp my_idea.py --minutes 5             your own file
  lmp_trainer --exp ue --set front_embed_mul=16        another setting
  lmp_trainer --exp ue --describe                      what it is and how large
  lmp_trainer --exp ue --match params                  its control: the baseline with as many parameters
  lmp_trainer --exp ue --initial-model RUN             go on from a trained run, also another experiment's

exit status: 0 done, 1 an error that its line explains, 2 wrong usage, 3 loss or gradient not finite,
130 stopped by Ctrl-C, 143 stopped by SIGTERM (both saved; the same command goes on)."""


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="lmp_trainer",
        description="Train a language-model idea, so that it can be compared with a baseline.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("--exp", default="gpt2ish", metavar="NAME|FILE.py[:VARIANT]|list", help="the experiment (gpt2ish)")
    p.add_argument("--describe", action="store_true", help="say what the experiment is, and do not train")
    p.add_argument(
        "--training-plan",
        metavar="NAME|FILE.json|list",
        help="the arena (laptop without a GPU, else default)",
    )
    p.add_argument("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto")
    p.add_argument("--amp", action="store_true", help="bf16 where the hardware has it, fp16 on older CUDA cards")
    p.add_argument("--compile-model", action="store_true", help="torch.compile the model")
    p.add_argument("--mini-batch-size", type=positive_int, metavar="N", help="sequences in a pass (found by trying)")
    p.add_argument("--seed", type=int, help="of weights and dropout, never of the data's order (the plan's)")
    p.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides", help="a Config field")
    p.add_argument("--match", choices=("params", "flops"), help="train the baseline at the experiment's size instead")
    p.add_argument("--initial-model", type=Path, metavar="RUN", help="start from a trained run's weights")
    p.add_argument("--freeze", action="append", default=[], metavar="PATTERN", help="parameters that do not train")
    p.add_argument("--train-only", action="append", default=[], metavar="PATTERN", help="the only ones that do")
    p.add_argument("--minutes", type=positive_float, help="budget of training time, instead of the plan's")
    p.add_argument("--tokens", type=positive_int, help="budget of tokens, instead of the plan's")
    p.add_argument("--steps", type=positive_int, help="budget of optimizer steps, instead of the plan's")
    p.add_argument("--fresh", action="store_true", help="start anew; a run that is there is moved aside")
    p.add_argument("--no-dirty", action="store_true", help="refuse to run with uncommitted changes")
    p.add_argument("--check-grads", action="store_true", help="list parameters that get no gradient, and do not train")
    p.add_argument("--profile", action="store_true", help="profile a few steps, and do not train")
    p.add_argument("--save-minutes", type=float, default=5.0, metavar="M", help="between checkpoints (5); 0: each step")
    p.add_argument("--out", type=Path, default=Path("gpt_out"), metavar="FOLDER", help="where runs are kept (gpt_out)")
    return p


def positive_int(text: str) -> int:
    value = int(float(text)) if "e" in text.lower() else int(text)
    if value <= 0:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return value


def positive_float(text: str) -> float:
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return value


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    return ending("lmp_trainer", lambda: command(args))


def command(args: argparse.Namespace) -> int:
    from ..report import make_console

    console = make_console()
    if args.exp == "list":
        list_experiments(list_sources(), console)
        return 0
    if args.training_plan == "list":
        list_plans(console)
        return 0
    source, variant = find(args.exp)
    overrides = parse_overrides(args.overrides)
    from ..devices import tune_memory

    memory = tune_memory()  # before torch is imported
    return train(args, load(source, variant), overrides, memory, console)


def parse_overrides(items: list[str]) -> dict[str, str]:
    pairs = {}
    for item in items:
        key, equals, value = item.partition("=")
        if not equals or not key:
            raise LmplayError(f"--set {item}: write it as KEY=VALUE")
        pairs[key.strip()] = value.strip()
    return pairs


def list_experiments(sources: list[Source], console: Console) -> None:
    """One row an idea, its variants folded under it; broken ones with the reason."""
    from rich.table import Table

    table = Table("experiment", "what it is", "from", box=None, pad_edge=False)
    for source in sorted(sources, key=lambda s: (s.origin != "shipped", s.idea)):
        if source.broken:
            table.add_row(source.idea, f"[red]broken:[/red] {escape(source.broken)}", escape(source.origin))
            continue
        table.add_row(f"[bold]{escape(source.idea)}[/bold]", escape(source.summary), escape(source.origin))
        others = [v for v in source.variants if v != source.idea]
        if others:
            table.add_row("", f"[dim]also: {escape(', '.join(others))}[/dim]", "")
    console.print(table, highlight=False)


def list_plans(console: Console) -> None:
    from rich.table import Table

    from ..plan import load_plan, plan_files

    table = Table("training plan", "what it is", box=None, pad_edge=False)
    for name, path in plan_files().items():
        try:
            table.add_row(f"[bold]{escape(name)}[/bold]", escape(load_plan(path).description))
        except LmplayError as e:
            table.add_row(escape(name), f"[red]broken:[/red] {escape(str(e))}")
    console.print(table, highlight=False)


def escape(text: str) -> str:
    from rich.markup import escape as rich_escape

    return rich_escape(text)


def choose_plan(name: str | None, device: torch.device, report: Report) -> tuple[str, Plan]:
    """The plan asked for; without one, what suits the device, and it is said."""
    from ..plan import find_plan, load_plan

    if name is None:
        name = "laptop" if device.type == "cpu" else "default"
        reason = "no GPU is used" if device.type == "cpu" else "a GPU is used"
        report.note(f"training plan: {name} ({reason}; --training-plan list shows the others)")
    path = find_plan(name)
    return path.stem, load_plan(path)


@dataclass(frozen=True)
class Job:
    """What a command line stands for: which model, on what, with which budget."""

    args: argparse.Namespace
    experiment: Experiment
    overrides: dict[str, str]
    memory: str
    console: Console
    report: Report
    device: torch.device
    precision: Precision
    plan_name: str
    plan: Plan


def train(
    args: argparse.Namespace, experiment: Experiment, overrides: dict[str, str], memory: str, console: Console
) -> int:
    from ..data.shards import prepare, vocab_size
    from ..devices import pick_device, pick_precision
    from ..report import Report

    report = Report(console)
    device = pick_device(args.device)
    precision = pick_precision(device, args.amp)
    if precision.note:
        report.note(precision.note)
    plan_name, plan = choose_plan(args.training_plan, device, report)
    plan = plan.with_budget(args.tokens, args.steps, args.minutes)
    job = Job(args, experiment, overrides, memory, console, report, device, precision, plan_name, plan)
    if args.describe:  # sizes are known without the data, which may be on a hub that is out of reach
        with report:
            config = sized_config(job, vocab_size(plan, report.preparing))
        describe(experiment, experiment.runner(config), config, console)
        return 0
    with report:
        prepared = prepare(plan, report.preparing)
    config = sized_config(job, prepared.tokenizer.vocab_size)
    if args.match:
        return train_run(*matched(job, config, prepared), prepared)
    return train_run(job, config, None, prepared)


def sized_config(job: Job, vocab: int) -> Any:
    """The experiment's Config at the plan's sizes."""
    config, without = job.experiment.config({**job.plan.sizes(), "vocab_size": vocab}, job.overrides)
    if without:
        job.report.note(f"{job.experiment.variant} has no {', '.join(without)}: the plan's is not used")
    return config


def sample_batch(job: Job, config: Any, prepared: Prepared) -> tuple[Batch, int]:
    """Real sequences to measure a model's cost with, and how often they go into an optimizer step."""
    from ..data.packing import mixtures
    from ..probe import to_batch

    size = min(job.plan.batch.batch_size, max(1, 2048 // config.max_len))
    arrays = mixtures(job.plan, prepared, config.max_len)[0].batch(0, size)
    return to_batch(arrays, slice(None), job.device), -(-job.plan.batch.batch_size // size)


def matched(job: Job, config: Any, prepared: Prepared) -> tuple[Job, Any, Match]:
    """The job that trains the baseline at the size that --match asks for, its Config, and how it was found."""
    from ..match import match, measure

    source = job.experiment.source
    if job.experiment.variant == source.baseline:
        raise LmplayError(f"--match: {source.baseline} is its own baseline; --exp names what it is matched to")
    job.report.note(f"looking for the size of {source.baseline} that matches {job.experiment.variant} ...")
    wanted = measure(job.experiment.runner(config), *sample_batch(job, config, prepared))
    to = "-".join([job.experiment.variant, *(f"{k}={v}" for k, v in sorted(job.overrides.items()))])
    baseline = load(*find(source.baseline))
    plain = replace(job, experiment=baseline, overrides={})
    base_config = sized_config(plain, prepared.tokenizer.vocab_size)
    found = match(wanted, to, baseline, base_config, job.args.match, job.device)
    job.report.note(found.sentence())
    chosen = replace(plain, overrides={found.field: str(found.value)})
    return chosen, sized_config(chosen, prepared.tokenizer.vocab_size), found


def start_of(args: argparse.Namespace, report: Report) -> Start:
    """Initial weights and frozen patterns, as the command line names them."""
    from ..restore import locate, restore
    from ..trainer import Start

    restored = None
    if args.initial_model is not None:
        restored = restore(*locate(args.initial_model, args.out, report.note, "--initial-model"))
    return Start(restored, tuple(args.freeze), tuple(args.train_only))


def train_run(job: Job, config: Any, match: Match | None, prepared: Prepared) -> int:
    """Train, or go on with, the run that the job's folder stands for."""
    import torch

    from ..devices import describe_device
    from ..initial import freeze
    from ..runs import RunFolder, folder_name, git_state, identity
    from ..trainer import Options, Stopped, Trainer

    args, experiment, report = job.args, job.experiment, job.report
    commit, diff = git_state(Path.cwd())
    if args.no_dirty and commit is None:
        raise LmplayError("--no-dirty: there is no git commit here that the tree could be compared with")
    if args.no_dirty and diff:
        raise LmplayError("--no-dirty: the tree has uncommitted changes (git status shows them); commit or stash them")
    runner = experiment.runner(config)
    seed = job.plan.seed if args.seed is None else args.seed
    start = start_of(args, report)
    with torch.device("meta"):
        freeze(runner.build(), start.freeze, start.train_only)  # a wrong pattern is told before a folder is made
    wanted = identity(
        job.plan, experiment, config, seed, job.precision.name, prepared.tokenizer.fingerprint, prepared.fingerprint
    )
    if start.initial is not None:
        wanted["initial"] = start.initial.found.fingerprint
    if start.freeze or start.train_only:
        wanted["frozen"] = [list(start.freeze), list(start.train_only)]
    run = RunFolder(args.out / job.plan_name / folder_name(experiment.variant, *name_parts(job, match), seed))
    options = Options(args.compile_model, args.save_minutes)

    def trainer_of() -> Trainer:
        return Trainer(
            job.plan, prepared, runner, seed, job.device, job.precision, run, report, options, start
        )  # fmt: skip

    if args.check_grads or args.profile:
        return check_grads(trainer_of()) if args.check_grads else profile(trainer_of(), args, job.console)
    try:
        exists = run.open(wanted, args.fresh)
        report.log_path = run.path / "log.txt"
        if exists and run.read().get("summary"):
            report.note(f"{run.path} is finished; --fresh trains it again")
            print_summary(run.read()["summary"])
            return 0
        report.note(
            f"{experiment.variant} on {job.plan_name}, seed {seed}, {describe_device(job.device)}, {job.precision.name}"
        )
        trainer = trainer_of()
        known = run.read() if exists else {}
        if not exists:
            content = {"identity": wanted, **provenance(job, match, (commit, diff)), **sizes(job, config, prepared)}
            run.create(content, experiment, prepared.tokenizer)
            if diff:
                (run.path / "uncommitted.diff").write_text(diff, encoding="utf-8")
        elif known.get("threads") != torch.get_num_threads():
            report.note(f"this run began with {known.get('threads')} threads: equal from here on but for rounding")
        if exists and known.get("compiled") != args.compile_model:
            report.note("this run began " + ("compiled" if known.get("compiled") else "without --compile-model"))
        if trainer.resume():
            report.note(f"resuming {run.path} at step {trainer.place.step}, {trainer.place.tokens} tokens")
        with report:
            run.update(**trainer.prepare(args.mini_batch_size, known))
            try:
                summary = trainer.train()
            except torch.OutOfMemoryError as e:
                raise LmplayError(
                    f"the device ran out of memory: --mini-batch-size below {trainer.mini_batch_size}"
                ) from e
            except Stopped as e:
                report.note(f"{e}; saved at step {trainer.place.step}. The same command goes on from there.")
                return e.status
        run.update(summary=summary)
        report.note(f"finished: {run.path}")
        print_summary(summary)
        return 0
    finally:
        run.close()


def name_parts(job: Job, match: Match | None) -> tuple[dict[str, str], list[str]]:
    """What a run's folder says beside the variant and the seed: settings, and how it was budgeted and begun."""
    args = job.args
    settings = {f"match_{match.what}": match.to} if match else dict(job.overrides)
    budgets = ((args.tokens, "tokens"), (args.steps, "steps"), (args.minutes, "min"))
    extras = [f"{value:g}{unit}" for value, unit in budgets if value]
    extras += [job.precision.name] if job.precision.name != "fp32" else []
    extras += [f"from={args.initial_model.resolve().name}"] if args.initial_model else []
    extras += [f"freeze={p}" for p in args.freeze] + [f"train_only={p}" for p in args.train_only]
    return settings, extras


def provenance(job: Job, match: Match | None, git: tuple[str | None, str | None]) -> dict[str, Any]:
    """What run.json says about where a run comes from."""
    import torch

    from .. import __version__
    from ..devices import describe_device

    told: dict[str, Any] = {
        "plan_name": job.plan_name,
        "plan": job.plan.model_dump(mode="json", by_alias=True),
        "baseline": job.experiment.source.baseline,
        "idea": job.experiment.source.idea,
        "overrides": job.overrides,
        "command": ["lmp_trainer", *sys.argv[1:]],
        "device": describe_device(job.device),
        "memory": job.memory,
        "versions": {"lmplay": __version__, "torch": torch.__version__, "python": sys.version.split()[0]},
        "threads": torch.get_num_threads(),
        "compiled": job.args.compile_model,
        "git": {"commit": git[0], "dirty": bool(git[1])},
    }
    if match is not None:
        told["match"] = asdict(match)
        told["label"] = f"{job.experiment.variant}, {match.what} of {match.to}"
    elif job.args.initial_model is not None:
        told["label"] = f"{job.experiment.variant} from {job.args.initial_model.resolve().name}"
        told["initial_model"] = str(job.args.initial_model)
    return told


def sizes(job: Job, config: Any, prepared: Prepared) -> dict[str, Any]:
    """What the model costs, for run.json; said aloud beside the baseline's where it has another one's."""
    from ..match import beside, measure

    own = measure(job.experiment.runner(config), *sample_batch(job, config, prepared))
    baseline = job.experiment.source.baseline
    if job.experiment.variant != baseline:
        base = replace(job, experiment=load(*find(baseline)), overrides={})
        base_config = sized_config(base, prepared.tokenizer.vocab_size)
        base_size = measure(base.experiment.runner(base_config), *sample_batch(base, base_config, prepared))
        job.report.note(beside(own, base_size, baseline))
    return {"sizes": asdict(own)}


def print_summary(summary: dict[str, object]) -> None:
    """`key: value` lines that a grep finds."""
    for key, value in summary.items():
        print(f"{key}: {value:.6f}" if isinstance(value, float) and key.startswith("val_") else f"{key}: {value}")


def describe(experiment: Experiment, runner: object, config: object, console: Console) -> None:
    """Docstring, config with what differs from the defaults, sizes and FLOPs."""
    import dataclasses
    from fnmatch import fnmatch

    import torch

    from ..api import Batch, ModelRunner
    from ..match import measure
    from ..report import count

    assert isinstance(runner, ModelRunner)
    console.print(experiment.source.doc.strip(), markup=False, highlight=False, soft_wrap=True)
    print(f"\nfile: {experiment.source.path}\nvariant: {experiment.variant}")
    print(f"variants: {', '.join(experiment.source.variants)}\n\nconfig:")
    for field in dataclasses.fields(config):  # type: ignore[arg-type]
        value = getattr(config, field.name)
        note = "" if value == field.default else f"   (default {field.default})"
        print(f"  {field.name} = {value}{note}")
    length = config.max_len  # type: ignore[attr-defined]
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, config.vocab_size, (1, length), generator=generator)  # type: ignore[attr-defined]
    size = measure(runner, Batch(ids, ids))
    extra, folded = size.training_only, size.folded
    print(f"\nparameters: {size.parameters} ({count(size.parameters)})")
    print(f"training_only_parameters: {extra} ({count(extra)})\nfolded_parameters: {folded} ({count(folded)})")
    if extra:
        with torch.device("meta"):
            names = {name: list(p.shape) for name, p in runner.build().named_parameters()}
        for name, shape in names.items():
            if any(fnmatch(name, pattern) for pattern in runner.training_only):
                print(f"  {name} {shape}")
    print(f"flops_per_token: {size.flops:.4g} ({count(size.flops)}; training, one sequence of {length})")
    print(f"inference_flops_per_token: {size.inference_flops:.4g} ({count(size.inference_flops)}; folded, the same)")


def check_grads(trainer: Trainer) -> int:
    """Names the parameters that one batch gives no gradient; exit status 1 when there are any."""
    from .. import probe

    arrays = trainer.streams[0].batch(0, trainer.batch_size)
    size = min(4, trainer.batch_size)
    idle = probe.without_gradient(trainer.runner, trainer.model, probe.to_batch(arrays, slice(0, size), trainer.device))
    for name in idle:
        print(f"no gradient: {name}")
    total = sum(1 for _ in trainer.model.parameters())
    print(f"parameters_without_gradient: {len(idle)} of {total}")
    return 1 if idle else 0


def profile(trainer: Trainer, args: argparse.Namespace, console: Console) -> int:
    """A Chrome trace of a few optimizer steps, and the top operators as a table."""
    from .. import probe

    trainer.prepare(args.mini_batch_size, {})
    arrays = trainer.streams[0].batch(0, trainer.batch_size)

    def step() -> None:
        trainer.accumulate(arrays)
        trainer.optimizers.prepare(trainer.plan.batch.grad_clip, trainer.loss_scale)
        trainer.optimizers.step()
        trainer.optimizers.zero_grad()

    args.out.mkdir(parents=True, exist_ok=True)
    trace = args.out / f"profile-{Path(trainer.run.path).name}.json"
    console.print(probe.profile(step, trainer.device, trace))
    print(f"trace: {trace} (open it at chrome://tracing or ui.perfetto.dev)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
