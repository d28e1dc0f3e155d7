"""What the hardware can do: device, precision, memory."""

from __future__ import annotations

import ctypes
import os
import platform
import resource
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .errors import LmplayError

if TYPE_CHECKING:
    import torch


def tune_memory() -> str:
    """Make the C library keep and reuse memory, in large pages, instead of returning it between operations.

    On Linux every fresh page of a large tensor costs a fault, at a rate of about 1 GB/s where reused
    memory is written at 10 and more; a training step without this makes gigabytes of them. Call it before
    torch is imported, which reads its setting then. Returns what was done, for the run's record.
    """
    if not _glibc():
        return "default"
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    mallopt = ctypes.CDLL(None).mallopt
    m_trim_threshold, m_top_pad, m_mmap_max = -1, -2, -4  # malloc.h
    done = mallopt(m_mmap_max, 0) and mallopt(m_trim_threshold, 2**31 - 1) and mallopt(m_top_pad, 64 * 2**20)
    return "kept and in large pages" if done else "default"


def _glibc() -> bool:
    return sys.platform == "linux" and platform.libc_ver()[0] == "glibc"


def release_memory() -> None:
    """Give the free memory that :func:`tune_memory` makes the C library keep back to the system, once.

    For after work whose tensors are of other sizes than what follows: they would leave holes that it cannot use.
    """
    if _glibc():
        ctypes.CDLL(None).malloc_trim(0)


@dataclass(frozen=True)
class Precision:
    """How the forward pass computes. `name` is fp32, bf16 or fp16; `scale` asks for a gradient scaler."""

    name: str
    note: str = ""

    @property
    def scale(self) -> bool:
        return self.name == "fp16"

    @property
    def dtype(self) -> torch.dtype | None:
        import torch

        return {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[self.name]


def pick_device(name: str) -> torch.device:
    """The device for auto, cpu, cuda or mps.

    Raises:
        LmplayError: this machine does not have it.
    """
    import torch

    have = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(n for n in ("cuda", "mps", "cpu") if have[n])
    if not have[name]:
        there = ", ".join(n for n, h in have.items() if h)
        raise LmplayError(f"--device {name}: torch sees no such device here (there is: {there})")
    return torch.device(name)


def pick_precision(device: torch.device, amp: bool) -> Precision:
    """bf16 where the hardware computes it, fp16 on older CUDA cards, else fp32 with a note."""
    import torch

    if not amp:
        return Precision("fp32")
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return Precision("bf16")
        return Precision("fp16", "--amp: this card has no bf16: fp16 with a gradient scaler")
    if device.type == "mps":
        return Precision("bf16")
    native = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    if native or (platform.machine() in ("arm64", "aarch64") and torch.ops.mkldnn._is_mkldnn_bf16_supported()):
        return Precision("bf16")
    return Precision("fp32", "--amp: this CPU has no bf16 arithmetic (emulated it is far slower): float32 is used")


def peak_memory_mb(device: torch.device) -> float:
    """The most memory held so far: of the device's allocator on CUDA, else of this process."""
    import torch

    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


def describe_device(device: torch.device) -> str:
    """What computes, for the run's record."""
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{platform.machine()} {device.type}, {cores} cores, {torch.get_num_threads()} threads"
