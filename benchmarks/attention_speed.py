"""Causal attention on a CPU in bfloat16: lmplay's blocks and torch's flash attention, in turns.

    python benchmarks/attention_speed.py

Milliseconds of a forward and of a forward and backward pass, medians over --rounds, each pass of
one after one of the other; and the error of both against float64, as the relative norm over the
result and the gradients of q, k and v.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable

SHAPES = ((4, 6, 256, 64), (8, 4, 256, 64), (1, 12, 1024, 64), (4, 4, 1024, 48), (32, 2, 64, 16))


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--rounds", type=int, default=20)
    args = p.parse_args()
    from lmplay.devices import tune_memory

    tune_memory()
    import torch
    import torch.nn.functional as F

    from lmplay.ops.attention import block_attention

    def flash(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    def gradients(
        attend: Callable, given: list[torch.Tensor], dtype: torch.dtype
    ) -> list[torch.Tensor]:
        q, k, v = (x.detach().to(dtype).requires_grad_() for x in given[:3])
        out = attend(q, k, v)
        out.backward(given[3].to(dtype))
        return [out.detach(), q.grad, k.grad, v.grad]

    print(
        f"{'B, H, T, h':18} {'forward: flash':>15} {'blocks':>7} {'with backward: flash':>21} "
        f"{'blocks':>7}  errors"
    )
    for b, h, t, d in SHAPES:
        given = [torch.randn(b, t, h, d).bfloat16().transpose(1, 2) for _ in range(4)]

        def forward(attend: Callable, given: list[torch.Tensor] = given) -> None:
            with torch.no_grad():
                attend(*given[:3])

        def both(attend: Callable, given: list[torch.Tensor] = given) -> None:
            gradients(attend, given, torch.bfloat16)

        ms = [median_ms(work, (flash, block_attention), args.rounds) for work in (forward, both)]
        exact = gradients(flash, given, torch.float64)
        errors = []
        for attend in (flash, block_attention):
            pairs = zip(gradients(attend, given, torch.bfloat16), exact, strict=True)
            errors.append(max(float((x - r).norm() / r.norm()) for x, r in pairs))
        print(
            f"{f'{b}, {h}, {t}, {d}':18} {ms[0][0]:15.2f} {ms[0][1]:7.2f} {ms[1][0]:21.2f} "
            f"{ms[1][1]:7.2f}  "
            f"{errors[0]:.4f} {errors[1]:.4f}",
            flush=True,
        )
    return 0


def median_ms(work: Callable, attends: tuple[Callable, ...], rounds: int) -> list[float]:
    times: dict[int, list[float]] = {i: [] for i in range(len(attends))}
    for round_number in range(rounds + 2):  # two to warm up
        for i, attend in enumerate(attends):
            began = time.perf_counter()
            work(attend)
            if round_number > 1:
                times[i].append((time.perf_counter() - began) * 1e3)
    return [statistics.median(t) for t in times.values()]


if __name__ == "__main__":
    sys.exit(main())
