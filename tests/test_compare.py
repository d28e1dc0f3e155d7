"""Aligning, smoothing and differencing; figures and tables of the command."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import Command
from scipy import stats

from lmplay.analysis import compare, figures
from lmplay.errors import LmplayError


def fake_run(
    root: Path,
    name: str,
    plan: str,
    shift: float,
    seed: int = 0,
    points: int = 40,
    every: int = 1000,
) -> Path:
    """A finished run whose loss falls like a power of the tokens, `shift` above the curve."""
    folder = root / plan / f"{name}-s{seed}"
    folder.mkdir(parents=True)
    record = {
        "identity": {"plan": f"print-of-{plan}", "variant": name, "seed": seed, "config": {}},
        "plan_name": plan,
        "baseline": "gpt2ish",
        "overrides": {},
        "summary": {"parameters": 1000, "tokens_per_second": 10.0},
    }
    (folder / "run.json").write_text(json.dumps(record))
    tokens = np.arange(1, points + 1) * every
    loss = 8 * (np.maximum(tokens, 1) / 1000) ** -0.1 + shift
    frame = pd.DataFrame(
        {
            "step": tokens // 100,
            "tokens": tokens,
            "flops": tokens * 1e6,
            "seconds": tokens / 500.0,
            "loss": loss,
            "bpb": loss / 2,
            "accuracy": 0.5 - loss / 20,
        }
    )
    for kind in ("train", "validate"):
        frame.to_csv(folder / f"{kind}.csv", index=False)
    return folder


def test_other_data_are_another_arena(tmp_path: Path) -> None:
    paths = [fake_run(tmp_path, name, "p", 0.0) for name in ("gpt2ish", "idea")]
    arenas = {compare.own_curve(p / "validate.csv").arena for p in paths}
    assert len(arenas) == 1
    record = json.loads((paths[1] / "run.json").read_text())
    record["identity"]["data"] = "more of it"  # the plan's files grew; the plan is the same
    (paths[1] / "run.json").write_text(json.dumps(record))
    assert compare.own_curve(paths[1] / "validate.csv").arena not in arenas


def test_a_run_without_its_pair_is_in_no_difference(command: Command, tmp_path: Path) -> None:
    for name, seeds in (("gpt2ish", (0, 1)), ("idea", (0, 1, 2))):
        for seed in seeds:
            fake_run(tmp_path / "gpt_out", name, "p", 0.1 * (name == "idea"), seed)
    curves, _ = compare.collect([tmp_path], "validate", 20)
    partner = compare.partners(curves, compare.baseline_of(curves, None), None)
    assert [c.name for c in compare.unpaired(curves, partner)] == ["idea-s2"]
    said = command("lmp_plotstats", "--out", "f").stdout
    assert "idea-s2: no run of gpt2ish has its seed; it is in no figure of differences" in said
    table = pd.read_csv(tmp_path / "f" / "final.csv").set_index("run")
    runs = table[table["kind"] == "run"]
    assert runs["to"].isna().to_dict() == {n: n == "idea-s2" for n in runs.index}
    # a single run that all are compared with is no pairing
    one = {c.path: curves[0] for c in curves}
    assert compare.unpaired(curves, one) == []


def test_the_oldest_runs_are_left_out_but_for_the_baseline(tmp_path: Path) -> None:
    names = ("gpt2ish", "first", "second", "third")
    for age, name in enumerate(names):
        folder = fake_run(tmp_path, name, "p", 0.0)
        os.utime(folder / "validate.csv", (age, age))
    curves, left_out = compare.collect([tmp_path], "validate", 2)
    assert [c.name for c in curves] == ["gpt2ish-s0", "second-s0", "third-s0"]
    assert [line for line in left_out if "--max-files 2" in line and "first-s0" in line] == left_out


def test_smoothing_is_causal() -> None:
    y = np.array([0.0, 0, 0, 6, 0, 0])
    assert compare.smooth(y, 3).tolist() == [0, 0, 0, 2, 2, 2]
    assert compare.smooth(y, 1).tolist() == y.tolist()


def test_difference_is_taken_where_both_are() -> None:
    x, delta = compare.difference(
        (np.array([1.0, 2, 3]), np.array([5.0, 6, 7])),
        (np.array([2.0, 3, 4]), np.array([1.0, 1, 1])),
    )
    assert x.tolist() == [2, 3]
    assert delta.tolist() == [5, 6]
    line = np.array([1.0, 10, 100])
    x, delta = compare.difference(
        (line, 3 * line), (np.array([0.5, 7, 60]), np.array([0.5, 7, 60]))
    )
    assert x[0] == 1
    assert x[-1] == pytest.approx(60)
    np.testing.assert_allclose(delta, 2 * x, rtol=1e-9)  # straight lines are interpolated exactly
    assert (
        len(
            compare.difference(
                (np.array([1.0]), np.array([1.0])), (np.array([2.0]), np.array([1.0]))
            )[0]
        )
        == 0
    )


def test_baseline_is_gpt2ish_or_the_one_named_and_never_another(tmp_path: Path) -> None:
    for name in ("ue", "gpt2ish_12"):
        fake_run(tmp_path, name, "p", 0.0, points=99)
    curves, _ = compare.collect([tmp_path], "validate", 20)
    assert compare.baseline_of(curves, None) is None, "the longest is not taken instead"
    fake_run(tmp_path, "gpt2ish", "p", 0.0)
    curves, _ = compare.collect([tmp_path], "validate", 20)
    found = compare.baseline_of(curves, None)
    assert found is not None
    assert found.variant == "gpt2ish"
    named = compare.baseline_of(curves, "ue-s0")
    assert named is not None
    assert named.variant == "ue"
    with pytest.raises(LmplayError, match="did you mean ue-s0"):
        compare.baseline_of(curves, "ue-s1")


def test_a_run_is_compared_with_the_baseline_of_its_own_seed(tmp_path: Path) -> None:
    for seed in (0, 1):
        fake_run(tmp_path, "gpt2ish", "p", 0.1 * seed, seed=seed)
    for seed in (0, 1, 2):
        fake_run(tmp_path, "ue", "p", 0.1 * seed - 0.05, seed=seed)
    curves, _ = compare.collect([tmp_path], "validate", 20)
    baseline = compare.baseline_of(curves, None)
    paired = compare.final_table(curves, compare.partners(curves, baseline, None)).set_index("run")
    assert paired.loc[["ue-s0", "ue-s1"], "loss_difference"].tolist() == pytest.approx(
        [-0.05, -0.05]
    )
    assert paired.loc["ue-s2", "to"] == "gpt2ish-s0"
    fixed = compare.final_table(curves, compare.partners(curves, baseline, "gpt2ish-s0")).set_index(
        "run"
    )
    assert fixed.loc["ue-s1", "loss_difference"] == pytest.approx(0.05)


def test_a_cut_last_line_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "train.csv"
    path.write_text("tokens,loss\n1,2.5\n2,2.25\n3,2.")
    assert compare.read_curve(path)["loss"].tolist() == [2.5, 2.25]


def test_floats_come_back_to_the_bit(tmp_path: Path) -> None:
    from lmplay.training.curves import CurveFile

    values = np.random.default_rng(0).random(300).tolist()
    curve = CurveFile(tmp_path / "c.csv", ("tokens", "loss"))
    for i, value in enumerate(values):
        curve.append({"tokens": i, "loss": value})
    assert compare.read_curve(curve.path)["loss"].tolist() == values
    with pytest.raises(LmplayError, match="extra"):
        curve.append({"tokens": 1, "loss": 1.0, "extra": 2.0})


def test_ancestors_stats_are_read(tmp_path: Path) -> None:
    (tmp_path / "old_v1_validate_stats.csv").write_text(
        "iter,accuracy,loss,tokens\n10,0.1,5.5,1000\n20,0.2,5.0,2000\n"
    )
    (tmp_path / "old_v1_train_stats.csv").write_text("iter,accuracy,loss,tokens\n10,0.1,5.6,1000\n")
    (curve,), _ = compare.collect([tmp_path], "validate", 20)
    assert curve.name == "old_v1"
    assert curve.frame["loss"].tolist() == [5.5, 5.0]


@pytest.mark.parametrize("out_type", ["png", "jpg", "svg", "pdf"])
def test_command_writes_figures_table_and_csv(
    command: Command, tmp_path: Path, out_type: str
) -> None:
    fake_run(tmp_path / "gpt_out", "gpt2ish", "laptop", 0.0)
    fake_run(tmp_path / "gpt_out", "ue", "laptop", -0.125)
    done = command("lmp_plotstats", "--out", "figures", "--out-type", out_type)
    assert done.returncode == 0, done.stderr
    expected = {
        f"log_{d}{m}.{out_type}" for d in ("", "diff_") for m in ("loss", "accuracy", "bpb")
    }
    assert {p.name for p in (tmp_path / "figures").iterdir()} == expected | {
        "final.csv",
        f"answer.{out_type}",
    }
    assert all(p.stat().st_size > 1000 for p in (tmp_path / "figures").glob("log_*"))
    table = pd.read_csv(tmp_path / "figures" / "final.csv").set_index("run")
    assert table.loc["ue-s0", "loss_difference"] == pytest.approx(-0.125)
    assert table.loc["gpt2ish-s0", "loss_difference"] == 0
    assert "single seed, no claim" in done.stdout
    assert "-0.1250" in done.stdout
    assert "ue-s0 ends 0.1250 nats per token below gpt2ish-s0 (better" in done.stdout


def test_runs_of_different_plans_are_kept_apart(command: Command, tmp_path: Path) -> None:
    fake_run(tmp_path / "gpt_out", "gpt2ish", "laptop", 0.0)
    fake_run(tmp_path / "gpt_out", "ue", "laptop", 0.1)
    fake_run(tmp_path / "gpt_out", "ue", "smoke", 0.0)
    fake_run(tmp_path / "gpt_out", "begun", "smoke", 0.0, points=1, every=0)
    done = command(
        "lmp_plotstats",
        "--out",
        "f",
        "--x",
        "flops",
        "--plot-train",
        "--plot-raw",
        "--theme",
        "dark",
    )
    assert done.returncode == 0, done.stderr
    assert "cannot be compared" in done.stdout
    assert (tmp_path / "f" / "laptop" / "log_diff_loss.png").exists()
    assert (tmp_path / "f" / "smoke" / "log_loss.png").exists()
    assert not (tmp_path / "f" / "smoke" / "log_diff_loss.png").exists()
    assert "smoke: no run of gpt2ish and no --target" in done.stdout


def test_max_files_keeps_the_newest_and_says_so(command: Command, tmp_path: Path) -> None:
    for age, name in enumerate(("value_norm", "gpt2ish", "ue")):
        folder = fake_run(tmp_path / "gpt_out", name, "laptop", 0.0)
        os.utime(folder / "validate.csv", (1e9 - age, 1e9 - age))
    done = command("lmp_plotstats", "--max-files", "2")
    assert "left out (--max-files 2)" in done.stdout
    assert "ue-s0" in done.stdout.split("left out")[0]
    one = command("lmp_plotstats", "--target", "nobody")
    assert one.returncode == 1
    assert "no such run" in one.stderr


def comparison_of(folder: Path) -> compare.Comparison:
    curves, _ = compare.collect([folder], "validate", 200)
    (comparison,) = compare.compare_runs(curves)
    return comparison


def content_of(folder: Path, diff: bool) -> figures.Content:
    comparison = comparison_of(folder)
    style = figures.Style()
    groups = figures._groups(comparison, "loss", style, diff)
    null = figures._null(comparison, "loss", style) if diff else None
    return figures.Content(comparison, "loss", style, diff, groups, null)


def test_every_curve_has_its_own_color(tmp_path: Path) -> None:
    for i in range(figures.MAX_CURVES):
        fake_run(tmp_path, f"v{i}", "p", 0.0)
    fake_run(tmp_path, "v0", "p", 0.0, seed=1)
    fake_run(tmp_path, "gpt2ish", "p", 0.0)
    content = content_of(tmp_path, diff=False)
    looks = figures.looks_of(content.groups, content.comparison.baseline)
    colors = [color for color, _ in looks.values()]
    assert len(set(colors)) == len(colors) == figures.MAX_CURVES + 1, "seeds share theirs"
    assert looks["gpt2ish"][0] == figures.GREY


@pytest.mark.parametrize(("settings", "bands"), [(8, 8), (9, 0)])
def test_many_bands_would_hide_the_curves_and_are_left_out(
    tmp_path: Path, settings: int, bands: int
) -> None:
    for i in range(settings):
        for seed in (0, 1):
            fake_run(tmp_path, f"v{i}", "p", 0.1 * i + 0.01 * seed, seed)
    path = tmp_path / "loss.svg"
    assert figures.draw(path, comparison_of(tmp_path), "loss", figures.Style(form="curves"), False)
    svg = path.read_text()  # it names each artist and, in comments, each text
    assert svg.count('id="FillBetweenPolyCollection') == bands
    assert ("95 % interval of the mean" in svg) == (bands > 0)
    assert ("no bands for more than 8 settings" in svg) == (bands == 0)


@pytest.mark.parametrize("form", ["auto", "curves", "dots"])
@pytest.mark.parametrize("settings", [1, 8, 9])
def test_many_settings_are_drawn_as_dots(tmp_path: Path, settings: int, form: str) -> None:
    for i in range(settings):
        fake_run(tmp_path, f"v{i}", "p", 0.1 * i)
    fake_run(tmp_path, "gpt2ish", "p", 0.2)
    path = tmp_path / "diff.svg"
    style = figures.Style(form=form)
    assert figures.draw(path, comparison_of(tmp_path), "loss", style, diff=True)
    svg = path.read_text()
    dots = form == "dots" or (form == "auto" and settings > figures.MAX_CURVES)
    assert ("at the end (lower is better)" in svg) == dots, "the dots' axis label"
    assert ("training tokens" in svg) == (not dots), "the curves' axis label"


def test_titles_answer_a_question(tmp_path: Path) -> None:
    fake_run(tmp_path, "gpt2ish", "laptop", 0.0)
    fake_run(tmp_path, "ue", "laptop", 0.11)
    title = figures.title(content_of(tmp_path, diff=True))
    assert title == "ue vs gpt2ish on laptop: +0.11 nats, 1 seed, no claim"
    for seed in (1, 2):
        fake_run(tmp_path, "gpt2ish", "laptop", 0.01 * seed, seed)
        fake_run(tmp_path, "ue", "laptop", 0.11 + 0.012 * seed, seed)
    title = figures.title(content_of(tmp_path, diff=True))
    assert title.startswith("ue vs gpt2ish on laptop: +0.112 nats, 3 seeds, ± ")
    fake_run(tmp_path, "idea", "laptop", -0.2)
    title = figures.title(content_of(tmp_path, diff=True))
    assert title == "Best of 2 vs gpt2ish on laptop: idea, -0.2 nats, 1 seed, no claim"
    assert figures.title(content_of(tmp_path, diff=False)).startswith("idea ends best of 3")


def test_bands_are_students_and_one_seed_has_none() -> None:
    random = np.random.default_rng(0)
    x = np.arange(1.0, 6)
    ys = random.normal(3, 0.1, (4, 5))
    found = compare.band([(x, y) for y in ys])
    assert found is not None
    for i in range(5):
        low, high = stats.t.interval(0.95, 3, loc=ys[:, i].mean(), scale=stats.sem(ys[:, i]))
        assert (found.mean[i] - found.half[i], found.mean[i] + found.half[i]) == pytest.approx(
            (low, high)
        )
    assert compare.band([(x, ys[0])]) is None
    assert compare.band([(x, ys[0]), (x + 4.5, ys[1])]) is None, "they do not overlap"
    begun = compare.band([*((x, y) for y in ys), (x[:2], ys[0, :2])])
    assert begun is not None
    assert begun.x.tolist() == x.tolist(), "a run that has just begun does not end the others' band"


def test_the_null_band_holds_95_percent_of_the_differences_of_two_seeds() -> None:
    random = np.random.default_rng(1)
    x = np.arange(2000.0)
    seeds = random.normal(3, 0.1, (5, len(x)))  # each point is an experiment of its own
    found = compare.null_band([(x, y) for y in seeds])
    assert found is not None
    two = random.normal(3, 0.1, (2, len(x)))
    assert np.mean(np.abs(two[0] - two[1]) <= found.half) == pytest.approx(0.95, abs=0.015)


def test_runs_of_edited_code_are_no_seeds_of_each_other(tmp_path: Path) -> None:
    for seed, code in ((0, "aaaaaaaa"), (1, "aaaaaaaa"), (2, "bbbbbbbb")):
        record = json.loads(
            (fake_run(tmp_path, "ue", "p", 0.0, seed=seed) / "run.json").read_text()
        )
        record["identity"]["experiment"] = code
        (tmp_path / "p" / f"ue-s{seed}" / "run.json").write_text(json.dumps(record))
    curves, _ = compare.collect([tmp_path], "validate", 20)
    found = compare.families(curves)
    assert {name: sorted(str(c.seed) for c in seeds) for name, seeds in found.items()} == {
        "ue (aaaaaa)": ["0", "1"],
        "ue (bbbbbb)": ["2"],
    }
