"""The runs of a trial, shared by processes and machines through an optuna storage.

An entry is waiting, claimed, done or given up. The owner of a claimed entry writes a heartbeat
every few seconds. An entry whose heartbeat stops is given up and offered again; its next owner
resumes the run from its checkpoint if it sees the same disk. An entry that was queued twice runs
once.
"""

from __future__ import annotations

import json
import logging
import os
import re
import threading
import time
from collections.abc import Iterable
from contextlib import contextmanager, suppress
from dataclasses import MISSING, asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import LmplayError, first_line
from .design import FixedDesign, Result, Unit

if TYPE_CHECKING:
    from collections.abc import Iterator

    import optuna
    from optuna.trial import FrozenTrial

BEAT = 3.0  # seconds between two signs of life
DEAD = 30.0  # seconds without one


def open_storage(where: str) -> Any:
    """Return optuna's storage for the path of a journal file or a database's URL.

    Redis is refused: optuna unpickles what a Redis server holds, so whoever can write to the server
    could run code here.

    Raises:
        LmplayError: optuna is not installed, or the storage is damaged or cannot be opened.
    """
    if re.match(r"(redis|rediss|unix)\b.*://", where):
        raise LmplayError(
            f"--storage {where}: Redis is not used, because what it holds would be unpickled, and "
            "that can run code; a database's URL works (postgresql://, mysql://, sqlite:///FILE)"
        )
    try:
        import optuna
        from optuna.storages import JournalStorage

        from .journal import SealedJournal
    except ImportError as e:
        raise LmplayError("trials are kept by optuna: pip install 'lmplay[trial]'") from e
    optuna.logging.set_verbosity(logging.WARNING)
    try:
        if "://" in where:
            return optuna.storages.RDBStorage(where)
        Path(where).parent.mkdir(parents=True, exist_ok=True)
        return JournalStorage(SealedJournal(where))
    except LmplayError:
        raise
    except Exception as e:  # each kind of storage has errors of its own
        raise LmplayError(f"--storage {where}: it cannot be opened: {first_line(e)}") from e


def process_mark(pid: int) -> str | None:
    """Return what identifies a running process of this machine; None without /proc or process.

    It contains the boot, the namespace of process numbers (containers have their own) and the
    start time, because numbers are used again.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        space = os.readlink("/proc/self/ns/pid")
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    return f"{boot} {space} {pid} {stat.rpartition(')')[2].split()[19]}"


def has_ended(mark: object) -> bool:
    """Return whether the process of a mark is known to have ended."""
    own = process_mark(os.getpid())
    if own is None or not isinstance(mark, str) or len(mark.split()) != 4:
        return False
    *where, pid, _ = mark.split()
    return where == own.split()[:2] and process_mark(int(pid)) != mark


class Queue:
    """The entries of one trial in a storage.

    Raises:
        LmplayError: the storage holds a trial of this name with another design; or none, if
            `create` is False.
    """

    def __init__(self, storage: Any, name: str, design: FixedDesign, create: bool = True):
        import optuna

        try:
            self.study: optuna.Study = optuna.load_study(storage=storage, study_name=name)
        except KeyError as e:
            if not create:
                raise LmplayError(f"there is no trial {name} in this storage") from e
            self.study = optuna.create_study(storage=storage, study_name=name, load_if_exists=True)
        content = json.loads(json.dumps(asdict(design)))
        known = self.study.user_attrs.get("design")
        if known is not None and not isinstance(known, dict):
            raise LmplayError(f"trial {name}: its storage is damaged: the design is no object")
        if known is not None:  # a design of before a field was added has its default
            defaults = {f.name: f.default for f in fields(design) if f.default is not MISSING}
            known = {"knobs": {}, **json.loads(json.dumps(defaults)), **known}
        if known is None:
            self.study.set_user_attr("design", content)
        elif known != content:
            differs = next(k for k in {**known, **content} if known.get(k) != content.get(k))
            raise LmplayError(
                f"trial {name} began with another {differs} ({known.get(differs)}, now "
                f"{content.get(differs)}): "
                "a trial's design is fixed before its first run; --name starts another trial"
            )
        self._heard: dict[
            int, tuple[float, float]
        ] = {}  # entry -> (its last beat, when it was new to us)

    def _entries(self) -> list[FrozenTrial]:
        """Return the entries with a unit, without given-up and repeated ones."""
        from optuna.trial import TrialState

        found: dict[str, FrozenTrial] = {}
        for t in self.study.get_trials(deepcopy=False):
            if "unit" in t.user_attrs and t.state != TrialState.FAIL:
                found.setdefault(t.user_attrs["unit"], t)
        return list(found.values())

    def results(self) -> dict[str, Result]:
        """Return the results of finished runs by the key of their unit."""
        try:
            return {
                t.user_attrs["unit"]: Result(
                    **{k: _number(v) for k, v in t.user_attrs["result"].items()}
                )
                for t in self._entries()
                if "result" in t.user_attrs and t.state.is_finished()
            }
        except (TypeError, AttributeError) as e:
            raise LmplayError(
                f"trial {self.study.study_name}: its storage is damaged: a result has another "
                f"form ({e}); --name starts another trial"
            ) from e

    def offer(self, units: Iterable[Unit]) -> None:
        """Queue the units that are not queued yet."""
        there = {t.user_attrs["unit"] for t in self._entries()}
        for unit in units:
            if unit.key not in there:
                self.study.enqueue_trial({}, user_attrs={"unit": unit.key, "fields": asdict(unit)})

    def claim(self, owner: str) -> tuple[int, Unit] | None:
        """Claim a waiting unit for this owner; None if none is waiting."""
        from optuna.trial import TrialState

        while self.study.get_trials(deepcopy=False, states=(TrialState.WAITING,)):
            mine = self.study.ask()
            # another worker took the last one, and optuna invented one
            if "unit" not in mine.user_attrs:
                self.study.tell(mine.number, state=TrialState.FAIL)
                return None
            mine.set_user_attr("owner", owner)
            mine.set_user_attr("process", process_mark(os.getpid()))
            self._beat(mine._trial_id)
            first = next(
                t for t in self._entries() if t.user_attrs["unit"] == mine.user_attrs["unit"]
            )
            if first.number == mine.number:
                return mine.number, Unit.from_fields(mine.user_attrs["fields"])
            self.study.tell(mine.number, state=TrialState.FAIL)  # it was queued twice
        return None

    @contextmanager
    def heartbeat(self, number: int) -> Iterator[None]:
        """Write a heartbeat for a claimed unit every few seconds while the block runs."""
        stop = threading.Event()
        entry = self.study.get_trials(deepcopy=False)[number]._trial_id

        def beat() -> None:
            while not stop.wait(BEAT):
                # A storage that is busy for a moment must not make its owner look dead.
                with suppress(*_refusals()):
                    self._beat(entry)

        thread = threading.Thread(target=beat, daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()

    def _beat(self, entry: int) -> None:
        self.study._storage.set_trial_user_attr(entry, "beat", time.time())

    def done(self, number: int, result: Result) -> bool:
        """Store the result; return False if the unit was given up meanwhile."""
        entry = self.study.get_trials(deepcopy=False)[number]
        # A loss that is infinite is kept as null, which JSON has.
        known = {k: v for k, v in asdict(result).items() if v is not None}
        content = {k: v if v != float("inf") else None for k, v in known.items()}
        try:
            self.study._storage.set_trial_user_attr(entry._trial_id, "result", content)
            self.study.tell(number, min(result.loss, 1e9))
        except _refusals():
            return False
        return True

    def give_up(self, number: int) -> bool:
        """Return a claimed unit to the queue; False if it is not claimed any more."""
        from optuna.trial import TrialState

        entry = self.study.get_trials(deepcopy=False)[number]
        if entry.state != TrialState.RUNNING:
            return False
        try:
            self.study.tell(number, state=TrialState.FAIL)
        except _refusals():  # another worker was faster
            return False
        return True

    def reclaim_stale(self) -> list[str]:
        """Give up units whose heartbeat has stopped; return their keys.

        The end of a process of this machine is known at once. Whoever asks next for needed units
        offers them again.
        """
        from optuna.trial import TrialState

        found = []
        for t in self._entries():
            if t.state != TrialState.RUNNING:
                continue
            if has_ended(t.user_attrs.get("process")):
                if self.give_up(t.number):
                    found.append(t.user_attrs["unit"])
                continue
            beat = float(t.user_attrs.get("beat", 0.0))
            known, since = self._heard.get(t.number, (None, 0.0))
            if known != beat:  # machines' clocks differ, so only a change counts
                self._heard[t.number] = (beat, time.monotonic())
            elif time.monotonic() - since > DEAD and self.give_up(t.number):
                found.append(t.user_attrs["unit"])
        return found

    def status(self) -> list[tuple[str, str, str]]:
        """Return (unit, state, owner) of every entry."""
        words = {"WAITING": "waiting", "RUNNING": "running", "COMPLETE": "done"}
        return [
            (
                t.user_attrs["unit"],
                words.get(t.state.name, t.state.name.lower()),
                t.user_attrs.get("owner", ""),
            )
            for t in self._entries()
        ]


def _refusals() -> tuple[type[Exception], ...]:
    """Return the errors with which storages say that an entry is finished, or that they are
    unreachable."""
    import optuna

    return (optuna.exceptions.OptunaError, ValueError, RuntimeError, OSError)


def _number(value: Any) -> Any:
    return float("inf") if value is None else value
