"""Evaluate models on lm-eval's tasks, keep the results, and compare models item by item."""

from __future__ import annotations

import hashlib
import io
import json
import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from ..data.token_files import cache_folder
from ..errors import LmplayError, did_you_mean, first_line
from ..files import read_json, write_json, write_text
from ..training.checkpoint import model_tensors
from ..training.restore import LoadedModel
from . import continuations
from .adapter import Model

BITS = "bits_per_byte"
FEWSHOT_SEED = 1234  # lm-eval's own
BOOTSTRAP = 1000  # resamples for metrics whose standard error has no formula
Task = str | dict[str, Any]


@dataclass(frozen=True)
class TaskResult:
    """A model's results on one task.

    Attributes:
        metrics: name -> value, and its standard error or None.
        items: name -> value of each item, in the task's order: acc and acc_norm (0 or 1), and the
            bits per byte of the correct answer.
    """

    model: str
    task: str
    key: str
    metrics: dict[str, tuple[float, float | None]]
    items: dict[str, list[float]]


def find_tasks(names: list[str], data: dict[str, Path], include: Path | None) -> Any:
    """Return lm-eval's task manager, and the tasks to run, by name.

    Args:
        names: of lm-eval's tasks, or of ours.
        data: by task, a local JSON or JSON lines file in the place of its data set.
        include: a folder with tasks of the user's (lm-eval's YAML files).

    Raises:
        LmplayError: a task is unknown, or a file is missing.
    """
    from lm_eval.tasks import TaskManager

    for name, path in data.items():
        if name not in names:
            raise LmplayError(f"--data {name}: --tasks does not have it{did_you_mean(name, names)}")
        if not path.is_file():
            raise LmplayError(f"--data {name}={path}: there is no such file")
    ours = {name for name in names if name.partition("_")[0] == continuations.NAME}
    with quiet():
        manager = TaskManager(
            include_path=None if include is None else str(include),
            include_defaults=bool(set(names) - ours),  # it takes seconds to list all of lm-eval's
        )
    known = [*manager.all_tasks, continuations.NAME]
    tasks: dict[str, Task] = {}
    for name in names:
        if name in ours:
            tasks[name] = continuations.task(name.partition("_")[2] or "en")
        elif name not in known:
            raise LmplayError(f"--tasks {name}: there is no such task{did_you_mean(name, known)}")
        else:
            tasks[name] = _local(manager, name, data[name]) if name in data else name
    return manager, tasks


def _local(manager: Any, name: str, path: Path) -> str:
    """Return a YAML file with the task, reading its items from a file whatever its split is called.

    Raises:
        LmplayError: the task is code, not a YAML file.
    """
    original = manager.task_index[name].yaml_path
    if original is None:
        raise LmplayError(f"--data {name}: this task is code and cannot read a file")
    content = {
        "include": str(original),
        "task": name,
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {
            "data_files": dict.fromkeys(("validation", "test", "dev"), str(path.resolve()))
        },
        "training_split": None,
    }
    digest = hashlib.sha256(json.dumps(content).encode() + path.read_bytes()).hexdigest()[:16]
    file = cache_folder() / "evaluation" / f"{name}-{digest}.yaml"
    write_text(file, json.dumps(content, indent=2))  # JSON is YAML
    return str(file)


def evaluate(
    loaded: LoadedModel,
    name: str,
    task: Task,
    manager: Any,
    limit: int | None,
    batch_size: int,
    progress: Callable[[int, int], None],
    key: str = "",
) -> TaskResult:
    """Evaluate a model on one task.

    Args:
        key: of :func:`key_of`, under which the result is kept.

    Raises:
        LmplayError: the task's data cannot be loaded.
    """
    from lm_eval.evaluator import evaluate as run

    model = Model(loaded, batch_size, progress)
    try:
        with quiet():
            tasks = manager.load([task])
            if len(tasks["tasks"]) != 1:
                members = ", ".join(sorted(tasks["tasks"])[:4])
                raise LmplayError(f"{name}: this is a group of tasks; name one ({members}, ...)")
            for member in tasks["tasks"].values():
                if member.get_config("num_fewshot") is None:
                    member.set_config(key="num_fewshot", value=0)
                member.set_fewshot_seed(seed=FEWSHOT_SEED)
            found = run(
                lm=model,
                task_dict=tasks,
                limit=limit,
                log_samples=True,
                bootstrap_iters=BOOTSTRAP,
            )
    except LmplayError:
        raise
    except (OSError, ValueError, RuntimeError, KeyError) as e:
        raise LmplayError(f"{name}: it cannot be evaluated: {first_line(e)}") from e
    ((own, values),) = found["results"].items()
    metrics = {}
    for column, value in values.items():
        metric, _, filtered = column.partition(",")
        if isinstance(value, int | float) and filtered and not metric.endswith("_stderr"):
            error = values.get(f"{metric}_stderr,{filtered}")
            label = metric if filtered == "none" else f"{metric} ({filtered})"
            metrics[label] = (float(value), error if isinstance(error, float) else None)
    items = per_item(found["samples"][own])
    if items.get(BITS) and BITS not in metrics:
        bits = np.array(items[BITS])
        metrics[BITS] = (float(bits.mean()), float(bits.std(ddof=1) / math.sqrt(len(bits))))
    return TaskResult(loaded.name, name, key, metrics, items)


def per_item(samples: list[dict[str, Any]]) -> dict[str, list[float]]:
    """Return the values of each item: accuracies, and the bits per byte of the correct answer."""
    items: dict[str, list[float]] = {}
    for sample in sorted(samples, key=lambda s: int(s["doc_id"])):
        for name in ("acc", "acc_norm", "exact_match"):
            if isinstance(sample.get(name), int | float):
                items.setdefault(name, []).append(float(sample[name]))
        bits = correct_bits(sample)
        if bits is not None:
            items.setdefault(BITS, []).append(bits)
    return items


def correct_bits(sample: dict[str, Any]) -> float | None:
    """Return the bits per byte of the correct continuation; None if the task has none."""
    target = sample["target"]
    arguments = _arguments(sample)
    choices = sample["resps"]
    if not isinstance(target, int) or isinstance(target, bool) or len(choices) != len(arguments):
        return None
    if not 0 <= target < len(choices) or len(choices) < 2:
        return None
    nats = -float(choices[target][0][0])
    continuation = arguments[target][1]
    return nats / math.log(2) / max(1, len(continuation.encode()))


def _arguments(sample: dict[str, Any]) -> list[tuple[str, str]]:
    """Return a sample's (context, continuation) pairs, which lm-eval keeps in one of two forms."""
    arguments = sample["arguments"]
    if isinstance(arguments, dict):
        return [tuple(pair.values()) for pair in arguments.values()]
    return [tuple(pair) for pair in arguments]


@dataclass(frozen=True)
class Paired:
    """The difference of two models over the same items.

    Attributes:
        mean: of the differences.
        low, high: its 95 % interval (t).
        p: two-sided; for 0 and 1 the exact test of McNemar (1947), else the paired t test.
    """

    metric: str
    mean: float
    low: float
    high: float
    p: float


def compare(a: TaskResult, b: TaskResult) -> list[Paired]:
    """Compare model a with model b, item by item.

    Raises:
        LmplayError: they were evaluated on other items.
    """
    found = []
    for metric in a.items:
        if metric not in b.items:
            continue
        x, y = np.array(a.items[metric]), np.array(b.items[metric])
        if len(x) != len(y):
            raise LmplayError(f"{a.task}: {a.model} and {b.model} were evaluated on other items")
        if len(x) < 2:
            continue
        d = x - y
        mean = float(d.mean())
        margin = float(stats.t.ppf(0.975, len(d) - 1) * d.std(ddof=1) / math.sqrt(len(d)))
        if set(np.unique(d)) <= {-1.0, 0.0, 1.0}:
            better, worse = int((d > 0).sum()), int((d < 0).sum())
            p = float(stats.binomtest(better, better + worse).pvalue) if better + worse else 1.0
        else:
            p = float(stats.ttest_rel(x, y).pvalue)
        found.append(Paired(metric, mean, mean - margin, mean + margin, p))
    return found


def key_of(loaded: LoadedModel, task: Task, limit: int | None) -> str:
    """Return what decides a result: the weights, the tokenizer, the task and the items."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model_tensors(loaded.model).items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).numpy().tobytes())
    parts = [loaded.tokenizer.fingerprint, task, limit]
    digest.update(json.dumps(parts, sort_keys=True).encode())
    return digest.hexdigest()[:16]


def result_file(out: Path, model: str, task: str) -> Path:
    """Return where a result is kept."""
    name = model.partition(":")[2] or model
    kept = "-".join(part for part in Path(name).parts[-2:] if part not in ("/", ".."))
    return out / "evaluations" / kept / f"{task}.json"


def read_result(path: Path, key: str) -> TaskResult | None:
    """Return a kept result; None if there is none, or it is of other weights or items."""
    try:
        content = read_json(path)
        if content.get("key") != key:
            return None
        metrics = {name: (value, error) for name, (value, error) in content["metrics"].items()}
        return TaskResult(content["model"], content["task"], key, metrics, content["items"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def write_result(path: Path, result: TaskResult) -> None:
    write_json(path, asdict(result))


@contextmanager
def quiet() -> Iterator[None]:
    """Silence lm-eval's and the data library's logs and bars, which repeat what we print."""
    from datasets.utils.logging import disable_progress_bar, enable_progress_bar

    loggers = [logging.getLogger(name) for name in ("lm_eval", "lm-eval", "datasets")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    disable_progress_bar()
    try:
        with redirect_stderr(io.StringIO()):  # lm-eval's bars cannot be turned off
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        enable_progress_bar()
