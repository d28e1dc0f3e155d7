"""How well a model predicts held-out messages: by field, and by position far past its context."""

from __future__ import annotations

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from ..api import IGNORE, Batch, ModelRunner
from ..errors import LmplayError
from .messages import SINK, Messages
from .recorded import RecordedSession


def _nats(logits: Tensor, targets: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits.float(), targets, reduction="none").cpu()


def by_field(
    runner: ModelRunner,
    model: nn.Module,
    recorded: RecordedSession,
    messages: Messages,
    length: int,
    samples: int = 20,
) -> pd.DataFrame:
    """Return nats and perplexity per token by field, and for all, on held-out samples as in
    training."""
    per_sample = (length - 1) // messages.width
    ids = messages.encode_messages(recorded.messages[recorded.start :])
    count = min(samples, len(ids) // per_sample)
    if not count:
        raise LmplayError(
            f"{recorded.session.name}: {len(ids)} held-out messages are fewer than a sample of "
            f"{per_sample}"
        )
    at = {
        f: [i for i, (name, _, _) in enumerate(messages.layout) if name == f]
        for f in messages.fields
    }
    sums = dict.fromkeys(at, 0.0)
    device = next(model.parameters()).device
    with torch.no_grad(), runner.fixed_weights(model):
        for n in range(count):
            body = ids[n * per_sample : (n + 1) * per_sample].reshape(-1)
            row = torch.from_numpy(np.concatenate([[SINK], body])).to(device)
            for (
                field,
                positions,
            ) in at.items():  # the model's own step, with one field of each message counted
                targets = torch.full_like(row[:-1], IGNORE)
                for position in positions:
                    targets[position :: messages.width] = row[1:][position :: messages.width]
                sums[field] += float(
                    runner.step(model, Batch(row[None, :-1], targets[None])).loss_sum
                )
    total = count * per_sample
    rows = {f: (len(at[f]), sums[f] / total / len(at[f]), sums[f] / total) for f in messages.fields}
    every = sum(sums.values()) / total
    rows["all"] = (messages.width, every / messages.width, every)
    table = pd.DataFrame.from_dict(
        rows, orient="index", columns=["tokens", "nats per token", "nats per message"]
    )
    table["perplexity"] = np.exp(table["nats per token"])
    return table


def by_position(
    runner: ModelRunner,
    model: nn.Module,
    recorded: RecordedSession,
    messages: Messages,
    length: int,
    times: int,
    streams: int,
) -> pd.DataFrame:
    """Return mean nats per token on stretches `times` as long as the context, read through the
    cache.

    One row for each tenth of a context; its index is the number of tokens read until its end,
    divided by the context's length.
    """
    per_context = (length - 1) // messages.width
    wanted = times * per_context
    ids = messages.encode_messages(recorded.messages[recorded.start :])
    if len(ids) < wanted:
        raise LmplayError(
            f"{recorded.session.name}: {len(ids)} messages are held out, {wanted} are wanted; "
            "lower --times"
        )
    begins = np.unique(np.linspace(0, len(ids) - wanted, streams).astype(int))
    rows = torch.from_numpy(np.stack([ids[b : b + wanted] for b in begins]))  # (B, n, width)
    device = next(model.parameters()).device
    stream = runner.new_stream(model, len(rows), length)
    assert stream is not None
    nats = []
    with torch.no_grad(), runner.fixed_weights(model):
        unread = torch.full((len(rows), 1), SINK)
        for n in range(wanted):
            stream.make_room(messages.width + 1, messages.width)
            of_message = torch.zeros(len(rows))
            for position in range(messages.width):
                logits, stream = runner.logits(model, unread.to(device), stream)
                unread = rows[:, n, position : position + 1]
                of_message += _nats(logits, unread[:, 0].to(device))
            nats.append(float(of_message.mean()) / messages.width)
    tenth = max(1, per_context // 10)
    ends = range(tenth, wanted + 1, tenth)
    table = {round(end / per_context, 2): np.mean(nats[end - tenth : end]) for end in ends}
    return pd.DataFrame({"nats per token": table})
