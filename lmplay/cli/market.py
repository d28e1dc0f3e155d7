"""lmp_market: simulate a market with a trained model, score it against a real one, and look at both."""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import LmplayError, nearest
from ..files import whole, write_json, write_text
from . import ending
from .trainer import parse_overrides, positive_float, positive_int, seed

if TYPE_CHECKING:
    import pandas as pd

    from ..market.data import Told
    from ..market.messages import Messages
    from ..restore import Restored


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="lmp_market", description=__doc__.split(": ", 1)[1])
    commands = p.add_subparsers(dest="what", required=True, metavar="COMMAND")

    s = commands.add_parser("simulate", help="run a trained model against live order books")
    _model_options(s)
    s.add_argument("--minutes", type=positive_float, default=10.0, metavar="N", help="of each market's own time (10)")
    s.add_argument("--messages", type=positive_int, metavar="N", help="end a market after so many messages")
    s.add_argument("--markets", type=positive_int, default=8, metavar="N", help="independent markets at once (8)")
    s.add_argument(
        "--context", type=positive_int, metavar="N", help="held-out messages read before the first (as many as fit)"
    )
    s.add_argument("--no-grammar", action="store_true", help="let any token follow any (with --no-book)")
    s.add_argument("--no-book", action="store_true", help="let messages name orders that are not there")
    s.add_argument("--no-repair", action="store_true", help="reject what names no resting order, without repairing it")
    s.add_argument("--no-cache", action="store_true", help="read everything again for every token: slow")
    s.add_argument("--no-baseline", action="store_true", help="leave the zero-intelligence markets beside it away")
    s.add_argument("--temperature", type=float, default=1.0, help="below 1 surer, above 1 wilder (1)")
    s.add_argument("--seed", type=seed, default=0)
    s.add_argument("--save", type=Path, metavar="DIR", help="where the files go (RUN/market)")

    s = commands.add_parser("score", help="compare generated markets with a real one")
    s.add_argument("real", type=Path, metavar="REAL", help="a folder of LOBSTER files")
    s.add_argument("generated", type=Path, metavar="GENERATED")
    s.add_argument("--baseline", type=Path, metavar="DIR", help="a third folder, shown beside (../baseline if there)")
    s.add_argument("--tick", type=positive_int, default=100, help="the price grid in 1/10000 (100)")
    s.add_argument("--save", type=Path, metavar="DIR", help="where table and pictures go (GENERATED/../score)")

    s = commands.add_parser("perplexity", help="by field, and by position up to several times the context")
    _model_options(s)
    s.add_argument("--times", type=positive_int, default=4, metavar="N", help="so many times the context (4)")
    s.add_argument("--streams", type=positive_int, default=8, metavar="N", help="held-out stretches read (8)")
    s.add_argument("--save", type=Path, metavar="DIR", help="where the tables go (RUN/market)")

    s = commands.add_parser("generate", help="a market of the embedded zero-intelligence generator")
    s.add_argument("--minutes", type=positive_float, default=10.0, metavar="N")
    s.add_argument("--seed", type=seed, default=0)
    s.add_argument("--save", type=Path, default=Path("generated_market"), metavar="DIR", help="(generated_market)")
    return p


def _model_options(p: argparse.ArgumentParser) -> None:
    p.add_argument("--model", type=Path, metavar="RUN|CHECKPOINT", help="a run's folder or a checkpoint (newest run)")
    p.add_argument("--training-plan", metavar="NAME", help="another plan's held-out data instead of the run's own")
    p.add_argument("--ticker", metavar="NAME", help="which of the data's tickers (the first)")
    help_set = "another setting of the trained model that leaves its weights as they are: sink=false"
    p.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides", help=help_set)
    p.add_argument("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto")
    p.add_argument("--out", type=Path, default=Path("gpt_out"), help="where the newest run is looked for (gpt_out)")


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    commands = {"simulate": simulate, "score": score, "perplexity": perplexity, "generate": generate}
    return ending("lmp_market", lambda: commands[args.what](args), "fewer --markets or --streams")


# ---------------------------------------------------------------- what the commands share


def _restore(args: argparse.Namespace) -> tuple[Restored, Messages]:
    """The run, its model folded and on the device, and its vocabulary of messages.

    Raises:
        LmplayError: it was not trained on a market's messages.
    """
    from ..devices import pick_device
    from ..market.messages import Messages
    from ..restore import locate, restore, with_settings

    restored = restore(*locate(args.model, args.out, lambda text: print(text, file=sys.stderr), "--model"))
    restored = with_settings(restored, parse_overrides(args.overrides))
    tokenizer = restored.tokenizer
    if not isinstance(tokenizer, Messages):
        raise LmplayError(
            f"{restored.run.path}: its vocabulary is {tokenizer.kind}, not a market's messages; "
            "lmp_trainer --exp market_sim --training-plan market_zi trains one"
        )
    model = restored.model.to(pick_device(args.device)).eval()
    if not restored.folded:
        model = restored.runner.fold(model)
    return replace(restored, model=model, folded=True), tokenizer


def _told(args: argparse.Namespace, restored: Restored, messages: Messages) -> Told:
    """The session whose held-out part is used, read whole.

    Raises:
        LmplayError: the plan is no market's, or the ticker is not known.
    """
    from ..market.data import Told, open_sessions
    from ..plan import MarketSource, find_plan, load_plan, parse_plan

    if args.training_plan:
        plan = load_plan(find_plan(args.training_plan))
    else:
        plan = parse_plan(restored.run.read()["plan"], str(restored.run.path))
    specs = [plan.datasets[name] for name in plan.used_datasets]
    markets = [spec for spec in specs if isinstance(spec, MarketSource)]
    if len(markets) < len(specs):
        where = f"--training-plan {args.training_plan}" if args.training_plan else str(restored.run.path)
        raise LmplayError(f"{where}: its data are no market's")
    if args.ticker and args.ticker not in messages.tickers:
        raise LmplayError(
            f"--ticker {args.ticker}: the model knows no such ticker{nearest(args.ticker, messages.tickers)}"
        )
    sessions = (s for spec in markets for s in open_sessions(spec, messages.tickers))
    session = next((s for s in sessions if not args.ticker or s.ticker == args.ticker), None)
    if session is None:
        raise LmplayError(f"--ticker {args.ticker}: the data have no such ticker")
    print(f"reading {session.name} ...", file=sys.stderr)
    return Told(session, messages.tickers.index(session.ticker), plan.validation.fraction)


def _write_csv(path: Path, table: pd.DataFrame) -> None:
    with whole(path) as temporary:
        table.to_csv(temporary)


def _print_table(title: str, table: pd.DataFrame) -> None:
    from rich.table import Table

    from ..report import make_console

    shown = Table(title=title, title_justify="left")
    shown.add_column("")
    for column in table.columns:
        shown.add_column(str(column), justify="right")
    for name, row in table.iterrows():
        shown.add_row(str(name), *(v if isinstance(v, str) else "" if v != v else f"{v:,.4g}" for v in row))
    make_console().print(shown)


# ---------------------------------------------------------------- the commands


def simulate(args: argparse.Namespace) -> int:
    from ..devices import tune_memory

    tune_memory()  # before torch is imported
    import pandas as pd

    from ..market import session_run
    from ..market.decode import Reader
    from ..market.simulate import MOST_DRAWS, Settings
    from ..report import Report, make_console

    settings = Settings(not args.no_grammar, not args.no_book, not args.no_repair, args.temperature, args.seed)
    restored, messages = _restore(args)
    told = _told(args, restored, messages)
    runner, model = restored.runner, restored.model
    extent = session_run.Extent(args.markets, args.minutes, args.messages, args.context)
    folder = args.save or restored.run.path / "market"
    length = restored.config.max_len
    reader = Reader(runner, model, extent.markets, length, messages.width, not args.no_cache)
    report = Report(make_console())
    if not reader.cached:
        why = "--no-cache" if args.no_cache else f"{restored.experiment.variant} has no cache for endless texts"
        report.note(f"every token reads the whole context again ({why}): slow")
    with report:
        try:
            with runner.fixed_weights(model):
                result = session_run.simulate(
                    told, messages, reader, length, extent, settings, folder,
                    lambda progress, line: report.show(line, progress),
                )  # fmt: skip
        except KeyboardInterrupt:
            raise LmplayError("interrupted before the first message; nothing was written") from None
    write_json(folder / "generated" / session_run.REPORT, {"model": str(restored.found.path), **result})
    validity = pd.DataFrame(result["validity"]).T
    _print_table("what became of the sampled messages, by kind (shares)", validity)
    places = pd.DataFrame(result["valid_by_round"], columns=["to round", "strict", "loose"]).set_index("to round")
    if len(places) > 1:
        _print_table(f"valid (shares), by rounds since the {result['context']} messages that were read", places)
    print(
        f"{result['messages']} messages in {result['seconds']:.1f} s: {result['messages_per_second']:.1f} messages/s, "
        f"{result['tokens_per_second']:.0f} tokens/s, {result['share_outside_the_model']:.1%} of the time outside of "
        f"the model; {result['messages_per_market_second']:.1f} messages per second of the market"
    )
    if result["prices_redrawn"]:
        print(
            f"{result['prices_redrawn']} prices were drawn anew, as no order of the model's size rested there; for "
            f"{result['prices_undecided']} messages none of {MOST_DRAWS} draws stood, and one was taken by its odds"
        )
    if not args.no_baseline and not result["interrupted"]:
        report.note("simulating the zero-intelligence markets ...")
        session_run.write_baseline(told, extent, folder / "baseline", args.seed)
    tick = "" if told.session.tick == 100 else f" --tick {told.session.tick}"
    print(f"files: {folder}\ncompare: lmp_market score {folder / 'real'} {folder / 'generated'}{tick}")
    if result["interrupted"]:
        print("lmp_market: interrupted; what was simulated until then is written", file=sys.stderr)
        return 130
    return 0


def score(args: argparse.Namespace) -> int:
    import pandas as pd

    from ..market import pictures
    from ..market import score as scores

    folders = {"real": args.real, "generated": args.generated}
    beside = args.generated.parent / "baseline"
    if args.baseline or any(beside.glob("*_message_*.csv")):
        folders["baseline"] = args.baseline or beside
    markets = {name: scores.read(folder, args.tick) for name, folder in folders.items()}
    folder = args.save or args.generated.parent / "score"
    folder.mkdir(parents=True, exist_ok=True)
    others = [name for name in markets if name != "real"]
    tables = {name: scores.compare(markets["real"], markets[name]) for name in others}
    distances = pd.concat(tables, axis=1)
    distances.columns = [f"{name} {column}" for name in others for column in tables[name].columns]
    _write_csv(folder / "distances.csv", distances)
    facts = pd.DataFrame({name: scores.facts(tapes) for name, tapes in markets.items()})
    _write_csv(folder / "facts.csv", facts)
    curves = {name: scores.impact(tapes) for name, tapes in markets.items()}
    _write_csv(folder / "impact.csv", pd.concat(curves, axis=1))
    diverging = {name: scores.divergence(markets["real"], markets[name]) for name in others}
    _write_csv(folder / "divergence.csv", pd.concat(diverging, axis=1))
    shown = pd.DataFrame(
        {
            f"{name} {metric.upper()}": [_with_interval(row, metric) for _, row in table.iterrows()]
            for name, table in tables.items()
            for metric in ("l1", "w1")
        },
        index=tables[others[0]].index,
    )
    apart = pd.DataFrame({n: (curves[n] - curves["real"]).abs().mean() for n in others})
    _write_csv(folder / "impact_distance.csv", apart)
    _print_table("distances to the real market (99 % bootstrap intervals); smaller is nearer", shown)
    _print_table("stylised facts", facts)
    _print_table("impact curves: mean difference to the real ones (ticks)", apart)
    made = [
        pictures.book(markets, folder / "book.png"),
        pictures.paths(markets, folder / "paths.png"),
        pictures.distributions(markets, tables["generated"], folder / "distributions.png"),
        pictures.impact_curves(curves, folder / "impact.png"),
        pictures.divergence_curves(diverging, folder / "divergence.png"),
    ]
    _write_page(folder / "index.html", shown, facts, made)
    print(f"page: {folder / 'index.html'}")
    return 0


def _with_interval(row: pd.Series[float], metric: str) -> str:
    return f"{row[metric]:.3f} ({row[f'{metric}_low']:.3f}-{row[f'{metric}_high']:.3f})"


def _write_page(path: Path, distances: pd.DataFrame, facts: pd.DataFrame, made: list[Path]) -> None:
    """Tables and pictures on one page; the pictures lie beside it."""
    images = "\n".join(f'<p><img src="{p.name}" alt="{p.stem}" style="max-width:100%"></p>' for p in made)
    page = (
        '<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        "<title>market scores</title><style>body{font-family:sans-serif;max-width:70em;margin:auto;padding:1em}"
        "table{border-collapse:collapse;font-size:.85em}td,th{padding:.2em .6em;border-bottom:1px solid #ccc;"
        "text-align:right}</style><h1>Market scores</h1><h2>Distances to the real market</h2>"
        f"{distances.to_html()}<h2>Stylised facts</h2>{facts.to_html(float_format='{:.4g}'.format)}{images}"
        "</html>"
    )
    write_text(path, page)


def perplexity(args: argparse.Namespace) -> int:
    from ..devices import tune_memory

    tune_memory()  # before torch is imported
    from ..market.perplexity import by_field, by_position

    restored, messages = _restore(args)
    told = _told(args, restored, messages)
    runner, model = restored.runner, restored.model
    folder = args.save or restored.run.path / "market"
    folder.mkdir(parents=True, exist_ok=True)
    length = restored.config.max_len
    if runner.new_stream(model, 1, length) is None:
        print(f"{restored.experiment.variant} has no cache for endless texts: nothing past the context")
    else:
        positions = by_position(runner, model, told, messages, length, args.times, args.streams)
        _write_csv(folder / "perplexity_by_position.csv", positions)
        _print_table(f"nats per token by position, up to {args.times} times the context", positions)
    fields = by_field(runner, model, told, messages, length)
    _write_csv(folder / "perplexity_by_field.csv", fields)
    _print_table("perplexity of held-out messages by field", fields)
    print(f"files: {folder}")
    return 0


def generate(args: argparse.Namespace) -> int:
    from ..market.session_run import write_generated

    messages = write_generated(args.seed, args.minutes, args.save)
    print(f"{messages} messages\nfiles: {args.save}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
