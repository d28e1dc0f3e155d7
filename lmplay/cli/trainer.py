"""lmp_trainer: train an experiment on a training plan, or list and describe what there is."""

from __future__ import annotations

import argparse
import sys
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

from ..discover import Source, find, list_sources, load
from ..errors import LmplayError
from ..files import whole
from ..loggers import NAMES
from . import ending

if TYPE_CHECKING:
    import torch
    from rich.console import Console

    from ..discover import Experiment
    from ..plan import Plan
    from ..report import Report
    from ..trainer import Trainer

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


# What does not train, and the options that say nothing there.
_OF_RUNS = ("match", "initial_model", "log", "fresh", "tokens", "minutes", "save_minutes")
_OF_PASSES = ("steps", "amp", "compile_model", "mini_batch_size")
UNUSED = {
    "describe": (*_OF_RUNS, *_OF_PASSES, "seed", "freeze", "train_only", "no_dirty", "out"),
    "check_grads": (*_OF_RUNS, *_OF_PASSES, "out"),
    "profile": (*_OF_RUNS, "steps"),
    "find_lr": _OF_RUNS,
}
RANGE_STEPS = 150  # of --find-lr, where --steps names none


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="lmp_trainer",
        description="Train a language-model idea, so that it can be compared with a baseline.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("--exp", default="gpt2ish", metavar="NAME|FILE.py[:VARIANT]|list", help="the experiment (gpt2ish)")
    instead = p.add_mutually_exclusive_group()
    instead.add_argument("--describe", action="store_true", help="say what the experiment is, and do not train")
    p.add_argument(
        "--training-plan",
        metavar="NAME|FILE.json|list",
        help="the arena (laptop; with a CUDA card default, all of English and Spanish Wikipedia from the hub)",
    )
    p.add_argument("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto")
    p.add_argument("--amp", action="store_true", help="bf16 where the hardware has it, fp16 on older CUDA cards")
    p.add_argument("--compile-model", action="store_true", help="torch.compile the model")
    p.add_argument("--mini-batch-size", type=positive_int, metavar="N", help="sequences in a pass (found by trying)")
    p.add_argument(
        "--seed",
        type=seed,
        help="of weights and dropout (the plan's seed); the order of the data does not depend on it",
    )
    p.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides", help="a Config field")
    p.add_argument("--match", choices=("params", "flops"), help="train the baseline at the experiment's size instead")
    p.add_argument("--initial-model", type=Path, metavar="RUN", help="start from a trained run's weights")
    p.add_argument(
        "--freeze",
        action="append",
        default=[],
        metavar="PATTERN",
        help="parameters that do not train, as a shell pattern of their names: '*_embed.*'; may be given again",
    )
    p.add_argument(
        "--train-only", action="append", default=[], metavar="PATTERN", help="the only ones that do; may be given again"
    )
    p.add_argument("--minutes", type=positive_float, help="budget of training time, instead of the plan's")
    p.add_argument("--tokens", type=positive_int, help="budget of tokens, instead of the plan's")
    p.add_argument("--steps", type=positive_int, help="budget of optimizer steps, instead of the plan's")
    p.add_argument("--fresh", action="store_true", help="start anew; a run that is there is moved aside")
    p.add_argument("--no-dirty", action="store_true", help="refuse to run with uncommitted changes")
    instead.add_argument(
        "--check-grads", action="store_true", help="list parameters that get no gradient, and do not train"
    )
    instead.add_argument("--profile", action="store_true", help="profile a few steps; no training")
    instead.add_argument(
        "--find-lr", action="store_true", help="range test of the learning rate: a picture, and two rates"
    )
    p.add_argument("--log", choices=NAMES, help="curves for a tracker as well, offline (needs lmplay[log])")
    p.add_argument("--save-minutes", type=float, default=5.0, metavar="M", help="between checkpoints (5); 0: each step")
    p.add_argument("--out", type=Path, default=Path("gpt_out"), metavar="FOLDER", help="where runs are kept (gpt_out)")
    return p


def positive_int(text: str) -> int:
    try:
        value = int(float(text)) if "e" in text.lower() else int(text)
    except (ValueError, OverflowError):
        value = 0
    if value <= 0:
        raise argparse.ArgumentTypeError(f"{text} is no whole number above 0")
    return value


def seed(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = -1
    if not 0 <= value < 2**63:
        raise argparse.ArgumentTypeError(f"{text} is no whole number from 0 to 2^63 - 1")
    return value


def positive_float(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is no finite number above 0")
    return value


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    return ending("lmp_trainer", lambda: command(args), "a smaller --mini-batch-size, or model")


def command(args: argparse.Namespace) -> int:
    from ..report import make_console

    console = make_console()
    if args.exp == "list":
        list_experiments(list_sources(), console)
        return 0
    if args.training_plan == "list":
        list_plans(console)
        return 0
    for mode, options in UNUSED.items():
        for option in options if getattr(args, mode) else ():
            if getattr(args, option) != parser().get_default(option):
                names = f"--{mode.replace('_', '-')} and --{option.replace('_', '-')}"
                raise LmplayError(f"{names} do not go together")
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
        large = device.type == "cuda"
        name = "default" if large else "laptop"
        reason = "a CUDA card is used; its texts come from the hub" if large else "no CUDA card is used"
        report.note(f"training plan: {name} ({reason}; --training-plan list shows the others)")
    path = find_plan(name)
    return path.stem, load_plan(path)


def train(
    args: argparse.Namespace, experiment: Experiment, overrides: dict[str, str], memory: str, console: Console
) -> int:
    from ..data.shards import prepare, vocab_size
    from ..devices import pick_device, pick_precision
    from ..job import Job, Request, Run, matched, sized_config
    from ..report import Report
    from ..trainer import Stopped

    report = Report(console)
    device = pick_device(args.device)
    precision = pick_precision(device, args.amp)
    if precision.note:
        report.note(precision.note)
    plan_name, plan = choose_plan(args.training_plan, device, report)
    plan = plan.with_budget(args.tokens, args.steps, args.minutes)
    asked = {f.name: getattr(args, f.name) for f in fields(Request) if hasattr(args, f.name)}
    lists = {name: tuple(asked[name]) for name in ("freeze", "train_only")}
    request = Request(**{**asked, **lists}, command=("lmp_trainer", *sys.argv[1:]), memory=memory)
    job = Job(experiment, overrides, plan_name, plan, device, precision, report, request)
    if args.describe:  # sizes are known without the data, which may be on a hub that is out of reach
        with report:
            config = sized_config(job, vocab_size(plan, report.preparing))
        describe(experiment, experiment.runner(config), config, console)
        return 0
    with report:
        prepared = prepare(plan, report.preparing)
    config = sized_config(job, prepared.tokenizer.vocab_size)
    control = None
    if args.match:
        job, config, control = matched(job, config, args.match, prepared)
    run = Run(job, config, prepared, control)
    if args.check_grads:
        return check_grads(run.trainer())
    if args.profile:
        return profile(run.trainer(), args, console)
    if args.find_lr:
        return find_lr(run.trainer(), args, report)
    try:
        print_summary(run.train())
    except Stopped as e:
        return e.status
    return 0


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
    from ..runs import make_out

    trainer.prepare(args.mini_batch_size, {})
    arrays = trainer.streams[0].batch(0, trainer.batch_size)

    def step() -> None:
        trainer.accumulate(arrays)
        trainer.optimizers.prepare(trainer.plan.batch.grad_clip, trainer.loss_scale)
        trainer.optimizers.step()
        trainer.optimizers.zero_grad()

    make_out(args.out)
    trace = args.out / f"profile-{Path(trainer.run.path).name}.json"
    console.print(probe.profile(step, trainer.device, trace))
    print(f"trace: {trace} (open it at chrome://tracing or ui.perfetto.dev)")
    return 0


def find_lr(trainer: Trainer, args: argparse.Namespace, report: Report) -> int:
    """The range test on the plan's own data and optimizer: a CSV, a picture, the steepest and the safest rate."""
    import math

    import pandas as pd

    from ..lr_range import range_test
    from ..plots import draw_range
    from ..runs import make_out

    trainer.prepare(args.mini_batch_size, {})
    spec = trainer.plan.optimizer_of(trainer.current)

    def step(index: int, factor: float) -> float:
        arrays = trainer.streams[0].batch(index, trainer.batch_size)
        trainer.optimizers.set_factor(factor)
        sums = trainer.accumulate(arrays)
        loss = sums["loss"] / max(1, arrays.n_tokens)
        norm = float(trainer.optimizers.prepare(trainer.plan.batch.grad_clip, trainer.loss_scale))
        if math.isfinite(norm):
            trainer.optimizers.step()
        elif trainer.loss_scale > 1:  # of fp16, too large for its range
            trainer.loss_scale /= 2
        else:
            return math.inf
        trainer.optimizers.zero_grad()
        return loss

    with report:
        found = range_test(step, spec.lr, args.steps or RANGE_STEPS, report.show)
    make_out(args.out)
    stem = args.out / f"find-lr-{trainer.run.path.parent.name}-{trainer.run.path.name}"
    draw_range(stem.with_name(stem.name + ".png"), found, f"{trainer.run.path.name} on {trainer.run.path.parent.name}")
    rows = {"lr": found.rates, "loss": found.losses, "smoothed": found.smoothed}
    with whole(stem.with_name(stem.name + ".csv")) as temporary:
        pd.DataFrame(rows).to_csv(temporary, index=False)
    print(f"plan_lr: {spec.lr:g}\nsteepest_lr: {found.steepest:.3g}")
    if found.safest is None:
        print(f"safest_lr: unknown: the loss still fell at {found.rates[-1]:.3g}, the highest rate that was tried")
    else:
        print(f"safest_lr: {found.safest:.3g}")
    print(f"picture: {stem}.png\nvalues: {stem}.csv")
    return 0


if __name__ == "__main__":
    sys.exit(main())
