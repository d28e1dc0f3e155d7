"""How many threads a process of ours uses, so that several on one machine do not slow each other.

OpenMP's threads wait by spinning. Two processes with a thread for each core therefore take turns
at doing nothing, and together are many times slower than one. Each process that trains registers
itself in a folder of the machine, and the processes divide the cores. A count that the user gives,
by --threads or OMP_NUM_THREADS, is kept.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

EVERY = 2.0  # seconds between two looks at the other processes
SAMPLE = 0.2  # seconds in which the machine's load is measured
FASTER = 1.15  # more threads must be this much faster to be chosen


def cores() -> int:
    """Return the number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def given() -> int | None:
    """Return the number of threads in OMP_NUM_THREADS; None if it is not set."""
    text = os.environ.get("OMP_NUM_THREADS", "").split(",")[0]
    return int(text) if text.isdigit() and int(text) else None


def use(count: int | None) -> None:
    """Let torch and numpy use `count` threads, from now on if torch is imported; None: nothing."""
    if count is None:
        return
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ[name] = str(count)
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(count)


def busy_cores() -> float:
    """Return how many cores are busy, measured for a moment; 0 where the system does not say."""

    def ticks() -> tuple[int, int]:
        with open("/proc/stat", encoding="ascii") as file:
            numbers = [int(n) for n in file.readline().split()[1:9]]
        return sum(numbers) - numbers[3] - numbers[4], sum(numbers)  # without idle and waiting

    try:
        before = ticks()
        time.sleep(SAMPLE)
        after = ticks()
    except (OSError, ValueError, IndexError):
        return 0.0
    total = after[1] - before[1]
    return (after[0] - before[0]) / total * (os.cpu_count() or 1) if total else 0.0


def folder() -> Path:
    """Return where the processes of this user on this machine register."""
    return Path(tempfile.gettempdir()) / f"lmplay-{os.getuid()}"


class Share:
    """This process among those that train, as a context.

    Attributes:
        count: the threads that are used now.
        fixed: whether the user gave the count.
    """

    def __init__(self, wanted: int | None, place: Path | None = None):
        """wanted: the count that the user gives, or None."""
        self.place = folder() if place is None else place
        self.fixed = wanted is not None or given() is not None
        self.count = wanted or given() or 1
        self.chosen = self.count
        self._entry: Path | None = None
        self._descriptor = -1
        self._looked = 0.0

    def __enter__(self) -> Share:
        self._register()
        if not self.fixed:
            import torch

            self.chosen = min(torch.get_num_threads(), cores())
            others = self.others()
            free = cores() // (others + 1) if others else round(cores() - busy_cores())
            self._set(max(1, min(self.chosen, free)))
        else:
            self._set(self.count)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._entry is not None:
            self._entry.unlink(missing_ok=True)
            os.close(self._descriptor)
            self._entry = None

    def _register(self) -> None:
        """Create a locked file. Without a folder of our own, nobody is noticed."""
        try:
            self.place.mkdir(mode=0o700, exist_ok=True)
            status = self.place.lstat()
            if status.st_uid != os.getuid() or self.place.is_symlink():
                return
            entry = self.place / secrets.token_hex(8)
            self._descriptor = os.open(entry, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
            fcntl.flock(self._descriptor, fcntl.LOCK_EX)
            self._entry = entry
        except OSError:
            return

    def others(self) -> int:
        """Return how many other processes of ours are training here."""
        if self._entry is None:
            return 0
        count = 0
        for path in self.place.iterdir():
            if path == self._entry:
                continue
            try:
                descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW)
            except OSError:
                continue
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink(missing_ok=True)  # of a process that was killed
            except BlockingIOError:
                count += 1
            finally:
                os.close(descriptor)
        return count

    def keep(self, count: int) -> None:
        """Use the count with which a run began, or less while others train."""
        if not self.fixed:
            self.chosen = count
            self._set(self._fair())

    def choose(self, speed: Callable[[], float]) -> None:
        """Choose the fewest threads that are about as fast as the fastest count.

        Args:
            speed: measures work with the current count.
        """
        if self.fixed or self.count == 1:
            return
        counts = sorted({1, max(1, self.count // 2), self.count})
        speeds = {}
        for count in counts:
            self._set(count)
            speeds[count] = speed()
        best = max(speeds.values())
        self.chosen = next(n for n in counts if speeds[n] * FASTER >= best)
        self._set(self.chosen)

    def adapt(self, say: Callable[[str], None]) -> None:
        """Divide the cores anew if other processes have begun or ended."""
        if self.fixed or time.monotonic() - self._looked < EVERY:
            return
        self._looked = time.monotonic()
        fair = self._fair()
        if fair != self.count:
            say(
                f"threads: {self.count} -> {fair}, because {self.others()} other processes train "
                "here; rounding may change (--threads keeps a count)"
            )
            self._set(fair)

    def _fair(self) -> int:
        return max(1, min(self.chosen, cores() // (self.others() + 1)))

    def _set(self, count: int) -> None:
        import torch

        torch.set_num_threads(count)
        self.count = count
