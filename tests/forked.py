"""Commands in processes of their own that start warm: each is a fork of one that has imported what
all need.

Importing torch takes longer than most of what the tests then run. A fork is a process as any other:
it has its own working folder and output, can be killed, and what it changes is gone with it.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib
import json
import os
import select
import signal
import subprocess
import sys
import traceback
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

# seconds for a command's end, so that one that hangs ends its test and not the suite
PATIENCE = 300
LIBRARIES = (
    "torch",
    "torch._dynamo",  # every optimizer imports it at its first step, which takes two seconds
    "pandas",
    "matplotlib.pyplot",
)
IMPORTED = (*LIBRARIES, "lmplay.training.run", "lmplay.decoding")
SERVE = "import runpy, sys; runpy.run_path(sys.argv[1], run_name='serve')"


class Forked:
    """One command at a time."""

    def __init__(self, server: subprocess.Popen[str]):
        self._server = server
        self._running: int | None = None

    def start(
        self, name: str, *words: str, cwd: Path, output: Path, site: Path | None = None
    ) -> int:
        """Begin `name words` (name as lmp_trainer) and return its pid.

        Args:
            output: its output goes to the files output.out and output.err.
            site: a folder with packages that only this command finds.
        """
        asked = {"name": name, "words": words, "cwd": str(cwd), "output": str(output)}
        asked["site"] = None if site is None else str(site)
        self._running = int(self._say(json.dumps(asked)))
        return self._running

    def poll(self) -> int | None:
        """The exit status of what was started, as of subprocess; None while it runs."""
        status = int(self._say("poll"))
        if status == 1000:
            return None
        self._running = None
        return status

    def wait(self) -> int:
        """Raises TimeoutError where it does not end."""
        status = int(self._say("wait"))
        self._running = None
        return status

    def kill(self) -> None:
        """End what was started, if it runs."""
        if self._running is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._running, signal.SIGKILL)
            self._running = None

    def run(
        self, name: str, *words: str, cwd: Path, site: Path | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Begin it, wait for it, and return what it said."""
        output = cwd / ".said"
        self.start(name, *words, cwd=cwd, output=output, site=site)
        status = self.wait()
        said = [output.with_suffix(end).read_text() for end in (".out", ".err")]
        return subprocess.CompletedProcess([name, *words], status, *said)

    def _say(self, line: str) -> str:
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.write(line + "\n")
        self._server.stdin.flush()
        if not select.select([self._server.stdout], [], [], PATIENCE)[0]:
            self.kill()
            raise TimeoutError(f"after {PATIENCE} s there is no answer to {line}")
        return self._server.stdout.readline()


@contextlib.contextmanager
def forked(
    cwd: Path, env: Mapping[str, str] = os.environ, imported: Iterable[str] = IMPORTED
) -> Iterator[Forked]:
    """Yield the parent of the forks; `env` is theirs, and it has imported these modules."""
    server = subprocess.Popen(
        [sys.executable, "-c", SERVE, __file__, *imported],
        cwd=cwd,
        env=dict(env),
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    commands = Forked(server)
    try:
        yield commands
    finally:
        commands.kill()
        server.kill()
        server.communicate()


def serve() -> None:
    for module in sys.argv[2:]:
        importlib.import_module(module)
    pid = 0
    for line in map(str.strip, sys.stdin):
        if line in ("poll", "wait"):
            done, status = os.waitpid(pid, os.WNOHANG if line == "poll" else 0)
            print(os.waitstatus_to_exitcode(status) if done else 1000, flush=True)
            continue
        pid = os.fork()
        if not pid:
            be(**json.loads(line))
        print(pid, flush=True)


def be(name: str, words: list[str], cwd: str, output: str, site: str | None) -> None:
    """Become the command."""
    os.chdir(cwd)
    if site is not None:
        sys.path.insert(0, site)
    for fd, path in ((0, os.devnull), (1, f"{output}.out"), (2, f"{output}.err")):
        opened = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(opened, fd)
        os.close(opened)
    sys.argv = [name, *words]
    status: object = 0
    try:
        if name == "python":
            exec(words[0], {"__name__": "__main__"})
        else:
            module = importlib.import_module(f"lmplay.cli.{name.removeprefix('lmp_')}")
            status = module.main(words)
    except SystemExit as e:  # argparse
        status = e.code
    except BaseException:
        traceback.print_exc()
        status = 1
    # Without the interpreter's own end, which takes a second in a fork of this size.
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status if isinstance(status, int) else status is not None)


if __name__ == "serve":
    serve()
