"""The form of a tokenizer in the tokenizers and transformers libraries, with the same ids."""

from __future__ import annotations

import base64
import tempfile
from pathlib import Path
from typing import Any

from ..data.tokenizers import Bpe, Bytes, Chars, Tiktoken, Tokenizer, byte_alphabet
from ..errors import LmplayError
from ..optional import need

EOT = "<|endoftext|>"


def fast_tokenizer(tokenizer: Tokenizer, max_len: int) -> Any:
    """The same tokenizer as one of transformers: the same ids for every text.

    Raises:
        LmplayError: there is no such form of it.
    """
    transformers = need("transformers")
    made = backend(tokenizer)
    eos = made.id_to_token(tokenizer.eos)
    # The end-of-text token cannot be written in a text of ours, so it is cut like any other text
    # there, too.
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made,
        bos_token=made.id_to_token(tokenizer.eot),
        eos_token=eos,
        pad_token=eos,
        model_max_length=max_len,
        split_special_tokens=True,
        clean_up_tokenization_spaces=False,
    )


def backend(tokenizer: Tokenizer) -> Any:
    """The tokenizers library's form of ours, with the end-of-text token under its id."""
    import tokenizers
    from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers

    alphabet = byte_alphabet()
    if (own := tokenizer.library_form()) is not None:
        return own
    if isinstance(tokenizer, Tiktoken):
        return _with_same_ids(_from_tiktoken(tokenizer), tokenizer)
    if isinstance(tokenizer, Bpe):
        made = tokenizers.Tokenizer.from_str(tokenizer.serialized)
    elif isinstance(tokenizer, Bytes):
        made = tokenizers.Tokenizer(models.BPE({alphabet[b]: b for b in range(256)}, []))
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        made.decoder = decoders.ByteLevel()
    elif isinstance(tokenizer, Chars):
        # What is unknown has no token, and is an error there too: the end of a text would be a
        # silent lie.
        made = tokenizers.Tokenizer(
            models.WordLevel({c: i for i, c in enumerate(tokenizer.characters)}, "<unknown>")
        )
        made.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
        made.decoder = decoders.Fuse()
    else:
        raise LmplayError(
            f"the tokenizer {tokenizer.kind} has no form in transformers; --format lmplay keeps it"
        )
    made.add_special_tokens([AddedToken(EOT, special=True, normalized=False)])
    return _with_same_ids(made, tokenizer)


def _with_same_ids(made: Any, tokenizer: Tokenizer) -> Any:
    if made.token_to_id(EOT) != tokenizer.eot or made.get_vocab_size() != tokenizer.vocab_size:
        raise LmplayError(
            "the tokenizer's special tokens would get other ids in transformers: --format lmplay"
        )
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
        )
        return converter.converted()
