"""What was written already, as a file beside it: a digest for each unit.

Owns its bytes: a JSON line that says what is being made of what, padded to a block, then 16 bytes a
unit, of which 0 mean: not yet. Invariants: who holds it holds its lock, so one process writes an
output; a digest is written after the bytes that it is of. Neither has to reach the disk in that
order: a unit counts as done only where its bytes, read again, have its digest.
"""

import fcntl
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Self

import msgspec

from workers.errors import CheckpointChanged, OutputExists

DIGEST_BYTES: Final = 16
_BLOCK: Final = 4096
_NONE: Final = bytes(DIGEST_BYTES)


class Journal:
    """Open and locked."""

    def __init__(self, path: Path, descriptor: int, said: Mapping[str, Any], begin: int):
        self.path = path
        self.said = said
        """What it was begun with."""
        self._descriptor = descriptor
        self._begin = begin

    @classmethod
    def opened(cls, path: Path) -> Self | None:
        """The one that is there; None where there is none, or it was never begun. Raises
        OutputExists where another process has it."""
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        _lock(path, descriptor)
        head = os.pread(descriptor, _BLOCK, 0)
        while b"\n" not in head and len(head) % _BLOCK == 0 and head:
            more = os.pread(descriptor, _BLOCK, len(head))
            if not more:
                break
            head += more
        line, newline, _ = head.partition(b"\n")
        try:
            said = msgspec.json.decode(line, type=dict[str, Any])
        except msgspec.DecodeError:
            newline = b""
        if not newline:
            os.close(descriptor)
            return None
        return cls(path, descriptor, said, _padded(len(line) + 1))

    @classmethod
    def begun(cls, path: Path, said: Mapping[str, Any], num_units: int) -> Self:
        """A new one. Raises OutputExists, OSError."""
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        _lock(path, descriptor)
        os.ftruncate(descriptor, 0)
        line = msgspec.json.encode(said) + b"\n"
        begin = _padded(len(line))
        os.ftruncate(descriptor, begin + num_units * DIGEST_BYTES)
        os.pwrite(descriptor, line, 0)
        os.fsync(descriptor)
        return cls(path, descriptor, said, begin)

    def check(self, said: Mapping[str, Any]) -> None:
        """Raises CheckpointChanged where it was begun with anything else."""
        different = [name for name in said if said[name] != self.said.get(name)]
        if different:
            raise CheckpointChanged(
                f"{self.path.parent} holds what another run has begun, and {_told(different)} "
                "since: remove it to begin anew"
            )

    def digest(self, unit: int) -> bytes | None:
        """None where it is not done."""
        found = os.pread(self._descriptor, DIGEST_BYTES, self._begin + unit * DIGEST_BYTES)
        return found if len(found) == DIGEST_BYTES and found != _NONE else None

    def done(self, unit: int, digest: bytes) -> None:
        """Its bytes are written. From any thread."""
        os.pwrite(self._descriptor, digest, self._begin + unit * DIGEST_BYTES)

    def close(self) -> None:
        os.close(self._descriptor)


def _told(different: list[str]) -> str:
    """What has changed, as a person calls it."""
    names = {"source": "the source has changed", "options": "the options have changed"}
    return ", ".join(names.get(one, f"{one} has changed") for one in different)


def _lock(path: Path, descriptor: int) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(descriptor)
        raise OutputExists(f"another process is writing {path.parent}: wait for it") from error


def _padded(num_bytes: int) -> int:
    return -(-num_bytes // _BLOCK) * _BLOCK
