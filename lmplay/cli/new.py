"""lmp_new: start a new experiment as a copy of another one."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from . import run_command


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="lmp_new",
        description="Start a new experiment: a copy of another one under a new name, to change.",
    )
    p.add_argument("name", metavar="NAME", help="the new idea's name, such as my_idea")
    p.add_argument(
        "--from",
        dest="source",
        metavar="NAME|FILE.py[:VARIANT]",
        help="the experiment to copy (the baseline)",
    )
    p.add_argument(
        "--out",
        type=Path,
        default=Path("experiments"),
        metavar="FOLDER",
        help="where the file goes (experiments)",
    )
    return p


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    return run_command("lmp_new", lambda: command(args))


def command(args: argparse.Namespace) -> int:
    from ..discover import default_baseline, find
    from ..scaffold import new_experiment

    source, variant = find(args.source or default_baseline())
    path = new_experiment(args.name, source, variant, args.out)
    in_path = args.out.resolve() == Path("experiments").resolve()
    exp = args.name if in_path else str(path)
    print(f"{path}: a copy of {variant}, which is its baseline")
    print("change it, mark the changed lines with # CHANGED, and then:")
    print(f"  lmp_trainer --exp {exp} --diff")
    print(f"  lmp_trainer --exp {exp} --training-plan smoke")
    print(f"  lmp_trial --exp {exp} --training-plan sketch")
    return 0


if __name__ == "__main__":
    sys.exit(main())
