"""A forked process that works and says how far it is, until it is killed.

Invariant: it is killed and waited for, whatever the test does; every wait is bounded.
"""

import os
import select
import signal
import struct
import traceback
from collections.abc import Callable

from tests.daemon_process import TIMEOUT_S

_NUMBER = struct.Struct("<Q")
Report = Callable[[int], None]


class Doomed:
    """Runs `work(report)`; each number that it reports can be read here. A context."""

    def __init__(self, work: Callable[[Report], None]):
        self._read, write = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            try:
                os.close(self._read)
                work(lambda number: _send(write, number))
            except Exception:  # noqa: BLE001 - the parent sees that it ended, here is why
                traceback.print_exc()
            finally:
                os._exit(1)
        os.close(write)
        self._alive = True

    def read(self) -> int | None:
        """The next number; None where it is dead and all have been read."""
        readable, _, _ = select.select([self._read], [], [], TIMEOUT_S)
        assert readable, f"process {self.pid} reported nothing for {TIMEOUT_S} s"
        data = os.read(self._read, _NUMBER.size)  # a pipe keeps such short writes in one piece
        return _NUMBER.unpack(data)[0] if data else None

    def kill(self) -> int | None:
        """SIGKILL; returns the last of the numbers that had not been read."""
        self._end()
        last = None
        while (number := self.read()) is not None:
            last = number
        return last

    def _end(self) -> None:
        if self._alive:
            os.kill(self.pid, signal.SIGKILL)
            _, status = os.waitpid(self.pid, 0)
            self._alive = False
            assert os.WIFSIGNALED(status), "it ended before it was killed"

    def __enter__(self) -> "Doomed":
        return self

    def __exit__(self, *_error: object) -> None:
        try:
            self._end()
        finally:
            os.close(self._read)


def _send(fd: int, number: int) -> None:
    os.write(fd, _NUMBER.pack(number))
