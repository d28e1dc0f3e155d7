"""The leaderboard: judge an idea as every row of the table in docs/results.md was, and make it.

    python benchmarks/leaderboard.py run gqa --workers 2          # `make leaderboard ROW=gqa`
    python benchmarks/leaderboard.py run all --workers 2
    python benchmarks/leaderboard.py collect                      # results of trials -> one file
    python benchmarks/leaderboard.py page                         # that file -> table and figure

The rows are in leaderboard.json, the results in leaderboard_results.json. A row is a trial that
`lmp_trial` makes; --plan laptop judges it there.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lmplay.analysis.answer import Row, draw_answer
from lmplay.errors import did_you_mean
from lmplay.files import read_json, write_json
from lmplay.plan import find_plan
from lmplay.trial.certificate import read_certificates
from lmplay.trial.resolve import Arm
from lmplay.trial.transfer import rank_correlation

HERE = Path(__file__).parent
ROWS = HERE / "leaderboard.json"
RESULTS = HERE / "leaderboard_results.json"
PAGE = HERE.parent / "docs" / "results.md"
FIGURE = HERE.parent / "docs" / "leaderboard.png"
BEGIN, END = "<!-- leaderboard -->\n", "<!-- end of the leaderboard -->\n"
RATE = 0.05  # of the words REAL and HARMFUL in the table, how many may be wrong (expected share)


@dataclass(frozen=True)
class Entry:
    """A row: what is judged against what, and how.

    arm, against: as `lmp_trial --arm` and `--against` take them; None: the idea's own baseline.
    """

    name: str
    kind: str
    arm: str
    against: str | None
    panel: bool

    def arguments(self, plan: str, of_plan: Mapping[str, Any]) -> list[str]:
        """Return the arguments of lmp_trial."""
        found = ["--arm", self.arm, "--training-plan", plan]
        found += ["--against", self.against] if self.against else []
        found += [] if self.panel and of_plan.get("panel", True) else ["--no-panel"]
        return [*found, "--max-seeds", str(of_plan["max_seeds"])]


def entries() -> tuple[dict[str, Entry], dict[str, Any]]:
    """Return the rows by name, and how each plan judges."""
    content = json.loads(ROWS.read_text())
    rows = {
        row["row"]: Entry(
            row["row"],
            row["kind"],
            row.get("arm", row["row"]),
            row.get("against"),
            row.get("panel", True),
        )
        for row in content["rows"]
    }
    return rows, content["plans"]


def run(names: Sequence[str], plan: str, more: Sequence[str]) -> int:
    """Judge rows, one after the other; return the exit status."""
    rows, plans = entries()
    for name in rows if list(names) == ["all"] else names:
        if name not in rows:
            print(f"leaderboard: {name}: there is no such row{did_you_mean(name, rows)}")
            return 2
        if plan not in plans:
            print(f"leaderboard: --plan {plan}: rows are judged on {', '.join(plans)}")
            return 2
        arguments = [*rows[name].arguments(plan, plans[plan]), *more]
        print("lmp_trial " + " ".join(f"'{a}'" if " " in a else a for a in arguments), flush=True)
        command = [sys.executable, "-m", "lmplay.cli.trial", *arguments]
        if status := subprocess.run(command, check=False).returncode:
            return status
    return 0


def collect(out: Path) -> None:
    """Add the results of finished trials below `out` to the file of results."""
    known: dict[str, Any] = read_json(RESULTS) if RESULTS.exists() else {}
    rows, plans = entries()
    reports = [read_json(path) for path in sorted((out / "trials").glob("*/trial.json"))]
    for name, entry in rows.items():
        arm = Arm.parse(entry.arm, "row").label
        for report in reports:
            design = report["design"]
            against = Arm.parse(entry.against, "row").label if entry.against else design["against"]
            own = (design["arms"], design["against"]) == ([arm], against)
            if not own or design["plan"] not in plans or not report["over"]:
                continue
            if arm not in report["arms"] or report["arms"][arm]["gain"] is None:
                continue
            context = design["context"] or "muon"
            key = f"{design['plan']} {context}"
            known.setdefault(name, {})[key] = distilled(report, arm, out)
    write_json(RESULTS, dict(sorted(known.items())))
    print(f"{RESULTS}: {sum(len(v) for v in known.values())} results of {len(known)} ideas")


def distilled(report: Mapping[str, Any], arm: str, out: Path) -> dict[str, Any]:
    """Return what the table needs of a trial."""
    v = report["arms"][arm]
    pairs = list(zip(v["runs"], report["runs"], strict=False))
    ratios: dict[str, list[float]] = {"seconds": [], "peak_memory_mb": []}
    for own, base in pairs:
        summaries = [read_json(out / folder / "run.json")["summary"] for folder in (own, base)]
        for key, values in ratios.items():
            values.append(summaries[0][key] / summaries[1][key])
    keys = ("word", "gain", "low", "high", "p", "pairs", "tuned", "tokens_ratio", "lr_multiplier")
    return {
        **{key: v[key] for key in keys},
        "against": report["design"]["against"],
        "deviation_paired": v["deviation_paired"],
        "seconds": statistics.median(ratios["seconds"]),
        "memory": statistics.median(ratios["peak_memory_mb"]),
        "precision": report["design"]["precision"],
    }


def surviving(p_values: Mapping[Any, float], rate: float = RATE) -> set[Any]:
    """Return the keys that Benjamini and Hochberg (1995) reject at a false discovery rate."""
    ranked = sorted(p_values, key=lambda key: p_values[key])
    last = 0
    for rank, key in enumerate(ranked, start=1):
        if p_values[key] <= rank / len(ranked) * rate:
            last = rank
    return set(ranked[:last])


def table(results: Mapping[str, Any]) -> str:
    """Return the table in Markdown: the largest mean gain on sketch first."""
    rows, _ = entries()
    columns = ["sketch muon", "sketch adamw", "laptop muon"]
    p_values = {
        (name, key): found["p"] for name, own in results.items() for key, found in own.items()
    }
    kept = surviving(p_values)
    lines = [
        "| idea | kind | against | "
        + " | ".join(columns)
        + " | panel | % of tokens | time | memory |",
        "|---" * (7 + len(columns)) + "|",
    ]

    def mean_gain(name: str) -> float:
        gains = [f["gain"] for key, f in results[name].items() if key.startswith("sketch")]
        return statistics.mean(gains) if gains else float("-inf")

    for name in sorted((n for n in rows if n in results), key=mean_gain, reverse=True):
        own = results[name]
        cells = [_cell(own.get(key), (name, key) in kept) for key in columns]
        on_sketch = [f for key, f in own.items() if key.startswith("sketch")]
        words = {f["word"] for f in on_sketch}
        robust = len(words) == 1 and "UNDECIDED" not in words
        panel = "" if len(on_sketch) < 2 else "ROBUST" if robust else "differs"
        one = own.get("sketch muon") or next(iter(own.values()))
        ratio = one["tokens_ratio"]
        tokens = "" if ratio is None else f"{100 * (ratio - 1):+.0f} %"
        lines.append(
            f"| `{name}` | {rows[name].kind} | {one['against'].split('-')[0]} | "
            + " | ".join(cells)
            + f" | {panel} | {tokens} | {one['seconds']:.2f} | {one['memory']:.2f} |"
        )
    return "\n".join(lines) + "\n"


def _cell(found: Mapping[str, Any] | None, kept: bool) -> str:
    if found is None:
        return ""
    claims = found["word"] in ("REAL", "HARMFUL")
    mark = "†" if claims and not kept else ""
    bold = "**" if claims and kept else ""
    return f"{bold}{found['gain']:+.4f}{bold} {found['word']}{mark}"


def correlation(results: Mapping[str, Any]) -> str:
    """Return a sentence on how well sketch predicts laptop."""
    both = [
        (own["sketch muon"]["gain"], own["laptop muon"]["gain"])
        for own in results.values()
        if {"sketch muon", "laptop muon"} <= own.keys()
    ]
    if len(both) < 8:
        return f"{len(both)} ideas were judged on both plans; eight are needed for a correlation.\n"
    rank = rank_correlation(*map(list, zip(*both, strict=True)))
    return f"Rank correlation of the gains on sketch and laptop: {rank:.2f} ({len(both)} ideas).\n"


def page() -> None:
    """Write the table between its marks in docs/results.md, and the figure."""
    results = read_json(RESULTS)
    text = PAGE.read_text()
    if BEGIN not in text or END not in text:
        raise SystemExit(f"{PAGE}: the marks of the leaderboard are missing")
    content = BEGIN + "\n" + table(results) + "\n" + correlation(results) + "\n" + END
    PAGE.write_text(
        re.sub(re.escape(BEGIN) + ".*" + re.escape(END), lambda _: content, text, flags=re.S)
    )
    shown = [
        Row(name, f["gain"], f["low"], f["high"], f"{f['pairs']} pairs", f["word"])
        for name, own in results.items()
        if (f := own.get("sketch muon")) is not None
    ]
    certificate = read_certificates(find_plan("sketch")).get("fp32")
    draw_answer(FIGURE, "sketch", "modern", shown, certificate)
    print(f"{PAGE}\n{FIGURE}")


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("what", choices=("run", "list", "collect", "page"))
    p.add_argument("rows", nargs="*", metavar="ROW", help='rows to run, or "all"')
    p.add_argument("--plan", default="sketch", help="the plan (sketch)")
    p.add_argument("--workers", default="1", help="processes on this machine (1)")
    p.add_argument("--out", type=Path, default=Path("gpt_out"), help="where runs are (gpt_out)")
    args = p.parse_args()
    if args.what == "run":
        if not args.rows:
            p.error('name a row, or "all"; list shows them')
        return run(args.rows, args.plan, ["--workers", args.workers, "--out", str(args.out)])
    if args.what == "list":
        rows, _ = entries()
        for entry in rows.values():
            print(f"{entry.name:20} {entry.kind:18} {entry.arm}")
    elif args.what == "collect":
        collect(args.out)
    else:
        page()
    return 0


if __name__ == "__main__":
    sys.exit(main())
