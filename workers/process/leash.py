"""The server's hold on one instance's process: what it does, that it has ended, and how to end it.

Owns the server's ends of the instance's pipe and pulse, and its pidfd. Invariants: once `kill` was
called, or this process has ended however it did, the kernel ends the instance, be it stopped, stuck
or not begun yet; the end of a process that is watched is told once. Needs no word from whoever
started it.
"""

import asyncio
import contextlib
import os
import signal
from collections.abc import Callable

from allocator import ProcessState
from workers.process.pulse import Beat, PulseReader


class Leash:
    """Made before the instance, which gets `descriptors`."""

    def __init__(self, name: str) -> None:
        """Raises OSError where descriptors run out."""
        self._pipe_read, self._pipe_write = os.pipe()
        try:
            self._pulse = PulseReader(name)
        except OSError:
            os.close(self._pipe_read)
            os.close(self._pipe_write)
            raise
        self._pidfd = -1
        self._pid = 0

    @property
    def descriptors(self) -> list[int]:
        """For the instance: its end of the pipe, and of the pulse."""
        return [self._pipe_read, self._pulse.descriptor]

    def handed_over(self) -> None:
        """They are on their way, or nobody wants them. Idempotent."""
        if self._pipe_read >= 0:
            os.close(self._pipe_read)
            self._pipe_read = -1
        self._pulse.handed_over()

    def look(self) -> Beat | None:
        """What the instance is doing, or did when it ended; None where that can't be told."""
        return self._pulse.look()

    def watch(self, pid: int, on_end: Callable[[int | None], None]) -> None:
        """From now on `on_end` is told of the end of process `pid`: its exit status, or minus the
        signal's number; None where only its parent can know. Does nothing the second time."""
        if self._pidfd >= 0:
            return
        try:
            self._pidfd = os.pidfd_open(pid)
        except ProcessLookupError:  # ended, and its parent has taken note: it will say so
            return
        self._pid = pid
        loop = asyncio.get_running_loop()
        loop.add_reader(self._pidfd, self._ended, on_end)

    def kill(self) -> None:
        """Let the kernel end it. Idempotent."""
        if self._pidfd >= 0:  # the pipe's end is no signal to one that was stopped as it began
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
        if self._pipe_write >= 0:
            os.close(self._pipe_write)
            self._pipe_write = -1

    def close(self) -> None:
        """It has ended, or is to. Idempotent."""
        self.kill()
        self.handed_over()
        self._unwatch()
        self._pulse.close()

    def _ended(self, on_end: Callable[[int | None], None]) -> None:
        asyncio.get_running_loop().remove_reader(self._pidfd)
        on_end(self._exit_status())

    def _exit_status(self) -> int | None:
        try:
            ended = os.waitid(os.P_PIDFD, self._pidfd, os.WEXITED | os.WNOHANG)
        except ChildProcessError:  # its parent lives: the status is there until that one takes it
            state = ProcessState.of(self._pid)
            return state.exit_status if state is not None and state.has_ended else None
        if ended is None:
            return None
        return ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status

    def _unwatch(self) -> None:
        if self._pidfd >= 0:
            asyncio.get_running_loop().remove_reader(self._pidfd)
            os.close(self._pidfd)
            self._pidfd = -1
