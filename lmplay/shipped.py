"""Find the experiments and plans that come with lmplay, in the source tree or in a wheel."""

from __future__ import annotations

from pathlib import Path


def shipped(name: str) -> Path:
    """Return the folder `name` ("experiments" or "training_plans") of this installation."""
    package = Path(__file__).resolve().parent
    in_tree = package.parent / name
    return in_tree if (package.parent / "setup.py").exists() else package / "shipped" / name
