"""The task `continuations`: which of four texts continues a Wikipedia introduction?

It needs no network. The wrong texts continue other articles of the same language, so that a model
has to see what a text is about. Its items are documents that plans on the bundled text hold out.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..data.sources import BundledSource
from ..data.token_files import cache_folder, in_validation
from ..errors import LmplayError
from ..files import write_text

NAME = "continuations"
HELD_OUT = 0.05  # of the documents: those that the shipped plans hold out, at least
CONTEXT = 220  # characters, about
CONTINUATION = 100
CHOICES = 4


def task(language: str = "en") -> dict[str, Any]:
    """Return the task's config for lm-eval. Its items are written to the cache.

    Raises:
        LmplayError: the bundled text is not installed, or has no such language.
    """
    items = list(make_items(language))
    text = "".join(json.dumps(item, ensure_ascii=False) + "\n" for item in items)
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    path = cache_folder() / "evaluation" / f"{NAME}_{language}-{digest}.jsonl"
    if not path.exists():
        write_text(path, text)
    return {
        "task": NAME if language == "en" else f"{NAME}_{language}",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(path)}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{context}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{label}}",
        "target_delimiter": "",
        "metric_list": [
            {"metric": name, "aggregation": "mean", "higher_is_better": True}
            for name in ("acc", "acc_norm")
        ],
        "metadata": {"version": 1.0},
    }


def make_items(language: str) -> Iterator[dict[str, Any]]:
    """Yield items: a context, four choices, and the number of the right one."""
    pairs = []
    for document in BundledSource(language=language).documents():
        if in_validation(document, HELD_OUT):
            found = split("".join(text for text, _ in document))
            if found is not None:
                pairs.append(found)
    if len(pairs) < CHOICES:
        raise LmplayError(f"{NAME}: {language} has too few long documents")
    draws = random.Random(0)  # the same items everywhere
    for number, (context, right) in enumerate(pairs):
        others = [i for i in range(len(pairs)) if i != number]
        choices = [pairs[i][1] for i in draws.sample(others, CHOICES - 1)]
        label = draws.randrange(CHOICES)
        choices.insert(label, right)
        yield {"context": context, "choices": choices, "label": label}


def split(text: str) -> tuple[str, str] | None:
    """Return a text's beginning and what follows it, cut between words; None if it is too short."""
    end = text.find(" ", CONTEXT)
    stop = text.find(" ", end + CONTINUATION)
    if end < 0 or stop < 0:
        return None
    return text[:end], text[end:stop]


def held_out_by(path: Path) -> float | None:
    """Return the share of its documents that a run's plan holds out, if it is on bundled text."""
    from ..training.run_folder import RunFolder

    plan = RunFolder(path).read().get("plan") or {}
    bundled = any(d.get("source") == "bundled" for d in plan.get("datasets", {}).values())
    return float(plan["validation"]["fraction"]) if bundled else None
