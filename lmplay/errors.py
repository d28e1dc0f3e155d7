"""Errors for people: one line that says what is wrong, where, and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class LmplayError(Exception):
    """An error that the user can fix. Commands print it as one line and exit with `exit_status`."""

    exit_status = 1


class BusyError(LmplayError):
    """Another process holds the resource. It may be free later."""


class NotFiniteError(LmplayError):
    """A loss or gradient is not finite. No weight was updated."""

    exit_status = 3


def first_line(error: BaseException) -> str:
    """First line of another library's error message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return " (did you mean X?)" for the most similar known name.

    If no name is similar, list all of them. If none is known, return "".
    """
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    if close:
        return f" (did you mean {close[0]}?)"
    return f" (there is: {', '.join(known)})" if known else ""
