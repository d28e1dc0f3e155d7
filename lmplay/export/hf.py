"""A folded model as a folder that transformers loads without lmplay."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..api import HfForm, ModelRunner
from ..data.tokenizers import Tokenizer
from ..discover import Experiment, find_baseline, load
from ..errors import LmplayError
from ..optional import need, quiet
from ..training.checkpoint import model_tensors
from .gpt2 import HEAD_BIAS, without_head_bias
from .tokenizer import fast_tokenizer

Logits = Callable[[Tensor], Tensor]  # ids (B, T) -> logits (B, T, V)


def form_of(experiment: Experiment, runner: ModelRunner, folded: nn.Module) -> HfForm:
    """Return the folded model as one of the transformers library's.

    A runner without a form of its own can have its baseline's, if the folded parameters are the
    baseline's by name and shape.

    Raises:
        LmplayError: there is no such form.
    """
    form = runner.to_hf(folded)
    if form is None:
        form = _baselines_form(experiment, runner, folded)
    own = model_tensors(folded)
    tensors = {theirs: own[name].detach().cpu() for theirs, name in form.names.items()}
    tensors |= {name: t.detach().cpu() for name, t in form.tensors.items()}
    complete = replace(form, names={}, tensors=tensors)
    if HEAD_BIAS in tensors:
        complete = without_head_bias(complete)
    final = {name: t.float().contiguous() for name, t in complete.tensors.items()}
    return replace(complete, tensors=final)


def _baselines_form(experiment: Experiment, runner: ModelRunner, folded: nn.Module) -> HfForm:
    """Return the baseline's form of a model with the baseline's parameters.

    Raises:
        LmplayError: the baseline has none, or the first parameter that differs.
    """
    baseline = load(*find_baseline(experiment.source))
    names = {f.name for f in dataclasses.fields(baseline.config_type)}
    settings = {k: v for k, v in dataclasses.asdict(runner.config).items() if k in names}
    variant = baseline.source.variants[baseline.variant]
    base_runner = baseline.runner(baseline.config_type(**{**variant, **settings}))
    with torch.device("meta"):
        wanted = {name: t.shape for name, t in model_tensors(base_runner.build()).items()}
    own = {name: t.shape for name, t in model_tensors(folded).items()}
    odd = sorted(set(wanted) ^ set(own)) or [n for n in wanted if wanted[n] != own[n]]
    form = base_runner.to_hf(folded) if not odd else None
    if form is None:
        reason = f"{baseline.variant} has no form in transformers"
        if odd:
            reason = f"it {'has' if odd[0] in own else 'has no'} {odd[0]}"
        raise LmplayError(
            f"no standard architecture holds this model: {reason}; --format lmplay keeps it"
        )
    return form


def write_hf(folder: Path, form: HfForm, tokenizer: Tokenizer, max_len: int) -> None:
    """Write a folder for AutoModelForCausalLM and AutoTokenizer.

    Raises:
        LmplayError: the library's model has other parameters than the form.
    """
    transformers = need("transformers")
    eos = tokenizer.eos
    tokens = {"bos_token_id": tokenizer.eot, "eos_token_id": eos, "pad_token_id": eos}
    config = transformers.AutoConfig.for_model(form.model_type, **form.config, **tokens)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    missing, unexpected = model.load_state_dict(form.tensors, strict=False, assign=True)
    if wrong := sorted((set(missing) - tied) | set(unexpected)):
        raise LmplayError(
            f"transformers' {form.model_type} has other parameters ({wrong[0]}); "
            "--format lmplay keeps it"
        )
    if tied:
        model.tie_weights()
    with quiet(transformers):
        model.save_pretrained(folder)
    fast_tokenizer(tokenizer, max_len).save_pretrained(folder)


def read_hf(folder: Path, **gguf: Any) -> tuple[Logits, Any]:
    """Load a folder with transformers; return the model's logits, and its tokenizer.

    Args:
        gguf: `gguf_file`, and `n_positions`, which transformers does not read from the file.
    """
    transformers = need("transformers")
    model_only = {"n_positions": gguf.pop("n_positions")} if "n_positions" in gguf else {}
    with quiet(transformers):
        loader = transformers.AutoModelForCausalLM
        model = loader.from_pretrained(folder, **gguf, **model_only).eval()
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **gguf)

    def logits(ids: Tensor) -> Tensor:
        with quiet(transformers):  # Mamba prints advice about kernels here
            return model(ids, attention_mask=torch.ones_like(ids)).logits

    return logits, tokenizer
