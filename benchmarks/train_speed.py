"""Training speed of lmplay and two peers, in one interleaved run.

    python benchmarks/train_speed.py                  # both sizes, three rounds
    python benchmarks/train_speed.py --size small --rounds 5

Every contestant trains the same shape on the same real tokens with AdamW, in a process of its own,
one after another and again in every round, so that a slow minute of the machine meets all alike. A
round is two optimizer steps to warm up and then those that are timed. Rates are real tokens
(nothing is padding) per second; the table gives the median over rounds, and the peak memory of the
process.

    lmplay       gpt2ish as lmp_trainer trains it, with its memory setting and its search for a
                 mini-batch, and with tied=true head_bias=false, as the peers have
    nano         a nanoGPT-style loop written for this file: one pass over the batch, full logits
    nano+compile the same with torch.compile
    hf           GPT2LMHeadModel of the transformers library
    lmplay-arena, ue-arena   gpt2ish and ue (8x) with the baseline arena's Adagrad: ue's cost
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import nn

    from lmplay.data.packing import Arrays


@dataclass(frozen=True)
class Size:
    tokenizer: dict[str, Any]
    vocab: int
    blocks: int
    dim: int
    heads: int
    length: int
    batch: int
    timed_steps: int


SIZES = {
    "arena": Size({"kind": "tiktoken", "name": "gpt2"}, 50257, 6, 768, 12, 1024, 2, 3),
    # 65 is the vocabulary of nanoGPT's characters: the bytes of the text, modulo 65
    "small": Size({"kind": "bytes"}, 65, 6, 384, 6, 256, 64, 3),
}
WARM_UP = 2  # optimizer steps
CONTESTANTS = {
    "arena": ("lmplay", "nano", "nano+compile", "hf", "lmplay-arena", "ue-arena"),
    "small": ("lmplay", "nano", "nano+compile", "hf"),
}


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--size", choices=[*SIZES, "both"], default="both")
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--only", nargs="*", help="these contestants only")
    p.add_argument("--worker", help=argparse.SUPPRESS)
    args = p.parse_args()
    if args.worker:
        print(json.dumps(work(args.worker, SIZES[args.size])))
        return 0
    for size in SIZES if args.size == "both" else [args.size]:
        compete(size, args.rounds, args.only or CONTESTANTS[size])
    return 0


def compete(size: str, rounds: int, names: list[str] | tuple[str, ...]) -> None:
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for round_number in range(rounds):
        for name in names:
            command = [sys.executable, __file__, "--worker", name, "--size", size]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode != 0:
                sys.exit(f"{name} failed:\n{done.stderr}")
            result = json.loads(done.stdout.splitlines()[-1])
            results[name].append(result)
            print(
                f"{size} round {round_number + 1}: {name} {result['rate']:.1f} tokens/s", flush=True
            )
    s = SIZES[size]
    precision = results[names[0]][0]["precision"]
    print(
        f"\n{size}: {s.blocks} x {s.dim}, {s.length} long, vocabulary {s.vocab}, "
        f"{s.batch} sequences a step, {precision}"
    )
    print(f"{'contestant':14} {'tokens/s':>9} {'min':>8} {'max':>8} {'peak MB':>8}  mini-batch")
    medians = {}
    for name, rows in results.items():
        rates = [r["rate"] for r in rows]
        medians[name] = statistics.median(rates)
        peak = statistics.median(r["peak_mb"] for r in rows)
        chosen = ", ".join(str(n) for n in sorted({r["mini_batch"] for r in rows}))
        print(
            f"{name:14} {medians[name]:9.1f} {min(rates):8.1f} {max(rates):8.1f} {peak:8.0f}  "
            f"{chosen}"
        )
    ratio(results, "lmplay", "nano")
    ratio(results, "lmplay", "hf")
    ratio(results, "lmplay", "nano+compile")
    ratio(results, "ue-arena", "lmplay-arena")
    print()


def ratio(results: dict[str, list[dict[str, Any]]], a: str, b: str) -> None:
    """The median of the ratios within rounds, which the machine's slow minutes do not touch."""
    if a in results and b in results:
        ratios = [x["rate"] / y["rate"] for x, y in zip(results[a], results[b], strict=True)]
        print(
            f"ratio {a} / {b}: {statistics.median(ratios):.3f} (min {min(ratios):.3f}, max "
            f"{max(ratios):.3f})"
        )


def work(name: str, size: Size) -> dict[str, Any]:
    """One contestant's round, in this process."""
    ours = name.startswith(("lmplay", "ue"))
    if ours:
        from lmplay.devices import tune_memory

        tune_memory()  # as the command does, before torch is imported
    import torch

    from lmplay.devices import peak_memory_mb, pick_device, pick_precision

    device = pick_device("auto")
    precision = pick_precision(device, amp=True)
    batches, trainer = our_trainer(name, size, device, precision)
    if ours:
        trainer.set_up(None, {"flops_per_token": 0.0})
        step = trainer.train_step
    else:
        del trainer
        step = peer_step(name, size, device, precision)
    for arrays in batches[:WARM_UP]:
        step(arrays)
    if device.type == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    for arrays in batches[WARM_UP:]:
        step(arrays)
    if device.type == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - began
    return {
        "rate": size.timed_steps * size.batch * size.length / seconds,
        "peak_mb": peak_memory_mb(device),
        "mini_batch": trainer.mini_batch_size if ours else size.batch,
        "precision": precision.name,
    }


def our_trainer(
    name: str, size: Size, device: torch.device, precision: Any
) -> tuple[list[Arrays], Any]:
    """The batches that all contestants read, and for ours the Trainer that lmp_trainer would
    use."""
    from pathlib import Path

    from lmplay.data.packing import IGNORE, Arrays
    from lmplay.data.prepare import prepare
    from lmplay.data.stages import stages
    from lmplay.discover import find, load
    from lmplay.plan import parse_plan
    from lmplay.training.loop import Options, Trainer
    from lmplay.training.progress import Reporter
    from lmplay.training.run_folder import RunFolder

    optimizer = (
        {"name": "adagrad", "lr": 6e-4} if name.endswith("arena") else {"name": "adamw", "lr": 6e-4}
    )
    plan = parse_plan(
        {
            "tokenizer": size.tokenizer,
            "datasets": {
                "en": {"source": "bundled"},
                "es": {"source": "bundled", "language": "es"},
            },
            "optimizer": optimizer,
            "batch": {"batch_size": size.batch, "grad_clip": 1.0},
            "steps": [{"datasets": ["en", "es"]}],
        },
        "the benchmark's plan",
    )
    prepared = prepare(plan, lambda what, done: None)
    stream = stages(plan, prepared, size.length)[0]
    batches = [stream.batch(i, size.batch) for i in range(WARM_UP + size.timed_steps)]
    folded = [Arrays(a.ids % size.vocab, (a.targets % size.vocab)) for a in batches]
    assert all((a.targets != IGNORE).all() for a in batches)
    if not name.startswith(("lmplay", "ue")):
        return folded, None
    experiment = load(*find("ue" if name.startswith("ue") else "gpt2ish"))
    sizes = {
        "num_blocks": size.blocks,
        "embed_dim": size.dim,
        "num_heads": size.heads,
        "max_len": size.length,
    }
    shared = {"tied": True, "head_bias": False} if name == "lmplay" else {}
    config, _ = experiment.config({**sizes, **shared, "vocab_size": size.vocab, "dropout": 0.0}, {})
    report = Reporter()
    report.note = lambda text: None  # type: ignore[method-assign]
    run = RunFolder(Path("unused"))
    trainer = Trainer(
        plan, prepared, experiment.runner(config), 0, device, precision, run, report, Options()
    )
    trainer.model.train()
    stream_batch = trainer.streams[0].batch
    trainer.streams[0].batch = lambda *a: fold(stream_batch(*a), size.vocab)  # type: ignore[method-assign]
    return folded, trainer


def fold(arrays: Any, vocab: int) -> Any:
    from lmplay.data.packing import Arrays

    return Arrays(arrays.ids % vocab, arrays.targets % vocab)


def peer_step(name: str, size: Size, device: torch.device, precision: Any) -> Any:
    """One optimizer step of a peer: the batch in one pass, full logits, AdamW as torch makes
    it."""
    import torch
    import torch.nn.functional as F

    from lmplay import model as probe

    torch.manual_seed(0)
    model: Any = hf_model(size) if name == "hf" else nano_model(size)
    model.to(device)
    # nanoGPT's rule
    optimizer = torch.optim.AdamW(model.parameters(), lr=6e-4, fused=device.type == "cuda")
    forward = torch.compile(model) if name == "nano+compile" else model

    def step(arrays: Arrays) -> None:
        batch = probe.to_batch(arrays, slice(None), device)
        with probe.autocast(device, precision):
            out = forward(batch.ids)
            logits = out.logits if name == "hf" else out
            loss = F.cross_entropy(logits.view(-1, size.vocab), batch.targets.view(-1))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        float(loss)

    return step


def hf_model(size: Size) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=size.vocab,
        n_positions=size.length,
        n_embd=size.dim,
        n_layer=size.blocks,
        n_head=size.heads,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        use_cache=False,
    )
    return GPT2LMHeadModel(config)


def nano_model(size: Size) -> nn.Module:
    """A GPT in the manner of nanoGPT: fused qkv, no biases, tied head, flash attention where torch
    has it."""
    import torch
    import torch.nn.functional as F
    from torch import nn

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            d = size.dim
            self.ln1 = nn.LayerNorm(d, bias=False)
            self.ln2 = nn.LayerNorm(d, bias=False)
            self.qkv = nn.Linear(d, 3 * d, bias=False)
            self.proj = nn.Linear(d, d, bias=False)
            self.up = nn.Linear(d, 4 * d, bias=False)
            self.down = nn.Linear(4 * d, d, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            b, t, d = x.shape
            q, k, v = (
                y.view(b, t, size.heads, d // size.heads).transpose(1, 2)
                for y in self.qkv(self.ln1(x)).split(d, dim=2)
            )
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + self.proj(y.transpose(1, 2).contiguous().view(b, t, d))
            return x + self.down(F.gelu(self.up(self.ln2(x))))

    class Nano(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wte = nn.Embedding(size.vocab, size.dim)
            self.wpe = nn.Embedding(size.length, size.dim)
            self.blocks = nn.ModuleList(Block() for _ in range(size.blocks))
            self.ln = nn.LayerNorm(size.dim, bias=False)
            self.head = nn.Linear(size.dim, size.vocab, bias=False)
            self.head.weight = self.wte.weight
            self.apply(self.initialise)

        @staticmethod
        def initialise(module: nn.Module) -> None:
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            x = self.wte(ids) + self.wpe(torch.arange(ids.shape[1], device=ids.device))
            for block in self.blocks:
                x = block(x)
            return self.head(self.ln(x))

    return Nano()


if __name__ == "__main__":
    sys.exit(main())
