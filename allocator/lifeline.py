"""The lifeline: a Unix socket that says who a client is, and whether it still lives.

Owns both ends. Invariants: a session lives as long as its lifeline is open; the kernel closes it
when the client's process ends, however it ends; whoever comes is heard or told why not, also when
descriptors have run out. Also carries what ZeroMQ can't: file descriptors, and that answers are
lost.
"""

import contextlib
import errno
import os
import socket
import struct
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import msgspec

from allocator.errors import (
    BY_CODE,
    AllocatorBusy,
    AllocatorError,
    AllocatorGone,
    AllocatorSilent,
    InvalidMessage,
    Unanswered,
    Unauthorized,
    WaitTimeout,
)
from allocator.messages import (
    PROTOCOL_VERSION,
    AskAgain,
    Descriptor,
    Hello,
    Refused,
    Welcome,
    decode_hello,
    decode_lifeline,
    encode,
)

_UCRED: Final = struct.Struct("iII")  # struct ucred: pid, uid, gid (unix(7))
_TIMEVAL: Final = struct.Struct("ll")  # struct timeval: seconds, microseconds
_BACKLOG: Final = 128
_FRAME_BYTES: Final = 8192
MAX_DESCRIPTORS: Final = 250
"""The kernel takes 253 a message (SCM_MAX_FD)."""
_OUT_OF_DESCRIPTORS: Final = (errno.EMFILE, errno.ENFILE)
NO_DESCRIPTORS: Final = "the allocator has no descriptors for more clients: raise its `ulimit -n`"
_FIRST_PAUSE_S: Final = 0.02
_LONGEST_PAUSE_S: Final = 0.5


@dataclass(frozen=True, eq=False)
class Visitor:
    """A connection of our own user that has not said yet what it wants."""

    connection: socket.socket
    pid: int
    deadline: float

    def hello(self) -> Hello:
        """What it wants. Raises InvalidMessage; EOFError where it is gone."""
        try:
            frame = self.connection.recv(_FRAME_BYTES)
        except OSError as error:
            raise EOFError from error
        if not frame:
            raise EOFError
        try:
            hello = decode_hello(frame)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise InvalidMessage(f"not a Hello: {error}") from error
        if hello.version != PROTOCOL_VERSION:
            raise InvalidMessage(
                f"the allocator speaks protocol {PROTOCOL_VERSION}, this client {hello.version}: "
                "restart the older of the two"
            )
        return hello

    @property
    def is_silent(self) -> bool:
        """Whether there is nothing to be heard from it yet, not even its end."""
        return _heard(self.connection) is None

    def refuse(self, error: AllocatorError) -> None:
        """Say why, and hang up."""
        refuse(self.connection, error)


def _heard(connection: socket.socket) -> bytes | None:
    """The first byte that waits to be taken, and stays; none of an end, None where nothing came."""
    try:
        return connection.recv(1, socket.MSG_PEEK)
    except BlockingIOError:
        return None
    except OSError:
        return b""


def refuse(connection: socket.socket, error: AllocatorError) -> None:
    """Say why, and hang up: it is refused whether or not it hears it."""
    with contextlib.suppress(OSError):
        connection.send(encode(Refused(code=error.code, message=str(error)[:4000])))
    connection.close()


class NobodyThere(Exception):
    """Nobody is waiting to be accepted."""


class OutOfDescriptors(Exception):
    """Somebody is waiting, and can't be accepted."""


class LifelineListener:
    """The daemon's end: accepts clients of our own user."""

    def __init__(self, path: Path):
        """Raises OSError where the name can't be had."""
        self._path = path
        self._socket = socket.socket(
            socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC
        )
        try:
            # Only the holder of the runtime directory's lock gets here, so an old name is a dead
            # one's.
            path.unlink(missing_ok=True)
            self._socket.bind(os.fspath(path))
            path.chmod(0o600)
            self._socket.listen(_BACKLOG)
            self._spare: int | None = os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)
        except BaseException:
            self._socket.close()
            raise

    def fileno(self) -> int:
        """Readable when a client connects."""
        return self._socket.fileno()

    def accept(self, patience_s: float) -> Visitor | None:
        """The next client, which has `patience_s` to say Hello; None where it was refused, or went
        away again. Raises NobodyThere, OutOfDescriptors."""
        try:
            connection, _ = self._socket.accept()
        except BlockingIOError as error:
            raise NobodyThere from error
        except OSError as error:
            if error.errno in _OUT_OF_DESCRIPTORS:
                raise OutOfDescriptors from error
            return None  # ECONNABORTED, and whatever else says that this one is gone
        connection.setblocking(False)
        pid, uid, _gid = _UCRED.unpack(
            connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
        )
        if uid not in (os.geteuid(), 0):
            message = f"user id {uid} may not use the allocator of user id {os.geteuid()}"
            refuse(connection, Unauthorized(message))
            return None
        return Visitor(connection, pid, time.monotonic() + patience_s)

    def turn_away(self) -> bool:
        """Out of descriptors, with the one that is kept for this the next client can at least be
        told so, where otherwise it would keep the listener readable for ever. False where even that
        one is gone: try again later."""
        if self._spare is not None:
            os.close(self._spare)
            self._spare = None
            with contextlib.suppress(OSError):
                connection, _ = self._socket.accept()
                connection.setblocking(False)
                refuse(connection, AllocatorBusy(NO_DESCRIPTORS))
        with contextlib.suppress(OSError):
            self._spare = os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)
        return self._spare is not None

    def close(self) -> None:
        """Stop listening and remove the name."""
        self._socket.close()
        if self._spare is not None:
            os.close(self._spare)
        with contextlib.suppress(OSError):
            self._path.unlink(missing_ok=True)


def tell_to_ask_again(connection: socket.socket) -> None:
    """Requests on their way are lost, and so may be answers. A client that has gone, or reads
    nothing, need not know."""
    with contextlib.suppress(OSError):
        connection.send(encode(AskAgain()), socket.MSG_DONTWAIT)


def send_descriptors(
    connection: socket.socket, request_id: bytes, descriptors: Sequence[int]
) -> None:
    """At most MAX_DESCRIPTORS, before the reply to that request. Raises OSError where the client
    does not read."""
    frame = encode(Descriptor(request_id=request_id))
    socket.send_fds(connection, [frame], list(descriptors), socket.MSG_DONTWAIT)


@dataclass
class Lifeline:
    """The client's end."""

    welcome: Welcome
    connection: socket.socket = field(repr=False)
    _inbox: list[tuple[bytes, list[int]]] = field(default_factory=list, repr=False)
    """Descriptors that have come, by the request that they belong to."""
    _is_lossy: bool = False

    @classmethod
    def connect(cls, path: Path, timeout_s: float, hello: Hello) -> "Lifeline":
        """Open a session. Raises AllocatorGone where nobody listens, AllocatorBusy where it has no
        place for this client within `timeout_s`, or what the daemon refused with."""
        deadline, pause_s = time.monotonic() + timeout_s, _FIRST_PAUSE_S
        while True:
            left_s = max(0.0, deadline - time.monotonic())
            try:
                return cls._connect_once(path, left_s, hello)
            except AllocatorBusy:
                if left_s <= pause_s:
                    raise
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)

    @classmethod
    def _connect_once(cls, path: Path, timeout_s: float, hello: Hello) -> "Lifeline":
        try:
            connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
        except OSError as error:
            raise AllocatorGone(cant_connect(error.strerror)) from error
        # The kernel waits for room in a busy daemon's queue only where the socket blocks: one with
        # a timeout of Python's would be told EAGAIN at once.
        connection.setsockopt(
            socket.SOL_SOCKET, socket.SO_SNDTIMEO, _TIMEVAL.pack(*_seconds_and_micros(timeout_s))
        )
        try:
            connection.connect(os.fspath(path))
            connection.settimeout(timeout_s)
            answer = decode_lifeline(_ask(connection, encode(hello)))
        except (TimeoutError, BlockingIOError) as error:
            connection.close()
            raise AllocatorSilent(
                f"the allocator in {path.parent} does not answer within {timeout_s:.0f} s: if it "
                "was stopped, go on with it (`kill -CONT`); else end it, and start another"
            ) from error
        except (OSError, msgspec.DecodeError) as error:
            connection.close()
            raise AllocatorGone(
                f"no allocator answers in {path.parent}: start one with `onecopy allocator "
                f"--runtime-dir {path.parent}`"
            ) from error
        if isinstance(answer, Refused):
            connection.close()
            raise BY_CODE.get(answer.code, AllocatorError)(answer.message)
        if not isinstance(answer, Welcome) or answer.version != PROTOCOL_VERSION:
            connection.close()
            raise AllocatorGone(
                f"the allocator in {path.parent} speaks another protocol than this client, "
                f"{PROTOCOL_VERSION}: restart the older of the two"
            )
        connection.setblocking(False)
        return cls(answer, connection)

    def descriptors(self, request_id: bytes, count: int, timeout_s: float) -> list[int]:
        """The descriptors that come with the reply to this request, the caller's to close. Those of
        requests that were given up are closed. Raises AllocatorGone, Unanswered, WaitTimeout."""
        found: list[int] = []
        self.connection.settimeout(timeout_s)
        try:
            while True:
                for belongs_to, received in self._inbox:
                    if belongs_to == request_id:
                        found += received
                    else:
                        close_all(received)
                self._inbox.clear()
                if len(found) >= count:
                    return found
                self._check_loss()
                self._take()
        except BaseException as error:
            close_all(found)
            if isinstance(error, TimeoutError):
                raise WaitTimeout(f"no descriptor came within {timeout_s:.0f} s") from error
            if isinstance(error, OSError | EOFError | msgspec.DecodeError):
                text = "the allocator ended before it sent its descriptors"
                raise AllocatorGone(text) from error
            raise
        finally:
            self.connection.setblocking(False)

    def is_open(self) -> bool:
        """Whether the daemon still lives."""
        return _heard(self.connection) != b""

    def is_quiet(self) -> bool:
        """Whether the daemon lives and has said nothing that nobody has taken: one look, as before
        each request."""
        return not self._is_lossy and not self._inbox and _heard(self.connection) is None

    def take_loss(self, *, between_requests: bool = False) -> bool:
        """Whether the daemon has lost requests or answers since this was last asked. Descriptors
        that come before are kept for `descriptors`; `between_requests` nobody waits for any."""
        with contextlib.suppress(OSError, EOFError, msgspec.DecodeError):
            while True:
                self._take()
        if between_requests:
            for _, received in self._inbox:
                close_all(received)
            self._inbox.clear()
        lossy, self._is_lossy = self._is_lossy, False
        return lossy

    def close(self) -> None:
        """End the session."""
        self.connection.close()
        for _, received in self._inbox:
            close_all(received)
        self._inbox.clear()

    def _check_loss(self) -> None:
        if self._is_lossy:
            raise Unanswered("the allocator has lost its answer: ask again")

    def _take(self) -> None:
        """The next message. Raises EOFError at the daemon's end, OSError, DecodeError."""
        frame, received, _, _ = socket.recv_fds(self.connection, _FRAME_BYTES, MAX_DESCRIPTORS)
        if not frame:
            raise EOFError
        message = decode_lifeline(frame)
        if isinstance(message, Descriptor):
            self._inbox.append((message.request_id, received))
            return
        close_all(received)
        self._is_lossy = self._is_lossy or isinstance(message, AskAgain)


def cant_connect(reason: str | None) -> str:
    """That it is this process that lacks something."""
    return (
        f"this process can't connect to the allocator: {reason}. Raise what it "
        "may open with `ulimit -n`"
    )


def close_all(descriptors: Sequence[int]) -> None:
    """Close each."""
    for descriptor in descriptors:
        os.close(descriptor)


def _ask(connection: socket.socket, hello: bytes) -> bytes:
    """The answer. A daemon that refuses us at once may have hung up before our Hello was sent, or
    read: what it said is there all the same. Raises OSError."""
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        connection.send(hello)
    try:
        return connection.recv(_FRAME_BYTES)
    except ConnectionResetError:  # reported once, and before what was said
        return connection.recv(_FRAME_BYTES)


def _seconds_and_micros(timeout_s: float) -> tuple[int, int]:
    """At least a microsecond, since 0 would mean forever."""
    return divmod(max(1, int(timeout_s * 1_000_000)), 1_000_000)
