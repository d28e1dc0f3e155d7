"""Every command and script of the README and docs runs, and a wheel works in an empty folder."""

from __future__ import annotations

import importlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from conftest import ROOT
from forked import forked

from lmplay.plan import parse_plan

README = (ROOT / "README.md").read_text()
DOCS_OF_TEXT = (
    "README.md",
    "docs/trials.md",
    "docs/arenas.md",
    "docs/plans.md",
    "docs/export.md",
    "docs/studies.md",
    "docs/pretrained.md",
    "docs/evaluation.md",
    "docs/classification.md",
)
DOCS = (*DOCS_OF_TEXT, "docs/market.md")
NOT_RUN = {  # by a test of commands; `make demo` and `make test` are what CI runs
    "git clone REPOSITORY_URL lmplay && cd lmplay",
    "make demo",
    "make test",
    "pip install -c constraints.txt -e '.[bundled]'",
    "pip install -e '.[trial]'",
}
# Without a GPU: one clear line.
NOT_HERE = {"lmp_trainer --amp --device cuda --exp ue8x": "no such device"}


def fenced(text: str) -> list[tuple[str, list[str]]]:
    """Return the code blocks: their language ("" for none) and their lines without indentation."""
    blocks: list[tuple[str, list[str]]] = []
    inside = False
    for line in text.splitlines():
        if line.strip().startswith("```"):
            if not inside:
                blocks.append((line.strip().removeprefix("```"), []))
            inside = not inside
        elif inside:
            blocks[-1][1].append(line)
    assert not inside
    return blocks


def shell_lines(doc: str) -> list[str]:
    """Return the lines of a document's blocks without a language, except the file tree's."""
    blocks = fenced((ROOT / doc).read_text())
    shell = [lines for language, lines in blocks if not language]
    complete: list[str] = []
    for line in (x for lines in shell if not lines[0].startswith("lmplay/") for x in lines):
        if complete and complete[-1].endswith("\\"):  # as a shell continues a line
            complete[-1] = f"{complete[-1][:-1].rstrip()} {line.strip()}"
        elif line.strip():
            complete.append(line.strip())
    return complete


def commands(doc: str) -> list[str]:
    return [line for line in shell_lines(doc) if line.startswith(("lmp_", "python "))]


def python_blocks(doc: str) -> list[str]:
    return [
        "\n".join(lines)
        for language, lines in fenced((ROOT / doc).read_text())
        if language == "python"
    ]


def test_every_line_of_a_block_is_run_or_listed() -> None:
    lines = {line for doc in DOCS for line in shell_lines(doc)}
    run = {line for doc in DOCS for line in commands(doc)}
    assert lines - run == NOT_RUN
    assert len(run) > 35
    makefile = (ROOT / "Makefile").read_text()
    for target in ("demo", "test"):
        assert f"\n{target}:" in makefile


def test_json_of_the_docs_is_a_plan() -> None:
    text = (ROOT / "docs" / "plans.md").read_text()
    (block,) = (lines for language, lines in fenced(text) if language == "json")
    plan = parse_plan(json.loads("\n".join(block)), "docs/plans.md")
    assert plan.steps[0].step_name == "mine"


@pytest.fixture
def clone(tmp_path: Path) -> tuple[Path, dict[str, str]]:
    """A folder like a fresh clone, with the tree's experiments and no runs; its environment."""
    shutil.copytree(
        ROOT / "experiments", tmp_path / "experiments", ignore=shutil.ignore_patterns("__pycache__")
    )
    bin_folder = Path(sys.executable).parent
    env = {**os.environ, "PATH": f"{bin_folder}{os.pathsep}{os.environ['PATH']}"}
    env |= {"PYTHONPATH": str(copy_of_package(tmp_path)), "MPLBACKEND": "agg"}
    for name, steps in (("smoke", 20), ("sketch", None)):  # shorter runs than a user's
        path = tmp_path / "training_plans" / f"{name}.json"
        plan = json.loads(path.read_text())
        plan["validation"]["tokens"] = 2048
        plan["steps"][0] |= {"steps": steps} if steps else {}
        path.write_text(json.dumps(plan))
    return tmp_path, env


@pytest.mark.timeout(900)  # some forty processes, each of which has a limit of its own
@pytest.mark.parametrize("docs", [DOCS_OF_TEXT, ("docs/market.md",)], ids=["text", "market"])
def test_commands_run_as_printed_in_their_order(
    docs: tuple[str, ...], clone: tuple[Path, dict]
) -> None:
    """The pages continue each other, as a reader does: a run that is finished is not trained
    again."""
    folder, env = clone
    started: set[str] = set()  # commands that were started as a user does
    (study,) = (lines for lang, lines in fenced((ROOT / "docs/studies.md").read_text()) if lang)
    small = {**json.loads("\n".join(study)), "tokens": 4096, "tries": 3}
    (folder / "my_study.json").write_text(json.dumps(small))
    with forked(folder, env) as warm:
        for line in (line for doc in docs for line in commands(doc)):
            # Real runs, shortened to what a test can wait for.
            short = line.replace("--training-plan laptop", "--training-plan smoke")
            short = short.replace("--minutes 5", "--minutes 0.02")
            name, *words = shlex.split(short.replace("--max-seeds 4", "--max-seeds 2"))
            if name in started and name.startswith("lmp_"):
                done = warm.run(name, *words, cwd=folder)
            else:
                started.add(name)
                done = subprocess.run(
                    [name, *words],
                    cwd=folder,
                    env=env,
                    capture_output=True,
                    text=True,
                    timeout=200,
                    check=False,
                )
            if line in NOT_HERE and done.returncode != 0:
                assert NOT_HERE[line] in done.stderr
                continue
            assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
            assert "[transformers]" not in done.stderr, (
                "a library's advice, which no user asked for"
            )
            if line.startswith("lmp_new "):
                make_the_documented_change(folder / "experiments" / "my_idea.py")
    if "README.md" in docs:
        assert (folder / "plots" / "log_diff_loss.png").exists()


@pytest.mark.timeout(600)
def test_scripts_of_the_docs_run(clone: tuple[Path, dict]) -> None:
    """In their order and in one process, as the cells of a notebook do."""
    folder, env = clone
    (trial,) = python_blocks("docs/trials.md")
    assert 'training_plan="sketch", max_pairs=12' in trial
    # As small as the trial of the page before, which it continues.
    short = 'training_plan="smoke", max_pairs=2, tuned=False, mini_batch_size=8'
    trial = trial.replace('training_plan="sketch", max_pairs=12', short)
    script = folder / "script.py"
    check = 'assert report["arms"]["value_norm"]["pairs"] == 2'
    script.write_text("\n".join([*python_blocks("docs/python.md"), trial, check]))
    done = subprocess.run(
        [sys.executable, str(script)],
        cwd=folder,
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "UNDECIDED" in done.stdout  # two pairs never suffice
    assert (folder / "gpt_out" / "smoke" / "value_norm-s0" / "run.json").exists()


def test_source_of_the_plans_page_reads_its_documents(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (block,) = python_blocks("docs/plans.md")
    (tmp_path / "my_package.py").write_text(block)
    monkeypatch.syspath_prepend(tmp_path)
    first, second = importlib.import_module("my_package").Counting(count=2).documents()
    assert first == [(" ".join(map(str, range(20))), True)]
    assert second[0][0].startswith("1 2 3 ")


def copy_of_package(tmp_path: Path) -> Path:
    """A clone's layout: the package beside the experiments that are copied, so that they are the
    shipped ones."""
    for name in ("lmplay", "training_plans"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "setup.py", tmp_path / "setup.py")
    return tmp_path


def make_the_documented_change(path: Path) -> None:
    """Make the README's change where it says."""
    (activation,) = python_blocks("README.md")
    text = path.read_text()
    before = "        hidden = F.gelu(self.fc1(x), approximate=self.gelu)"
    assert text.count(before) == 1
    after = textwrap.indent(textwrap.dedent(activation), "        ")
    path.write_text(text.replace(before, after))


def test_flags_of_the_docs_exist() -> None:
    helps: dict[tuple[str, ...], str] = {}
    for line in (line for doc in DOCS for line in commands(doc)):
        if line.startswith("lmp_"):
            name, *words = line.removeprefix("lmp_").split()
            of = (name, words[0]) if name == "market" else (name,)  # it has commands of its own
            if of not in helps:
                helps[of] = subprocess.run(
                    [sys.executable, "-m", f"lmplay.cli.{name}", *of[1:], "--help"],
                    capture_output=True,
                    text=True,
                    check=True,
                ).stdout
            for flag in re.findall(r" (--[a-z-]+)", line):
                assert flag in helps[of], line


def test_file_tree_names_every_module() -> None:
    for path in (ROOT / "lmplay").glob("*.py"):
        if path.name != "__init__.py":
            assert re.search(rf"(^|  ){path.name} ", README, re.M), path.name


@pytest.mark.parametrize("doc", [*DOCS, "docs/python.md", "docs/results.md", "docs/log.md"])
def test_pictures_and_links_exist(doc: str) -> None:
    path = ROOT / doc
    for target in re.findall(r"\]\(((?!https?:)[^)]+)\)", path.read_text()):
        name, _, section = target.partition("#")
        linked = path.parent / name if name else path
        assert linked.exists(), target
        if section:
            titles = re.findall(r"^#+ (.+)$", linked.read_text(), re.M)
            assert section in {re.sub(r"[^\w -]", "", x).lower().replace(" ", "-") for x in titles}


def test_both_spellings_are_installed() -> None:
    scripts = Path(sys.executable).parent
    for name in (
        "lmp_trainer",
        "lmp-trainer",
        "lmp_plotstats",
        "lmp-plotstats",
        "lmp_generator",
        "lmp-generator",
    ):
        assert (scripts / name).exists(), name


@pytest.mark.timeout(400)
def test_a_wheel_works_in_an_empty_folder(tmp_path: Path) -> None:
    """Built from the tree and unpacked elsewhere: experiments and plans travel with it."""
    source = tmp_path / "source"
    files = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    for name in files:
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, source / name)
    build = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "-q",
        "-w",
        str(tmp_path),
        ".",
    ]
    done = subprocess.run(build, cwd=source, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    site = tmp_path / "site"
    shutil.unpack_archive(wheel, site, "zip")
    empty = tmp_path / "empty"
    empty.mkdir()
    env = {**os.environ, "PYTHONPATH": str(site)}

    def run(*words: str) -> str:
        command = [sys.executable, "-P", "-m", f"lmplay.cli.{words[0]}", *words[1:]]
        done = subprocess.run(
            command, cwd=empty, env=env, capture_output=True, text=True, timeout=200, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    where = run("trainer", "--exp", "ue", "--describe", "--training-plan", "smoke")
    assert f"file: {site}" in where
    assert "value_norm" in run("trainer", "--exp", "list")
    assert "laptop" in run("trainer", "--training-plan", "list")
    assert "val_bpb:" in run("trainer", "--training-plan", "smoke", "--steps", "3")
    assert run("generator", "The ", "--max-len", "3").startswith("The ")
    run("plotstats")
    assert (empty / "gpt_out" / "plots" / "log_loss.png").exists()
    run("plotstats", "--html", "page.html")
    assert (empty / "page.html").stat().st_size > 1_000_000
    schema = (site / "lmplay" / "shipped" / "training_plans" / "plan.schema.json").read_text()
    assert "interleave" in schema
