"""lmp_serve: answer requests from a Redis stream, or over HTTP."""

from __future__ import annotations

import argparse
import os
import signal
import socket
import sys
from types import FrameType
from typing import TYPE_CHECKING

from .. import threads
from ..errors import LmplayError
from . import _args, run_command

if TYPE_CHECKING:
    from ..serving.engine import Engine

EPILOG = """Several workers may share a stream; a request goes to one of them. Ctrl-C and SIGTERM
finish the requests that have begun. docs/serve.md has the format of requests and a client."""


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="lmp_serve",
        description="Answer requests with a model: from a Redis stream, or over HTTP.",
        epilog=EPILOG,
    )
    p.add_argument(
        "--model",
        metavar="RUN|CHECKPOINT|hf:NAME|gguf:FILE",
        help="a run's folder, a checkpoint in it, or a pretrained model (the newest run)",
    )
    where = p.add_mutually_exclusive_group(required=True)
    where.add_argument("--redis", metavar="URL", help="such as redis://127.0.0.1:6379")
    where.add_argument("--http", metavar="HOST:PORT", help="OpenAI's completions, /v1/completions")
    p.add_argument(
        "--stream",
        default="lmplay:requests",
        metavar="NAME",
        help="the Redis stream of requests (lmplay:requests)",
    )
    p.add_argument(
        "--batch-size",
        type=_args.positive_int,
        default=8,
        metavar="N",
        help="requests that are answered at once (8)",
    )
    p.add_argument(
        "--max-prompt",
        type=_args.positive_int,
        metavar="N",
        help="tokens of a prompt (the model's window)",
    )
    p.add_argument(
        "--max-queue",
        type=_args.positive_int,
        default=1000,
        metavar="N",
        help="requests that may wait; more are refused (1000)",
    )
    _args.add_trust(p)
    _args.add_device(p)
    _args.add_threads(p)
    _args.add_out(p, "where the newest run is looked for")
    return p


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    return run_command("lmp_serve", lambda: command(args), "a smaller --batch-size")


def command(args: argparse.Namespace) -> int:
    from ..devices import tune_memory

    tune_memory()  # before torch is imported
    threads.use(args.threads)
    if args.http:
        address = read_address(args.http)
    from .. import python
    from ..serving.engine import Engine

    if args.redis:
        from ..serving.redis_worker import connect

        connection = connect(args.redis)  # before the model is loaded, which may take long
    loaded = python.load(args.model, args.out, args.device, args.trust)
    engine = Engine(loaded, args.batch_size, args.max_prompt)
    if engine.not_batched:
        print(f"requests are answered one after another: {engine.not_batched}", flush=True)
    if args.http:
        return serve_http(engine, loaded.name, address, args.max_queue)
    return serve_redis(engine, connection, args.redis, args.stream, args.max_queue)


def read_address(text: str) -> tuple[str, int]:
    """Return host and port.

    Raises:
        LmplayError: it is not HOST:PORT.
    """
    host, colon, port = text.rpartition(":")
    if not colon or not port.isdigit() or int(port) > 65535:
        raise LmplayError(f"--http {text}: HOST:PORT is wanted, such as 127.0.0.1:8000")
    return host or "127.0.0.1", int(port)


def serve_redis(engine: Engine, connection: object, url: str, stream: str, max_queue: int) -> int:
    from ..serving.redis_worker import Worker

    def log(text: str) -> None:
        print(text, flush=True)

    name = f"{socket.gethostname()}-{os.getpid()}"
    worker = Worker(connection, engine, name, stream, max_queue, log)

    def stop(signum: int, frame: FrameType | None) -> None:
        worker.stopping = True

    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, stop)
    log(f"{engine.loaded.name}: waiting for requests in {stream} on {url}; Ctrl-C ends it")
    worker.run()
    log(f"answered {worker.answered} requests")
    return 0


def serve_http(engine: Engine, name: str, address: tuple[str, int], max_queue: int) -> int:
    try:
        import uvicorn

        from ..serving.http import make_app
    except ImportError as e:
        raise LmplayError(f"--http needs {e.name}: pip install 'lmplay[serve]'") from e
    host, port = address
    with socket.socket() as probe:  # uvicorn would print a log instead of one line
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(address)
        except OSError as e:
            raise LmplayError(f"--http {host}:{port}: {e.strerror or e}") from e
    print(f"{name}: http://{host}:{port}/v1/completions; Ctrl-C ends it", flush=True)
    uvicorn.run(make_app(engine, name, max_queue), host=host, port=port, log_level="warning")
    return 0


if __name__ == "__main__":
    sys.exit(main())
