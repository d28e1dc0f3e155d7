"""Weights, config and tokenizer of a model that transformers can read, as an experiment's."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..api import HfForm, ModelRunner, OwnForm
from ..discover import Experiment, find, find_baseline, list_sources, load
from ..errors import LmplayError
from ..model import build_model
from ..optional import need
from ..training.restore import LoadedModel
from ..training.warm_start import InitialWeights
from .library import location, read, read_config
from .tokenizer import read_tokenizer

DEFAULT_LENGTH = 1024  # of a model that can read longer texts, where no plan says


class Pretrained:
    """A model that transformers can read. Its config is read at once, its weights on demand.

    Args:
        spec: `hf:FOLDER`, `hf:NAME` on the hub, or `gguf:FILE`.

    Raises:
        LmplayError: there is no such model, or transformers cannot read its config.
    """

    def __init__(self, spec: str):
        self.spec = spec
        self.config = read_config(spec)
        self.model_type: str = self.config.model_type

    def max_len(self, wanted: int | None) -> int:
        """Return the length of its texts: what a plan wants, or what it was trained for."""
        own = getattr(self.config, "max_position_embeddings", None) or DEFAULT_LENGTH
        return wanted or min(own, DEFAULT_LENGTH)

    def fields(self, experiment: Experiment, max_len: int) -> dict[str, Any]:
        """Return the fields of the experiment's Config, without loading the weights.

        Raises:
            LmplayError: neither the experiment nor its baseline can hold this model.
        """
        with torch.device("meta"):
            model = need("transformers").AutoModelForCausalLM.from_config(self.config)
        return self._own(experiment, max_len, model.state_dict()).config

    def weights(self, experiment: Experiment, max_len: int) -> InitialWeights:
        """Load the weights, in float32, under the experiment's names.

        Raises:
            LmplayError: a file is missing or damaged, is a pickle, or lacks a tensor.
        """
        self._check_files()
        model, info = read(
            self.spec,
            "its weights",
            need("transformers").AutoModelForCausalLM.from_pretrained,
            config=self.config,
            dtype=torch.float32,
            use_safetensors=True,
            output_loading_info=True,
        )
        if missing := sorted(info["missing_keys"]):  # the library would start them at random
            raise LmplayError(f"{self.spec}: its file has no tensor {missing[0]}")
        tensors = model.state_dict()
        own = self._own(experiment, max_len, tensors)
        name = Path(self.spec.partition(":")[2]).name
        return InitialWeights(name, self.spec, own.tensors, _digest(tensors), tuple(own.unused))

    def _check_files(self) -> None:
        name, gguf = location(self.spec)
        folder = Path(name)
        if gguf or not folder.is_dir() or any(folder.glob("*.safetensors")):
            return
        pickles = [path for end in ("bin", "pt", "pth", "ckpt") for path in folder.glob(f"*.{end}")]
        if pickles:
            raise LmplayError(
                f"{self.spec}: its weights are only in {pickles[0].name}, a pickle, which can run "
                "code when it is read: refused; transformers' save_pretrained writes safetensors"
            )
        raise LmplayError(f"{self.spec}: there are no weights (*.safetensors) in this folder")

    def _own(self, experiment: Experiment, max_len: int, tensors: dict[str, Tensor]) -> OwnForm:
        runner = self._runner(experiment)
        form = HfForm(self.model_type, self.config.to_dict(), tensors=tensors)
        try:
            return runner.from_hf(form, max_len)
        except ValueError as e:
            raise LmplayError(f"{self.spec}: {experiment.variant} cannot hold it: {e}") from e
        except KeyError as e:
            raise LmplayError(f"{self.spec}: it has no {e.args[0]}") from e

    def _runner(self, experiment: Experiment) -> type[ModelRunner]:
        """Return the runner class that reads such a model: the experiment's, or its baseline's.

        Raises:
            LmplayError: neither does; the message says which experiment can.
        """
        for candidate in (experiment, load(*find_baseline(experiment.source))):
            runner: type[ModelRunner] = candidate.module.Runner
            if self.model_type in runner.hf_types:
                return runner
        known = readers()
        hint = f"--exp {known[self.model_type]} can" if self.model_type in known else ""
        hint = hint or f"supported architectures: {', '.join(sorted(known))}"
        raise LmplayError(
            f"{self.spec}: {experiment.variant} cannot hold the architecture {self.model_type}; "
            f"{hint}"
        )


def readers() -> dict[str, str]:
    """Return, for each architecture of transformers, a baseline that can hold it."""
    found: dict[str, str] = {}
    for source in list_sources():
        if source.broken or "hf_types" not in source.path.read_text(encoding="utf-8"):
            continue
        variant = next(iter(source.variants))
        for model_type in load(source, variant).module.Runner.hf_types:
            found.setdefault(model_type, variant)
    return found


def load_pretrained(spec: str) -> LoadedModel:
    """Return a pretrained model in the experiment that holds its architecture, on the CPU.

    Raises:
        LmplayError: it cannot be read, or no experiment can hold it.
    """
    source = Pretrained(spec)
    known = readers()
    if source.model_type not in known:
        raise LmplayError(
            f"{spec}: no experiment can hold the architecture {source.model_type}; supported: "
            f"{', '.join(sorted(known))}"
        )
    experiment = load(*find(known[source.model_type]))
    max_len = source.max_len(None)
    config, _ = experiment.config(source.fields(experiment, max_len), {})
    runner = experiment.runner(config)
    model = build_model(runner, 0)
    weights = source.weights(experiment, max_len)
    weights.check_complete(model)
    weights.copy_to(model)
    return LoadedModel(spec, experiment, config, runner, model, read_tokenizer(spec), folded=False)


def _digest(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()
