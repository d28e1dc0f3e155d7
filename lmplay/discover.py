"""Find experiments by name, path or entry point, and list them without importing them.

A listing parses the source only: docstring, VARIANTS, imports. So it is fast (torch is not loaded),
and a broken file is a line in the list, not a crash.

One module, because the listing and the loading must agree on what a valid file is.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import hashlib
import importlib.metadata
import importlib.util
import os
import re
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from .errors import LmplayError, did_you_mean
from .shipped import shipped

if TYPE_CHECKING:
    from .adapt import Adaptation
    from .api import ModelRunner

ENTRY_POINTS = "lmplay.experiments"
RECIPE_PARTS = ("model", "optimizer", "schedule", "batch")  # of a plan; an arm may change them
REQUIRED = ("Config", "Runner", "BASELINE", "VARIANTS")
OLD_API_NAMES = ("computed_once",)  # of version 0.2; the source copies in old runs import them


@dataclass(frozen=True)
class ExperimentFile:
    """What the text of an experiment file says. `broken` is why it cannot be used, or ""."""

    path: Path
    origin: str  # "shipped", "./experiments", a folder or an entry point
    doc: str = ""
    variants: dict[str, dict[str, Any]] = field(default_factory=dict)
    baseline: str = ""
    config_fields: tuple[str, ...] = ()
    broken: str = ""
    harmful: tuple[str, ...] = ()  # KNOWN_HARMFUL: variants that must be worse than the baseline
    equal: tuple[str, ...] = ()  # KNOWN_EQUAL: variants that must not differ from it
    is_default: bool = False  # DEFAULT = True: this baseline is used where none is named

    @property
    def idea(self) -> str:
        return self.path.parent.name if self.path.name == "__init__.py" else self.path.stem

    @property
    def summary(self) -> str:
        return self.doc.strip().split("\n", 1)[0]


def _names(tree: ast.Module) -> dict[str, ast.AST]:
    """Return what a module defines at its top level, by name."""
    found: dict[str, ast.AST] = {}
    for node in tree.body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            found[node.name] = node
        elif isinstance(node, ast.Assign):
            found.update({t.id: node.value for t in node.targets if isinstance(t, ast.Name)})
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value:
            found[node.target.id] = node.value
    return found


def _missing_import(tree: ast.Module, api_names: frozenset[str]) -> str:
    """Return why a top-level import of the file cannot work; "" if all can."""
    for node in tree.body:
        if isinstance(node, ast.Import):
            wanted = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            wanted = [node.module]
        else:
            continue
        for name in wanted:
            top = name.split(".")[0]
            if top not in sys.modules and not _exists(top):
                return f"line {node.lineno}: no module named {top} (pip install {top}?)"
        if isinstance(node, ast.ImportFrom) and node.module == "lmplay.api":
            for alias in node.names:
                if alias.name not in api_names:
                    near = did_you_mean(alias.name, api_names)
                    return f"line {node.lineno}: lmplay.api has no {alias.name}{near}"
    return ""


def _exists(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):  # a module without a spec
        return False


@functools.cache
def _api_names() -> frozenset[str]:
    api = Path(__file__).parent / "api.py"
    exported = ast.literal_eval(_names(ast.parse(api.read_text(encoding="utf-8")))["__all__"])
    return frozenset({*exported, *OLD_API_NAMES})


def _malformed(variants: Any, baseline: Any) -> str:
    """Return what is wrong with VARIANTS or BASELINE; "" if nothing is."""
    if not isinstance(baseline, str) or not baseline:
        return "BASELINE must be the name of a variant"
    if not isinstance(variants, dict) or not variants:
        return "VARIANTS must map names to dicts of Config fields"
    for name, settings in variants.items():
        if not isinstance(name, str) or not re.fullmatch(r"\w[\w.+-]*", name):
            return f"VARIANTS: {name!r} is no name (letters, digits and _ . + -)"
        if not isinstance(settings, dict) or not all(isinstance(k, str) for k in settings):
            return f"VARIANTS: {name} must be a dict of Config fields"
    return ""


def read_source(path: Path, origin: str) -> ExperimentFile:
    """Parse the file at `path`. Whatever is wrong inside it becomes `broken`."""
    try:
        return _source_of(path.read_text(encoding="utf-8"), path, origin)
    except (OSError, ValueError) as e:
        return ExperimentFile(path, origin, broken=str(e) or type(e).__name__)


@functools.lru_cache(maxsize=1024)  # more than there are files: a scan of all must find each
def _source_of(text: str, path: Path, origin: str) -> ExperimentFile:
    """Parse a file's text. A command lists the experiments several times."""
    try:
        tree = ast.parse(text, str(path))
    except SyntaxError as e:
        return ExperimentFile(path, origin, broken=f"line {e.lineno}: {e.msg}")
    except (ValueError, RecursionError, MemoryError) as e:  # whatever a text can cause
        return ExperimentFile(path, origin, broken=str(e) or type(e).__name__)
    doc = ast.get_docstring(tree) or ""
    names = _names(tree)
    missing = [name for name in REQUIRED if name not in names]
    if missing:
        return ExperimentFile(path, origin, doc, broken=f"defines no {' and no '.join(missing)}")
    try:
        variants = ast.literal_eval(names["VARIANTS"])
        baseline = ast.literal_eval(names["BASELINE"])
    except (ValueError, TypeError, RecursionError, MemoryError):
        return ExperimentFile(
            path, origin, doc, broken="VARIANTS and BASELINE must be written out, without computing"
        )
    if broken := _malformed(variants, baseline):
        return ExperimentFile(path, origin, doc, broken=broken)
    known = {name: names.get(name) for name in ("KNOWN_HARMFUL", "KNOWN_EQUAL")}
    answers: dict[str, tuple[str, ...]] = {}
    for name, node in known.items():
        try:
            answers[name] = tuple(ast.literal_eval(node)) if node is not None else ()
        except (ValueError, TypeError, RecursionError, MemoryError):
            answers[name] = (name,)
        for variant in answers[name]:
            if variant not in variants:
                broken = f"{name} must list names in VARIANTS, written out"
                return ExperimentFile(path, origin, doc, broken=broken)
    config = names["Config"]
    body = config.body if isinstance(config, ast.ClassDef) else []
    fields = tuple(
        n.target.id for n in body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)
    )
    broken = _missing_import(tree, _api_names())
    for variant, settings in variants.items():
        for key in settings:
            part = key.partition(".")[0]
            if "." in key:  # a setting of the recipe; the rest of it is checked with a plan
                if part not in RECIPE_PARTS:
                    broken = broken or (
                        f"variant {variant}: {key} is no setting of a recipe"
                        f"{did_you_mean(part, RECIPE_PARTS)}"
                    )
            elif isinstance(config, ast.ClassDef) and not config.bases and key not in fields:
                broken = (
                    broken or f"variant {variant}: Config has no {key}{did_you_mean(key, fields)}"
                )
    marked = names.get("DEFAULT")
    is_default = isinstance(marked, ast.Constant) and marked.value is True
    return ExperimentFile(
        path,
        origin,
        doc,
        variants,
        str(baseline),
        fields,
        broken,
        harmful=answers["KNOWN_HARMFUL"],
        equal=answers["KNOWN_EQUAL"],
        is_default=is_default,
    )


def source_digest(path: Path) -> str:
    """Return 16 hex digits of an experiment's code: its file, or all files of its folder."""
    files = sorted(path.parent.rglob("*.py")) if path.name == "__init__.py" else [path]
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:16]


def search_folders() -> list[tuple[Path, str]]:
    """Return the folders with experiments, in order of precedence, and the name a user knows them
    by.

    Raises:
        LmplayError: a folder named in LMP_EXPERIMENTS does not exist.
    """
    folders = [(Path("experiments"), "./experiments")]
    folders += [
        (Path(p).expanduser(), p)
        for p in os.environ.get("LMP_EXPERIMENTS", "").split(os.pathsep)
        if p
    ]
    for folder, name in folders[1:]:
        if not folder.is_dir():
            raise LmplayError(f"LMP_EXPERIMENTS: there is no folder {name}")
    folders.append((shipped("experiments"), "shipped"))
    seen: set[Path] = set()
    unique = []
    # the shipped folder keeps its name also when it is ./experiments
    for folder, origin in reversed(folders):
        if folder.is_dir() and folder.resolve() not in seen:
            seen.add(folder.resolve())
            unique.append((folder.resolve(), origin))
    return unique[::-1]


def list_sources() -> list[ExperimentFile]:
    """Return every experiment file that can be found, the broken ones too."""
    found = []
    for folder, origin in search_folders():
        files = [p for p in sorted(folder.glob("*.py")) if not p.name.startswith("_")]
        files += sorted(folder.glob("*/__init__.py"))
        found += [read_source(p, origin) for p in files]
    for entry in importlib.metadata.entry_points(group=ENTRY_POINTS):
        origin = f"entry point {entry.name}"
        try:
            spec = importlib.util.find_spec(entry.value)
        except (ImportError, ValueError) as e:
            found.append(
                ExperimentFile(
                    Path(entry.value), origin, broken=f"{entry.value} cannot be found: {e}"
                )
            )
            continue
        path = Path(spec.origin) if spec and spec.origin else Path(entry.value)
        found.append(read_source(path, origin))
    return found


def find(name: str) -> tuple[ExperimentFile, str]:
    """Return the file and variant for a variant's name, a path, or path.py:variant.

    Raises:
        LmplayError: there is none, there are several, or it is broken.
    """
    file, _, variant = name.rpartition(":")
    if not file.endswith(".py"):  # any other colon is the path's own
        file = name
        variant = ""
    if file.endswith(".py") or os.sep in file:
        path = Path(file).expanduser()
        if not path.is_file():
            raise LmplayError(f"--exp {name}: there is no file {path}")
        source = read_source(path.resolve(), str(path))
        _refuse_broken(source)
        variant = variant or next(iter(source.variants), source.idea)
        if variant not in source.variants:
            raise LmplayError(
                f"--exp {name}: {path} has no variant "
                f"{variant}{did_you_mean(variant, source.variants)}"
            )
        return source, variant
    sources = list_sources()
    holders = [s for s in sources if name in s.variants]
    if not holders:  # the idea's own name stands for its first variant
        holders = [s for s in sources if s.idea == name and s.variants]
    if len(holders) > 1:
        places = " and ".join(str(s.path) for s in holders)
        raise LmplayError(f"--exp {name} is in two places: {places}; rename one, or give the path")
    if not holders:
        # A broken file's variants may be unknown: its own name is what a user would ask for.
        for source in sources:
            if source.broken and source.idea == name:
                _refuse_broken(source)
        known = [v for s in sources for v in s.variants]
        raise LmplayError(
            f"--exp {name}: there is no such experiment{did_you_mean(name, known)}; --exp list "
            "shows all"
        )
    _refuse_broken(holders[0])
    return holders[0], name if name in holders[0].variants else next(iter(holders[0].variants))


def find_baseline(source: ExperimentFile) -> tuple[ExperimentFile, str]:
    """Return the file and variant that an idea is compared with.

    Raises:
        LmplayError: as :func:`find`.
    """
    return (
        (source, source.baseline) if source.baseline in source.variants else find(source.baseline)
    )


def default_baseline() -> str:
    """Return the baseline whose file says DEFAULT = True, else the one that most ideas name.

    Raises:
        LmplayError: there are no experiments.
    """
    sources = [s for s in list_sources() if not s.broken]
    for source in sources:
        if source.is_default and source.baseline in source.variants:  # not a copy of it
            return source.baseline
    named = Counter(s.baseline for s in sources)
    if not named:
        raise LmplayError("there are no experiments; lmp_trainer --exp FILE.py takes a path")
    return named.most_common(1)[0][0]


def _refuse_broken(source: ExperimentFile) -> None:
    if source.broken:
        raise LmplayError(f"{source.path}: this experiment cannot be used: {source.broken}")


@dataclass(frozen=True)
class Experiment:
    """An imported experiment, with the requested variant."""

    source: ExperimentFile
    variant: str
    module: ModuleType
    adaptation: Adaptation | None = None  # what the plan changes of the model

    @property
    def recipe(self) -> dict[str, Any]:
        """The variant's settings of the recipe, such as `optimizer.lr`."""
        return {k: v for k, v in self.source.variants[self.variant].items() if "." in k}

    @property
    def config_type(self) -> type:
        return self.module.Config

    def config(
        self, plan_sizes: Mapping[str, Any], overrides: Mapping[str, str]
    ) -> tuple[Any, list[str]]:
        """Return the variant's Config, and the names of the plan's sizes that it does not have.

        Dotted keys, which are the recipe's, are left out. Later values win: defaults, the plan's
        sizes, the variant's settings, the overrides.

        Raises:
            LmplayError: an override names no field, or values do not fit together.
        """
        fields = {f.name for f in dataclasses.fields(self.config_type)}
        sizes = {k: v for k, v in plan_sizes.items() if k in fields}
        without = [k for k in plan_sizes if k not in fields]
        own = {k: v for k, v in self.source.variants[self.variant].items() if "." not in k}
        parsed = self.parsed({k: v for k, v in overrides.items() if "." not in k})
        try:
            config = self.config_type(**{**sizes, **own, **parsed})
        except (ValueError, TypeError, ArithmeticError) as e:
            raise LmplayError(f"{self.variant}: these settings do not go together: {e}") from e
        for key in (
            "num_blocks",
            "embed_dim",
            "num_heads",
            "num_kv_heads",
            "max_len",
            "vocab_size",
        ):
            value = getattr(config, key, None)
            if value is not None and value < 1:
                raise LmplayError(f"{self.variant}: {key} must be 1 or more, not {value}")
        # they decide which tokens are read, and that is the plan's
        for key in (
            "max_len",
            "vocab_size",
        ):
            if key in sizes and getattr(config, key) != sizes[key]:
                raise LmplayError(
                    f"{self.variant}: {key} is the plan's ({sizes[key]}), not "
                    f"{getattr(config, key)}: "
                    "runs of a plan read the same tokens; copy the plan to change it"
                )
        return config, without

    def parsed(self, overrides: Mapping[str, str]) -> dict[str, Any]:
        """Return the overrides with the types of the Config's fields.

        Raises:
            LmplayError: one names no field, or its value does not fit.
        """
        fields = {f.name for f in dataclasses.fields(self.config_type)}
        for key in overrides:
            if key not in fields:
                raise LmplayError(
                    f"--set {key}: {self.variant} has no such field{did_you_mean(key, fields)}"
                )
        return {k: _parse(self.config_type, k, v) for k, v in overrides.items()}

    def runner(self, config: Any) -> ModelRunner:
        """Return the runner of the model as the plan adapts it."""
        runner = self.module.Runner(config)
        if self.adaptation is None:
            return runner
        from .adapt import adapted

        return adapted(runner, self.adaptation)


def _parse(config_type: type, key: str, text: str) -> Any:
    """Return `text` as the type of the Config's field."""
    from typing import get_type_hints

    from pydantic import TypeAdapter, ValidationError

    hint = get_type_hints(config_type)[key]
    try:
        return TypeAdapter(hint).validate_strings(text)
    except ValidationError as e:
        raise LmplayError(f"--set {key}={text}: {e.errors()[0]['msg']}") from e


def load(source: ExperimentFile, variant: str) -> Experiment:
    """Import the experiment's file under a unique module name.

    Raises:
        LmplayError: the import fails; the message names the file.
    """
    _refuse_broken(source)
    name = f"lmplay_experiment_{source.idea}_{abs(hash(str(source.path))):x}"
    spec = importlib.util.spec_from_file_location(
        name, source.path, submodule_search_locations=[str(source.path.parent)]
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up while the class is made
    try:
        spec.loader.exec_module(module)
    except Exception as e:
        del sys.modules[name]
        raise LmplayError(f"{source.path}: importing it failed: {type(e).__name__}: {e}") from e
    return Experiment(source, variant, module)
