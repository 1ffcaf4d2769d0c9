"""The allocator beside a server: found where one runs, started where none does.

Owns only an allocator that it started itself. Invariants: that one is replaced if it ends, and
stopped with the server, but not while others use it. Knows nothing of what the allocator does.
"""

import asyncio
import contextlib
import logging
import os
import select
import signal
import subprocess
import time
from typing import Final

from allocator import (
    AllocatorError,
    AllocatorGone,
    AllocatorSilent,
    Owner,
    ProcessIdentity,
    RuntimeDir,
    connect,
    module_command,
    module_environment,
)

_START_TIMEOUT_S: Final = 300.0
"""One that takes over from a killed one reads all weights before it answers."""
_STOP_TIMEOUT_S: Final = 10.0
_RETRY_S: Final = 1.0
_PROBE_S: Final = 0.1

log = logging.getLogger("onecopy.server")


class AllocatorProcess:
    """An allocator that answers, once `find_or_start` has returned."""

    def __init__(
        self, runtime_dir: RuntimeDir, memory_limit: int | None = None, device: str = "host"
    ):
        self._runtime_dir = runtime_dir
        self._command = module_command("allocator", "--runtime-dir", str(runtime_dir.path))
        self._command.append("--quiet")  # the server's log tells what matters of its weights
        self._command += ["--device", device]
        if memory_limit is not None:
            self._command += ["--memory-limit", str(memory_limit)]
        self._process: subprocess.Popen[bytes] | None = None
        self.keep = False
        """Whether it goes on, with its weights, when the server ends."""

    async def find_or_start(self) -> None:
        """Until one answers. Raises AllocatorGone where none can be started, whose own words are on
        stderr by then, and where one runs that does not answer."""
        while (owner := self._runtime_dir.owner("allocator")) is not None:
            if await self._answers(owner):
                return
        await self._start()

    async def _answers(self, owner: Owner) -> bool:
        """Whether it does, once it has come up; False where it ended meanwhile. One that takes over
        from another reads all weights before. Raises AllocatorGone where it is silent."""
        deadline = time.monotonic() + _START_TIMEOUT_S
        while True:
            try:
                await asyncio.to_thread(self._probe)
            except AllocatorSilent:
                raise
            except AllocatorGone as error:
                if self._runtime_dir.owner("allocator") != owner:
                    return False
                if time.monotonic() > deadline:
                    raise AllocatorGone(
                        f"the allocator (pid {owner.pid}) in {self._runtime_dir.path} has not come "
                        f"up within {_START_TIMEOUT_S:.0f} s: end it, and start another"
                    ) from error
                await asyncio.sleep(_PROBE_S)
            else:
                return True

    def _probe(self) -> None:
        connect(self._runtime_dir, label="server").close()

    async def _start(self) -> None:
        ready_read, ready_write = os.pipe()
        try:
            process = subprocess.Popen(  # noqa: S603 - our own interpreter and module
                [*self._command, "--ready-fd", str(ready_write)],
                pass_fds=[ready_write],
                stdin=subprocess.DEVNULL,
                env=module_environment(),
                # A session of its own: a Ctrl-C at the server must not end it before the instances.
                start_new_session=True,
            )
        finally:
            os.close(ready_write)
        try:
            await asyncio.wait_for(_readable(ready_read), _START_TIMEOUT_S)
            answer = os.read(ready_read, 1)
        except asyncio.CancelledError:
            # Not yet able to end in order: that comes with `stop_if_unused`, once it is up.
            self._process = process
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(_readable(ready_read), _START_TIMEOUT_S)
            raise
        except TimeoutError:
            process.kill()
            answer = b""
        finally:
            os.close(ready_read)
        if not answer:
            await _end_of(process)
            raise AllocatorGone("the allocator did not start; its own message is above")
        self._process = process

    async def watch(self) -> None:
        """Start another whenever the one that was started here ends. Instances go on with the
        memory they map; those that start later load anew. Runs until it is cancelled."""
        while self._process is not None:
            status = await _end_of(self._process)
            self._process = None
            log.warning("the allocator ended with status %d; starting another", status)
            await self._start_again()

    async def _start_again(self) -> None:
        while True:
            try:
                return await self.find_or_start()
            except AllocatorGone:
                await asyncio.sleep(_RETRY_S)

    async def stop_if_unused(self) -> None:
        """End the allocator that was started here, unless another session still uses it."""
        process = self._process
        if process is None or self.keep:
            return
        # One that does not answer is ended all the same.
        with contextlib.suppress(AllocatorError), connect(self._runtime_dir) as memory:
            if memory.statistics().num_sessions > 1:
                return
        process.send_signal(signal.SIGTERM)
        try:
            await asyncio.wait_for(_end_of(process), _STOP_TIMEOUT_S)
        except TimeoutError:
            process.kill()
            await _end_of(process)


async def _end_of(process: "subprocess.Popen[bytes]") -> int:
    """Wait for a child's end without holding a thread, which a cancellation could not free."""
    if process.poll() is None:
        pidfd = os.pidfd_open(process.pid)
        try:
            await _readable(pidfd)
        finally:
            os.close(pidfd)
    return process.wait()


async def _readable(fd: int) -> None:
    """Until there is something to read, or the end."""
    loop = asyncio.get_running_loop()
    readable = asyncio.Event()
    loop.add_reader(fd, readable.set)
    try:
        await readable.wait()
    finally:
        loop.remove_reader(fd)


def stop_process(process: ProcessIdentity, timeout_s: float, *, asked: bool = False) -> bool:
    """SIGTERM, unless it was `asked` by other means, wait for the end, SIGKILL after `timeout_s`.
    True where it needed no SIGKILL."""
    if not asked and not process.send_signal(signal.SIGTERM):
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
