"""lmp_trial: is an idea better than its baseline? Runs all that the answer needs, and stops once it is known."""

from __future__ import annotations

import argparse
import os
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import BusyError, LmplayError, NotFiniteError
from ..files import write_json
from ..verdict import REAL, fewest
from . import ending
from .trainer import positive_int

if TYPE_CHECKING:
    from rich.console import Console

    from ..board import Board
    from ..job import Job
    from ..trial import Design, Result, Unit

WAIT = 1.0  # seconds between two looks at a board on which nothing waits

EPILOG = """The verdict: REAL (lower loss by the exact sign-flip test at the level, and under every control), WITHIN
NOISE (any effect is smaller than --smallest-effect), HARMFUL, or UNDECIDED with what it would take. The same command
goes on where it stopped; started again elsewhere with the same --storage it shares the work."""


def parser() -> argparse.ArgumentParser:
    description = __doc__.split(": ", 1)[1]
    # Without abbreviations, or --worker would reach the helpers.
    p = argparse.ArgumentParser(prog="lmp_trial", description=description, epilog=EPILOG, allow_abbrev=False)
    p.add_argument("--exp", action="append", required=True, metavar="NAME", help="an idea; repeat it for several")
    p.add_argument("--against", metavar="NAME", help="the baseline (the first idea's own)")
    p.add_argument("--training-plan", default="laptop", metavar="NAME|FILE", help="the arena (laptop)")
    p.add_argument("--tokens", type=positive_int, metavar="N", help="a budget in place of the plan's")
    p.add_argument("--max-seeds", type=positive_int, default=20, metavar="N", help="pairs at most (20)")
    p.add_argument("--smallest-effect", type=float, default=0.005, metavar="NATS", help="what is of interest (.005)")
    p.add_argument("--level", type=float, default=0.01, help="how often a verdict may be wrong (.01)")
    p.add_argument("--lr", choices=("tuned", "fixed"), default="tuned", help="tune each arm's rate first, or not")
    p.add_argument("--controls", default="", metavar="LIST", help="of params,flops,seconds: matched baselines")
    p.add_argument("--sizes", type=sizes, default=(), metavar="LIST", help="widths, as 0.5,1,2: does the gain shrink?")
    p.add_argument("--workers", type=positive_int, default=1, metavar="N", help="processes on this machine (1)")
    p.add_argument("--storage", metavar="PATH|URL", help="a journal file on a shared disk, redis://, or a database")
    p.add_argument("--name", help="the trial's name (from the plan and the ideas)")
    p.add_argument("--status", action="store_true", help="say what runs where, and what is known so far")
    p.add_argument(
        "--mini-batch-size", type=positive_int, metavar="N", help="sequences in a forward pass (4)", default=4
    )
    p.add_argument("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto")
    p.add_argument("--amp", action="store_true", help="bf16 or fp16 where the hardware has it")
    p.add_argument("--out", type=Path, default=Path("gpt_out"), help="where runs and trials lie (gpt_out)")
    return p


def sizes(text: str) -> tuple[float, ...]:
    """Factors on the model's width, growing, each once."""
    try:
        found = tuple(sorted({float(part) for part in text.split(",")}))
    except ValueError as e:
        raise argparse.ArgumentTypeError(f"{text}: write numbers as 0.5,1,2") from e
    if len(found) < 2 or not all(0 < f < 100 for f in found):
        raise argparse.ArgumentTypeError(f"{text}: two sizes or more, above 0")
    return found


def main(argv: list[str] | None = None) -> int:
    given = list(sys.argv[1:] if argv is None else argv)
    args = parser().parse_args(given)
    return ending("lmp_trial", lambda: command(args, given), "a smaller --mini-batch-size, or model")


def command(args: argparse.Namespace, given: list[str]) -> int:
    from ..devices import tune_memory

    memory = tune_memory()  # before torch is imported
    import torch

    from ..board import Board, open_storage
    from ..report import make_console
    from ..runs import make_out
    from ..trial import over_sizes

    console = make_console()
    threads = max(1, torch.get_num_threads() // args.workers)
    torch.set_num_threads(threads)
    if not args.status:
        make_out(args.out)
    parts = []
    for size in args.sizes or (1.0,):
        jobs, design = _design(args, size, memory, console)
        name = args.name or "-".join([design.plan, *design.arms, "against", design.against])
        whole = args.out / "trials" / name
        name += f"-x{size:g}" if args.sizes else ""
        folder = args.out / "trials" / name
        journal = folder / "journal.log"
        if args.status and not args.storage and not journal.exists():
            raise LmplayError(f"there is no trial {name} in {args.out}; --name says which")
        board = Board(open_storage(args.storage or str(journal)), name, design, create=not args.status)
        parts.append(Part(board, design, jobs, folder))
    widths = [next(iter(part.jobs.values())).plan.model.embed_dim for part in parts]
    if len(set(widths)) < len(widths):
        raise LmplayError(
            f"--sizes {','.join(f'{s:g}' for s in args.sizes)}: two of them have the same width: {widths}"
        )
    if args.status:
        for part in parts:
            _status(part, console)
        return 0
    for part in parts:
        write_json(part.folder / "design.json", part.board.study.user_attrs["design"])
    least = fewest(design.level, len(design.arms), spent=1.0)
    if design.max_pairs < least:
        console.print(f"fewer than {least} pairs cannot show that anything is REAL: --max-seeds", highlight=False)
    helpers = [_start(given, threads) for _ in range(1, args.workers)]
    status = 1  # an exception leaves it so
    try:
        for part in parts:
            status = _work(part, console)
            if status:
                break
    finally:
        for helper in helpers:
            if status:
                helper.terminate()
            if helper.wait() and not status:
                console.print(f"a worker ended with status {helper.returncode}", highlight=False)
    if status:
        return status
    told = [_tell(part, console) for part in parts]
    if args.sizes:
        fits = over_sizes(told)
        write_json(whole / "sizes.json", {"sizes": args.sizes, "fits": fits})
        for arm, fit in fits.items():
            console.print(f"{arm} over sizes: {fit['sentence']}", highlight=False, soft_wrap=True)
    return 0


def _start(given: list[str], threads: int) -> subprocess.Popen[bytes]:
    """Another worker on this machine: the same command, alone and quiet."""
    words = [sys.executable, "-m", "lmplay.cli.trial", *given, "--workers", "1"]
    env = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    return subprocess.Popen(words, stdout=subprocess.DEVNULL, env=env)


# ---------------------------------------------------------------- the design


def _design(args: argparse.Namespace, size: float, memory: str, console: Console) -> tuple[dict[str, Job], Design]:
    """A job to each arm and the baseline, and what is fixed before the first run. `size` is a factor on the width.

    Raises:
        LmplayError: a name is unknown, an idea is its own baseline, a plan has several steps or a budget in time.
    """
    from ..data.shards import prepare
    from ..devices import pick_device, pick_precision
    from ..discover import find, find_baseline, load
    from ..job import Job, Request
    from ..plan import find_plan, load_plan
    from ..report import Report
    from ..runs import source_digest
    from ..trial import CONTROLS, Design
    from ..verdict import MOST_PAIRS

    controls = tuple(c for c in args.controls.split(",") if c)
    for control in controls:
        if control not in CONTROLS:
            raise LmplayError(f"--controls {control}: there is no such control (there is: {', '.join(CONTROLS)})")
    if "seconds" in controls and args.workers > 1:
        raise LmplayError("--controls seconds: workers take each other's time; it needs --workers 1")
    if args.max_seeds > MOST_PAIRS:
        raise LmplayError(f"--max-seeds {args.max_seeds}: {MOST_PAIRS} at most, or trying all signs takes gigabytes")
    if not 0 < args.level < 0.5 or args.smallest_effect <= 0:
        raise LmplayError("--level must be in (0, 0.5), --smallest-effect above 0")
    device = pick_device(args.device)
    precision = pick_precision(device, args.amp)
    path = find_plan(args.training_plan)
    plan = load_plan(path).with_budget(args.tokens, None, None)
    if len(plan.steps) > 1 or plan.steps[0].minutes or not (plan.steps[0].tokens or plan.steps[0].steps):
        raise LmplayError(
            f"{path}: a trial needs a plan of one step with a budget in tokens or steps; --tokens gives one"
        )
    if size != 1:
        plan = resized(plan, size, path)
    experiments = [load(*find(name)) for name in args.exp]
    against = load(*(find(args.against) if args.against else find_baseline(experiments[0].source)))
    names = [e.variant for e in experiments]
    if against.variant in names or len(set(names)) < len(names):
        raise LmplayError(f"--exp {', '.join(names)} against {against.variant}: each arm must be another one")
    for e in experiments:
        if {"params", "flops"} & set(controls) and e.source.baseline != against.variant:
            raise LmplayError(
                f"--controls: {e.variant} is matched with its own baseline, {e.source.baseline}, not {against.variant}"
            )
    tokens = plan.steps[0].tokens or (plan.steps[0].steps or 0) * plan.batch.batch_size * (plan.model.max_len or 0)
    # Twenty validations or more, so that the end point's mean of three is of the schedule's end.
    every = min(plan.validation.every_tokens, max(1, tokens // 20))
    plan = plan.model_copy(update={"validation": plan.validation.model_copy(update={"every_tokens": every})})
    request = Request(
        out=args.out, mini_batch_size=args.mini_batch_size, command=("lmp_trial", *sys.argv[1:]), memory=memory
    )
    report = Report(console, brief=True)
    jobs = {e.variant: Job(e, {}, path.stem, plan, device, precision, report, request) for e in (against, *experiments)}
    with report:
        prepared = prepare(plan, report.preparing)
    digests = {e.variant: source_digest(e.source.path) for e in (against, *experiments)}
    design = Design(
        path.stem, plan.fingerprint, against.variant, tuple(names), args.level, args.max_seeds, args.smallest_effect,
        args.lr == "tuned", controls, tokens, precision.name, device.type, prepared.fingerprint, digests,
    )  # fmt: skip
    return jobs, design


def resized(plan: Any, size: float, path: Path) -> Any:
    """The plan with a model `size` times as wide; heads stay as many, and of an even width.

    Raises:
        LmplayError: the plan leaves the width to the experiment, or it would be none.
    """
    if not plan.model.embed_dim or not plan.model.num_heads:
        raise LmplayError(f"{path}: --sizes needs embed_dim and num_heads in the plan's model")
    unit = 2 * plan.model.num_heads
    width = round(plan.model.embed_dim * size / unit) * unit
    if not width:
        raise LmplayError(f"--sizes {size:g}: {path} has a width of {plan.model.embed_dim} in heads of even width")
    return plan.model_copy(update={"model": plan.model.model_copy(update={"embed_dim": width})})


# ---------------------------------------------------------------- working


@dataclass(frozen=True)
class Part:
    """A trial at one size."""

    board: Board
    design: Design
    jobs: dict[str, Job]
    folder: Path


def _work(part: Part, console: Console) -> int:
    """Claim and run units until the trial is over; the exit status of an interrupt, or 0.

    The report is written anew after every run, so that a page shows how far it is.
    """
    from ..trainer import Stopped
    from ..trial import needed, report

    board, design, jobs = part.board, part.design, part.jobs
    owner = f"{socket.gethostname()} {os.getpid()}"
    while units := needed(design, board.results()):
        board.offer(units)
        claimed = board.claim(owner)
        if claimed is None:
            for key in board.take_over_dead():
                console.print(f"its owner was not heard of any more: {key}", highlight=False)
            time.sleep(WAIT)
            continue
        number, unit = claimed
        console.print(f"{len(board.results())} runs done; now {unit.key}", highlight=False)
        try:
            with board.alive(number):
                result = run_unit(unit, design, jobs)
        except Stopped as e:
            board.give_up(number)
            return e.status
        except BusyError:  # who had it before was given up, and is alive after all
            board.give_up(number)
            time.sleep(WAIT)
            continue
        except BaseException:
            board.give_up(number)
            raise
        board.done(number, result)
        write_json(part.folder / "trial.json", report(design, board.results()))
    return 0


def run_unit(unit: Unit, design: Design, jobs: dict[str, Job]) -> Result:
    """Train one run of a trial, or go on with it, and read its end point.

    A run that diverges ends at infinity: no learning rate to choose, and an error that names it in a pair.
    """
    from ..compare import TRIALS, read_curve
    from ..data.shards import prepare
    from ..job import Run, matched, sized_config
    from ..trial import Result

    job = jobs[unit.of or unit.arm]
    plan = scaled(job.plan, unit, design.tokens)
    name = f"{TRIALS}{job.plan_name}-{design.plan_fingerprint[:6]}"  # trials of one arena share their runs
    # ... as long as their machines are of one kind, and nobody took the time of those whose seconds count.
    name += "" if design.device == "cpu" else f"-{design.device}"
    name += "-timed" if "seconds" in design.controls else ""
    name += "" if unit.factor == 1 else f"-lr{unit.factor:g}"
    tokens = None if unit.share == 1 else plan.steps[0].tokens
    request = replace(job.request, seed=unit.seed, tokens=tokens)
    job = replace(job, plan=plan, plan_name=name, request=request)
    with job.report:
        prepared = prepare(plan, job.report.preparing)
    config, control = sized_config(job, prepared.tokenizer.vocab_size), None
    if unit.match in ("params", "flops"):
        job, config, control = matched(job, config, unit.match, prepared)
    elif unit.match == "seconds":
        job = replace(jobs[unit.arm], plan=plan, plan_name=name, request=request)
        config = sized_config(job, prepared.tokenizer.vocab_size)
    run = Run(job, config, prepared, control)
    if parts := run.folder.differs(run.identity):  # of an earlier trial, before somebody changed the idea
        # Not job.report: of one of many runs that is quiet, and an earlier trial's report names what moves.
        print(f"{run.folder.path} is of other {' and '.join(parts)}: it is moved aside", file=sys.stderr)
        run = Run(replace(job, request=replace(job.request, fresh=True)), config, prepared, control)
    try:
        run.train()
    except NotFiniteError:
        inf = float("inf")
        return Result(inf, inf, [], [], 0.0, 0.0, str(run.folder.path))
    curve = read_curve(run.folder.path / "validate.csv")
    end = curve.tail(design.last)
    last, inf = curve.iloc[-1], float("inf")
    loss, bpb = (float(end[c].fillna(inf).mean()) for c in ("loss", "bpb"))
    return Result(
        loss, bpb, [float(t) for t in curve["tokens"]], [float(x) for x in curve["loss"]],
        float(last["seconds"]), float(last["flops"]), str(run.folder.path),
    )  # fmt: skip


def scaled(plan: Any, unit: Unit, tokens: int) -> Any:
    """The plan of a unit: learning rates times its factor, a share of the budget, and the pair's own data order."""

    def with_factor(optimizer: Any) -> Any:
        rates = {"lr": optimizer.lr * unit.factor, "other_lr": optimizer.other_lr * unit.factor}
        return optimizer.model_copy(update=rates)

    step = plan.steps[0]
    changes: dict[str, Any] = {
        "optimizer": with_factor(step.optimizer) if step.optimizer else None,
        "lr": step.lr * unit.factor if step.lr else None,
    }
    if unit.share != 1:
        changes |= {"tokens": round(tokens * unit.share), "steps": None, "epochs": None}
        every = max(1, round(tokens * unit.share) // 20)
        validation = plan.validation.model_copy(update={"every_tokens": every})
        plan = plan.model_copy(update={"validation": validation})
    return plan.model_copy(
        update={
            "optimizer": with_factor(plan.optimizer), "steps": [step.model_copy(update=changes)],
            "seed": plan.seed + unit.seed,
        }
    )  # fmt: skip


# ---------------------------------------------------------------- telling


def _status(part: Part, console: Console) -> None:
    """What runs where, what waits, and the verdicts so far."""
    from ..trial import report

    board, design = part.board, part.design
    rows = board.status()
    for unit, state, owner in rows:
        if state != "done":
            console.print(f"{state}: {unit}{f' ({owner})' if owner else ''}", highlight=False, markup=False)
    done = sum(state == "done" for _, state, _ in rows)
    console.print(f"{done} runs done, {len(rows) - done} on the board", highlight=False)
    _show(report(design, board.results()), console)


def _tell(part: Part, console: Console) -> dict[str, Any]:
    """Write the trial's report and say the verdicts."""
    from ..trial import report

    told = report(part.design, part.board.results())
    write_json(part.folder / "trial.json", told)
    _show(told, console)
    console.print(f"kept in {part.folder / 'trial.json'}", highlight=False, soft_wrap=True)
    return told


def _show(told: dict[str, Any], console: Console) -> None:
    """Verdicts as sentences, then the figures that a grep finds."""
    design = told["design"]
    for arm, v in told["arms"].items():
        tuned = "" if v["tuned"] else " (untuned: every arm at the plan's learning rate)"
        if v["word"] == REAL and not v["controls"]:
            tuned += " (no controls: --controls params,flops,seconds)"
        more = "" if v["more"] is None else "; " + further(v["more"])
        console.print(f"{arm} against {design['against']}: {v['word']}{tuned}: {v['why']}{more}", highlight=False)
        ends = f"{_end(v['low'])} to {_end(v['high'])}"
        if v["gain"] is None:
            continue
        console.print(
            f"  gain {v['gain']:+.4f} nats per token ({ends}), {v['gain_bpb']:+.4f} bits per byte; "
            f"p {v['p']:.4g} where {v['level']:.4g} may be spent; {v['pairs']} pairs",
            highlight=False, soft_wrap=True,
        )  # fmt: skip
        if v["tokens_ratio"]:
            console.print(
                f"  {design['against']} needs {v['tokens_ratio']:.2f} times the tokens for the same loss "
                f"({v['seconds_ratio']:.2f} times the seconds, {v['flops_ratio']:.2f} times the FLOPs)",
                highlight=False, soft_wrap=True,
            )  # fmt: skip
        if v["deviation_paired"] is not None:
            console.print(
                f"  deviation of the difference: paired {v['deviation_paired']:.4f}, unpaired "
                f"{v['deviation_unpaired']:.4f}",
                highlight=False,
            )
        for control, values in v["controls"].items():
            mean = sum(values) / len(values)
            console.print(
                f"  against the baseline of equal {control}: {-mean:+.4f} ({len(values)} seeds)", highlight=False
            )
    null = told["null"]
    if null["half"] is not None:
        console.print(
            f"null: the means of {null['runs']} runs of {design['against']} each, with other seeds, would differ "
            f"by up to {null['half']:.4f} (99 %)",
            highlight=False, soft_wrap=True,
        )  # fmt: skip
    cost = told["cost"]
    console.print(f"runs: {cost['runs']}\ntraining_hours: {cost['hours']:.3f}", highlight=False)


def further(pairs: int) -> str:
    """How many more pairs it would take, in words."""
    if pairs == 0:
        return "it is close: some more pairs may settle it (--max-seeds)"
    return f"about {pairs} more pair{'s' * (pairs > 1)} would settle it"


def _end(value: float | None) -> str:
    return "unknown" if value is None else f"{value:+.4f}"


if __name__ == "__main__":
    sys.exit(main())
