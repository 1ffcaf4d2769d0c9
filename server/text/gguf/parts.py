"""Parts of a tokenizer.json that several kinds of tokenizers have.

Owns how they are written. Invariant: tokens are put around a prompt, and found in it as they are,
as the file says it; a contradiction is refused. Pure.
"""

from collections.abc import Iterator, Mapping
from typing import Any, Final

from server.text.gguf.endings import end_names
from server.text.gguf.vocabulary import CONTROL, USER_DEFINED, WHOLE, BadVocabulary, Vocabulary

BLANK: Final = "\N{LOWER ONE EIGHTH BLOCK}"
_NO_UTF8: Final = (*range(0xC0, 0xC2), *range(0xF5, 0x100))
"""Bytes that no text in UTF-8 holds. A token whose name is the letter that stands for one is that
letter, as DeepSeek Coder has them."""

Parts = dict[str, Any]


def whole_tokens(vocabulary: Vocabulary, metadata: Mapping[str, Any]) -> Iterator[Parts]:
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


def around(
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
    return template(vocabulary, *around)


def template(
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


def character_decoder(marks_blanks: bool, first_blank: bool) -> Parts:
    decoders: list[Parts] = [replace(BLANK, " ")] if marks_blanks else []
    decoders += [{"type": "ByteFallback"}, {"type": "Fuse"}]
    if first_blank:
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {"type": "Sequence", "decoders": decoders}


def letters_as_they_are(vocabulary: Vocabulary) -> Iterator[Parts]:
    for letter in map(chr, _NO_UTF8):
        token_id = vocabulary.ids.get(letter)
        if token_id is not None and vocabulary.kinds[token_id] in WHOLE:
            yield replace(letter, "".join(map(_spelled, letter.encode())))


def _spelled(byte: int) -> str:
    """GPT-2's letter for a byte of a letter between U+00C0 and U+00FF."""
    return chr(byte) if byte > 0xA0 else chr(byte + 0xA2)


def sequence(name: str, parts: list[Parts]) -> Parts | None:
    if len(parts) < 2:
        return parts[0] if parts else None
    return {"type": "Sequence", name: parts}


def replace(what: str, by: str) -> Parts:
    return {"type": "Replace", "pattern": {"String": what}, "content": by}
