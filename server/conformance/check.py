"""A model's tokens, prompts and answers beside those of another library: `onecopy check`.

Owns what is asked of both sides. Invariants: nothing of a server is needed or touched; ours is what
a server of this model would do, by the same code; what could not be compared is never counted as
the same. Never imports torch: what computes is a process of the workers', what is asked of a
reference a process of its own.
"""

import asyncio
import itertools
import json
import subprocess
import sys
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import msgspec
from pydantic import BaseModel

from allocator import module_command, module_environment
from server.conformance.differences import (
    Part,
    compared_ids,
    compared_prompts,
    expected_prompt,
    greedy_part,
)
from server.conformance.references import ask
from server.conformance.samples import CHATS, NUM_NEW, PROMPTS, TEXTS, SampleChat, whole_texts
from server.errors import ServerError
from server.models.source import ModelSource
from server.text.chat_template import Chat
from server.text.given import NOTHING_GIVEN, GivenText
from server.text.loaded_text import KeptTokenizer, LoadedText
from server.text.text import Text
from workers import ReferenceFailed, ReferenceMissing, ReferenceName
from workers.messages import (
    GENERATES_NOTHING_STATUS,
    GreedyRequest,
    decode_greedy_comparison,
)

_CONTEXT_TOKENS: Final = 1 << 20
_COMPOSES_NONE: Final = "what is near holds characters that llama.cpp does not compose"
_BY_ARCHITECTURE: Final = "builds tokenizers of GGUF files by architecture, not as they say"


class Conformance(BaseModel, frozen=True):
    """All that was compared."""

    model: str
    path: Path
    against: ReferenceName
    parts: list[Part]
    same: bool
    """Whether everything is that was to be compared, up to what is near."""


@dataclass(frozen=True)
class Checked:
    """What to compare, with what. `python` is the interpreter that has the reference."""

    source: ModelSource
    against: ReferenceName | None = None
    python: str = sys.executable
    given: GivenText = NOTHING_GIVEN
    """What goes before the model's own files."""
    dtype: str = "float32"
    computes: bool = True
    """Whether tokens are generated, for which all weights are read."""

    @property
    def is_file(self) -> bool:
        """A GGUF file."""
        return not self.source.path.is_dir()

    @property
    def reference(self) -> ReferenceName:
        """Where none is named the one that was made for such models."""
        return self.against or ("llama.cpp" if self.is_file else "transformers")


def check(checked: Checked, tell: Callable[[str], None] = lambda _what: None) -> Conformance:
    """Compares; `tell` hears what is being done. Raises ReferenceMissing, and what a server would
    say of the model at its start (ServerError, CheckpointError)."""
    if checked.reference == "llama.cpp" and not checked.is_file:
        raise ReferenceMissing(
            "llama.cpp reads GGUF files alone, and this is a folder: compare with --against "
            "transformers, or give the .gguf file"
        )
    tell("reading the tokenizer")
    loaded = LoadedText.of(KeptTokenizer.of(checked.source.path, checked.given))
    try:
        tell(f"asking {checked.reference} for tokens")
        parts = [tokens_part(checked, loaded.text)]
        tell("asking transformers for prompts")
        parts.append(chats_part(checked, loaded))
        if checked.computes:
            tell(f"generating, here and by {checked.reference}")
            parts.append(computed_part(checked, loaded.text))
    finally:
        loaded.close()
    return Conformance(
        model=checked.source.name,
        path=checked.source.path,
        against=checked.reference,
        parts=parts,
        same=all(part.holds for part in parts),
    )


# --- tokens


def tokens_part(checked: Checked, text: Text) -> Part:
    """The ids of all texts, by `text` and by the reference of what is checked."""
    texts = [*TEXTS, *whole_texts(text.special_ids)]
    variants: list[str] = []
    if checked.reference == "llama.cpp":
        composed = {one: unicodedata.normalize("NFC", one) for one in texts}
        variants = [one for one in texts if composed[one] != one]
        asked = [*texts, *(composed[one] for one in variants)]
        request: dict[str, Any] = {"model": str(checked.source.path)}
    else:
        asked = texts
        request = _for_transformers(checked, None if checked.is_file else checked.source.path)
    try:
        answer = ask(checked.reference, checked.python, {**request, "texts": asked})
    except ReferenceFailed as error:
        return Part(name="tokens", failed=str(error))
    num_near, found = 0, []
    for kind, special in (("plain", False), ("special", True)):
        ours, theirs = _encoded(text, asked, special), answer[kind]
        pairs = zip(ours[len(texts) :], theirs[len(texts) :], strict=True)
        near, differences = compared_ids(
            texts, ours[: len(texts)], theirs[: len(texts)], dict(zip(variants, pairs, strict=True))
        )
        num_near += near
        found += differences
    by_architecture = found and checked.is_file and checked.reference == "transformers"
    note = _BY_ARCHITECTURE if by_architecture else ""
    return Part(
        name="tokens",
        reference=answer["version"],
        num_compared=2 * len(texts),
        num_same=2 * len(texts) - num_near - len(found),
        num_near=num_near,
        note=_COMPOSES_NONE if num_near else note,
        differences=found,
    )


def _encoded(text: Text, texts: Sequence[str], special: bool) -> list[list[int]]:
    async def all_of_them() -> list[list[int]]:
        return [
            await text.encode(one, context_tokens=_CONTEXT_TOKENS, add_special_tokens=special)
            for one in texts
        ]

    return asyncio.run(all_of_them())


# --- chats


def chats_part(checked: Checked, loaded: LoadedText) -> Part:
    """The prompts of all chats. All libraries mean by a template what transformers makes of it; of
    a GGUF file it is asked what it makes of the file's own."""
    is_reference = checked.reference == "transformers"
    folder = loaded.tokenizer.folder() if checked.is_file else checked.source.path
    request = {
        **_for_transformers(checked, folder),
        "template": loaded.tokenizer.chat_template,
        "texts": [],
        "chats": [list(_forms(chat)) for chat in CHATS],
    }
    try:
        answer = ask("transformers", checked.python if is_reference else sys.executable, request)
    except ReferenceFailed as error:
        return Part(name="chats", failed=str(error))
    theirs = [
        expected_prompt(forms, chat.needed)
        for chat, forms in zip(CHATS, answer["chats"], strict=True)
    ]
    if not loaded.text.has_chat_template and all(one.prompt is None for one in theirs):
        return Part(name="chats", skipped="the model has no chat template")
    ours = [_rendered(loaded.text, chat) for chat in CHATS]
    found = compared_prompts([chat.name for chat in CHATS], ours, theirs)
    return Part(
        name="chats",
        reference=answer["version"],
        num_compared=len(CHATS),
        num_same=len(CHATS) - len(found),
        differences=found,
    )


def _for_transformers(checked: Checked, folder: Path | None) -> dict[str, Any]:
    return {
        "model": str(checked.source.path),
        "tokenizer": None if folder is None else str(folder),
        "is_built": checked.is_file,
        "template": None,
        "chats": [],
    }


def _rendered(text: Text, chat: SampleChat) -> str | None:
    asked = Chat(chat.messages, chat.tools, add_generation_prompt=chat.add_generation_prompt)
    try:
        return text.rendered(asked, context_tokens=_CONTEXT_TOKENS)
    except ServerError:
        return None


def _forms(chat: SampleChat) -> Iterator[Mapping[str, Any]]:
    """In which transformers, which passes on what it is given, may be asked for it."""
    for as_parts, as_text in itertools.product((False, True), repeat=2):
        yield {
            "conversation": [_formed(message, as_parts, as_text) for message in chat.messages],
            "tools": chat.tools,
            "add_generation_prompt": chat.add_generation_prompt,
        }


def _formed(message: Mapping[str, Any], as_parts: bool, as_text: bool) -> dict[str, Any]:
    formed = {**message}
    if as_parts:
        formed["content"] = [{"type": "text", "text": message["content"]}]
    if as_text and "tool_calls" in message:
        [call] = message["tool_calls"]
        arguments = json.dumps(call["function"]["arguments"], ensure_ascii=False)
        function = {**call["function"], "arguments": arguments}
        formed["tool_calls"] = [{**call, "function": function}]
    return formed


# --- greedy tokens


def computed_part(checked: Checked, text: Text) -> Part:
    """The greedy tokens behind all prompts."""
    prompts = _encoded(text, PROMPTS, special=True)
    request = GreedyRequest(
        model=str(checked.source.path),
        dtype=checked.dtype,
        prompts=tuple(map(tuple, prompts)),
        num_new=NUM_NEW,
        against=checked.reference,
        python=checked.python,
    )
    quiet = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "OMP_WAIT_POLICY": "PASSIVE"}
    ended = subprocess.run(  # noqa: S603 - our own interpreter and module
        module_command("workers.conformance.program"),
        input=msgspec.json.encode(request),
        capture_output=True,
        env=module_environment(**quiet),
        check=False,
    )
    words = ended.stderr.decode(errors="replace").strip().rpartition("\n")[2]
    if ended.returncode == GENERATES_NOTHING_STATUS:
        return Part(name="greedy", skipped=words)
    if ended.returncode != 0:
        return Part(name="greedy", failed=words or f"exit status {ended.returncode}")
    return greedy_part(PROMPTS, decode_greedy_comparison(ended.stdout))
