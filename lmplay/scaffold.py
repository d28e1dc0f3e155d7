"""Write a new experiment as a copy of another one."""

from __future__ import annotations

import ast
import pprint
import re
from pathlib import Path

from .discover import ExperimentFile, list_sources
from .errors import LmplayError
from .files import write_text

DOCSTRING = '''"""{title}: one line that says what the idea is.

The idea: why it should help.

    the formula, in the letters of the code

Differs from {baseline} in the lines marked CHANGED. Costs: parameters and time.

The claim (to be tested): what should come out.
Result so far: nothing was run yet.
Source: the paper, with its section.
"""'''


def new_experiment(name: str, source: ExperimentFile, variant: str, folder: Path) -> Path:
    """Copy an experiment's file under a new name; return the new file.

    The copy has a new docstring and one variant, without CHANGED marks. Its baseline is the variant
    that it was copied from.

    Args:
        folder: where the file goes; it is created if needed.

    Raises:
        LmplayError: the name is no Python identifier, is taken, or the file exists.
    """
    if not re.fullmatch(r"[A-Za-z]\w*", name):
        raise LmplayError(f"{name}: a name has letters, digits and _, and begins with a letter")
    for other in list_sources():
        if name in (other.idea, *other.variants):
            raise LmplayError(f"{name} exists already: {other.path}")
    path = folder / f"{name}.py"
    if path.exists():
        raise LmplayError(f"{path} exists already")
    write_text(path, rewrite(source.path.read_text(encoding="utf-8"), name, source, variant))
    return path


def rewrite(text: str, name: str, source: ExperimentFile, variant: str) -> str:
    """Return an experiment's source under a new name."""
    tree = ast.parse(text)
    lines = text.split("\n")
    settings = pprint.pformat(source.variants[variant], sort_dicts=False)
    new = {
        "BASELINE": f'BASELINE = "{variant}"',
        "DEFAULT": "",
        "VARIANTS": f'VARIANTS: dict[str, dict] = {{"{name}": {settings}}}',
    }
    for node in reversed(tree.body):
        target: ast.expr | None = node.target if isinstance(node, ast.AnnAssign) else None
        if isinstance(node, ast.Assign):
            target = node.targets[0]
        if isinstance(target, ast.Name) and target.id in new:
            text = new[target.id]
            lines[node.lineno - 1 : node.end_lineno] = [text] if text else []
    docstring = tree.body[0]
    if ast.get_docstring(tree) is not None:
        title = name.replace("_", " ").capitalize()
        fresh = DOCSTRING.format(title=title, baseline=variant).split("\n")
        lines[docstring.lineno - 1 : docstring.end_lineno] = fresh
    unmarked = (re.sub(r"\s*# CHANGED\b.*$", "", line) for line in lines)
    was_mark = (re.fullmatch(r"\s*# CHANGED\b.*", line) is not None for line in lines)
    kept = [line for line, mark in zip(unmarked, was_mark, strict=True) if not mark]
    return "\n".join(kept)
