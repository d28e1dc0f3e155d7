"""Device, precision and memory of this machine."""

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
    """Make the C library keep and reuse memory, in large pages. Call it before importing torch.

    On Linux a fresh page costs a page fault: about 1 GB/s, while reused memory is written at 10
    GB/s and more. A training step without this setting faults gigabytes of pages. torch reads its
    own setting when it is imported.

    Returns:
        What was done, for the run's record.
    """
    if not _glibc():
        return "default"
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    mallopt = ctypes.CDLL(None).mallopt
    # malloc.h
    m_trim_threshold = -1
    m_top_pad = -2
    m_mmap_max = -4
    done = (
        mallopt(m_mmap_max, 0)
        and mallopt(m_trim_threshold, 2**31 - 1)
        and mallopt(m_top_pad, 64 * 2**20)
    )
    return "kept and in large pages" if done else "default"


def _glibc() -> bool:
    return sys.platform == "linux" and platform.libc_ver()[0] == "glibc"


def release_memory() -> None:
    """Return free memory to the system once, although :func:`tune_memory` keeps it.

    Use it after work with tensors of other sizes, which would leave holes that cannot be reused.
    """
    if _glibc():
        ctypes.CDLL(None).malloc_trim(0)


@dataclass(frozen=True)
class Precision:
    """Precision of the forward pass: fp32, bf16 or fp16."""

    name: str
    note: str = ""

    @property
    def scale(self) -> bool:
        """Whether the loss must be scaled to keep small gradients from becoming 0."""
        return self.name == "fp16"

    @property
    def dtype(self) -> torch.dtype | None:
        import torch

        return {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[self.name]


def pick_device(name: str) -> torch.device:
    """Return the device for auto, cpu, cuda or mps.

    Raises:
        LmplayError: this machine does not have it.
    """
    import torch

    have = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if name == "auto":
        name = next(n for n in ("cuda", "mps", "cpu") if have[n])
    if not have[name]:
        there = ", ".join(n for n, h in have.items() if h)
        raise LmplayError(f"--device {name}: torch sees no such device here (there is: {there})")
    return torch.device(name)


def has_bf16(device: torch.device) -> bool:
    """Return whether the hardware computes in bfloat16, instead of emulating it."""
    import torch

    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "mps":
        return True
    if platform.machine() in ("arm64", "aarch64"):
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()


def pick_precision(device: torch.device, amp: bool) -> Precision:
    """Return bf16 if the hardware computes it, fp16 on older CUDA cards, else fp32 with a note."""
    if not amp:
        return Precision("fp32")
    if has_bf16(device):
        return Precision("bf16")
    if device.type == "cuda":
        return Precision("fp16", "--amp: this card has no bf16: fp16 with a gradient scaler")
    return Precision(
        "fp32",
        "--amp: this CPU has no bf16 arithmetic (emulated it is far slower): float32 is used",
    )


def check_compiler(device: torch.device) -> None:
    """Check that torch.compile has the C++ compiler that it needs on a CPU.

    Raises:
        LmplayError: there is none.
    """
    if device.type != "cpu":
        return
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except (InvalidCxxCompiler, OSError) as e:
        raise LmplayError(
            "--compile-model: torch finds no C++ compiler: install g++ or clang, or set CXX to one"
        ) from e


def peak_memory_mb(device: torch.device) -> float:
    """Return the peak memory in MB: of the CUDA allocator, or of this process."""
    import torch

    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


def describe_device(device: torch.device) -> str:
    """Return the device's name for the run's record."""
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{platform.machine()} {device.type}, {cores} cores, {torch.get_num_threads()} threads"
