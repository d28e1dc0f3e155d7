"""The arrows of the house: who may import whom. Read from the source, so that lazy imports count too."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from conftest import ROOT

PACKAGE = ROOT / "lmplay"
FILES = sorted(PACKAGE.rglob("*.py"))


def imported(path: Path) -> set[str]:
    """Absolute names of the modules that a file imports, outside of `if TYPE_CHECKING`."""
    tree = ast.parse(path.read_text())
    skipped = {
        id(n)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
        for child in node.body
        for n in ast.walk(child)
    }
    parts = path.relative_to(ROOT).with_suffix("").parts
    found = set()
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(parts[: len(parts) - node.level]) if node.level else ""
            module = ".".join(p for p in (base, node.module or "") if p)
            found |= {module} | {f"{module}.{a.name}" for a in node.names}
    return found


def uses(path: Path, module: str) -> bool:
    return any(name == module or name.startswith(module + ".") for name in imported(path))


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_arrows(path: Path) -> None:
    assert not uses(path, "experiments"), "the harness never imports an experiment"
    if room(path) != "cli":
        assert not uses(path, "lmplay.cli"), "nothing imports cli"
    if room(path) in ("data", "checkpoint", "stats", "compare", "plots"):
        assert not uses(path, "lmplay.trainer")
    if room(path) in ("compare", "plots", "discover", "plan", "runs", "stats", "errors", "shipped"):
        assert not uses(path, "torch") or room(path) == "runs"


@pytest.mark.parametrize("module", ["compare", "plots", "plan", "stats"])
def test_drawing_and_plans_load_no_torch(module: str) -> None:
    import subprocess
    import sys

    code = f"import sys, lmplay.{module}; assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("path", sorted((ROOT / "experiments").glob("**/*.py")), ids=lambda p: p.name)
def test_experiments_import_the_interface_only(path: Path) -> None:
    ours = {n for n in imported(path) if n.startswith("lmplay")}
    assert all(n == "lmplay.api" or n.startswith("lmplay.api.") for n in ours)
    siblings = {p.stem for p in (ROOT / "experiments").glob("*.py")}
    assert not {n.split(".")[0] for n in imported(path)} & siblings
