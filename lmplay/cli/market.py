"""lmp_market: simulate a market with a trained model, and score it against a real one."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import threads
from ..errors import LmplayError
from . import _args, run_command

if TYPE_CHECKING:
    import pandas as pd

    from ..market.messages import Messages
    from ..market.recorded import RecordedSession
    from ..training.restore import Restored


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="lmp_market",
        description="Simulate a market with a trained model, and score it against a real one.",
    )
    commands = p.add_subparsers(dest="what", required=True, metavar="COMMAND")

    s = commands.add_parser("simulate", help="run a trained model against live order books")
    _add_model(s)
    s.add_argument(
        "--minutes",
        type=_args.positive_float,
        default=10.0,
        metavar="N",
        help="market time of each market (10)",
    )
    s.add_argument(
        "--messages", type=_args.positive_int, metavar="N", help="messages per market at most"
    )
    s.add_argument(
        "--markets",
        type=_args.positive_int,
        default=8,
        metavar="N",
        help="independent markets at once (8)",
    )
    s.add_argument(
        "--context",
        type=_args.positive_int,
        metavar="N",
        help="held-out messages that the model reads first (as many as fit)",
    )
    s.add_argument(
        "--no-grammar", action="store_true", help="let any token follow any (with --no-book)"
    )
    s.add_argument(
        "--no-book", action="store_true", help="let messages name orders that do not exist"
    )
    s.add_argument(
        "--no-repair", action="store_true", help="reject messages that name no resting order"
    )
    s.add_argument(
        "--no-cache", action="store_true", help="read the context again for every token: slow"
    )
    s.add_argument("--no-baseline", action="store_true", help="omit the zero-intelligence markets")
    s.add_argument("--temperature", type=float, default=1.0, help="less random below 1 (1)")
    s.add_argument("--seed", type=_args.seed, default=0)
    s.add_argument("--save", type=Path, metavar="DIR", help="where files go (RUN/market)")

    s = commands.add_parser("score", help="compare generated markets with a real one")
    s.add_argument("real", type=Path, metavar="REAL", help="a folder of LOBSTER files")
    s.add_argument("generated", type=Path, metavar="GENERATED")
    s.add_argument(
        "--baseline", type=Path, metavar="DIR", help="a third folder (../baseline if it exists)"
    )
    s.add_argument(
        "--tick", type=_args.positive_int, default=100, help="the price grid in 1/10000 (100)"
    )
    s.add_argument("--save", type=Path, metavar="DIR", help="where results go (GENERATED/../score)")

    s = commands.add_parser(
        "perplexity", help="by field, and by position up to several times the context"
    )
    _add_model(s)
    s.add_argument(
        "--times",
        type=_args.positive_int,
        default=4,
        metavar="N",
        help="read N times the context (4)",
    )
    s.add_argument(
        "--streams",
        type=_args.positive_int,
        default=8,
        metavar="N",
        help="held-out stretches to read (8)",
    )
    s.add_argument("--save", type=Path, metavar="DIR", help="where tables go (RUN/market)")

    s = commands.add_parser("generate", help="a market of the built-in generator")
    s.add_argument("--minutes", type=_args.positive_float, default=10.0, metavar="N")
    s.add_argument("--seed", type=_args.seed, default=0)
    s.add_argument(
        "--save",
        type=Path,
        default=Path("generated_market"),
        metavar="DIR",
        help="(generated_market)",
    )
    for s in commands.choices.values():
        _args.add_threads(s)
    return p


def _add_model(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "--model",
        type=Path,
        metavar="RUN|CHECKPOINT",
        help="a run's folder or a checkpoint in it (the newest run)",
    )
    p.add_argument("--training-plan", metavar="NAME", help="use another plan's held-out data")
    p.add_argument("--ticker", metavar="NAME", help="a ticker of the data (the first)")
    _args.add_overrides(p, "a setting of the trained model that keeps its weights, as sink=false")
    _args.add_device(p)
    _args.add_trust(p)
    _args.add_out(p, "where the newest run is looked for")


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    commands = {
        "simulate": simulate,
        "score": score,
        "perplexity": perplexity,
        "generate": generate,
    }
    hint = "fewer --markets or --streams"

    def command() -> int:
        threads.use(args.threads)  # before torch is imported
        return commands[args.what](args)

    return run_command("lmp_market", command, hint)


def _load(args: argparse.Namespace) -> tuple[Restored, Messages, RecordedSession]:
    """Return the trained model, its vocabulary, and the session to continue from."""
    from ..devices import tune_memory

    tune_memory()  # before torch is imported
    from ..market.trained import held_out_session, load_trained

    overrides = _args.parse_overrides(args.overrides)
    restored, messages = load_trained(
        args.model, args.out, args.device, overrides, _note, args.trust
    )
    session = held_out_session(restored, messages, args.training_plan, args.ticker, _note)
    return restored, messages, session


def _note(text: str) -> None:
    print(text, file=sys.stderr)


def _print_table(title: str, table: pd.DataFrame) -> None:
    from rich.table import Table

    from ..training.progress import make_console

    shown = Table(title=title, title_justify="left")
    shown.add_column("")
    for column in table.columns:
        shown.add_column(str(column), justify="right")
    for name, row in table.iterrows():
        shown.add_row(str(name), *(_cell(value) for value in row))
    make_console().print(shown)


def _cell(value: Any) -> str:
    """Return a number in four digits, a text as it is, and NaN as ""."""
    if isinstance(value, str):
        return value
    return "" if value != value else f"{value:,.4g}"


def simulate(args: argparse.Namespace) -> int:
    from ..files import write_json
    from ..market import session_run
    from ..market.decode import Reader
    from ..market.simulate import Settings
    from ..training.progress import Reporter, make_console

    settings = Settings(
        not args.no_grammar, not args.no_book, not args.no_repair, args.temperature, args.seed
    )
    restored, messages, session = _load(args)
    runner = restored.runner
    size = session_run.SimulationSize(args.markets, args.minutes, args.messages, args.context)
    folder = args.save or restored.run.path / "market"
    length = restored.config.max_len
    cached = not args.no_cache
    reader = Reader(runner, restored.model, size.markets, length, messages.width, cached)
    reporter = Reporter(make_console())
    if not reader.cached:
        why = "--no-cache"
        if cached:
            why = f"{restored.experiment.variant} has no cache for endless texts"
        reporter.note(f"every token reads the context again ({why}): slow")
    with reporter:
        try:
            with runner.fixed_weights(restored.model):
                result = session_run.simulate(
                    session,
                    messages,
                    reader,
                    length,
                    size,
                    settings,
                    folder,
                    lambda progress, line: reporter.show(line, progress),
                )
        except KeyboardInterrupt:
            raise LmplayError("interrupted before the first message; nothing was written") from None
    report = {"model": str(restored.found.path), **result}
    write_json(folder / "generated" / session_run.REPORT, report)
    print_simulation(result)
    if not args.no_baseline and not result["interrupted"]:
        reporter.note("simulating the zero-intelligence markets ...")
        session_run.write_baseline(session, size, folder / "baseline", args.seed)
    tick = "" if session.session.tick == 100 else f" --tick {session.session.tick}"
    print(f"files: {folder}")
    print(f"compare: lmp_market score {folder / 'real'} {folder / 'generated'}{tick}")
    if result["interrupted"]:
        _note("lmp_market: interrupted; what was simulated so far is written")
        return 130
    return 0


def print_simulation(result: dict[str, Any]) -> None:
    """Print validity and speed."""
    import pandas as pd

    from ..market.simulate import MOST_DRAWS

    validity = pd.DataFrame(result["validity"]).T
    _print_table("what became of the sampled messages, by kind (shares)", validity)
    columns = ["to round", "strict", "loose"]
    rounds = pd.DataFrame(result["valid_by_round"], columns=columns).set_index("to round")
    if len(rounds) > 1:
        read = result["context"]
        _print_table(f"valid (shares), by rounds after the {read} messages read first", rounds)
    print(
        f"{result['messages']} messages in {result['seconds']:.1f} s: "
        f"{result['messages_per_second']:.1f} messages/s, "
        f"{result['tokens_per_second']:.0f} tokens/s, "
        f"{result['share_outside_the_model']:.1%} of the time outside of the model; "
        f"{result['messages_per_market_second']:.1f} messages per second of market time"
    )
    if result["prices_redrawn"]:
        print(
            f"{result['prices_redrawn']} prices were drawn again, because no order of the model's "
            f"size rested there; for {result['prices_undecided']} messages none of {MOST_DRAWS} "
            "draws was accepted, and one of them was taken by its odds"
        )


def score(args: argparse.Namespace) -> int:
    from ..market.report import write_scores

    baseline = args.baseline
    default = args.generated.parent / "baseline"
    if baseline is None and any(default.glob("*_message_*.csv")):
        baseline = default
    folder = args.save or args.generated.parent / "score"
    report = write_scores(args.real, args.generated, baseline, args.tick, folder)
    title = "distances to the real market (99 % bootstrap intervals); smaller is closer"
    _print_table(title, report.distances)
    _print_table("stylized facts", report.facts)
    _print_table("impact curves: mean difference to the real ones (ticks)", report.impact)
    print(f"page: {report.page}")
    return 0


def perplexity(args: argparse.Namespace) -> int:
    restored, messages, session = _load(args)
    from ..market.perplexity import by_field, by_position
    from ..market.report import write_csv

    runner = restored.runner
    model = restored.model
    folder = args.save or restored.run.path / "market"
    folder.mkdir(parents=True, exist_ok=True)
    length = restored.config.max_len
    if runner.new_stream(model, 1, length) is None:
        variant = restored.experiment.variant
        print(f"{variant} has no cache for endless texts: nothing past the context")
    else:
        positions = by_position(runner, model, session, messages, length, args.times, args.streams)
        write_csv(folder / "perplexity_by_position.csv", positions)
        title = f"nats per token by position, up to {args.times} times the context"
        _print_table(title, positions)
    fields = by_field(runner, model, session, messages, length)
    write_csv(folder / "perplexity_by_field.csv", fields)
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
