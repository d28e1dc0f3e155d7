"""Requests from a Redis stream, answers to reply streams.

Workers share the stream through a consumer group, so each request goes to one of them. A request
stays pending until its answer is written: answer and acknowledgement are one script, and only the
worker that still can acknowledge writes. A worker that dies leaves its requests pending, and others
claim them. After three failures a request moves to a dead-letter stream.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..errors import LmplayError, first_line
from ..optional import need
from .engine import Answer, Engine, Request

GROUP = "workers"
FAILURES = 3  # deliveries without an answer, after which a request is a dead letter
BEAT = 2.0  # seconds between signs of life of a request that is being answered
DEAD = 15.0  # seconds without one, after which another worker claims a request
KEPT = 3600  # seconds that a reply stream is kept after its last entry

# KEYS: requests, replies. ARGV: group, id, reply as JSON, seconds to keep it. Returns 1 if this
# worker answered: an id can be acknowledged once.
FINISH = """
if redis.call('XACK', KEYS[1], ARGV[1], ARGV[2]) == 0 then return 0 end
redis.call('XDEL', KEYS[1], ARGV[2])
redis.call('XADD', KEYS[2], '*', 'event', ARGV[3])
redis.call('EXPIRE', KEYS[2], ARGV[4])
return 1
"""

# The same, for a request that is given up: KEYS[3] is the dead-letter stream, ARGV[5] its entry.
BURY = """
if redis.call('XACK', KEYS[1], ARGV[1], ARGV[2]) == 0 then return 0 end
redis.call('XDEL', KEYS[1], ARGV[2])
redis.call('XADD', KEYS[3], '*', 'letter', ARGV[5])
redis.call('XADD', KEYS[2], '*', 'event', ARGV[3])
redis.call('EXPIRE', KEYS[2], ARGV[4])
return 1
"""


@dataclass
class Job:
    """A request of the stream."""

    id: str
    reply: str  # name of its reply stream
    fields: dict[str, str]
    attempt: int
    streams: bool
    answer: Answer | None = None


def connect(url: str) -> Any:
    """Return a connection to Redis.

    Raises:
        LmplayError: nobody answers, or the server wants a password.
    """
    redis = need("redis", "serve")
    try:
        connection = redis.Redis.from_url(url, decode_responses=True, socket_connect_timeout=5)
        connection.ping()
    except redis.AuthenticationError as e:
        raise LmplayError(f"{url}: the server wants a password: redis://:PASSWORD@HOST:PORT") from e
    except (redis.RedisError, OSError, ValueError) as e:
        raise LmplayError(
            f"{url}: no Redis server can be reached ({first_line(e)}); redis-server starts one"
        ) from e
    return connection


class Worker:
    """Answers requests of a stream until it is asked to stop.

    Args:
        stream: name of the stream of requests. Dead letters go to STREAM:dead, and replies to the
            stream that a request names, or to STREAM:reply:ID.
        max_queue: requests that may wait; a request that is read while more wait is refused.
    """

    def __init__(
        self,
        connection: Any,
        engine: Engine,
        name: str,
        stream: str = "lmplay:requests",
        max_queue: int = 1000,
        log: Callable[[str], None] = lambda text: None,
    ):
        self.redis = connection
        self.engine = engine
        self.name = name
        self.stream = stream
        self.max_queue = max_queue
        self.log = log
        self.jobs: list[Job] = []
        self.stopping = False
        self.answered = 0
        self._beat = self._claimed = 0.0
        self._finish = connection.register_script(FINISH)
        self._bury = connection.register_script(BURY)
        redis = need("redis", "serve")
        try:
            connection.xgroup_create(stream, GROUP, id="0", mkstream=True)
        except redis.ResponseError as e:
            if "BUSYGROUP" not in str(e):
                raise

    def run(self) -> None:
        """Answer requests. After :attr:`stopping` is set, finish what has begun and return."""
        while self.jobs or not self.stopping:
            self.turn()

    def turn(self, wait: float = 0.5) -> None:
        """Take what there is room for, and generate one token for each request.

        Args:
            wait: seconds to wait for a request if there is nothing to do.
        """
        now = time.monotonic()
        if not self.stopping:
            if now - self._claimed > DEAD / 3:
                self._claim()
                self._claimed = now
            self._read(wait)
        if self.jobs and now - self._beat > BEAT:
            ids = [job.id for job in self.jobs]
            # Claiming one's own request says that it is still worked on.
            self.redis.xclaim(self.stream, GROUP, self.name, 0, ids, justid=True)
            self._beat = now
        if self.engine.active:
            self.engine.step()
            self._write()

    def _read(self, wait: float) -> None:
        if not self.engine.free:
            return
        found = self.redis.xreadgroup(
            GROUP,
            self.name,
            {self.stream: ">"},
            count=self.engine.free,
            block=None if self.jobs else int(wait * 1000),
        )
        for _, entries in found or []:
            waiting = self._waiting()
            for id_, fields in entries:
                job = self._job(id_, fields, 1)
                if waiting > self.max_queue:
                    self._refuse(job, f"the queue is full: {waiting} requests wait")
                else:
                    self._begin(job)

    def _waiting(self) -> int:
        """Return how many requests wait. Answered ones are deleted from the stream."""
        pending = self.redis.xpending(self.stream, GROUP)["pending"]
        return int(self.redis.xlen(self.stream)) - int(pending)

    def _claim(self) -> None:
        """Take over requests whose worker is dead; give up those that failed too often."""
        if not self.engine.free:
            return
        _, entries, *_ = self.redis.xautoclaim(
            self.stream, GROUP, self.name, int(DEAD * 1000), count=self.engine.free
        )
        own = {job.id for job in self.jobs}
        for id_, fields in entries:
            if id_ in own or fields is None:
                continue
            (pending,) = self.redis.xpending_range(self.stream, GROUP, id_, id_, 1)
            job = self._job(id_, fields, int(pending["times_delivered"]))
            if job.attempt > FAILURES:
                self._give_up(job)
            else:
                self.log(f"{id_}: taken over, attempt {job.attempt}")
                self._begin(job)

    def _job(self, id_: str, fields: dict[str, str], attempt: int) -> Job:
        own = dict(fields)
        reply = own.pop("reply", "") or f"{self.stream}:reply:{id_}"
        streams = own.pop("stream", "0") in ("1", "true", "True")
        return Job(id_, reply, own, attempt, streams)

    def _begin(self, job: Job) -> None:
        fields: dict[str, Any] = dict(job.fields)
        try:
            if "stop" in fields:
                fields["stop"] = json.loads(fields["stop"])
            job.answer = self.engine.add(Request.parse(fields))
        except (LmplayError, ValueError) as e:
            self._refuse(job, first_line(e))
            return
        self.jobs.append(job)
        self._write()

    def _refuse(self, job: Job, message: str) -> None:
        self._send(job, {"type": "error", "message": message})

    def _send(self, job: Job, event: dict[str, Any]) -> bool:
        keys = [self.stream, job.reply]
        text = json.dumps({"id": job.id, **event}, ensure_ascii=False)
        done = bool(self._finish(keys=keys, args=[GROUP, job.id, text, KEPT]))
        if not done:
            self.log(f"{job.id}: another worker has answered it")
        return done

    def _give_up(self, job: Job) -> None:
        reason = f"it failed {FAILURES} times"
        event = json.dumps({"id": job.id, "type": "error", "message": reason})
        letter = json.dumps({"id": job.id, "reason": reason, "fields": job.fields})
        keys = [self.stream, job.reply, f"{self.stream}:dead"]
        self._bury(keys=keys, args=[GROUP, job.id, event, KEPT, letter])
        self.log(f"{job.id}: {reason}; moved to {self.stream}:dead")

    def _write(self) -> None:
        """Write new pieces of text, and the answers that are complete."""
        left = []
        for job in self.jobs:
            answer = job.answer
            assert answer is not None
            if job.streams and answer.piece:
                piece = {"id": job.id, "type": "piece", "text": answer.piece, "try": job.attempt}
                event = json.dumps(piece, ensure_ascii=False)
                self.redis.xadd(job.reply, {"event": event})
                answer.piece = ""
            if not answer.reason:
                left.append(job)
                continue
            if answer.reason == "error":
                self._refuse(job, answer.text)
                continue
            result: dict[str, Any] = {
                "type": "done",
                "text": answer.text,
                "reason": answer.reason,
                "tokens": answer.tokens,
                "prompt_tokens": answer.prompt_tokens,
            }
            if answer.probabilities:
                result["probabilities"] = answer.probabilities
            self.answered += self._send(job, result)
        self.jobs = left
        self.engine.release()
