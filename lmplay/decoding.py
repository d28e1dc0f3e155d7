"""Decoding with a cache, and sampling."""

from __future__ import annotations

import codecs
import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .api import ModelRunner
from .data.tokenizers import Tokenizer
from .errors import LmplayError


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. Without `do_sample` it is the most likely one."""

    do_sample: bool = True
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.temperature < math.inf:
            raise LmplayError(
                f"--temperature {self.temperature}: it must be above 0 (without --do-sample it is "
                "not used)"
            )
        if not 0 < self.top_p <= 1:
            raise LmplayError(f"--top-p {self.top_p}: it must be in (0, 1]")
        if self.top_k < 0:
            raise LmplayError(f"--top-k {self.top_k}: it must be 0 (off) or more")
        if not 0 < self.repetition_penalty < math.inf:
            raise LmplayError(f"--repetition-penalty {self.repetition_penalty}: it must be above 0")


def choose(
    logits: Tensor, seen: Tensor, how: Sampling, generator: torch.Generator | None
) -> Tensor:
    """Return the next token (B,) int64 of each sequence.

    Args:
        logits: (B, V).
        seen: (B, V) bool, tokens that the sequence already contains.
        how: the repetition penalty (Keskar et al. 2019, section 4.1) comes first, then temperature,
            top-k and top-p (Holtzman et al. 2020).
        generator: on the CPU, so that a seed gives the same draws on every device.
    """
    logits = logits.float()
    if how.repetition_penalty != 1.0:
        penalised = torch.where(
            logits > 0, logits / how.repetition_penalty, logits * how.repetition_penalty
        )
        logits = torch.where(seen, penalised, logits)
    if not torch.isfinite(logits.amax(-1)).all():  # NaN, or no token is possible
        raise LmplayError("the model's logits are not finite: its weights are damaged or diverged")
    if not how.do_sample:
        return logits.argmax(-1)
    logits = (
        logits - logits.amax(-1, keepdim=True)
    ) / how.temperature  # never above 0, however cold
    if how.top_k:
        least = logits.topk(min(how.top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < least, float("-inf"))
    if how.top_p < 1.0:
        ordered, index = logits.sort(-1, descending=True)
        before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)
        # the first is always kept
        ordered = ordered.masked_fill(before >= how.top_p, float("-inf"))
        logits = torch.full_like(logits, float("-inf")).scatter(1, index, ordered)
    return (
        torch.multinomial(logits.softmax(-1).cpu(), 1, generator=generator)
        .squeeze(1)
        .to(logits.device)
    )


@torch.no_grad()
def generate(
    runner: ModelRunner,
    model: nn.Module,
    prompt: list[int],
    new_tokens: int,
    window: int | None,
    vocab_size: int,
    how: Sampling,
    num_samples: int = 1,
    seed: int = 0,
    eot: int | None = None,
    stops: Collection[int] = (),
) -> Iterator[list[int]]:
    """Yield the next token of each of `num_samples` continuations of a prompt.

    Ends after `new_tokens` tokens, or when all sequences have reached `eot` or one of `stops`. A
    sequence that has reached one repeats `eot`.

    The cache holds `window` positions. When it is full, the last half of the window is read into an
    empty cache and decoding continues. With None, the model's memory does not grow and nothing is
    read twice.
    """
    if not prompt:
        prompt = [eot or 0]
    was_training = model.training
    model.eval()
    weight = getattr(getattr(model, "head", None), "weight", None)
    device = (weight if isinstance(weight, Tensor) else list(model.parameters())[-1]).device
    generator = torch.Generator().manual_seed(seed)
    context = torch.tensor(prompt, device=device).repeat(num_samples, 1)
    seen = torch.zeros(num_samples, vocab_size, dtype=torch.bool, device=device)
    seen.scatter_(1, context, True)
    ended = torch.zeros(num_samples, dtype=torch.bool, device=device)
    ends = torch.tensor([*stops, *([] if eot is None else [eot])], device=device)
    if window is None:
        window = context.shape[1] + new_tokens
    unread = context[:, -window:]
    cache = runner.new_cache(model, num_samples, window)
    cached = 0
    try:
        with runner.fixed_weights(model):
            for _ in range(new_tokens):
                if cached + unread.shape[1] > window:
                    unread = context[:, -max(1, window // 2) :]
                    cache = runner.new_cache(model, num_samples, window)
                    cached = 0
                logits, cache = runner.logits(model, unread, cache)
                cached += unread.shape[1]
                token = choose(logits, seen, how, generator)
                if eot is not None:
                    token = torch.where(ended, eot, token)
                    ended |= torch.isin(token, ends)
                seen.scatter_(1, token.unsqueeze(1), True)
                unread = token.unsqueeze(1)
                context = torch.cat([context, unread], 1)[:, -window:]
                yield token.tolist()
                if bool(ended.all()):
                    return
    finally:
        model.train(was_training)


class TextStream:
    """Turns tokens into text one by one. It holds back the bytes of an incomplete character."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def add(self, token: int) -> str:
        return self._decoder.decode(self.tokenizer.pieces[token])

    def end(self) -> str:
        return self._decoder.decode(b"", final=True)
