"""A model of lmplay as lm-eval's: log-likelihoods, rolling log-likelihoods, generated texts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from ..decoding import Sampling, generate
from ..scoring import Score, Scorer
from ..training.restore import LoadedModel

Request = tuple[tuple[str, str], list[int], list[int]]  # (texts), context ids, continuation ids
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
        self.progress = progress
        self.max_length: int = loaded.config.max_len
        self.scorer = Scorer(
            self.runner,
            self.model,
            self.max_length,
            loaded.tokenizer.eot,
            loaded.name,
            batch_size,
            shared,
        )

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

    def _loglikelihood_tokens(self, requests: list[Request], **kwargs: Any) -> list[Score]:
        pairs = [(context, continuation) for _, context, continuation in requests]
        return self.scorer.scores(pairs, self.progress)

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
