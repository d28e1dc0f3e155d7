"""Pretrained models: the logits and ids of transformers, and one line for what does not fit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Command, one_line, write_plan

from lmplay.errors import LmplayError
from lmplay.pretrained.source import Pretrained, load_pretrained
from lmplay.pretrained.tokenizer import read_tokenizer

transformers = pytest.importorskip("transformers")
gguf = pytest.importorskip("gguf")

LLAMA = {
    "vocab_size": 320,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
}
SCALED = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
MAMBA = {"vocab_size": 320, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("gpt2", {"vocab_size": 320, "n_embd": 32, "n_layer": 2, "n_head": 4}),
    "llama1": ("llama", {**LLAMA, "num_key_value_heads": 4}),
    "llama3": ("llama", {**LLAMA, "rope_parameters": SCALED}),
    "mistral": ("mistral", {**LLAMA, "sliding_window": 8}),
    "qwen2": ("qwen2", LLAMA),
    "qwen3": ("qwen3", {**LLAMA, "head_dim": 16}),
    "smollm2": ("llama", {**LLAMA, "tie_word_embeddings": True}),
    "mamba": ("mamba", {**MAMBA, "time_step_rank": 4}),
    "mamba2": (
        "mamba2",
        {**MAMBA, "num_heads": 4, "head_dim": 16, "n_groups": 1, "tie_word_embeddings": True},
    ),
}
TEXT = "the quick brown fox, naïve\n 'jumps' <s> over 12 dogs"


def byte_level(bos: str = "<s>") -> Any:
    """Return a byte-level BPE as GPT-2's, Llama 3's and Qwen's are."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        initial_alphabet=alphabet,
        special_tokens=[bos, "</s>"],
        show_progress=False,
    )
    made.train_from_iterator(["the quick brown fox jumps over the lazy dog"] * 9, trainer)
    return made


def sentencepiece() -> Any:
    """Return a BPE as Llama 1's and 2's: spaces are letters, unknown characters are bytes."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256))]
    tokens += [*"▁abcdefghijklmnopqrstuvwxyz,'", "▁t", "▁th", "▁the"]
    merges = [("▁", "t"), ("▁t", "h"), ("▁th", "e")]
    vocab = {token: i for i, token in enumerate(tokens)}
    made = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True))
    made.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    made.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    made.add_special_tokens(["<s>", "</s>"])
    return made


def begun(tokenizer: Any) -> Any:
    """Return the tokenizer with <s> in front of each text."""
    from tokenizers.processors import TemplateProcessing

    bos = tokenizer.token_to_id("<s>")
    tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", bos)])
    return tokenizer


def save(folder: Path, name: str, tokenizer: Any = None) -> Path:
    """Write a random model of an architecture as transformers writes it."""
    torch.manual_seed(0)
    model_type, settings = MODELS[name]
    ids = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    config = transformers.AutoConfig.for_model(model_type, **settings, **ids)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for p in model.parameters():  # gains, biases and zeros differ from their start, too
            p.add_(0.1 * torch.randn_like(p))
    model.save_pretrained(folder)
    backend = tokenizer or (byte_level() if name == "gpt2" else begun(byte_level()))
    bos = "<s>" if backend.token_to_id("<s>") is not None else "<|endoftext|>"
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=bos, eos_token="</s>"
    )
    fast.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", MODELS)
def test_logits_and_ids_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    folder = save(tmp_path / name, name)
    own = load_pretrained(f"hf:{folder}")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(300, (2, 40), generator=generator)
    with torch.no_grad():
        expected = theirs(ids).logits
        hidden: Any = own.model.eval()(ids)
        head: Any = own.model.head
        found = head(hidden)
    assert float((found - expected).abs().max() / expected.abs().max()) < 1e-5
    text = TEXT.replace("<s>", "")
    begins = [own.tokenizer.eot] * own.tokenizer.begins_with_eot
    assert begins + own.tokenizer.encode(text) == tokenizer(text)["input_ids"]
    assert own.tokenizer.begins_with_eot == (name != "gpt2")
    assert own.tokenizer.decode(own.tokenizer.encode(TEXT)) == TEXT
    assert own.tokenizer.vocab_size == 320, "ids without a token stand for no bytes"
    assert own.tokenizer.stops == {own.tokenizer.eot, 1}


def write_gguf(file: Path, folder: Path) -> None:
    """Write a model and its tokenizer as llama.cpp's converter does, in float32."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    config = model.config
    llama = config.model_type in ("llama", "mistral")
    arch = "llama" if llama else config.model_type
    writer = gguf.GGUFWriter(str(file), arch)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_vocab_size(config.vocab_size)
    if arch == "mamba":
        writer.add_ssm_conv_kernel(config.conv_kernel)
        writer.add_ssm_inner_size(config.intermediate_size)
        writer.add_ssm_state_size(config.state_size)
        writer.add_ssm_time_step_rank(config.time_step_rank)
        writer.add_layer_norm_rms_eps(config.layer_norm_epsilon)
        writer.add_context_length(64)
        writer.add_head_count(0)
    else:
        writer.add_context_length(config.max_position_embeddings)
        writer.add_head_count(config.num_attention_heads)
    if arch == "gpt2":
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
    elif arch != "mamba":
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
        writer.add_key_length(getattr(config, "head_dim", None) or 8)
    content = json.loads((folder / "tokenizer.json").read_text())
    tokens = sorted(content["model"]["vocab"], key=content["model"]["vocab"].get)
    tokens += [f"[unused{i}]" for i in range(len(tokens), config.vocab_size)]
    kinds = gguf.TokenType
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([kinds.CONTROL if i < 2 else kinds.NORMAL for i in range(len(tokens))])
    writer.add_token_merges([" ".join(pair) for pair in content["model"]["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    names = gguf.get_tensor_name_map(
        getattr(gguf.MODEL_ARCH, arch.upper()), config.num_hidden_layers
    )
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    for name, tensor in model.state_dict().items():
        if name in tied:
            continue
        values = tensor
        heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}
        kind = name.split(".")[-2] if "." in name else ""
        if llama and kind in heads:  # llama.cpp rotates neighbors, transformers halves
            n = getattr(config, heads[kind])
            values = values.view(n, 2, -1, values.shape[-1]).transpose(1, 2).reshape(values.shape)
        if arch == "gpt2" and values.ndim == 2 and name.split(".")[-2].startswith("c_"):
            values = values.t()
        if name.endswith("A_log"):
            values = -values.exp()
        if name.endswith("conv1d.weight"):
            values = values.squeeze(1)
        found = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert found, name
        writer.add_tensor(found, np.ascontiguousarray(values.numpy()))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("name", ["gpt2", "llama1", "qwen2", "qwen3", "smollm2", "mamba"])
def test_a_gguf_file_is_the_model_that_it_was_written_from(name: str, tmp_path: Path) -> None:
    folder = save(tmp_path / name, name, byte_level("<|endoftext|>"))
    write_gguf(tmp_path / "model.gguf", folder)
    own = load_pretrained(f"gguf:{tmp_path / 'model.gguf'}")
    original = load_pretrained(f"hf:{folder}")
    assert own.experiment.variant == original.experiment.variant
    ids = torch.randint(300, (2, 40), generator=torch.Generator().manual_seed(1))
    a, b = (m.runner.logits(m.model.eval(), ids)[0].detach() for m in (own, original))
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * float(b.abs().max()))
    assert own.tokenizer.encode(TEXT) == original.tokenizer.encode(TEXT)
    assert own.tokenizer.decode(own.tokenizer.encode(TEXT)) == TEXT


def test_a_sentencepiece_tokenizer_has_the_bytes_of_its_tokens(tmp_path: Path) -> None:
    folder = save(tmp_path / "llama1", "llama1", begun(sentencepiece()))
    tokenizer = read_tokenizer(f"hf:{folder}")
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    text = "the naïve\nfox"
    ids = tokenizer.encode(text)
    assert [tokenizer.eot, *ids] == theirs(text)["input_ids"]
    assert tokenizer.decode(ids) == f" {text}", "the space that SentencePiece writes before a text"
    assert tokenizer.token_bytes[ids].sum() == len(f" {text}".encode())


def test_a_run_starts_from_pretrained_weights_and_keeps_the_tokenizer(
    command: Command, tmp_path: Path
) -> None:
    save(tmp_path / "theirs", "gpt2")
    plan = write_plan(tmp_path)
    start = ("lmp_trainer", "--training-plan", str(plan), "--initial-model", "hf:theirs")
    done = command(*start, "--exp", "gpt2ish")
    assert done.returncode == 0, done.stderr
    run = tmp_path / "gpt_out" / "tiny" / "gpt2ish-from=theirs-s0"
    record = json.loads((run / "run.json").read_text())
    own = {"embed_dim": 32, "num_heads": 4, "gelu": "tanh", "tied": True, "max_len": 32}
    assert own.items() <= record["identity"]["config"].items()
    assert record["initial_model"] == "hf:theirs"
    assert record["label"] == "gpt2ish, from theirs"
    tokenizer = json.loads((run / "tokenizer" / "tokenizer.json").read_text())
    assert tokenizer["state"]["kind"] == "hf"
    (tmp_path / "theirs").rename(tmp_path / "gone")
    text = command("lmp_generator", "the quick", "--max-len", "5")
    assert text.returncode == 0, text.stderr
    assert text.stdout.startswith("the quick")
    (tmp_path / "gone").rename(tmp_path / "theirs")
    again = command(*start, "--exp", "gpt2ish")
    assert "is finished" in again.stdout + again.stderr


def test_what_does_not_fit_is_named(command: Command, tmp_path: Path) -> None:
    save(tmp_path / "theirs", "gpt2")
    plan = write_plan(tmp_path, initial_model="hf:theirs")
    done = command("lmp_trainer", "--training-plan", str(plan), "--exp", "gpt2_rope")
    assert done.returncode == 0, done.stderr
    assert "not loaded: pos_embed.weight" in done.stdout
    assert "new here" not in done.stdout
    done = command("lmp_trainer", "--training-plan", str(plan), "--exp", "lra", "--steps", "2")
    assert done.returncode == 0, done.stderr
    assert "new here: " in done.stdout


def test_a_loaded_model_is_exported_again(command: Command, tmp_path: Path) -> None:
    """To hf and back it is the same; its family is named by its features."""
    for name, family in {"qwen3": "qwen3", "mistral": "mistral", "llama3": "llama"}.items():
        save(tmp_path / name, name)
        plan = write_plan(tmp_path)
        start = ("lmp_trainer", "--exp", "llama", "--training-plan", str(plan), "--steps", "1")
        done = command(*start, "--initial-model", f"hf:{name}", "--train-only", "norm.*")
        assert done.returncode == 0, done.stderr
        run = f"gpt_out/tiny/llama-1steps-from={name}-train_only=norm._-s0"
        done = command("lmp_cleanmodel", run, "--format", "hf", "--out", f"{name}-out")
        assert done.returncode == 0, done.stderr
        written = json.loads((tmp_path / f"{name}-out" / "config.json").read_text())
        assert written["model_type"] == family
        assert written["num_key_value_heads"] == 2
        tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / f"{name}-out")
        assert tokenizer("the quick")["input_ids"]


def broken(folder: Path, how: str) -> str:
    """Break a saved GPT-2; return what the message must say."""
    config = json.loads((folder / "config.json").read_text())
    weights = folder / "model.safetensors"
    if how == "pickle":
        weights.rename(folder / "pytorch_model.bin")
        return "pytorch_model.bin, a pickle, which can run code"
    if how == "no weights":
        weights.unlink()
        return "there are no weights"
    if how == "damaged":
        weights.write_bytes(weights.read_bytes()[:100])
        return "transformers cannot read its weights"
    if how == "missing tensor":
        config["n_layer"] = 3
        says = "its file has no tensor transformer.h.2"
    elif how == "architecture":
        config["model_type"] = "bloom"
        says = "cannot hold the architecture bloom; supported architectures: gpt2, llama"
    elif how == "other family":
        config = {"model_type": "llama", **LLAMA}
        says = "cannot hold the architecture llama; --exp llama can"
    elif how == "feature":
        config["activation_function"] = "relu"
        says = "activation_function relu is not supported"
    else:
        config["model_type"] = "nonsense"
        says = "transformers cannot read its config"
    (folder / "config.json").write_text(json.dumps(config))
    return says


@pytest.mark.parametrize(
    "how",
    [
        "pickle",
        "no weights",
        "damaged",
        "missing tensor",
        "architecture",
        "other family",
        "feature",
        "unknown",
    ],
)
def test_what_cannot_be_loaded_is_one_line(how: str, command: Command, tmp_path: Path) -> None:
    says = broken(save(tmp_path / "theirs", "gpt2"), how)
    plan = write_plan(tmp_path)
    start = ("lmp_trainer", "--exp", "gpt2ish", "--training-plan", str(plan))
    done = command(*start, "--initial-model", "hf:theirs")
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert says in done.stderr.strip().splitlines()[-1], done.stderr
    assert not (tmp_path / "gpt_out").exists() or not any((tmp_path / "gpt_out").glob("*/*"))


@pytest.mark.parametrize(
    ("model", "says"),
    [
        ("hf:./nowhere", "there is no such folder"),
        ("gguf:nowhere.gguf", "there is no such file"),
        ("hf:someone/nothing", "transformers cannot read its"),
    ],
)
def test_a_wrong_name_is_one_line(model: str, says: str, command: Command, tmp_path: Path) -> None:
    plan = write_plan(tmp_path)
    start = ("lmp_trainer", "--exp", "gpt2ish", "--training-plan", str(plan))
    one_line(command(*start, "--initial-model", model), says)
    one_line(command("lmp_generator", "x", "--model", model), says)


def test_longer_texts_than_a_table_of_positions_are_refused(
    command: Command, tmp_path: Path
) -> None:
    MODELS_64 = {**MODELS["gpt2"][1], "n_positions": 16}
    folder = save(tmp_path / "theirs", "gpt2")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **MODELS_64}))
    plan = write_plan(tmp_path)
    start = ("lmp_trainer", "--exp", "gpt2ish", "--training-plan", str(plan))
    one_line(command(*start, "--initial-model", "hf:theirs"), "it has 16 positions, not 32")


def test_a_tokenizer_larger_than_the_embedding_is_refused(tmp_path: Path) -> None:
    folder = save(tmp_path / "theirs", "gpt2")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": 200}))
    with pytest.raises(LmplayError, match="more than its embedding"):
        read_tokenizer(f"hf:{folder}")


def test_the_longest_text_is_the_plans_or_the_models(tmp_path: Path) -> None:
    source = Pretrained(f"hf:{save(tmp_path / 'theirs', 'llama1')}")
    assert source.max_len(None) == 64
    assert source.max_len(32) == 32


def test_a_trial_on_a_plan_with_an_initial_model_starts_from_it(
    command: Command, tmp_path: Path
) -> None:
    save(tmp_path / "theirs", "gpt2")
    write_plan(tmp_path, initial_model="hf:theirs")
    trial = ("lmp_trial", "--exp", "gpt2_rope", "--training-plan", "tiny.json", "--lr", "fixed")
    done = command(*trial, "--max-seeds", "2", "--no-panel")
    assert done.returncode == 0, done.stderr
    records = [json.loads(p.read_text()) for p in tmp_path.glob("gpt_out/trial-*/*/run.json")]
    assert {record["identity"]["variant"] for record in records} == {"gpt2ish", "gpt2_rope"}
    for record in records:
        assert record["initial_model"].endswith("theirs")
        assert record["identity"]["config"]["embed_dim"] == 32
        assert record["identity"]["config"]["gelu"] == "tanh"


def test_a_study_on_a_plan_with_an_initial_model_starts_from_it(
    command: Command, tmp_path: Path
) -> None:
    save(tmp_path / "theirs", "gpt2")
    write_plan(tmp_path, initial_model="hf:theirs")
    study = {
        "arms": ["gpt2ish"],
        "training_plans": ["tiny.json"],
        "settings": {"optimizer.lr": [0.001, 0.002]},
    }
    (tmp_path / "study.json").write_text(json.dumps(study))
    done = command("lmp_study", "study.json")
    assert done.returncode == 0, done.stderr
    records = [json.loads(p.read_text()) for p in (tmp_path / "gpt_out").glob("**/run.json")]
    assert len(records) == 2
    for record in records:
        assert record["initial_model"].endswith("theirs")
        assert record["identity"]["config"]["embed_dim"] == 32
