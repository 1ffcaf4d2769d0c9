"""The bytes that each token stands for, from a tokenizer.json.

Owns the reading of that file as far as grammars and log probabilities need it, which takes a
fraction of the time and memory of loading a tokenizer: no merges, no scores. Invariant: a token
whose bytes are not known stands for nothing, so that no grammar ever allows it. Does not know how
text is encoded.
"""

import re
from collections.abc import Collection
from pathlib import Path
from typing import Any, Final

import msgspec

from workers.config.model_file import MAX_TOKENIZER_BYTES, read_file
from workers.errors import CheckpointError, UnknownVocabulary

_BYTE: Final = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_BLANK: Final = "\N{LOWER ONE EIGHTH BLOCK}"
"""What SentencePiece writes for a blank."""


class _AddedToken(msgspec.Struct):
    id: int
    content: str
    special: bool = False


class _Model(msgspec.Struct):
    vocab: dict[str, int] | list[tuple[str, float]]
    type: str | None = None


class _Tokenizer(msgspec.Struct):
    model: _Model
    added_tokens: list[_AddedToken] = []
    decoder: dict[str, Any] | None = None


def read_vocabulary(
    file: Path, vocab_size: int, eos_token_ids: Collection[int] = ()
) -> list[bytes]:
    """What each of the first `vocab_size` tokens stands for: nothing, if it is special or one of
    `eos_token_ids`. Raises `UnknownVocabulary`."""
    try:
        content = read_file(file, MAX_TOKENIZER_BYTES)
        tokenizer = msgspec.json.decode(content, type=_Tokenizer)
    except (CheckpointError, msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UnknownVocabulary(
            f"{file}, which says what the tokens are, can't be read: {error}"
        ) from error
    kinds = _decoder_kinds(tokenizer.decoder)
    if "ByteLevel" in kinds:
        table = _byte_level_table()
    elif kinds & {"ByteFallback", "Metaspace", "Replace"}:
        table = None
    else:
        raise UnknownVocabulary(
            "only byte-level and SentencePiece tokenizers are read, and this model has "
            f"another one (decoder: {', '.join(sorted(kinds)) or 'none'})"
        )
    tokens = [b""] * vocab_size
    vocab = tokenizer.model.vocab
    pairs = vocab.items() if isinstance(vocab, dict) else ((v[0], i) for i, v in enumerate(vocab))
    for piece, token in pairs:
        if 0 <= token < vocab_size:
            tokens[token] = _piece_bytes(piece, table)
    for added in tokenizer.added_tokens:
        if 0 <= added.id < vocab_size:
            tokens[added.id] = b"" if added.special else added.content.encode()
    for token in eos_token_ids:
        if token < vocab_size:
            tokens[token] = b""
    return tokens


def _decoder_kinds(decoder: dict[str, Any] | None) -> set[str]:
    """The types of a decoder and of those that it is made of."""
    if decoder is None:
        return set()
    parts = decoder.get("decoders")
    inner = [part for part in parts if isinstance(part, dict)] if isinstance(parts, list) else []
    return {str(decoder.get("type"))}.union(*(_decoder_kinds(part) for part in inner))


def _piece_bytes(piece: str, table: dict[int, int] | None) -> bytes:
    if table is None:
        if found := _BYTE.fullmatch(piece):
            return bytes([int(found[1], 16)])
        return piece.replace(_BLANK, " ").encode(errors="ignore")
    try:
        return piece.translate(table).encode("latin-1")
    except UnicodeEncodeError:  # no byte is written like that
        return b""


def _byte_level_table() -> dict[int, int]:
    """GPT-2's alphabet (`bytes_to_unicode`), backwards: a character for each byte, itself where it
    can be seen, else one from U+0100 on."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = sorted(set(range(0x100)) - set(visible))
    table = {0x100 + number: byte for number, byte in enumerate(hidden)}
    # A character that stands for no byte becomes one that can't be encoded.
    return table | dict.fromkeys(hidden, 0x100)
