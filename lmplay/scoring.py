"""Log-likelihoods of texts behind a context, in batches; a context they share is read once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .api import IGNORE, Batch, KVCache, ModelRunner
from .errors import LmplayError

Pair = tuple[Sequence[int], Sequence[int]]  # ids of the context and of its continuation
Score = tuple[float, bool]  # nats, and whether greedy decoding gives the continuation


class Scorer:
    """Scores continuations with one model, which it puts into evaluation mode.

    A text that is longer than the model's window loses its beginning.

    Args:
        max_length: positions that the model has.
        filler: a token id, for padding.
        name: of the model, in errors.
        batch_size: continuations in one forward pass.
        shared: read a context that several continuations share once, into a cache.
    """

    def __init__(
        self,
        runner: ModelRunner,
        model: nn.Module,
        max_length: int,
        filler: int,
        name: str,
        batch_size: int = 16,
        shared: bool = True,
    ):
        self.runner = runner
        self.model = model.eval()
        self.device = next(self.model.parameters()).device
        self.max_length = max_length
        self.filler = filler
        self.name = name
        self.batch_size = batch_size
        # Logits of all positions are those of `head`, if the runner does not say otherwise.
        self.has_plain_head = (
            type(runner).logits is ModelRunner.logits and type(runner).step is ModelRunner.step
        )
        self.shared = shared and self.has_plain_head

    @torch.no_grad()
    def scores(
        self,
        pairs: Sequence[Pair],
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> list[Score]:
        """Return the score of each continuation.

        Args:
            progress: gets the number of pairs that are done, and their total.

        Raises:
            LmplayError: a continuation alone is longer than the model's window.
        """
        found: dict[int, Score] = {}
        with self.runner.fixed_weights(self.model):
            for numbers, group in self._groups(pairs):
                for number, score in zip(numbers, self._scores(group), strict=True):
                    found[number] = score
                progress(len(found), len(pairs))
        return [found[i] for i in range(len(pairs))]

    def _groups(self, pairs: Sequence[Pair]) -> Iterator[tuple[list[int], list[Pair]]]:
        """Yield pairs that are scored together, with their numbers: those of one context, if it is
        read once, else those of similar length."""

        def key(i: int) -> tuple[Any, ...]:
            context, continuation = pairs[i]
            if self.shared:
                return (-len(context), tuple(context))
            return (-len(context) - len(continuation),)

        order = sorted(range(len(pairs)), key=key)
        start = 0
        for end in range(1, len(order) + 1):
            full = end - start == self.batch_size
            if end == len(order) or full or (self.shared and key(order[end]) != key(order[start])):
                numbers = order[start:end]
                yield numbers, [pairs[i] for i in numbers]
                start = end

    def _scores(self, group: list[Pair]) -> list[Score]:
        """Score the continuations of contexts."""
        if not self.has_plain_head:
            return [self._score_by_step(context, target) for context, target in group]
        context = group[0][0]
        longest = max(len(target) for _, target in group)
        if self.shared and len(context) + longest <= self.max_length + 1:
            logits = self._after_shared_context(context, [target for _, target in group])
            firsts = [0] * len(group)
        else:
            inputs = [self._input(context, target) for context, target in group]
            logits = self._logits(inputs)
            firsts = [
                len(ids) - len(target) for ids, (_, target) in zip(inputs, group, strict=True)
            ]
        scores = []
        for row, first, (_, target) in zip(logits, firsts, group, strict=True):
            own = row[first : first + len(target)].float()
            wanted = torch.tensor(target, device=own.device)
            nats = F.cross_entropy(own, wanted, reduction="sum")
            scores.append((-float(nats), bool((own.argmax(-1) == wanted).all())))
        return scores

    def _input(self, context: Sequence[int], target: Sequence[int]) -> list[int]:
        """Return what the model reads: the end of the text that fits, without the last token."""
        if len(target) > self.max_length:
            raise LmplayError(
                f"a text of {len(target)} tokens does not fit into the {self.max_length} positions "
                f"of {self.name}"
            )
        return [*context, *target][-(self.max_length + 1) :][:-1]

    def _padded(self, rows: Sequence[Sequence[int]]) -> Tensor:
        length = max(len(row) for row in rows)
        filled = [[*row, *[self.filler] * (length - len(row))] for row in rows]
        return torch.tensor(filled, device=self.device)

    def _logits(self, inputs: Sequence[Sequence[int]]) -> Tensor:
        """Return logits (B, T, V). The padding is behind the texts, where no position sees it."""
        head: Any = self.model.head
        logits: Tensor = head(self.model(self._padded(inputs)))
        return logits

    def _after_shared_context(
        self, context: Sequence[int], targets: Sequence[Sequence[int]]
    ) -> Tensor:
        """Return the logits (B, T, V) of continuations of one context, which is read once."""
        room = len(context) + max(len(target) for target in targets)
        cache = self.runner.new_cache(self.model, 1, room)
        if not isinstance(cache, KVCache) or len(targets) == 1:
            rows = self._logits([[*context, *target][:-1] for target in targets])
            return rows[:, len(context) - 1 :]
        head: Any = self.model.head
        first = head(self.model(self._padded([context]), cache=cache)[:, -1:])
        first = first.expand(len(targets), -1, -1)
        if room == len(context) + 1:  # each continuation is one token
            return first
        unread = self._padded([target[:-1] or [self.filler] for target in targets])
        rest = head(self.model(unread, cache=cache.repeated(len(targets))))
        return torch.cat([first, rest], 1)

    def _score_by_step(self, context: Sequence[int], target: Sequence[int]) -> Score:
        """Score one continuation through the runner's own loss."""
        ids = self._input(context, target)
        targets = [IGNORE] * (len(ids) - len(target)) + list(target)
        batch = Batch(self._padded([ids]), torch.tensor([targets], device=self.device))
        out = self.runner.step(self.model, batch)
        return -float(out.loss_sum), int(out.n_correct) == int(out.n_tokens)
