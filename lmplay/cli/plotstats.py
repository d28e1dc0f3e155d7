"""lmp_plotstats: draw the curves of runs and their differences to a baseline, or make a page.

One module, because figures and page share their options and what they leave out.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import threads
from ..errors import LmplayError
from . import _args, run_command

if TYPE_CHECKING:
    import pandas as pd
    from rich.console import Console

    from ..analysis.answer import Row
    from ..analysis.compare import Comparison, RunCurve
    from ..analysis.figures import Style
    from ..analysis.page.gather import TrialReport
    from ..trial.certificate import Certificate

EPILOG = """Figures go to --out: answer (a row per idea: its gain, its verdict if a trial judged it,
and what the arena can resolve), log_loss, log_accuracy, log_bpb, log_diff_* for the differences to
the baseline, and one for each curve that an experiment logs itself. The baseline is the one that
the runs name, or --target. Runs of different plans or data are not comparable and get their own
folders. --html and --serve make a page instead: curves, verdicts, learning rates, texts."""


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="lmp_plotstats",
        description="Draw the curves of runs and their differences to a baseline.",
        epilog=EPILOG,
    )
    p.add_argument(
        "folders", nargs="*", type=Path, metavar="FOLDER", help="where runs are (gpt_out)"
    )
    p.add_argument(
        "--out", type=Path, metavar="FOLDER", help="where figures go (plots, in the first FOLDER)"
    )
    _args.add_threads(p)
    p.add_argument("--out-type", choices=("png", "jpg", "svg", "pdf"), default="png")
    p.add_argument(
        "--x",
        choices=("tokens", "steps", "flops", "seconds"),
        default="tokens",
        help="the x axis (tokens)",
    )
    p.add_argument("--target", metavar="RUN", help="the baseline (the one that the runs name)")
    p.add_argument(
        "--form",
        choices=("auto", "curves", "dots"),
        default="auto",
        help="dots: final values with intervals (auto: dots for more than eight settings)",
    )
    p.add_argument("--plot-train", action="store_true", help="training curves, not validations")
    p.add_argument(
        "--average-count",
        type=_args.positive_int,
        metavar="N",
        help="causal smoothing window (200 for --plot-train, else 1)",
    )
    p.add_argument(
        "--min-show",
        type=float,
        default=0.0,
        metavar="SHARE",
        help="start x at this share of the shortest run",
    )
    p.add_argument("--max-files", type=int, metavar="N", help="the newest N runs (20; a page: 200)")
    p.add_argument("--plot-raw", action="store_true", help="faint unsmoothed curves as well")
    p.add_argument("--theme", choices=("light", "dark"), help="(light; a page: the reader's)")
    page = p.add_mutually_exclusive_group()
    page.add_argument("--html", type=Path, metavar="FILE", help="write one self-contained page")
    page.add_argument("--serve", action="store_true", help="serve the page until Ctrl-C")
    p.add_argument("--host", default="127.0.0.1", help="for --serve (127.0.0.1: this machine only)")
    p.add_argument("--port", type=_args.port, default=8088, help="for --serve (8088)")
    return p


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    return run_command("lmp_plotstats", lambda: command(args))


def command(args: argparse.Namespace) -> int:
    threads.use(args.threads)
    if args.max_files is None:
        args.max_files = 200 if args.html or args.serve else 20
    if args.max_files < 1 or not 0 <= args.min_show < 1:
        raise LmplayError("--max-files must be 1 or more, --min-show in [0, 1)")
    for name in ("host", "port"):
        if not args.serve and getattr(args, name) != parser().get_default(name):
            raise LmplayError(f"--{name} goes with --serve")
    if args.html or args.serve:
        return make_page(args)
    return make_figures(args)


def make_figures(args: argparse.Namespace) -> int:
    """Draw figures for each plan, print the table, and write final.csv."""
    import pandas as pd

    from ..analysis.compare import any_curve, collect, compare_runs
    from ..analysis.figures import Style
    from ..analysis.page.gather import TrialReport, find_reports
    from ..files import atomic_write
    from ..training.progress import make_console

    window = args.average_count or (200 if args.plot_train else 1)
    if args.plot_raw and window == 1:
        raise LmplayError(
            "--plot-raw: nothing is smoothed; it goes with --plot-train or --average-count"
        )
    console = make_console()
    kind = "train" if args.plot_train else "validate"
    folders = args.folders or [Path("gpt_out")]
    out = args.out or plots_folder(folders[0])
    read = cache(any_curve)  # two kinds of figures may need one curve
    curves, left_out = collect(folders, kind, args.max_files, read)
    trials, damaged = find_reports(folders, "trial.json", TrialReport)
    for line in (*left_out, *damaged):
        print(line)
    judged = [trial for _, trial in trials if trial.arms]
    if not curves and not judged:
        raise LmplayError("no runs with curves were found; lmp_trainer makes them")
    comparisons = compare_runs(curves, args.target)
    for path in draw_answers(comparisons, judged, out, args.out_type, args.theme or "light"):
        print(path)
    if not curves:
        return 0
    if len(comparisons) > 1:
        names = ", ".join(c.plan for c in comparisons)
        print(f"runs of different plans or data cannot be compared: separate figures for {names}")
    style = Style(
        x=args.x,
        average_count=window,
        min_show=args.min_show,
        raw=args.plot_raw,
        theme=args.theme or "light",
        kind="training" if args.plot_train else "validation",
        form=args.form,
    )
    logged = logged_curves(args, folders, read)
    tables = []
    for comparison in comparisons:
        folder = out
        if len(comparisons) > 1:
            folder = out / folder_name(comparison, comparisons)
        key = (comparison.plan, comparison.fingerprint)
        written = draw_all(comparison, logged.get(key), folder, args.out_type, style)
        table = comparison.table()
        settings = comparison.settings(table)
        tables += [table.assign(kind="run"), settings.assign(kind="setting")]
        report(comparison, table, settings, written, args.x, console)
    path = out / "final.csv"
    with atomic_write(path) as temporary:
        pd.concat(tables).to_csv(temporary, index=False)
    print(path)
    return 0


def draw_answers(
    comparisons: list[Comparison], trials: list[TrialReport], out: Path, suffix: str, theme: str
) -> list[Path]:
    """Draw the answer figure of each plan and baseline that has one: verdicts, and single runs."""
    from ..analysis.answer import draw_answer, rows_of_runs, rows_of_trials
    from ..trial.certificate import of_runs

    rows: dict[tuple[str, str], list[Row]] = {}
    certificates: dict[str, Certificate | None] = {}
    for trial in trials:
        key = (trial.design.plan, trial.design.against)
        rows.setdefault(key, []).extend(rows_of_trials([trial]))
        if found := of_runs(trial.design.plan, trial.certificate.arena, trial.design.precision):
            certificates[trial.design.plan] = found
    for comparison in comparisons:
        if comparison.baseline is None:
            continue
        key = (comparison.plan, comparison.baseline.variant)
        rows.setdefault(key, []).extend(rows_of_runs(comparison))
        run = comparison.baseline.run
        precision = str(run.get("identity", {}).get("precision"))
        if found := of_runs(comparison.plan, str(run.get("arena")), precision):
            certificates[comparison.plan] = found
    written = []
    known = {key: found for key, found in rows.items() if found}
    for (plan, baseline), found_rows in known.items():
        name = "answer" if len(known) == 1 else f"answer-{plan}-{baseline}"
        path = out / (re.sub(r"[^\w.=+-]", "_", name) + f".{suffix}")
        draw_answer(path, plan, baseline, found_rows, certificates.get(plan), theme)
        written.append(path)
    return written


def logged_curves(
    args: argparse.Namespace, folders: list[Path], read: Callable[[Path], RunCurve]
) -> dict[tuple[str, str], Comparison]:
    """Return the training curves of the plans whose experiments log curves of their own."""
    from ..analysis.compare import collect, compare_runs, logged_metrics

    curves, _ = collect(folders, "train", args.max_files, read)
    own = [curve for curve in curves if logged_metrics([curve])]
    return {(c.plan, c.fingerprint): c for c in compare_runs(own)}


def draw_all(
    comparison: Comparison, logged: Comparison | None, folder: Path, suffix: str, style: Style
) -> list[Path]:
    """Draw every figure of one plan; return the files."""
    from dataclasses import replace

    from ..analysis.classification_figures import draw_confusions, draw_windows
    from ..analysis.compare import METRICS, logged_metrics
    from ..analysis.figures import draw

    written = []
    for name, draw_labels in (("confusion", draw_confusions), ("windows", draw_windows)):
        path = folder / f"{name}.{suffix}"
        if draw_labels(path, comparison, style.theme):
            written.append(path)
    for metric in METRICS:
        for diff in (False, True):
            path = folder / f"log_{'diff_' if diff else ''}{metric}.{suffix}"
            if draw(path, comparison, metric, style, diff):
                written.append(path)
    if logged is not None:
        train_style = replace(style, kind="training", form="curves")
        for metric in logged_metrics(logged.curves):
            path = folder / f"log_{metric}.{suffix}"
            if draw(path, logged, metric, train_style, diff=False):
                written.append(path)
    return written


def plots_folder(folder: Path) -> Path:
    """Return where figures go without --out: with the runs, where no files of a user's are."""
    return (folder if folder.is_dir() else folder.parent) / "plots"


def report(
    comparison: Comparison,
    table: pd.DataFrame,
    settings: pd.DataFrame,
    written: list[Path],
    x: str,
    console: Console,
) -> None:
    """Print the tables, what they say, and the files."""
    from ..analysis.compare import baseline_names, seeds_note

    plan = comparison.plan
    for curve in comparison.unpaired:
        baseline = comparison.baseline.variant if comparison.baseline else ""
        print(f"{curve.name}: no run of {baseline} has its seed; it is in no figure of differences")
    show(table, plan, console)
    if (settings["seeds"] > 1).any():
        several = settings.rename(columns={"run": "setting"})
        show(several, f"{plan}: means over seeds, ± half of the 95 % interval", console)
    for sentence in sentences(table):
        print(sentence)
    if note := seeds_note(comparison.curves):
        print(note)
    if comparison.baseline is None:
        baseline = baseline_names(comparison.curves)[0]
        print(f"{plan}: no run of {baseline} and no --target: no difference is drawn")
    if not written:
        print(f"{plan}: no run has the columns for --x {x}: nothing is drawn")
    for path in written:
        print(path)


def folder_name(comparison: Comparison, comparisons: list[Comparison]) -> str:
    """Return the plan as a folder's name, with its fingerprint if several share the name.

    A run.json may contain anything; the name cannot lead out of --out.
    """
    same = sum(c.plan == comparison.plan for c in comparisons)
    text = f"{comparison.plan}-{comparison.fingerprint}" if same > 1 else comparison.plan
    return re.sub(r"[^\w.=+-]", "_", text).replace("..", "__")


def make_page(args: argparse.Namespace) -> int:
    """Write the page for --html, or serve it for --serve."""
    from ..analysis.page.gather import gather
    from ..analysis.page.serve import CurveCache, LiveContent, server
    from ..analysis.page.write import page, write

    for name in ("out", "out_type", "average_count", "min_show", "plot_raw", "form"):
        if getattr(args, name) != parser().get_default(name):
            option = name.replace("_", "-")
            raise LmplayError(f"--{option} is for figures: it does not go with --html or --serve")
    folders = args.folders or [Path("gpt_out")]
    read = CurveCache()
    kind = "train" if args.plot_train else "validate"
    preset = {"x": args.x, "kind": kind, "theme": args.theme}

    def gathered() -> tuple[dict[str, Any], list[str]]:
        content, left_out = gather(folders, args.max_files, args.target, read)
        return content | {"preset": preset}, left_out

    content, left_out = gathered()
    for line in left_out:
        print(line)
    if args.html:
        if not content["arenas"] and not content["trials"]:
            raise LmplayError("no runs with curves were found; lmp_trainer makes them")
        write(args.html, content)
        print(args.html)
        return 0
    page(content)  # report a missing package before the server starts
    with server(LiveContent(lambda: gathered()[0]), args.host, args.port) as found:
        host = f"[{args.host}]" if ":" in args.host else args.host
        print(f"http://{host}:{found.server_address[1]}/ (Ctrl-C stops)", flush=True)
        try:
            found.serve_forever()
        except KeyboardInterrupt:
            print("stopped")
    return 0


def sentences(table: pd.DataFrame) -> list[str]:
    """Return the final differences in words."""
    lines = []
    for row in table.to_dict("records"):
        delta = row.get("loss_difference")
        to = row.get("to")
        if isinstance(delta, float) and delta == delta and to != row["run"]:
            where = "below" if delta < 0 else "above"
            judged = "better" if delta < 0 else "worse"
            lines.append(
                f"{row['run']} ends {abs(delta):.4f} nats per token {where} {to} ({judged})"
            )
    return lines


def show(table: pd.DataFrame, plan: str, console: Console) -> None:
    """Print the final figures as a table."""
    from rich.markup import escape
    from rich.table import Table

    drawn = Table(title=escape(plan), title_justify="left", box=None, pad_edge=False)
    for column in table.columns[1:]:
        justify: Any = "left" if column in ("run", "setting", "to") else "right"
        drawn.add_column(column.replace("_", " "), justify=justify)
    for row in table.itertuples(index=False):
        cells = zip(table.columns[1:], row[1:], strict=True)
        drawn.add_row(*(escape(cell(column, value)) for column, value in cells))
    console.print(drawn, highlight=False)


def cell(column: str, value: object) -> str:
    import pandas as pd

    if not isinstance(value, str) and pd.isna(value):  # type: ignore[call-overload]
        return "-"
    if column.endswith("_interval"):
        return f"± {value:.4f}"
    if column == "loss_difference":
        return f"{value:+.4f}"
    if column in ("loss", "bpb", "accuracy"):
        return f"{value:.4f}"
    return value if isinstance(value, str) else f"{value:,.0f}"


if __name__ == "__main__":
    sys.exit(main())
