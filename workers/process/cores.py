"""How the instances of one server share the cores: those that compute take equal parts.

    cores.lock  | ... | process 4711 | process 4712 | ...  a byte each, locked while it computes

Owns this instance's byte. A lock ends with its process, however that ends, so nobody is counted who
is gone.
"""

import fcntl
import os
import struct
from pathlib import Path
from typing import Final

_FLOCK: Final = struct.Struct("hhqqi4x")  # struct flock of Linux: type, whence, start, length, pid
_F_OFD_GETLK: Final = 36
_F_OFD_SETLK: Final = 37


class SharedCores:
    """One instance's view. One thread calls it."""

    def __init__(self, path: Path, number: int, num_cores: int | None = None) -> None:
        """`number`, a process id, tells the instances that share `path` apart. `num_cores` None
        counts those that this process may run on. Raises OSError."""
        self._number = number
        self._num_cores = num_cores or len(os.sched_getaffinity(0))
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self._computes = False

    @property
    def num_cores(self) -> int:
        """All of them."""
        return self._num_cores

    def begin(self) -> None:
        """From now on this instance computes. Idempotent."""
        if not self._computes:
            self._control(_F_OFD_SETLK, fcntl.F_WRLCK, self._number, 1)
            self._computes = True

    def end(self) -> None:
        """It is idle. Idempotent."""
        if self._computes:
            self._control(_F_OFD_SETLK, fcntl.F_UNLCK, self._number, 1)
            self._computes = False

    def fair_part(self) -> int:
        """Threads that this instance may run now: its part of the cores, one at least."""
        others, start = 0, 0
        while others + 1 < self._num_cores:
            kind, _, found, _, _ = self._control(_F_OFD_GETLK, fcntl.F_WRLCK, start, 0)
            if kind == fcntl.F_UNLCK:
                break
            others, start = others + 1, found + 1
        return max(1, self._num_cores // (others + 1))

    def close(self) -> None:
        """The lock ends with the file."""
        os.close(self._file)

    def _control(
        self, command: int, kind: int, start: int, length: int
    ) -> tuple[int, int, int, int, int]:
        """fcntl(2) with a lock of [start, start + length), or all from `start` on."""
        asked = _FLOCK.pack(kind, os.SEEK_SET, start, length, 0)
        kind, whence, start, length, pid = _FLOCK.unpack(fcntl.fcntl(self._file, command, asked))
        return kind, whence, start, length, pid
