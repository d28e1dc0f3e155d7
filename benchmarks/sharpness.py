"""How sharp are the minima in which runs ended: the validation loss along random directions.

    python benchmarks/sharpness.py RUN [RUN ...] --out sharpness.png

Directions are filter-normalized (Li et al. 2018, arXiv 1712.09913, section 4): normal numbers, of
which every row of a matrix is scaled to the norm of the model's own row, and 0 for vectors. So
models whose weights differ in scale can be compared. Each run is moved by the same draws. Prints
the sharpness of each run: the mean loss at distance .5, less that at 0.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

DISTANCES = np.linspace(-1, 1, 17)
DIRECTIONS = 5


def direction(model: nn.Module, seed: int) -> dict[str, Tensor]:
    """Return a filter-normalized direction, by parameter."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, p in model.named_parameters():
        drawn = torch.randn(p.shape, generator=generator)
        if p.ndim < 2:
            found[name] = torch.zeros_like(p)
            continue
        rows = tuple(range(1, p.ndim))
        own, other = (x.detach().norm(dim=rows, keepdim=True) for x in (p, drawn))
        found[name] = drawn * own / other.clamp(min=1e-12)
    return found


@torch.no_grad()
def curve(run: Path, directions: int, most: int) -> np.ndarray:
    """Return the loss (directions, distances) of a run's last checkpoint on up to `most` validation
    sequences."""
    from lmplay.data.packing import ValidationSet, spread, stacked
    from lmplay.data.prepare import prepare
    from lmplay.model import to_batch
    from lmplay.plan import parse_plan
    from lmplay.training.restore import locate, restore

    found = restore(*locate(run, Path(), lambda text: None, "RUN"))
    plan = parse_plan(found.run.read()["plan"], str(run))
    data = prepare(plan, lambda what, done: None)
    device = torch.device("cpu")
    sequences = ValidationSet(plan, data, found.config.max_len).sequences()
    chosen = [sequences[int(i)] for i in spread(len(sequences), most)]
    groups = [stacked(chosen[start : start + 64]) for start in range(0, len(chosen), 64)]
    batches = [to_batch(arrays, slice(None), device) for arrays in groups]
    model = found.model.eval()
    start = {name: p.clone() for name, p in model.named_parameters()}

    def loss() -> float:
        total, n = 0.0, 0
        with found.runner.fixed_weights(model):
            for batch in batches:
                out = found.runner.step(model, batch)
                total += float(out.loss_sum)
                n += int(out.n_tokens)
        return total / n

    losses = np.empty((directions, len(DISTANCES)))
    for number in range(directions):
        d = direction(model, number)
        for i, distance in enumerate(DISTANCES):
            for name, p in model.named_parameters():
                p.copy_(start[name] + distance * d[name])
            losses[number, i] = loss()
        for name, p in model.named_parameters():
            p.copy_(start[name])
    return losses


def draw(path: Path, curves: dict[str, np.ndarray]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    from lmplay.analysis.figures import THEMES, save, settings
    from lmplay.analysis.palette import COLORS

    with plt.rc_context(settings(THEMES["light"])):
        figure, ax = plt.subplots(figsize=(8, 4.5), dpi=120, layout="constrained")
        for number, (name, losses) in enumerate(curves.items()):
            above = losses - losses[:, [len(DISTANCES) // 2]]
            color = COLORS[number % len(COLORS)]
            ax.plot(DISTANCES, above.mean(0), color=color, label=name)
            ax.fill_between(DISTANCES, above.min(0), above.max(0), color=color, alpha=0.15, lw=0)
        ax.set_yscale("symlog", linthresh=0.1)
        ax.yaxis.set_major_formatter("{x:g}")
        ax.set_xlabel("distance, in norms of each row of weights")
        ax.set_ylabel("validation loss above the end point (nats)")
        ax.grid(True, lw=0.5)
        ax.legend(frameon=False, fontsize=9)
        title = f"Loss along {DIRECTIONS} random directions: means and ranges"
        figure.suptitle(title, x=0.01, ha="left", fontsize=12)
        save(figure, path)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN")
    parser.add_argument("--names", nargs="+", metavar="NAME", help="of the runs in the picture")
    parser.add_argument("--sequences", type=int, default=512, help="of the validation set (512)")
    parser.add_argument("--out", type=Path, default=Path("sharpness.png"))
    args = parser.parse_args(argv)
    names = args.names or [run.name for run in args.runs]
    if len(names) != len(args.runs):
        parser.error("--names: one for each run")
    curves: dict[str, np.ndarray] = {}
    for name, run in zip(names, args.runs, strict=True):
        curves[name] = curve(run, DIRECTIONS, args.sequences)
        middle = len(DISTANCES) // 2
        above = curves[name] - curves[name][:, [middle]]
        half = above[:, [middle // 2, -1 - middle // 2]].mean()
        print(f"{name}: loss {curves[name][0, middle]:.4f}, {half:+.4f} at distance .5", flush=True)
    draw(args.out, curves)
    print(args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
