"""What a person sees while a run trains: a live line on a terminal, plain lines elsewhere, and a
log."""

from __future__ import annotations

import contextlib
import math
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from ..errors import first_line
from ..files import open_own

if TYPE_CHECKING:
    from .loggers import Logger

PLAIN_SECONDS = 10.0  # between plain lines where the output is no terminal


def duration(seconds: float) -> str:
    """Return seconds as 1:02:03, or 2:03 below an hour."""
    total = int(seconds)
    hours = total // 3600
    minutes = total % 3600 // 60
    return f"{hours}:{minutes:02}:{total % 60:02}" if hours else f"{minutes}:{total % 60:02}"


def count(n: float) -> str:
    """Return a large number in short form: 1.23 M."""
    for size, unit in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if n >= size:
            return f"{n / size:.3g} {unit}"
    return f"{n:.3g}"


class Output(Console):
    """A console that goes silent when nobody reads it any more, instead of ending the program.

    :name: in a text is no emoji.
    """

    def __init__(self, width: int | None = None):
        super().__init__(width=width, emoji=False)
        self.reader_gone = False

    def on_broken_pipe(self) -> None:  # rich's own would end the program
        self.close_output()

    def close_output(self) -> None:
        """Print nothing from now on. The reader of a pipe has gone, or a terminal was closed."""
        self.reader_gone = True
        self.quiet = True
        with contextlib.suppress(OSError, ValueError):  # no file, as in a notebook
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def make_console() -> Output:
    """Return a command's console, wide enough for complete lines if the output is not a
    terminal."""
    console = Output()
    return console if console.is_terminal else Output(width=400)


def bits(row: Mapping[str, float], before: str, digits: int) -> str:
    """Return a row's bits per byte for a line of text; "" where a model predicts labels."""
    return "" if math.isnan(row["bpb"]) else f"{before}{row['bpb']:.{digits}f}"


class Reporter:
    """Progress of one run. Use it as a context; `note` works outside of it, too."""

    def __init__(self, console: Console | None = None, brief: bool = False):
        self.console = console or Output()
        self.log_path: Path | None = None
        self._unlogged: list[str] = []  # said before there was a log
        self.brief = brief  # notes go to the log alone: one of many runs
        self.loggers: list[Logger] = []
        self._progress: Progress | None = None
        self._task: TaskID | None = None
        self._last_plain = 0.0

    def __enter__(self) -> Reporter:
        if self.console.is_terminal:
            text = TextColumn("{task.description}", markup=False)
            self._progress = Progress(
                BarColumn(bar_width=16), text, console=self.console, transient=True
            )
            self._progress.start()
            self._task = self._progress.add_task("starting", total=1.0)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = self._task = None

    def note(self, text: str) -> None:
        """Print a line that stays, and log it."""
        if not self.brief:
            self._print(text)
        self.log(text)

    def _print(self, text: str) -> None:
        try:
            self.console.print(text, markup=False, highlight=False, soft_wrap=True)
        except OSError:  # the terminal was closed
            if not isinstance(self.console, Output):
                raise
            self.console.close_output()

    @property
    def reader_gone(self) -> bool:
        """Whether nobody reads the output any more."""
        return isinstance(self.console, Output) and self.console.reader_gone

    def log_to(self, path: Path | None) -> None:
        """Log to this file, starting with the notes since the last file was closed with None."""
        self.log_path = path
        if path is not None:
            waiting = self._unlogged
            self._unlogged = []
            for text in waiting:
                self.log(text)

    def log(self, text: str) -> None:
        """Append a line to the log file."""
        if self.log_path is None:
            self._unlogged.append(text)
        elif self.log_path.parent.is_dir():
            with open_own(self.log_path) as file:
                file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")

    def preparing(self, what: str, done: int | None) -> None:
        """Show that data is being prepared; `done` counts documents or messages.

        With None, `what` is a line that stays.
        """
        if done is None:
            self.note(what)
            return
        self._show(f"{what}: {done}" if done else f"{what} ...", "", 0.0)

    def step(
        self, row: Mapping[str, float], progress: float, left: float, memory_mb: float
    ) -> None:
        """Show an optimizer step and pass it to the trackers.

        Args:
            progress: in [0, 1].
            left: remaining seconds of training.
        """
        self._to_loggers("train", row)
        self._show(
            f"step {row['step']} · {count(row['tokens'])} tokens · loss {row['loss']:.3f}"
            f"{bits(row, ' · bpb ', 3)} · lr {row['lr']:.2e}",
            f"{row['tokens_per_second']:,.0f} tokens/s · {duration(left)} left · {memory_mb:,.0f} "
            "MB",
            progress,
        )

    def show(self, line: str, progress: float) -> None:
        """Show progress of work other than training."""
        self._show(line, "", progress)

    def _show(self, first: str, second: str, progress: float) -> None:
        """Show two short lines next to the bar; if the output is no terminal, a plain line now and
        then."""
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, description=f"{first}\n{second}", completed=progress)
        elif time.monotonic() - self._last_plain >= PLAIN_SECONDS:
            self._last_plain = time.monotonic()
            share = f"{progress:4.0%} " if progress else ""
            text = " · ".join(part for part in (first, second) if part)
            self._print(share + text)

    def _to_loggers(self, kind: str, row: Mapping[str, float]) -> None:
        """Pass a row to the trackers. A failing tracker is logged and dropped; the run
        continues."""
        for logger in list(self.loggers):
            try:
                logger.row(kind, row)
            except Exception as e:  # each tracker has errors of its own
                self.loggers.remove(logger)
                self.note(
                    f"{logger.where}: it failed ({first_line(e)}); the run goes on without it"
                )

    def close_loggers(self) -> None:
        """Close the trackers. A failing tracker is logged."""
        while self.loggers:
            logger = self.loggers.pop()
            try:
                logger.close()
            except Exception as e:  # each tracker has errors of its own
                self.note(f"{logger.where}: closing it failed ({first_line(e)})")

    def validated(self, row: Mapping[str, float], sample: str) -> None:
        """Print the result of a validation and pass it to the trackers."""
        self._to_loggers("validate", row)
        self.note(
            f"validation at {count(row['tokens'])} tokens: loss {row['loss']:.4f}"
            f"{bits(row, ', bpb ', 4)}, accuracy {row['accuracy']:.2%}"
        )
        if sample:
            self.note(f"  sample: {sample!r}")
