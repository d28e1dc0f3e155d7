"""The probabilities that a model gives to the labels of prompts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from ..api import ModelRunner
from ..scoring import Scorer

TOGETHER = 32  # prompts of one length in a forward pass


@torch.no_grad()
def with_head(
    runner: ModelRunner, model: nn.Module, prompts: Sequence[Sequence[int]]
) -> np.ndarray:
    """Return the probabilities (n, C) of a model with a head for labels.

    Prompts of equal length are read together, so nothing is padded.
    """
    device = next(model.parameters()).device
    by_length: dict[int, list[int]] = {}
    for number, prompt in enumerate(prompts):
        by_length.setdefault(len(prompt), []).append(number)
    found: dict[int, np.ndarray] = {}
    with runner.fixed_weights(model):
        for numbers in by_length.values():
            for start in range(0, len(numbers), TOGETHER):
                some = numbers[start : start + TOGETHER]
                ids = torch.tensor([list(prompts[i]) for i in some], device=device)
                rows = runner.logits(model, ids)[0].double().softmax(-1).cpu().numpy()
                found.update(zip(some, rows, strict=True))
    return np.stack([found[i] for i in range(len(prompts))])


def with_text(
    scorer: Scorer, prompts: Sequence[Sequence[int]], labels: Sequence[Sequence[int]]
) -> np.ndarray:
    """Return the probabilities (n, C) of a model that writes labels as text.

    They are those of the labels' texts behind the prompt, divided by their sum.

    Args:
        labels: the ids of each label's text, with the end of text.
    """
    pairs = [(prompt, label) for prompt in prompts for label in labels]
    nats = np.array([nats for nats, _ in scorer.scores(pairs)]).reshape(len(prompts), -1)
    relative = np.exp(nats - nats.max(1, keepdims=True))
    return relative / relative.sum(1, keepdims=True)
