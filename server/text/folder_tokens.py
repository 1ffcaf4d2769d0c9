"""The tokens that files beside tokenizer.json name: special ones by their roles, and added ones.

Owns where they are written: tokenizer_config.json, before it special_tokens_map.json and
added_tokens.json. Invariant: a token
that is added gets the id that its file gives it, or the model is refused, since every id behind it
would be another's. As transformers reads a folder. Does not know how text is encoded.
"""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import msgspec
from tokenizers import Tokenizer

from server.text.tokenizer_classes import defaults_of, made_as_its_class, tokenizer_class
from server.text.tokenizer_files import TokenizerMissing
from workers import CheckpointError, read_json

ROLES: Final = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)
_BYTE_LEVEL: Final = "ByteLevel"
_MAX_ADDED: Final = 1 << 20


@dataclass(frozen=True, slots=True)
class _Token:
    content: str
    token_id: int | None = None
    special: bool = True
    normalized: bool = False
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False


class _Model(msgspec.Struct):
    vocab: dict[str, int] | list[tuple[str, float]]


def named_tokens(folder: Path, config: Mapping[str, Any], tokenizer: Tokenizer) -> dict[str, str]:
    """`bos_token` and the like, by what a template calls them: as `config`, tokenizer_config.json,
    has them, or else the tokenizer's class, if the tokenizer knows them. Raises TokenizerMissing.
    """
    said = _said(folder, config)
    kind = _class(folder, config, _BYTE_LEVEL in repr(tokenizer.pre_tokenizer))
    found = {name: text for name, value in said.items() if (text := _content(value)) is not None}
    for role, default in defaults_of(kind).items():
        if role not in said and tokenizer.token_to_id(default) is not None:
            found[role] = default
    return found


def completed(folder: Path, content: bytes) -> bytes:
    """A tokenizer.json with what the files beside it add, and as its class cuts text. Raises
    TokenizerMissing; what is no tokenizer.json is returned as it is, for who loads it to say so."""
    config = _json_object(folder / "tokenizer_config.json")
    wanted = list(_declared(folder, config))
    try:
        parts = msgspec.json.decode(content, type=dict[str, msgspec.Raw])
        cuts = bytes(parts.get("pre_tokenizer", b"")).decode()
        name = _class(folder, config, _BYTE_LEVEL in cuts)
        as_class = made_as_its_class(name, config, parts)
        content = msgspec.json.encode(parts | as_class) if as_class else content
        parts |= as_class
        present = msgspec.json.decode(parts.get("added_tokens", b"[]"), type=list[dict[str, Any]])
        known = {str(one["content"]) for one in present}
        missing = [token for token in wanted if token.content not in known]
        if not missing:
            return content
        model = msgspec.json.decode(parts["model"], type=_Model)
        next_id = max((int(one["id"]) + 1 for one in present), default=0)
    except (msgspec.DecodeError, KeyError, TypeError, ValueError, RecursionError):
        return content
    vocab = model.vocab
    if isinstance(vocab, list):
        vocab = {text: index for index, (text, _) in enumerate(vocab)}
    next_id = max(next_id, len(vocab))
    for token in _without_repeats(missing):
        token_id = vocab.get(token.content, next_id)
        if token.token_id not in (None, token_id):
            raise TokenizerMissing(
                f"{folder} gives the token {token.content!r} the id {token.token_id}, which by its "
                f"tokenizer.json is {token_id}: copy the files that belong together"
            )
        next_id = max(next_id, token_id + 1)
        present.append(
            {
                "id": token_id,
                "content": token.content,
                "single_word": token.single_word,
                "lstrip": token.lstrip,
                "rstrip": token.rstrip,
                "normalized": token.normalized,
                "special": token.special,
            }
        )
    present.sort(key=lambda one: int(one["id"]))
    parts["added_tokens"] = msgspec.Raw(msgspec.json.encode(present))
    return msgspec.json.encode(parts)


def _without_repeats(tokens: list[_Token]) -> list[_Token]:
    """The first of each: that with an id."""
    found: dict[str, _Token] = {}
    for token in tokens:
        found.setdefault(token.content, token)
    return list(found.values())


def _class(folder: Path, config: Mapping[str, Any], is_byte_level: bool) -> str | None:
    return tokenizer_class(_json_object(folder / "config.json"), config, is_byte_level)


def _said(folder: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """Roles, and names that a model has of its own; None where a file takes a default back."""
    sources = [config]
    if "added_tokens_decoder" not in config:  # else it has replaced the older files
        sources.append(_json_object(folder / "special_tokens_map.json"))
    said: dict[str, Any] = {}
    for source in sources:
        own = (name for name in source if name.endswith("_token") and name not in ROLES)
        said |= {name: source[name] for name in ROLES if name in source}
        said |= {name: source[name] for name in own if isinstance(source[name], str | dict)}
        if isinstance(extra := source.get("extra_special_tokens"), dict):
            said |= extra
    return said


def _declared(folder: Path, config: Mapping[str, Any]) -> Iterator[_Token]:
    """Added ones first, in the order of their ids; then special ones."""
    said = _said(folder, config)
    special = {text for value in said.values() if (text := _content(value)) is not None}
    decoder = config.get("added_tokens_decoder")
    if isinstance(decoder, dict):
        yield from _numbered(decoder, folder / "tokenizer_config.json")
    elif "added_tokens_decoder" not in config:
        added = _json_object(folder / "added_tokens.json")
        ids = {text: one for text, one in added.items() if isinstance(one, int)}
        for text, token_id in sorted(ids.items(), key=lambda item: item[1]):
            is_special = text in special
            yield _Token(text, token_id, is_special, normalized=not is_special)
    for value in said.values():
        if (text := _content(value)) is not None:
            yield _token(value)
    for name in ("extra_special_tokens", "additional_special_tokens"):
        listed = config.get(name)
        for value in listed if isinstance(listed, list) else ():
            if _content(value) is not None:
                yield _token(value)


def _numbered(decoder: Mapping[str, Any], file: Path) -> Iterator[_Token]:
    try:
        numbered = sorted(
            ((int(token_id), value) for token_id, value in decoder.items()), key=lambda one: one[0]
        )
    except (TypeError, ValueError) as error:
        raise TokenizerMissing(
            f"{file} numbers a token by what is no number: {error}. Copy it anew."
        ) from error
    if len(numbered) > _MAX_ADDED:
        raise TokenizerMissing(f"{file} adds {len(numbered):,} tokens")
    for token_id, value in numbered:
        if _content(value) is None:
            raise TokenizerMissing(f"{file} does not say what token {token_id} is. Copy it anew.")
        is_special = isinstance(value, dict) and value.get("special") is True
        yield _token(value, token_id, special=is_special)


def _token(value: object, token_id: int | None = None, special: bool = True) -> _Token:
    flags = value if isinstance(value, dict) else {}
    return _Token(
        content=_content(value) or "",
        token_id=token_id,
        special=special,
        normalized=flags.get("normalized", not special) is True,
        lstrip=flags.get("lstrip") is True,
        rstrip=flags.get("rstrip") is True,
        single_word=flags.get("single_word") is True,
    )


def _content(value: object) -> str | None:
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) and value else None


def _json_object(file: Path) -> dict[str, Any]:
    """Empty if there is no such file. Raises `TokenizerMissing` if it is no JSON object."""
    if not os.path.lexists(file):
        return {}
    try:
        return read_json(file)
    except CheckpointError as error:
        raise TokenizerMissing(str(error)) from error
