"""Argument types and options that several commands share."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path

from ..errors import LmplayError


def positive_int(text: str) -> int:
    """An integer above 0; 1e6 is accepted."""
    try:
        value = int(float(text)) if "e" in text.lower() else int(text)
    except (ValueError, OverflowError):
        value = 0
    if value <= 0:
        raise argparse.ArgumentTypeError(f"{text} is not an integer above 0")
    return value


def positive_float(text: str) -> float:
    """A finite number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is no finite number above 0")
    return value


def seed(text: str) -> int:
    """An integer from 0 to 2^63 - 1."""
    try:
        value = int(text)
    except ValueError:
        value = -1
    if not 0 <= value < 2**63:
        raise argparse.ArgumentTypeError(f"{text} is not an integer from 0 to 2^63 - 1")
    return value


def port(text: str) -> int:
    """A TCP port; 0 lets the system choose."""
    try:
        value = int(text)
    except ValueError:
        value = -1
    if not 0 <= value < 65536:
        raise argparse.ArgumentTypeError(f"{text} is no port: 0 to 65535")
    return value


def add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto")


def add_amp(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--amp", action="store_true", help="bf16 if the hardware has it, fp16 on older CUDA cards"
    )


def add_trust(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--trust",
        action="store_true",
        help="execute the source in the run's folder although it comes from elsewhere",
    )


def add_threads(parser: argparse.ArgumentParser, default: str = "all cores") -> None:
    """Add --threads. The command calls :func:`lmplay.threads.use` before it imports torch."""
    parser.add_argument(
        "--threads", type=positive_int, metavar="N", help=f"CPU threads ({default})"
    )


def add_work(p: argparse.ArgumentParser) -> None:
    """Add the options of commands whose runs several processes share."""
    p.add_argument(
        "--workers",
        type=positive_int,
        default=1,
        metavar="N",
        help="processes on this machine (1)",
    )
    p.add_argument(
        "--storage",
        metavar="PATH|URL",
        help="where the work is shared: a journal file, or a database's URL",
    )
    p.add_argument(
        "--mini-batch-size",
        type=positive_int,
        metavar="N",
        help="sequences in a forward pass (4)",
        default=4,
    )
    p.add_argument(
        "--max-hours",
        type=positive_float,
        metavar="HOURS",
        help="stop after them and say what is missing; the same command continues",
    )
    add_device(p)
    add_threads(p, "of each worker: OMP_NUM_THREADS, or all cores among the workers")
    add_amp(p)


def add_out(parser: argparse.ArgumentParser, purpose: str) -> None:
    """Add --out, the folder for runs."""
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("gpt_out"),
        metavar="FOLDER",
        help=f"{purpose} (gpt_out)",
    )


def add_overrides(parser: argparse.ArgumentParser, purpose: str) -> None:
    """Add --set KEY=VALUE."""
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides", help=purpose
    )


def parse_overrides(items: Iterable[str]) -> dict[str, str]:
    """Return KEY=VALUE items as a dict.

    Raises:
        LmplayError: an item has another form.
    """
    pairs = {}
    for item in items:
        key, equals, value = item.partition("=")
        if not equals or not key:
            raise LmplayError(f"--set {item}: write it as KEY=VALUE")
        pairs[key.strip()] = value.strip()
    return pairs


def refuse(
    parser: argparse.ArgumentParser, args: argparse.Namespace, mode: str, options: Iterable[str]
) -> None:
    """Raise LmplayError if one of these options was given, which `mode` would ignore."""
    for option in options:
        if getattr(args, option) != parser.get_default(option):
            raise LmplayError(f"{mode} and --{option.replace('_', '-')} do not go together")
