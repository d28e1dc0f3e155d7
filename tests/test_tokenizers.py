"""Every kind of tokenizer: there and back, bytes, fingerprints, and GPT-2's own ids."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lmplay.data import tokenizers
from lmplay.errors import LmplayError

TEXTS = [
    "Hello, world!",
    "Año nuevo, ¿qué tal? 東京 🙂",
    "",
    " two  spaces\n\n\ttab <|endoftext|> x" * 3,
    "a" * 500,
]


def make(kind: str) -> tokenizers.Tokenizer:
    match kind:
        case "bytes":
            return tokenizers.Bytes()
        case "chars":
            return tokenizers.Chars("".join(TEXTS))
        case "tiktoken":
            return tokenizers.Tiktoken("gpt2")
        case _:
            return tokenizers.train_bpe(TEXTS * 20, 300)


@pytest.mark.parametrize("kind", ["bytes", "chars", "tiktoken", "bpe"])
def test_there_and_back(kind: str, tmp_path: Path) -> None:
    tokenizer = make(kind)
    for text, ids in zip(TEXTS, tokenizer.encode_batch(TEXTS), strict=True):
        assert tokenizer.decode(ids) == text
        assert tokenizer.eot not in ids, "no text may hold the end-of-text token"
        assert tokenizer.token_bytes[ids].sum() == len(text.encode())
        assert tokenizer.encode(text) == list(ids)
    assert tokenizer.token_bytes[tokenizer.eot] == 0
    assert len(tokenizer.pieces) == tokenizer.vocab_size
    tokenizer.save(tmp_path)
    again = tokenizers.load(tmp_path)
    assert again.fingerprint == tokenizer.fingerprint
    assert again.encode(TEXTS[1]) == tokenizer.encode(TEXTS[1])


def test_fingerprints_differ() -> None:
    prints = {make(kind).fingerprint for kind in ("bytes", "chars", "tiktoken", "bpe")}
    assert len(prints) == 4
    assert tokenizers.Chars("ab").fingerprint != tokenizers.Chars("abc").fingerprint


def test_gpt2_ids_are_the_published_ones() -> None:
    # The example of OpenAI's tokenizer page for GPT-2, and the vocabulary's size and last id.
    tokenizer = tokenizers.Tiktoken("gpt2")
    assert tokenizer.encode("Hello world") == [15496, 995]
    assert tokenizer.encode("The quick brown fox") == [464, 2068, 7586, 21831]
    assert (tokenizer.vocab_size, tokenizer.eot) == (50257, 50256)


def test_bpe_training_is_repeatable_and_of_the_size_asked_for() -> None:
    a, b = (tokenizers.train_bpe(TEXTS * 20, 300) for _ in range(2))
    assert a.fingerprint == b.fingerprint
    assert a.vocab_size <= 300


def test_unknown_character_and_damaged_file(tmp_path: Path) -> None:
    tokenizer = tokenizers.Chars("abc")
    with pytest.raises(LmplayError, match="'d'"):
        tokenizer.encode("abcd")
    tokenizer.save(tmp_path)
    content = json.loads((tmp_path / tokenizers.FILE).read_text())
    content["state"]["characters"] = "abx"
    (tmp_path / tokenizers.FILE).write_text(json.dumps(content))
    with pytest.raises(LmplayError, match="fingerprint"):
        tokenizers.load(tmp_path)


def test_unknown_encoding_names_the_nearest() -> None:
    with pytest.raises(LmplayError, match="cl100k_base"):
        tokenizers.Tiktoken("cl100k")
