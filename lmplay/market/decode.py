"""Read token streams with any model: through its cache for endless texts, or again from the
start."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor, nn

from ..api import ModelRunner


class Reader:
    """B streams of messages that a model reads; each has its own length.

    `seconds` is the time spent in the model.

    Args:
        length: positions that the model sees: a sink and the latest messages.
        piece: tokens per message.
        cached: False: read everything again for every token, even if the model has a cache.
    """

    def __init__(
        self,
        runner: ModelRunner,
        model: nn.Module,
        batch_size: int,
        length: int,
        piece: int,
        cached: bool = True,
    ):
        self.runner = runner
        self.model = model
        self.piece = piece
        self.device = next(model.parameters()).device
        self.stream: Any = runner.new_stream(model, batch_size, length) if cached else None
        if self.stream is None:
            self.stream = _Reread(batch_size, length)
        self.seconds = 0.0

    @property
    def cached(self) -> bool:
        return not isinstance(self.stream, _Reread)

    def read(self, ids: Tensor) -> Tensor:
        """Read ids (B, t); return the logits (B, V) float32 after the last one."""
        began = time.perf_counter()
        with torch.no_grad():
            if isinstance(self.stream, _Reread):
                logits = self.stream.logits(self.runner, self.model, ids.to(self.device))
            else:
                logits, self.stream = self.runner.logits(
                    self.model, ids.to(self.device), self.stream
                )
            logits = logits.float().cpu()
        self.seconds += time.perf_counter() - began
        return logits

    def make_room(self, tokens: int) -> None:
        self.stream.make_room(tokens, self.piece)

    def mark(self) -> Any:
        return self.stream.mark()

    def roll_back(self, mark: Any, rows: Tensor) -> None:
        if bool(rows.any()):
            self.stream.roll_back(mark, rows.to(self.device))


class _Reread:
    """The stream of a model without a cache for endless texts: each token reads all of it again."""

    def __init__(self, batch_size: int, length: int):
        self.rows: list[list[int]] = [[] for _ in range(batch_size)]
        self.length = length

    def logits(self, runner: ModelRunner, model: nn.Module, ids: Tensor) -> Tensor:
        for row, new in zip(self.rows, ids.tolist(), strict=True):
            row.extend(new)
        out: list[Tensor | None] = [None] * len(self.rows)
        for size in {len(row) for row in self.rows}:  # rows of one length are one batch
            which = [i for i, row in enumerate(self.rows) if len(row) == size]
            logits, _ = runner.logits(
                model, torch.tensor([self.rows[i] for i in which], device=ids.device)
            )
            for i, row in zip(which, logits, strict=True):
                out[i] = row
        return torch.stack([row for row in out if row is not None])

    def make_room(self, tokens: int, piece: int) -> None:
        for row in self.rows:
            over = len(row) + tokens - self.length
            del row[1 : 1 + -(-max(0, over) // piece) * piece]

    def mark(self) -> list[list[int]]:
        return [list(row) for row in self.rows]

    def roll_back(self, mark: list[list[int]], rows: Tensor) -> None:
        self.rows = [
            list(kept) if back else row
            for kept, row, back in zip(mark, self.rows, rows.tolist(), strict=True)
        ]
