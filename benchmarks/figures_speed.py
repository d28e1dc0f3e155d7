"""How long lmp_plotstats takes for many long curves, and how large its SVGs are.

    python benchmarks/figures_speed.py

Writes runs with made-up curves (5 settings of 20 seeds, 10,000 steps each) and draws them.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np


def write_runs(root: Path, settings: int, seeds: int, points: int) -> None:
    dice = np.random.default_rng(0)
    tokens = np.arange(1, points + 1) * 512
    for number in range(settings):
        name = "gpt2ish" if number == 0 else f"idea{number}"
        for seed in range(seeds):
            folder = root / "plan" / f"{name}-s{seed}"
            folder.mkdir(parents=True)
            identity = {"variant": name, "plan": "p", "seed": seed, "config": {}, "data": "d"}
            record = {"identity": identity, "plan_name": "plan", "baseline": "gpt2ish"}
            (folder / "run.json").write_text(json.dumps(record), encoding="utf-8")
            losses = 2 + 6 / np.sqrt(tokens / 512) - 0.05 * number
            losses += 0.05 * dice.standard_normal(points)
            columns = [
                tokens // 512,
                tokens,
                tokens * 1e6,
                tokens / 1e4,
                losses,
                losses,
                losses / 9,
            ]
            header = "step,tokens,flops,seconds,loss,bpb,accuracy"
            rows = np.stack(columns, 1)
            for kind in ("train", "validate"):
                np.savetxt(folder / f"{kind}.csv", rows, "%.9g", ",", header=header, comments="")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--settings", type=int, default=5)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--points", type=int, default=10_000)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        write_runs(root, args.settings, args.seeds, args.points)
        runs = args.settings * args.seeds
        command = [sys.executable, "-m", "lmplay.cli.plotstats", str(root), "--plot-train"]
        command += ["--max-files", str(runs), "--out-type", "svg", "--out", str(root / "plots")]
        times = []
        for _ in range(args.repeats):
            began = time.perf_counter()
            subprocess.run(command, check=True, capture_output=True)
            times.append(time.perf_counter() - began)
        sizes = {p.name: p.stat().st_size / 1e6 for p in (root / "plots").glob("*.svg")}
        largest = max(sizes, key=lambda name: sizes[name])
        print(f"{runs} runs of {args.points} points, {len(sizes)} figures")
        print(f"seconds: {statistics.median(times):.1f} (median of {args.repeats})")
        print(f"largest figure: {largest}, {sizes[largest]:.2f} MB")


if __name__ == "__main__":
    main()
