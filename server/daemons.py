"""The allocator beside a server: found where one runs, started where none does.

Owns only an allocator that it started itself. Invariant: that one is stopped with the server, but
not while others use it. Knows nothing of what the allocator does.
"""

import asyncio
import contextlib
import os
import select
import signal
import subprocess
import sys
import time
from typing import Final

from allocator import AllocatorError, AllocatorGone, ProcessIdentity, RuntimeDir, connect

_START_TIMEOUT_S: Final = 20.0
_STOP_TIMEOUT_S: Final = 10.0


class AllocatorProcess:
    """An allocator that answers."""

    def __init__(self, runtime_dir: RuntimeDir, process: "subprocess.Popen[bytes] | None"):
        self._runtime_dir = runtime_dir
        self._process = process

    @property
    def started_here(self) -> bool:
        """Whether this server started it."""
        return self._process is not None

    @classmethod
    async def find_or_start(
        cls, runtime_dir: RuntimeDir, memory_limit: int | None
    ) -> "AllocatorProcess":
        """Raises AllocatorError with the allocator's own words where it can't start."""
        if runtime_dir.owner("allocator") is not None:
            return cls(runtime_dir, None)
        command = [sys.executable, "-m", "allocator", "--runtime-dir", str(runtime_dir.path)]
        if memory_limit is not None:
            command += ["--memory-limit", str(memory_limit)]
        ready_read, ready_write = os.pipe()
        try:
            process = subprocess.Popen(  # noqa: S603 - our own interpreter and module
                [*command, "--ready-fd", str(ready_write)],
                pass_fds=[ready_write],
                stdin=subprocess.DEVNULL,
                # A session of its own: a Ctrl-C at the server must not end it before the instances.
                start_new_session=True,
            )
        finally:
            os.close(ready_write)
        try:
            answer = await asyncio.wait_for(
                asyncio.to_thread(os.read, ready_read, 1), _START_TIMEOUT_S
            )
        except TimeoutError:
            process.kill()
            answer = b""
        finally:
            os.close(ready_read)
        if not answer:
            await asyncio.to_thread(process.wait)
            raise AllocatorGone("the allocator did not start; its own message is above")
        return cls(runtime_dir, process)

    async def stop_if_unused(self) -> None:
        """End the allocator that this server started, unless another session still uses it."""
        if self._process is None:
            return
        # One that does not answer is ended all the same.
        with contextlib.suppress(AllocatorError), connect(self._runtime_dir) as memory:
            if memory.statistics().num_sessions > 1:
                return
        self._process.send_signal(signal.SIGTERM)
        try:
            await asyncio.to_thread(self._process.wait, _STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            await asyncio.to_thread(self._process.wait)


def stop_process(process: ProcessIdentity, timeout_s: float) -> bool:
    """SIGTERM, wait for the end, SIGKILL after `timeout_s`. True where SIGTERM was enough."""
    if not process.send_signal(signal.SIGTERM):
        return True
    deadline = time.monotonic() + timeout_s
    if _wait_end(process, deadline):
        return True
    process.send_signal(signal.SIGKILL)
    _wait_end(process, time.monotonic() + _STOP_TIMEOUT_S)
    return False


def _wait_end(process: ProcessIdentity, deadline: float) -> bool:
    try:
        pidfd = os.pidfd_open(process.pid)
    except ProcessLookupError:
        return True
    try:
        if not process.is_alive():
            return True
        readable, _, _ = select.select([pidfd], [], [], max(0.0, deadline - time.monotonic()))
        return bool(readable)
    finally:
        os.close(pidfd)
