"""Fold a run's model, write it in a format, read it back, and compare."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import safetensors
import torch
from torch import nn

from ..api import HfForm
from ..data.packing import Arrays
from ..devices import pick_device
from ..errors import LmplayError, first_line
from ..files import atomic_folder, atomic_write
from ..optional import check_installed
from ..training import checkpoint
from ..training.progress import Reporter
from ..training.restore import Restored
from ..training.run_folder import RunFolder
from .gguf import write_gguf
from .hf import form_of, read_hf, write_hf
from .verification import (
    EvalResult,
    check_equal,
    check_tokenizer,
    evaluate,
    evaluate_logits,
    one_by_one,
    validation_batches,
)

SUFFIXES = {"lmplay": "-clean", "hf": "-hf", "gguf": ".gguf"}
FOREIGN_SEQUENCES = 8  # compared with a model of another library that may be slow
GELU_TOLERANCE = 5e-4  # of the loss, because GGUF's readers compute GELU by another formula


def export(
    restored: Restored,
    out: Path | None,
    kind: str,
    device: str,
    reporter: Reporter,
    log: Callable[[str], None],
) -> Path:
    """Export a run and return where it was written.

    Args:
        out: a folder, or for gguf a file; it must not exist. Default: next to the run.
        kind: "lmplay", "hf" or "gguf".

    Raises:
        LmplayError: the format cannot hold the model or the tokenizer, the validation text is
            missing, or the written model differs from the trained one. Then nothing is written.
    """
    restored.check_writes_text(f"--format {kind}")
    path = restored.run.path.resolve()
    out = out or path.with_name(path.name + SUFFIXES[kind])
    if out.exists():
        raise LmplayError(f"--out {out}: something is there already, and it is not overwritten")
    check_installed(kind)
    if kind == "lmplay" and restored.folded:
        raise LmplayError(
            f"{restored.run.path} is folded already; --format hf or gguf writes it for others"
        )
    if kind != "lmplay":  # report what does not fit before the long work
        _form(restored, _folded(restored), kind)
    torch_device = pick_device(device)
    with reporter:
        batches = validation_batches(restored, reporter)
    model = restored.model.to(torch_device).eval()
    folded = model if restored.folded else restored.runner.fold(model).eval()
    before = evaluate(restored.runner, model, batches, torch_device)
    after = evaluate(restored.runner, folded, batches, torch_device)
    parameters = sum(p.numel() for p in model.parameters())
    log(f"parameters: {parameters} -> {sum(p.numel() for p in folded.parameters())}")
    log(check_equal("folded", before, after))
    try:
        if kind == "lmplay":
            with atomic_folder(out) as folder:
                _write_lmplay(folder, restored, folded)
        elif kind == "hf":
            with atomic_folder(out) as folder:
                _write_hf(folder, restored, folded.cpu(), batches, after, log)
        else:
            _write_gguf(out, restored, folded.cpu(), batches, after, log)
    except (OSError, safetensors.SafetensorError) as e:  # a full disk, mostly
        reason = getattr(e, "strerror", None) or first_line(e)
        raise LmplayError(f"{out}: it could not be written: {reason}; nothing is left of it") from e
    return out


def _folded(restored: Restored) -> nn.Module:
    return restored.model if restored.folded else restored.runner.fold(restored.model)


def _form(restored: Restored, folded: nn.Module, kind: str) -> HfForm:
    """Return the model in the library's form.

    Raises:
        LmplayError: there is none, or the format cannot hold it.
    """
    form = form_of(restored.experiment, restored.runner, folded)
    if kind == "gguf" and form.model_type != "gpt2":
        raise LmplayError(
            f"--format gguf writes only models of GPT-2's shape; --format hf writes this "
            f"{form.model_type}"
        )
    return form


def _log_form(restored: Restored, form: HfForm, log: Callable[[str], None]) -> None:
    width = form.config.get("n_embd")
    if form.model_type == "gpt2" and width != getattr(restored.config, "embed_dim", width):
        log(f"GPT-2's head has no bias: written {width} wide, which computes the same")
    log(f"written as the transformers library's {form.model_type}")


def _write_lmplay(folder: Path, restored: Restored, folded: nn.Module) -> None:
    """Write a run's folder whose checkpoint holds the folded model."""
    record = restored.run.read()
    count = sum(p.numel() for p in folded.parameters())
    summary = record.get("summary", {}) | {"parameters": count, "training_only_parameters": 0}
    source = str(restored.run.path)
    content = {**record, "cleaned": True, "cleaned_from": source, "summary": summary}
    tensors = {"model": checkpoint.model_tensors(folded)}
    checkpoint.save(folder / "checkpoints", restored.found.step, tensors, {})
    RunFolder(folder).create(content, restored.experiment, restored.tokenizer)


def _write_hf(
    folder: Path,
    restored: Restored,
    folded: nn.Module,
    batches: list[Arrays],
    ours: EvalResult,
    log: Callable[[str], None],
) -> None:
    """Write the folder, read it back with transformers, and compare."""
    form = _form(restored, folded, "hf")
    _log_form(restored, form, log)
    write_hf(folder, form, restored.tokenizer, restored.config.max_len)
    model, tokenizer = read_hf(folder)
    if form.model_type != "gpt2":
        # Without kernels the library may need minutes, and gigabytes, for what takes us seconds.
        batches = one_by_one(batches, FOREIGN_SEQUENCES)
        log(f"compared on {len(batches)} sequences of the validation set, one by one")
        ours = evaluate(restored.runner, folded, batches, torch.device("cpu"))
    log(check_equal("hf", ours, evaluate_logits(model, batches)))
    check_tokenizer(restored, tokenizer, batches)


def _write_gguf(
    out: Path,
    restored: Restored,
    folded: nn.Module,
    batches: list[Arrays],
    ours: EvalResult,
    log: Callable[[str], None],
) -> None:
    """Write the file, read it back with transformers, and compare."""
    form = _form(restored, folded, "gguf")
    _log_form(restored, form, log)
    positions = form.config["n_positions"]
    with atomic_write(out) as file:
        folder = file.with_name(f"{file.name}.d")  # transformers reads the files of a folder
        folder.mkdir()
        try:
            inside = folder / "model.gguf"
            write_gguf(inside, form, restored.tokenizer, restored.run.path.name)
            model, tokenizer = read_hf(folder, gguf_file=inside.name, n_positions=positions)
            log("GGUF's readers compute GELU by the tanh formula: a small difference is theirs")
            foreign = evaluate_logits(model, batches)
            log(check_equal("gguf", ours, foreign, GELU_TOLERANCE, 0.05))
            check_tokenizer(restored, tokenizer, batches)
            inside.rename(file)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    log(f"transformers read it with gguf_file=..., n_positions={positions}")
