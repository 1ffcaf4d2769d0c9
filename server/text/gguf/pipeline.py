"""A GGUF file's tokenizer as the parts of a tokenizer.json, one function for each kind of it.

Owns what `tokenizer.ggml.model` means. Invariant: what is written encodes text to the ids that
the model was trained with, or the file is refused by name; nothing is left to a default that is
another model's. Pure: metadata in, JSON out.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

from server.errors import ServerError
from server.text.gguf.endings import end_names
from server.text.gguf.merges import scored_merges, usable
from server.text.gguf.splits import DEFAULT, Split, split_named
from server.text.gguf.vocabulary import (
    CONTROL,
    UNKNOWN,
    USER_DEFINED,
    WHOLE,
    BadVocabulary,
    Vocabulary,
)

BLANK: Final = "\N{LOWER ONE EIGHTH BLOCK}"
_NO_UTF8: Final = (*range(0xC0, 0xC2), *range(0xF5, 0x100))
"""Bytes that no text in UTF-8 holds. A token whose name is the letter that stands for one is that
letter, as DeepSeek Coder has them."""

Parts = dict[str, Any]


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
        "added_tokens": list(_whole_tokens(vocabulary, metadata)),
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
        decoder = _sequence(
            "decoders", [*_letters_as_they_are(vocabulary), {**level, "use_regex": True}]
        )
    else:
        decoder = _character_decoder(split.marks_blanks, first_blank=False)
    normalizers: list[Parts] = [{"type": "NFC"}] if split.composes else []
    if split.marks_blanks:
        normalizers.append(_replace(" ", BLANK))
    if split.drops_blanks and vocabulary.flag("normalizer.lowercase"):
        normalizers.append({"type": "Lowercase"})
    return {
        "normalizer": _sequence("normalizers", normalizers),
        "pre_tokenizer": _sequence("pretokenizers", cuts),
        "post_processor": _around(vocabulary, adds_bos=split.adds_bos),
        "decoder": decoder,
        "model": _bpe(
            vocabulary,
            _listed_merges(vocabulary),
            ignore_merges=split.ignores_merges,
            byte_fallback=not split.in_bytes,
        ),
    }


def _gemma4(vocabulary: Vocabulary, metadata: Mapping[str, Any]) -> Parts:
    return _merged_bytes(vocabulary, {**metadata, "tokenizer.ggml.pre": "gemma4"})


def _merged_by_score(vocabulary: Vocabulary, metadata: Mapping[str, Any]) -> Parts:
    """SentencePiece's BPE: the two neighbours first that make the token of the highest score."""
    first_blank = vocabulary.flag("add_space_prefix") is not False
    normalizers: list[Parts] = [{"type": "Prepend", "prepend": BLANK}] if first_blank else []
    unknown = vocabulary.token_id("unknown")
    unknown = next(iter(vocabulary.of_kind(UNKNOWN)), unknown)
    return {
        "normalizer": _sequence("normalizers", [*normalizers, _replace(" ", BLANK)]),
        "pre_tokenizer": None,
        "post_processor": _around(vocabulary, adds_bos=True, bos=1, eos=2),
        "decoder": _character_decoder(marks_blanks=True, first_blank=first_blank),
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
        "post_processor": _template(vocabulary, [cls], [sep]),
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
    import base64

    if not vocabulary.scores:
        raise BadVocabulary("it has no scores (tokenizer.ggml.scores)")
    unknown = next(iter(vocabulary.of_kind(UNKNOWN)), vocabulary.token_id("unknown"))
    if unknown is None:
        raise BadVocabulary("it has no token for unknown characters")
    first_blank = bool(vocabulary.flag("add_space_prefix"))
    merges_blanks = bool(vocabulary.flag("remove_extra_whitespaces"))
    normalizers: list[Parts] = []
    if charsmap := vocabulary.said.get("precompiled_charsmap"):
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
        "normalizer": _sequence("normalizers", normalizers),
        "pre_tokenizer": metaspace,
        "post_processor": _around(vocabulary, adds_eos=True, eos=1),
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
    name = metadata.get("tokenizer.ggml.pre", DEFAULT)
    if not isinstance(name, str):
        raise BadVocabulary("its tokenizer.ggml.pre is no text")
    return split_named(name)


def _listed_merges(vocabulary: Vocabulary) -> list[str]:
    """Of those that are listed twice the first; no word holds a blank."""
    listed = [merge for merge in dict.fromkeys(vocabulary.merges) if merge.count(" ") == 1]
    merges, wrong = usable(vocabulary.tokens, listed)
    if wrong is not None:
        raise BadVocabulary(f"it merges {wrong[:80]!r} to what is none of its tokens")
    return merges


def _scored_merges(vocabulary: Vocabulary) -> list[str]:
    """Any two tokens that make a third one, by its score."""
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
    in_pairs = any(merge.startswith("#version") for merge in merges)
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


def _whole_tokens(vocabulary: Vocabulary, metadata: Mapping[str, Any]) -> Iterator[Parts]:
    """Tokens that are found in a text as they are, before anything is done to it."""
    name = str(metadata.get("general.name", "")).lower()
    takes_blanks_behind = "phi-3" in name or "phi3" in name
    named = {vocabulary.ids[text] for text in end_names() if text in vocabulary.ids}
    for token_id in sorted({*vocabulary.of_kind(*WHOLE), *named}):
        text, kind = vocabulary.tokens[token_id], vocabulary.kinds[token_id]
        yield {
            "id": token_id,
            "content": text,
            "single_word": False,
            "lstrip": text in ("<mask>", "[MASK]") and _takes_blanks_before(metadata, name),
            "rstrip": takes_blanks_behind and text not in ("<unk>", "<s>", "<|endoftext|>"),
            "normalized": False,
            "special": kind != USER_DEFINED,
        }


def _takes_blanks_before(metadata: Mapping[str, Any], name: str) -> bool:
    return (
        str(metadata.get("tokenizer.ggml.pre", "")).startswith("jina-v2-")
        or metadata.get("general.architecture") in ("nomic-bert-moe", "jina-bert-v3")
        or "modern-bert" in name
    )


def _around(
    vocabulary: Vocabulary,
    *,
    adds_bos: bool = False,
    adds_eos: bool = False,
    bos: int | None = None,
    eos: int | None = None,
) -> Parts | None:
    """BOS and EOS around a prompt as the file says it; what it does not say is as given."""
    around: list[list[int | None]] = []
    for role, default, usual in (("bos", adds_bos, bos), ("eos", adds_eos, eos)):
        said = vocabulary.flag(f"add_{role}_token")
        token_id = vocabulary.token_id(role)
        if token_id is None and usual is not None and usual in vocabulary.of_kind(CONTROL):
            token_id = usual
        if said and token_id is None:
            raise BadVocabulary(
                f"it says that {role.upper()} is put around a prompt, and not which token that is "
                f"(tokenizer.ggml.{role}_token_id)"
            )
        around.append([token_id] if (default if said is None else said) else [])
    return _template(vocabulary, *around)


def _template(
    vocabulary: Vocabulary, before: list[int | None], behind: list[int | None]
) -> Parts | None:
    first, last = ([one for one in ids if one is not None] for ids in (before, behind))
    if not first and not last:
        return None

    def tokens(ids: list[int]) -> list[Parts]:
        return [{"SpecialToken": {"id": vocabulary.tokens[one], "type_id": 0}} for one in ids]

    def text(name: str) -> Parts:
        return {"Sequence": {"id": name, "type_id": 0}}

    return {
        "type": "TemplateProcessing",
        "single": [*tokens(first), text("A"), *tokens(last)],
        "pair": [*tokens(first), text("A"), *tokens(last), text("B"), *tokens(last)],
        "special_tokens": {
            vocabulary.tokens[one]: {
                "id": vocabulary.tokens[one],
                "ids": [one],
                "tokens": [vocabulary.tokens[one]],
            }
            for one in (*first, *last)
        },
    }


def _character_decoder(marks_blanks: bool, first_blank: bool) -> Parts:
    decoders: list[Parts] = [_replace(BLANK, " ")] if marks_blanks else []
    decoders += [{"type": "ByteFallback"}, {"type": "Fuse"}]
    if first_blank:
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {"type": "Sequence", "decoders": decoders}


def _letters_as_they_are(vocabulary: Vocabulary) -> Iterator[Parts]:
    for letter in map(chr, _NO_UTF8):
        token_id = vocabulary.ids.get(letter)
        if token_id is not None and vocabulary.kinds[token_id] in WHOLE:
            yield _replace(letter, "".join(map(_spelled, letter.encode())))


def _spelled(byte: int) -> str:
    """GPT-2's letter for a byte of a letter between U+00C0 and U+00FF."""
    return chr(byte) if byte > 0xA0 else chr(byte + 0xA2)


def _sequence(name: str, parts: list[Parts]) -> Parts | None:
    if len(parts) < 2:
        return parts[0] if parts else None
    return {"type": "Sequence", name: parts}


def _replace(what: str, by: str) -> Parts:
    return {"type": "Replace", "pattern": {"String": what}, "content": by}
