"""What every variant costs next to a baseline: speed, memory, parameters and FLOPs, from one run.

    python benchmarks/ideas_speed.py                        # all variants at the plan laptop's size
    python benchmarks/ideas_speed.py --size arena --rounds 3
    python benchmarks/ideas_speed.py --only uw1 nnm
    python benchmarks/ideas_speed.py --against modern --only moe moe_shared deltanet mamba2

Each measurement is a process of its own that trains as lmp_trainer does, on the same real tokens,
with one mini-batch size for all. The baseline is measured again before every few variants, and a
variant's rate is divided by the mean of the two that surround it, so that a slow minute of the
machine meets both. The table gives the median over the rounds. FLOPs are counted (per token;
training, and the folded model's forward pass); parameters are those trained, and those left after
folding. The baseline's other sizes are left out: they are no idea.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Arena:
    tokenizer: dict[str, Any]
    sizes: dict[str, Any]
    optimizer: dict[str, Any]
    batch: int
    mini_batch: int
    warm_up: int
    steps: int


ARENAS = {
    "laptop": Arena(
        {"kind": "bpe", "vocab_size": 4096},
        {"num_blocks": 4, "embed_dim": 256, "num_heads": 4, "max_len": 256, "dropout": 0.0},
        {"name": "adamw", "lr": 1e-3, "weight_decay": 0.1},
        8,
        4,
        2,
        4,
    ),
    "arena": Arena(
        {"kind": "tiktoken", "name": "gpt2"},
        {"num_blocks": 6, "embed_dim": 768, "num_heads": 12, "max_len": 1024, "dropout": 0.1},
        {"name": "adagrad", "lr": 6e-4},
        2,
        1,
        1,
        1,
    ),
}
EVERY = 4  # variants between two measurements of the baseline


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--size", choices=[*ARENAS], default="laptop")
    p.add_argument("--rounds", type=int, default=1)
    p.add_argument("--only", nargs="*", help="these variants only")
    p.add_argument("--against", default="gpt2ish", help="the baseline (gpt2ish)")
    p.add_argument("--amp", action="store_true", help="bf16 where the hardware has it")
    p.add_argument("--compile-model", action="store_true")
    p.add_argument("--worker", help=argparse.SUPPRESS)
    args = p.parse_args()
    if args.worker:
        print(json.dumps(work(args.worker, ARENAS[args.size], args.amp, args.compile_model)))
        return 0
    from lmplay.discover import list_sources

    names = args.only or [v for s in list_sources() for v in s.variants if s.idea != args.against]
    table(names, [one_round(names, args) for _ in range(args.rounds)], args.against)
    return 0


def one_round(names: list[str], args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Every variant once; `relative` is its rate over that of the baseline around it."""
    results: dict[str, dict[str, Any]] = {}
    before = baseline(args)
    for start in range(0, len(names), EVERY):
        group = names[start : start + EVERY]
        for name in group:
            results[name] = measure(name, args)
        after = baseline(args)
        for name in group:
            row = results[name]
            if "failed" not in row:
                row["relative"] = 2 * row["rate"] / (before["rate"] + after["rate"])
                row["relative_memory"] = row["peak_mb"] / before["peak_mb"]
            print(f"{name}: {row.get('relative', 0):.3f} {row.get('failed', '')}", flush=True)
        before = after
    return results | {args.against: {**before, "relative": 1.0, "relative_memory": 1.0}}


def baseline(args: argparse.Namespace) -> dict[str, Any]:
    row = measure(args.against, args)
    if "failed" in row:
        sys.exit(f"{args.against} failed: {row['failed']}")
    return row


def measure(name: str, args: argparse.Namespace) -> dict[str, Any]:
    command = [sys.executable, __file__, "--worker", name, "--size", args.size]
    command += ["--amp"] * args.amp + ["--compile-model"] * args.compile_model
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        return {"failed": (done.stderr.strip().splitlines() or ["no message"])[-1][:100]}
    return json.loads(done.stdout.splitlines()[-1])


def table(names: list[str], rounds: list[dict[str, dict[str, Any]]], against: str) -> None:
    base = rounds[0][against]
    print(
        f"\n{base['device']}, {base['precision']}, {base['mini_batch']} sequences a pass; "
        f"{against}: {base['rate']:.0f} tokens per second"
    )
    print("| variant | speed | memory | parameters, training | folded | FLOPs, training | in use |")
    print("|---|---|---|---|---|---|---|")
    for name in [against, *names]:
        rows = [r[name] for r in rounds if "failed" not in r[name]]
        if not rows:
            print(f"| {name} | failed: {rounds[0][name]['failed']} | | | | | |")
            continue
        speed, memory = (
            statistics.median(r[key] for r in rows) for key in ("relative", "relative_memory")
        )
        size, own = rows[0]["size"], base["size"]
        print(
            f"| {name} | {speed:.2f} | {memory:.2f} | {size['parameters'] / 1e6:.2f} M | "
            f"{size['folded'] / 1e6:.2f} M "
            f"| {size['flops'] / own['flops']:.2f} | "
            f"{size['inference_flops'] / own['inference_flops']:.2f} |"
        )


def work(name: str, arena: Arena, amp: bool, compile_model: bool) -> dict[str, Any]:
    """One variant, in this process: tokens per second, peak memory, size."""
    from pathlib import Path

    from lmplay.devices import tune_memory

    tune_memory()  # as the command does, before torch is imported
    import torch

    from lmplay import model as probe
    from lmplay.data.prepare import prepare
    from lmplay.data.stages import stages
    from lmplay.devices import describe_device, peak_memory_mb, pick_device, pick_precision
    from lmplay.discover import find, load
    from lmplay.plan import parse_plan
    from lmplay.training import match
    from lmplay.training.loop import Options, Trainer
    from lmplay.training.progress import Reporter
    from lmplay.training.run_folder import RunFolder

    device = pick_device("auto")
    precision = pick_precision(device, amp)
    plan = parse_plan(
        {
            "tokenizer": arena.tokenizer,
            "model": arena.sizes,
            "datasets": {
                "en": {"source": "bundled"},
                "es": {"source": "bundled", "language": "es"},
            },
            "optimizer": arena.optimizer,
            "batch": {"batch_size": arena.batch, "grad_clip": 1.0},
            "steps": [{"datasets": ["en", "es"]}],
        },
        "the benchmark's plan",
    )
    prepared = prepare(plan, lambda what, done: None)
    experiment = load(*find(name))
    config, _ = experiment.config({**plan.sizes(), "vocab_size": prepared.tokenizer.vocab_size}, {})
    report = Reporter()
    report.note = lambda text: None  # type: ignore[method-assign]
    runner = experiment.runner(config)
    trainer = Trainer(
        plan,
        prepared,
        runner,
        0,
        device,
        precision,
        RunFolder(Path("unused")),
        report,
        Options(compile_model),
    )
    trainer.model.train()
    trainer.mini_batch_size = arena.mini_batch
    stream = stages(plan, prepared, config.max_len)[0]
    batches = [stream.batch(i, arena.batch) for i in range(arena.warm_up + arena.steps)]

    def step(i: int) -> None:
        trainer.train_step(batches[i])
        if device.type == "cuda":
            torch.cuda.synchronize()

    for i in range(arena.warm_up):
        step(i)
    began = time.perf_counter()
    for i in range(arena.warm_up, len(batches)):
        step(i)
    seconds = time.perf_counter() - began
    peak = peak_memory_mb(device)  # before the sizes are counted
    some = probe.to_batch(batches[0], slice(0, arena.mini_batch), device)
    size = match.measure(runner, some, arena.batch // arena.mini_batch)
    return {
        "rate": arena.steps * arena.batch * config.max_len / seconds,
        "peak_mb": peak,
        "size": asdict(size),
        "device": describe_device(device),
        "precision": precision.name,
        "mini_batch": arena.mini_batch,
    }


if __name__ == "__main__":
    sys.exit(main())
