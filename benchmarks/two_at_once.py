"""Two trainings at once on one machine, with the default settings: what do they lose?

    python benchmarks/two_at_once.py

Trains the baseline alone, then twice at the same time, on the plans smoke and sketch, and prints
tokens per second. The medians of a few repeats are printed last. With a thread for each core the
two would spin against each other; lmplay divides the cores. Nothing else should run meanwhile.
"""

from __future__ import annotations

import argparse
import os
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path


def start(
    plan: str, steps: int, seed: int, out: Path, threads: str | None
) -> subprocess.Popen[str]:
    env = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
    if threads is not None:
        env["OMP_NUM_THREADS"] = threads
    command = [sys.executable, "-m", "lmplay.cli.trainer", "--training-plan", plan]
    command += ["--steps", str(steps), "--seed", str(seed), "--out", str(out), "--fresh"]
    return subprocess.Popen(
        command, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )


def rates(processes: list[subprocess.Popen[str]]) -> list[float]:
    """Wait for the runs; return the tokens per second of each."""
    texts = [process.communicate()[0] for process in processes]
    return [float(re.findall(r"^tokens_per_second: (\S+)", text, re.M)[0]) for text in texts]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--per-core", action="store_true", help="also with a thread for each core: very slow"
    )
    parser.add_argument("--plans", default="smoke:400,sketch:150", help="PLAN:STEPS, by commas")
    args = parser.parse_args()
    cores = str(os.cpu_count())
    modes: list[tuple[str, str | None]] = [("default", None), ("one thread", "1")]
    if args.per_core:
        modes.append((f"a thread per core ({cores})", cores))
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        for plan, steps in (part.split(":") for part in args.plans.split(",")):
            start(plan, 1, 0, out, None).wait()  # prepares the data
            found: dict[str, list[float]] = {}
            for repeat in range(args.repeats):
                for name, threads in modes:
                    alone = rates([start(plan, int(steps), 1, out, threads)])[0]
                    pair = rates([start(plan, int(steps), s, out, threads) for s in (2, 3)])
                    found.setdefault(f"{name}, alone", []).append(alone)
                    found.setdefault(f"{name}, two together", []).append(sum(pair))
                    print(f"{plan} {repeat} {name}: {alone:,.0f} alone, {pair}", flush=True)
            for name, values in found.items():
                print(f"{plan}, {name}: {statistics.median(values):,.0f} tokens/s")
            both = statistics.median(found["default, two together"])
            best = statistics.median(found["default, alone"])
            print(f"{plan}: two at once do {both / best:.2f} times the work of one")


if __name__ == "__main__":
    main()
