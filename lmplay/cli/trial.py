"""lmp_trial: find out whether an idea is better than its baseline."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .. import threads
from ..errors import LmplayError
from ..trial.statistics import HARMFUL, REAL, UNDECIDED, WITHIN_NOISE
from . import _args, run_command

if TYPE_CHECKING:
    from rich.console import Console

    from ..trial.runner import Trial
    from ..trial.work import Part

EXIT_STATUS = {REAL: 0, UNDECIDED: 12, WITHIN_NOISE: 11, HARMFUL: 10}  # the best first

EPILOG = """The verdict: REAL (lower loss by the exact sign-flip test at the level, and lower than
every matched baseline's), WITHIN NOISE (any effect is smaller than --smallest-effect), HARMFUL
(higher loss), or UNDECIDED, with the number of pairs it would still take. The same command
continues a trial; started on another machine with the same --storage it shares the work."""


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="lmp_trial",
        description="Train an idea and its baseline in pairs until it is clear which is better.",
        epilog=EPILOG,
    )
    p.add_argument("--exp", action="append", default=[], metavar="NAME", help="repeatable")
    p.add_argument(
        "--arm",
        action="append",
        default=[],
        metavar="'NAME KEY=VALUE ...'",
        help="an experiment with settings, such as 'NAME optimizer.name=muon'; repeatable",
    )
    p.add_argument("--against", metavar="NAME", help="the baseline (the first idea's own)")
    p.add_argument(
        "--training-plan", default="laptop", metavar="NAME|FILE", help="the plan (laptop)"
    )
    p.add_argument(
        "--tokens", type=_args.positive_int, metavar="N", help="budget instead of the plan's"
    )
    p.add_argument(
        "--max-seeds", type=_args.positive_int, default=20, metavar="N", help="pairs at most (20)"
    )
    p.add_argument(
        "--smallest-effect",
        type=float,
        default=0.005,
        metavar="NATS",
        help="smaller effects are WITHIN NOISE (.005)",
    )
    p.add_argument(
        "--level", type=float, default=0.01, help="how often a verdict may be wrong (.01)"
    )
    p.add_argument(
        "--lr",
        choices=("tuned", "fixed"),
        default="tuned",
        help="choose each arm's learning rate first, or use the plan's (tuned)",
    )
    p.add_argument(
        "--tune",
        default="",
        metavar="LIST",
        help="settings to choose first instead of the learning rate, such as "
        "optimizer.lr,optimizer.weight_decay",
    )
    p.add_argument(
        "--tune-tries",
        type=_args.positive_int,
        default=10,
        metavar="N",
        help="runs of each arm with which they are chosen (10)",
    )
    p.add_argument(
        "--budget",
        choices=("tokens", "flops", "seconds"),
        default="tokens",
        help="what both arms of a pair get alike (tokens)",
    )
    p.add_argument(
        "--screen", action="store_true", help="drop ideas that three pairs show to be no better"
    )
    panel = p.add_mutually_exclusive_group()
    panel.add_argument(
        "--panel",
        action="store_true",
        help="judge in every context of the plan (the default where it has some)",
    )
    panel.add_argument(
        "--no-panel", action="store_true", help="judge with the plan's own recipe only"
    )
    panel.add_argument(
        "--context",
        action="append",
        default=[],
        metavar="NAME",
        help="judge in this context of the plan; repeatable",
    )
    p.add_argument(
        "--controls", default="", metavar="LIST", help="of params,flops,seconds: matched baselines"
    )
    p.add_argument(
        "--sizes",
        type=sizes,
        default=(),
        metavar="LIST",
        help="multiples of the width, such as 0.5,1,2: does the gain shrink?",
    )
    p.add_argument("--name", help="the trial's name (made of the plan and the ideas)")
    p.add_argument("--status", action="store_true", help="show what runs and what is known so far")
    p.add_argument(
        "--exit-code",
        action="store_true",
        help="exit with 0 for REAL, 10 for HARMFUL, 11 for WITHIN NOISE, 12 for UNDECIDED; of "
        "several ideas for the best",
    )
    _args.add_work(p)
    _args.add_out(p, "where runs and trials are kept")
    return p


def contexts(args: argparse.Namespace) -> tuple[str, ...] | None:
    """Return the contexts that the options ask for; None: all that the plan has."""
    if args.panel:
        from ..plan import find_plan, load_plan

        names = tuple(load_plan(find_plan(args.training_plan)).contexts)
        if not names:
            raise LmplayError(f"--panel: the plan {args.training_plan} has no contexts")
        return names
    return () if args.no_panel else tuple(args.context) or None


def sizes(text: str) -> tuple[float, ...]:
    """Multiples of the model's width, in ascending order."""
    try:
        found = tuple(sorted({float(part) for part in text.split(",")}))
    except ValueError as e:
        raise argparse.ArgumentTypeError(f"{text}: write numbers as 0.5,1,2") from e
    if len(found) < 2 or not all(0 < f < 100 for f in found):
        raise argparse.ArgumentTypeError(f"{text}: two sizes or more, above 0")
    return found


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    return run_command("lmp_trial", lambda: command(args), "a smaller --mini-batch-size, or model")


def command(args: argparse.Namespace) -> int:
    from ..devices import tune_memory

    if not args.exp and not args.arm:
        raise LmplayError("--exp or --arm names what is judged")
    tune_memory()  # before torch is imported
    threads.use(args.threads)
    from ..training.loop import Stopped
    from ..training.progress import make_console
    from ..trial.design import Design
    from ..trial.runner import Trial

    console = make_console()

    def log(text: str) -> None:
        console.print(text, highlight=False, markup=False, soft_wrap=True)

    design = Design(
        exp=(*args.exp, *args.arm),
        against=args.against,
        training_plan=args.training_plan,
        tokens=args.tokens,
        max_pairs=args.max_seeds,
        smallest_effect=args.smallest_effect,
        level=args.level,
        tuned=args.lr == "tuned",
        contexts=contexts(args),
        tune=tuple(key for key in args.tune.split(",") if key),
        tune_tries=args.tune_tries,
        budget=args.budget,
        screen=args.screen,
        controls=tuple(c for c in args.controls.split(",") if c),
        sizes=args.sizes,
        mini_batch_size=args.mini_batch_size,
        device=args.device,
        amp=args.amp,
    )
    trial = Trial(
        design,
        out=args.out,
        name=args.name,
        storage=args.storage,
        workers=args.workers,
        threads=args.threads,
        create=not args.status,
        log=log,
        command=("lmp_trial", *sys.argv[1:]),
        max_hours=args.max_hours,
    )
    if args.status:
        for part in trial.parts:
            show_status(part, console)
        reports = [part.state().report() for part in trial.parts]
        return exit_status(reports) if args.exit_code else 0
    try:
        report = trial.run()
    except Stopped as e:
        return e.status
    show_reports(trial, report, console)
    if not args.exit_code:
        return 0
    if trial.contexts:
        return exit_status(list(report["contexts"].values()))
    return exit_status(report["sizes"] if trial.design.sizes else [report])


def exit_status(reports: Sequence[Mapping[str, Any]]) -> int:
    """Return the exit status for verdicts: of each idea, the word that all contexts and sizes
    agree on (else UNDECIDED); of several ideas, that of the best."""
    words: dict[str, set[str]] = {}
    for report in reports:
        for arm, verdict in report["arms"].items():
            words.setdefault(arm, set()).add(verdict["word"])
    agreed = {next(iter(found)) if len(found) == 1 else UNDECIDED for found in words.values()}
    best = next((word for word in EXIT_STATUS if word in agreed), UNDECIDED)  # no pair yet
    return EXIT_STATUS[best]


def show_status(part: Part, console: Console) -> None:
    """Print what runs, what waits, and the verdicts so far."""
    rows = part.queue.status()
    for unit, state, owner in rows:
        if state != "done":
            who = f" ({owner})" if owner else ""
            console.print(f"{state}: {unit}{who}", highlight=False, markup=False)
    done = sum(state == "done" for _, state, _ in rows)
    console.print(f"{done} runs done, {len(rows) - done} queued", highlight=False)
    show(part.state().report(), console)


def show_reports(trial: Trial, report: dict[str, Any], console: Console) -> None:
    """Print the verdicts of each size, and how the gain changes with the size."""
    reports = [report]
    if trial.contexts:
        reports = list(report["contexts"].values())
    elif trial.design.sizes:
        reports = report["sizes"]
    for part, part_report in zip(trial.parts, reports, strict=True):
        show(part_report, console)
        path = part.folder / "trial.json"
        console.print(f"report: {path}", highlight=False, soft_wrap=True)
    for arm, found in report.get("panel", {}).items():
        console.print(f"{arm}: {found['sentence']}", highlight=False, soft_wrap=True)
    for arm, fit in report.get("fits", {}).items():
        console.print(f"{arm} over sizes: {fit['sentence']}", highlight=False, soft_wrap=True)


def show(report: dict[str, Any], console: Console) -> None:
    """Print verdicts as sentences, then figures for grep."""

    def line(text: str) -> None:
        console.print(text, highlight=False, soft_wrap=True)

    for text in sentences(report):
        line(text)
    null = report["null"]
    if null["half"] is not None:
        line(
            f"luck: the means of {null['runs']} runs of {report['design']['against']} each, with "
            f"other seeds, would differ by up to {null['half']:.4f} (99 %)"
        )
    cost = report["cost"]
    line(f"runs: {cost['runs']}\ntraining_hours: {cost['hours']:.3f}")


def sentences(report: dict[str, Any]) -> list[str]:
    """Return a report's verdicts as sentences."""
    against = report["design"]["against"]
    context = report["design"]["context"]
    lines = []
    for arm, v in report["arms"].items():
        note = "" if v["tuned"] else " (untuned: every arm at the plan's learning rate)"
        if v["word"] == REAL and not v["controls"]:
            note += " (no controls: --controls params,flops,seconds)"
        more = "" if v["more"] is None else "; " + further(v["more"])
        where = f", context {context}" if context else ""
        lines.append(f"{arm} against {against}{where}: {v['word']}{note}: {v['why']}{more}")
        if v["gain"] is None:
            continue
        interval = f"{_end(v['low'])} to {_end(v['high'])}"
        bits = "" if v["gain_bpb"] is None else f", {v['gain_bpb']:+.4f} bits per byte"
        lines.append(
            f"  gain {v['gain']:+.4f} nats per token ({interval}){bits}; p {v['p']:.4g} of the "
            f"{v['level']:.4g} that this look may spend; "
            f"{v['pairs']} pairs"
        )
        if v["tokens_ratio"]:
            lines.append(
                f"  {against} needs {v['tokens_ratio']:.2f} times the tokens for the same loss "
                f"({v['seconds_ratio']:.2f} times the seconds, {v['flops_ratio']:.2f} times the "
                "FLOPs)"
            )
        if v["deviation_paired"] is not None:
            lines.append(
                f"  standard deviation of the difference: paired {v['deviation_paired']:.4f}, "
                f"unpaired {v['deviation_unpaired']:.4f}"
            )
        for control, values in v["controls"].items():
            mean = sum(values) / len(values)
            lines.append(
                f"  against the baseline of equal {control}: {-mean:+.4f} ({len(values)} seeds)"
            )
        lines.append(f"  {report['certificate']['sentence']}")
    return lines


def further(pairs: int) -> str:
    """Return how many more pairs it would take, in words."""
    if pairs == 0:
        return "it is close: some more pairs may settle it (--max-seeds)"
    return f"about {pairs} more pair{'s' * (pairs > 1)} would settle it"


def _end(value: float | None) -> str:
    return "unknown" if value is None else f"{value:+.4f}"


if __name__ == "__main__":
    sys.exit(main())
