"""Errors that are for people: one line that says what is wrong, where, and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class LmplayError(Exception):
    """Something the user can mend. The commands print it as one line and exit with `exit_status`."""

    exit_status = 1


class BusyError(LmplayError):
    """Another process holds what was asked for; it may be free later."""


class NotFiniteError(LmplayError):
    """A loss or gradient that is not finite; nothing was updated."""

    exit_status = 3


def first_line(error: BaseException) -> str:
    """What an error of somebody else's says, short."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def nearest(name: str, known: Iterable[str]) -> str:
    """' (did you mean X?)' for the nearest of `known`, or the list of what there is when none is near."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    if close:
        return f" (did you mean {close[0]}?)"
    return f" (there is: {', '.join(known)})" if known else ""
