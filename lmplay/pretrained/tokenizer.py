"""A pretrained model's own tokenizer: the same ids as transformers gives."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
from pydantic import Field

from ..data.tokenizers import Tokenizer, TokenizerSchema, byte_alphabet
from ..errors import LmplayError
from ..optional import need
from .library import read, read_config

SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # how SentencePiece writes a space


class HfTokenizer(TokenizerSchema):
    """The tokenizer of a pretrained model."""

    kind: Literal["hf"] = "hf"
    path: str = Field(
        description="hf:FOLDER (relative to the plan's file), hf:NAME on the hub, or gguf:FILE"
    )

    def relative_to(self, folder: Path) -> Self:
        kind, _, name = self.path.partition(":")
        local = folder / Path(name).expanduser()
        path = f"{kind}:{local}" if local.exists() else self.path
        return self.model_copy(update={"path": path})

    def identity(self) -> dict[str, Any]:
        return {"kind": self.kind}  # a run's identity has the tokenizer's own fingerprint


class Hf(Tokenizer):
    """A tokenizer of the tokenizers library, with the end-of-text token of its model.

    The end-of-text token is the one that begins a text, where the model has one (Llama's
    beginning-of-sequence token), else the one that ends it. Ids of the embedding that the tokenizer
    does not use stand for no bytes. A SentencePiece tokenizer writes a space before a text, and
    that space counts as a byte of it.

    Args:
        state: what :meth:`state` returns.
    """

    Schema = HfTokenizer

    def __init__(self, state: dict[str, Any]):
        import tokenizers

        self._state = state
        self._tokenizer = tokenizers.Tokenizer.from_str(json.dumps(state["tokenizer"]))
        # As everywhere in lmplay, the end of a text cannot be written in it.
        self._tokenizer.encode_special_tokens = True
        self.eot = int(state["eot"])
        self.begins_with_eot = bool(state["begins_with_eot"])
        self.pieces = list(_pieces(state["tokenizer"], self._tokenizer, int(state["vocab_size"])))

    @classmethod
    def from_plan(cls, schema: HfTokenizer) -> Hf:
        return read_tokenizer(schema.path)

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> Hf:
        return cls(state)

    @property
    def bos(self) -> int:
        return self._or_eot("bos")

    @property
    def eos(self) -> int:
        return self._or_eot("eos")

    def _or_eot(self, which: str) -> int:
        found = self._state[which]
        return self.eot if found is None else int(found)

    def library_form(self) -> Any:
        import tokenizers

        return tokenizers.Tokenizer.from_str(json.dumps(self._state["tokenizer"]))

    def state(self) -> dict[str, Any]:
        return {"kind": self.kind, **self._state}

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        encoded = self._tokenizer.encode_batch(list(texts), add_special_tokens=False)
        return [np.array(e.ids, dtype=np.int64) for e in encoded]


def read_tokenizer(spec: str) -> Hf:
    """Return the tokenizer of a pretrained model, with as many ids as its embedding has rows.

    Raises:
        LmplayError: there is none, it has more tokens than the embedding, or its ids cannot be
            turned into bytes.
    """
    theirs = read(spec, "its tokenizer", need("transformers").AutoTokenizer.from_pretrained)
    if not getattr(theirs, "is_fast", False):
        raise LmplayError(f"{spec}: its tokenizer has no form of the tokenizers library")
    backend = theirs.backend_tokenizer
    plain = theirs("a", add_special_tokens=False)["input_ids"]
    begins = theirs("a")["input_ids"][:1] != plain[:1]
    eot = theirs("a")["input_ids"][0] if begins else theirs.eos_token_id
    if eot is None:
        raise LmplayError(f"{spec}: its tokenizer has no token that begins or ends a text")
    rows = int(read_config(spec).vocab_size)
    size = max(backend.get_vocab(with_added_tokens=True).values()) + 1
    if size > rows:
        raise LmplayError(
            f"{spec}: its tokenizer has {size} tokens, more than its embedding ({rows})"
        )
    return Hf(
        {
            "tokenizer": json.loads(backend.to_str()),
            "vocab_size": rows,
            "eot": eot,
            "begins_with_eot": begins,
            "bos": theirs.bos_token_id,
            "eos": theirs.eos_token_id,
        }
    )


def _pieces(content: dict[str, Any], tokenizer: Any, size: int) -> Iterator[bytes]:
    """Yield the bytes of each id."""
    kinds = {part["type"]: part for part in _parts(content.get("decoder"))}
    replaced = kinds.get("Replace", {}).get("pattern", {}).get("String")
    byte_level = "ByteLevel" in kinds
    if not byte_level and "Metaspace" not in kinds and replaced != SPACE:
        raise LmplayError(
            "this tokenizer is neither byte-level nor SentencePiece's: its ids have no bytes"
        )
    to_byte = {c: b for b, c in byte_alphabet().items()}
    added = {token["id"]: token for token in content["added_tokens"]}
    texts = {i: t for t, i in tokenizer.get_vocab(with_added_tokens=True).items()}
    for i in range(size):
        text = texts.get(i, "")
        if i in added:
            yield b"" if added[i]["special"] else text.encode()
        elif byte_level:
            yield bytes(to_byte[c] for c in text)
        elif "ByteFallback" in kinds and re.fullmatch("<0x[0-9A-F]{2}>", text):
            yield bytes([int(text[3:5], 16)])
        else:
            yield text.replace(SPACE, " ").encode()


def _parts(decoder: dict[str, Any] | None) -> list[dict[str, Any]]:
    if decoder is None:
        return []
    return decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
