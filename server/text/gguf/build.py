"""A GGUF file's tokenizer, written as the files that a Hugging Face folder has.

Owns what is in such a folder, and the process that writes it (`python -m server.text.gguf.build
SOURCE OUT [PRE_TOKENIZER]`). Invariant: whatever a file says, that process takes no more than
`BUILD_BYTES`; it ends with a line that says what is wrong with the file. Does not know where
folders are kept.
"""

import errno
import gc
import os
import re
import resource
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import msgspec

from server.errors import ServerError
from server.text.gguf.endings import ending_ids
from server.text.gguf.metadata import read_metadata
from server.text.gguf.pipeline import CUT_BY_NAME, PRE, tokenizer_json
from server.text.gguf.splits import UnknownSplit
from server.text.gguf.vocabulary import BadVocabulary, vocabulary
from workers import CheckpointError

FORMAT_VERSION: Final = 3
"""Raised when `build` writes something else for the same file, so that old folders are not used."""
SPECIAL_IDS_FILE: Final = "special_ids.json"
"""Beside the usual files: what a GGUF file says that these have no place for."""
NO_ROOM_STATUS: Final = 3
BUILD_BYTES: Final = 2 << 30
"""262,144 tokens and 514,000 merges take 0.4 GiB."""
_NO_ROOM: Final = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES)
_NAMED: Final = {
    "bos": "bos",
    "eos": "eos",
    "unk": "unknown",
    "sep": "seperator",  # as GGUF spells it
    "pad": "padding",
    "mask": "mask",
    "cls": "cls",
}
"""What a template calls a token, and what a GGUF file does."""
_TEMPLATE: Final = "tokenizer.chat_template"
_TEMPLATE_NAME: Final = re.compile(r"\.[A-Za-z0-9_][A-Za-z0-9_-]{0,63}")
_UNSPLIT: Final = (
    "does not say how text is cut into words (tokenizer.ggml.pre), as files before May 2024 did "
    "not: it is cut as llama.cpp does it then, which is wrong for most models. Download a newer "
    "file."
)


def build(source: Path, out: Path, pre_tokenizer: str | None = None) -> None:
    """Writes tokenizer.json, tokenizer_config.json, chat templates (where the file has some) and
    `SPECIAL_IDS_FILE` for a GGUF file into `out`; `pre_tokenizer` goes before what it says of how
    text is cut into words. Raises ServerError, CheckpointError."""
    metadata = read_metadata(source)
    if pre_tokenizer is not None:
        metadata[PRE] = _instead(source, metadata, pre_tokenizer)
    words = vocabulary(metadata)
    tokenizer = tokenizer_json(metadata, words)
    if metadata.get("tokenizer.ggml.model") == "gpt2" and PRE not in metadata:
        sys.stderr.write(f"{source.name} {_UNSPLIT}\n")
    named = {
        f"{name}_token": words.tokens[token_id]
        for name, role in _NAMED.items()
        if (token_id := words.token_id(role)) is not None
    }
    special = {"format": FORMAT_VERSION, "end_token_ids": ending_ids(words)}
    _write(out / "tokenizer_config.json", msgspec.json.encode(named))
    _write(out / SPECIAL_IDS_FILE, msgspec.json.encode(special))
    for name, template in chat_templates(metadata).items():
        others = out / "additional_chat_templates"
        file = others / f"{name}.jinja" if name else out / "chat_template.jinja"
        file.parent.mkdir(exist_ok=True)
        _write(file, template.encode())
    _write(out / "tokenizer.json", msgspec.json.encode(tokenizer))


def _instead(source: Path, metadata: Mapping[str, Any], pre_tokenizer: str) -> str:
    """Raises UnknownSplit where it would not be used."""
    if (kind := metadata.get("tokenizer.ggml.model")) not in CUT_BY_NAME:
        raise UnknownSplit(
            f"its tokenizer is of the kind {str(kind)[:80]!r}, whose text is not cut into words by "
            "a name: omit --pre-tokenizer"
        )
    if (said := metadata.get(PRE, pre_tokenizer)) != pre_tokenizer:
        sys.stderr.write(
            f"{source.name} says that its text is cut into words as {str(said)[:80]!r} does it; "
            f"as --pre-tokenizer asks for, it is cut as {pre_tokenizer!r} does it.\n"
        )
    return pre_tokenizer


def chat_templates(metadata: Mapping[str, Any]) -> dict[str, str]:
    """By name, those of `tokenizer.chat_template.NAME`; that of all chats has none. Raises
    BadVocabulary where a name can be none of a file."""
    found = {}
    for key, template in metadata.items():
        begin, _, name = key.partition(_TEMPLATE)
        if begin or not isinstance(template, str) or not template:
            continue
        if name and not _TEMPLATE_NAME.fullmatch(name):
            raise BadVocabulary(f"it calls a chat template {name[:80]!r}, which is no name")
        found[name.removeprefix(".")] = template
    return found


def _write(file: Path, content: bytes) -> None:
    # A rename may reach the disk before the data does: a folder with its final name is complete.
    with file.open("wb") as opened:
        opened.write(content)
        opened.flush()
        os.fsync(opened.fileno())


def _main() -> int:
    _, most = resource.getrlimit(resource.RLIMIT_DATA)
    bound = BUILD_BYTES if most == resource.RLIM_INFINITY else min(BUILD_BYTES, most)
    resource.setrlimit(resource.RLIMIT_DATA, (bound, most))
    gc.disable()  # a million strings are made, and looking through them takes as long again
    try:
        build(Path(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:])
    except (ServerError, CheckpointError) as error:
        sys.stderr.write(" ".join(str(error).split()) + "\n")
        return 1
    except OSError as error:
        if error.errno not in _NO_ROOM:
            raise
        sys.stderr.write(f"{error.strerror}\n")
        return NO_ROOM_STATUS
    return 0


if __name__ == "__main__":
    status = _main()
    sys.stderr.flush()
    os._exit(status)  # all is written; to free a million strings takes as long as to make them
