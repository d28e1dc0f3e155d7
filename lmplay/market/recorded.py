"""A recorded session in memory: its messages, its events, and the market at any of them."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from ..errors import LmplayError
from .events import Event, Market, Message
from .sessions import DataIssues, Errors, Session, replay
from .source import held_out


class RecordedSession:
    """All messages and events of a session; the last part is held out.

    `messages` is (n, 14), the columns of Message. `start` is the number of the first held-out
    message.
    """

    def __init__(self, session: Session, number: int, fraction: float, errors: Errors = "skip"):
        self.session = session
        self.number = number
        self.errors = errors
        rows = []
        self.events = []
        for event, message, _ in self.replay():
            rows.append(message)
            self.events.append(event)
        if not rows:
            raise LmplayError(f"{session.name}: it has no messages")
        self.messages = np.array(rows)
        self.start = held_out(len(rows), fraction)

    def replay(self) -> Iterator[tuple[Event, Message, Market]]:
        return replay(self.session, DataIssues(self.session.name, self.errors), self.number)

    def markets(self, starts: list[int]) -> list[Market]:
        """Return a copy of the live market before each of these messages (1 or later).

        Raises:
            LmplayError: there is no such message.
        """
        wanted = set(starts)
        found = {}
        for n, (_, _, market) in enumerate(self.replay(), 1):
            if n in wanted:
                found[n] = market.copy()
        for start in starts:
            if start not in found:
                raise LmplayError(
                    f"{self.session.name}: message {start} is not between 1 and "
                    f"{len(self.messages)}"
                )
        return [found[start].copy() for start in starts]
