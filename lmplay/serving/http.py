"""OpenAI's completions over HTTP, so that existing clients work.

One thread runs the engine; the web server hands it requests and waits for their pieces.
"""

from __future__ import annotations

import asyncio
import json
import queue
import threading
import time
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from ..errors import LmplayError
from .engine import Answer, Engine, Request

IGNORED = ("model", "user")  # a server has one model
ONLY: dict[str, Any] = {  # fields of OpenAI's with the one value that is supported
    "n": 1,
    "best_of": 1,
    "echo": False,
    "logprobs": None,
    "suffix": None,
    "frequency_penalty": 0,
    "presence_penalty": 0,
    "logit_bias": None,
}


@dataclass(eq=False)
class Waiting:
    """A request on its way through the engine. Events are put into `events` from its thread."""

    request: Request
    loop: asyncio.AbstractEventLoop
    events: asyncio.Queue[Answer | str] = field(default_factory=asyncio.Queue)
    gone: bool = False  # the client has closed the connection

    def put(self, event: Any) -> None:
        self.loop.call_soon_threadsafe(self.events.put_nowait, event)


@dataclass(frozen=True)
class Piece:
    """What a step added to an answer; `answer` once it has ended."""

    text: str
    answer: Answer | None


class EngineThread(threading.Thread):
    """Runs an engine for requests that other threads submit.

    Args:
        max_queue: requests that may wait.
    """

    def __init__(self, engine: Engine, max_queue: int):
        super().__init__(daemon=True, name="engine")
        self.engine = engine
        self.inbox: queue.Queue[Waiting | None] = queue.Queue(max_queue)
        self.active: dict[int, Waiting] = {}  # by the id of their answers

    def submit(self, waiting: Waiting) -> None:
        """Raises LmplayError if too many requests wait, or the prompt is too long."""
        self.engine.check(waiting.request)
        try:
            self.inbox.put_nowait(waiting)
        except queue.Full as e:
            raise LmplayError(f"the queue is full: {self.inbox.maxsize} requests wait") from e

    def run(self) -> None:
        while True:
            while self.engine.free:
                try:
                    waiting = self.inbox.get(block=not self.engine.active)
                except queue.Empty:
                    break
                if waiting is None:
                    return
                if not waiting.gone:
                    answer = self.engine.add(waiting.request)
                    self.active[id(answer)] = waiting
                    self._tell(answer)
            for answer in self.engine.step():
                self._tell(answer)
            self.engine.release()

    def _tell(self, answer: Answer) -> None:
        waiting = self.active.get(id(answer))
        if waiting is None:
            return
        if waiting.gone:
            self.engine.cancel(answer)
        else:
            waiting.put(Piece(answer.piece, answer if answer.reason else None))
        if waiting.gone or answer.reason:
            del self.active[id(answer)]


def parse(body: dict[str, Any]) -> list[Request]:
    """Return the requests of a call of OpenAI's completions, one for each prompt.

    Raises:
        LmplayError: a field is unknown, or asks for what this server does not do.
    """
    given = {k: v for k, v in body.items() if k not in (*IGNORED, "stream", "stream_options")}
    for name, only in ONLY.items():
        if given.pop(name, only) not in (only, None):
            raise LmplayError(f"{name}: only {json.dumps(only)} is supported")
    given.setdefault("temperature", 1.0)  # as OpenAI's
    prompts = given.pop("prompt", None)
    prompts = [prompts] if isinstance(prompts, str) else prompts
    if not isinstance(prompts, list) or not all(isinstance(p, str) for p in prompts) or not prompts:
        raise LmplayError("prompt: a text or a list of texts is wanted")
    return [Request.parse({**given, "prompt": prompt}) for prompt in prompts]


def make_app(engine: Engine, name: str, max_queue: int = 100) -> Starlette:
    """Return the web application. It serves /v1/completions and /v1/models."""
    worker = EngineThread(engine, max_queue)
    worker.start()
    began = int(time.time())

    def failed(message: str, status: int) -> JSONResponse:
        kind = "server_error" if status >= 500 else "invalid_request_error"
        return JSONResponse({"error": {"message": message, "type": kind}}, status)

    async def completions(http: HttpRequest) -> Response:
        try:
            body = await http.json()
        except ValueError as e:
            return failed(f"this is not JSON: {e}", 400)
        if not isinstance(body, dict):
            return failed("an object is wanted", 400)
        try:
            requests = parse(body)
            loop = asyncio.get_running_loop()
            all_waiting = [Waiting(request, loop) for request in requests]
            if body.get("stream") and len(requests) > 1:
                raise LmplayError("stream: one prompt at a time is supported")
        except LmplayError as e:
            return failed(str(e), 400)
        try:
            for waiting in all_waiting:
                worker.submit(waiting)
        except LmplayError as e:
            for waiting in all_waiting:
                waiting.gone = True
            return failed(str(e), 429 if "queue" in str(e) else 400)
        base = {
            "id": f"cmpl-{uuid.uuid4().hex}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": name,
        }
        if body.get("stream"):
            return StreamingResponse(events(all_waiting[0], base), media_type="text/event-stream")
        answers = []
        try:
            for waiting in all_waiting:
                answers.append(await finished(waiting))
        except asyncio.CancelledError:
            for waiting in all_waiting:
                waiting.gone = True
            raise
        if any(answer.reason == "error" for answer in answers):
            return failed(next(a.text for a in answers if a.reason == "error"), 500)
        made = sum(answer.tokens for answer in answers)
        read = sum(answer.prompt_tokens for answer in answers)
        usage = {"prompt_tokens": read, "completion_tokens": made, "total_tokens": read + made}
        choices = [
            {
                "index": i,
                "text": a.text,
                "finish_reason": a.reason,
                "logprobs": None,
                **({"probabilities": a.probabilities} if a.probabilities else {}),
            }
            for i, a in enumerate(answers)
        ]
        return JSONResponse({**base, "choices": choices, "usage": usage})

    async def finished(waiting: Waiting) -> Answer:
        while True:
            piece: Any = await waiting.events.get()
            if piece.answer is not None:
                answer: Answer = piece.answer
                return answer

    async def events(waiting: Waiting, base: dict[str, Any]) -> AsyncIterator[str]:
        try:
            while True:
                piece: Any = await waiting.events.get()
                answer = piece.answer
                reason = None if answer is None else answer.reason
                choice = {
                    "index": 0,
                    "text": piece.text,
                    "finish_reason": reason,
                    "logprobs": None,
                }
                if piece.text or reason:
                    yield f"data: {json.dumps({**base, 'choices': [choice]})}\n\n"
                if reason:
                    yield "data: [DONE]\n\n"
                    return
        finally:
            waiting.gone = True

    async def models(http: HttpRequest) -> Response:
        model = {"id": name, "object": "model", "created": began, "owned_by": "lmplay"}
        return JSONResponse({"object": "list", "data": [model]})

    return Starlette(
        routes=[
            Route("/v1/completions", completions, methods=["POST"]),
            Route("/v1/models", models),
        ]
    )
