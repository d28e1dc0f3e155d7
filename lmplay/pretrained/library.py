"""Reading with the transformers library: names of pretrained models, and their configs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import LmplayError, first_line
from ..optional import need, quiet

PREFIXES = ("hf:", "gguf:")
NOT_READ = {  # by transformers, of a GGUF file: an attribute of the config, and its key
    "gpt2": ("n_positions", "gpt2.context_length"),
    "qwen3": ("head_dim", "qwen3.attention.key_length"),
}


def is_pretrained(model: object) -> bool:
    """Return whether a name is that of a pretrained model, and not of a run."""
    return isinstance(model, str) and model.startswith(PREFIXES)


def location(spec: str) -> tuple[str, dict[str, str]]:
    """Return what transformers' from_pretrained takes: a folder or a name, and gguf_file.

    Raises:
        LmplayError: the file or the folder does not exist.
    """
    kind, _, name = spec.partition(":")
    path = Path(name).expanduser()
    if kind == "gguf":
        if not path.is_file():
            raise LmplayError(f"{spec}: there is no such file")
        return str(path.parent), {"gguf_file": path.name}
    looks_local = path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1
    if path.is_dir():
        return str(path), {}
    if looks_local or not name:
        raise LmplayError(f"{spec}: there is no such folder")
    return name, {}


def read(spec: str, what: str, loader: Callable[..., Any], **options: Any) -> Any:
    """Call one of transformers' from_pretrained.

    Args:
        what: is read, for the message.

    Raises:
        LmplayError: it fails, for whatever reason.
    """
    folder, gguf = location(spec)
    try:
        with quiet(need("transformers")):
            return loader(folder, **gguf, **options)
    except Exception as e:  # transformers and the hub raise types of their own
        raise LmplayError(f"{spec}: transformers cannot read {what}: {first_line(e)}") from e


def read_config(spec: str) -> Any:
    """Return a model's config.

    Raises:
        LmplayError: there is no such model, or transformers does not know its architecture.
    """
    config = read(spec, "its config", need("transformers").AutoConfig.from_pretrained)
    folder, gguf = location(spec)
    if gguf:
        for key, value in config.to_dict().items():
            if isinstance(value, float):  # GGUF has float32: 1e-5 is 9.999999747378752e-06
                setattr(config, key, float(f"{value:.7g}"))
        if config.model_type in NOT_READ:
            name, key = NOT_READ[config.model_type]
            reader = need("gguf").GGUFReader(str(Path(folder) / gguf["gguf_file"]))
            setattr(config, name, int(reader.fields[key].contents()))
    return config
