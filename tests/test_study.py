"""Studies: grids, lists and searches of settings, their scores and their pictures."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
from conftest import Command, one_line, write_plan

from lmplay.analysis import study_figures
from lmplay.data.packing import ValidationSet
from lmplay.data.prepare import prepare
from lmplay.files import read_json
from lmplay.plan import load_plan
from lmplay.training.restore import restore
from lmplay.training.run_folder import RunFolder, find_runs
from lmplay.trial import positions, study_plan
from lmplay.trial.design import Result, Unit
from lmplay.trial.study import Study, StudyDesign, StudyState
from lmplay.trial.tuning import parsed


def write_study(folder: Path, **content: Any) -> Path:
    path = folder / "study.json"
    path.write_text(json.dumps({"arms": ["modern"], "training_plans": ["tiny.json"], **content}))
    return path


def tiny(folder: Path) -> Path:
    return write_plan(folder, steps=[{"step_name": "words", "datasets": ["words"], "tokens": 2048}])


def test_a_grid_is_made_once_and_may_grow(command: Command, tmp_path: Path) -> None:
    tiny(tmp_path)
    write_study(tmp_path, settings={"rotary_base": [100, 10000]}, by_position=True)
    done = command("lmp_study", "study.json")
    assert done.returncode == 0, done.stderr
    assert "tiny: 2 cells" in done.stdout
    assert "rotary_base=100" in done.stdout
    folder = tmp_path / "gpt_out/studies/study"
    assert {p.name for p in folder.glob("*.png")} == {"tiny-loss.png", "tiny-by-position.png"}
    runs = {r.path: (r.path / "train.csv").stat().st_mtime for r in find_runs(tmp_path / "gpt_out")}
    assert len(runs) == 2

    write_study(tmp_path, settings={"rotary_base": [100, 1000, 10000]}, by_position=True)
    one_line(command("lmp_study", "study.json", "--status"), "without --status it begins")
    more = command("lmp_study", "study.json")
    assert "tiny: 3 cells" in more.stdout
    later = {
        r.path: (r.path / "train.csv").stat().st_mtime for r in find_runs(tmp_path / "gpt_out")
    }
    assert len(later) == 3
    assert runs.items() <= later.items(), "finished runs are not made again"
    known = command("lmp_study", "study.json", "--status")
    assert known.returncode == 0
    assert known.stdout.splitlines()[:4] == more.stdout.splitlines()[-6:-2]

    (part,) = read_json(folder / "study.json")["parts"]
    for cell in part["cells"]:
        record = RunFolder(Path(tmp_path / cell["folder"])).read()
        assert record["summary"]["val_loss"] == cell["loss"]
        assert record["summary"]["val_accuracy"] == cell["accuracy"]
        bins = cell["by_position"]
        assert [b["from"] for b in bins] == positions.edges_of(bins[-1]["to"])[:-1]


def test_lengths_and_plans_are_arenas(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    plan = load_plan(tiny(tmp_path))
    assert plan.model.max_len == 32
    path = write_study(tmp_path, lengths=[8, 16], tokens_per_step=64, tokens=1024)
    study = Study(str(path), log=lambda text: None)
    assert [part.design.length for part in study.parts] == [8, 16]
    plans = [next(iter(part.jobs.values())).plan for part in study.parts]
    assert [(p.model.max_len, p.batch.batch_size) for p in plans] == [(8, 8), (16, 4)]
    assert len({part.design.plan_fingerprint for part in study.parts}) == 2
    report = study.run()
    assert [len(part["cells"]) for part in report["parts"]] == [1, 1]
    assert [Path(p).name for p in report["pictures"]] == []  # one cell is no picture


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ({"setings": {}}, "setings: there is no such key (did you mean settings?)"),
        ({"settings": {"rotary_base": {"low": 1.0, "high": 2.0}}}, "a range needs"),
        ({"settings": {"rotary_bas": [1]}}, "rotary_bas"),
        ({"settings": {"optimizer.lrr": [1]}}, "did you mean optimizer.lr?"),
        ({"settings": {"rotary_base": [1, 1]}}, "there twice"),
        ({"search": "tpe"}, "there is nothing to search"),
        ({"search": "bayes"}, "search: Input should be 'grid', 'random' or 'tpe'"),
        ({"training_plans": ["tinny"]}, "--training-plan tinny: there is none"),
        ({"arms": ["modrn"]}, "did you mean modern?"),
        ({"lengths": [7]}, "sequences of 7 do not divide"),
        (
            {"search": "random", "settings": {"rotary_base": {"low": 3.0, "high": 2.0}}},
            "low 3 is not below high 2",
        ),
    ],
)
def test_a_wrong_study_is_one_line(
    content: dict[str, Any], says: str, command: Command, tmp_path: Path
) -> None:
    tiny(tmp_path)
    write_study(tmp_path, **content)
    one_line(command("lmp_study", "study.json"), says)


def test_unknown_and_shipped_studies(command: Command) -> None:
    one_line(command("lmp_study", "rope_thetta"), "did you mean rope_theta?")
    one_line(command("lmp_study", "nowhere.json"), "there is no such file")
    listed = command("lmp_study", "list")
    assert "rope_theta" in listed.stdout
    for path in study_plan.study_files().values():
        assert study_plan.load_study(path).description


# ---------------------------------------------------------------- searches

SPACE: dict[str, Any] = {
    "optimizer.lr": {"low": 1e-4, "high": 1.0, "log": True, "integer": False},
    "num_blocks": {"low": 1.0, "high": 8.0, "log": False, "integer": True},
    "activation": ["gelu", "relu"],
}


def design(search: str, tries: int) -> StudyDesign:
    return StudyDesign(
        plan="p",
        plan_fingerprint="0" * 16,
        against="",
        arms=("base",),
        level=0.01,
        max_pairs=0,
        smallest_effect=0.005,
        tuned=False,
        controls=(),
        tokens=1000,
        precision="fp32",
        device="cpu",
        data="d",
        sources={},
        search=search,
        tries=tries,
        seeds=(0, 1),
        space=SPACE,
        cells={"base": {"activation": "gelu"}},
    )


def world(unit: Unit) -> Result:
    """A loss with its least at lr .01, 5 blocks and relu."""
    values = parsed(unit.settings)
    loss = math.log10(float(values["optimizer.lr"]) / 0.01) ** 2
    loss += 0.1 * (int(values["num_blocks"]) - 5) ** 2 + (values["activation"] == "gelu")
    return Result(loss + 0.01 * unit.seed, loss, [0], [loss], 1.0, 1.0, "f", 0.5)


def finished(search: str, tries: int, order: int = 1) -> StudyState:
    results: dict[str, Result] = {}
    while units := StudyState(design(search, tries), results).needed():
        for unit in units[::order]:
            assert unit.key not in results
            results[unit.key] = world(unit)
    return StudyState(design(search, tries), results)


@pytest.mark.parametrize("search", ["random", "tpe"])
def test_a_search_makes_its_tries_in_range_whatever_the_order(search: str) -> None:
    states = [finished(search, 24, order) for order in (1, -1)]
    texts = [state.tries() for state in states]
    assert texts[0] == texts[1]
    assert len(texts[0]) == 24
    assert len(states[0].results) == 2 * len(set(texts[0])), "each with both seeds"
    for text in texts[0]:
        values = parsed(text)
        assert 1e-4 <= float(values["optimizer.lr"]) <= 1
        assert 1 <= int(values["num_blocks"]) <= 8
        assert values["activation"] in ("gelu", "relu")
    report = states[0].report()
    losses = [cell["loss"] for cell in report["cells"]]
    assert losses == sorted(losses)
    assert report["missing"] == 0
    best = report["cells"][0]
    assert best["loss"] == pytest.approx(world_loss(best["settings"]) + 0.005)


def world_loss(settings: dict[str, str]) -> float:
    text = ",".join(f"{k}={v}" for k, v in settings.items())
    return world(Unit("study", "base", 0, settings=text)).loss


def test_tpe_tries_what_optunas_own_loop_tries() -> None:
    state = finished("tpe", 18)
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=0, n_startup_trials=10))
    distributions = {
        "optimizer.lr": optuna.distributions.FloatDistribution(1e-4, 1, log=True),
        "num_blocks": optuna.distributions.IntDistribution(1, 8),
        "activation": optuna.distributions.CategoricalDistribution(["gelu", "relu"]),
    }
    tried = []
    for count in (10, 4, 4):
        asked = [study.ask(distributions) for _ in range(count)]
        for trial in asked:
            p = trial.params
            settings = {**p, "optimizer.lr": f"{p['optimizer.lr']:.4g}"}
            tried.append(
                f"activation={p['activation']},num_blocks={p['num_blocks']},"
                f"optimizer.lr={settings['optimizer.lr']}"
            )
            study.tell(trial, world_loss({k: str(v) for k, v in settings.items()}) + 0.005)
    assert state.tries() == tried
    best = [finished(s, 40).report()["cells"][0]["loss"] for s in ("tpe", "random")]
    assert best[0] < best[1], "what was found before helps"


def test_a_search_draws_optunas_plots(tmp_path: Path) -> None:
    part = {**finished("random", 12).report()}
    written = study_figures.draw_study(tmp_path, {"parts": [part]})
    names = {path.name for path in written}
    assert names == {"p-parallel.png", "p-slice.png", "p-importance.png"}, "no heat map of holes"
    assert all(path.stat().st_size > 5000 for path in written)


def test_a_search_trains(command: Command, tmp_path: Path) -> None:
    tiny(tmp_path)
    ranges = {"optimizer.lr": {"low": 1e-4, "high": 1e-2, "log": True}, "rotary_base": [100, 1000]}
    write_study(tmp_path, search="random", tries=3, settings=ranges)
    done = command("lmp_study", "study.json")
    assert done.returncode == 0, done.stderr
    assert "tiny: 3 cells" in done.stdout


# ---------------------------------------------------------------- pictures and positions


def test_the_heat_map_shows_each_cell_once() -> None:
    part = {"length": 0}
    rows = [
        {
            **study_figures._axes(
                part, {"arm": f"modern-a={a}-b={b}", "settings": {"a": a, "b": b}}
            ),
            "score": float(a) + float(b),
        }
        for a in ("10", "9")
        for b in ("1e3", "200")
    ]
    assert study_figures._varied(rows) == ["a", "b"]
    ys, xs, scores = study_figures._table(rows, "a", "b")
    assert (ys, xs) == (["9", "10"], ["200", "1e3"])
    assert np.array_equal(scores, [[209, 1009], [210, 1010]])


def test_losses_by_position_have_the_mean_of_the_validation(
    command: Command, tmp_path: Path
) -> None:
    tiny(tmp_path)
    assert command("lmp_trainer", "--exp", "modern", "--training-plan", "tiny.json").returncode == 0
    (run,) = find_runs(tmp_path / "gpt_out")
    bins = positions.losses_of_run(run.path)
    assert bins == positions.losses_of_run(run.path), "kept"
    (run.path / positions.FILE).write_text("damaged")
    assert bins == positions.losses_of_run(run.path), "measured anew"
    plan = load_plan(tmp_path / "tiny.json")
    prepared = prepare(plan, lambda *_: None)
    newest = run.newest(print)
    assert newest is not None
    restored = restore(run, newest)
    batches = list(ValidationSet(plan, prepared, 32).batches(4))
    finest = positions.loss_by_position(restored.runner, restored.model.eval(), batches)
    assert [row["loss"] for row in finest] == pytest.approx([row["loss"] for row in bins])
    counts = [
        sum(int((b.targets[:, r["from"] : r["to"]] >= 0).sum()) for b in batches) for r in bins
    ]
    mean = float(np.average([r["loss"] for r in bins], weights=counts))
    assert mean == pytest.approx(run.read()["summary"]["val_loss"], rel=1e-5)
    assert positions.edges_of(300) == [0, 16, 64, 256, 300]
    assert replace(Result(1, 1, [], [], 1, 1, "f")).accuracy is None
