"""The names of the files that make up one GGUF model: one, or the parts that it was split into.

Invariant: names alone decide, nothing is opened but to look for the four letters at a file's
beginning. Does not know what the files hold.
"""

import os
import re
from pathlib import Path
from typing import Final

from workers.config.model_file import opened

MAX_PARTS: Final = 999
_PART: Final = re.compile(r"(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})(?P<suffix>\.gguf)?")


def part_number(path: Path) -> int | None:
    """Which part of a split model is called so, from 1 on; None for no part."""
    named = _named(path)
    return None if named is None else int(named["number"])


def parts_of(path: Path) -> list[Path]:
    """All files of the model whose first, or only, file is `path`, whether they are there or
    not."""
    named = _named(path)
    if named is None:
        return [path]
    return [
        path.with_name(f"{named['stem']}-{number:05d}-of-{named['count']}{named['suffix'] or ''}")
        for number in range(1, int(named["count"]) + 1)
    ]


def model_name(path: Path) -> str:
    """What to call the model that this file, or the first of its parts, holds."""
    named = _named(path)
    return path.stem if named is None else str(named["stem"])


def begins_like_gguf(path: Path) -> bool:
    """Whatever it is called: in a hub's cache, or Ollama's, a file has no suffix. Raises as
    `opened` does."""
    with opened(path) as descriptor:
        return os.pread(descriptor, 4, 0) == b"GGUF"


def _named(path: Path) -> re.Match[str] | None:
    named = _PART.fullmatch(path.name)
    if named is None or not 1 <= int(named["number"]) <= int(named["count"]) <= MAX_PARTS:
        return None
    return named
