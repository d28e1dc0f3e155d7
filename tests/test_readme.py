"""Every command of the README runs as printed, and a wheel works in an empty folder."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from forked import forked

README = (ROOT / "README.md").read_text()


def fenced(text: str) -> list[tuple[str, list[str]]]:
    """The README's code blocks: their language ("" for none) and their lines without
    indentation."""
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


BLOCKS = fenced(README)
SHELL = [lines for language, lines in BLOCKS if not language and not lines[0].startswith("lmplay/")]
LINES = [line.strip() for lines in SHELL for line in lines if line.strip()]
INSTALL = "pip install -c constraints.txt -e '.[bundled]'"
COMMANDS = [line for line in LINES if line.startswith(("lmp_", "python "))]


def test_every_line_of_a_block_is_known_to_the_tests() -> None:
    assert set(LINES) - set(COMMANDS) == {
        "git clone REPOSITORY_URL lmplay && cd lmplay",
        "make demo",
        "make test",
        INSTALL,
        "pip install -e '.[trial]'",
    }
    assert len(COMMANDS) > 10
    makefile = (ROOT / "Makefile").read_text()
    for target in ("demo", "test"):
        assert f"\n{target}:" in makefile


def test_json_of_the_docs_is_a_plan() -> None:
    from lmplay.plan import parse_plan

    text = (ROOT / "docs" / "plans.md").read_text()
    (block,) = (lines for language, lines in fenced(text) if language == "json")
    parse_plan(json.loads("\n".join(block)), "docs/plans.md")


@pytest.mark.timeout(900)  # some thirty processes, each of which has a limit of its own
def test_commands_run_as_printed_in_their_order(tmp_path: Path) -> None:
    """In a folder like a fresh clone: the tree's experiments, no runs. `my_idea` gets the README's
    own change."""
    shutil.copytree(
        ROOT / "experiments", tmp_path / "experiments", ignore=shutil.ignore_patterns("__pycache__")
    )
    bin_folder = Path(sys.executable).parent
    env = {**os.environ, "PATH": f"{bin_folder}{os.pathsep}{os.environ['PATH']}"}
    env["PYTHONPATH"] = str(copy_of_package(tmp_path))
    cold: set[str] = set()  # commands that were started as a user does
    with forked(tmp_path, env) as warm:
        for line in COMMANDS:
            # Real runs, shortened to what a test can wait for.
            short = line.replace("--minutes 5", "--minutes 0.02 --training-plan smoke")
            name, *words = shlex.split(short.replace("--max-seeds 4", "--max-seeds 2"))
            if name in cold and name.startswith("lmp_"):
                done = warm.run(name, *words, cwd=tmp_path)
            else:
                cold.add(name)
                done = subprocess.run(
                    [name, *words],
                    cwd=tmp_path,
                    env=env,
                    capture_output=True,
                    text=True,
                    timeout=200,
                    check=False,
                )
            assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
            assert "[transformers]" not in done.stderr, (
                "advice of a library's, which the user did not call"
            )
            if line.startswith("lmp_new "):
                change_as_told(tmp_path / "experiments" / "my_idea.py")
    assert (tmp_path / "plots" / "log_diff_loss.png").exists()


def copy_of_package(tmp_path: Path) -> Path:
    """A clone's layout: the package beside the experiments that are copied, so that they are the
    shipped ones."""
    for name in ("lmplay", "training_plans"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "setup.py", tmp_path / "setup.py")
    return tmp_path


def change_as_told(path: Path) -> None:
    """Make the README's change where it says."""
    (activation,) = ("\n".join(lines) for language, lines in BLOCKS if language == "python")
    text = path.read_text()
    before = "        return dropout(self.fc2(F.gelu(self.fc1(x))), self.dropout, self.training)"
    assert text.count(before) == 1
    path.write_text(text.replace(before, "        " + activation.strip()))


def test_flags_of_the_readme_exist() -> None:
    helps: dict[tuple[str, ...], str] = {}
    for line in COMMANDS:
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


def test_pictures_and_links_exist() -> None:
    for target in re.findall(r"\]\(((?!https?:)[^)]+)\)", README):
        assert (ROOT / target.partition("#")[0]).exists(), target


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
    assert (empty / "log_loss.png").exists()
    run("plotstats", "--html", "page.html")
    assert (empty / "page.html").stat().st_size > 1_000_000
    schema = (site / "lmplay" / "shipped" / "training_plans" / "plan.schema.json").read_text()
    assert "interleave" in schema
