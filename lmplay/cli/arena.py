"""lmp_arena: measure what a training plan can resolve, and write its certificate."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from .. import threads
from . import _args, run_command

if TYPE_CHECKING:
    from rich.console import Console

    from ..trial.certificate import Certificate

EPILOG = """It trains the baseline and changes to it whose effect is known, some hundred runs, and
writes training_plans/certificates/PLAN.json next to the plan. The same command continues after
Ctrl-C, and writes what is known so far with --status. Trials on the plan quote the certificate."""


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="lmp_arena",
        description="Measure what a training plan can tell, and write its certificate.",
        epilog=EPILOG,
    )
    p.add_argument("training_plan", metavar="PLAN", help="name or file of a plan of one stage")
    p.add_argument(
        "--exp", metavar="NAME", help="the baseline (that of the file with known answers)"
    )
    p.add_argument(
        "--larger", metavar="PLAN", help="the next larger plan, to correlate the gains of trials"
    )
    p.add_argument(
        "--status", action="store_true", help="make no runs; write and show what is known so far"
    )
    _args.add_work(p)
    _args.add_out(p, "where runs are kept")
    return p


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    return run_command("lmp_arena", lambda: command(args), "a smaller --mini-batch-size, or model")


def command(args: argparse.Namespace) -> int:
    from ..devices import tune_memory

    tune_memory()  # before torch is imported
    threads.use(args.threads)
    from ..training.loop import Stopped
    from ..training.progress import make_console
    from ..trial.measure import Measurement

    console = make_console()

    def log(text: str) -> None:
        console.print(text, highlight=False, markup=False, soft_wrap=True)

    measurement = Measurement(
        args.training_plan,
        exp=args.exp,
        larger=args.larger,
        device=args.device,
        amp=args.amp,
        mini_batch_size=args.mini_batch_size,
        out=args.out,
        storage=args.storage,
        workers=args.workers,
        threads=args.threads,
        log=log,
        command=("lmp_arena", *sys.argv[1:]),
        max_hours=args.max_hours,
    )
    try:
        certificate = measurement.write() if args.status else measurement.run()
    except Stopped as e:
        return e.status
    show(certificate, console)
    return 0


def show(certificate: Certificate, console: Console) -> None:
    """Print a certificate as a table, and in one line."""
    from rich.markup import escape
    from rich.table import Table

    marks = {True: "[green]pass[/green]", False: "[red]FAIL[/red]", None: "[dim]open[/dim]"}
    table = Table("line", "", "what was measured", box=None, pad_edge=False)
    for name, line in certificate.lines.items():
        table.add_row(name, marks[line.passed], escape(line.sentence))
    console.print(table, highlight=False)
    console.print(certificate.sentence(), highlight=False, soft_wrap=True)


if __name__ == "__main__":
    sys.exit(main())
