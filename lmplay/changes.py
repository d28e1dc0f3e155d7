"""What an experiment changes in its baseline's file, and whether its `# CHANGED` marks tell it.

A mark covers, by its form:

    statement  # CHANGED             the statement, with its body
    # CHANGED: a reason              what follows, up to a blank line or the end of the block
    # CHANGED: to NAME               what follows, up to the definition of NAME
    # CHANGED: to the end            what follows, up to the end of the block

Module docstring, imports, comments, BASELINE, VARIANTS, KNOWN_HARMFUL and KNOWN_EQUAL need none.
"""

from __future__ import annotations

import ast
import difflib
import io
import re
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

MARK = re.compile(r"#\s*CHANGED\b(?P<text>.*)$")
UP_TO = re.compile(r"\bto (?P<name>[A-Za-z_]\w*)\s*$")
TO_THE_END = re.compile(r"\bto the end\b")
UNMARKED_NAMES = {"BASELINE", "VARIANTS", "KNOWN_HARMFUL", "KNOWN_EQUAL"}


@dataclass(frozen=True)
class Mark:
    """A mark at `line`, and the lines (1-based) that it covers."""

    line: int
    covers: range


def diff(baseline: Path, experiment: Path) -> Iterator[str]:
    """Yield a unified diff of the two files without docstrings and VARIANTS."""
    old = [text for _, text in _code(baseline, keep_comments=True)]
    new = [text for _, text in _code(experiment, keep_comments=True)]
    yield from difflib.unified_diff(old, new, str(baseline), str(experiment), lineterm="", n=2)


def changed_lines(baseline: Path, experiment: Path) -> dict[int, str]:
    """Return the experiment's lines that are not in the baseline's file, by line number."""
    old = [text for _, text in _code(baseline)]
    new = _code(experiment)
    matcher = difflib.SequenceMatcher(None, old, [text for _, text in new], autojunk=False)
    changed: dict[int, str] = {}
    for kind, _, _, start, end in matcher.get_opcodes():
        if kind in ("insert", "replace"):
            changed.update(new[start:end])
    return changed


def check_marks(baseline: Path, experiment: Path) -> list[str]:
    """Return what is wrong with the experiment's marks; [] if nothing is."""
    changed = changed_lines(baseline, experiment)
    found = list(marks(experiment))
    covered = {line for mark in found for line in mark.covers}
    problems = [
        f"line {line} is not marked as CHANGED: {text.strip()}"
        for line, text in changed.items()
        if line not in covered
    ]
    problems += [
        f"line {mark.line}: this mark covers no change"
        for mark in found
        if not any(line in changed for line in mark.covers)
    ]
    return problems


def marks(path: Path) -> Iterator[Mark]:
    """Yield the marks of an experiment file.

    Raises:
        ValueError: a mark goes to a name that is not defined below it.
    """
    text = path.read_text(encoding="utf-8")
    lines = text.split("\n")
    tree = ast.parse(text)
    statements = {
        node.lineno: node.end_lineno or node.lineno
        for node in sorted(_statements(tree), key=lambda n: -(n.end_lineno or 0))
    }
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        match = MARK.search(token.string) if token.type == tokenize.COMMENT else None
        if match is None:
            continue
        line = token.start[0]
        if lines[line - 1][: token.start[1]].strip():
            end = statements.get(line) or _enclosing_end(tree, line)
            yield Mark(line, range(line, _body_end(lines, line, end) + 1))
            continue
        name = UP_TO.search(match["text"])
        if TO_THE_END.search(match["text"]):
            end = _block_end(lines, line, stop_at_blank=False)
        elif name is None:
            end = _block_end(lines, line, stop_at_blank=True)
        else:
            end = _definition(lines, line, name["name"]) - 1
        yield Mark(line, range(line, end + 1))


def _statements(tree: ast.AST) -> Iterator[ast.stmt]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.stmt))


def _enclosing_end(tree: ast.AST, line: int) -> int:
    """Return the last line of the smallest statement around a line."""
    around = [n for n in _statements(tree) if n.lineno <= line <= (n.end_lineno or 0)]
    return min((n.end_lineno or line for n in around), default=line)


def _body_end(lines: list[str], line: int, end: int) -> int:
    """Return the last line of the block that a line opens; `end` if it opens none."""
    if re.match(r"\s*(else|elif|except|finally)\b", lines[line - 1]):
        return _block_end(lines, line, stop_at_blank=False, deeper=True)
    if re.match(r"\s*if\b", lines[line - 1]):  # without its else
        return _block_end(lines, line, stop_at_blank=False, deeper=True)
    return end


def _block_end(lines: list[str], line: int, stop_at_blank: bool, deeper: bool = False) -> int:
    """Return the last line of the block after a line.

    Args:
        stop_at_blank: a blank line ends it, too.
        deeper: only lines with more indentation belong to it.
    """
    indent = len(lines[line - 1]) - len(lines[line - 1].lstrip())
    end = line
    for number in range(line + 1, len(lines) + 1):
        text = lines[number - 1]
        if not text.strip():
            if stop_at_blank:
                break
            continue
        own = len(text) - len(text.lstrip())
        if own < indent or (deeper and own == indent and not text.lstrip().startswith(")")):
            break
        end = number
    return end


def _definition(lines: list[str], line: int, name: str) -> int:
    """Return the line, below a line, on which a class or function is defined.

    Raises:
        ValueError: there is none.
    """
    pattern = re.compile(rf"\s*(class|def) {name}\b")
    for number in range(line + 1, len(lines) + 1):
        if pattern.match(lines[number - 1]):
            while lines[number - 2].lstrip().startswith("@"):
                number -= 1
            return number
    raise ValueError(f"line {line}: CHANGED goes to {name}, which is not defined below it")


def _code(path: Path, keep_comments: bool = False) -> list[tuple[int, str]]:
    """Return the lines (number, text) that count as code, without trailing marks."""
    text = path.read_text(encoding="utf-8")
    tree = ast.parse(text)
    skipped: set[int] = set()
    for node in tree.body:
        is_docstring = node is tree.body[0] and ast.get_docstring(tree) is not None
        targets = node.targets if isinstance(node, ast.Assign) else []
        targets = [node.target] if isinstance(node, ast.AnnAssign) else targets
        names = {t.id for t in targets if isinstance(t, ast.Name)}
        is_import = isinstance(node, ast.Import | ast.ImportFrom) and not keep_comments
        if is_docstring or is_import or names & UNMARKED_NAMES:
            skipped.update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    code = []
    for number, line in enumerate(text.split("\n"), 1):
        if number in skipped:
            continue
        if keep_comments:
            code.append((number, line))
            continue
        bare = re.sub(r"\s*#\s*CHANGED\b.*$", "", line).rstrip()
        if bare.strip() and not bare.lstrip().startswith("#"):
            code.append((number, bare))
    return code
