"""A model of lmplay as lm-eval's: log-likelihoods, rolling log-likelihoods, generated texts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor

from ..api import IGNORE, Batch, KVCache, ModelRunner
from ..decoding import Sampling, generate
from ..errors import LmplayError
from ..training.restore import LoadedModel

Request = tuple[tuple[str, str], list[int], list[int]]  # (texts), context ids, continuation ids
Score = tuple[float, bool]  # nats, and whether greedy decoding gives the continuation
NEW_TOKENS = 256  # of a generated text, where a task sets no limit


class Model(TemplateLM):
    """A folded model for lm-eval's evaluator.

    A text that is longer than the model's window loses its beginning, as in lm-eval's own models.

    Args:
        batch_size: continuations in one forward pass.
        progress: gets the number of requests that are done, and their total.
        shared: read a context that several continuations share once, into a cache.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        batch_size: int = 16,
        progress: Callable[[int, int], None] = lambda done, total: None,
        shared: bool = True,
    ):
        super().__init__()
        self.loaded = loaded
        self.runner = loaded.runner
        self.model = loaded.model.eval()
        self._device = next(self.model.parameters()).device
        self.batch_size = batch_size
        self.progress = progress
        self.max_length: int = loaded.config.max_len
        # Logits of all positions are those of `head`, if the runner does not say otherwise.
        self.has_plain_head = (
            type(self.runner).logits is ModelRunner.logits
            and type(self.runner).step is ModelRunner.step
        )
        self.shared = shared and self.has_plain_head

    @property
    def eot_token_id(self) -> int:
        return self.loaded.tokenizer.eot

    @property
    def prefix_token_id(self) -> int:
        """What a text is scored behind if nothing is before it."""
        return self.loaded.tokenizer.bos

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        tokenizer = self.loaded.tokenizer
        if add_special_tokens is False:
            return tokenizer.encode(string)
        return tokenizer.encode_prompt(string)

    @torch.no_grad()
    def _loglikelihood_tokens(self, requests: list[Request], **kwargs: Any) -> list[Score]:
        scores: dict[int, Score] = {}
        with self.runner.fixed_weights(self.model):
            for numbers, group in self._groups(requests):
                for number, score in zip(numbers, self._scores(group), strict=True):
                    scores[number] = score
                self.progress(len(scores), len(requests))
        return [scores[i] for i in range(len(requests))]

    def _groups(
        self, requests: list[Request]
    ) -> Iterator[tuple[list[int], list[tuple[list[int], list[int]]]]]:
        """Yield requests that are scored together, with their numbers: those of one context, if it
        is read once, else those of similar length."""

        def key(i: int) -> tuple[Any, ...]:
            _, context, continuation = requests[i]
            return (-len(context), context) if self.shared else (-len(context) - len(continuation),)

        order = sorted(range(len(requests)), key=key)
        start = 0
        for end in range(1, len(order) + 1):
            full = end - start == self.batch_size
            if end == len(order) or full or (self.shared and key(order[end]) != key(order[start])):
                numbers = order[start:end]
                yield numbers, [requests[i][1:] for i in numbers]
                start = end

    def _scores(self, group: list[tuple[list[int], list[int]]]) -> list[Score]:
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

    def _input(self, context: list[int], target: list[int]) -> list[int]:
        """Return what the model reads: the end of the text that fits, without the last token."""
        if len(target) > self.max_length:
            raise LmplayError(
                f"a text of {len(target)} tokens does not fit into the {self.max_length} positions "
                f"of {self.loaded.name}"
            )
        return (context + target)[-(self.max_length + 1) :][:-1]

    def _padded(self, rows: list[list[int]]) -> Tensor:
        length = max(len(row) for row in rows)
        filled = [row + [self.eot_token_id] * (length - len(row)) for row in rows]
        return torch.tensor(filled, device=self._device)

    def _logits(self, inputs: list[list[int]]) -> Tensor:
        """Return logits (B, T, V). The padding is behind the texts, where no position sees it."""
        head: Any = self.model.head
        logits: Tensor = head(self.model(self._padded(inputs)))
        return logits

    def _after_shared_context(self, context: list[int], targets: list[list[int]]) -> Tensor:
        """Return the logits (B, T, V) of continuations of one context, which is read once."""
        room = len(context) + max(len(target) for target in targets)
        cache = self.runner.new_cache(self.model, 1, room)
        if not isinstance(cache, KVCache) or len(targets) == 1:
            rows = self._logits([(context + target)[:-1] for target in targets])
            return rows[:, len(context) - 1 :]
        head: Any = self.model.head
        first = head(self.model(self._padded([context]), cache=cache)[:, -1:])
        first = first.expand(len(targets), -1, -1)
        if room == len(context) + 1:  # each continuation is one token
            return first
        unread = self._padded([target[:-1] or [self.eot_token_id] for target in targets])
        rest = head(self.model(unread, cache=cache.repeated(len(targets))))
        return torch.cat([first, rest], 1)

    def _score_by_step(self, context: list[int], target: list[int]) -> Score:
        """Score one continuation through the runner's own loss."""
        ids = self._input(context, target)
        targets = [IGNORE] * (len(ids) - len(target)) + target
        batch = Batch(self._padded([ids]), torch.tensor([targets], device=self._device))
        out = self.runner.step(self.model, batch)
        return -float(out.loss_sum), int(out.n_correct) == int(out.n_tokens)

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        windows: list[Request] = []
        owners = []
        for number, (text,) in enumerate(request.args for request in requests):
            rolling = get_rolling_token_windows(
                token_list=self.tok_encode(text, add_special_tokens=False),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            for context, continuation in map(make_disjoint_window, rolling):
                windows.append((("", ""), context, continuation))
                owners.append(number)
        sums = [0.0] * len(requests)
        for owner, (nats, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            sums[owner] += nats
        return sums

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        texts = []
        for number, (context, options) in enumerate(request.args for request in requests):
            texts.append(self._generated(context, dict(options)))
            self.progress(number + 1, len(requests))
        return texts

    def _generated(self, context: str, options: dict[str, Any]) -> str:
        tokenizer = self.loaded.tokenizer
        until = options.get("until") or []
        until = [until] if isinstance(until, str) else until
        count = int(options.get("max_gen_toks", NEW_TOKENS))
        temperature = float(options.get("temperature") or 0.0)
        draws = bool(options.get("do_sample", temperature > 0)) and temperature > 0
        ids = self.tok_encode(context)[-max(1, self.max_length - count) :]
        steps = generate(
            self.runner,
            self.model,
            ids,
            count,
            self.runner.window(),
            self.loaded.config.vocab_size,
            Sampling(draws, temperature if draws else 1.0, 0, float(options.get("top_p", 1.0))),
            eot=tokenizer.eot,
            stops=tokenizer.stops,
        )
        made: list[int] = []
        for (token,) in steps:
            if token in tokenizer.stops:
                break
            made.append(token)
            if any(stop in tokenizer.decode(made) for stop in until):
                break
        text = tokenizer.decode(made)
        for stop in until:
            text = text.split(stop)[0]
        return text
