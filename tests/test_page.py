"""The page: what it shows, that it is one file, that no run's name does harm, and how it behaves in
a browser."""

from __future__ import annotations

import html
import http.client
import json
import re
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from conftest import Command
from test_compare import fake_run

from lmplay.analysis import compare
from lmplay.analysis.page import gather, serve, write
from lmplay.errors import LmplayError

CHROMIUM = (
    shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
)
QUIET = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
EVIL = "<script>alert(1)</script>"
TRAVERSAL = "../../etc/passwd"


def change(folder: Path, **fields: Any) -> None:
    """Rewrite parts of a fake run's run.json."""
    path = folder / "run.json"
    record = json.loads(path.read_text())
    record["identity"] |= fields.pop("identity", {})
    path.write_text(json.dumps(record | fields))


def noisy(folder: Path, seed: int) -> None:
    for kind in ("train", "validate"):
        frame = pd.read_csv(folder / f"{kind}.csv")
        frame["loss"] += np.random.default_rng(seed).normal(0, 0.02, len(frame))
        frame.to_csv(folder / f"{kind}.csv", index=False)


def trial(folder: Path, name: str, **changes: Any) -> None:
    arm = {
        "word": "REAL",
        "why": "the loss is lower",
        "gain": 0.05,
        "low": 0.03,
        "high": 0.07,
        "gain_bpb": 0.02,
        "p": 0.004,
        "level": 0.005,
        "pairs": 9,
        "tuned": True,
        "lr_factor": 2.0,
        "tokens_ratio": 1.25,
        "deviation_paired": 0.01,
        "deviation_unpaired": 0.03,
        "more": None,
        "runs": [],
        "controls": {"params": [-0.02, -0.04]},
    }
    report = {
        "design": {
            "plan": "laptop",
            "plan_fingerprint": "abc",
            "against": "gpt2ish",
            "precision": "fp32",
            "tuned": True,
            "data": "d",
            "sources": {"gpt2ish": "", "ue": ""},
        },
        "arms": {"ue": arm | changes},
        "over": True,
        "lr_factor": 1.0,
        "sensitivity": {
            "gpt2ish": [[0.25, 1.0, 5.0], [0.25, 2.0, 5.1]],
            "ue": [[0.25, 1.0, 4.9], [0.25, 2.0, None]],
        },
        "cost": {"runs": 30, "hours": 0.5},
        "pairs": 9,
        "runs": [TRAVERSAL, "nowhere/at-all"],
    }
    (folder / "trials" / name).mkdir(parents=True)
    (folder / "trials" / name / "trial.json").write_text(json.dumps(report))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three seeds of two ideas, one of a third, whose names mean harm, and a second plan."""
    root = tmp_path_factory.mktemp("page") / "gpt_out"
    for seed in range(3):
        for name, shift in (("gpt2ish", 0.0), ("ue", -0.1)):
            folder = fake_run(root, name, "laptop", shift, seed=seed)
            change(
                folder, identity={"config": {"num_blocks": 4, "width": 64 if name == "ue" else 32}}
            )
            noisy(folder, seed + 10 * len(name))
            lines = [{"tokens": t, "text": f"{name} {seed} at {t}"} for t in (1000, 2000)]
            (folder / "samples.jsonl").write_text(
                "".join(json.dumps(x) + "\n" for x in lines) + '{"tokens": 3'
            )
    evil = fake_run(root, "evil", "laptop", 0.2)
    evil.rename(evil.with_name("<img src=x onerror=alert(1)>-s0"))
    change(
        evil.with_name("<img src=x onerror=alert(1)>-s0"),
        label=EVIL,
        identity={"variant": EVIL, "config": {EVIL: EVIL, "path": TRAVERSAL}},
    )
    change(fake_run(root, "gpt2ish", "other", 0.0), plan_name=TRAVERSAL)
    trial(root, "laptop-ue-against-gpt2ish")
    trial(root, "x", word=EVIL, why=EVIL)
    (root / "trials" / "broken").mkdir()
    (root / "trials" / "broken" / "trial.json").write_text("{}")
    return root


# ---------------------------------------------------------------- what it shows


def test_everything_is_gathered_and_what_is_not_is_said(runs: Path) -> None:
    content, left_out = gather.gather([runs], 200)
    laptop = next(a for a in content["arenas"] if a["name"] == "laptop")
    assert len(laptop["runs"]) == 7
    assert laptop["baseline"] == "gpt2ish"
    ue = next(r for r in laptop["runs"] if r["name"] == "ue-s1")
    assert ue["settings"]["width"] == 64
    assert [s["text"] for s in ue["samples"]] == ["ue 1 at 1000", "ue 1 at 2000"], (
        "a cut last line is left out"
    )
    assert {t["name"] for t in content["trials"]} == {"laptop-ue-against-gpt2ish", "x"}
    assert any("broken" in line and "cannot be read" in line for line in left_out)
    with_target = next(
        a for a in gather.gather([runs], 200, "ue-s1")[0]["arenas"] if a["name"] == "laptop"
    )
    assert (with_target["baseline"], with_target["fixed"]) == ("ue", "ue-s1")
    with pytest.raises(LmplayError, match="no such run"):
        gather.gather([runs], 200, "nobody")


def test_the_pairs_of_trials_are_one_arena_and_their_other_runs_none(tmp_path: Path) -> None:
    for seed in range(2):
        fake_run(tmp_path, "gpt2ish", "trial-laptop-abc123", 0.0, seed=seed)
        fake_run(tmp_path, "ue", "trial-laptop-abc123-lr4", -0.1, seed=seed)
    fake_run(tmp_path, "ue", "trial-laptop-abc123-lr8", 0.3, seed=1000)
    trial(
        tmp_path, "one", lr_factor=4.0, runs=[f"trial-laptop-abc123-lr4/ue-s{s}" for s in range(2)]
    )
    path = tmp_path / "trials" / "one" / "trial.json"
    runs = [f"trial-laptop-abc123/gpt2ish-s{s}" for s in range(2)]
    path.write_text(json.dumps(json.loads(path.read_text()) | {"runs": runs}))
    content, _ = gather.gather([tmp_path], 200)
    [arena] = content["arenas"]
    assert arena["name"] == "trials on laptop against gpt2ish"
    assert arena["baseline"] == "gpt2ish"
    found = sorted((r["family"], r["seed"]) for r in arena["runs"])
    assert found == [("gpt2ish", 0), ("gpt2ish", 1), ("ue (lr × 4)", 0), ("ue (lr × 4)", 1)]
    change(tmp_path / "trial-laptop-abc123-lr4" / "ue-s1", identity={"experiment": "edited"})
    content, left_out = gather.gather([tmp_path], 200)
    assert len(content["arenas"][0]["runs"]) == 3
    assert any("one: 1 run of ue left out, which was edited since" in line for line in left_out)


def test_trials_on_other_data_are_another_arena(tmp_path: Path) -> None:
    for name, data in (("one", "d"), ("two", "more of it")):
        fake_run(tmp_path, "gpt2ish", f"trial-{name}", 0.0)
        trial(tmp_path, name)
        path = tmp_path / "trials" / name / "trial.json"
        report = json.loads(path.read_text()) | {"runs": [f"trial-{name}/gpt2ish-s0"]}
        report["design"]["data"] = data
        path.write_text(json.dumps(report))
    arenas = [
        a for a in gather.gather([tmp_path], 200)[0]["arenas"] if a["name"].startswith("trials on")
    ]
    assert [len(a["runs"]) for a in arenas] == [1, 1]
    assert len({a["fingerprint"] for a in arenas}) == 2


def test_what_is_odd_in_a_file_is_left_out_and_said(tmp_path: Path) -> None:
    for name, record in (
        ("a", {"identity": {"config": 3}}),
        ("b", {"summary": [1]}),
        ("c", {"identity": {"seed": "x"}}),
        ("d", {"git": "none"}),
        ("fine", {"identity": {"config": {"__proto__": 1, "wide": float("inf"), "l": [1]}}}),
    ):
        change(fake_run(tmp_path, name, "p", 0.0), **record)
    # a trial that names a run without training curve, and one that is not there
    for seed in (
        0,
        1,
    ):
        fake_run(tmp_path, "gpt2ish", "trial-p-abc123", 0.0, seed=seed)
    (tmp_path / "trial-p-abc123" / "gpt2ish-s1" / "train.csv").unlink()
    trial(tmp_path, "one", runs=[f"trial-p-abc123/gpt2ish-s{s}" for s in (0, 1)])
    trial(tmp_path, "infinite", gain="much")
    content, left_out = gather.gather([tmp_path], 200)
    json.dumps(content, allow_nan=False)
    assert {r["name"] for a in content["arenas"] for r in a["runs"]} == {"fine-s0", "gpt2ish-s0"}
    for part in ("a-s0", "b-s0", "c-s0", "d-s0", "train.csv", "infinite", "2 runs of trials"):
        assert any(part in line for line in left_out), part


def test_the_same_run_twice_is_one_seed(tmp_path: Path) -> None:
    shutil.copytree(fake_run(tmp_path / "one", "ue", "p", 0.0), tmp_path / "two" / "p" / "ue-s0")
    curves, left_out = compare.collect([tmp_path], "validate", 20)
    assert len(curves) == 1
    assert any("is the same run" in line for line in left_out)


def test_long_curves_are_averaged_down_and_keep_their_ends() -> None:
    frame = pd.DataFrame(
        {"tokens": np.arange(1, 10_001), "loss": np.linspace(5, 3, 10_000), "bpb": np.nan}
    )
    made = gather.points(frame, 25)
    assert made["window"] == 25
    assert len(made["tokens"]) == 400
    assert made["tokens"][-1] == 10_000
    assert made["loss"][0] == pytest.approx(frame["loss"][:25].mean(), rel=1e-6)
    assert made["bpb"] == [None] * 400
    assert gather.points(frame[:300], 1)["loss"] == pytest.approx(
        frame["loss"][:300].tolist(), rel=1e-6
    )


def test_the_file_asks_nothing_of_a_network_and_names_stay_inside(
    runs: Path, tmp_path: Path
) -> None:
    content, _ = gather.gather([runs], 200)
    path = tmp_path / "deep" / "page.html"
    write.write(path, content)
    text = path.read_text()
    assert EVIL not in text
    data = re.search(r'<script type="application/json" id="content">(.*?)</script>', text, re.S)
    assert data is not None
    assert json.loads(data[1]) == json.loads(json.dumps(content))
    outside = text.replace(data[1], "").replace(write.page({}).partition('id="plotly">')[2], "")
    assert not re.search(r"<(script|link|img)[^>]+(src|href)=.?https?:", outside)
    assert [p.name for p in path.parent.iterdir()] == ["page.html"]


# ---------------------------------------------------------------- the server


@pytest.fixture
def served(runs: Path) -> Iterator[int]:
    made = serve.server(serve.LiveContent(lambda: gather.gather([runs], 200)[0]), "127.0.0.1", 0)
    thread = threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    yield made.server_address[1]
    made.shutdown()
    thread.join()
    made.server_close()


def ask(port: int, path: str, method: str = "GET", **headers: str) -> http.client.HTTPResponse:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request(method, path, headers=headers)
    return connection.getresponse()


def test_the_server_answers_two_paths_and_opens_none(served: int) -> None:
    assert b"<title>lmplay</title>" in ask(served, "/?x=1").read()
    for path in (
        "/etc/passwd",
        "/../../etc/passwd",
        "/%2e%2e/%2e%2e/etc/passwd",
        "//etc/passwd",
        "/run.json",
    ):
        answer = ask(served, path)
        assert answer.status == 404
        assert b"root:" not in answer.read()
    assert ask(served, "/", "POST").status == 501
    assert ask(served, "/", Host="evil.example").status == 403, (
        "another site's name for this machine"
    )
    assert ask(served, "/", Host=f"localhost:{served}").status == 200
    assert ask(served, "/", Host=f"[::1]:{served}").status == 200


def test_unchanged_data_are_not_sent_again(served: int) -> None:
    first = ask(served, "/data.json")
    assert len(json.loads(first.read())["arenas"]) == 2
    tag = first.headers["ETag"]
    assert ask(served, "/data.json", **{"If-None-Match": tag}).status == 304


def test_what_a_user_can_mend_is_one_line(
    command: Command, runs: Path, tmp_path: Path, served: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = command("lmp_plotstats", str(runs), "--serve", "--port", str(served))
    assert (taken.returncode, "--port takes another" in taken.stderr) == (1, True)
    assert command("lmp_plotstats", "--serve", "--port", "70000").returncode == 2
    assert (
        "it does not go with --html"
        in command("lmp_plotstats", str(runs), "--html", "p", "--plot-raw").stderr
    )
    assert "--port goes with --serve" in command("lmp_plotstats", str(runs), "--port", "1").stderr
    monkeypatch.setitem(sys.modules, "plotly.offline", None)  # as if it were not installed
    without = command("lmp_plotstats", str(runs), "--html", "p.html")
    assert without.returncode == 1
    assert "pip install 'lmplay[page]'" in without.stderr
    assert not (tmp_path / "p.html").exists()


def test_a_plan_s_name_leads_nowhere(command: Command, runs: Path, tmp_path: Path) -> None:
    done = command("lmp_plotstats", str(runs), "--out", "figures/deep/deeper")
    assert done.returncode == 0, done.stderr
    outside = [p for p in tmp_path.rglob("*.png") if "deeper" not in p.parts]
    assert not outside
    assert (tmp_path / "figures" / "deep" / "deeper" / "______etc_passwd" / "log_loss.png").exists()


# ---------------------------------------------------------------- in a browser


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="playwright drives the browser: pip install playwright"
    )
    if CHROMIUM is None:
        pytest.skip("no Chromium here (Debian: apt-get install chromium)")
    with playwright.sync_playwright() as p:
        made = p.chromium.launch(executable_path=CHROMIUM, args=list(QUIET))
        yield made
        made.close()


@pytest.fixture(scope="module")
def file(runs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("file") / "page.html"
    write.write(path, gather.gather([runs], 200)[0])
    return path


@pytest.fixture
def show(browser: Any) -> Iterator[Callable[..., Any]]:
    """Open a page; at the end nothing may have been alerted, gone wrong, or been asked of a
    network."""
    wrong: list[str] = []
    contexts = []

    def opened(url: str, width: int = 1280, scheme: str = "light") -> Any:
        context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
        contexts.append(context)
        tab = context.new_page()
        tab.on("dialog", lambda d: (wrong.append(f"dialog {d.message}"), d.dismiss()))
        tab.on("pageerror", lambda e: wrong.append(f"error {e}"))
        tab.on("console", lambda m: wrong.append(m.text) if m.type == "error" else None)
        tab.on(
            "request",
            lambda r: (
                wrong.append(r.url) if not r.url.startswith((url, "data:", "blob:")) else None
            ),
        )
        tab.goto(url)
        tab.wait_for_selector("#figure .main-svg")
        return tab

    yield opened
    for context in contexts:
        context.close()
    assert not wrong


def laptop(tab: Any) -> Any:
    """The plan with the seeds, whatever the other one is called."""
    tab.select_option("#arena", label="laptop")
    return tab


def drawn(tab: Any) -> list[dict[str, Any]]:
    return tab.evaluate(
        "document.getElementById('figure').data.map((t) => ({name: t.name, x: [...t.x], y: "
        "[...t.y]}))"
    )


def test_bands_and_differences_are_those_of_compare(
    show: Callable[..., Any], file: Path, runs: Path
) -> None:
    tab = laptop(show(file.as_uri()))
    curves, _ = compare.collect([runs], "validate", 200)
    curves = [c for c in curves if c.plan == "laptop"]
    partner = compare.partners(curves, compare.baseline_of(curves, None), None)

    def pair(curve: compare.RunCurve) -> tuple[np.ndarray, np.ndarray]:
        own, base = (compare.series(c, "tokens", "loss") for c in (curve, partner[curve.path]))
        assert own is not None
        assert base is not None
        return compare.difference(own, base)

    lines = [pair(c) for c in sorted(curves, key=lambda c: c.name) if c.variant == "ue"]
    mine = compare.band(lines)
    assert mine is not None
    shown = {t["name"]: t for t in drawn(tab)}
    np.testing.assert_allclose(shown["ue-s1"]["y"], lines[1][1], atol=1e-5)
    found = tab.evaluate(
        "(lines) => lmplay.band(lines, lmplay.content().quantiles, lmplay.content().grid)",
        [{"x": x.tolist(), "y": y.tolist()} for x, y in lines],
    )
    np.testing.assert_allclose(found["mean"], mine.mean, atol=1e-12)
    np.testing.assert_allclose(found["half"], mine.half, rtol=1e-9)
    base = [compare.series(c, "tokens", "loss") for c in curves if c.variant == "gpt2ish"]
    null = compare.null_band([b for b in base if b is not None])
    assert null is not None
    half = np.array(shown["luck"]["y"])[: len(null.half)]
    np.testing.assert_allclose(half, null.half, atol=1e-5)
    uneven = [np.array([1.0, 3, 10, 40]), np.array([2.0, 5, 30])]
    grid = tab.evaluate("(xs) => lmplay.commonGrid(xs, 400)", [x.tolist() for x in uneven])
    np.testing.assert_allclose(grid, compare.common_grid(uneven), rtol=1e-12)
    y = np.random.default_rng(0).random(30)
    np.testing.assert_allclose(
        tab.evaluate("(y) => lmplay.smooth(y, 7)", y.tolist()), compare.smooth(y, 7), rtol=1e-9
    )


def test_switches_switch(show: Callable[..., Any], file: Path) -> None:
    tab = laptop(show(file.as_uri()))
    layout = "document.getElementById('figure').layout."
    assert tab.evaluate(layout + "xaxis.title.text") == "training tokens"
    tab.select_option("#x", "flops")
    assert tab.evaluate(layout + "xaxis.title.text") == "training FLOPs"
    assert max(drawn(tab)[1]["x"]) == 40_000 * 1e6
    tab.uncheck("#logx")
    assert tab.evaluate(layout + "xaxis.type") == "linear"
    names = {t["name"] for t in drawn(tab)}
    assert "gpt2ish-s0" not in names, "the baseline differs from itself by nothing"
    tab.select_option("#baseline", "ue")
    assert "gpt2ish-s0" in {t["name"] for t in drawn(tab)}
    tab.select_option("#view", "value")
    tab.check("#logy")
    assert tab.evaluate(layout + "yaxis.type") == "log"
    assert {"gpt2ish-s0", "ue-s0"} <= {t["name"] for t in drawn(tab)}
    tab.select_option("#kind", "train")
    tab.select_option("#smooth", "20")
    assert "the mean of the last 20 points" in tab.text_content("#statement")
    assert "Single seed: no claim" in tab.text_content("#statement")
    tab.fill("#search", "width=64")
    assert {t["name"] for t in drawn(tab)} == {"ue", "ue-s0", "ue-s1", "ue-s2"}
    assert tab.locator("#final tbody tr").count() == 3


def test_partners_are_those_of_compare(show: Callable[..., Any], tmp_path: Path) -> None:
    for seed in (0, 1):
        for name, precision in (
            ("gpt2ish", "fp32"),
            ("gpt2ish-bf16", "bf16"),
            ("ue", "fp32"),
            ("ue-bf16", "bf16"),
        ):
            folder = fake_run(tmp_path, name, "p", 0.1 * len(name), seed=seed)
            change(folder, identity={"precision": precision, "variant": name.partition("-")[0]})
    for target in (None, "gpt2ish-s1"):
        curves, _ = compare.collect([tmp_path], "validate", 20)
        partner = compare.partners(curves, compare.baseline_of(curves, target), target)
        expected = {f"against {partner[c.path].name}" for c in curves if c.variant == "ue"}
        path = tmp_path / f"{target}.html"
        write.write(path, gather.gather([tmp_path], 20, target)[0])
        hovers = show(path.as_uri()).evaluate(
            "document.getElementById('figure').data.filter((t) => t.hovertemplate && "
            "/^ue.*-s/.test(t.name))"
            ".map((t) => t.hovertemplate.match(/against [^<]*/)[0])"
        )
        assert set(hovers) == expected, target


def test_the_settings_that_differ_are_in_the_hover(show: Callable[..., Any], file: Path) -> None:
    tab = laptop(show(file.as_uri()))
    hover = tab.evaluate(
        "document.getElementById('figure').data.find((t) => t.name === 'ue-s0').hovertemplate"
    )
    assert "width=64" in hover
    assert "num_blocks" in hover, "the run with an evil name has none"
    assert "against gpt2ish-s0" in hover
    evil = tab.evaluate(
        "document.getElementById('figure').data.map((t) => t.hovertemplate || '').join()"
    )
    assert EVIL not in evil
    assert "&lt;script&gt;" in evil


def test_it_works_with_a_keyboard(show: Callable[..., Any], file: Path) -> None:
    tab = laptop(show(file.as_uri()))
    tab.focus("#families input[data-family=ue]")
    tab.keyboard.press("Space")
    assert "ue-s0" not in {t["name"] for t in drawn(tab)}
    assert tab.evaluate("document.activeElement.dataset.family") == "ue", "the focus stays"
    tab.keyboard.press("Space")
    assert "ue-s0" in {t["name"] for t in drawn(tab)}
    tab.focus("#final [data-column=bpb]")
    tab.keyboard.press("Enter")
    tab.keyboard.press("Enter")
    assert tab.evaluate("document.activeElement.dataset.column") == "bpb"
    assert tab.get_attribute("#final th:nth-child(5)", "aria-sort") == "descending"
    column = [float(t) for t in tab.locator("#final tbody td:nth-child(5)").all_text_contents()]
    assert column == sorted(column, reverse=True)
    tab.locator("#theme").focus()
    before = tab.evaluate("document.documentElement.dataset.theme")
    tab.keyboard.press("Enter")
    assert tab.evaluate("document.documentElement.dataset.theme") != before


def test_verdicts_rates_and_texts_are_there(show: Callable[..., Any], file: Path) -> None:
    tab = laptop(show(file.as_uri()))
    card = tab.text_content("#verdicts .card.REAL")
    for part in (
        "ue against gpt2ish on laptop",
        "gain +0.0500 nats per token (+0.0300 to +0.0700)",
        "9 pairs",
        "equal params: +0.0300 (2 seeds)",
        "1.25 times the tokens",
        "30 runs",
    ):
        assert part in card
    rates = tab.evaluate(
        "document.getElementById('sensitivity').data.map((t) => [t.name, t.x.length])"
    )
    assert rates == [["gpt2ish, 0.25 of the budget", 2], ["ue, 0.25 of the budget", 1]]
    cards = tab.locator("#samples .card")
    assert cards.count() == 6
    assert "ue 0 at 2000" in tab.text_content("#samples")
    cards.nth(0).locator("select").select_option("0")
    assert "at 1000" in cards.nth(0).locator("pre").text_content()


@pytest.mark.parametrize(("width", "scheme"), [(390, "dark"), (1280, "light")])
def test_it_fits_a_phone_and_a_desk_in_dark_and_light(
    show: Callable[..., Any], file: Path, width: int, scheme: str
) -> None:
    tab = laptop(show(file.as_uri(), width, scheme))
    assert tab.evaluate("document.documentElement.dataset.theme") == scheme
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    ground = tab.evaluate("document.getElementById('figure').layout.paper_bgcolor")
    assert ground == ("#16181d" if scheme == "dark" else "#ffffff")
    assert not tab.evaluate(
        "[...document.querySelectorAll('select, input')].filter((e) => !e.labels?.length).map((e) "
        "=> e.id)"
    )


def test_on_a_phone_the_plot_is_on_the_first_screen(show: Callable[..., Any], file: Path) -> None:
    tab = laptop(show(file.as_uri(), 390))
    plot = tab.locator("#figure").bounding_box()
    assert plot["y"] + plot["height"] < 844  # of the smallest phones with 390 px
    assert plot["height"] > 300
    selects = [s.bounding_box() for s in tab.locator("select").all() if s.is_visible()]
    assert len(selects) > 5
    assert all(box["x"] >= 0 and box["x"] + box["width"] <= 390 for box in selects)


@pytest.mark.parametrize("view", ["diff", "value"])
def test_ticks_are_readable_and_curves_are_named_at_their_ends(
    show: Callable[..., Any], file: Path, view: str
) -> None:
    tab = laptop(show(file.as_uri()))
    tab.select_option("#view", view)
    layout = tab.evaluate("document.getElementById('figure').layout")
    ticks = [text for text in layout["xaxis"]["ticktext"] if text]
    assert 2 <= len(ticks) <= 20
    assert all(re.fullmatch(r"\d+(\.\d+)?[kMG]?", text) for text in ticks), ticks
    shown = tab.locator("#families label").all_inner_texts()
    ends = [html.unescape(a["text"]).split(" ", 1)[1] for a in layout["annotations"]]
    assert len(ends) == len(shown) > 0
    for name in ends:
        assert any(name in text for text in shown), (name, shown)
    toolbar = tab.locator("#figure .modebar").bounding_box()
    figure = tab.locator("#figure").bounding_box()
    curves = figure["y"] + layout["margin"]["t"]
    assert toolbar["y"] + toolbar["height"] <= curves, "it is not over the curves"


def test_the_page_is_kept_fresh(show: Callable[..., Any], runs: Path, tmp_path: Path) -> None:
    root = tmp_path / "gpt_out"
    shutil.copytree(runs / "laptop" / "gpt2ish-s0", root / "laptop" / "gpt2ish-s0")
    made = serve.server(serve.LiveContent(lambda: gather.gather([root], 200)[0]), "127.0.0.1", 0)
    thread = threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        tab = show(f"http://127.0.0.1:{made.server_address[1]}/")
        assert tab.locator("#final tbody tr").count() == 1
        shutil.copytree(runs / "laptop" / "ue-s0", root / "laptop" / "ue-s0")
        tab.locator("#final tbody tr").nth(1).wait_for(timeout=30_000)
    finally:
        made.shutdown()
        thread.join()
        made.server_close()
