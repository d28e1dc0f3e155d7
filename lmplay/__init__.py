"""lmplay: find out in minutes whether a language-model idea beats a baseline.

    import lmplay

    run = lmplay.train("my_idea.py", "smoke")
    run.curves().plot("tokens", "loss")
    report = lmplay.Trial(lmplay.Design(exp=("my_idea.py",), training_plan="sketch")).run()

docs/python.md describes these functions. Importing the package loads nothing heavy; a name is
loaded when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .python import compare as compare
    from .python import generate as generate
    from .python import runs as runs
    from .python import train as train
    from .training.run_folder import RunFolder as Run
    from .trial.design import Design as Design
    from .trial.runner import Trial as Trial

__version__ = "0.3.0"
__all__ = ["Design", "Run", "Trial", "__version__", "compare", "generate", "runs", "train"]

_WHERE = {
    "Design": ("trial.design", "Design"),
    "Run": ("training.run_folder", "RunFolder"),
    "Trial": ("trial.runner", "Trial"),
    "compare": ("python", "compare"),
    "generate": ("python", "generate"),
    "runs": ("python", "runs"),
    "train": ("python", "train"),
}


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, attribute = _WHERE[name]
    return getattr(importlib.import_module(f".{module}", __name__), attribute)
