"""Optional libraries."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from .errors import LmplayError

EXTRA = "pip install 'lmplay[export]'"
PACKAGES = {"hf": ("transformers",), "gguf": ("transformers", "gguf", "accelerate")}


def need(package: str, extra: str = "export") -> Any:
    """Return the imported package, which an extra of lmplay's installs.

    Raises:
        LmplayError: it is not installed; the message has the command that installs it.
    """
    try:
        return importlib.import_module(package)
    except ImportError as e:
        raise LmplayError(f"this needs {package}: pip install 'lmplay[{extra}]'") from e


def check_installed(kind: str) -> None:
    """Raise LmplayError if a package that the format needs is not installed."""
    for package in PACKAGES.get(kind, ()):
        if importlib.util.find_spec(package) is None:
            raise LmplayError(f"--format {kind} needs {package}: {EXTRA}")


@contextmanager
def quiet(transformers: Any) -> Iterator[None]:
    """Silence the progress bars and the advice of transformers."""
    log = transformers.utils.logging
    verbosity = log.get_verbosity()
    bars = log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(verbosity)
        if bars:
            log.enable_progress_bar()
