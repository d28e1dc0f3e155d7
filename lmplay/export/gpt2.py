"""GPT-2 with a bias in its output layer, which the architecture does not have, as a wider GPT-2."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..api import HfForm

HEAD_BIAS = "lm_head.bias"


def without_head_bias(form: HfForm) -> HfForm:
    """Return a form of GPT-2 that computes the same without a bias in the output layer.

    The model becomes one feature per head wider. Every write to the residual stream has mean 0,
    which the LayerNorms remove anyway, and the new features stay 0 in it. The gains and the epsilon
    of the LayerNorms make up for the larger number of features. The final LayerNorm's bias sets one
    new feature to 1, and that feature's column in the output layer is the bias.

    Args:
        form: tensors under transformers' names, with matrices as (in, out), and lm_head.bias.
    """
    t = {name: value.double() for name, value in form.tensors.items()}
    heads = int(form.config["n_head"])
    dim = int(form.config["n_embd"])
    inner = int(form.config["n_inner"])
    head = dim // heads
    new = dim + heads
    new_head = head + 1
    new_inner = 4 * new

    def centered(x: Tensor) -> Tensor:
        """Writes to the residual stream: (..., dim) -> (..., new)."""
        return pad(x - x.mean(-1, keepdim=True), (0, heads))

    def reading(x: Tensor) -> Tensor:
        """Weights that read the residual stream: (dim, out) -> (new, out)."""
        return pad(x, (0, 0, 0, heads))

    def per_head(x: Tensor, scale: float = 1.0) -> Tensor:
        """Outputs of all heads: (..., dim) -> (..., new), a new 0 in each head."""
        wide = pad(x.unflatten(-1, (heads, head)) * scale, (0, 1))
        return wide.flatten(-2)

    def norm(name: str) -> None:
        # Next to zeros the variance of x is dim / new of what it was, and so is epsilon.
        out[f"{name}.weight"] = pad(t[f"{name}.weight"] * math.sqrt(dim / new), (0, heads))
        out[f"{name}.bias"] = pad(t[f"{name}.bias"], (0, heads))

    out: dict[str, Tensor] = {}
    for table in ("transformer.wte.weight", "transformer.wpe.weight"):
        out[table] = centered(t[table])
    grow = math.sqrt(new_head / head)  # scores are divided by the root of the head's size
    for i in range(int(form.config["n_layer"])):
        block = f"transformer.h.{i}"
        norm(f"{block}.ln_1")
        norm(f"{block}.ln_2")
        qkv = t[f"{block}.attn.c_attn.weight"].split(dim, -1)
        biases = t[f"{block}.attn.c_attn.bias"].split(dim, -1)
        scales = (grow, 1.0, 1.0)
        wide = [per_head(reading(w), s) for w, s in zip(qkv, scales, strict=True)]
        out[f"{block}.attn.c_attn.weight"] = torch.cat(wide, -1)
        wide = [per_head(b, s) for b, s in zip(biases, scales, strict=True)]
        out[f"{block}.attn.c_attn.bias"] = torch.cat(wide, -1)
        projection = centered(t[f"{block}.attn.c_proj.weight"])  # (dim, new)
        out[f"{block}.attn.c_proj.weight"] = per_head(projection.t()).t()
        out[f"{block}.attn.c_proj.bias"] = centered(t[f"{block}.attn.c_proj.bias"])
        more = (0, new_inner - inner)
        out[f"{block}.mlp.c_fc.weight"] = pad(reading(t[f"{block}.mlp.c_fc.weight"]), more)
        out[f"{block}.mlp.c_fc.bias"] = pad(t[f"{block}.mlp.c_fc.bias"], more)
        down = centered(t[f"{block}.mlp.c_proj.weight"])  # (inner, new)
        out[f"{block}.mlp.c_proj.weight"] = pad(down, (0, 0, *more))
        out[f"{block}.mlp.c_proj.bias"] = centered(t[f"{block}.mlp.c_proj.bias"])
    norm("transformer.ln_f")
    out["transformer.ln_f.bias"][dim] = 1.0
    head_weight = t.get("lm_head.weight", t["transformer.wte.weight"])
    out["lm_head.weight"] = pad(head_weight, (0, heads))
    out["lm_head.weight"][:, dim] = t[HEAD_BIAS]
    config = {
        **form.config,
        "n_embd": new,
        "n_inner": new_inner,
        "layer_norm_epsilon": form.config["layer_norm_epsilon"] * dim / new,
        "tie_word_embeddings": False,
    }
    return replace(form, config=config, tensors=out)
