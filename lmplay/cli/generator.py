"""lmp_generator: text from a trained run, streamed as it comes."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import LmplayError
from . import ending
from .trainer import positive_int

if TYPE_CHECKING:
    from ..checkpoint import Checkpoint
    from ..runs import RunFolder


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
    p.add_argument("--temperature", type=float, default=1.0)
    p.add_argument("--top-k", type=int, default=0, help="draw from the k most likely (0: all)")
    p.add_argument("--top-p", type=float, default=1.0, help="draw from the most likely that hold this much")
    p.add_argument("--repetition-penalty", type=float, default=1.0)
    p.add_argument("--num-samples", type=positive_int, default=1, metavar="N", help="several texts in one batch")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto")
    p.add_argument("--out", type=Path, default=Path("gpt_out"), help="where the newest run is looked for (gpt_out)")
    return p


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    return ending("lmp_generator", lambda: command(args))


def locate(model: Path | None, out: Path) -> tuple[RunFolder, Checkpoint]:
    """The run and checkpoint that --model names; without it the newest run that has a checkpoint.

    Raises:
        LmplayError: there is none, or it cannot be used.
    """
    from ..checkpoint import verify
    from ..runs import RUN_FILE, RunFolder, find_runs

    def say(text: str) -> None:
        print(text, file=sys.stderr)

    if model is None:
        for run in reversed(find_runs(out)):
            found = run.newest(say)
            if found is not None:
                say(f"model: {run.path}")
                return run, found
        raise LmplayError(
            f"{out}: there is no run with a checkpoint; lmp_trainer makes one, --model names one elsewhere"
        )
    if model.is_file():
        kind = "it is a pickle, which can run code when it is read: refused; " if is_pickle(model) else ""
        raise LmplayError(f"--model {model}: {kind}a run's folder or a checkpoint's folder is wanted")
    if not model.is_dir():
        raise LmplayError(f"--model {model}: there is no such folder")
    if (model / RUN_FILE).exists():
        run = RunFolder(model)
        found = run.newest(say)
        if found is None:
            raise LmplayError(f"--model {model}: this run has no checkpoint yet")
        return run, found
    run = RunFolder(model.resolve().parent.parent)
    if not (run.path / RUN_FILE).exists():
        raise LmplayError(f"--model {model}: this is neither a run nor a checkpoint of one")
    try:
        return run, verify(model)
    except LmplayError as e:
        raise LmplayError(f"--model {model}: {e}") from e


def is_pickle(path: Path) -> bool:
    """Whether a file is a pickle or torch's archive of one, by its first bytes."""
    with open(path, "rb") as file:
        head = file.read(4)
    return head.startswith((b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"))


def command(args: argparse.Namespace) -> int:
    from ..devices import tune_memory

    tune_memory()  # before torch is imported
    from ..generate import Sampling, TextStream, generate

    how = Sampling(args.do_sample, args.temperature, args.top_k, args.top_p, args.repetition_penalty)
    prompt = args.prompt
    if os.path.isfile(prompt):  # False also for what is too long to be a name
        try:
            prompt = Path(prompt).read_text(encoding="utf-8")
        except UnicodeDecodeError as e:
            raise LmplayError(f"{args.prompt}: it cannot be read as text: {e}") from e
    run, found = locate(args.model, args.out)

    from .. import checkpoint, probe
    from ..devices import pick_device

    device = pick_device(args.device)
    tokenizer = run.tokenizer()
    experiment = run.experiment()
    config = experiment.config_type(**run.read()["identity"]["config"])
    if config.vocab_size != tokenizer.vocab_size:
        raise LmplayError(
            f"{run.path}: the vocabulary does not match: the model has {config.vocab_size} tokens, "
            f"its tokenizer {tokenizer.vocab_size}"
        )
    runner = experiment.runner(config)
    model = probe.build_model(runner, 0)
    checkpoint.load_model_tensors(model, found.tensors("model"), found.path)
    model = runner.fold(model.to(device))
    ids = tokenizer.encode(prompt)
    streams = [TextStream(tokenizer) for _ in range(args.num_samples)]
    ended = [False] * args.num_samples
    texts = [prompt] * args.num_samples
    alone = args.num_samples == 1
    if alone:
        print(prompt, end="", flush=True)
    tokens = generate(
        runner, model, ids, args.max_len, config.max_len, config.vocab_size, how,
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
