"""The commands: they parse arguments and print; the work is done elsewhere."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

from ..errors import LmplayError


def run_command(name: str, body: Callable[[], int], hint: str = "a smaller model") -> int:
    """Run a command and return its exit status. Errors that a user can fix become one line.

    Args:
        hint: what needs less of the device's memory.
    """
    try:
        return body()
    except LmplayError as e:
        print(f"{name}: {e}", file=sys.stderr)
        return e.exit_status
    except RuntimeError as e:
        if type(e).__name__ != "OutOfMemoryError":  # torch's; not every command imports torch
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
