"""A GGUF file's tokenizer as the parts of a tokenizer.json, one function for each kind of it.

Owns what `tokenizer.ggml.model` means. Invariant: what is written encodes text to the ids that
the model was trained with, or the file is refused by name; nothing is left to a default that is
another model's. Pure: metadata in, JSON out.
"""

import base64
from collections.abc import Callable, Mapping
from typing import Any, Final

from server.errors import ServerError
from server.text.gguf.parts import (
    BLANK,
    Parts,
    around,
    character_decoder,
    letters_as_they_are,
    replace,
    sequence,
    template,
    whole_tokens,
)
from server.text.gguf.splits import DEFAULT, Split, split_named
from server.text.gguf.vocabulary import (
    UNKNOWN,
    USER_DEFINED,
    WHOLE,
    BadVocabulary,
    Vocabulary,
    is_list,
)

PRE: Final = "tokenizer.ggml.pre"
CUT_BY_NAME: Final = ("gpt2", "whitespace")
"""The kinds of tokenizers whose text is cut into words as that says."""


class UnknownTokenizer(ServerError):
    """A kind of tokenizer that can't be built from a GGUF file."""

    code = "unknown_tokenizer"


def tokenizer_json(metadata: Mapping[str, Any], vocabulary: Vocabulary) -> Parts:
    """What tokenizer.json holds. Raises UnknownTokenizer, UnknownSplit, BadVocabulary."""
    kind = metadata.get("tokenizer.ggml.model")
    build = _KINDS.get(kind) if isinstance(kind, str) else None
    if build is None:
        raise UnknownTokenizer(
            f"its tokenizer is of the kind {str(kind)[:80]!r} (tokenizer.ggml.model), which can't "
            f"be built from a GGUF file: {', '.join(_KINDS)} can"
        )
    parts = build(vocabulary, metadata)
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": list(whole_tokens(vocabulary, metadata)),
        **parts,
    }


# --- kinds


def _merged_bytes(vocabulary: Vocabulary, metadata: Mapping[str, Any]) -> Parts:
    """Merges in the order of their list, of bytes spelled as GPT-2 does it, or of characters."""
    split = _split_of(vocabulary, metadata)
    cuts: list[Parts] = [
        {"type": "Split", "pattern": {"Regex": one}, "behavior": "Isolated", "invert": False}
        for one in split.patterns
    ]
    if split.drops_blanks:
        cuts = [{"type": "WhitespaceSplit"}]
    decoder: Parts | None
    if split.in_bytes:
        level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
        cuts.append({**level, "use_regex": False})
        decoder = sequence(
            "decoders", [*letters_as_they_are(vocabulary), {**level, "use_regex": True}]
        )
    else:
        decoder = character_decoder(split.marks_blanks, first_blank=False)
    normalizers: list[Parts] = [{"type": "NFC"}] if split.composes else []
    if split.marks_blanks:
        normalizers.append(replace(" ", BLANK))
    if split.drops_blanks and vocabulary.flag("normalizer.lowercase"):
        normalizers.append({"type": "Lowercase"})
    return {
        "normalizer": sequence("normalizers", normalizers),
        "pre_tokenizer": sequence("pretokenizers", cuts),
        "post_processor": around(vocabulary, adds_bos=split.adds_bos),
        "decoder": decoder,
        "model": _bpe(
            vocabulary,
            _listed_merges(vocabulary),
            ignore_merges=split.ignores_merges,
            byte_fallback=not split.in_bytes,
        ),
    }


def _gemma4(vocabulary: Vocabulary, metadata: Mapping[str, Any]) -> Parts:
    return _merged_bytes(vocabulary, {**metadata, PRE: "gemma4"})


def _merged_by_score(vocabulary: Vocabulary, metadata: Mapping[str, Any]) -> Parts:
    """SentencePiece's BPE: the two neighbours first that make the token of the highest score."""
    first_blank = vocabulary.flag("add_space_prefix") is not False
    normalizers: list[Parts] = [{"type": "Prepend", "prepend": BLANK}] if first_blank else []
    unknown = vocabulary.token_id("unknown")
    unknown = next(iter(vocabulary.of_kind(UNKNOWN)), unknown)
    return {
        "normalizer": sequence("normalizers", [*normalizers, replace(" ", BLANK)]),
        "pre_tokenizer": None,
        "post_processor": around(vocabulary, adds_bos=True, bos=1, eos=2),
        "decoder": character_decoder(marks_blanks=True, first_blank=first_blank),
        "model": _bpe(
            vocabulary,
            _scored_merges(vocabulary),
            unk_token=None if unknown is None else vocabulary.tokens[unknown],
            fuse_unk=True,
            byte_fallback=True,
        ),
    }


def _longest_pieces(vocabulary: Vocabulary, metadata: Mapping[str, Any]) -> Parts:
    """BERT's: words, and of each the longest token that it begins with, again and again."""
    unknown = vocabulary.token_id("unknown")
    unknown = vocabulary.ids.get("[UNK]", unknown)
    if unknown is None:
        raise BadVocabulary("it has no token for unknown words")
    lowercase = vocabulary.flag("normalizer.lowercase") is not False
    accents = vocabulary.flag("normalizer.strip_accents")
    cls, sep = vocabulary.token_id("bos"), vocabulary.token_id("seperator")
    cls = vocabulary.ids.get("[CLS]") if cls is None else cls
    sep = vocabulary.ids.get("[SEP]") if sep is None else sep
    pieces = {
        _piece(text, kind): token_id
        for token_id, (text, kind) in enumerate(
            zip(vocabulary.tokens, vocabulary.kinds, strict=True)
        )
    }
    if len(pieces) != len(vocabulary.tokens):
        raise BadVocabulary("two of its tokens are the same piece of a word")
    return {
        "normalizer": {
            "type": "BertNormalizer",
            "clean_text": True,
            "handle_chinese_chars": True,
            "strip_accents": lowercase if accents is None else accents,
            "lowercase": lowercase,
        },
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "post_processor": template(vocabulary, [cls], [sep]),
        "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True},
        "model": {
            "type": "WordPiece",
            "unk_token": vocabulary.tokens[unknown],
            "continuing_subword_prefix": "##",
            "max_input_chars_per_word": 100,
            "vocab": pieces,
        },
    }


def _likeliest(vocabulary: Vocabulary, metadata: Mapping[str, Any]) -> Parts:
    """SentencePiece's unigram model: the cut whose scores are the highest together."""
    if not vocabulary.scores:
        raise BadVocabulary("it has no scores (tokenizer.ggml.scores)")
    unknown = next(iter(vocabulary.of_kind(UNKNOWN)), vocabulary.token_id("unknown"))
    if unknown is None:
        raise BadVocabulary("it has no token for unknown characters")
    first_blank = bool(vocabulary.flag("add_space_prefix"))
    merges_blanks = bool(vocabulary.flag("remove_extra_whitespaces"))
    normalizers: list[Parts] = []
    if charsmap := vocabulary.said.get("precompiled_charsmap"):
        if not is_list(charsmap, int):
            raise BadVocabulary("its precompiled_charsmap is no list of bytes")
        content = bytes(value & 0xFF for value in charsmap)
        coded = base64.b64encode(content).decode()
        normalizers.append({"type": "Precompiled", "precompiled_charsmap": coded})
    if merges_blanks:
        normalizers.append({"type": "Strip", "strip_left": True, "strip_right": True})
        normalizers.append(
            {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "},
        )
    scheme = "always" if first_blank or merges_blanks else "never"
    metaspace = {
        "type": "Metaspace",
        "replacement": BLANK,
        "prepend_scheme": scheme,
        "split": False,
    }
    scored = [
        [text, 0.0 if kind == USER_DEFINED else score]
        for text, kind, score in zip(
            vocabulary.tokens, vocabulary.kinds, vocabulary.scores, strict=True
        )
    ]
    return {
        "normalizer": sequence("normalizers", normalizers),
        "pre_tokenizer": metaspace,
        "post_processor": around(vocabulary, adds_eos=True, eos=1),
        "decoder": metaspace,
        "model": {"type": "Unigram", "unk_id": unknown, "vocab": scored, "byte_fallback": False},
    }


_KINDS: Final[Mapping[str, Callable[[Vocabulary, Mapping[str, Any]], Parts]]] = {
    "gpt2": _merged_bytes,
    "llama": _merged_by_score,
    "gemma4": _gemma4,
    "bert": _longest_pieces,
    "t5": _likeliest,
    "whitespace": _merged_bytes,
}


# --- parts of them


def _split_of(vocabulary: Vocabulary, metadata: Mapping[str, Any]) -> Split:
    name = metadata.get(PRE, DEFAULT)
    if not isinstance(name, str):
        raise BadVocabulary("its tokenizer.ggml.pre is no text")
    return split_named(name)


def _listed_merges(vocabulary: Vocabulary) -> list[str]:
    """Of those that are listed twice the first; no word holds a blank."""
    from server.text.gguf.merges import usable  # and numpy, which only who builds one needs

    listed = [merge for merge in dict.fromkeys(vocabulary.merges) if merge.count(" ") == 1]
    merges, wrong = usable(vocabulary.tokens, listed)
    if wrong is not None:
        raise BadVocabulary(f"it merges {wrong[:80]!r} to what is none of its tokens")
    return merges


def _scored_merges(vocabulary: Vocabulary) -> list[str]:
    """Any two tokens that make a third one, by its score."""
    from server.text.gguf.merges import scored_merges

    if not vocabulary.scores:
        raise BadVocabulary("it has no scores (tokenizer.ggml.scores)")
    parts = [  # no word holds a blank
        token_id
        for token_id, (text, kind) in enumerate(
            zip(vocabulary.tokens, vocabulary.kinds, strict=True)
        )
        if kind not in WHOLE and " " not in text
    ]
    return scored_merges(
        [vocabulary.tokens[token_id] for token_id in parts],
        [vocabulary.scores[token_id] for token_id in parts],
    )


def _bpe(vocabulary: Vocabulary, merges: list[str], **settings: Any) -> Parts:
    # What begins so would be taken for the head of a file of merges; pairs are larger.
    in_pairs = "#version" in "\n".join(merges)
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
        **settings,
        "vocab": vocabulary.ids,
        "merges": [merge.split(" ") for merge in merges] if in_pairs else merges,
    }


def _piece(text: str, kind: int) -> str:
    """GGUF marks where a word begins, a tokenizer.json where it goes on."""
    if kind in WHOLE:
        return text
    return text[len(BLANK) :] if text.startswith(BLANK) else f"##{text}"
