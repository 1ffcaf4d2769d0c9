"""The lifeline: a Unix socket that says who a client is, and whether it still lives.

Owns both ends. Invariant: a session exists exactly as long as its lifeline is open; the kernel
closes it when the client's process ends, however it ends. Knows nothing of what a session holds.
"""

import contextlib
import os
import secrets
import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import msgspec

from allocator.errors import BY_CODE, AllocatorError, AllocatorGone, Unauthorized
from allocator.messages import (
    PROTOCOL_VERSION,
    TOKEN_BYTES,
    Refused,
    Welcome,
    decode_lifeline,
    encode,
)

_UCRED: Final = struct.Struct("iII")  # struct ucred: pid, uid, gid (unix(7))
_TIMEVAL: Final = struct.Struct("ll")  # struct timeval: seconds, microseconds
_BACKLOG: Final = 64
_WELCOME_BYTES: Final = 8192


@dataclass(frozen=True)
class Session:
    """One connected client. `token` goes with its requests; `number` never repeats."""

    number: int
    pid: int
    uid: int
    token: bytes = field(repr=False)
    lifeline: socket.socket = field(repr=False)


class LifelineListener:
    """The daemon's end: accepts clients of our own user."""

    def __init__(self, path: Path, requests: str):
        self._path = path
        self._requests = requests
        self._numbers = _count_from(1)
        self._socket = socket.socket(
            socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC
        )
        # Only the holder of the runtime directory's lock gets here, so an old name is a dead one's.
        path.unlink(missing_ok=True)
        self._socket.bind(os.fspath(path))
        path.chmod(0o600)
        self._socket.listen(_BACKLOG)

    def fileno(self) -> int:
        """Readable when a client connects."""
        return self._socket.fileno()

    def accept(self) -> Session | None:
        """The next client's session; None where it was refused or went away again."""
        try:
            connection, _ = self._socket.accept()
        except OSError:
            return None
        connection.setblocking(False)
        pid, uid, _gid = _UCRED.unpack(
            connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
        )
        if uid not in (os.geteuid(), 0):
            refusal = Refused(
                code=Unauthorized.code,
                message=f"user id {uid} may not use the allocator of user id {os.geteuid()}",
            )
            with contextlib.suppress(OSError):  # it is refused whether or not it hears why
                connection.send(encode(refusal))
            connection.close()
            return None
        session = Session(
            next(self._numbers), pid, uid, secrets.token_bytes(TOKEN_BYTES), connection
        )
        welcome = Welcome(
            version=PROTOCOL_VERSION, pid=os.getpid(), token=session.token, requests=self._requests
        )
        try:
            connection.send(encode(welcome))
        except OSError:
            connection.close()
            return None
        return session

    def close(self) -> None:
        """Stop listening and remove the name."""
        self._socket.close()
        self._path.unlink(missing_ok=True)


@dataclass(frozen=True)
class Lifeline:
    """The client's end."""

    welcome: Welcome
    connection: socket.socket = field(repr=False)

    @classmethod
    def connect(cls, path: Path, timeout_s: float) -> "Lifeline":
        """Open a session. Raises AllocatorGone where nobody listens, or what the daemon refused
        with."""
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
        # The kernel waits for room in a busy daemon's queue only where the socket blocks: one with
        # a timeout of Python's would be told EAGAIN at once.
        connection.setsockopt(
            socket.SOL_SOCKET, socket.SO_SNDTIMEO, _TIMEVAL.pack(*_seconds_and_micros(timeout_s))
        )
        try:
            connection.connect(os.fspath(path))
            connection.settimeout(timeout_s)
            frame = connection.recv(_WELCOME_BYTES)
            answer = decode_lifeline(frame)
        except (OSError, msgspec.DecodeError) as error:
            connection.close()
            raise AllocatorGone(
                f"no allocator answers in {path.parent}: start one with `onecopy allocator "
                f"--runtime-dir {path.parent}`"
            ) from error
        if isinstance(answer, Refused):
            connection.close()
            raise BY_CODE.get(answer.code, AllocatorError)(answer.message)
        if answer.version != PROTOCOL_VERSION:
            connection.close()
            raise AllocatorGone(
                f"the allocator in {path.parent} speaks protocol {answer.version}, this client "
                f"{PROTOCOL_VERSION}: restart the older of the two"
            )
        connection.setblocking(False)
        return cls(answer, connection)

    def is_open(self) -> bool:
        """Whether the daemon still lives. It never sends after the welcome, so anything readable is
        the end."""
        try:
            return bool(self.connection.recv(1, socket.MSG_PEEK))
        except BlockingIOError:
            return True
        except OSError:
            return False

    def close(self) -> None:
        """End the session."""
        self.connection.close()


def _seconds_and_micros(timeout_s: float) -> tuple[int, int]:
    """At least a microsecond, since 0 would mean forever."""
    return divmod(max(1, int(timeout_s * 1_000_000)), 1_000_000)


def _count_from(start: int) -> Iterator[int]:
    number = start
    while True:
        yield number
        number += 1
