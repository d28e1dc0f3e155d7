"""The Python API, for notebooks and for lmplay's own commands: train, generate, compare, runs.

Trials have classes of their own, :class:`lmplay.Design` and :class:`lmplay.Trial`. Errors that a
user can fix are :class:`lmplay.errors.LmplayError`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .devices import tune_memory
from .discover import default_baseline

if TYPE_CHECKING:
    import pandas as pd

    from .decoding import Sampling
    from .training.progress import Reporter
    from .training.restore import LoadedModel
    from .training.run_folder import RunFolder


def train(
    exp: str | None = None,
    training_plan: str | None = None,
    *,
    overrides: Mapping[str, Any] | None = None,
    match: str | None = None,
    device: str = "auto",
    amp: bool = False,
    quiet: bool = False,
    reporter: Reporter | None = None,
    **options: Any,
) -> RunFolder:
    """Train an experiment on a plan, or resume the run, and return its folder.

    Args:
        exp: a variant, a file, or FILE.py:VARIANT. Default: the baseline.
        training_plan: name or file. Default: the plan that suits the device.
        overrides: Config fields and their values.
        match: "params" or "flops": train the baseline at the experiment's size instead.
        device: auto, cpu, cuda or mps.
        amp: use bf16 if the hardware has it, fp16 on older CUDA cards.
        quiet: print nothing; the run's log.txt still has it all.
        reporter: prints progress instead of the default one.
        options: fields of :class:`lmplay.training.run.RunOptions`, such as seed, tokens, minutes,
            mini_batch_size, fresh, initial_model and out.

    Raises:
        LmplayError: an argument is wrong, or the run cannot be trained.
        lmplay.training.loop.Stopped: a signal stopped the run, which was saved.
    """
    memory = tune_memory()  # before torch is imported
    from .training.progress import Reporter
    from .training.run import RunOptions, make_job, prepare_run

    if options.get("out") is not None:
        options["out"] = Path(options["out"])
    job = make_job(
        exp or default_baseline(),
        training_plan,
        {key: str(value) for key, value in (overrides or {}).items()},
        device,
        amp,
        RunOptions(**{"memory": memory, **options}),
        reporter or Reporter(brief=quiet),
    )
    run = prepare_run(job, match)
    run.train()
    return run.folder


def runs(folder: Path | str = "gpt_out") -> pd.DataFrame:
    """Return the runs below a folder, one row each, oldest first.

    Columns: path, plan, variant, label, seed, precision, finished, and the figures of the summary
    (val_loss, val_bpb, tokens, seconds, parameters, ...), NaN in runs that are not finished. A run
    whose run.json cannot be read is left out.
    """
    import pandas as pd

    from .errors import LmplayError
    from .training.run_folder import find_runs

    rows = []
    for run in find_runs(Path(folder)):
        try:
            record = run.read()
        except LmplayError:
            continue
        identity = record.get("identity", {})
        summary = record.get("summary") or {}
        rows.append(
            {
                "path": str(run.path),
                "plan": record.get("plan_name"),
                "variant": identity.get("variant"),
                "label": record.get("label", identity.get("variant")),
                "seed": identity.get("seed"),
                "precision": identity.get("precision"),
                "finished": bool(summary),
                **summary,
            }
        )
    columns = ["path", "plan", "variant", "label", "seed", "precision", "finished"]
    return pd.DataFrame(rows) if rows else pd.DataFrame(columns=columns)


def compare(
    folders: Sequence[Path | str] | Path | str = "gpt_out",
    target: str | None = None,
    *,
    train: bool = False,
    max_files: int = 200,
) -> pd.DataFrame:
    """Return the final figures of runs and their differences to the baseline of the same seed.

    One row per run: plan, run, tokens, loss, bpb, accuracy, loss_difference, to (the run it was
    compared with), parameters, tokens_per_second, peak_memory_mb.

    Args:
        folders: folders with runs, or runs.
        target: the baseline, by run or variant. Default: each run's own.
        train: use the training curves instead of the validations.

    Raises:
        LmplayError: a folder does not exist, or `target` names no run.
    """
    from .analysis.compare import collect, compare_runs

    listed = [folders] if isinstance(folders, str | Path) else folders
    kind = "train" if train else "validate"
    curves, _ = collect([Path(f) for f in listed], kind, max_files)
    comparisons = compare_runs(curves, target)
    import pandas as pd

    tables = [c.table() for c in comparisons]
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame()


def load(
    model: Path | str | None = None,
    out: Path | str = "gpt_out",
    device: str = "auto",
    trust: bool = False,
) -> LoadedModel:
    """Load a trained model, folded, for use: its runner, model and tokenizer.

    Args:
        model: a run's folder or a checkpoint's, or a pretrained model: `hf:FOLDER`, `hf:NAME` on
            the hub, or `gguf:FILE`. Default: the newest run below `out`.
        trust: execute the source in the run's folder also if it is from elsewhere.

    Raises:
        LmplayError: there is no such run, or it cannot be loaded.
    """
    import sys
    from dataclasses import replace

    from .devices import pick_device
    from .pretrained.library import is_pretrained
    from .training.restore import locate, restore

    chosen = pick_device(device)

    def note(text: str) -> None:
        print(text, file=sys.stderr)

    if is_pretrained(model):
        from .pretrained.source import load_pretrained

        restored = load_pretrained(str(model))
    else:
        path = None if model is None else Path(model)
        restored = restore(*locate(path, Path(out), note, "--model"), trust)
    on_device = restored.model.to(chosen)
    folded = on_device if restored.folded else restored.runner.fold(on_device)
    return replace(restored, model=folded, folded=True)


def stream(
    prompt: str,
    restored: LoadedModel,
    sampling: Sampling,
    max_len: int = 200,
    num_samples: int = 1,
    seed: int = 0,
) -> Iterator[list[str]]:
    """Yield the next piece of text of each of `num_samples` continuations, as they come.

    A continuation that has ended yields "".
    """
    from .decoding import TextStream
    from .decoding import generate as decode

    restored.check_writes_text(restored.name)
    tokenizer = restored.tokenizer
    texts = [TextStream(tokenizer) for _ in range(num_samples)]
    ended = [False] * num_samples
    steps = decode(
        restored.runner,
        restored.model,
        tokenizer.encode_prompt(prompt),
        max_len,
        restored.runner.window(),
        restored.config.vocab_size,
        sampling,
        num_samples,
        seed,
        tokenizer.eot,
        tokenizer.stops,
    )
    for row in steps:
        pieces = []
        for i, token in enumerate(row):
            ended[i] = ended[i] or token in tokenizer.stops
            pieces.append("" if ended[i] else texts[i].add(token))
        yield pieces
    yield [text.end() for text in texts]


def generate(
    prompt: str,
    model: Path | str | None = None,
    *,
    max_len: int = 200,
    do_sample: bool = False,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    repetition_penalty: float = 1.0,
    num_samples: int = 1,
    seed: int = 0,
    device: str = "auto",
    out: Path | str = "gpt_out",
    trust: bool = False,
) -> list[str]:
    """Return `num_samples` texts that begin with the prompt.

    Args:
        model: as for :func:`load`. Default: the newest run below `out`.
        max_len: new tokens at most.
        do_sample: draw tokens; otherwise take the most likely one.
        trust: execute the source in the run's folder also if it is from elsewhere.

    Raises:
        LmplayError: there is no such run, or a value is out of range.
    """
    tune_memory()  # before torch is imported
    from .decoding import Sampling

    sampling = Sampling(do_sample, temperature, top_k, top_p, repetition_penalty)
    restored = load(model, out, device, trust)
    texts = [prompt] * num_samples
    for pieces in stream(prompt, restored, sampling, max_len, num_samples, seed):
        texts = [text + piece for text, piece in zip(texts, pieces, strict=True)]
    return texts
