"""How often lmp_trial is wrong where there is nothing to find: the baseline against itself, in real
runs.

    python benchmarks/null_trials.py [--trials 6] [--pairs 9] [--plan training_plans/smoke.json]
    [--out FOLDER]

Each challenger is a copy of gpt2ish whose modules have other names. As the harness draws a module's
first numbers by its name, it is the same model from other numbers (but for the head's), on the same
data in the same order: whatever is found is luck. Each trial has runs of its own: its plan has
another seed, and so another order of the data. REAL and HARMFUL should come out in no more than one
of a hundred, which so few trials can only fail to contradict: the level itself is held by the
simulations in tests/test_verdict.py.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

GPT2ISH = Path(__file__).parents[1] / "experiments" / "gpt2ish.py"


def write_null(folder: Path, name: str) -> None:
    """The baseline under another name, its modules, too."""
    text = GPT2ISH.read_text(encoding="utf-8")
    text, renamed = re.subn(r"\bself\.(tok_embed|pos_embed|blocks)\b", rf"self.\1_{name}", text)
    assert renamed >= 6, "gpt2ish has other modules now"
    head, _, _ = text.partition("VARIANTS: dict")
    (folder / f"{name}.py").write_text(
        f'{head}VARIANTS: dict[str, dict] = {{"{name}": {{}}}}\n', encoding="utf-8"
    )


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--trials", type=int, default=6)
    p.add_argument("--pairs", type=int, default=9)
    p.add_argument(
        "--plan", type=Path, default=GPT2ISH.parents[1] / "training_plans" / "smoke.json"
    )
    p.add_argument("--out", type=Path, help="keep the runs here, and go on from them")
    args = p.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        out = args.out or Path(temporary) / "gpt_out"
        ideas = Path(temporary) / "ideas"
        ideas.mkdir()
        counts: dict[str, int] = {}
        for i in range(args.trials):
            name = f"null{i}"
            write_null(ideas, name)
            plan = json.loads(args.plan.read_text(encoding="utf-8"))
            path = Path(temporary) / f"{args.plan.stem}{i}.json"
            path.write_text(
                json.dumps(plan | {"seed": plan.get("seed", 0) + 1000 * (i + 1)}), encoding="utf-8"
            )
            words = [
                sys.executable,
                "-m",
                "lmplay.cli.trial",
                "--exp",
                name,
                "--training-plan",
                str(path),
                "--max-seeds",
                str(args.pairs),
                "--lr",
                "fixed",
                "--out",
                str(out),
            ]
            subprocess.run(
                words,
                env={**os.environ, "LMP_EXPERIMENTS": str(ideas)},
                stdout=subprocess.DEVNULL,
                check=True,
            )
            report = json.loads(
                (out / "trials" / f"{path.stem}-{name}-against-gpt2ish" / "trial.json").read_text()
            )
            v = report["arms"][name]
            counts[v["word"]] = counts.get(v["word"], 0) + 1
            print(
                f"{name}: {v['word']}, gain {v['gain']:+.4f}, p {v['p']:.3f}, {v['pairs']} pairs, "
                "deviation paired "
                f"{v['deviation_paired']:.4f}, unpaired {v['deviation_unpaired']:.4f}",
                flush=True,
            )
    wrong = counts.get("REAL", 0) + counts.get("HARMFUL", 0)
    print(f"wrong: {wrong} of {args.trials}")


if __name__ == "__main__":
    main()
