"""Plugins: data sources, tokenizers and optimizers that packages register as entry points.

A package registers a class under a name in its metadata, here a source:

    entry_points={"lmplay.sources": ["counting = my_package:Counting"]}

Plans then use it by that name. The groups are `lmplay.sources` (subclasses of
:class:`lmplay.data.source.Source`), `lmplay.tokenizers` (of
:class:`lmplay.data.tokenizers.Tokenizer`) and `lmplay.optimizers` (of
:class:`lmplay.training.optimizer_specs.OptimizerSpec`). lmplay's own market simulator is such a
plugin. Experiments have a group as well, see :mod:`lmplay.discover`.
"""

from __future__ import annotations

import importlib.metadata
from functools import cache
from typing import Any

from .errors import first_line

SOURCES = "lmplay.sources"
TOKENIZERS = "lmplay.tokenizers"
OPTIMIZERS = "lmplay.optimizers"


@cache
def plugins(group: str) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the classes registered in a group by name, and why others could not be loaded.

    A plugin that fails to import does not affect the others.
    """
    found: dict[str, Any] = {}
    broken: dict[str, str] = {}
    for entry in importlib.metadata.entry_points(group=group):
        try:
            found[entry.name] = entry.load()
        except Exception as e:  # plugins may raise anything while they are imported
            broken[entry.name] = f"{entry.value}: {type(e).__name__}: {first_line(e)}"
    return found, broken
