"""Where a model's chat templates are kept.

Owns the places. Invariant: what is found is text, by the name that the model gives it. Does not
know what templates mean.
"""

import os
from pathlib import Path
from typing import Any, Final

from server.text.chat_template import DEFAULT
from server.text.tokenizer_files import TokenizerMissing
from workers import CheckpointError, read_file

_MAX_BYTES: Final = 4 << 20


def read_template(file: Path) -> str:
    """Raises `TokenizerMissing` where it can't be read."""
    try:
        return read_file(file, _MAX_BYTES).decode()
    except CheckpointError as error:
        raise TokenizerMissing(str(error)) from error
    except UnicodeDecodeError as error:
        raise TokenizerMissing(f"{file} is not text in UTF-8: {error}. Copy it anew.") from error


def template_sources(folder: Path, kept: Any) -> dict[str, str]:
    """The chat templates by name: those in files of their own, else `kept`, which an older file
    holds: one, or several. Raises `TokenizerMissing`."""
    file = folder / "chat_template.jinja"
    others = sorted((folder / "additional_chat_templates").glob("*.jinja"))
    if os.path.lexists(file) or others:
        beside = {other.stem: read_template(other) for other in others}
        return beside | ({DEFAULT: read_template(file)} if os.path.lexists(file) else {})
    if isinstance(kept, list):  # several, by name
        entries = [one for one in kept if isinstance(one, dict)]
        named = [(one.get("name"), one.get("template")) for one in entries]
    else:
        named = list(kept.items()) if isinstance(kept, dict) else [(DEFAULT, kept)]
    return {name: text for name, text in named if isinstance(name, str) and isinstance(text, str)}
