"""The layers of the package: who may import and who may name whom.

Read from the source, so that lazy imports count, too. Imports for type checking do not.
"""

from __future__ import annotations

import ast
import graphlib
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from lmplay.discover import read_source

PACKAGE = ROOT / "lmplay"
FILES = sorted(PACKAGE.rglob("*.py"))
TEXTS = sorted(p for p in PACKAGE.rglob("*") if p.suffix in (".py", ".js", ".html", ".css"))
MARKET = (PACKAGE / "market", PACKAGE / "cli" / "market.py")
WITHOUT_TORCH = ("analysis", "discover", "plan", "errors", "shipped", "registry", "changes", "data")


def imported(path: Path) -> set[str]:
    """Absolute names of what a file imports, without imports for type checking."""
    tree = ast.parse(path.read_text())
    skipped = {
        id(n)
        for node in ast.walk(tree)
        if isinstance(node, ast.If)
        and isinstance(node.test, ast.Name)
        and node.test.id == "TYPE_CHECKING"
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


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def layer(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_layers(path: Path) -> None:
    assert not uses(path, "experiments"), "the harness imports no experiment"
    if layer(path) != "cli":
        assert not uses(path, "lmplay.cli"), "only commands import cli"
    if layer(path) in WITHOUT_TORCH:
        assert not uses(path, "torch")
    if layer(path) in ("data", "analysis", "ops"):
        assert not uses(path, "lmplay.training.loop")


def test_there_is_no_import_cycle() -> None:
    modules = {module_of(p): p for p in FILES}
    graph = {
        name: {other for other in imported(path) if other in modules and other != name}
        for name, path in modules.items()
    }
    order = list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError
    assert len(order) >= len(FILES)


def inside(path: Path, places: tuple[Path, ...]) -> bool:
    return any(path == place or place in path.parents for place in places)


@pytest.mark.parametrize("path", TEXTS, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_only_the_market_mentions_the_market(path: Path) -> None:
    if not inside(path, MARKET):
        lines = [x for x in path.read_text().splitlines() if re.search("market", x, re.I)]
        assert lines == [] or (path == PACKAGE / "registry.py" and len(lines) == 1), lines


def test_market_uses_only_the_registry() -> None:
    """The rest of the package works without it."""
    for path in FILES:
        if not inside(path, MARKET):
            assert not uses(path, "lmplay.market"), path


def experiment_names() -> set[str]:
    """Names of ideas and variants, without those that are plain words of this field."""
    words = {"focus", "modern", "hybrid", "tied", "relu"}  # English, and below architectures
    words |= {"llama", "mistral", "qwen2", "qwen3"}
    sources = [read_source(p, "") for p in (ROOT / "experiments").glob("*.py")]
    names = {name for s in sources for name in (s.idea, *s.variants)}
    return names - words


@pytest.mark.parametrize("path", TEXTS, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_the_harness_names_no_experiment(path: Path) -> None:
    words = set(re.findall(r"[A-Za-z_]\w*", path.read_text()))
    assert words & experiment_names() == set()


@pytest.mark.parametrize(
    "module", ["analysis.compare", "analysis.figures", "plan", "training.curves", "discover"]
)
def test_drawing_and_plans_load_no_torch(module: str) -> None:
    code = f"import sys, lmplay.{module}; assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_importing_the_package_loads_nothing_heavy() -> None:
    heavy = ("torch", "numpy", "pandas", "matplotlib", "pydantic", "datasets", "optuna")
    code = f"import sys, lmplay; assert not set({heavy}) & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    "path", sorted((ROOT / "experiments").glob("**/*.py")), ids=lambda p: p.name
)
def test_experiments_import_the_interface_only(path: Path) -> None:
    ours = {n for n in imported(path) if n.startswith("lmplay")}
    assert all(n == "lmplay.api" or n.startswith("lmplay.api.") for n in ours)
    siblings = {p.stem for p in (ROOT / "experiments").glob("*.py")}
    assert not {n.split(".")[0] for n in imported(path)} & siblings


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_a_long_module_says_why_it_is_one(path: Path) -> None:
    text = path.read_text()
    if text.count("\n") > 350:
        docstring = ast.get_docstring(ast.parse(text)) or ""
        assert "One module, because" in docstring.replace("\n", " ")
