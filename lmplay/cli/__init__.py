"""The commands. Each is a thin file; what they share is how they end."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

from ..errors import LmplayError


def ending(command: str, body: Callable[[], int], hint: str = "a smaller model") -> int:
    """Run a command's body; what a user can mend becomes one line on stderr and an exit status.

    `hint`: what needs less of the device's memory.
    """
    try:
        return body()
    except LmplayError as e:
        print(f"{command}: {e}", file=sys.stderr)
        return e.exit_status
    except RuntimeError as e:
        if type(e).__name__ != "OutOfMemoryError":  # torch's; not every command imports it
            raise
        print(f"{command}: the device ran out of memory: {hint}?", file=sys.stderr)
        return 1
    except BrokenPipeError:  # the reader of a pipe, head say, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as e:  # a full disk, a file without permission: of the machine, and its message says what
        print(f"{command}: {e.filename or 'a file'}: {e.strerror or e}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"{command}: interrupted; the same command starts again from what is finished", file=sys.stderr)
        return 130
