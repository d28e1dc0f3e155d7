"""A cleaned model is the trained one, for us and for programs that know nothing of us."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Command, call_command, edit_record, write_plan

from lmplay import optional, testing
from lmplay.data.tokenizers import Bytes, Chars, Tiktoken, train_bpe
from lmplay.discover import source_digest
from lmplay.errors import LmplayError
from lmplay.export import hf, verification
from lmplay.export.tokenizer import fast_tokenizer
from lmplay.training import restore
from lmplay.training.progress import Reporter
from lmplay.training.run_folder import RUN_FILE, RunFolder

TEXTS = [
    "",
    "The quick brown fox\n  jumps.",
    "été 日本 \U0001f600\t",
    "<|endoftext|> is text here",
    "a" * 50 + "  12,345",
]

OUTSIDE = """
import json, sys
sys.modules["lmplay"] = None  # any import of ours fails
import numpy as np, torch, transformers
folder, kind, data, prompt = sys.argv[1:]
extra = {"gguf_file": "model.gguf"} if kind == "gguf" else {}
model = transformers.AutoModelForCausalLM.from_pretrained(
    folder, **extra, **({"n_positions": 32} if kind == "gguf" else {})).eval()
tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **extra)
arrays = np.load(data)
ids, targets = torch.from_numpy(arrays["ids"]), torch.from_numpy(arrays["targets"])
with torch.no_grad():
    logits = model(ids).logits
    loss = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), targets.flatten(), ignore_index=-100)
    tokens = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)
    out = model.generate(tokens.input_ids, attention_mask=tokens.attention_mask,
        do_sample=False, max_new_tokens=12)
print(json.dumps({"loss": float(loss), "text": tokenizer.decode(out[0], skip_special_tokens=True)}))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a trained ue, on a tokenizer with merges."""
    folder = tmp_path_factory.mktemp("export")
    optimizer = {"name": "adamw", "lr": 5e-3}
    plan = write_plan(
        folder,
        tokenizer={"kind": "bpe", "vocab_size": 320},
        optimizer=optimizer,
        steps=[{"step_name": "words", "datasets": ["words"], "steps": 60}],
    )
    done = call_command("lmp_trainer", "--exp", "ue", "--training-plan", str(plan), cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder


def clean(folder: Path, *args: str) -> subprocess.CompletedProcess[str]:
    return call_command("lmp_cleanmodel", "gpt_out/tiny/ue-s0", *args, cwd=folder)


def test_lmplay_format(folder: Path) -> None:
    done = clean(folder)
    assert done.returncode == 0, done.stderr
    assert "largest difference of a logit" in done.stdout
    out = folder / "gpt_out/tiny/ue-s0-clean"
    texts = [
        call_command(
            "lmp_generator", "the quick", "--model", str(m), "--max-len", "12", cwd=folder
        ).stdout
        for m in (out, folder / "gpt_out/tiny/ue-s0")
    ]
    assert texts[0] == texts[1]
    restored = restore.restore(*restore.locate(out, folder, print, "x"))
    assert not [n for n, _ in restored.model.named_parameters() if "front" in n]
    again = call_command("lmp_cleanmodel", str(out), cwd=folder)
    assert again.returncode == 1
    assert "is folded already" in again.stderr


@pytest.mark.parametrize("kind", ["hf", "gguf"])
def test_others_load_it_without_our_code(folder: Path, kind: str) -> None:
    out = folder / kind
    if kind == "gguf":
        out.mkdir()
        out /= "model.gguf"
    done = clean(folder, "--format", kind, "--out", str(out))
    assert done.returncode == 0, done.stderr
    assert not list(folder.rglob(".*.tmp"))
    restored = restore.restore(*restore.locate(folder / "gpt_out/tiny/ue-s0", folder, print, "x"))
    batches = verification.validation_batches(restored, Reporter())
    ids, targets = (
        np.concatenate([getattr(b, name) for b in batches]) for name in ("ids", "targets")
    )
    np.savez(folder / "data.npz", ids=ids, targets=targets)
    prompt = "7 the quick"
    command = [
        sys.executable,
        "-c",
        OUTSIDE,
        str(folder / kind),
        kind,
        str(folder / "data.npz"),
        prompt,
    ]
    outside = subprocess.run(command, capture_output=True, text=True, check=False, timeout=240)
    assert outside.returncode == 0, outside.stderr
    theirs = json.loads(outside.stdout.splitlines()[-1])
    ours = call_command(
        "lmp_generator", prompt, "--model", "gpt_out/tiny/ue-s0", "--max-len", "12", cwd=folder
    )
    assert theirs["text"] == ours.stdout.rstrip("\n")
    seen = verification.evaluate(
        restored.runner, restored.model.eval(), batches, torch.device("cpu")
    )
    # perplexity, to four digits
    assert f"{np.exp(theirs['loss']):.4g}" == f"{np.exp(seen.loss):.4g}"


def test_gguf_as_its_own_package_reads_it(folder: Path) -> None:
    import gguf

    out = folder / "own.gguf"
    assert clean(folder, "--format", "gguf", "--out", str(out)).returncode == 0
    reader = gguf.GGUFReader(out)
    names = {t.name for t in reader.tensors}
    assert {
        "token_embd.weight",
        "position_embd.weight",
        "blk.1.attn_qkv.weight",
        "output.weight",
    } <= names
    assert reader.fields["gpt2.context_length"].contents() == 32
    assert len(reader.fields["tokenizer.ggml.tokens"].contents()) == 320


def test_nothing_is_overwritten(folder: Path) -> None:
    (folder / "there").mkdir()
    done = clean(folder, "--out", "there")
    assert done.returncode == 1
    assert "not overwritten" in done.stderr


def test_a_wrong_fold_is_not_written(folder: Path) -> None:
    """A run whose experiment folds to another function is refused, and nothing is left behind."""
    run = folder / "gpt_out/tiny/ue-s0"
    source = run / "experiment/ue.py"
    text = source.read_text()
    wrong = text.replace("table: Any = module.table()", "table: Any = module.table() * 1.01")
    assert wrong != text
    record = (run / "run.json").read_text()
    try:
        source.write_text(wrong)
        digest = source_digest(source)
        edit_record(run, lambda record: record["identity"].update(experiment=digest))
        done = clean(folder, "--out", "wrong", "--trust")
    finally:
        source.write_text(text)
        (run / "run.json").write_text(record)
    assert done.returncode == 1
    assert "differs from the trained one" in done.stderr
    assert not list(folder.glob("*wrong*"))


@pytest.mark.parametrize(
    ("variant", "why"), [("attn_pos", "distance"), ("sac2", "has no"), ("all1", "add1")]
)
def test_what_no_standard_architecture_holds(variant: str, why: str) -> None:
    s = testing.tiny(variant)
    with pytest.raises(LmplayError, match=rf"no standard architecture.*{why}.*--format lmplay"):
        hf.form_of(s.experiment, s.runner, s.runner.fold(s.model()))


def test_a_function_that_only_looks_standard_is_refused(command: Command, tmp_path: Path) -> None:
    """The stateless recurrent baseline has gpt2ish's tensors and not its function: the check on
    text finds it."""
    plan = write_plan(tmp_path)
    assert (
        command(
            "lmp_trainer", "--exp", "rgpt2ish_stateless", "--training-plan", str(plan)
        ).returncode
        == 0
    )
    done = command("lmp_cleanmodel", "gpt_out/tiny/rgpt2ish_stateless-s0", "--format", "hf")
    assert done.returncode == 1
    assert "differs from the trained one" in done.stderr


@pytest.mark.parametrize("settings", [{}, {"head_bias": False}, {"tied": True, "head_bias": False}])
def test_gpt2_shape_computes_the_same(settings: dict[str, bool], tmp_path: Path) -> None:
    """With a bias in the head it is wider; in float64 it is the same function."""
    s = testing.tiny("gpt2ish", **settings)
    model = s.moved().eval()
    form = hf.form_of(s.experiment, s.runner, model)
    assert form.config["n_embd"] == (16 if settings else 18)
    hf.write_hf(tmp_path / "hf", form, train_bpe(["a b c"], 257), s.config.max_len)
    logits, _ = hf.read_hf(tmp_path / "hf")
    ids = s.batch().ids
    with torch.no_grad():
        torch.testing.assert_close(logits(ids), model.head(model(ids)), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["bytes", "chars", "bpe", "gpt2"])
def test_tokenizers_cut_alike(kind: str, tmp_path: Path) -> None:
    ours = {
        "bytes": Bytes,
        "chars": lambda: Chars("".join(TEXTS)),
        "bpe": lambda: train_bpe(TEXTS * 3, 300),
        "gpt2": lambda: Tiktoken("gpt2"),
    }[kind]()
    made = fast_tokenizer(ours, 64)
    made.save_pretrained(tmp_path)
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(tmp_path)
    for text in TEXTS:
        assert theirs(text, add_special_tokens=False)["input_ids"] == ours.encode(text), text
        assert theirs.decode(ours.encode(text)) == text
    assert theirs.eos_token_id == ours.eot
    assert len(theirs) == ours.vocab_size
    if kind == "chars":
        with pytest.raises(Exception, match="Missing"):  # of the token for what is unknown
            theirs("\N{SNOWMAN}")


def test_gguf_without_merges_is_refused(command: Command, tmp_path: Path) -> None:
    plan = write_plan(tmp_path)
    assert command("lmp_trainer", "--training-plan", str(plan)).returncode == 0
    done = command("lmp_cleanmodel", "gpt_out/tiny/gpt2ish-s0", "--format", "gguf")
    assert done.returncode == 1
    assert "GGUF needs a tokenizer with merges" in done.stderr
    assert [p.name for p in (tmp_path / "gpt_out/tiny").iterdir()] == ["gpt2ish-s0"]


def test_a_missing_library_is_one_line(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import importlib.util

    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "gguf" else found(name, *a)
    )
    with pytest.raises(LmplayError, match=r"needs gguf: pip install 'lmplay\[export\]'"):
        optional.check_installed("gguf")


def test_other_data_is_told(folder: Path) -> None:
    """Cleaning is judged on the text that the run was judged on."""
    data = folder / "data.jsonl"
    text = data.read_text()
    try:
        data.write_text(text.replace("wizards", "dragons"))
        done = clean(folder, "--out", "other")
    finally:
        data.write_text(text)
    assert done.returncode == 1
    assert "have changed since" in done.stderr
    assert not (folder / "other").exists()


def test_a_run_that_is_none(command: Command, tmp_path: Path) -> None:
    (tmp_path / "plan" / "ue-s0").mkdir(parents=True)
    (tmp_path / "plan" / "ue-s0" / RUN_FILE).write_text("{}")
    for name, why in (
        ("nowhere", "there is no such folder\n"),
        ("plan/ue-s1", "plan/ue-s1: there is no such folder (did you mean ue-s0?)"),
        (".", "neither a run nor a checkpoint"),
    ):
        done = command("lmp_cleanmodel", name)
        assert done.returncode == 1
        assert why in done.stderr
    assert RunFolder(tmp_path).newest(print) is None
