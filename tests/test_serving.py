"""Serving: answers are the generator's, each request is answered once, HTTP is OpenAI's."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Command, one_line, write_plan

from lmplay import python, testing
from lmplay.data.tokenizers import Bytes
from lmplay.decoding import Sampling
from lmplay.errors import LmplayError
from lmplay.serving import redis_worker
from lmplay.serving.engine import Engine, Request
from lmplay.serving.redis_worker import GROUP, Worker, connect
from lmplay.serving.rows import BatchedRows, SingleRows, make_rows
from lmplay.training.restore import LoadedModel

PROMPTS = ["the quick", "a", "fox jumps over the", "", "dogs and wizards", "box" * 5, "seven"]


def loaded(variant: str, max_len: int = 64) -> LoadedModel:
    """A tiny model with random weights that speaks bytes."""
    subject = testing.tiny(variant, vocab_size=257, max_len=max_len)
    model = subject.runner.fold(subject.moved().eval())
    return LoadedModel(
        variant, subject.experiment, subject.config, subject.runner, model, Bytes(), True
    )


def alone(model: LoadedModel, request: Request) -> str:
    """The text that the generator gives."""
    steps = python.stream(
        request.prompt, model, request.sampling(), request.max_tokens, 1, request.seed
    )
    return "".join(piece for (piece,) in steps)


def answers(engine: Engine, requests: list[Request]) -> list[str]:
    """Answer all, a few at a time, the next as soon as there is room."""
    todo = list(requests)
    found = []
    while todo or engine.active:
        while todo and engine.free:
            found.append(engine.add(todo.pop(0)))
        engine.step()
        engine.release()
    return [answer.text for answer in found]


@pytest.mark.parametrize("variant", ["gpt2ish", "modern", "gqa", "llama3", "modern_nnm", "mamba2"])
def test_answers_are_those_of_the_generator(variant: str) -> None:
    """Prompts of different lengths, more requests than slots, and texts beyond the window."""
    model = loaded(variant, max_len=24)
    engine = Engine(model, slots=3)
    assert (engine.not_batched == "") == (variant != "mamba2")
    requests = [Request(prompt, 5 + 9 * i) for i, prompt in enumerate(PROMPTS)]
    requests += [Request("the", 20, temperature=0.8, top_k=9, seed=i) for i in range(3)]
    assert answers(engine, requests) == [alone(model, request) for request in requests]
    assert engine.free == 3


@pytest.mark.parametrize(
    ("variant", "reason"),
    [
        ("alibi", "mask of its own"),
        ("sliding_window", "mask of its own"),
        ("mamba", "cache of its own"),
        ("attn_pos", "logits differ"),
    ],
)
def test_a_model_that_cannot_be_batched_is_not(variant: str, reason: str) -> None:
    model = loaded(variant)
    rows, why = make_rows(model.runner, model.model, 4, 64, 257)
    assert isinstance(rows, SingleRows)
    assert reason in why


def test_a_batched_step_is_that_of_single_texts() -> None:
    model = loaded("modern")
    batched = BatchedRows(model.runner, model.model, 3, 64)
    single = SingleRows(model.runner, model.model, 64)
    for rows in (batched, single):
        for slot, length in ((2, 40), (0, 3)):
            rows.join(slot, [(7 * i) % 250 for i in range(length)])
    for tokens in ({0: 5, 2: 6}, {2: 9}, {2: 1, 0: 8}):
        own, other = batched.step(tokens), single.step(tokens)
        for slot in tokens:
            torch.testing.assert_close(own[slot], other[slot], rtol=1e-4, atol=1e-4)


def test_a_stop_text_ends_an_answer_and_is_not_part_of_it() -> None:
    model = loaded("modern")
    full = alone(model, Request("the", 30))
    for stop in (full[7:9], full[20], "never there"):
        engine = Engine(model, slots=2)
        answer = engine.add(Request("the", 30, stop=(stop,)))
        pieces = [answer.piece]
        while engine.active:
            pieces += [a.piece for a in engine.step()]
            engine.release()
        assert answer.text == full.split(stop)[0]
        assert "".join(pieces) == answer.text
        assert answer.reason == ("stop" if stop in full else "length")


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({}, "prompt: a text is wanted"),
        ({"prompt": "x", "max_token": 3}, "did you mean max_tokens"),
        ({"prompt": "x", "max_tokens": "many"}, "max_tokens: an integer is wanted, not 'many'"),
        ({"prompt": "x", "max_tokens": 0}, "max_tokens must be 1 or more"),
        ({"prompt": "x", "temperature": -1}, "temperature must be 0 or more"),
        ({"prompt": "x", "top_p": 2}, "top-p 2.0: it must be in"),
        ({"prompt": "x", "seed": True}, "seed: an integer is wanted"),
        ({"prompt": "x", "stop": [3]}, "stop: a text or a list of texts"),
    ],
)
def test_a_wrong_field_is_named(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(LmplayError, match=says.replace("(", r"\(")):
        Request.parse(fields)


def test_a_prompt_that_is_too_long_is_refused() -> None:
    engine = Engine(loaded("modern"), slots=1, max_prompt=5)
    with pytest.raises(LmplayError, match="prompt: it has 6 tokens, and 5 are the limit"):
        engine.add(Request("abcdef"))
    assert engine.free == 1


# ---------------------------------------------------------------- Redis


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def start_redis(folder: Path, *options: str) -> tuple[subprocess.Popen[bytes], int]:
    program = shutil.which("redis-server")
    if program is None:
        pytest.skip("redis-server is not installed")
    port = free_port()
    words = [program, "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir"]
    process = subprocess.Popen(
        [*words, str(folder), *options], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    for _ in range(200):
        with socket.socket() as s:
            if s.connect_ex(("127.0.0.1", port)) == 0:
                return process, port
        time.sleep(0.05)
    process.kill()
    raise AssertionError("redis-server does not answer")


@pytest.fixture
def url(tmp_path: Path) -> Iterator[str]:
    process, port = start_redis(tmp_path)
    yield f"redis://127.0.0.1:{port}"
    process.kill()
    process.wait()


def event_of(connection: Any, reply: str, seconds: float = 60.0) -> list[dict[str, Any]]:
    """Wait for the last event of a reply stream; return all of them."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        found = [json.loads(entry["event"]) for _, entry in connection.xrange(reply)]
        if found and found[-1]["type"] in ("done", "error"):
            return found
        time.sleep(0.02)
    raise AssertionError(f"no answer in {reply}")


def test_answers_pieces_and_errors_go_to_the_reply_stream(url: str) -> None:
    model = loaded("modern")
    connection = connect(url)
    worker = Worker(connection, Engine(model, 2, max_prompt=20), "one")
    send = {
        "plain": {"prompt": "the quick", "max_tokens": "9"},
        "pieces": {"prompt": "fox", "max_tokens": "9", "stream": "1", "stop": '["zzz"]'},
        "long": {"prompt": "x" * 30},
        "field": {"prompt": "x", "max_token": "3"},
        "json": {"prompt": "x", "stop": "[oops"},
    }
    for name, fields in send.items():
        connection.xadd("lmplay:requests", {**fields, "reply": name})
    while connection.xlen("lmplay:requests"):
        worker.turn(0.01)
    (plain,) = event_of(connection, "plain")
    assert plain["text"] == alone(model, Request("the quick", 9))
    assert (plain["tokens"], plain["prompt_tokens"], plain["reason"]) == (9, 9, "length")
    *pieces, done = event_of(connection, "pieces")
    assert "".join(piece["text"] for piece in pieces) == done["text"]
    assert len(pieces) > 1
    says = {"long": "20 are the limit", "field": "did you mean max_tokens", "json": "Expecting"}
    for name, message in says.items():
        (event,) = event_of(connection, name)
        assert event["type"] == "error"
        assert message in event["message"]
    assert worker.answered == 2
    assert 0 < connection.ttl("plain") <= redis_worker.KEPT


def test_a_full_queue_is_an_error(url: str) -> None:
    connection = connect(url)
    worker = Worker(connection, Engine(loaded("modern"), 1), "one", max_queue=3)
    for i in range(6):
        connection.xadd("lmplay:requests", {"prompt": "x", "max_tokens": "1", "reply": f"r{i}"})
    while connection.xlen("lmplay:requests"):
        worker.turn(0.01)
    kinds = [event_of(connection, f"r{i}")[-1]["type"] for i in range(6)]
    assert kinds == ["error"] * 2 + ["done"] * 4
    assert "the queue is full" in event_of(connection, "r0")[-1]["message"]


def test_a_request_that_fails_too_often_is_a_dead_letter(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(redis_worker, "DEAD", 0.0)
    connection = connect(url)
    worker = Worker(connection, Engine(loaded("modern"), 2), "one")
    ids = [
        connection.xadd("lmplay:requests", {"prompt": "x", "max_tokens": "2", "reply": reply})
        for reply in ("once", "often")
    ]
    connection.xreadgroup(GROUP, "ghost", {"lmplay:requests": ">"})  # and dies
    for _ in range(2):
        connection.xclaim("lmplay:requests", GROUP, "ghost", 0, [ids[1]])
    while connection.xlen("lmplay:requests"):
        worker.turn(0.01)
    assert event_of(connection, "once")[-1]["type"] == "done"
    assert event_of(connection, "often")[-1]["message"] == "it failed 3 times"
    ((_, entry),) = connection.xrange("lmplay:requests:dead")
    letter = json.loads(entry["letter"])
    assert letter["id"] == ids[1]
    assert letter["fields"]["prompt"] == "x"
    assert "failed" in letter["reason"]


def test_a_request_that_another_worker_answered_is_not_answered_again(url: str) -> None:
    connection = connect(url)
    worker = Worker(connection, Engine(loaded("modern"), 2), "one")
    id_ = connection.xadd("lmplay:requests", {"prompt": "x", "max_tokens": "3", "reply": "r"})
    worker.turn(0.01)
    assert len(worker.jobs) == 1
    connection.xack("lmplay:requests", GROUP, id_)  # by the other one, while this one works
    while worker.jobs:
        worker.turn(0.01)
    assert connection.xlen("r") == 0
    assert worker.answered == 0


QUICK = (
    "import sys; from lmplay.serving import redis_worker as w; w.BEAT, w.DEAD = 0.3, 2.0; "
    "from lmplay.cli.serve import main; sys.exit(main())"
)


def test_two_workers_answer_each_request_once_although_one_is_killed(
    url: str, command: Command, tmp_path: Path
) -> None:
    """200 requests of eight clients; greedy answers are the generator's."""
    plan = write_plan(tmp_path)
    done = command("lmp_trainer", "--exp", "modern", "--training-plan", str(plan))
    assert done.returncode == 0, done.stderr
    run = tmp_path / "gpt_out" / "tiny" / "modern-s0"
    model = python.load(run, device="cpu")
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-c", QUICK, "--redis", url, "--model", str(run), "--batch-size", "4"]
    workers = [
        subprocess.Popen(words, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    requests = [Request(f"{word} {n}", 24) for n in range(25) for word in [*PROMPTS, "x"]]
    assert len(requests) == 200
    killed = threading.Event()

    def client(number: int) -> dict[int, list[dict[str, Any]]]:
        connection = connect(url)
        found = {}
        for i in range(number, len(requests), 8):
            request = requests[i]
            fields = {"prompt": request.prompt, "max_tokens": request.max_tokens}
            connection.xadd("lmplay:requests", {**fields, "reply": f"r{i}"})
            found[i] = event_of(connection, f"r{i}", 100)
            if i > 40 and not killed.is_set():
                killed.set()
                workers[0].send_signal(signal.SIGKILL)
        return found

    with ThreadPoolExecutor(8) as pool:
        found = {i: e for part in pool.map(client, range(8)) for i, e in part.items()}
    connection = connect(url)
    workers[1].send_signal(signal.SIGTERM)
    out, err = workers[1].communicate(timeout=60)
    assert workers[1].returncode == 0, err
    assert "answered" in out
    workers[0].wait(30)
    assert workers[0].returncode == -signal.SIGKILL
    assert connection.xlen("lmplay:requests") == 0
    assert connection.xlen("lmplay:requests:dead") == 0
    for i, request in enumerate(requests):
        assert connection.xlen(f"r{i}") == 1, "exactly one answer"
        assert found[i][-1]["text"] == alone(model, request)


def test_what_a_user_can_mend_is_one_line(command: Command, tmp_path: Path) -> None:
    port = free_port()
    done = command("lmp_serve", "--redis", f"redis://127.0.0.1:{port}")
    one_line(done, "no Redis server can be reached", "redis-server starts one")
    one_line(command("lmp_serve", "--redis", "rediss"), "no Redis server can be reached")
    one_line(command("lmp_serve", "--http", "8000"), "HOST:PORT is wanted")
    one_line(command("lmp_serve", "--http", "127.0.0.1:99999"), "HOST:PORT is wanted")
    one_line(command("lmp_serve", "--http", "127.0.0.1:0"), "there is no run with a checkpoint")
    process, port = start_redis(tmp_path, "--requirepass", "secret")
    try:
        done = command("lmp_serve", "--redis", f"redis://127.0.0.1:{port}")
        one_line(done, "the server wants a password")
        done = command("lmp_serve", "--redis", f"redis://:wrong@127.0.0.1:{port}")
        one_line(done, "the server wants a password")
    finally:
        process.kill()
        process.wait()


# ---------------------------------------------------------------- HTTP


@pytest.fixture
def web() -> Iterator[tuple[Any, LoadedModel]]:
    pytest.importorskip("starlette")
    client = pytest.importorskip("starlette.testclient")
    from lmplay.serving.http import make_app

    model = loaded("modern")
    engine = Engine(model, 2, max_prompt=20)
    with client.TestClient(make_app(engine, "tiny", max_queue=50)) as web:
        yield web, model


def test_completions_are_openais(web: tuple[Any, LoadedModel]) -> None:
    client, model = web
    body = {"model": "tiny", "prompt": ["the quick", "fox"], "max_tokens": 7, "temperature": 0}
    done = client.post("/v1/completions", json=body)
    assert done.status_code == 200, done.text
    answer = done.json()
    texts = [choice["text"] for choice in answer["choices"]]
    assert texts == [alone(model, Request(prompt, 7)) for prompt in body["prompt"]]
    assert answer["object"] == "text_completion"
    assert answer["usage"] == {
        "prompt_tokens": 12,
        "completion_tokens": 14,
        "total_tokens": 26,
    }
    assert [c["finish_reason"] for c in answer["choices"]] == ["length", "length"]
    listed = client.get("/v1/models").json()
    assert [m["id"] for m in listed["data"]] == ["tiny"]


def test_a_stream_is_openais(web: tuple[Any, LoadedModel]) -> None:
    client, model = web
    body = {"prompt": "the quick", "max_tokens": 9, "temperature": 0, "stream": True}
    with client.stream("POST", "/v1/completions", json=body) as done:
        lines = [line.removeprefix("data: ") for line in done.iter_lines() if line]
    assert lines[-1] == "[DONE]"
    events = [json.loads(line)["choices"][0] for line in lines[:-1]]
    assert "".join(event["text"] for event in events) == alone(model, Request("the quick", 9))
    assert [e["finish_reason"] for e in events[:-1]] == [None] * (len(events) - 1)
    assert events[-1]["finish_reason"] == "length"


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ({}, "prompt: a text"),
        ({"prompt": "x" * 30}, "20 are the limit"),
        ({"prompt": "x", "n": 2}, "n: only 1 is supported"),
        ({"prompt": "x", "max_token": 1}, "did you mean max_tokens"),
        ({"prompt": ["a", "b"], "stream": True}, "one prompt at a time"),
        ([], "an object is wanted"),
    ],
)
def test_a_wrong_request_is_a_clear_error(
    web: tuple[Any, LoadedModel], body: Any, says: str
) -> None:
    client, _ = web
    done = client.post("/v1/completions", json=body)
    assert done.status_code == 400
    assert says in done.json()["error"]["message"]


def test_many_clients_are_answered_at_once(web: tuple[Any, LoadedModel]) -> None:
    client, model = web
    bodies = [{"prompt": f"fox {i}", "max_tokens": 5 + i, "temperature": 0} for i in range(12)]
    with ThreadPoolExecutor(6) as pool:
        done = list(pool.map(lambda body: client.post("/v1/completions", json=body), bodies))
    texts = [answer.json()["choices"][0]["text"] for answer in done]
    assert texts == [alone(model, Request(f"fox {i}", 5 + i)) for i in range(12)]
    assert Sampling(False).temperature == 1.0
