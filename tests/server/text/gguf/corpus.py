"""Texts on which tokenizers are compared: what is written by people, and what is not.

Owns the texts and the small vocabularies that are trained on them. Invariant: the same seed gives
the same texts. The vocabularies are trained on windows that nobody cut into words, so that tokens
reach across the ends of words: a word that is cut elsewhere shows in the ids.
"""

import json
import random
import unicodedata
from collections.abc import Iterator
from typing import Any, Final

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

from server.conformance.samples import TEXTS

_BLOCKS: Final = (
    (0x20, 0x250),
    (0x250, 0x3000),
    (0x3000, 0xD7FF),
    (0xF900, 0xFFEE),
    (0x1F000, 0x1FA00),
    (0x10000, 0x10500),
)
_PIECES: Final = (
    *"aAbBzZ09 1239  \n\t'sstreldmv.,!?()[]{}<>-_=+/\\\"#$%&*@^~`|:;",
    *"\xe9\xc9\xdf\xf1\u4e2d\u56fd\u65e5\u672c\u304b\u306a\u30ab\u30ca\ud55c\uae00\u043a\u0438\u0440\u043b\u0426\u0416\u05e2\u05d1",
    *"\u0905\u092c\u093e\u094d\u0939\u093f\u0902\u0e01\u0e47\xe1\u0153\u0301\u0308\xa0\u3000\u2014\u2026\u201c\u20ac\u200b\u2581\xbd\u216b\u0663",
    *("\r\n", "\U0001f642", "\U0001f44d\U0001f3fd", "  ", "   ", "the ", "ing", "er ", "'S", "'ll"),
    *("\n\n", " \n", "123", "4567"),
)
MARKS: Final = ("<s>", "</s>", "<|im_end|>", "<\uff5cUser\uff5c>")
"""Tokens that are whole: all but the last are special."""


def random_texts(count: int, seed: int) -> list[str]:
    """Half of pieces that meet in text, half of any characters that Unicode has assigned."""
    chance = random.Random(seed)
    found = [
        "".join(chance.choice(_PIECES) for _ in range(chance.randint(1, 40)))
        for _ in range(count // 2)
    ]
    while len(found) < count:
        text = "".join(
            chr(chance.randrange(*chance.choice(_BLOCKS))) for _ in range(chance.randint(1, 12))
        )
        if all(unicodedata.category(one) != "Cn" for one in text):
            found.append(text)
    return found


def marked_texts(count: int, seed: int, marks: tuple[str, ...] = MARKS) -> list[str]:
    """With whole tokens among words and blanks."""
    chance = random.Random(seed)
    between = ("", " ", "a", "hello world", "\n", "  x ", "\u4e2d")
    return [
        "".join(chance.choice(between) + chance.choice(marks) for _ in range(chance.randint(1, 5)))
        + chance.choice(("", " ", "b", "\n"))
        for _ in range(count)
    ]


def _windows(seed: int) -> Iterator[str]:
    chance = random.Random(seed)
    for text in (*TEXTS * 3, *random_texts(2000, seed)):
        at = 0
        while at < len(text):
            step = chance.randint(2, 9)
            yield text[at : at + step].replace("\0", "")
            at += step


def trained(in_bytes: bool, num_tokens: int, seed: int = 5) -> dict[str, Any]:
    """Tokens, kinds and merges as a GGUF file holds them, of bytes or of characters."""
    whole = [*MARKS]
    tokenizer = Tokenizer(models.BPE())
    if in_bytes:
        level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.pre_tokenizer = level
        alphabet = level.alphabet()
    else:
        whole += [f"<0x{byte:02X}>" for byte in range(256)]
        tokenizer.normalizer = normalizers.Replace(" ", "\u2581")
        tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("\\A.+\\z"), "isolated")
        alphabet = ["\u2581", "\n", *map(chr, range(33, 127))]
    trainer = trainers.BpeTrainer(
        vocab_size=num_tokens,
        initial_alphabet=alphabet,
        limit_alphabet=800,
        special_tokens=whole,
        show_progress=False,
    )
    tokenizer.train_from_iterator(_windows(seed), trainer)
    ids = tokenizer.get_vocab()
    kinds = dict.fromkeys(MARKS, 3) | {MARKS[-1]: 4}
    tokens = sorted(ids, key=ids.__getitem__)
    return {
        "tokens": tokens,
        "kinds": [kinds.get(one, 6 if one.startswith("<0x") else 1) for one in tokens],
        "merges": [" ".join(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]],
    }
