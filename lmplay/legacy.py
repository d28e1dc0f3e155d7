"""Plan files of the original playground (jmward01/lmplay), in today's spelling.

Their data sets name a loader (`ds_loader`), and their steps may hold
`interleve_stopping_strategy`. What they leave out takes the defaults of :mod:`lmplay.plan`, which
are the original's.
"""

from __future__ import annotations

from typing import Any

from .errors import did_you_mean


def modernize(data: dict[str, Any]) -> dict[str, Any]:
    """Return the content of a plan file with data sets and steps in today's spelling.

    Raises:
        ValueError: a loader is unknown, or its arguments are wrong.
    """
    data = dict(data)
    if isinstance(data.get("datasets"), dict):
        data["datasets"] = {
            name: _dataset(spec) if isinstance(spec, dict) and "ds_loader" in spec else spec
            for name, spec in data["datasets"].items()
        }
    if isinstance(data.get("steps"), list):
        data["steps"] = [
            _stage(i, s) if isinstance(s, dict) else s for i, s in enumerate(data["steps"])
        ]
    return data


def _dataset(spec: dict[str, Any]) -> dict[str, Any]:
    unknown = set(spec) - {"ds_loader", "args", "kwargs"}
    if unknown:
        raise ValueError(
            f"data set with ds_loader: unknown key {sorted(unknown)[0]} (there is: args, kwargs)"
        )
    loader = spec["ds_loader"]
    args = list(spec.get("args", []))
    kwargs = dict(spec.get("kwargs", {}))
    kwargs.pop("save_local", None)
    most = {"wiki": 1, "openorca": 0, "hf": 3}.get(loader, len(args))
    if len(args) > most:
        raise ValueError(f"ds_loader {loader} takes {most} args, not {len(args)}")
    if loader == "wiki":
        language = (args or [kwargs.pop("lang", "en")])[0]
        columns = {"text": "text", "title": "title"}
        return {
            "source": "hub",
            "path": "wikimedia/wikipedia",
            "name": f"20231101.{language}",
            "columns": columns,
            **kwargs,
        }
    if loader == "openorca":
        return {
            "source": "hub",
            "path": "Open-Orca/OpenOrca",
            "columns": {"prompt": "question", "truth": "response"},
            **kwargs,
        }
    if loader == "hf":
        if len(args) < 2:
            raise ValueError(
                "ds_loader hf needs args [save name, data set, configuration (optional)]"
            )
        columns = {}
        for theirs, ours in (
            ("text_column", "text"),
            ("prompt_column", "prompt"),
            ("truth_column", "truth"),
        ):
            if theirs in kwargs:
                columns[ours] = kwargs.pop(theirs)
        if "prompt" not in columns and "truth" in columns:  # a truth alone is plain text, or a chat
            truth = columns.pop("truth")
            columns["messages" if truth == "messages" else "text"] = truth
        name = args[2] if len(args) > 2 else None
        return {
            "source": "hub",
            "path": args[1],
            "name": name,
            "columns": columns or {"text": "text"},
            **kwargs,
        }
    raise ValueError(f"ds_loader {loader}{did_you_mean(loader, ['hf', 'wiki', 'openorca'])}")


def _stage(index: int, step: dict[str, Any]) -> dict[str, Any]:
    step = dict(step)
    if "interleve_stopping_strategy" in step:
        step["interleave"] = step.pop("interleve_stopping_strategy")
    step.setdefault("step_name", str(index))
    return step
