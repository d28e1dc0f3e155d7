"""lmp_plotstats: draw the curves of runs, their differences to a baseline, and a table of final figures."""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import LmplayError
from ..files import whole
from . import ending
from .trainer import positive_int

if TYPE_CHECKING:
    import pandas as pd
    from rich.console import Console

EPILOG = """Figures go to --out: log_loss, log_accuracy, log_bpb, and log_diff_* against the baseline,
which is the run of gpt2ish in the same plan, or the run that --target names. Runs of different plans,
or of one plan on different data, cannot be compared; they are drawn in folders of their own, named after the
plan and, where that is not enough, its fingerprint and its data's.
--html and --serve make a page to look at instead: curves, verdicts, learning rates, texts."""


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="lmp_plotstats", description=__doc__.split(": ", 1)[1], epilog=EPILOG)
    p.add_argument("folders", nargs="*", type=Path, metavar="FOLDER", help="where runs are looked for (gpt_out)")
    p.add_argument("--out", type=Path, default=Path("."), metavar="FOLDER", help="where the figures go (here)")
    p.add_argument("--out-type", choices=("png", "jpg", "svg", "pdf"), default="png")
    p.add_argument("--x", choices=("tokens", "steps", "flops", "seconds"), default="tokens", help="the x axis (tokens)")
    p.add_argument("--target", metavar="RUN", help="the baseline of the difference (the run of gpt2ish)")
    p.add_argument("--plot-train", action="store_true", help="the training curves instead of the validation's")
    p.add_argument(
        "--average-count",
        type=positive_int,
        metavar="N",
        help="causal smoothing window (200 for --plot-train, else 1)",
    )
    p.add_argument(
        "--min-show",
        type=float,
        default=0.0,
        metavar="SHARE",
        help="begin x at this share of the shortest run",
    )
    p.add_argument("--max-files", type=int, metavar="N", help="the newest N runs (20; 200 on a page)")
    p.add_argument("--plot-raw", action="store_true", help="unsmoothed curves, faint, behind the smoothed ones")
    p.add_argument("--theme", choices=("light", "dark"), help="(light; a page: the reader's)")
    page = p.add_mutually_exclusive_group()
    page.add_argument("--html", type=Path, metavar="FILE", help="write one self-contained page instead of figures")
    page.add_argument("--serve", action="store_true", help="show the page, and keep it fresh, until Ctrl-C")
    p.add_argument("--host", default="127.0.0.1", help="for --serve (127.0.0.1: this machine alone)")
    p.add_argument("--port", type=port, default=8088, help="for --serve (8088)")
    return p


def port(text: str) -> int:
    value = int(text)
    if not 0 <= value < 65536:
        raise argparse.ArgumentTypeError(f"{text} is no port: 0 to 65535")
    return value


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    return ending("lmp_plotstats", lambda: command(args))


def command(args: argparse.Namespace) -> int:
    import pandas as pd

    if args.max_files is None:
        args.max_files = 200 if args.html or args.serve else 20
    if args.max_files < 1 or not 0 <= args.min_show < 1:
        raise LmplayError("--max-files must be 1 or more, --min-show in [0, 1)")
    for name in ("host", "port"):
        if not args.serve and getattr(args, name) != parser().get_default(name):
            raise LmplayError(f"--{name} goes with --serve")
    if args.html or args.serve:
        return make_page(args)
    window = args.average_count or (200 if args.plot_train else 1)
    if args.plot_raw and window == 1:
        raise LmplayError("--plot-raw: nothing is smoothed; it goes with --plot-train or --average-count")
    from ..compare import METRICS, baseline_of, by_arena, collect, final_table, partners, seeds_note, unpaired
    from ..plots import Style, draw
    from ..report import make_console

    console = make_console()
    kind = "train" if args.plot_train else "validate"
    curves, left_out = collect(args.folders or [Path("gpt_out")], kind, args.max_files)
    for line in left_out:
        print(line)
    if not curves:
        raise LmplayError("no runs with curves were found; lmp_trainer makes them")
    groups = by_arena(curves)
    if len(groups) > 1:
        names = ", ".join(plan for plan, _ in groups)
        print(f"runs of different plans or data cannot be compared: separate figures for {names}")
    named = [g for g in groups.values() if args.target in {n for c in g for n in (c.name, c.variant)}]
    if args.target is not None and not named:
        baseline_of(curves, args.target)  # raises, naming the nearest run
    tables = []
    for (plan, fingerprint), group in groups.items():
        target = args.target if group in named else None
        baseline = baseline_of(group, target)
        partner = partners(group, baseline, target)
        lone = unpaired(group, partner)
        for curve in lone:
            print(
                f"{curve.name}: no run of {partner[curve.path].variant} has its seed; it is in no figure of differences"
            )
        pairs = {path: other for path, other in partner.items() if path not in {c.path for c in lone}}
        folder = args.out
        if len(groups) > 1:
            twice = sum(p == plan for p, _ in groups) > 1
            folder = args.out / safe_name(f"{plan}-{fingerprint}" if twice else plan)
        title = "training" if args.plot_train else "validation"
        style = Style(args.x, window, args.min_show, args.plot_raw, args.theme or "light", title)
        written = []
        for metric in METRICS:
            for diff in (False, True):
                path = folder / f"log_{'diff_' if diff else ''}{metric}.{args.out_type}"
                if draw(path, group, metric, style, baseline, pairs if diff else None):
                    written.append(path)
        table = final_table(group, pairs)
        tables.append(table)
        show(table, plan, console)
        for sentence in sentences(table):
            print(sentence)
        if note := seeds_note(group):
            print(note)
        if baseline is None:
            print(f"{plan}: no run of gpt2ish and no --target: no difference is drawn")
        if not written:
            print(f"{plan}: no run has the columns for --x {args.x}: nothing is drawn")
        for path in written:
            print(path)
    table_path = args.out / "final.csv"
    with whole(table_path) as temporary:
        pd.concat(tables).to_csv(temporary, index=False)
    print(table_path)
    return 0


def safe_name(text: str) -> str:
    """A plan's name as a folder's: a run.json may say anything, and nothing of it leads out of --out."""
    return re.sub(r"[^\w.=+-]", "_", text).replace("..", "__")


def make_page(args: argparse.Namespace) -> int:
    """--html and --serve."""
    from ..page.gather import gather
    from ..page.serve import Memory, Source, server
    from ..page.write import page, write

    for name in ("out", "out_type", "average_count", "min_show", "plot_raw"):
        if getattr(args, name) != parser().get_default(name):
            raise LmplayError(f"--{name.replace('_', '-')} is of figures: it does not go with --html or --serve")
    folders, memory = args.folders or [Path("gpt_out")], Memory()
    preset = {"x": args.x, "kind": "train" if args.plot_train else "validate", "theme": args.theme}

    def gathered() -> tuple[dict[str, Any], list[str]]:
        content, left_out = gather(folders, args.max_files, args.target, memory)
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
    page(content)  # what is missing is said before the server begins
    with server(Source(lambda: gathered()[0]), args.host, args.port) as found:
        host = f"[{args.host}]" if ":" in args.host else args.host
        print(f"http://{host}:{found.server_address[1]}/ (Ctrl-C stops)", flush=True)
        try:
            found.serve_forever()
        except KeyboardInterrupt:
            print("stopped")
    return 0


def sentences(table: pd.DataFrame) -> list[str]:
    """What the difference figures end with, in words."""
    said = []
    for row in table.to_dict("records"):
        delta, to = row.get("loss_difference"), row.get("to")
        if isinstance(delta, float) and delta == delta and to != row["run"]:
            where = "below" if delta < 0 else "above"
            judged = "better" if delta < 0 else "worse"
            said.append(f"{row['run']} ends {abs(delta):.4f} nats per token {where} {to} ({judged} by so much)")
    return said


def show(table: pd.DataFrame, plan: str, console: Console) -> None:
    """The final figures as a table on the terminal, in whole lines where there is none."""
    from rich.table import Table

    drawn = Table(title=plan, title_justify="left", box=None, pad_edge=False)
    for column in table.columns[1:]:
        drawn.add_column(column.replace("_", " "), justify="left" if column in ("run", "to") else "right")
    for row in table.itertuples(index=False):
        drawn.add_row(*(cell(c, v) for c, v in zip(table.columns[1:], row[1:], strict=True)))
    console.print(drawn, highlight=False, markup=False)


def cell(column: str, value: object) -> str:
    import pandas as pd

    if not isinstance(value, str) and pd.isna(value):  # type: ignore[call-overload]
        return "-"
    if column == "loss_difference":
        return f"{value:+.4f}"
    if column in ("loss", "bpb", "accuracy"):
        return f"{value:.4f}"
    return value if isinstance(value, str) else f"{value:,.0f}"


if __name__ == "__main__":
    sys.exit(main())
