"""Peers that send more than they may, seen by what they make this process hold.

libzmq bounds a frame, and how many whole messages it keeps for a peer. It keeps the parts of a
message that does not end without any bound, and tells nobody. So the process's own memory is
watched, and where it grows beyond what is allowed the peers are sought whose bytes come faster than
they are read.

Owns the figures. Invariant: looking takes no descriptor, which may be what is lacking. Knows
nothing of what is sent, nor of what is done about it.
"""

import array
import contextlib
import ctypes
import fcntl
import os
import socket
import struct
import termios
import threading
from typing import Final

ALLOWED_BYTES: Final = 64 << 20
"""What may be held beyond what was held when all was in order."""
_PAGE_BYTES: Final = os.sysconf("SC_PAGE_SIZE")
_UCRED: Final = struct.Struct("iII")  # struct ucred: pid, uid, gid (unix(7))
_FLOOD_BYTES: Final = 4096
"""Unread on one connection; who sends and waits for answers has none for most of the time."""
_NUM_SAMPLES: Final = 24
_NUM_FIGURES: Final = 3
"""Whoever sends one long request and waits is seen with one or two such numbers."""
_BETWEEN_SAMPLES_S: Final = 0.001
_libc: Final = ctypes.CDLL(None)


class MemoryWatch:
    """The private memory of this process, against what it was when all was in order."""

    def __init__(self, allowed_bytes: int = ALLOWED_BYTES) -> None:
        """Raises OSError where /proc can't be read."""
        self._allowed_bytes = allowed_bytes
        self._statm = os.open("/proc/self/statm", os.O_RDONLY | os.O_CLOEXEC)
        self._usual_bytes = self.private_bytes()

    def private_bytes(self) -> int:
        """Resident, and shared with no file."""
        fields = os.pread(self._statm, 256, 0).split()
        return (int(fields[1]) - int(fields[2])) * _PAGE_BYTES

    @property
    def is_exceeded(self) -> bool:
        """Whether more is held than is allowed."""
        return self.private_bytes() > self._usual_bytes + self._allowed_bytes

    def is_exceeded_when_trimmed(self) -> bool:
        """The same, once what is free has been given back to the kernel."""
        trim_heap()
        return self.is_exceeded

    def settle(self) -> None:
        """Give free memory back to the kernel. What is left is in order."""
        trim_heap()
        self._usual_bytes = self.private_bytes()

    def close(self) -> None:
        """Idempotent."""
        if self._statm >= 0:
            os.close(self._statm)
        self._statm = -1


def trim_heap() -> None:
    """Free memory goes back to the kernel, that of other threads' arenas as well; glibc only."""
    with contextlib.suppress(AttributeError):
        _libc.malloc_trim(0)


def flooding_connections(path: str) -> dict[int, int]:
    """Descriptor → pid of the peer, of those connections of this process's Unix socket at `path` on
    which bytes come and are read all the while that this looks, some hundredths of a second. Nobody
    takes whole messages meanwhile, if the caller does: so what is read are parts of one. Where the
    reader is merely late, the number of unread bytes does not change."""
    samples: dict[int, list[int]] = {fd: [] for fd in _connections(path)}
    pause = threading.Event()
    for _ in range(_NUM_SAMPLES):
        for fd, unread in samples.items():
            with contextlib.suppress(OSError):
                unread.append(_unread_bytes(fd))
        pause.wait(_BETWEEN_SAMPLES_S)
    found: dict[int, int] = {}
    for fd, unread in samples.items():
        if len({num_bytes for num_bytes in unread if num_bytes > _FLOOD_BYTES}) > _NUM_FIGURES:
            pid = _peer(fd, path)
            found |= {fd: pid} if pid is not None else {}
    return found


def cut(descriptor: int, path: str) -> None:
    """End a connection of the socket at `path`, whoever owns its descriptor: who reads from it sees
    the end. Harmless where that is something else by now."""
    with contextlib.suppress(OSError):
        connection = socket.socket(fileno=descriptor)
        try:
            if connection.getsockname() == path:
                connection.shutdown(socket.SHUT_RDWR)
        finally:
            connection.detach()


def _connections(path: str) -> list[int]:
    try:
        names = os.listdir("/proc/self/fd")  # noqa: PTH208 - the names are numbers
    except OSError:  # no descriptor for it
        names = [str(number) for number in range(1 << 12)]
    return [int(name) for name in names if _peer(int(name), path) is not None]


def _peer(descriptor: int, path: str) -> int | None:
    """The pid at the other end; None for what is no connection of that socket."""
    try:
        connection = socket.socket(fileno=descriptor)
    except OSError:
        return None
    try:
        if connection.getsockname() != path:
            return None
        credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
        return int(_UCRED.unpack(credentials)[0])
    except OSError:
        return None
    finally:
        connection.detach()


def _unread_bytes(descriptor: int) -> int:
    count = array.array("i", [0])
    fcntl.ioctl(descriptor, termios.FIONREAD, count)
    return count[0]
