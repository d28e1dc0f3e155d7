"""lmp_generator: generate text from a trained run, printed as it comes."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from .. import threads
from ..errors import LmplayError
from . import _args, run_command


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="lmp_generator", description="Generate text from a trained run."
    )
    p.add_argument("prompt", metavar="PROMPT|FILE", help="the prompt, or a file that contains it")
    p.add_argument(
        "--model",
        metavar="RUN|CHECKPOINT|hf:NAME|gguf:FILE",
        help="a run's folder, a checkpoint in it, or a pretrained model (the newest run)",
    )
    p.add_argument(
        "--max-len",
        type=_args.positive_int,
        default=200,
        metavar="N",
        help="new tokens at most (200)",
    )
    p.add_argument(
        "--do-sample", action="store_true", help="draw tokens instead of taking the most likely one"
    )
    p.add_argument("--temperature", type=float, default=1.0, help="less random below 1 (1)")
    p.add_argument("--top-k", type=int, default=0, help="draw from the k most likely (0: all)")
    p.add_argument(
        "--top-p",
        type=float,
        default=1.0,
        help="draw from the most likely tokens with this total probability (1)",
    )
    p.add_argument(
        "--repetition-penalty",
        type=float,
        default=1.0,
        help="above 1: tokens that occurred before are less likely (1)",
    )
    p.add_argument(
        "--num-samples", type=_args.positive_int, default=1, metavar="N", help="texts in one batch"
    )
    p.add_argument("--seed", type=_args.seed, default=0, help="of the draws (0)")
    _args.add_trust(p)
    _args.add_device(p)
    _args.add_threads(p)
    _args.add_out(p, "where the newest run is looked for")
    return p


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    hint = "fewer --num-samples, or a shorter --max-len"
    return run_command("lmp_generator", lambda: command(args), hint)


def command(args: argparse.Namespace) -> int:
    from ..devices import tune_memory

    tune_memory()  # before torch is imported
    threads.use(args.threads)
    from .. import python
    from ..decoding import Sampling

    for option in (
        () if args.do_sample else ("temperature", "top_k", "top_p", "num_samples", "seed")
    ):
        if getattr(args, option) != parser().get_default(option):
            name = option.replace("_", "-")
            raise LmplayError(f"--{name} goes with --do-sample: without it nothing is drawn")
    sampling = Sampling(
        args.do_sample, args.temperature, args.top_k, args.top_p, args.repetition_penalty
    )
    prompt = read_prompt(args.prompt)
    restored = python.load(args.model, args.out, args.device, args.trust)
    pieces = python.stream(prompt, restored, sampling, args.max_len, args.num_samples, args.seed)
    if args.num_samples == 1:
        print(prompt, end="", flush=True)
        for (piece,) in pieces:
            print(piece, end="", flush=True)
        print()
        return 0
    texts = [prompt] * args.num_samples
    for row in pieces:
        texts = [text + piece for text, piece in zip(texts, row, strict=True)]
    for number, text in enumerate(texts, 1):
        print(f"--- {number} of {args.num_samples}\n{text}")
    return 0


def read_prompt(text: str) -> str:
    """Return the prompt, or the content of the file that it names.

    Raises:
        LmplayError: it is not UTF-8.
    """
    if os.path.isfile(text):  # False for a text that is too long for a name
        try:
            return Path(text).read_text(encoding="utf-8")
        except UnicodeDecodeError as e:
            raise LmplayError(f"{text}: it cannot be read as text: {e}") from e
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as e:
        raise LmplayError("the prompt is not UTF-8; a file that is can contain it") from e
    return text


if __name__ == "__main__":
    sys.exit(main())
