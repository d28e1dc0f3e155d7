"""The sha256 of the final weights of one short run per variant: does a change keep every number?

    python benchmarks/final_weights.py > before.txt      # before the change
    python benchmarks/final_weights.py > after.txt       # after it
    diff before.txt after.txt

Runs on the CPU with one thread, in a temporary folder, through the command that users run.
Optimizers other than the plans' own get a run each. Hashes depend on the processor and the torch
version, so they are compared on one machine and not committed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from lmplay.discover import list_sources
from lmplay.plan import find_plan

STEPS = "12"
OPTIMIZERS = ("adagrad", "adam", "sgd", "rmsprop", "muon")
SIZES = {"num_blocks", "embed_dim"}  # variants that only change the size would take minutes


def train(variant: str, plan: str, folder: Path) -> str:
    """Train one variant; return the digest of its weights."""
    command = [
        sys.executable,
        "-m",
        "lmplay.cli.trainer",
        "--exp",
        variant,
        "--training-plan",
        plan,
        "--steps",
        STEPS,
        "--mini-batch-size",
        "2",
        "--seed",
        "3",
        "--device",
        "cpu",
        "--out",
        str(folder),
    ]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    if done.returncode:
        return f"failed: {done.stderr.strip().splitlines()[-1]}"
    (manifest,) = folder.glob("*/*/checkpoints/*/manifest.json")
    return json.loads(manifest.read_text(encoding="utf-8"))["model.safetensors"]["sha256"]


def main() -> None:
    argparse.ArgumentParser(description=__doc__.split("\n")[0]).parse_args()
    sources = [s for s in list_sources() if s.origin == "./experiments"] or list_sources()
    jobs = [
        (variant, "market_smoke" if source.idea.startswith("market_") else "smoke")
        for source in sources
        for variant, settings in source.variants.items()
        if not SIZES & set(settings)
    ]
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        for name in OPTIMIZERS:
            content = json.loads(find_plan("smoke").read_text(encoding="utf-8"))
            content["optimizer"] = {"name": name, "lr": 0.002}
            content["model"]["dropout"] = 0.1
            path = root / f"smoke_{name}.json"
            path.write_text(json.dumps(content), encoding="utf-8")
            jobs += [("gpt2ish", str(path)), ("ue", str(path))]
        for number, (variant, plan) in enumerate(jobs):
            digest = train(variant, plan, root / str(number))
            print(f"{variant} {Path(plan).stem} {digest}", flush=True)


if __name__ == "__main__":
    main()
