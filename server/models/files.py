"""What lies at a model's path, as far as it decides what would be served: has it changed?

Owns the comparison of before and now. Invariant: nothing is read but what stat(2) says; a file
system that does not answer holds nobody up. Does not know what the files hold.
"""

import asyncio
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

from workers import part_number, parts_of

_PATTERNS: Final = (
    "*.json",
    "*.safetensors",
    "*.jinja",
    "*.gguf",
    "*.model",
    "*/config.json",
    "additional_chat_templates/*.jinja",
)
_MAX_FILES: Final = 2000
_PATIENCE_S: Final = 1.0


@dataclass(frozen=True)
class ModelFiles:
    """The files of a folder, or the one file, as they were when they were looked at."""

    path: Path
    identities: dict[str, str]
    given: Path | None = None
    """What a person called it, if that was a path: links in it may come to lead elsewhere."""
    chat_template: Path | None = None
    """A file that is used in place of the model's own."""

    @classmethod
    def at(cls, path: Path, given: Path | None = None, chat_template: Path | None = None) -> Self:
        """As they are now; none where nothing can be seen."""
        return cls(path, _all(path, chat_template), given, chat_template)

    def changes(self) -> list[str]:
        """What is not as it was, a line for each file."""
        if self.given is not None and self.given.exists() and resolved(self.given) != self.path:
            return [f"{self.given} leads to {resolved(self.given)} now"]
        if not dict(_identities(self.path)):
            return [f"{self.path} is gone"]
        now = _all(self.path, self.chat_template)
        told = []
        for name in sorted(self.identities.keys() | now.keys()):
            if name not in now:
                told.append(f"{name} is gone")
            elif name not in self.identities:
                told.append(f"{name} is new")
            elif now[name] != self.identities[name]:
                told.append(f"{name} was written or replaced")
        return told


class ModelWatch:
    """Looks again whenever it is asked, in a thread of its own: one at a time."""

    def __init__(self, files: ModelFiles):
        self.files = files
        self._looking: asyncio.Task[list[str]] | None = None

    async def changes(self) -> list[str]:
        """As `ModelFiles.changes`; within a second."""
        looking = self._looking
        if looking is None or looking.done():
            self._looking = looking = asyncio.create_task(asyncio.to_thread(self.files.changes))
        done, _ = await asyncio.wait([looking], timeout=_PATIENCE_S)
        if not done:
            return [f"the file system of {self.files.path} does not answer"]
        return looking.result()


def resolved(given: Path) -> Path:
    """The folder or the file there, without links. The first part of a split model keeps its name:
    by it the others are found, which lie beside it. Raises OSError, RuntimeError."""
    if part_number(given) is not None and not given.is_dir():
        given.resolve(strict=True)
        return given.parent.resolve(strict=True) / given.name
    return given.resolve(strict=True)


def _all(path: Path, chat_template: Path | None) -> dict[str, str]:
    beside = {} if chat_template is None else dict(_identities(chat_template))
    return dict(_identities(path)) | {f"{chat_template}": one for one in beside.values()}


def _identities(path: Path) -> Iterator[tuple[str, str]]:
    try:
        files = _files(path)
    except OSError:
        return
    for file in files:
        shown = file.relative_to(path) if path in file.parents else file.name
        name = os.fsencode(shown).decode(errors="backslashreplace")
        try:
            status = file.stat()
        except OSError as error:  # a link into nowhere, perhaps
            yield name, os.strerror(error.errno or 0)
        else:
            yield name, f"{status.st_dev}:{status.st_ino}:{status.st_size}:{status.st_mtime_ns}"


def _files(path: Path) -> list[Path]:
    if not path.is_dir():
        return [file for file in parts_of(path) if os.path.lexists(file)]
    found = {file for pattern in _PATTERNS for file in path.glob(pattern)}
    return sorted(found)[:_MAX_FILES]
