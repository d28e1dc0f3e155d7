"""lmp_cleanmodel: write a run's model without training-only weights, checked on real text."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from .. import threads
from . import _args, run_command

EPILOG = """formats:
  lmplay  a run's folder for lmp_generator and --initial-model (RUN-clean)
  hf      a folder for transformers' AutoModelForCausalLM and AutoTokenizer (RUN-hf)
  gguf    a file for llama.cpp and its family (RUN.gguf)"""
FORMATS = ("lmplay", "hf", "gguf")


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="lmp_cleanmodel",
        description="Write a run's model without training-only weights, and compare it with the "
        "trained model on the plan's validation text.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("run", type=Path, metavar="RUN", help="a run's folder or a checkpoint in it")
    p.add_argument(
        "--out",
        type=Path,
        metavar="FOLDER|FILE",
        help="a folder, for gguf a file (next to the run)",
    )
    p.add_argument("--format", choices=FORMATS, default="lmplay")
    _args.add_trust(p)
    _args.add_device(p)
    _args.add_threads(p)
    return p


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    return run_command("lmp_cleanmodel", lambda: command(args))


def command(args: argparse.Namespace) -> int:
    from ..devices import tune_memory

    tune_memory()  # before torch is imported
    threads.use(args.threads)
    from ..export.export import export
    from ..training.progress import Reporter, make_console
    from ..training.restore import locate, restore

    reporter = Reporter(make_console())
    restored = restore(*locate(args.run, Path(), reporter.note, "RUN"), args.trust)
    out = export(restored, args.out, args.format, args.device, reporter, print)
    print(f"written: {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
