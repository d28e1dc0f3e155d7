"""lmp_trainer: train an experiment on a training plan, or list and describe what there is.

One module, because every flag belongs to one command line and one decision: train, list or
describe.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

from .. import threads
from ..discover import ExperimentFile, default_baseline, find, find_baseline, list_sources
from ..errors import LmplayError
from . import _args, run_command

if TYPE_CHECKING:
    from rich.console import Console

    from ..training.progress import Reporter
    from ..training.run import Job, PreparedRun

EPILOG = """examples:
  lmp_trainer --exp list                           list the experiments
  lmp_trainer --training-plan list                 list the training plans
  lmp_trainer --exp NAME                           train on the plan for this machine
  lmp_trainer --exp NAME --training-plan smoke     train for seconds, to see that it runs
  lmp_trainer --exp my_idea.py --minutes 5         train your own file
  lmp_trainer --exp NAME --set num_blocks=4        change a setting
  lmp_trainer --exp NAME --describe                show what it is and how large
  lmp_trainer --exp NAME --diff                    show what it changes in its baseline
  lmp_trainer --exp NAME --match params            train the baseline with as many parameters
  lmp_trainer --exp NAME --initial-model RUN       start from a trained run's weights

exit status: 0 done, 1 an error that its line explains, 2 wrong usage, 3 loss or gradient not
finite, 130 stopped by Ctrl-C, 143 stopped by SIGTERM (both saved; the same command continues)."""

TRACKERS = ("wandb", "trackio", "tensorboard")
RANGE_STEPS = 150  # of --find-lr without --steps

# Modes that do not train, and the options that they would ignore.
_RUN_OPTIONS = (
    "match",
    "initial_model",
    "trust",
    "log",
    "fresh",
    "extend",
    "tokens",
    "minutes",
    "save_minutes",
)
_PASS_OPTIONS = ("steps", "amp", "compile_model", "mini_batch_size")
_SELECT_OPTIONS = ("seed", "freeze", "train_only", "no_dirty", "out")
UNUSED = {
    "describe": (*_RUN_OPTIONS, *_PASS_OPTIONS, *_SELECT_OPTIONS),
    "diff": (*_RUN_OPTIONS, *_PASS_OPTIONS, *_SELECT_OPTIONS, "training_plan", "overrides"),
    "check_grads": (*_RUN_OPTIONS, *_PASS_OPTIONS, "out"),
    "profile": (*_RUN_OPTIONS, "steps"),
    "find_lr": _RUN_OPTIONS,
}


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="lmp_trainer",
        description="Train a language-model idea, so that it can be compared with a baseline.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument(
        "--exp", metavar="NAME|FILE.py[:VARIANT]|list", help="the experiment (the baseline)"
    )
    p.add_argument(
        "--training-plan",
        metavar="NAME|FILE.json|list",
        help="the plan (laptop)",
    )
    _args.add_device(p)
    _args.add_threads(p, "OMP_NUM_THREADS, or a share of the cores among runs")
    _args.add_amp(p)
    p.add_argument("--compile-model", action="store_true", help="torch.compile the model")
    p.add_argument(
        "--mini-batch-size",
        type=_args.positive_int,
        metavar="N",
        help="sequences in a forward pass (the fastest is searched)",
    )
    p.add_argument(
        "--seed",
        type=_args.seed,
        help="of weights and dropout (the plan's); the order of the data does not depend on it",
    )
    _args.add_overrides(p, "a Config field")
    p.add_argument(
        "--match",
        choices=("params", "flops"),
        help="train the baseline at the experiment's size instead",
    )
    p.add_argument(
        "--initial-model",
        metavar="RUN|hf:NAME|gguf:FILE",
        help="start from the weights of a run, or of a pretrained model, whose sizes and tokenizer "
        "replace the plan's",
    )
    _args.add_trust(p)
    p.add_argument(
        "--freeze",
        action="append",
        default=[],
        metavar="PATTERN",
        help="do not train the parameters whose names match, such as '*_embed.*'; repeatable",
    )
    p.add_argument(
        "--lora",
        metavar="RANK",
        help="train low-rank changes of the matrices only (short for --set model.lora=RANK)",
    )
    p.add_argument(
        "--train-only",
        action="append",
        default=[],
        metavar="PATTERN",
        help="train only the parameters whose names match; repeatable",
    )
    p.add_argument("--minutes", type=_args.positive_float, help="budget of training time")
    p.add_argument("--tokens", type=_args.positive_int, help="budget of tokens")
    p.add_argument("--steps", type=_args.positive_int, help="budget of optimizer steps")
    p.add_argument("--fresh", action="store_true", help="start over; an old run is moved aside")
    p.add_argument(
        "--extend",
        action="store_true",
        help="continue a finished run with this larger budget, on the schedule of the longer run",
    )
    p.add_argument("--no-dirty", action="store_true", help="refuse to run with uncommitted changes")
    p.add_argument("--log", choices=TRACKERS, help="log to a tracker, offline (lmplay[log])")
    p.add_argument(
        "--save-minutes",
        type=float,
        default=5.0,
        metavar="M",
        help="minutes between checkpoints (5); 0: after each step",
    )
    _args.add_out(p, "where runs are kept")
    mode = p.add_mutually_exclusive_group()
    mode.add_argument("--describe", action="store_true", help="describe the experiment")
    mode.add_argument("--diff", action="store_true", help="print what it changes in its baseline")
    mode.add_argument("--check-grads", action="store_true", help="list parameters without gradient")
    mode.add_argument("--profile", action="store_true", help="profile a few steps")
    mode.add_argument(
        "--find-lr", action="store_true", help="learning rate range test: a picture and two rates"
    )
    return p


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    return run_command(
        "lmp_trainer", lambda: command(args), "a smaller --mini-batch-size, or model"
    )


def command(args: argparse.Namespace) -> int:
    from ..training.progress import make_console

    console = make_console()
    if args.exp == "list":
        list_experiments(list_sources(), console)
        return 0
    if args.training_plan == "list":
        list_plans(console)
        return 0
    for mode, options in UNUSED.items():
        if getattr(args, mode):
            _args.refuse(parser(), args, f"--{mode.replace('_', '-')}", options)
    args.exp = args.exp or default_baseline()
    if args.diff:
        print_diff(args.exp, console)
        return 0
    find(args.exp)  # report a wrong name before torch is imported
    from ..devices import tune_memory

    memory = tune_memory()  # before torch is imported
    threads.use(args.threads)
    return train(args, memory, console)


def list_experiments(sources: list[ExperimentFile], console: Console) -> None:
    """Print one row per idea, with its variants, and why broken ones are broken."""
    from rich.markup import escape
    from rich.table import Table

    table = Table("experiment", "what it is", "from", box=None, pad_edge=False)
    for source in sorted(sources, key=lambda s: (s.origin != "shipped", s.idea)):
        origin = escape(source.origin)
        if source.broken:
            table.add_row(source.idea, f"[red]broken:[/red] {escape(source.broken)}", origin)
            continue
        table.add_row(f"[bold]{escape(source.idea)}[/bold]", escape(source.summary), origin)
        others = [v for v in source.variants if v != source.idea]
        if others:
            table.add_row("", f"[dim]also: {escape(', '.join(others))}[/dim]", "")
    console.print(table, highlight=False)


def list_plans(console: Console) -> None:
    """Print one row per training plan, and below it what its certificates say."""
    from rich.markup import escape
    from rich.table import Table

    from ..plan import load_plan, plan_files

    table = Table("training plan", "what it is", box=None, pad_edge=False)
    for name, path in plan_files().items():
        try:
            table.add_row(f"[bold]{escape(name)}[/bold]", escape(load_plan(path).description))
            for line in certificate_lines(path):
                table.add_row("", f"[dim]{escape(line)}[/dim]")
        except LmplayError as e:
            table.add_row(escape(name), f"[red]broken:[/red] {escape(str(e))}")
    console.print(table, highlight=False)


def certificate_lines(path: Path) -> list[str]:
    """Return what a plan's certificates say, a line for each precision; [] if it has none."""
    from ..plan import load_plan
    from ..trial.certificate import read_certificates, valid

    plan = load_plan(path)
    lines = []
    for precision, found in read_certificates(path).items():
        device = found.device
        current, sentence = valid(path, plan.for_precision(device, precision), precision, device)
        if current is not None and current.minutes_per_run is not None:
            sentence += f"; {current.minutes_per_run:.1f} minutes a run ({current.machine})"
        lines.append(sentence)
    return lines


def print_diff(exp: str, console: Console) -> None:
    """Print the difference between an experiment's file and its baseline's, in color."""
    from ..changes import diff

    source, _ = find(exp)
    baseline, _ = find_baseline(source)
    if baseline.path == source.path:
        raise LmplayError(f"--diff: {source.path.name} is its own baseline")
    colors = {"+": "green", "-": "red", "@": "cyan"}
    for line in diff(baseline.path, source.path):
        style = "bold" if line.startswith(("+++", "---")) else colors.get(line[:1])
        console.print(line, style=style, markup=False, highlight=False, soft_wrap=True)


def train(args: argparse.Namespace, memory: str, console: Console) -> int:
    """Train, or do what the mode asks for."""
    from .. import python
    from ..plan import find_plan
    from ..training.loop import Stopped
    from ..training.progress import Reporter
    from ..training.run import DEFAULT_PLAN, RunOptions, make_job, prepare_run

    reporter = Reporter(console)
    names = {f.name for f in fields(RunOptions)} & set(vars(args))
    options = {name: getattr(args, name) for name in names}
    options["freeze"] = tuple(args.freeze)
    options["train_only"] = tuple(args.train_only)
    options["command"] = ("lmp_trainer", *sys.argv[1:])
    options["memory"] = memory
    lora = [] if args.lora is None else [f"model.lora={args.lora}"]
    overrides = _args.parse_overrides([*args.overrides, *lora])
    if not any(getattr(args, mode) for mode in UNUSED):
        try:
            folder = python.train(
                args.exp,
                args.training_plan,
                overrides=overrides,
                match=args.match,
                device=args.device,
                amp=args.amp,
                reporter=reporter,
                **options,
            )
        except Stopped as e:
            return e.status
        print_summary(folder.summary)
        return 0
    job = make_job(
        args.exp,
        args.training_plan,
        overrides,
        args.device,
        args.amp,
        RunOptions(**options),
        reporter,
    )
    if args.describe:
        describe(job, find_plan(args.training_plan or DEFAULT_PLAN), console)
        return 0
    run = prepare_run(job)
    if args.check_grads:
        return check_grads(run)
    if args.profile:
        return profile(run, args, console)
    return find_lr(run, args, reporter)


def print_summary(summary: dict[str, object]) -> None:
    """Print `key: value` lines, for grep."""
    for key, value in summary.items():
        is_loss = isinstance(value, float) and key.startswith(("val_", "label_"))
        print(f"{key}: {value:.6f}" if is_loss else f"{key}: {value}")


def describe(job: Job, plan: Path, console: Console) -> None:
    """Print docstring, config, sizes and FLOPs. It needs no data, which may be out of reach."""
    import dataclasses
    from fnmatch import fnmatch

    import torch

    from ..data.prepare import vocab_size
    from ..training.match import measure, random_batch
    from ..training.progress import count
    from ..training.run import sized_config

    experiment = job.experiment
    with job.reporter:
        config = sized_config(job, vocab_size(job.plan, job.reporter.preparing))
    runner = experiment.runner(config)
    console.print(experiment.source.doc.strip(), markup=False, highlight=False, soft_wrap=True)
    print(f"\nfile: {experiment.source.path}\nvariant: {experiment.variant}")
    print(f"variants: {', '.join(experiment.source.variants)}")
    known = certificate_lines(plan) or ["uncertified arena"]
    print("\n".join(f"plan {job.plan_name}: {line}" for line in known))
    print("\nconfig:")
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        note = "" if value == field.default else f"   (default {field.default})"
        print(f"  {field.name} = {value}{note}")
    length = config.max_len
    size = measure(runner, random_batch(experiment, config))
    print(f"\nparameters: {size.parameters} ({count(size.parameters)})")
    print(f"training_only_parameters: {size.training_only} ({count(size.training_only)})")
    print(f"folded_parameters: {size.folded} ({count(size.folded)})")
    if size.training_only:
        with torch.device("meta"):
            shapes = {name: list(p.shape) for name, p in runner.build().named_parameters()}
        for name, shape in shapes.items():
            if any(fnmatch(name, pattern) for pattern in runner.training_only):
                print(f"  {name} {shape}")
    flops = f"{size.flops:.4g} ({count(size.flops)}; training, one sequence of {length})"
    print(f"flops_per_token: {flops}")
    inference = size.inference_flops
    print(f"inference_flops_per_token: {inference:.4g} ({count(inference)}; folded, the same)")


def check_grads(run: PreparedRun) -> int:
    """Print the parameters that one batch gives no gradient; exit status 1 if there are any."""
    from ..model import to_batch, without_gradient

    trainer = run.trainer()
    arrays = trainer.stages[0].batch(0, trainer.batch_size)
    batch = to_batch(arrays, slice(0, min(4, trainer.batch_size)), trainer.device)
    idle = without_gradient(trainer.runner, trainer.model, batch)
    for name in idle:
        print(f"no gradient: {name}")
    total = sum(1 for _ in trainer.model.parameters())
    print(f"parameters_without_gradient: {len(idle)} of {total}")
    return 1 if idle else 0


def profile(run: PreparedRun, args: argparse.Namespace, console: Console) -> int:
    """Write a Chrome trace of a few optimizer steps and print the top operators."""
    from .. import model
    from ..training.run_folder import make_out

    trainer = run.trainer()
    trainer.set_up(args.mini_batch_size, {})
    arrays = trainer.stages[0].batch(0, trainer.batch_size)

    def step() -> None:
        trainer.train_step(arrays)

    make_out(args.out)
    trace = args.out / f"profile-{trainer.run.path.name}.json"
    console.print(model.profile(step, trainer.device, trace))
    print(f"trace: {trace} (open it at chrome://tracing or ui.perfetto.dev)")
    return 0


def find_lr(run: PreparedRun, args: argparse.Namespace, reporter: Reporter) -> int:
    """Run the range test on the plan's data and optimizer: a CSV, a picture and two rates."""
    import math

    import pandas as pd

    from ..analysis.figures import draw_range
    from ..errors import NotFiniteError
    from ..files import atomic_write
    from ..training.lr_finder import range_test
    from ..training.run_folder import make_out

    trainer = run.trainer()
    trainer.set_up(args.mini_batch_size, {})
    spec = trainer.plan.optimizer_of(trainer.stage)

    def step(index: int, multiplier: float) -> float:
        arrays = trainer.stages[0].batch(index, trainer.batch_size)
        trainer.optimizers.set_lr(multiplier)
        try:
            return trainer.train_step(arrays).loss_sum / max(1, arrays.n_tokens)
        except NotFiniteError:
            return math.inf

    with reporter:
        found = range_test(step, spec.lr, args.steps or RANGE_STEPS, reporter.show)
    make_out(args.out)
    name = trainer.run.path.name
    plan = trainer.run.path.parent.name
    picture = args.out / f"find-lr-{plan}-{name}.png"
    values = picture.with_name(f"find-lr-{plan}-{name}.csv")
    draw_range(picture, found, f"{name} on {plan}")
    rows = {"lr": found.rates, "loss": found.losses, "smoothed": found.smoothed}
    with atomic_write(values) as temporary:
        pd.DataFrame(rows).to_csv(temporary, index=False)
    print(f"plan_lr: {spec.lr:g}\nsteepest_lr: {found.steepest_lr:.3g}")
    if found.suggested_lr is None:
        print(
            f"suggested_lr: unknown: the loss still fell at {found.rates[-1]:.3g}, the highest "
            "rate that was tried"
        )
    else:
        print(f"suggested_lr: {found.suggested_lr:.3g}")
    print(f"picture: {picture}\nvalues: {values}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
