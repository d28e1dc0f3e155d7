"""SIGKILL at random moments of preparing, training, validating, saving and trials: is the result
equal to the bit?

    python benchmarks/kills.py --kills 200

Each scenario runs once undisturbed. Then it is started again and again in another folder, killed
after a random time, until it ends by itself; weights, optimizer, random numbers and curves (without
the clock's columns), or the trial's report, are compared with the undisturbed ones. This repeats
until there were as many kills as asked for. Exit status 1 if anything differed.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lmplay.training.curves import CLOCK_COLUMNS, read_curve

PLAN: dict[str, Any] = {
    "tokenizer": {"kind": "bpe", "vocab_size": 400},
    "model": {"num_blocks": 2, "embed_dim": 32, "num_heads": 2, "max_len": 64, "dropout": 0.1},
    "datasets": {"words": {"source": "files", "path": "data.jsonl"}},
    "optimizer": {"name": "adamw", "lr": 1e-3, "weight_decay": 0.1},
    "schedule": {"name": "cosine", "warmup": 0.1},
    "batch": {"batch_size": 8, "grad_clip": 1.0},
    "validation": {"fraction": 0.1, "tokens": 4096, "every_tokens": 2560},
    "steps": [{"step_name": "words", "datasets": ["words"], "steps": 60}],
}
TRAIN = ["trainer", "--exp", "ue", "--training-plan", "plan.json", "--mini-batch-size", "4"]


@dataclass
class Scenario:
    """A command and how large its text is; `share` is its part of the kills."""

    name: str
    words: list[str]
    documents: int
    share: float
    steps: int = 60
    seconds: float = 0.0  # of the undisturbed run
    result: Any = None
    kills: Counter[str] = field(default_factory=Counter)


SCENARIOS = [
    Scenario("preparing", [*TRAIN, "--steps", "5"], 12_000, 0.2),
    Scenario("training, validating, saving", [*TRAIN, "--save-minutes", "0"], 300, 0.5),
    Scenario(
        "a trial",
        [
            *("trial", "--exp", "value_norm", "--training-plan", "plan.json"),
            *("--max-seeds", "2", "--lr", "fixed", "--tokens", "4096"),
        ],
        300,
        0.3,
    ),
]


def write_input(folder: Path, scenario: Scenario) -> None:
    folder.mkdir()
    dice = random.Random(1)
    words = [f"w{dice.randrange(1000)}" for _ in range(500)]
    with open(folder / "data.jsonl", "w", encoding="utf-8") as file:
        for i in range(scenario.documents):
            text = " ".join(dice.choice(words) for _ in range(60))
            file.write(json.dumps({"text": f"{i} {text}"}) + "\n")
    (folder / "plan.json").write_text(json.dumps(PLAN), encoding="utf-8")


def start(folder: Path, scenario: Scenario) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", f"lmplay.cli.{scenario.words[0]}", *scenario.words[1:]]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "LMP_CACHE": str(folder / "cache")}
    with open(folder / "output.txt", "ab") as output:
        return subprocess.Popen(
            command, cwd=folder, env=env, stdout=output, stderr=subprocess.STDOUT
        )


def result_of(folder: Path) -> Any:
    """Return all that must be equal."""
    found: dict[str, Any] = {}
    for record in sorted(folder.glob("gpt_out/*/*/run.json")):
        run = record.parent
        newest = max(run.glob("checkpoints/0*"), key=lambda p: p.name)
        manifest = json.loads((newest / "manifest.json").read_text(encoding="utf-8"))
        name = str(run.relative_to(folder))
        found[name] = {k: v["sha256"] for k, v in manifest.items() if k.endswith(".safetensors")}
        for kind in ("train", "validate"):
            curve = read_curve(run / f"{kind}.csv").drop(
                columns=list(CLOCK_COLUMNS), errors="ignore"
            )
            found[f"{name} {kind}"] = curve.to_csv()
        identity = json.loads(record.read_text(encoding="utf-8"))["identity"]
        found[f"{name} data"] = [identity["data"], identity["tokenizer"]]
    for report in folder.glob("gpt_out/trials/*/trial.json"):
        content = json.loads(report.read_text(encoding="utf-8"))
        for arm in content["arms"].values():
            arm.pop("seconds_ratio")
        found["trial"] = [content["arms"], content["null"]]
    return found


def undisturbed(folder: Path, scenario: Scenario) -> None:
    """Run a scenario once, and remember its result and time."""
    write_input(folder, scenario)
    began = time.monotonic()
    status = start(folder, scenario).wait()
    if status:
        raise SystemExit(f"{scenario.name}: {(folder / 'output.txt').read_text()}")
    scenario.seconds = time.monotonic() - began
    scenario.result = result_of(folder)
    assert scenario.result


def disturbed(folder: Path, scenario: Scenario, wanted: int, seed: int) -> tuple[int, list[str]]:
    """Run a scenario, killing it again and again; return the kills and what differed."""
    dice = random.Random(seed)
    write_input(folder, scenario)
    kills = 0
    while True:
        process = start(folder, scenario)
        delay = dice.uniform(0.25, 0.9) * scenario.seconds if kills < wanted else 600
        try:
            status = process.wait(delay)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            kills += 1
            continue
        if status:
            text = (folder / "output.txt").read_text(errors="replace")
            return kills, [f"exit status {status}: {text[-400:]}"]
        break
    result = result_of(folder)
    odd = [k for k in {*result, *scenario.result} if result.get(k) != scenario.result.get(k)]
    left = [str(p.relative_to(folder)) for p in folder.rglob(".*.tmp*") if p.is_dir()]
    if not odd:
        shutil.rmtree(folder)
    return kills, [f"not equal: {k}" for k in odd] + [f"left behind: {p}" for p in left]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--kills", type=int, default=200, help="in all (200)")
    parser.add_argument("--at-once", type=int, default=os.cpu_count(), help="processes (all cores)")
    parser.add_argument("--each", type=int, default=8, help="kills of one run at most (8)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    root = Path(tempfile.mkdtemp(prefix="kills-"))
    wrong: list[str] = []
    total = 0
    for number, scenario in enumerate(SCENARIOS):
        undisturbed(root / f"{number}", scenario)
        print(f"{scenario.name}: {scenario.seconds:.1f} s undisturbed", flush=True)
        goal = round(args.kills * scenario.share)
        done = 0
        seed = args.seed
        with ThreadPoolExecutor(args.at_once) as pool:
            while done < goal:
                parts = [
                    min(args.each, max(1, (goal - done) // args.at_once))
                    for _ in range(args.at_once)
                ]
                folders = [root / f"{number}-{seed + i}" for i in range(len(parts))]
                jobs = [
                    pool.submit(disturbed, folder, scenario, kills, seed + i)
                    for i, (folder, kills) in enumerate(zip(folders, parts, strict=True))
                ]
                seed += len(parts)
                for job in jobs:
                    kills, differences = job.result()
                    done += kills
                    wrong += [f"{scenario.name}: {text}" for text in differences]
                print(
                    f"{scenario.name}: {done} of {goal} kills, {len(wrong)} differences", flush=True
                )
        total += done
    for text in wrong:
        print(text)
    print(f"kills: {total}\ndifferences: {len(wrong)}")
    if not wrong:
        shutil.rmtree(root)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
