"""Serve the page over HTTP and keep it current while runs go on.

The server only reads, and never opens a path from a request.
"""

from __future__ import annotations

import hashlib
import ipaddress
import json
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ...errors import LmplayError
from ..compare import RunCurve, any_curve
from .write import page

PATIENCE = 10.0  # seconds for a request to arrive
CONNECTIONS = 64  # at once
FRESH = 3.0  # seconds for which an answer is given again


class CurveCache:
    """Reads curves, and keeps each until its file or its run.json changes."""

    def __init__(self) -> None:
        self.kept: dict[Path, tuple[tuple[int, ...], RunCurve]] = {}

    def __call__(self, path: Path) -> RunCurve:
        files = [f for f in (path, path.with_name("run.json")) if f.exists()]
        stamp = tuple(n for f in files for s in [f.stat()] for n in (s.st_mtime_ns, s.st_size))
        if path not in self.kept or self.kept[path][0] != stamp:
            self.kept[path] = stamp, any_curve(path)
        return self.kept[path][1]


class LiveContent:
    """The page's content, gathered again when a request comes and it is older than FRESH
    seconds."""

    def __init__(self, gather: Callable[[], dict[str, Any]]):
        self.gather = gather
        self.lock = threading.Lock()
        self.at = -FRESH
        self.version = ""
        self.content = dict[str, Any]()

    def latest(self) -> tuple[str, dict[str, Any]]:
        """Return a version, which changes with what is shown, and the content."""
        with self.lock:
            if time.monotonic() - self.at >= FRESH:
                try:
                    found = self.gather()
                except OSError as e:  # a run was moved aside while it was read
                    if self.version:
                        return self.version, self.content
                    raise LmplayError(f"runs cannot be read: {e}") from e
                shown = json.dumps({k: v for k, v in found.items() if k != "made"}, allow_nan=False)
                version = f'"{hashlib.sha256(shown.encode()).hexdigest()[:16]}"'
                if version != self.version:
                    self.version = version
                    self.content = {**found, "live": True, "version": version}
                self.at = time.monotonic()
            return self.version, self.content


def server(source: LiveContent, host: str, port: int) -> ThreadingHTTPServer:
    """Return a server that is ready to serve.

    Raises:
        LmplayError: the address is not available.
    """

    class Handler(BaseHTTPRequestHandler):
        timeout = PATIENCE  # of a read or write; a connection that sends nothing is closed

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            if not self.known_host():
                return self.answer(403, "text/plain", b"another host's page asked\n")
            path = self.path.partition("?")[0]
            if path not in ("/", "/data.json"):
                return self.answer(404, "text/plain", b"there is / and /data.json\n")
            try:
                version, content = source.latest()
            except LmplayError as e:  # the folder is gone, say
                return self.answer(500, "text/plain; charset=utf-8", f"{e}\n".encode())
            if path == "/":
                return self.answer(200, "text/html; charset=utf-8", page(content).encode())
            if self.headers.get("If-None-Match") == version:
                return self.answer(304, "application/json", b"")
            self.answer(
                200, "application/json", json.dumps(content, allow_nan=False).encode(), version
            )

        def known_host(self) -> bool:
            """Return whether the request names an address or a name of this machine.

            Otherwise a foreign page could read this one by pointing its own name here.
            """
            try:
                asked = urlsplit(f"//{self.headers.get('Host', '')}").hostname or ""
            except ValueError:  # an unfinished [ of an IPv6 address, say
                return False
            if asked in (host, "localhost", socket.gethostname().lower()):
                return True
            try:
                ipaddress.ip_address(asked)
            except ValueError:
                return False
            return True

        def answer(self, status: int, kind: str, body: bytes, version: str = "") -> None:
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Cache-Control", "no-store")
            self.send_header("X-Content-Type-Options", "nosniff")
            if version:
                self.send_header("ETag", version)
            with suppress(ConnectionError):  # who asked has gone
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            """Nothing: requests are no news."""

    class Server(ThreadingHTTPServer):
        address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        daemon_threads = True
        free = threading.BoundedSemaphore(CONNECTIONS)

        def process_request(self, request: Any, client_address: Any) -> None:
            if not self.free.acquire(blocking=False):
                return self.shutdown_request(request)  # too many at once; a reader asks again
            try:
                super().process_request(request, client_address)
            except BaseException:
                self.free.release()
                raise

        def process_request_thread(self, request: Any, client_address: Any) -> None:
            try:
                super().process_request_thread(request, client_address)
            finally:
                self.free.release()

        def handle_error(self, request: Any, client_address: Any) -> None:
            if not isinstance(sys.exception(), OSError):  # a reader that went away is no news
                super().handle_error(request, client_address)

    try:
        return Server((host, port), Handler)
    except OSError as e:
        raise LmplayError(
            f"{host}:{port} cannot be served: {e.strerror}; --port takes another"
        ) from e
