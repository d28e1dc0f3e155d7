"""Continuous batching: requests join and leave a batch that is decoded token by token."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from ..classification.predict import with_head
from ..data.examples import BETWEEN
from ..decoding import Sampling, TextStream, choose
from ..errors import LmplayError, did_you_mean
from ..training.restore import LoadedModel
from .rows import Rows, make_rows

WITHOUT_LIMIT = 2048  # positions of the cache of a model that remembers any length

FIELDS: dict[str, type] = {
    "max_tokens": int,
    "temperature": float,
    "top_k": int,
    "top_p": float,
    "repetition_penalty": float,
    "seed": int,
}


@dataclass(frozen=True)
class Request:
    """A text to continue.

    Attributes:
        temperature: 0 takes the most likely token; else tokens are drawn.
        stop: texts that end the answer and are not part of it.
    """

    prompt: str
    max_tokens: int = 16
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()

    @classmethod
    def parse(cls, given: Mapping[str, Any]) -> Request:
        """Return the request that a client's fields describe, as text or as JSON has them.

        Raises:
            LmplayError: a field is unknown, missing, or has a value that does not fit.
        """
        known = {"prompt", "stop", *FIELDS}
        for name in given:
            if name not in known:
                raise LmplayError(f"there is no field {name}{did_you_mean(name, known)}")
        prompt = given.get("prompt")
        if not isinstance(prompt, str):
            raise LmplayError("prompt: a text is wanted")
        values: dict[str, Any] = {}
        for name, kind in FIELDS.items():
            if given.get(name) is None:
                continue
            try:
                if isinstance(given[name], bool):
                    raise ValueError
                values[name] = kind(given[name])
            except (TypeError, ValueError) as e:
                wanted = "an integer" if kind is int else "a number"
                raise LmplayError(f"{name}: {wanted} is wanted, not {given[name]!r}") from e
        if values.get("max_tokens", 1) < 1:
            raise LmplayError("max_tokens must be 1 or more")
        stop = given.get("stop") or ()
        stop = (stop,) if isinstance(stop, str) else tuple(stop)
        if not all(isinstance(text, str) and text for text in stop):
            raise LmplayError("stop: a text or a list of texts is wanted")
        request = cls(prompt, **values, stop=stop)
        request.sampling()
        return request

    def sampling(self) -> Sampling:
        """Return how its tokens are chosen.

        Raises:
            LmplayError: a value is out of range.
        """
        draws = self.temperature > 0
        if self.temperature < 0:
            raise LmplayError("temperature must be 0 or more")
        return Sampling(
            draws,
            self.temperature if draws else 1.0,
            self.top_k,
            self.top_p,
            self.repetition_penalty,
        )


@dataclass
class Answer:
    """A request that is being answered.

    Attributes:
        text: what was generated so far, without an incomplete character.
        piece: what the last step added to it.
        reason: why it ended: "stop", "length", "label", or "error" with the message as text; ""
            while it goes on.
        probabilities: of each label, from a model that tells labels.
    """

    request: Request
    prompt_tokens: int
    sampling: Sampling
    generator: torch.Generator
    stream: TextStream
    context: list[int]
    seen: torch.Tensor
    cached: int = 0
    tokens: int = 0
    text: str = ""
    piece: str = ""
    reason: str = ""
    held: str = field(default="", repr=False)  # may be the beginning of a stop text
    probabilities: dict[str, float] = field(default_factory=dict)


class Engine:
    """A model that answers up to `slots` requests at once.

    Args:
        max_prompt: tokens of a prompt; longer ones are refused.
    """

    def __init__(self, loaded: LoadedModel, slots: int = 8, max_prompt: int | None = None):
        self.loaded = loaded
        self.runner = loaded.runner
        self.model = loaded.model.eval()
        self.window = self.runner.window() or WITHOUT_LIMIT
        self.max_prompt = max_prompt or self.window
        self.slots = slots
        self.active: dict[int, Answer] = {}
        self.rows: Rows
        self.not_batched = ""
        if loaded.labels:
            return
        with self.runner.fixed_weights(self.model):
            vocab_size = loaded.config.vocab_size
            self.rows, self.not_batched = make_rows(
                self.runner, self.model, slots, self.window, vocab_size
            )

    @property
    def free(self) -> int:
        return self.slots - len(self.active)

    def check(self, request: Request) -> list[int]:
        """Return the prompt's tokens.

        Raises:
            LmplayError: the prompt is too long.
        """
        tokenizer = self.loaded.tokenizer
        if self.loaded.labels:  # as in training
            ids = tokenizer.encode(request.prompt + BETWEEN)
        else:
            ids = tokenizer.encode_prompt(request.prompt)
        if len(ids) > self.max_prompt:
            raise LmplayError(
                f"prompt: it has {len(ids)} tokens, and {self.max_prompt} are the limit"
            )
        return ids

    def add(self, request: Request) -> Answer:
        """Begin to answer a request. There must be a free slot.

        Raises:
            LmplayError: the prompt is too long.
        """
        ids = self.check(request)
        slot = next(i for i in range(self.slots) if i not in self.active)
        answer = Answer(
            request,
            len(ids),
            request.sampling(),
            torch.Generator().manual_seed(request.seed),
            TextStream(self.loaded.tokenizer),
            ids,
            self._seen(ids),
        )
        if self.loaded.labels:
            self._classify(answer)
            self.active[slot] = answer
            return answer
        with self.runner.fixed_weights(self.model):
            unread = ids[-self.window :]
            logits = self.rows.join(slot, unread)
        answer.cached = len(unread)
        self.active[slot] = answer
        self._take(answer, logits)
        return answer

    def _classify(self, answer: Answer) -> None:
        """Answer with the most likely label."""
        (row,) = with_head(self.runner, self.model, [answer.context[-self.window :]])
        answer.probabilities = dict(zip(self.loaded.labels, row.tolist(), strict=True))
        answer.text = answer.piece = self.loaded.labels[int(row.argmax())]
        answer.reason = "label"

    def _seen(self, ids: list[int]) -> torch.Tensor:
        device = next(self.model.parameters()).device
        seen = torch.zeros(1, self.loaded.config.vocab_size, dtype=torch.bool, device=device)
        seen[0, ids] = True
        return seen

    def step(self) -> list[Answer]:
        """Generate a token for each request; return all answers that were active.

        Those that have ended are freed at once.
        """
        self.release()
        if not self.active:
            return []
        tokens: dict[int, int] = {}
        logits: dict[int, torch.Tensor] = {}
        with self.runner.fixed_weights(self.model):
            for slot, answer in self.active.items():
                if answer.cached + 1 > self.window:  # read the last half again, as generate does
                    unread = answer.context[-max(1, self.window // 2) :]
                    logits[slot] = self.rows.join(slot, unread)
                    answer.cached = len(unread)
                else:
                    tokens[slot] = answer.context[-1]
                    answer.cached += 1
            if tokens:
                logits |= self.rows.step(tokens)
        stepped = list(self.active.items())
        for slot, answer in stepped:
            self._take(answer, logits[slot])
        return [answer for _, answer in stepped]

    def release(self) -> None:
        """Free the slots of answers that have ended."""
        self.active = {slot: a for slot, a in self.active.items() if not a.reason}

    def cancel(self, answer: Answer) -> None:
        """Stop answering a request."""
        self.active = {slot: a for slot, a in self.active.items() if a is not answer}

    def _take(self, answer: Answer, logits: torch.Tensor) -> None:
        """Choose the next token, and add its text to the answer."""
        request = answer.request
        answer.piece = ""
        try:
            token = int(choose(logits[None], answer.seen, answer.sampling, answer.generator))
        except LmplayError as e:  # the logits are not finite: no other answer needs to fail
            answer.text, answer.reason = str(e), "error"
            return
        if token in self.loaded.tokenizer.stops:
            self._end(answer, "stop")
            return
        answer.context = [*answer.context, token][-self.window - 1 :]
        answer.seen[0, token] = True
        answer.tokens += 1
        self._extend(answer, answer.stream.add(token))
        if not answer.reason and answer.tokens >= request.max_tokens:
            self._end(answer, "length")

    def _extend(self, answer: Answer, piece: str) -> None:
        """Add text, as far as it cannot be the beginning of a stop text."""
        text = answer.held + piece
        for stop in answer.request.stop:
            if stop in text:
                answer.piece = text[: text.index(stop)]
                answer.text += answer.piece
                answer.held = ""
                answer.reason = "stop"
                return
        keep = max(
            (
                n
                for stop in answer.request.stop
                for n in range(len(stop))
                if text.endswith(stop[:n])
            ),
            default=0,
        )
        answer.piece = text[: len(text) - keep]
        answer.held = text[len(text) - keep :]
        answer.text += answer.piece

    def _end(self, answer: Answer, reason: str) -> None:
        rest = answer.held + answer.stream.end()
        answer.held = ""
        answer.piece += rest
        answer.text += rest
        answer.reason = reason
