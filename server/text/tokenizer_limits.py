"""How much a tokenizer can make of a text, and of a token: a tokenizer.json is a program, too.

Owns the bounds. Invariant: what passes makes at most `growth` times as many characters of a text
before it is cut into tokens, and as many of a token's when it is decoded. Pure: it asks a loaded
tokenizer for its parts. Does not know files.

A normalizer that replaces "a" by "aa", forty times over, makes a terabyte of one letter.
"""

import base64
import json
import math
from collections.abc import Iterable, Mapping
from typing import Any, Final

from tokenizers import Tokenizer

from server.text.tokenizer_files import TokenizerMissing

MAX_GROWTH: Final = 4096
"""Of a text. Families that compose and decompose, one after the other, come to some 1,000."""
MAX_DECODER_GROWTH: Final = 64
MAX_STEPS: Final = 256
MAX_SPECIAL: Final = 1024
"""Tokens that are put around a text."""
MAX_TOKEN_CHARS: Final = 1 << 16
MAX_CHARS: Final = 1 << 28
"""Of a text once it is normalized."""

_LONGEST_CHARACTER: Final = 18
"""What compatibility decomposition makes of U+FDFA."""
_GROWTH: Final[Mapping[str, float]] = {
    "BertNormalizer": 12,  # blanks around a character, decomposed
    "ByteLevel": 4,
    "Lowercase": 3,
    "NFC": 4,
    "NFD": 4,
    "NFKC": _LONGEST_CHARACTER,
    "NFKD": _LONGEST_CHARACTER,
}
"""By the type of a step; others make nothing longer, but for those that say what they put in."""


def check_tokenizer(tokenizer: Tokenizer) -> None:
    """Raises TokenizerMissing, with what is beyond all bounds."""
    if normalizer_growth(tokenizer) > MAX_GROWTH:
        raise TokenizerMissing(
            f"tokenizer.json can make more than {MAX_GROWTH:,} times as much of a text (its "
            "normalizer): it is damaged, or made to do harm"
        )
    decoder = _state(tokenizer.decoder)
    if _growth(decoder) > MAX_DECODER_GROWTH:
        raise TokenizerMissing(
            f"tokenizer.json can make more than {MAX_DECODER_GROWTH} times as much of a token (its "
            "decoder): it is damaged, or made to do harm"
        )
    for part in (tokenizer.normalizer, tokenizer.pre_tokenizer, tokenizer.decoder):
        if _num_steps(_state(part)) > MAX_STEPS:
            raise TokenizerMissing(
                f"tokenizer.json lists more than {MAX_STEPS} steps: it is damaged, or made to do "
                "harm"
            )
    if tokenizer.num_special_tokens_to_add(False) > MAX_SPECIAL:
        raise TokenizerMissing(f"tokenizer.json puts more than {MAX_SPECIAL} tokens around a text")
    if max(map(len, tokenizer.get_vocab()), default=0) > MAX_TOKEN_CHARS:
        raise TokenizerMissing(
            f"tokenizer.json holds a token of more than {MAX_TOKEN_CHARS:,} characters"
        )


def normalizer_growth(tokenizer: Tokenizer) -> float:
    """How many characters one of a text can become before it is cut into tokens."""
    return _growth(_state(tokenizer.normalizer))


def _growth(step: Mapping[str, Any]) -> float:
    kind = step.get("type")
    if kind == "Sequence":
        factors = (_growth(part) for part in _parts(step))
        return _product(factors)
    if kind == "Replace":
        pattern = step.get("pattern")
        found = pattern.get("String") if isinstance(pattern, dict) else None
        length = max(len(found), 1) if isinstance(found, str) else 1
        put_in = len(str(step.get("content", "")))
        # An empty match puts something between every two characters.
        return max(1.0, put_in / length) if found else 1.0 + put_in
    if kind == "Prepend":
        return 1.0 + len(str(step.get("prepend", "")))
    if kind == "Precompiled":
        return float(_longest_replacement(str(step.get("precompiled_charsmap", ""))))
    return float(_GROWTH.get(str(kind), 1))


def _product(factors: Iterable[float]) -> float:
    product = 1.0
    for factor in factors:
        product = min(product * factor, math.inf)
        if product > MAX_GROWTH:
            break
    return product


def _longest_replacement(charsmap: str) -> int:
    """SentencePiece's table: the size of a trie, the trie, and the texts that it leads to."""
    try:
        blob = base64.b64decode(charsmap, validate=True)
    except ValueError:
        return 1
    trie_bytes = int.from_bytes(blob[:4], "little")
    return max((len(text) for text in blob[4 + trie_bytes :].split(b"\0")), default=1) or 1


def _num_steps(step: Mapping[str, Any]) -> int:
    return 1 + sum(map(_num_steps, _parts(step)))


def _parts(step: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    for name in ("normalizers", "pretokenizers", "decoders"):
        parts = step.get(name)
        if isinstance(parts, list):
            return [part for part in parts if isinstance(part, dict)]
    return []


def _state(part: Any) -> Mapping[str, Any]:
    """What a part of a tokenizer was read from."""
    state = json.loads(part.__getstate__()) if part is not None else {}
    return state if isinstance(state, dict) else {}
