"""Speed and memory of Mamba, Mamba-2 and their peers, in one interleaved run; and decoding speed by
position.

    python benchmarks/mamba_speed.py    # 512 and 2048 positions, three rounds, then decoding
    python benchmarks/mamba_speed.py --lengths 512 --rounds 5 --no-decoding

12 blocks of 768, vocabulary 50257, tied; 2,048 tokens an optimizer step (or --sequences N of them),
AdamW (fused, for all), bf16 autocast where the hardware has it. Every contestant trains in a
process of its own, one after another and again in each round, so that a slow minute of the machine
meets all alike: some steps to warm up, then those that are timed. Peak memory is the process's;
"step MB" is what it holds above the libraries, weights, gradients and AdamW's moments.

    mamba, mamba2   this project's, by their chunked scans
    mamba-kernel, mamba2-kernel
                    the same with the kernel that is installed (CUDA only)
    mambapy         github.com/alxndrTL/mamba.py: a parallel scan in plain torch
                    (pip install mambapy)
    hf-mamba, hf-mamba2
                    the transformers library's classes without kernels. hf-mamba loops over time
                    and takes minutes a step (--slow, and then at 128 positions only)
    +lmplay         a peer with lmplay's memory setting, chunked head and loss, where the others
                    compute full logits as their users do. What remains is the difference
                    between the mixers.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import resource
import statistics
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn

BLOCKS = 12
DIM = 768
VOCAB = 50257
STATE = {"mamba": 16, "mamba2": 128}
HEADS = 12
DECODED = 4000
WINDOWS = 8
STEP_TOKENS = 2048


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--lengths", type=int, nargs="*", default=[512, 2048])
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument(
        "--sequences",
        type=int,
        default=0,
        help=f"sequences in an optimizer step (0: as many as make {STEP_TOKENS} tokens)",
    )
    p.add_argument("--warm-up", type=int, default=3, help="steps before those that are timed")
    p.add_argument("--steps", type=int, default=2, help="steps that are timed")
    p.add_argument(
        "--slow", action="store_true", help="the loop over time of transformers' Mamba, too"
    )
    p.add_argument("--no-decoding", action="store_true")
    p.add_argument("--only", nargs="*", help="these contestants only")
    p.add_argument("--worker", help=argparse.SUPPRESS)
    p.add_argument("--length", type=int, default=STEP_TOKENS, help=argparse.SUPPRESS)
    p.add_argument("--decode", action="store_true", help=argparse.SUPPRESS)
    args = p.parse_args()
    if args.worker:
        work = decode if args.decode else train
        print(json.dumps(work(args.worker, args)))
        return 0
    for length in args.lengths:
        sequences = args.sequences or max(1, STEP_TOKENS // length)
        compete(args, length, sequences, args.only or contestants())
    if args.slow:
        compete(args, 128, args.sequences or 1, ["hf-mamba", "mamba"])
    for name in () if args.no_decoding else ("mamba", "mamba2"):
        rates = run(args, name, "--decode")["rates"]
        step = DECODED // WINDOWS
        print(f"\n{name}: greedy decoding of one sequence, tokens/s by position")
        for i, rate in enumerate(rates):
            print(f"  {i * step + 1:5} to {(i + 1) * step:5}: {rate:.1f}")
    return 0


def contestants() -> list[str]:
    """Who can run here."""
    import torch

    names = ["mamba", "mamba2", "hf-mamba2", "hf-mamba2+lmplay"]
    if importlib.util.find_spec("mambapy") is not None:
        names[1:1] = ["mambapy", "mambapy+lmplay"]
    else:
        print("mambapy is not installed and stays out: pip install mambapy")
    if torch.cuda.is_available():
        names += ["mamba-kernel"] if importlib.util.find_spec("mamba_ssm") else []
        names += (
            ["mamba2-kernel"]
            if importlib.util.find_spec("fla") or importlib.util.find_spec("mamba_ssm")
            else []
        )
    return names


def run(args: argparse.Namespace, name: str, *more: str) -> dict[str, Any]:
    """One contestant in a process of its own."""
    command = [sys.executable, __file__, "--worker", name, *more]
    command += ["--warm-up", str(args.warm_up), "--steps", str(args.steps)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        sys.exit(f"{name} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])  # type: ignore[no-any-return]


def compete(args: argparse.Namespace, length: int, sequences: int, names: list[str]) -> None:
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for number in range(args.rounds):
        for name in names:
            results[name].append(
                run(args, name, "--length", str(length), "--sequences", str(sequences))
            )
            print(
                f"{length} positions, round {number + 1}: {name} {results[name][-1]['rate']:.1f} "
                "tokens/s",
                flush=True,
            )
    precision = results[names[0]][0]["precision"]
    print(
        f"\n{sequences} x {length} positions a step, {BLOCKS} x {DIM}, vocabulary {VOCAB}, "
        f"{precision}"
    )
    print(
        f"{'contestant':16} {'tokens/s':>9} {'min':>8} {'max':>8} {'peak MB':>8} {'step MB':>8}  "
        "parameters"
    )
    for name, rows in results.items():
        rates = [r["rate"] for r in rows]
        peak, step = (statistics.median(r[key] for r in rows) for key in ("peak_mb", "step_mb"))
        print(
            f"{name:16} {statistics.median(rates):9.1f} {min(rates):8.1f} {max(rates):8.1f} "
            f"{peak:8.0f} {step:8.0f}"
            f"  {rows[0]['parameters'] / 1e6:.1f} M"
        )
    pairs_asked = [
        ("mamba", "mambapy"),
        ("mamba", "mambapy+lmplay"),
        ("mamba", "hf-mamba"),
        ("mamba2", "hf-mamba2"),
    ]
    pairs_asked += [
        ("mamba2", "hf-mamba2+lmplay"),
        ("mamba", "mamba-kernel"),
        ("mamba2", "mamba2-kernel"),
    ]
    for ours, theirs in pairs_asked:
        if ours in results and theirs in results:
            pairs = list(zip(results[ours], results[theirs], strict=True))
            ratios = [a["rate"] / b["rate"] for a, b in pairs]
            memory = [
                statistics.median(a[key] / b[key] for a, b in pairs)
                for key in ("peak_mb", "step_mb")
            ]
            print(
                f"{ours} / {theirs}: speed {statistics.median(ratios):.2f} ({min(ratios):.2f} to "
                f"{max(ratios):.2f}), "
                f"peak memory {memory[0]:.2f}, of the step alone {memory[1]:.2f}"
            )
    print()


def train(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """A contestant's round, in this process."""
    if not is_peer(name) or name.endswith("+lmplay"):
        from lmplay.devices import tune_memory

        tune_memory()  # as the command does, before torch is imported
    import torch

    from lmplay import model as probe
    from lmplay.devices import peak_memory_mb, pick_device, pick_precision

    device = pick_device("auto")
    precision = pick_precision(device, amp=True)
    load_library(name)
    base = (
        0.0 if device.type == "cuda" else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    )
    torch.manual_seed(0)
    model, loss = peer(name) if is_peer(name) else ours(name, args.length)
    model.to(device).train()
    count = sum(p.numel() for p in model.parameters())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=device.type != "mps")
    ids = torch.randint(VOCAB, (args.sequences, args.length + 1), device=device)

    def step() -> None:
        with probe.autocast(device, precision):
            value = loss(ids[:, :-1], ids[:, 1:])
        value.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        float(value.detach())  # waits for a GPU

    for _ in range(args.warm_up):
        step()
    began = time.perf_counter()
    for _ in range(args.steps):
        step()
    seconds = (time.perf_counter() - began) / args.steps
    peak = peak_memory_mb(device)
    return {
        "rate": args.sequences * args.length / seconds,
        "peak_mb": peak,
        "parameters": count,
        "step_mb": peak - base - 16 * count / 2**20,
        "precision": precision.name,
    }


def is_peer(name: str) -> bool:
    return name.startswith(("hf", "mambapy"))


def load_library(name: str) -> None:
    """What a contestant imports, so that it is not counted as its memory; without kernels for the
    transformers library, which would take mamba-ssm's by itself."""
    if name.startswith("hf"):
        # importing them fails from here on
        sys.modules.update(dict.fromkeys(("mamba_ssm", "causal_conv1d")))
        from transformers import Mamba2ForCausalLM, MambaForCausalLM  # noqa: F401
    elif name.startswith("mambapy"):
        import mambapy.mamba  # noqa: F401


def ours(name: str, length: int, seed: int = 0) -> tuple[nn.Module, Any]:
    """The experiment's model and its loss, by its runner's step."""
    from lmplay import model as probe
    from lmplay.api import Batch
    from lmplay.devices import pick_device
    from lmplay.discover import find, load

    idea, _, scan = name.partition("-")
    experiment = load(*find(idea))
    sizes = {
        "num_blocks": BLOCKS,
        "embed_dim": DIM,
        "max_len": length,
        "vocab_size": VOCAB,
        "scan": scan or "chunked",
    }
    config = experiment.config_type(**sizes, state_dim=STATE[idea])
    runner = experiment.runner(config)
    if scan == "kernel" and not any(
        "kernel (" in line for line in runner.notes(pick_device("auto"))
    ):
        sys.exit(f"{name}: no kernel is installed for this device")
    model = probe.build_model(runner, seed)

    def loss(ids: Tensor, targets: Tensor) -> Tensor:
        out = runner.step(model, Batch(ids, targets))
        return out.loss_sum / out.n_tokens

    return model, loss


def peer(name: str) -> tuple[nn.Module, Any]:
    """A peer of the same shape, with a tied head and the usual cross entropy over full logits, or
    our head and loss."""
    import torch.nn.functional as F
    from torch import nn

    from lmplay.api import linear_cross_entropy

    name, _, with_ours = name.partition("+")
    if name == "mambapy":
        from mambapy.mamba import Mamba, MambaConfig

        class Model(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.embedding = nn.Embedding(VOCAB, DIM)
                nn.init.normal_(self.embedding.weight, std=0.02)
                self.mamba = Mamba(
                    MambaConfig(d_model=DIM, n_layers=BLOCKS, d_state=STATE["mamba"])
                )
                self.norm = nn.RMSNorm(DIM)

            def forward(self, ids: Tensor) -> Tensor:
                return self.norm(self.mamba(self.embedding(ids)))

        model: nn.Module = Model()
        hidden: Any = model
        head: nn.Linear = nn.Linear(DIM, VOCAB, bias=False)
        head.weight = model.embedding.weight
    else:
        import transformers

        kind = name.removeprefix("hf-")
        config = {
            "vocab_size": VOCAB,
            "hidden_size": DIM,
            "num_hidden_layers": BLOCKS,
            "state_size": STATE[kind],
            "tie_word_embeddings": True,
            "use_cache": False,
        }
        if kind == "mamba2":
            config |= {"num_heads": 2 * HEADS, "head_dim": DIM // HEADS, "n_groups": 1}
        transformers.utils.logging.set_verbosity_error()
        model = transformers.AutoModelForCausalLM.from_config(
            transformers.AutoConfig.for_model(kind, **config)
        )

        def hidden(ids: Tensor) -> Tensor:
            return model.backbone(ids).last_hidden_state

        head = model.lm_head

    def loss(ids: Tensor, targets: Tensor) -> Tensor:
        if with_ours:
            out = linear_cross_entropy(hidden(ids), head, targets)
            return out.loss_sum / out.n_tokens
        return F.cross_entropy(head(hidden(ids)).float().flatten(0, 1), targets.flatten())

    return model, loss


def decode(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Tokens per second of greedy decoding, for each window of positions: the median
    over its tokens."""
    import torch

    from lmplay import model as probe
    from lmplay.devices import pick_device, pick_precision
    from lmplay.discover import find, load

    device = pick_device("auto")
    experiment = load(*find(name))
    config = experiment.config_type(
        num_blocks=BLOCKS, embed_dim=DIM, vocab_size=VOCAB, state_dim=STATE[name]
    )
    runner = experiment.runner(config)
    model = probe.build_model(runner, 0).to(device).eval()
    cache: Any = runner.new_cache(model, 1, DECODED)
    token = torch.zeros(1, 1, dtype=torch.int64, device=device)
    seconds = []
    with torch.no_grad(), probe.autocast(device, pick_precision(device, amp=device.type == "cuda")):
        for _ in range(DECODED):
            began = time.perf_counter()
            logits, cache = runner.logits(model, token, cache)
            token = logits.argmax(-1, keepdim=True)
            int(token)  # waits for a GPU
            seconds.append(time.perf_counter() - began)
    size = DECODED // WINDOWS
    return {
        "rates": [1 / statistics.median(seconds[i : i + size]) for i in range(0, DECODED, size)]
    }


if __name__ == "__main__":
    sys.exit(main())
