"""A folded GPT-2 as a GGUF file, for llama.cpp and its family."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from torch import Tensor

from ..api import HfForm
from ..data.tokenizers import Bytes, Chars, Tiktoken, Tokenizer
from ..errors import LmplayError
from ..optional import need
from .tokenizer import EOT, backend

OUTSIDE = {"wte": "token_embd", "wpe": "position_embd", "ln_f": "output_norm"}
INSIDE = {
    "ln_1": "attn_norm",
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "ln_2": "ffn_norm",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
}


def write_gguf(file: Path, form: HfForm, tokenizer: Tokenizer, name: str) -> None:
    """Write a GGUF file of the architecture gpt2, in float32.

    Its readers compute GELU by the tanh formula (Hendrycks & Gimpel 2016), training by the exact
    one.

    Raises:
        LmplayError: GGUF has no such tokenizer.
    """
    gguf = need("gguf")
    if isinstance(tokenizer, Chars | Bytes):
        raise LmplayError(
            f"GGUF needs a tokenizer with merges, and {tokenizer.kind} has none; --format hf or "
            "lmplay keeps it"
        )
    if isinstance(tokenizer, Tiktoken) and tokenizer.name != "gpt2":
        raise LmplayError(
            f"GGUF's readers would split text by GPT-2's rule, not by {tokenizer.name}'s: "
            "--format hf"
        )
    model = json.loads(backend(tokenizer).to_str())["model"]
    vocab = dict(model["vocab"]) | {EOT: tokenizer.eot}
    tokens = sorted(vocab, key=lambda token: vocab[token])
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    config = form.config
    writer = gguf.GGUFWriter(str(file), "gpt2")
    writer.add_name(name)
    writer.add_context_length(config["n_positions"])
    writer.add_embedding_length(config["n_embd"])
    writer.add_block_count(config["n_layer"])
    writer.add_feed_forward_length(config["n_inner"])
    writer.add_head_count(config["n_head"])
    writer.add_layer_norm_eps(config["layer_norm_epsilon"])
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    kinds = gguf.TokenType
    writer.add_token_types([kinds.CONTROL if t == EOT else kinds.NORMAL for t in tokens])
    writer.add_token_merges(merges)
    writer.add_bos_token_id(tokenizer.eot)
    writer.add_eos_token_id(tokenizer.eot)
    writer.add_add_bos_token(False)
    for key, value in form.tensors.items():
        if key == "lm_head.weight" and config["tie_word_embeddings"]:
            continue
        tensor_name, tensor = _named(key, value)
        writer.add_tensor(tensor_name, np.ascontiguousarray(tensor.numpy()))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _named(key: str, value: Tensor) -> tuple[str, Tensor]:
    """Return a tensor's name in GGUF and the tensor; GGUF keeps matrices as (out, in)."""
    if key == "lm_head.weight":
        return "output.weight", value
    parts = key.removeprefix("transformer.").split(".")
    if parts[0] != "h":
        return f"{OUTSIDE[parts[0]]}.{parts[-1]}", value
    layer = INSIDE[".".join(parts[2:-1])]
    return f"blk.{parts[1]}.{layer}.{parts[-1]}", value.t() if value.ndim == 2 else value
