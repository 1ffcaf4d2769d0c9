"""How much a tokenizer can make of a text: families that exist pass, and keep to it."""

import asyncio
import json
from typing import Any

import pytest
from tokenizers import Tokenizer

from server.errors import ContextLengthExceeded
from server.text.text import Text
from server.text.tokenizer_files import TokenizerMissing
from server.text.tokenizer_limits import MAX_CHARS, check_tokenizer, normalizer_growth

QUOTES = {"type": "Replace", "pattern": {"String": "``"}, "content": '"'}
BLANKS = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
RUNS = {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": "▁"}
FAMILIES: dict[str, Any] = {
    "GPT-2": None,
    "BERT": {
        "type": "BertNormalizer",
        "clean_text": True,
        "handle_chinese_chars": True,
        "strip_accents": None,
        "lowercase": True,
    },
    "Gemma": BLANKS,
    "Llama 2": {
        "type": "Sequence",
        "normalizers": [{"type": "Prepend", "prepend": "▁"}, BLANKS],
    },
    "Qwen": {"type": "NFC"},
    "ALBERT": {
        "type": "Sequence",
        "normalizers": [
            QUOTES,
            {"type": "NFKD"},
            {"type": "StripAccents"},
            {"type": "Lowercase"},
            RUNS,
        ],
    },
    "ModernBERT": {"type": "Sequence", "normalizers": [{"type": "NFKC"}, {"type": "Lowercase"}]},
}
TEXT = "Ａﷺé ``x``  İ\N{LATIN SMALL LIGATURE FFI} 中文 " * 50


def made(normalizer: Any, **changes: Any) -> Tokenizer:
    vocab = {chr(code): code - 32 for code in range(32, 127)} | {"<unk>": 95}
    document = {
        "version": "1.0",
        "normalizer": normalizer,
        "model": {"type": "WordLevel", "vocab": vocab, "unk_token": "<unk>"},
        "added_tokens": [],
        **changes,
    }
    return Tokenizer.from_str(json.dumps(document))


@pytest.mark.parametrize("family", FAMILIES)
def test_families_that_exist_pass(family: str) -> None:
    tokenizer = made(FAMILIES[family])
    check_tokenizer(tokenizer)
    growth = normalizer_growth(tokenizer)
    if tokenizer.normalizer is not None:
        assert len(tokenizer.normalizer.normalize_str(TEXT)) <= growth * len(TEXT)
        for character in TEXT:
            assert len(tokenizer.normalizer.normalize_str(character)) <= growth
    assert growth < 200


def test_what_would_become_too_long_is_refused_before_it_does() -> None:
    doubled = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}
    tokenizer = made({"type": "Sequence", "normalizers": [doubled] * 12})
    check_tokenizer(tokenizer)
    text = Text(tokenizer)
    try:
        assert len(asyncio.run(text.encode("a" * 10, context_tokens=1 << 30))) == 1
        with pytest.raises(ContextLengthExceeded, match="normalizer could make too much"):
            asyncio.run(text.encode("a" * (MAX_CHARS // 4096 + 1), context_tokens=1 << 30))
    finally:
        text.close()


@pytest.mark.parametrize(
    ("decoder", "fits"),
    [
        ({"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, True),
        ({"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 65}, False),
        (
            {
                "type": "ByteLevel",
                "add_prefix_space": True,
                "trim_offsets": True,
                "use_regex": True,
            },
            True,
        ),
        ({"type": "WordPiece", "prefix": "##", "cleanup": True}, True),
    ],
)
def test_decoders(decoder: Any, fits: bool) -> None:
    tokenizer = made(None, decoder=decoder)
    if fits:
        check_tokenizer(tokenizer)
        return
    with pytest.raises(TokenizerMissing, match="64 times as much of a token"):
        check_tokenizer(tokenizer)
