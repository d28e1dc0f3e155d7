"""How fast a market is simulated: the 95 M transformer with its cache, one market and 32, and
without; the book alone.

    python benchmarks/market_speed.py [--messages 4] [--rounds 3] [--uncached 1] [--no-book]

All in one run, on the embedded generator's held-out data, from a full context of 112 messages, with
both masks; the reading of the contexts is not timed. The weights are random, which does not change
how long a pass takes, but how many there are: hardly a price stands that they draw under the book
mask, so that most messages which name an order take all 16 draws. That is the slow end; --no-book
shows a message a pass. Reported are medians over rounds. Without the cache every token reads the
context again; one message of that is timed. The ancestor of this model sampled 9.6 messages/s
on its machine.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

from lmplay import model as probe
from lmplay.api import ModelRunner
from lmplay.devices import describe_device, pick_device
from lmplay.discover import find, load
from lmplay.market import zero_intelligence
from lmplay.market.decode import Reader
from lmplay.market.events import ADD, REPLACE, Market
from lmplay.market.messages import Messages
from lmplay.market.recorded import RecordedSession
from lmplay.market.session_run import beginnings, context_of
from lmplay.market.sessions import DataIssues
from lmplay.market.simulate import Settings, Simulator

LENGTH = 1 + 112 * 24


def book_rate(seconds: float = 600) -> float:
    """Events per second that the book takes, of a stretch of the generator's market."""
    session = zero_intelligence.session(0, seconds)
    market = Market(0, session.orders, session.time)
    events = []
    for _, event in session.events(market, DataIssues("x")):
        market.apply(event)
        events.append(event)
    book = Market(0, session.orders, session.time).book
    began = time.perf_counter()
    for e in events:
        if e.kind == ADD:
            book.add(e.order, e.side, e.price, e.size, e.time)
        elif e.kind == REPLACE:
            book.replace(e.order, e.new, e.price, e.size, e.time)
        else:
            book.reduce(e.order, e.size)
    return len(events) / (time.perf_counter() - began)


def begun(
    recorded: RecordedSession,
    messages: Messages,
    model: torch.nn.Module,
    runner: ModelRunner,
    markets: int,
    cached: bool,
    book: bool,
) -> Simulator:
    """Markets whose contexts were read."""
    reader = Reader(runner, model, markets, LENGTH, messages.width, cached)
    begins = beginnings(recorded, markets)
    contexts = [context_of(recorded, messages, b, LENGTH) for b in begins]
    return Simulator(reader, messages, recorded.markets(begins), contexts, Settings(book=book))


def timed(simulator: Simulator, count: int) -> tuple[float, float]:
    """(messages per second, share of the time outside of the model) of the next `count` messages in
    each market."""
    reader = simulator.reader
    happened = simulator.happened
    before = reader.seconds
    began = time.perf_counter()
    for _ in range(count):
        for b, _, event in simulator.round([True] * len(simulator.markets)):
            simulator.markets[b].apply(event)
    # what the model says is read on the CPU: nothing is still under way
    seconds = time.perf_counter() - began
    return (simulator.happened - happened) / seconds, 1 - (reader.seconds - before) / seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--messages", type=int, default=4, help="in each market and round (4)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--uncached", type=int, default=1, help="messages without the cache (1; 0 skips it)"
    )
    parser.add_argument("--no-book", action="store_true", help="the grammar mask only")
    parser.add_argument("--exp", default="market_100m")
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    device = pick_device(args.device)
    recorded = RecordedSession(zero_intelligence.session(0, 120), 0, 0.5)
    messages = Messages(["ZI"])
    experiment = load(*find(args.exp))
    config = experiment.config({"max_len": LENGTH, "vocab_size": messages.vocab_size}, {})[0]
    runner = experiment.runner(config)
    model = probe.build_model(runner, 0).to(device).eval()
    parameters = sum(p.numel() for p in model.parameters())
    print(
        f"{args.exp}, {parameters / 1e6:.1f} M parameters, {describe_device(device)}, "
        f"{torch.get_num_threads()} threads"
    )
    print("reading the contexts ...", flush=True)
    running = {
        markets: begun(recorded, messages, model, runner, markets, True, not args.no_book)
        for markets in (1, 32)
    }
    rates: dict[int, list[tuple[float, float]]] = {markets: [] for markets in running}
    for simulator in running.values():
        timed(simulator, 1)  # warm-up
    for number in range(args.rounds):
        for markets, simulator in running.items():
            rates[markets].append(timed(simulator, args.messages))
            rate, outside = rates[markets][-1]
            line = f"round {number + 1}: {markets} markets, {rate:.2f} messages/s, "
            line += f"{outside:.1%} outside of the model"
            print(line, flush=True)
    one, many = (statistics.median(r for r, _ in rates[m]) for m in (1, 32))
    print(
        f"with the cache: one market {one:.2f} messages/s, 32 markets {many:.2f}, {24 * many:.0f} "
        "tokens/s"
    )
    outside = [statistics.median(o for _, o in rates[m]) for m in (1, 32)]
    print(f"outside of the model: one market {outside[0]:.1%}, 32 markets {outside[1]:.1%}")
    print(f"the ancestor's 9.6 messages/s: {one / 9.6:.2f} and {many / 9.6:.2f} times")
    if args.uncached:
        slow, _ = timed(
            begun(recorded, messages, model, runner, 1, False, not args.no_book), args.uncached
        )
        print(
            f"without the cache: one market {slow:.4f} messages/s: the cache is {one / slow:.1f} "
            "times faster"
        )
    print(f"the order book alone: {book_rate():,.0f} events/s")


if __name__ == "__main__":
    main()
