"""How fast the page opens: a hundred runs of ten thousand steps, written, gathered and opened in
headless Chromium.

    python benchmarks/page_speed.py [--runs 100] [--points 10000] [--rounds 5]

Times are from the start of the navigation, by the browser's own clock, until table, verdicts and
controls can be read, and until the figure is drawn; medians of the rounds, each in a browser of its
own. It needs playwright and a Chromium.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd

from lmplay.analysis.page.gather import gather
from lmplay.analysis.page.write import write

QUIET = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
]


def make_runs(root: Path, runs: int, points: int) -> None:
    """Five seeds each of as many ideas as it takes; validations are a hundredth of the steps."""
    random = np.random.default_rng(0)
    tokens = np.arange(1, points + 1) * 2048
    for i in range(runs):
        idea = "gpt2ish" if i < 5 else f"idea{i // 5}"
        seed = i % 5
        folder = root / "plan" / f"{idea}-s{seed}"
        folder.mkdir(parents=True)
        loss = 8 * (tokens / 2048) ** -0.1 + random.normal(0, 0.05, points)
        frame = pd.DataFrame(
            {
                "step": tokens // 2048,
                "tokens": tokens,
                "flops": tokens * 1e6,
                "seconds": tokens / 5e3,
                "loss": loss,
                "bpb": loss / 2,
                "accuracy": 0.5 - loss / 20,
            }
        )
        frame.to_csv(folder / "train.csv", index=False)
        frame[::100].to_csv(folder / "validate.csv", index=False)
        identity = {
            "plan": "p",
            "variant": idea,
            "seed": seed,
            "config": {"width": i},
            "experiment": idea,
        }
        (folder / "run.json").write_text(
            json.dumps({"identity": identity, "plan_name": "plan", "summary": {}})
        )


def opened(path: Path) -> tuple[float, float, float]:
    """Seconds until the table and verdicts and until the figure, and for switching it to the
    training curves."""
    from playwright.sync_api import sync_playwright

    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        raise SystemExit("no Chromium here (Debian: apt-get install chromium)")
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=chromium, args=QUIET)
        tab = browser.new_page()
        tab.goto(path.as_uri())
        tab.wait_for_selector("#figure .main-svg")
        figure = tab.evaluate("performance.getEntriesByName('figure')[0].startTime")
        paint = tab.evaluate("performance.getEntriesByName('read')[0].startTime")
        switched = tab.evaluate(
            "() => { const t = performance.now(), s = document.getElementById('kind'); s.value = "
            "'train';"
            "s.dispatchEvent(new Event('change')); return performance.now() - t; }"
        )
        browser.close()
    return paint / 1000, figure / 1000, switched / 1000


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--runs", type=int, default=100)
    p.add_argument("--points", type=int, default=10_000)
    p.add_argument("--rounds", type=int, default=5)
    args = p.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        make_runs(Path(folder) / "gpt_out", args.runs, args.points)
        began = time.perf_counter()
        content, _ = gather([Path(folder) / "gpt_out"], 2 * args.runs)
        write(Path(folder) / "page.html", content)
        gathered = time.perf_counter() - began
        path = Path(folder) / "page.html"
        rounds = [opened(path) for _ in range(args.rounds)]
        print(f"{args.runs} runs of {args.points} steps: {path.stat().st_size / 1e6:.1f} MB")
        print(f"gathered and written in {gathered:.2f} s")
        for what, times in zip(
            ("table and verdicts", "figure drawn", "switched to training curves"),
            zip(*rounds, strict=True),
            strict=True,
        ):
            print(
                f"{what}: {statistics.median(times):.2f} s ({min(times):.2f} to {max(times):.2f})"
            )


if __name__ == "__main__":
    main()
