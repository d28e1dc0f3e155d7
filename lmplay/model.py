"""Build a model, count its parameters and FLOPs, check its gradients, find the fastest
mini-batch."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from .api import Batch, ModelRunner, StepOut
from .data.packing import Arrays
from .devices import Precision
from .errors import LmplayError


def seed_of(seed: int, name: str) -> int:
    """Return a 63-bit seed for one purpose of a run."""
    return (
        int.from_bytes(hashlib.blake2b(f"{seed} {name}".encode(), digest_size=8).digest(), "big")
        >> 1
    )


def build_model(runner: ModelRunner, seed: int) -> nn.Module:
    """Build the runner's model; initialize each module with a seed of (seed, module path).

    Two experiments that share a module start it from the same numbers, whatever else they contain.
    This removes most of the noise from their comparison. The global generator stays unchanged.
    """
    # torch.manual_seed would seed every device, and costs as much as a module
    generator = torch.default_generator
    with torch.random.fork_rng(devices=[]):
        generator.manual_seed(seed_of(seed, "build"))
        model = runner.build()
        for path, module in model.named_modules():
            reset = getattr(module, "reset_parameters", None) or getattr(
                module, "_reset_parameters", None
            )
            if callable(reset):
                generator.manual_seed(seed_of(seed, f"module {path}"))
                reset()
    return model


def to_batch(arrays: Arrays, part: slice, device: torch.device) -> Batch:
    """Return the sequences `part` of the arrays, on the device."""
    ids, targets = (torch.from_numpy(a[part]) for a in (arrays.ids, arrays.targets))
    if device.type == "cuda":
        return Batch(
            ids.pin_memory().to(device, non_blocking=True),
            targets.pin_memory().to(device, non_blocking=True),
        )
    return Batch(ids.to(device), targets.to(device))


def autocast(device: torch.device, precision: Precision) -> Any:
    """Return the context for a forward pass."""
    return torch.autocast(
        device.type, dtype=precision.dtype or torch.bfloat16, enabled=precision.dtype is not None
    )


def parameter_counts(runner: ModelRunner, model: nn.Module) -> tuple[int, int]:
    """Return the number of all parameters, and of those that only training needs."""
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    extra = [
        name for name in sizes if any(fnmatch(name, pattern) for pattern in runner.training_only)
    ]
    return sum(sizes.values()), sum(sizes[name] for name in extra)


def count_flops(runner: ModelRunner, model: nn.Module, batch: Batch, passes: int = 1) -> float:
    """Return the training FLOPs per token, of matrix products and attention.

    Measured with torch's FlopCounterMode, which counts attention as if it were not causal, on
    forward and backward passes of an optimizer step with `passes` mini-batches like `batch`. What
    is computed from weights alone counts once. Gradients and the global generator stay unchanged.
    """

    def step(times: int) -> None:
        with runner.fixed_weights(model):
            for _ in range(times):
                _with_auxiliary(runner.step(model, batch)).backward()

    with undisturbed(model, batch.ids.device):
        once = _flops(lambda: step(1))
        each = once
        if passes > 1 and type(runner).fixed_weights is not ModelRunner.fixed_weights:
            each = _flops(lambda: step(2)) - once
        total = once + (passes - 1) * each
    return total / passes / batch.ids.numel()


def _with_auxiliary(out: StepOut) -> Tensor:
    """Return a loss whose gradient reaches everything that is trained."""
    return out.loss_sum if out.aux_loss is None else out.loss_sum + out.aux_loss


def count_inference_flops(runner: ModelRunner, model: nn.Module, batch: Batch) -> float:
    """Return the FLOPs per token of a forward pass of the folded model, in a text as long as
    `batch`."""
    folded = runner.fold(model)
    with undisturbed(model, batch.ids.device), torch.no_grad():
        return _flops(lambda: runner.step(folded, batch)) / batch.ids.numel()


def _flops(work: Callable[[], object]) -> float:
    aten = torch.ops.aten

    def forward(q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
        return sdpa_flop_count(q, k, v)

    def backward(g: Any, q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
        return sdpa_backward_flop_count(g, q, k, v)

    def grouped(a: Any, b: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
        """Rows of a (M, K) times b (E, K, N) of their group; or (K, M) (M, N) -> (E, K, N)."""
        return int(2 * a[0] * a[1] * b[-1])

    uncounted = {
        aten._grouped_mm: grouped,
        aten._scaled_dot_product_flash_attention_for_cpu: forward,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: backward,
        torch.ops.lmplay.block_attention: forward,
        torch.ops.lmplay.block_attention_backward: backward,
    }
    with FlopCounterMode(display=False, custom_mapping=uncounted) as counter:
        work()
    return counter.get_total_flops()


@contextmanager
def undisturbed(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Restore gradients, buffers and random numbers after the block."""
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            model.zero_grad(set_to_none=True)
            for name, b in model.named_buffers():
                b.copy_(buffers[name])


def find_mini_batch(
    trial: Callable[[int], None],
    model: nn.Module,
    device: torch.device,
    batch_size: int,
    length: int,
    seconds: float = 20.0,
    clock: Callable[[], float] = time.perf_counter,
) -> int:
    """Return the number of sequences per forward pass that trains fastest.

    Tries divisors of the batch size from 1 upwards until two in a row are slower than the best,
    memory runs out, or the time is up. Then it repeats those with more than half of the best speed
    in turns and takes the fastest run of each, because the best of single runs is often only the
    luckiest. Of those within 5 % of the best it returns the smallest, which needs the least memory.

    A CPU pass has at most 4096 tokens: larger ones leave the cache, and running out of memory on a
    CPU cannot be caught.

    Args:
        trial: runs forward and backward on that many sequences.
        seconds: time to spend. Each size is tried at least twice when its turn comes.

    Raises:
        LmplayError: not even one sequence fits into memory.
    """
    sizes = [n for n in range(1, batch_size + 1) if batch_size % n == 0]
    if device.type == "cpu":
        sizes = [n for n in sizes if n == 1 or n * length <= 4096]
    rates: dict[int, float] = {}
    began = clock()

    def timed(size: int) -> None:
        model.zero_grad(set_to_none=True)  # sparse gradients would grow
        start = clock()
        trial(size)
        if device.type == "cuda":
            torch.cuda.synchronize()
        rates[size] = max(rates.get(size, 0.0), size / (clock() - start))

    with undisturbed(model, device):
        slower = 0
        for size in sizes:
            best = max(rates.values(), default=0.0)
            try:
                trial(size)  # warm-up: cold memory, and compilation
                timed(size)
            except torch.OutOfMemoryError as e:
                model.zero_grad(set_to_none=True)
                torch.cuda.empty_cache()
                if not rates:
                    raise LmplayError(
                        "not even one sequence fits into the device's memory: a smaller model?"
                    ) from e
                break
            slower = 0 if rates[size] > best else slower + 1
            if slower == 2 or clock() - began > seconds:
                break
        best = max(rates.values())
        near = [size for size, rate in rates.items() if rate > 0.5 * best]
        for _ in range(4 if len(near) > 1 else 0):
            for size in near:
                if clock() - began < seconds:
                    timed(size)
    best = max(rates.values())
    return next(size for size in sizes if rates.get(size, 0.0) > best / 1.05)


def without_gradient(runner: ModelRunner, model: nn.Module, batch: Batch) -> list[str]:
    """Return the names of trained parameters whose gradient from one batch is missing or zero."""
    model.zero_grad(set_to_none=True)
    _with_auxiliary(runner.step(model, batch)).backward()
    idle = []
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        grad = p.grad
        if grad is not None and grad.is_sparse:
            grad = grad.coalesce().values()
        if grad is None or not bool(grad.any()):
            idle.append(name)
    model.zero_grad(set_to_none=True)
    return idle


def profile(step: Callable[[], None], device: torch.device, trace: Path, steps: int = 3) -> Table:
    """Profile a few steps: write a Chrome trace, return the top operators as a table."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as torch_profile

    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
    step()  # warm-up
    with torch_profile(activities=activities, record_shapes=False) as profiler:
        for _ in range(steps):
            step()
    profiler.export_chrome_trace(str(trace))
    key = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    rows = sorted(profiler.key_averages(), key=lambda e: getattr(e, key), reverse=True)
    total = sum(getattr(e, key) for e in rows) or 1
    table = Table(
        "operator",
        "share",
        "ms per step",
        "calls per step",
        title=f"where the time of {steps} steps went",
    )
    for e in rows[:12]:
        own = getattr(e, key)
        table.add_row(
            e.key[:60], f"{own / total:.1%}", f"{own / 1000 / steps:.2f}", f"{e.count / steps:g}"
        )
    return table
