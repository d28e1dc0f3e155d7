"""How many tokens a second does a server make, one request at a time and eight at once?

    python benchmarks/serve_speed.py [--model RUN|gguf:FILE] [--rounds 3]

Both serve the same requests, with prompts of 4 to 128 characters, in turns; it prints each round
and the ratio of the medians. Without --model: a llama with random weights, 26 M parameters.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

from lmplay import python
from lmplay.data.tokenizers import Bytes
from lmplay.discover import find, load
from lmplay.model import build_model
from lmplay.serving.engine import Engine, Request
from lmplay.training.restore import LoadedModel

REQUESTS = 24
TOKENS = 48  # of an answer


def random_llama() -> LoadedModel:
    experiment = load(*find("llama_42m"))
    config, _ = experiment.config({"vocab_size": 257, "max_len": 512}, {})
    runner = experiment.runner(config)
    model = build_model(runner, 0).eval()
    return LoadedModel("llama_42m", experiment, config, runner, model, Bytes(), folded=True)


def seconds(engine: Engine, requests: list[Request]) -> tuple[float, int]:
    """Answer all requests; return the time, and the number of tokens made."""
    todo = list(requests)
    answers = []
    began = time.perf_counter()
    while todo or engine.active:
        while todo and engine.free:
            answers.append(engine.add(todo.pop(0)))
        engine.step()
        engine.release()
    return time.perf_counter() - began, sum(answer.tokens for answer in answers)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=8)
    args = parser.parse_args()
    model = random_llama() if args.model is None else python.load(args.model, device="cpu")
    texts = ["the history of a city by the sea " * 9 for _ in range(REQUESTS)]
    requests = [
        Request(text[: 4 + (37 * i) % 125], TOKENS, temperature=1.0, seed=i)
        for i, text in enumerate(texts)
    ]
    engines = {slots: Engine(model, slots) for slots in (1, args.batch_size)}
    for slots, engine in engines.items():
        print(f"{slots} at once: {engine.not_batched or type(engine.rows).__name__}")
    rates: dict[int, list[float]] = {slots: [] for slots in engines}
    for number in range(args.rounds):
        for slots, engine in engines.items():
            taken, tokens = seconds(engine, requests)
            rates[slots].append(tokens / taken)
            print(f"round {number + 1}, {slots} at once: {tokens / taken:.1f} tokens/s")
    one, many = (statistics.median(rates[slots]) for slots in engines)
    parameters = sum(p.numel() for p in model.model.parameters())
    print(
        f"{model.name}, {parameters / 1e6:.0f} M parameters, {torch.get_num_threads()} threads: "
        f"{one:.1f} tokens/s one at a time, {many:.1f} with {args.batch_size}: {many / one:.2f} x"
    )


if __name__ == "__main__":
    main()
