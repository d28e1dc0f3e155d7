"""The commands: they parse arguments and print; the work is done elsewhere."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from ..errors import LmplayError


class Ended(BaseException):
    """SIGTERM or SIGHUP came where nothing else handles it."""

    def __init__(self, signum: int):
        super().__init__(signal.Signals(signum).name)
        self.status = 128 + signum


@contextmanager
def clean_end() -> Iterator[None]:
    """Raise :class:`Ended` on SIGTERM and SIGHUP, so that unfinished files are removed."""

    def end(signum: int, frame: FrameType | None) -> None:
        raise Ended(signum)

    wanted = []
    if threading.current_thread() is threading.main_thread():
        signals = (signal.SIGTERM, signal.SIGHUP)
        wanted = [s for s in signals if signal.getsignal(s) == signal.SIG_DFL]
    before = {s: signal.signal(s, end) for s in wanted}
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def run_command(name: str, body: Callable[[], int], hint: str = "a smaller model") -> int:
    """Run a command and return its exit status. Errors that a user can fix become one line.

    Args:
        hint: what needs less of the device's memory.
    """
    os.environ["MPLBACKEND"] = "agg"  # figures go to files; a notebook's backend may not be here
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # not in a notebook
            # Batch systems and cron set encodings that lack what a sample or a path may hold.
            stream.reconfigure(errors="backslashreplace")
    try:
        with clean_end():
            return body()
    except Ended as e:
        print(f"{name}: ended by {e}", file=sys.stderr)
        return e.status
    except MemoryError:
        print(f"{name}: this machine ran out of memory: {hint}?", file=sys.stderr)
        return 1
    except LmplayError as e:
        print(f"{name}: {e}", file=sys.stderr)
        return e.exit_status
    except RuntimeError as e:
        if not is_out_of_memory(e):
            raise
        print(f"{name}: the device ran out of memory: {hint}?", file=sys.stderr)
        return 1
    except BrokenPipeError:  # the reader of a pipe, such as head, has closed it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as e:  # a full disk, or a file without permission
        print(f"{name}: {e.filename or 'a file'}: {e.strerror or e}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"{name}: interrupted; the same command continues from what is done", file=sys.stderr)
        return 130


def is_out_of_memory(error: RuntimeError) -> bool:
    """Return whether torch has no memory. Its CPU allocator has no error type of its own."""
    return type(error).__name__ == "OutOfMemoryError" or any(
        words in str(error)
        for words in ("DefaultCPUAllocator: can't allocate", "not enough memory")
    )
