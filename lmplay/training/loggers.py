"""Optional wandb / trackio / TensorBoard logging, in addition to lmplay's own files.

Nothing leaves the machine by default: wandb is offline unless WANDB_MODE says otherwise, trackio
keeps a local database, TensorBoard writes files.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from ..errors import LmplayError

NAMES = ("wandb", "trackio", "tensorboard")


class Logger(Protocol):
    """A tracker that takes the rows of a run's curves. `where` tells how to look at them."""

    where: str  # what to say: where they are, and how to look

    def row(self, kind: str, row: Mapping[str, float]) -> None:
        """Log one row; `kind` is "train" or "validate"."""

    def close(self) -> None:
        """Write what is left."""


def check(name: str) -> None:
    """Raise LmplayError if the tracker is not installed."""
    try:
        if name == "wandb":
            import wandb  # noqa: F401
        elif name == "trackio":
            import trackio  # noqa: F401
        else:
            from torch.utils.tensorboard import SummaryWriter  # noqa: F401
    except ImportError as e:
        raise LmplayError(f"--log {name} is not installed: pip install 'lmplay[log]'") from e


def open_logger(
    name: str, folder: Path, plan: str, run_id: str, config: dict[str, Any], step: int
) -> Logger:
    """Return the tracker `name` for the run in `folder`, which continues at `step`.

    A run keeps its `run_id` when it is resumed.
    """
    if name == "wandb":
        return Wandb(folder, plan, run_id, config)
    if name == "trackio":
        return Trackio(folder, plan, run_id, config, step)
    return TensorBoard(folder, step)


class Wandb:
    def __init__(self, folder: Path, plan: str, run_id: str, config: dict[str, Any]):
        import wandb

        mode: Any = os.environ.get("WANDB_MODE", "offline")
        self.run = wandb.init(
            project=f"lmplay-{plan}",
            name=folder.name,
            id=run_id,
            resume="allow",
            dir=str(folder),
            config=config,
            mode=mode,
            settings=wandb.Settings(silent=True),
        )
        sync = (
            f"; wandb sync {folder / 'wandb'}/offline-run-* sends it" if mode == "offline" else ""
        )
        self.where = f"wandb, {mode}{sync}"

    def row(self, kind: str, row: Mapping[str, float]) -> None:
        self.run.log({f"{kind}/{k}": v for k, v in row.items()}, step=int(row["step"]))

    def close(self) -> None:
        self.run.finish()


class Trackio:
    def __init__(self, folder: Path, plan: str, run_id: str, config: dict[str, Any], step: int):
        import trackio

        # It cannot take rows back: a run that goes on from a checkpoint is another one there.
        name = f"{folder.name}-{run_id[:6]}" + (f"-from-step-{step}" if step else "")
        self.run = trackio.init(
            project=f"lmplay-{plan}",
            name=name,
            config=config,
            resume="allow",
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )
        self.where = f"trackio; trackio show --project lmplay-{plan} shows it"

    def row(self, kind: str, row: Mapping[str, float]) -> None:
        self.run.log({f"{kind}/{k}": v for k, v in row.items()}, step=int(row["step"]))

    def close(self) -> None:
        self.run.finish()


class TensorBoard:
    def __init__(self, folder: Path, step: int):
        from torch.utils.tensorboard import SummaryWriter

        path = folder / "tensorboard"
        # What an interrupted run wrote after its checkpoint, or before its first one, is not shown.
        self.writer = SummaryWriter(str(path), purge_step=step + 1 if step else 0)
        self.where = f"TensorBoard; tensorboard --logdir {path} shows it"

    def row(self, kind: str, row: Mapping[str, float]) -> None:
        for key, value in row.items():
            self.writer.add_scalar(f"{kind}/{key}", value, int(row["step"]))

    def close(self) -> None:
        self.writer.close()
