"""Writing a folded model in formats that others read: a folder for the transformers library, and GGUF.

Without a word from its runner a model can be a GPT-2: when its tensors are exactly the baseline's, by name. A runner
whose model is another one of the transformers library's says so (ModelRunner.to_hf). That the function fits too is
seen on real text before anything is kept (see cli/cleanmodel.py).
"""

from __future__ import annotations

import base64
import json
import math
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .api import HfForm
from .checkpoint import model_tensors
from .errors import LmplayError
from .tokenizers import Bpe, Bytes, Chars, Tiktoken, Tokenizer, byte_alphabet

EOT = "<|endoftext|>"
EXTRA = "pip install 'lmplay[export]'"


@dataclass(frozen=True)
class Gpt2:
    """A model in GPT-2's shape: tensors under transformers' names (matrices as (in, out)), and the sizes."""

    tensors: dict[str, Tensor]
    num_blocks: int
    embed_dim: int
    num_heads: int
    max_len: int
    vocab_size: int
    inner: int
    epsilon: float
    tied: bool


def as_gpt2(model: nn.Module, num_heads: int) -> Gpt2:
    """The folded model in GPT-2's shape.

    GPT-2 has no bias in its head. Where ours has one, the model is widened by one feature a head, in which it
    computes the same: the residual stream is made free of its mean (which every LayerNorm takes out anyway), the
    new features stay 0 in it, LayerNorm's gain and epsilon make up for the larger number of features, and the
    final LayerNorm's bias sets one new feature to 1, whose column in the head is the bias.

    Raises:
        LmplayError: the model's tensors are not those of gpt2ish.
    """
    ours = {name: t.detach().double().cpu() for name, t in model_tensors(model).items()}
    blocks = len({name.split(".")[1] for name in ours if name.startswith("blocks.")})
    wanted = {"tok_embed.weight", "pos_embed.weight", "ln.weight", "ln.bias"}
    for i in range(blocks):
        wanted |= {f"blocks.{i}.{x}.{y}" for x in LAYERS for y in ("weight", "bias")}
    tied = "head.weight" not in ours
    optional = {"head.weight", "head.bias"}
    odd = sorted((wanted - set(ours)) | (set(ours) - wanted - optional))
    if odd:
        what = "has no" if odd[0] not in ours else "has"
        raise LmplayError(f"no standard architecture holds this model: it {what} {odd[0]}; --format lmplay keeps it")
    if "head.bias" in ours:
        return _widened(ours, blocks, num_heads)
    return _gpt2(ours, blocks, num_heads, 1e-5, tied)


LAYERS = ("ln1", "ln2", "attn.query", "attn.key", "attn.value", "attn.proj", "ff.fc1", "ff.fc2")


def _gpt2(t: dict[str, Tensor], blocks: int, heads: int, epsilon: float, tied: bool) -> Gpt2:
    out = {
        "transformer.wte.weight": t["tok_embed.weight"],
        "transformer.wpe.weight": t["pos_embed.weight"],
        "transformer.ln_f.weight": t["ln.weight"],
        "transformer.ln_f.bias": t["ln.bias"],
        "lm_head.weight": t["tok_embed.weight"] if tied else t["head.weight"],
    }
    for i in range(blocks):
        own, to = f"blocks.{i}", f"transformer.h.{i}"
        for kind in ("weight", "bias"):
            out[f"{to}.ln_1.{kind}"] = t[f"{own}.ln1.{kind}"]
            out[f"{to}.ln_2.{kind}"] = t[f"{own}.ln2.{kind}"]
            qkv = torch.cat([t[f"{own}.attn.{x}.{kind}"] for x in ("query", "key", "value")])
            parts = [("attn.c_attn", qkv), ("attn.c_proj", t[f"{own}.attn.proj.{kind}"])]
            parts += [("mlp.c_fc", t[f"{own}.ff.fc1.{kind}"]), ("mlp.c_proj", t[f"{own}.ff.fc2.{kind}"])]
            for name, value in parts:
                out[f"{to}.{name}.{kind}"] = value.t() if kind == "weight" else value  # transformers keep (in, out)
    vocab, dim = t["tok_embed.weight"].shape
    return Gpt2(
        {name: value.float().contiguous() for name, value in out.items()},
        blocks, dim, heads, len(t["pos_embed.weight"]), vocab, len(t["blocks.0.ff.fc1.bias"]), epsilon, tied,
    )  # fmt: skip


def _widened(t: dict[str, Tensor], blocks: int, heads: int) -> Gpt2:
    """The same function in embed_dim + num_heads features, with the head's bias as a column of its weight."""
    dim = t["tok_embed.weight"].shape[1]
    new, head, inner = dim + heads, dim // heads, len(t["blocks.0.ff.fc1.bias"])
    new_head, new_inner = head + 1, 4 * new

    def stream(x: Tensor) -> Tensor:  # (..., dim), what is added to the residual stream
        return nn.functional.pad(x - x.mean(-1, keepdim=True), (0, heads))

    def norm(weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        # With zeros beside it, x's variance is dim/new of what it was, and so must be epsilon.
        pad = (0, heads)
        return nn.functional.pad(weight * math.sqrt(dim / new), pad), nn.functional.pad(bias, pad)

    def rows(x: Tensor, scale: float = 1.0) -> Tensor:  # (dim, ...) by head -> (new, ...)
        wide = torch.zeros(heads, new_head, *x.shape[1:], dtype=x.dtype)
        wide[:, :head] = x.unflatten(0, (heads, head)) * scale
        return wide.flatten(0, 1)

    def columns(x: Tensor) -> Tensor:  # reads the residual stream: (..., dim) -> (..., new)
        return nn.functional.pad(x, (0, heads))

    out = {"tok_embed.weight": stream(t["tok_embed.weight"]), "pos_embed.weight": stream(t["pos_embed.weight"])}
    grow = math.sqrt(new_head / head)  # scores are divided by the root of the head's size
    for i in range(blocks):
        p = f"blocks.{i}"
        for ln in ("ln1", "ln2"):
            out[f"{p}.{ln}.weight"], out[f"{p}.{ln}.bias"] = norm(t[f"{p}.{ln}.weight"], t[f"{p}.{ln}.bias"])
        for name, scale in (("query", grow), ("key", 1.0), ("value", 1.0)):
            out[f"{p}.attn.{name}.weight"] = rows(columns(t[f"{p}.attn.{name}.weight"]), scale)
            out[f"{p}.attn.{name}.bias"] = rows(t[f"{p}.attn.{name}.bias"], scale)
        # What writes to the stream has its output features centred, and reads from the wider heads or inner layer.
        out[f"{p}.attn.proj.weight"] = stream(rows(t[f"{p}.attn.proj.weight"].t())).t()
        out[f"{p}.attn.proj.bias"] = stream(t[f"{p}.attn.proj.bias"])
        more = (0, new_inner - inner)
        out[f"{p}.ff.fc1.weight"] = nn.functional.pad(columns(t[f"{p}.ff.fc1.weight"]), (0, 0, *more))
        out[f"{p}.ff.fc1.bias"] = nn.functional.pad(t[f"{p}.ff.fc1.bias"], more)
        out[f"{p}.ff.fc2.weight"] = nn.functional.pad(stream(t[f"{p}.ff.fc2.weight"].t()).t(), more)
        out[f"{p}.ff.fc2.bias"] = stream(t[f"{p}.ff.fc2.bias"])
    out["ln.weight"], out["ln.bias"] = norm(t["ln.weight"], t["ln.bias"])
    out["ln.bias"][dim] = 1.0
    out["head.weight"] = columns(t.get("head.weight", t["tok_embed.weight"]))
    out["head.weight"][:, dim] = t["head.bias"]
    return _gpt2(out, blocks, heads, 1e-5 * dim / new, tied=False)


# ---------------------------------------------------------------- transformers


def write_gpt2(folder: Path, shape: Gpt2, tokenizer: Tokenizer) -> None:
    """A folder that AutoModelForCausalLM and AutoTokenizer load with no code of ours."""
    config = {
        "vocab_size": shape.vocab_size, "n_positions": shape.max_len, "n_embd": shape.embed_dim,
        "n_layer": shape.num_blocks, "n_head": shape.num_heads, "n_inner": shape.inner, "activation_function": "gelu",
        "layer_norm_epsilon": shape.epsilon, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0,
        "tie_word_embeddings": shape.tied,
    }  # fmt: skip
    _write_hf(folder, "gpt2", config, shape.tensors, tokenizer, shape.max_len)


def write_form(folder: Path, form: HfForm, model: nn.Module, tokenizer: Tokenizer, max_len: int) -> None:
    """The same of a model whose runner says which of the library's models it is.

    Raises:
        LmplayError: the library's model has other parameters than the runner says.
    """
    own = model_tensors(model)
    tensors = {theirs: own[ours].detach().float().contiguous() for theirs, ours in form.names.items()}
    _write_hf(folder, form.model_type, form.config, tensors, tokenizer, max_len)


def _write_hf(
    folder: Path, model_type: str, config: dict[str, Any], tensors: dict[str, Tensor], tokenizer: Tokenizer,
    max_len: int,
) -> None:  # fmt: skip
    transformers = _need("transformers")
    tokens = {"bos_token_id": tokenizer.eot, "eos_token_id": tokenizer.eot, "pad_token_id": tokenizer.eot}
    made = transformers.AutoConfig.for_model(model_type, **config, **tokens)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(made)
    tied = {"lm_head.weight"} if made.tie_word_embeddings else set()
    missing, unexpected = model.load_state_dict(tensors, strict=False, assign=True)
    if wrong := sorted((set(missing) - tied) | set(unexpected)):
        raise LmplayError(f"transformers' {model_type} has other parameters ({wrong[0]}); --format lmplay keeps it")
    if tied:
        model.tie_weights()
    with _quiet(transformers):
        model.save_pretrained(folder)
    fast_tokenizer(tokenizer, max_len).save_pretrained(folder)


def fast_tokenizer(tokenizer: Tokenizer, max_len: int) -> Any:
    """The same tokenizer as one of transformers: the same ids for every text.

    Raises:
        LmplayError: there is no such form of it.
    """
    transformers = _need("transformers")
    # The end-of-text token cannot be written in a text of ours, so it is cut like any other text there, too.
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend(tokenizer), bos_token=EOT, eos_token=EOT, pad_token=EOT,
        model_max_length=max_len, split_special_tokens=True, clean_up_tokenization_spaces=False,
    )  # fmt: skip


def backend(tokenizer: Tokenizer) -> Any:
    """The tokenizers library's form of ours, with the end-of-text token under its id."""
    import tokenizers
    from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers

    alphabet = byte_alphabet()
    if isinstance(tokenizer, Tiktoken):
        return _checked(_from_tiktoken(tokenizer), tokenizer)
    if isinstance(tokenizer, Bpe):
        made = tokenizers.Tokenizer.from_str(tokenizer.serialized)
    elif isinstance(tokenizer, Bytes):
        made = tokenizers.Tokenizer(models.BPE({alphabet[b]: b for b in range(256)}, []))
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        made.decoder = decoders.ByteLevel()
    elif isinstance(tokenizer, Chars):
        # What is unknown has no token, and is an error there too: the end of a text would be a silent lie.
        made = tokenizers.Tokenizer(models.WordLevel({c: i for i, c in enumerate(tokenizer.characters)}, "<unknown>"))
        made.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
        made.decoder = decoders.Fuse()
    else:
        raise LmplayError(f"the tokenizer {tokenizer.kind} has no form in transformers; --format lmplay keeps it")
    made.add_special_tokens([AddedToken(EOT, special=True, normalized=False)])
    return _checked(made, tokenizer)


def _checked(made: Any, tokenizer: Tokenizer) -> Any:
    if made.token_to_id(EOT) != tokenizer.eot or made.get_vocab_size() != tokenizer.vocab_size:
        raise LmplayError("the tokenizer's special tokens would get other ids in transformers: --format lmplay")
    return made


def _from_tiktoken(tokenizer: Tiktoken) -> Any:
    from transformers.convert_slow_tokenizer import TikTokenConverter

    encoding = tokenizer.encoding
    specials = sorted(encoding.special_tokens_set, key=encoding.encode_single_token)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "ranks.tiktoken"
        ordinary = [i for i, piece in enumerate(tokenizer.pieces) if piece]
        lines = [f"{base64.b64encode(tokenizer.pieces[i]).decode()} {i}" for i in ordinary]
        file.write_text("\n".join(lines) + "\n")
        converter = TikTokenConverter(
            vocab_file=str(file), pattern=encoding._pat_str, extra_special_tokens=specials
        )  # fmt: skip
        return converter.converted()


# ---------------------------------------------------------------- GGUF


def write_gguf(file: Path, shape: Gpt2, tokenizer: Tokenizer, name: str) -> None:
    """A GGUF file of the architecture gpt2, float32.

    Its readers compute GELU by the tanh formula (Hendrycks & Gimpel 2016) where the model was trained with the exact
    one.

    Raises:
        LmplayError: GGUF has no tokenizer of that kind.
    """
    import numpy as np

    gguf = _need("gguf")
    if isinstance(tokenizer, Chars | Bytes):
        raise LmplayError(
            f"GGUF needs a tokenizer with merges, which {tokenizer.kind} has not; --format hf or lmplay keeps it"
        )
    if isinstance(tokenizer, Tiktoken) and tokenizer.name != "gpt2":
        raise LmplayError(f"GGUF's readers would cut text by GPT-2's rule, not {tokenizer.name}'s: --format hf")
    content = json.loads(backend(tokenizer).to_str())["model"]
    vocab = dict(content["vocab"]) | {EOT: tokenizer.eot}
    tokens = sorted(vocab, key=lambda token: vocab[token])
    writer = gguf.GGUFWriter(str(file), "gpt2")
    writer.add_name(name)
    writer.add_context_length(shape.max_len)
    writer.add_embedding_length(shape.embed_dim)
    writer.add_block_count(shape.num_blocks)
    writer.add_feed_forward_length(shape.inner)
    writer.add_head_count(shape.num_heads)
    writer.add_layer_norm_eps(shape.epsilon)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    kinds = [gguf.TokenType.CONTROL if t == EOT else gguf.TokenType.NORMAL for t in tokens]
    writer.add_token_types(kinds)
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in content["merges"]])
    writer.add_bos_token_id(tokenizer.eot)
    writer.add_eos_token_id(tokenizer.eot)
    writer.add_add_bos_token(False)
    names = {"wte": "token_embd", "wpe": "position_embd", "ln_f": "output_norm"}
    inside = {
        "ln_1": "attn_norm", "attn.c_attn": "attn_qkv", "attn.c_proj": "attn_output", "ln_2": "ffn_norm",
        "mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down",
    }  # fmt: skip
    for key, value in shape.tensors.items():
        if key == "lm_head.weight":
            if not shape.tied:
                writer.add_tensor("output.weight", value.numpy())
            continue
        parts = key.removeprefix("transformer.").split(".")
        if parts[0] == "h":
            layer = inside[".".join(parts[2:-1])]
            value = value.t() if value.ndim == 2 else value  # GGUF keeps (out, in)
            writer.add_tensor(f"blk.{parts[1]}.{layer}.{parts[-1]}", np.ascontiguousarray(value.numpy()))
        else:
            writer.add_tensor(f"{names[parts[0]]}.{parts[-1]}", value.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _need(package: str) -> Any:
    """The module, or one line that says how to get it."""
    import importlib

    try:
        return importlib.import_module(package)
    except ImportError as e:
        raise LmplayError(f"this format needs {package}: {EXTRA}") from e


Logits = Callable[[Tensor], Tensor]  # ids (B, T) -> logits (B, T, V)


def read_hf(folder: Path) -> tuple[Logits, Any]:
    """What transformers make of the folder: the model's logits, and its tokenizer."""
    return _read(folder)


def read_gguf(file: Path, shape: Gpt2) -> tuple[Logits, Any]:
    """What transformers make of the file; the number of positions they would not take from it."""
    return _read(file.parent, {"gguf_file": file.name}, {"n_positions": shape.max_len})


def _read(folder: Path, both: dict[str, Any] | None = None, model_only: dict[str, Any] | None = None) -> Any:
    transformers = _need("transformers")
    both = both or {}
    with _quiet(transformers):
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, **both, **(model_only or {})).eval()
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **both)

    def logits(ids: Tensor) -> Tensor:
        with _quiet(transformers):  # a Mamba says here that it has no kernel
            return model(ids, attention_mask=torch.ones_like(ids)).logits

    return logits, tokenizer


@contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """Without their progress bars and advice: what matters is said by us."""
    log = transformers.utils.logging
    verbosity, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(verbosity)
        if bars:
            log.enable_progress_bar()
