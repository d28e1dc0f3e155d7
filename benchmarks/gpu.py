"""What a CUDA card makes of lmplay: conformance, tokens/s, memory, share of the card's peak.

    make gpu                                # writes docs/gpu.md, in at most nine minutes
    python benchmarks/gpu.py --minutes 5

Uses whatever torch (2.11 or newer) is installed, and random tokens, so that it needs no data. Every
contestant trains the size of the plan `default` (6 x 768, 1024 long, vocabulary 50257) in bf16 with
AdamW, in a process of its own. Without a card it says so and exits with 0.
"""

from __future__ import annotations

import argparse
import datetime
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(Path(__file__).resolve().parent)]

BLOCKS = 6
DIM = 768
HEADS = 12
LENGTH = 1024
VOCAB = 50257
BATCH = 32  # sequences in an optimizer step
WARM_UP = 5
STEPS = 20
CONTESTANTS = (
    "gpt2ish",
    "gpt2ish+compile",
    "ue",
    "mamba2",
    "nano",
    "nano+compile",
)
# Dense bf16 FLOPs/s with float32 accumulation, from NVIDIA's data sheets.
PEAK = {
    "H200": 989e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "4090": 165e12,
    "4080": 97e12,
    "3090": 71e12,
    "3060": 51e12,
}


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--minutes", type=float, default=9.0)
    p.add_argument("--out", type=Path, default=ROOT / "docs" / "gpu.md")
    p.add_argument("--worker", help=argparse.SUPPRESS)
    args = p.parse_args()
    try:
        import torch
    except ImportError:
        print("make gpu: torch is not installed here: nothing was measured")
        return 0
    if not torch.cuda.is_available():
        print("make gpu: torch sees no CUDA card here: nothing was measured")
        return 0
    if args.worker == "conformance":
        conformance(args.minutes)
        return 0
    if args.worker:
        print(json.dumps(measure(args.worker)))
        return 0
    deadline = time.monotonic() + 60 * args.minutes
    speed = {}
    for name in CONTESTANTS:
        left = deadline - time.monotonic()
        speed[name] = run_worker(name, left) if left > 20 else {"error": "no time was left"}
        print(name, speed[name], flush=True)
    left = max(0.0, deadline - time.monotonic() - 10)
    checks = run_conformance(left)
    write(args.out, speed, checks)
    print(args.out)
    return 0


def run_worker(name: str, seconds: float) -> dict[str, Any]:
    """Measure one contestant in a process of its own."""
    command = [sys.executable, __file__, "--worker", name]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False)
    except subprocess.TimeoutExpired:
        return {"error": "no time was left"}
    if done.returncode:
        return {"error": (done.stderr.strip() or "no message").splitlines()[-1][:160]}
    return json.loads(done.stdout.splitlines()[-1])


def run_conformance(seconds: float) -> list[tuple[str, str]]:
    """Return (variant, result) of every idea that there was time for."""
    command = [sys.executable, __file__, "--worker", "conformance"]
    command += ["--minutes", f"{seconds / 60:.3f}"]
    out = ""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=seconds + 5, check=False
        )
        out = done.stdout
    except subprocess.TimeoutExpired as e:
        out = e.stdout.decode() if isinstance(e.stdout, bytes) else e.stdout or ""
    rows = [line.split("\t") for line in out.splitlines() if line.count("\t") == 1]
    for variant, result in rows:
        print(variant, result, flush=True)
    return [(variant, result) for variant, result in rows]


def conformance(minutes: float) -> None:
    """Run the suite on the card for each idea: eager with bf16, compiled, fp16."""
    import torch

    from lmplay import testing
    from lmplay.discover import list_sources

    deadline = time.monotonic() + 60 * minutes
    for source in list_sources():
        if source.broken:
            print(f"{source.idea}\tbroken: {source.broken}", flush=True)
            continue
        variant = next(iter(source.variants))
        if time.monotonic() > deadline:
            print(f"{variant}\tno time was left", flush=True)
            continue
        result = "passes"
        try:
            testing.check_experiment(variant, device="cuda")
            testing.check_fp16(testing.tiny(variant, "cuda"))
            testing.check_compiles(testing.tiny(variant, "cuda"))
        except Exception as e:  # any failure is a result here
            result = f"FAILS: {type(e).__name__}: {str(e).strip().splitlines()[0][:120]}"
        torch.compiler.reset()
        print(f"{variant}\t{result}", flush=True)


def measure(name: str) -> dict[str, Any]:
    """Train one contestant and return its speed, memory and FLOPs."""
    import torch

    torch.set_float32_matmul_precision("high")
    device = torch.device("cuda")
    idea, _, how = name.partition("+")
    step, flops = nano_step(how, device) if idea == "nano" else our_step(idea, how, device)
    for _ in range(WARM_UP):
        step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    for _ in range(STEPS):
        step()
    torch.cuda.synchronize()
    seconds = time.perf_counter() - began
    rate = STEPS * BATCH * LENGTH / seconds
    card = torch.cuda.get_device_name()
    peak = next((value for key, value in PEAK.items() if key in card), None)
    return {
        "tokens_per_second": rate,
        "peak_mb": torch.cuda.max_memory_allocated() / 2**20,
        "flops_per_token": flops,
        "share_of_peak": rate * flops / peak if peak else None,
    }


def our_step(idea: str, how: str, device: Any) -> tuple[Any, float]:
    """Return an optimizer step of lmplay's trainer, and its FLOPs per token."""
    import numpy as np

    from lmplay.data.prepare import Prepared
    from lmplay.data.token_files import Tokens
    from lmplay.data.tokenizers import Bytes
    from lmplay.devices import pick_precision
    from lmplay.discover import find, load
    from lmplay.plan import parse_plan
    from lmplay.training.loop import Options, Trainer
    from lmplay.training.progress import Reporter
    from lmplay.training.run_folder import RunFolder

    tokenizer = Bytes()
    tokenizer.pieces = [b"x"] * VOCAB  # only the sizes of the vocabulary and its tokens matter
    ids = np.random.default_rng(0).integers(0, VOCAB, 64 * LENGTH + 1).astype(np.uint16)
    prepared = Prepared(tokenizer, {"random": Tokens("random", ids, ids, None, None, "random")})
    content = {
        "tokenizer": {"kind": "bytes"},
        "datasets": {"random": {"source": "bins", "path": "unused"}},
        "optimizer": {"name": "adamw", "lr": 6e-4},
        "batch": {"batch_size": BATCH, "grad_clip": 1.0},
        "steps": [{"datasets": ["random"]}],
    }
    plan = parse_plan(content, "the benchmark's plan")
    experiment = load(*find(idea))
    sizes = {"num_blocks": BLOCKS, "embed_dim": DIM, "num_heads": HEADS, "max_len": LENGTH}
    config, _ = experiment.config({**sizes, "vocab_size": VOCAB, "dropout": 0.0}, {})
    trainer = Trainer(
        plan,
        prepared,
        experiment.runner(config),
        0,
        device,
        pick_precision(device, amp=True),
        RunFolder(Path("unused")),
        Reporter(brief=True),
        Options(compile_model=how == "compile"),
    )
    trainer.set_up(None, {})
    arrays = trainer.streams[0].batch(0, BATCH)
    return (lambda: trainer.train_step(arrays)), trainer.flops_per_token


def nano_step(how: str, device: Any) -> tuple[Any, float]:
    """Return an optimizer step of a nanoGPT-style loop, and its FLOPs per token."""
    import torch
    import torch.nn.functional as F
    from torch.utils.flop_counter import FlopCounterMode
    from train_speed import Size, nano_model

    size = Size({}, VOCAB, BLOCKS, DIM, HEADS, LENGTH, BATCH, STEPS)
    torch.manual_seed(0)
    model = nano_model(size).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=6e-4, fused=True)
    ids = torch.randint(VOCAB, (BATCH, LENGTH + 1), device=device)

    def loss_of(forward: Any, rows: int) -> Any:
        with torch.autocast("cuda", dtype=torch.bfloat16):
            logits = forward(ids[:rows, :-1])
            return F.cross_entropy(logits.view(-1, VOCAB), ids[:rows, 1:].reshape(-1))

    with FlopCounterMode(display=False) as counter:
        loss_of(model, 1).backward()
    optimizer.zero_grad(set_to_none=True)
    forward = torch.compile(model) if how == "compile" else model

    def step() -> None:
        loss_of(forward, BATCH).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step, counter.get_total_flops() / LENGTH


def write(path: Path, speed: dict[str, Any], checks: list[tuple[str, str]]) -> None:
    """Write the report."""
    import torch

    card = torch.cuda.get_device_name()
    memory = torch.cuda.get_device_properties(0).total_memory / 2**30
    lines = [
        f"# A GPU: {card}",
        "",
        "    make gpu",
        "",
        f"{datetime.date.today()}, {card} with {memory:.0f} GiB, torch {torch.__version__}, CUDA "
        f"{torch.version.cuda}. {BLOCKS} x {DIM}, {LENGTH} long, vocabulary {VOCAB}, {BATCH} "
        f"sequences a step, bf16, AdamW; {STEPS} steps after {WARM_UP}.",
        "",
        "| contestant | tokens/s | peak MB | FLOPs per token | share of the card's peak |",
        "|---|---|---|---|---|",
    ]
    for name, row in speed.items():
        if "error" in row:
            lines.append(f"| {name} | {row['error']} | | | |")
            continue
        share = row["share_of_peak"]
        lines.append(
            f"| {name} | {row['tokens_per_second']:,.0f} | {row['peak_mb']:,.0f} | "
            f"{row['flops_per_token']:.3g} | {'unknown' if share is None else f'{share:.1%}'} |"
        )
    lines += [
        "",
        "Conformance on the card (eager, bf16, fp16, compiled), one variant per idea:",
        "",
        "| variant | result |",
        "|---|---|",
        *(f"| {variant} | {result} |" for variant, result in checks),
    ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
