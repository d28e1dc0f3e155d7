"""lmp_cleanmodel: fold a run's training-only weights away and write the plain model, checked on real text."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import LmplayError
from . import ending

if TYPE_CHECKING:
    import torch

    from ..api import ModelRunner
    from ..data.packing import Arrays
    from ..export import Gpt2
    from ..report import Report
    from ..restore import Restored

EPILOG = """formats:
  lmplay  a run's folder that lmp_generator and --initial-model take (RUN-clean)
  hf      a folder that transformers' AutoModelForCausalLM and AutoTokenizer load (RUN-hf)
  gguf    a file for llama.cpp and its family (RUN.gguf)"""
SUFFIXES = {"lmplay": "-clean", "hf": "-hf", "gguf": ".gguf"}
TOLERANCE = 1e-4  # of the largest logit, and of the loss in nats: float32 rounding stays far below
FOREIGN_SEQUENCES = 8  # compared with another library's model that may be slow
GELU_TOLERANCE = 5e-4  # of the loss: GGUF's readers compute GELU by another formula


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="lmp_cleanmodel",
        description=__doc__.split(": ", 1)[1],
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("run", type=Path, metavar="RUN", help="a run's folder or a checkpoint in it")
    p.add_argument(
        "--out", type=Path, metavar="FOLDER|FILE", help="where to write: a folder, for gguf a file (beside the run)"
    )
    p.add_argument("--format", choices=tuple(SUFFIXES), default="lmplay")
    p.add_argument("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto")
    return p


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    return ending("lmp_cleanmodel", lambda: command(args))


@dataclass(frozen=True)
class Seen:
    """What a model makes of the validation text: mean loss in nats, and some logits (N, V) on the CPU."""

    loss: float
    logits: torch.Tensor

    def distance(self, other: Seen) -> float:
        """The largest difference of a logit, over the largest logit."""
        return float((self.logits - other.logits).abs().max() / self.logits.abs().max())


def command(args: argparse.Namespace) -> int:
    from ..devices import tune_memory

    tune_memory()  # before torch is imported
    from ..devices import pick_device
    from ..report import Report, make_console
    from ..restore import locate, restore

    report = Report(make_console())
    restored = restore(*locate(args.run, Path(), report.note, "RUN"))
    path = restored.run.path.resolve()
    out = args.out or path.with_name(path.name + SUFFIXES[args.format])
    if out.exists():
        raise LmplayError(f"--out {out}: something is there already, and it is not overwritten")
    if args.format != "lmplay":
        require(args.format)
        form = restored.runner.to_hf(restored.model)
        if form is not None and args.format == "gguf":
            raise LmplayError(
                f"--format gguf writes models of GPT-2's shape only; --format hf writes this {form.model_type}"
            )
        if form is None:
            standard(restored, restored.model)  # what no architecture holds is told before the long work
    elif restored.folded:
        raise LmplayError(f"{restored.run.path} is clean already; --format hf or gguf writes it for others")
    device = pick_device(args.device)
    with report:
        batches = validation(restored, report)
    model = restored.model.to(device).eval()
    folded = model if restored.folded else restored.runner.fold(model).eval()
    before = look(restored.runner, model, batches, device)
    after = look(restored.runner, folded, batches, device)
    count = sum(p.numel() for p in folded.parameters())
    print(f"parameters: {sum(p.numel() for p in model.parameters())} -> {count}")
    check("folded", before, after, TOLERANCE)
    with finished(out) as temporary:
        if args.format == "lmplay":
            write_lmplay(temporary, restored, folded)
        else:
            write_foreign(temporary, args.format, restored, folded.cpu(), batches, after)
    print(f"written: {out}")
    return 0


def require(kind: str) -> None:
    """Whether the libraries that write and check the format are there; asked before the long work."""
    import importlib.util

    from ..export import EXTRA

    for package in {"hf": ("transformers",), "gguf": ("transformers", "gguf", "accelerate")}[kind]:
        if importlib.util.find_spec(package) is None:
            raise LmplayError(f"--format {kind} needs {package}: {EXTRA}")


def validation(restored: Restored, report: Report) -> list[Arrays]:
    """The validation set of the plan that the run was trained on.

    Raises:
        LmplayError: its text cannot be had, or is not the same any more.
    """
    from ..data.packing import ValidationSet
    from ..data.shards import prepare
    from ..plan import parse_plan

    plan = parse_plan(restored.run.read()["plan"], f"the plan in {restored.run.path}")
    prepared = prepare(plan, report.preparing)
    if prepared.fingerprint != restored.run.read()["identity"]["data"]:
        raise LmplayError(
            f"{restored.run.path}: the plan's data is not what it was when the run was trained: restore it, or "
            "train anew with --fresh"
        )
    return list(ValidationSet(plan, prepared, restored.config.max_len).batches(8))


def look(runner: ModelRunner, model: torch.nn.Module, batches: list[Arrays], device: torch.device) -> Seen:
    """The model through the interface of its runner, in float32."""
    import torch

    from ..probe import to_batch

    loss, counted, logits = 0.0, 0, []
    with torch.no_grad(), runner.fixed_weights(model):
        for arrays in batches:
            batch = to_batch(arrays, slice(None), device)
            out = runner.step(model, batch)
            loss, counted = loss + float(out.loss_sum), counted + int(out.n_tokens)
            logits += [runner.logits(model, batch.ids[:, :t])[0].cpu() for t in lengths(batch.ids.shape[1])]
    return Seen(loss / max(1, counted), torch.cat(logits))


def one_by_one(batches: list[Arrays], most: int) -> list[Arrays]:
    """The first sequences, a batch each."""
    from ..data.packing import Arrays

    return [Arrays(b.ids[i : i + 1], b.targets[i : i + 1]) for b in batches for i in range(len(b.ids))][:most]


def lengths(length: int) -> list[int]:
    """The prefixes whose last logits are compared: quarters of the sequence."""
    return [max(1, length * quarter // 4) for quarter in (1, 2, 3, 4)]


def look_foreign(model: Any, batches: list[Arrays]) -> Seen:
    """The same of a model that gives logits (B, T, V) for ids (B, T)."""
    import torch
    import torch.nn.functional as F

    from ..api import IGNORE
    from ..probe import to_batch

    loss, counted, logits = 0.0, 0, []
    with torch.no_grad():
        for arrays in batches:
            batch = to_batch(arrays, slice(None), torch.device("cpu"))
            out = model(batch.ids)
            flat = batch.targets.flatten()
            loss += float(F.cross_entropy(out.flatten(0, 1), flat, ignore_index=IGNORE, reduction="sum"))
            counted += int((flat != IGNORE).sum())
            logits += [out[:, t - 1] for t in lengths(out.shape[1])]
    return Seen(loss / max(1, counted), torch.cat(logits))


def check(name: str, before: Seen, after: Seen, loss_tolerance: float, logit_tolerance: float = TOLERANCE) -> None:
    """Say how near two forms of a model are.

    Raises:
        LmplayError: further than rounding explains.
    """
    distance = before.distance(after)
    print(f"{name}: val_loss {before.loss:.6f} -> {after.loss:.6f}, largest difference of a logit {distance:.1e}")
    if not (distance <= logit_tolerance and abs(after.loss - before.loss) <= loss_tolerance):
        raise LmplayError(
            f"the {name} model computes something else than the trained one (allowed: {logit_tolerance:g} of the "
            f"largest logit, {loss_tolerance:g} nats): nothing is written; the experiment's fold is wrong, "
            "and lmplay.testing.check_experiment says more"
        )


@contextmanager
def finished(out: Path) -> Iterator[Path]:
    """A temporary path beside `out` that takes its name when all went well, and goes when not."""
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        temporary.rename(out)
    except OSError as e:
        raise LmplayError(f"{out}: it could not be written: {e.strerror or e}") from e
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary)
        else:
            temporary.unlink(missing_ok=True)


def write_lmplay(folder: Path, restored: Restored, folded: torch.nn.Module) -> None:
    """A run's folder whose checkpoint holds the folded model."""
    from ..checkpoint import model_tensors, save
    from ..runs import RunFolder

    folder.mkdir()
    content = {**restored.run.read(), "cleaned": True, "cleaned_from": str(restored.run.path)}
    count = sum(p.numel() for p in folded.parameters())
    content["summary"] = {**content.get("summary", {}), "parameters": count, "training_only_parameters": 0}
    save(folder / "checkpoints", restored.found.step, {"model": model_tensors(folded)}, {})
    RunFolder(folder).create(content, restored.experiment, restored.tokenizer)


def write_foreign(
    path: Path, kind: str, restored: Restored, folded: torch.nn.Module, batches: list[Arrays], ours: Seen
) -> None:
    """Write the format, read it back with the library that others use, and compare."""
    import torch

    from .. import export

    form = restored.runner.to_hf(folded)
    if kind == "hf" and form is not None:
        print(f"written as the transformers library's {form.model_type}")
        export.write_form(path, form, folded, restored.tokenizer, restored.config.max_len)
    else:
        shape = standard(restored, folded)
        if "head.bias" in dict(folded.named_parameters()):
            print(f"GPT-2's head has no bias: written {shape.embed_dim} wide, where it computes the same")
    if kind == "hf":
        if form is None:
            export.write_gpt2(path, shape, restored.tokenizer)
        model, tokenizer = export.read_hf(path)
        if form is not None:
            # Without kernels the library may need minutes, and gigabytes, where we need seconds.
            batches = one_by_one(batches, FOREIGN_SEQUENCES)
            print(f"compared on {len(batches)} sequences of the validation set, one by one")
            ours = look(restored.runner, folded, batches, torch.device("cpu"))
        check("hf", ours, look_foreign(model, batches), TOLERANCE)
    else:
        path.mkdir()
        file = path / "model.gguf"
        export.write_gguf(file, shape, restored.tokenizer, restored.run.path.name)
        model, tokenizer = export.read_gguf(file, shape)
        print("GGUF's readers compute GELU by the tanh formula: a small difference is theirs")
        check("gguf", ours, look_foreign(model, batches), GELU_TOLERANCE, 0.05)
    compare_tokenizers(restored, tokenizer, batches)
    if kind == "gguf":  # a file where the folder was
        aside = path.with_name(f"{path.name}.file")
        file.rename(aside)
        shutil.rmtree(path)
        aside.rename(path)
        print(f"transformers read it with gguf_file=..., n_positions={shape.max_len}")


def standard(restored: Restored, model: torch.nn.Module) -> Gpt2:
    """The model, folded if it is not yet, in GPT-2's shape."""
    from ..export import as_gpt2

    folded = restored.runner.fold(model) if model is restored.model and not restored.folded else model
    return as_gpt2(folded, getattr(restored.config, "num_heads", 1))


def compare_tokenizers(restored: Restored, theirs: Any, batches: list[Arrays]) -> None:
    """Whether the written tokenizer gives the same ids on the validation text.

    Raises:
        LmplayError: it does not.
    """
    tokenizer = restored.tokenizer
    for arrays in batches:
        for ids in arrays.ids:
            text = tokenizer.decode(int(i) for i in ids if i != tokenizer.eot)
            if theirs(text, add_special_tokens=False, verbose=False)["input_ids"] != tokenizer.encode(text):
                raise LmplayError(f"the written tokenizer cuts {text[:40]!r}... differently: nothing is written")


if __name__ == "__main__":
    sys.exit(main())
