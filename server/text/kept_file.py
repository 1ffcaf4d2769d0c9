"""A file's content as it was when it was served, for us and for our instances.

Owns a file in memory. Invariant: who opens `path` reads what was read here, whatever has become of
the file that it came from. Knows nothing of what it holds.
"""

import fcntl
import os
from pathlib import Path
from typing import Final, Self

from workers import MAX_TOKENIZER_BYTES, read_file

_SEALS: Final = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SEAL


class KeptFile:
    """Can be opened by this user's processes as long as it is not closed."""

    def __init__(self, descriptor: int):
        self._descriptor = descriptor
        self._closed = False

    @classmethod
    def of(cls, file: Path, max_bytes: int = MAX_TOKENIZER_BYTES) -> Self:
        """Raises CheckpointError."""
        return cls.holding(read_file(file, max_bytes), file.name)

    @classmethod
    def holding(cls, content: bytes, name: str) -> Self:
        """What was read, and perhaps completed."""
        left = memoryview(content)
        descriptor = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        while left:
            left = left[os.write(descriptor, left) :]
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, _SEALS)
        return cls(descriptor)

    @property
    def path(self) -> Path:
        """Names the content for any process of this user."""
        return Path(f"/proc/{os.getpid()}/fd/{self._descriptor}")

    def close(self) -> None:
        """The content goes with its last reader. Idempotent."""
        if not self._closed:
            self._closed = True
            os.close(self._descriptor)
