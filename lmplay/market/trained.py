"""Load a model that was trained on a market, and the held-out session to continue from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from ..devices import pick_device
from ..errors import LmplayError, did_you_mean
from ..plan import find_plan, load_plan, parse_plan
from ..training.restore import Restored, locate, restore, with_settings
from .messages import Messages
from .recorded import RecordedSession
from .source import MarketSource


def load_trained(
    model: Path | None,
    out: Path,
    device: str,
    overrides: Mapping[str, str],
    log: Callable[[str], None],
    trust: bool = False,
) -> tuple[Restored, Messages]:
    """Return a run with its model, folded and on the device, and its vocabulary of messages.

    Args:
        model: a run's folder or a checkpoint's. Default: the newest run below `out`.
        overrides: settings of the trained model that keep its weights.
        trust: execute the source in the run's folder also if it is from elsewhere.

    Raises:
        LmplayError: there is no such run, or it was not trained on messages.
    """
    restored = with_settings(restore(*locate(model, out, log, "--model"), trust), overrides)
    tokenizer = restored.tokenizer
    if not isinstance(tokenizer, Messages):
        raise LmplayError(
            f"{restored.run.path}: its vocabulary is {tokenizer.kind}, not a market's messages; "
            "a run on the plan market_zi has one"
        )
    on_device = restored.model.to(pick_device(device)).eval()
    folded = on_device if restored.folded else restored.runner.fold(on_device)
    return replace(restored, model=folded, folded=True), tokenizer


def held_out_session(
    restored: Restored,
    messages: Messages,
    training_plan: str | None,
    ticker: str | None,
    log: Callable[[str], None],
) -> RecordedSession:
    """Read the session whose held-out part is used.

    Args:
        training_plan: use another plan's data.
        ticker: default: the first of the data.

    Raises:
        LmplayError: the plan's data are not a market's, or there is no such ticker.
    """
    if training_plan:
        plan = load_plan(find_plan(training_plan))
    else:
        plan = parse_plan(restored.run.read()["plan"], str(restored.run.path))
    used = [plan.datasets[name] for name in plan.used_datasets]
    markets = [source for source in used if isinstance(source, MarketSource)]
    if len(markets) < len(used):
        where = f"--training-plan {training_plan}" if training_plan else str(restored.run.path)
        raise LmplayError(f"{where}: its data are no market's")
    if ticker and ticker not in messages.tickers:
        hint = did_you_mean(ticker, messages.tickers)
        raise LmplayError(f"--ticker {ticker}: the model knows no such ticker{hint}")
    sessions = (s for source in markets for s in source.sessions(messages.tickers))
    session = next((s for s in sessions if not ticker or s.ticker == ticker), None)
    if session is None:
        raise LmplayError(f"--ticker {ticker}: the data have no such ticker")
    log(f"reading {session.name} ...")
    number = messages.tickers.index(session.ticker)
    return RecordedSession(session, number, plan.validation.fraction)
