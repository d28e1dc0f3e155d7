"""lmp_generator: text from a trained run, streamed as it comes."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from ..errors import LmplayError
from . import ending
from .trainer import positive_int, seed


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="lmp_generator", description=__doc__.split(": ", 1)[1])
    p.add_argument("prompt", metavar="PROMPT|FILE", help="what the text begins with, or a file that holds it")
    p.add_argument(
        "--model",
        type=Path,
        metavar="RUN|CHECKPOINT",
        help="a run's folder or a checkpoint in it (newest run)",
    )
    p.add_argument("--max-len", type=positive_int, default=200, metavar="N", help="new tokens at most (200)")
    p.add_argument("--do-sample", action="store_true", help="draw tokens; without it the most likely one is taken")
    p.add_argument("--temperature", type=float, default=1.0, help="below 1 surer, above 1 wilder (1)")
    p.add_argument("--top-k", type=int, default=0, help="draw from the k most likely (0: all)")
    p.add_argument("--top-p", type=float, default=1.0, help="draw from the most likely that hold this much")
    p.add_argument("--repetition-penalty", type=float, default=1.0, help="above 1: what was there is less likely (1)")
    p.add_argument("--num-samples", type=positive_int, default=1, metavar="N", help="several texts in one batch")
    p.add_argument("--seed", type=seed, default=0, help="of what is drawn (0)")
    p.add_argument("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto")
    p.add_argument("--out", type=Path, default=Path("gpt_out"), help="where the newest run is looked for (gpt_out)")
    return p


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    return ending("lmp_generator", lambda: command(args), "fewer --num-samples, or a shorter --max-len")


def command(args: argparse.Namespace) -> int:
    from ..devices import tune_memory

    tune_memory()  # before torch is imported
    from ..generate import Sampling, TextStream, generate

    for option in () if args.do_sample else ("temperature", "top_k", "top_p", "num_samples", "seed"):
        if getattr(args, option) != parser().get_default(option):
            raise LmplayError(f"--{option.replace('_', '-')} goes with --do-sample: without it nothing is drawn")
    how = Sampling(args.do_sample, args.temperature, args.top_k, args.top_p, args.repetition_penalty)
    prompt = args.prompt
    if os.path.isfile(prompt):  # False also for what is too long to be a name
        try:
            prompt = Path(prompt).read_text(encoding="utf-8")
        except UnicodeDecodeError as e:
            raise LmplayError(f"{args.prompt}: it cannot be read as text: {e}") from e

    from ..devices import pick_device
    from ..restore import locate, restore

    device = pick_device(args.device)
    restored = restore(*locate(args.model, args.out, lambda text: print(text, file=sys.stderr), "--model"))
    tokenizer, config, runner = restored.tokenizer, restored.config, restored.runner
    model = restored.model.to(device)
    if not restored.folded:
        model = runner.fold(model)
    try:
        prompt.encode("utf-8")
    except UnicodeEncodeError as e:
        raise LmplayError("the prompt cannot be read as UTF-8; a file that is may hold it") from e
    ids = tokenizer.encode(prompt)
    streams = [TextStream(tokenizer) for _ in range(args.num_samples)]
    ended = [False] * args.num_samples
    texts = [prompt] * args.num_samples
    alone = args.num_samples == 1
    if alone:
        print(prompt, end="", flush=True)
    tokens = generate(
        runner, model, ids, args.max_len, runner.window(), config.vocab_size, how,
        args.num_samples, args.seed, tokenizer.eot,
    )  # fmt: skip
    for row in tokens:
        for i, token in enumerate(row):
            ended[i] = ended[i] or token == tokenizer.eot
            piece = "" if ended[i] else streams[i].add(token)
            texts[i] += piece
            if alone:
                print(piece, end="", flush=True)
    if alone:
        print(streams[0].end())
    else:
        for i, text in enumerate(texts):
            print(f"--- {i + 1} of {args.num_samples}\n{text}{streams[i].end()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
