"""The page over HTTP, kept fresh while runs go on. It reads only, and no path of a request is ever opened."""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from ..errors import LmplayError
from .write import page

FRESH = 3.0  # seconds for which an answer is given again
LOCAL = ("127.0.0.1", "localhost", "::1")


class Source:
    """The page's content, gathered again when it is asked for and older than FRESH seconds."""

    def __init__(self, gather: Callable[[], dict[str, Any]]):
        self.gather = gather
        self.lock = threading.Lock()
        self.at = -FRESH
        self.version, self.content = "", dict[str, Any]()

    def latest(self) -> tuple[str, dict[str, Any]]:
        """A version, which changes when what is shown does, and the content."""
        with self.lock:
            if time.monotonic() - self.at >= FRESH:
                found = self.gather()
                shown = json.dumps({k: v for k, v in found.items() if k != "made"}, allow_nan=False)
                version = f'"{hashlib.sha256(shown.encode()).hexdigest()[:16]}"'
                if version != self.version:
                    self.version, self.content = version, {**found, "live": True, "version": version}
                self.at = time.monotonic()
            return self.version, self.content


def server(source: Source, host: str, port: int) -> ThreadingHTTPServer:
    """A server that is ready to serve.

    Raises:
        LmplayError: the address cannot be taken.
    """

    class Handler(BaseHTTPRequestHandler):
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
            self.answer(200, "application/json", json.dumps(content, allow_nan=False).encode(), version)

        def known_host(self) -> bool:
            """Whether the name that was asked for is ours: or a foreign page could read this one by its own name."""
            asked = self.headers.get("Host", "").rpartition(":")[0].strip("[]") or self.headers.get("Host", "")
            return host not in LOCAL or asked in LOCAL

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
                self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            """Nothing: requests are no news."""

    try:
        return ThreadingHTTPServer((host, port), Handler)
    except OSError as e:
        raise LmplayError(f"{host}:{port} cannot be served: {e.strerror}; --port takes another") from e
