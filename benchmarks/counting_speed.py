"""Time and peak memory of the count tables of 10 million tokens.

    python benchmarks/counting_speed.py

Tokens are drawn from Zipf's law, each pair of neighbors correlated, with a vocabulary of 4,096.
"""

from __future__ import annotations

import argparse
import resource
import time

import numpy as np

from lmplay.data.counting import CountTables

VOCABULARY = 4096
LENGTH = 257


def main() -> None:
    parser = argparse.ArgumentParser(description="Time count tables.")
    parser.add_argument("--tokens", type=int, default=10_000_000)
    args = parser.parse_args()
    rng = np.random.default_rng(0)
    drawn = np.minimum(rng.zipf(1.2, args.tokens), VOCABULARY) - 1
    drawn[1::2] = (drawn[::2][: len(drawn[1::2])] + drawn[1::2] % 7) % VOCABULARY
    rows = drawn[: args.tokens // LENGTH * LENGTH].reshape(-1, LENGTH).astype(np.int64)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    began = time.perf_counter()
    tables = CountTables(rows, VOCABULARY)
    counted = time.perf_counter() - began
    held_out = rows[:1000]
    began = time.perf_counter()
    losses = tables.loss_sums(held_out[:, :-1], held_out[:, 1:]) / held_out[:, 1:].size
    tested = time.perf_counter() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    print(f"tokens: {rows.size}\nseconds: {counted:.1f}\nseconds_of_{held_out.size}: {tested:.2f}")
    print(f"peak_mb: {peak:.0f} (of which {before:.0f} before)\nlosses: {losses.round(3)}")


if __name__ == "__main__":
    main()
