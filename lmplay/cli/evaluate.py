"""lmp_evaluate: tasks of lm-eval for runs and pretrained models, compared item by item."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from .. import threads
from ..errors import LmplayError
from . import _args, run_command

if TYPE_CHECKING:
    from rich.console import Console

    from ..evaluation.evaluate import TaskResult

EPILOG = """continuations needs no network: which of four texts continues a Wikipedia introduction
(continuations_es and others: in another language)? The tasks of lm-eval load their data from the
hub, or from a file that --data names. Results are kept in OUT/evaluations; the same command does
not compute them again."""


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="lmp_evaluate",
        description="Evaluate models on tasks of lm-eval, and compare them item by item.",
        epilog=EPILOG,
    )
    p.add_argument(
        "--model",
        nargs="+",
        required=True,
        metavar="RUN|CHECKPOINT|hf:NAME|gguf:FILE",
        help="the models; the others are compared with the first",
    )
    p.add_argument(
        "--tasks",
        default="continuations",
        metavar="NAME,NAME",
        help="names of tasks (continuations)",
    )
    p.add_argument(
        "--data",
        action="append",
        default=[],
        metavar="TASK=FILE.json",
        help="a local copy of a task's items; repeatable",
    )
    p.add_argument("--include", type=Path, metavar="FOLDER", help="with tasks of yours (YAML)")
    p.add_argument("--limit", type=_args.positive_int, metavar="N", help="items of each task")
    p.add_argument(
        "--batch-size",
        type=_args.positive_int,
        default=16,
        metavar="N",
        help="continuations in one forward pass (16)",
    )
    p.add_argument("--fresh", action="store_true", help="compute kept results again")
    _args.add_trust(p)
    _args.add_device(p)
    _args.add_threads(p)
    _args.add_out(p, "where runs and evaluations are kept")
    return p


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    return run_command("lmp_evaluate", lambda: command(args), "a smaller --batch-size")


def command(args: argparse.Namespace) -> int:
    from ..devices import tune_memory

    tune_memory()  # before torch is imported
    threads.use(args.threads)
    try:
        from ..evaluation import evaluate as work
    except ImportError as e:
        raise LmplayError(f"this needs {e.name}: pip install 'lmplay[evaluate]'") from e
    from .. import python
    from ..analysis.evaluation_figure import draw_evaluation
    from ..training.progress import Reporter, make_console

    console = make_console()
    names = [name for name in args.tasks.split(",") if name]
    manager, tasks = work.find_tasks(names, read_data(args.data), args.include)
    reporter = Reporter()
    results: dict[str, list[TaskResult]] = {name: [] for name in tasks}
    for model in args.model:
        loaded = python.load(model, args.out, args.device, args.trust)
        loaded.check_writes_text(f"--model {model}")
        warn_if_trained_on(loaded.name, names, console)
        for name, task in tasks.items():
            key = work.key_of(loaded, task, args.limit)
            path = work.result_file(args.out, loaded.name, name)
            found = None if args.fresh else work.read_result(path, key)
            if found is None:
                title = f"{name}, {loaded.name}"

                def progress(done: int, total: int, title: str = title) -> None:
                    reporter.preparing(f"{title}, answers of {total}", done)

                with reporter:
                    found = work.evaluate(
                        loaded, name, task, manager, args.limit, args.batch_size, progress, key
                    )
                work.write_result(path, found)
            results[name].append(found)
    for name, rows in results.items():
        show(name, rows, console)
        if len(rows) > 1:
            path = args.out / "evaluations" / f"{name}.png"
            if draw_evaluation(path, name, [(row.model, row.metrics) for row in rows]):
                console.print(f"picture: {path}", highlight=False, soft_wrap=True)
    return 0


def read_data(options: list[str]) -> dict[str, Path]:
    """Return the files that --data gives, by task.

    Raises:
        LmplayError: an option is not TASK=FILE.
    """
    found = {}
    for option in options:
        name, equals, path = option.partition("=")
        if not equals or not name or not path:
            raise LmplayError(f"--data {option}: TASK=FILE is wanted")
        found[name] = Path(path).expanduser()
    return found


def warn_if_trained_on(model: str, tasks: list[str], console: Console) -> None:
    """Say so if a run may have been trained on some of our task's items."""
    from ..evaluation.continuations import HELD_OUT, NAME, held_out_by

    path = Path(model)
    if not any(task.startswith(NAME) for task in tasks) or not (path / "run.json").exists():
        return
    share = held_out_by(path)
    if share is not None and share < HELD_OUT:
        console.print(
            f"{model}: its plan holds out {share:.0%} of the documents, so it was trained on some "
            f"of {NAME}, which are {HELD_OUT:.0%}",
            highlight=False,
            soft_wrap=True,
        )


def show(name: str, rows: list[TaskResult], console: Console) -> None:
    """Print a task's results, and each model's differences to the first."""
    from ..evaluation.evaluate import compare

    count = max((len(values) for values in rows[0].items.values()), default=0)
    console.print(f"{name}, {count} items" if count else name, highlight=False)
    short = [Path(row.model).name for row in rows]
    for label, row in zip(short, rows, strict=True):
        parts = [
            f"{metric} {value:.4f}" + ("" if error is None else f" ± {error:.4f}")
            for metric, (value, error) in row.metrics.items()
        ]
        console.print(f"  {label}: {', '.join(parts)}", highlight=False, soft_wrap=True)
    for label, row in zip(short[1:], rows[1:], strict=True):
        console.print(f"  {label} less {short[0]}, paired by item:", highlight=False)
        for paired in compare(row, rows[0]):
            console.print(
                f"    {paired.metric} {paired.mean:+.4f} ({paired.low:+.4f} to "
                f"{paired.high:+.4f}), p = {paired.p:.2g}",
                highlight=False,
                soft_wrap=True,
            )


if __name__ == "__main__":
    sys.exit(main())
