"""What an instance is doing at this moment, in memory that its server reads whatever becomes of it.

    | version | num_read | since | silent_since | num_bytes | names of the step's requests ... |

Owns the layout. One process writes, another reads; the memory outlives the writer, so that it also
tells what a process did when it ended. Invariant: what is read was written in one piece, or reads
as unknown. Times are CLOCK_MONOTONIC, which all processes of a machine share. Knows nothing of why
anybody asks.
"""

import mmap
import os
import struct
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import msgspec

_HEADER: Final = struct.Struct("<QQddQ")
_NUM_BYTES: Final = 1 << 16
_NUM_TRIES: Final = 5


@dataclass(frozen=True)
class Beat:
    """One look."""

    num_read: int
    """Messages that the instance has taken from its server so far."""
    since: float | None
    """When the present step began; None between steps."""
    silent_since: float | None
    """Since when the allocator has not answered this instance; None where it does."""
    names: frozenset[str] | None
    """The requests of the present step, or of the last one; None where that is not known."""


class Pulse:
    """The instance's side. Any thread may call it."""

    def __init__(self, descriptor: int) -> None:
        """Closes `descriptor`."""
        self._memory = mmap.mmap(descriptor, _NUM_BYTES)
        os.close(descriptor)
        self._lock = threading.Lock()
        self._version = self._num_read = 0
        self._since = self._silent_since = 0.0
        self.works_on(())

    def took(self, num_messages: int) -> None:
        """So many more messages were taken."""
        self._num_read += num_messages
        self._write()

    def begin(self, names: Sequence[str] | None = None) -> None:
        """A step begins now; `names`, if they are known yet, are its requests."""
        self._since = time.monotonic()
        if names is None:
            self._write()
        else:
            self.works_on(names)

    def works_on(self, names: Sequence[str]) -> None:
        """The step is about these requests."""
        encoded = msgspec.msgpack.encode(names)
        if _HEADER.size + len(encoded) > _NUM_BYTES:
            encoded = b""
        self._names = encoded
        self._write(with_names=True)

    def end(self) -> None:
        """The step is over. Its requests stay noted until the next."""
        self._since = 0.0
        self._write()

    def allocator_silent_since(self, since: float | None) -> None:
        """None: it answers."""
        if (since or 0.0) != self._silent_since:
            self._silent_since = since or 0.0
            self._write()

    def _write(self, *, with_names: bool = False) -> None:
        """Under an odd version nothing may be believed."""
        with self._lock:
            memory, size = self._memory, len(self._names)
            _HEADER.pack_into(memory, 0, self._version + 1, 0, 0.0, 0.0, 0)
            if with_names:
                memory[_HEADER.size : _HEADER.size + size] = self._names
            self._version += 2
            fields = self._num_read, self._since, self._silent_since, size
            _HEADER.pack_into(memory, 0, self._version + 1, *fields)
            struct.pack_into("<Q", memory, 0, self._version)


class PulseReader:
    """The server's side."""

    def __init__(self, name: str) -> None:
        """Memory that is nobody else's yet. Raises OSError."""
        self.descriptor = os.memfd_create(f"onecopy-pulse-{name}", os.MFD_CLOEXEC)
        """For the instance; closed by `handed_over`."""
        os.ftruncate(self.descriptor, _NUM_BYTES)
        self._memory = mmap.mmap(self.descriptor, _NUM_BYTES, prot=mmap.PROT_READ)

    def handed_over(self) -> None:
        """The instance has the descriptor, or never will. Idempotent."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1

    def look(self) -> Beat | None:
        """What is there now; None while it is being written, before anything was, and after the
        close."""
        if self._memory.closed:
            return None
        for _ in range(_NUM_TRIES):
            version, num_read, since, silent_since, size = _HEADER.unpack_from(self._memory)
            if not version or version % 2 or _HEADER.size + size > _NUM_BYTES:
                continue
            encoded = self._memory[_HEADER.size : _HEADER.size + size]
            if _HEADER.unpack_from(self._memory)[0] == version:
                return Beat(num_read, since or None, silent_since or None, _names(encoded))
        return None

    def close(self) -> None:
        """Nobody looks any more."""
        self.handed_over()
        self._memory.close()


def _names(encoded: bytes) -> frozenset[str] | None:
    try:
        return frozenset(msgspec.msgpack.decode(encoded, type=list[str])) if encoded else None
    except msgspec.DecodeError:
        return None
