"""Where the experiments and plans that come with lmplay lie: in the tree, or inside an installed wheel."""

from __future__ import annotations

from pathlib import Path


def shipped(name: str) -> Path:
    """The folder `name` ("experiments" or "training_plans") that travels with this installation."""
    package = Path(__file__).resolve().parent
    beside = package.parent / name
    return beside if (package.parent / "setup.py").exists() else package / "shipped" / name
