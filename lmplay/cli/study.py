"""lmp_study: try settings: a grid, a list, or a random or TPE search."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Any

from .. import threads
from ..errors import LmplayError
from . import _args, run_command

if TYPE_CHECKING:
    from rich.console import Console

SHOWN = 20  # cells of each arena that are printed

EPILOG = """A study is a JSON file (docs/studies.md). Its runs are those of trials on the same
plan, so neither makes a run twice. The same command continues after Ctrl-C; started on another
machine with the same --storage it shares the work."""


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="lmp_study",
        description="Try settings: a grid, a list, or a random or TPE search.",
        epilog=EPILOG,
    )
    p.add_argument("study", metavar="NAME|FILE", help="a study, or list to show them")
    p.add_argument(
        "--status", action="store_true", help="make no runs; show and draw what is known so far"
    )
    _args.add_work(p)
    _args.add_out(p, "where runs and studies are kept")
    return p


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    return run_command("lmp_study", lambda: command(args), "a smaller --mini-batch-size, or model")


def command(args: argparse.Namespace) -> int:
    from ..devices import tune_memory

    if args.study == "list":
        return show_studies()
    tune_memory()  # before torch is imported
    threads.use(args.threads)
    from ..training.loop import Stopped
    from ..training.progress import make_console
    from ..trial.study import Study

    console = make_console()

    def log(text: str) -> None:
        console.print(text, highlight=False, markup=False, soft_wrap=True)

    study = Study(
        args.study,
        device=args.device,
        amp=args.amp,
        mini_batch_size=args.mini_batch_size,
        out=args.out,
        storage=args.storage,
        workers=args.workers,
        threads=args.threads,
        create=not args.status,
        log=log,
        command=("lmp_study", *sys.argv[1:]),
        max_hours=args.max_hours,
    )
    try:
        report = study.write() if args.status else study.run()
    except Stopped as e:
        return e.status
    show(report, console)
    return 0


def show_studies() -> int:
    """Print the known studies."""
    from ..trial.study_plan import load_study, study_files

    for name, path in study_files().items():
        try:
            print(f"{name:20} {load_study(path).description}")
        except LmplayError as e:
            print(f"{name:20} broken: {e}")
    return 0


def show(report: dict[str, Any], console: Console) -> None:
    """Print the best cells of each arena, and the pictures."""
    for part in report["parts"]:
        where = part["plan"] + (f", sequences of {part['length']}" if part["length"] else "")
        missing = f", {part['missing']} runs are missing" if part["missing"] else ""
        console.print(f"{where}: {len(part['cells'])} cells{missing}", highlight=False)
        for cell in part["cells"][:SHOWN]:
            loss = "diverged" if cell["loss"] is None else f"loss {cell['loss']:.4f}"
            accuracy = "" if cell["accuracy"] is None else f"  accuracy {cell['accuracy']:.1%}"
            settings = "  ".join(f"{k}={v}" for k, v in cell["settings"].items())
            seconds = f"  {cell['seconds']:.0f} s"
            console.print(
                f"  {loss}{accuracy}{seconds}  {settings or cell['arm']}",
                highlight=False,
                markup=False,
                soft_wrap=True,
            )
        if len(part["cells"]) > SHOWN:
            console.print(f"  and {len(part['cells']) - SHOWN} more", highlight=False)
    for path in report["pictures"]:
        console.print(f"picture: {path}", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    sys.exit(main())
