"""A stream between two ranks of an instance: whole frames, within a deadline.

Owns a Unix socket of a pair. Invariants: a frame is told whole or not at all; nobody waits longer
than it said; an end of the other side is told apart from its silence. Does not know what is said.

    | length, 4 bytes | frame | length | frame | ...
"""

import select
import socket
import struct
import time
from typing import Final, Self

from workers.errors import RankEnded, RankError, RankTimedOut
from workers.process.rank_messages import MAX_FRAME_BYTES

_LENGTH: Final = struct.Struct("<I")


class Link:
    """One end. One thread uses it."""

    def __init__(self, end: socket.socket, rank: int, num_ranks: int) -> None:
        """To `rank`."""
        self._socket = end
        self.rank: Final = rank
        self._who = f"rank {rank} of {num_ranks}"

    @classmethod
    def pair(cls, rank: int, num_ranks: int) -> tuple[Self, Self]:
        """The first rank's end, and that of `rank`."""
        first, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        return cls(first, rank, num_ranks), cls(other, 0, num_ranks)

    def fileno(self) -> int:
        """Readable when something was said, or the other side has ended."""
        return self._socket.fileno()

    def send(self, frame: bytes, timeout_s: float) -> None:
        """Raises RankEnded, RankTimedOut."""
        if len(frame) > MAX_FRAME_BYTES:
            raise RankError(f"a message of {len(frame)} bytes to {self._who}", self.rank)
        self._socket.settimeout(timeout_s)
        try:
            self._socket.sendall(_LENGTH.pack(len(frame)) + frame)
        except TimeoutError as error:
            raise self._timed_out(timeout_s) from error
        except OSError as error:
            raise self.ended() from error

    def receive(self, timeout_s: float | None = None) -> bytes:
        """The next frame; None waits for ever. Raises RankEnded, RankTimedOut."""
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        (length,) = _LENGTH.unpack(self._exactly(_LENGTH.size, deadline, timeout_s))
        if length > MAX_FRAME_BYTES:
            raise RankError(f"a message of {length} bytes from {self._who}", self.rank)
        return self._exactly(length, deadline, timeout_s)

    def has_more(self, timeout_s: float) -> bool:
        """Whether the other side says something, or ends, within that time."""
        return bool(select.select([self._socket], [], [], timeout_s)[0])

    def close(self) -> None:
        """The other side hears of it. Idempotent."""
        self._socket.close()

    def ended(self) -> RankEnded:
        """What is raised where the other side is gone."""
        return RankEnded(f"{self._who} has ended", self.rank)

    def _exactly(self, count: int, deadline: float | None, timeout_s: float | None) -> bytes:
        received = bytearray(count)
        view, done = memoryview(received), 0
        while done < count:
            left = None if deadline is None else max(0.001, deadline - time.monotonic())
            self._socket.settimeout(left)
            try:
                size = self._socket.recv_into(view[done:])
            except TimeoutError as error:
                raise self._timed_out(timeout_s or 0.0) from error
            except OSError as error:
                raise self.ended() from error
            if not size:
                raise self.ended()
            done += size
        return bytes(received)

    def _timed_out(self, timeout_s: float) -> RankTimedOut:
        return RankTimedOut(f"{self._who} was waited for {timeout_s:g} s", self.rank)
