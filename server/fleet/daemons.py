"""The allocator beside a server: found, or started where none runs, and replaced if it ends.

Owns only an allocator that it started itself: that one is killed if it hangs, and stopped with the
server, but not while others use it. Invariant: as long as the server runs an allocator is looked
after, whoever started it, and whatever goes wrong with the looking. Knows nothing of what the
allocator does.
"""

import asyncio
import contextlib
import logging
import os
import subprocess
import time
from collections.abc import Callable
from typing import Final

from allocator import (
    AllocatorError,
    AllocatorGone,
    Owner,
    ProcessIdentity,
    ProcessState,
    RuntimeDir,
    connect,
    module_command,
    module_environment,
    option_arguments,
    remove_leftovers,
)
from server.processes.stopping import stop_process
from server.processes.vital_signs import LOOK_EVERY_S, VitalSigns
from workers.client import end_of, readable

_START_TIMEOUT_S: Final = 300.0
"""One that takes over from a killed one reads all weights before it answers."""
_ANSWER_S: Final = 2.0
_RETRY_S: Final = 1.0
_OTHERS_S: Final = 10.0
"""Within which whoever started an allocator that ended can be expected to start another."""
_WAITING_S: Final = 30.0
"""How long an allocator that somebody waits for may wait itself, using no processor."""
_STOP_S: Final = 10.0

log = logging.getLogger("onecopy.server")


class AllocatorProcess:
    """An allocator that answers, once `find_or_start` has returned."""

    def __init__(
        self,
        runtime_dir: RuntimeDir,
        memory_limit: int | None = None,
        device: str = "host",
        hang_timeout_s: float = 3.0,
    ):
        """`hang_timeout_s`: how long it may be stopped before it is killed; 0 for ever."""
        self._runtime_dir = runtime_dir
        self._command = module_command("allocator", "--runtime-dir", str(runtime_dir.path))
        self._command.append("--quiet")  # the server's log tells what matters of its weights
        self._command += option_arguments({"device": device, "memory_limit": memory_limit})
        self._hang_timeout_s = hang_timeout_s
        self._process: subprocess.Popen[bytes] | None = None
        """The one that was started here."""
        self._identity: ProcessIdentity | None = None
        """The one that runs, whoever started it."""
        self._signs = VitalSigns()
        self.unresponsive_since: float | None = None
        """Since when it has shown no sign of life, though it should."""
        self._told = ""
        """Why there is none, as it was logged last."""
        self.keep = False
        """Whether it goes on, with its weights, when the server ends."""

    @property
    def pid(self) -> int | None:
        """The allocator that is looked after."""
        return self._identity.pid if self._identity is not None else None

    @property
    def is_ours(self) -> bool:
        """Whether it was started here."""
        return self._process is not None

    async def find_or_start(self) -> None:
        """Until one answers. Raises AllocatorGone where none can be started, whose own words are on
        stderr by then, and where one runs that does not answer."""
        self._signs, self.unresponsive_since = VitalSigns(), None
        while (owner := self._runtime_dir.owner("allocator")) is not None:
            if await self._find(owner):
                return
        await self._start()

    async def _find(self, owner: Owner) -> bool:
        """Whether the allocator that runs here answers, once it has come up; False where it ended
        meanwhile. One that takes over from another reads all weights before."""
        deadline = time.monotonic() + _START_TIMEOUT_S
        while self._runtime_dir.owner("allocator") == owner:
            if await asyncio.to_thread(self._answers):
                self._identity = owner.process
                return True
            self._signs.look(time.monotonic(), ProcessState.of(owner.pid), owes=True)
            if self._signs.quiet_since is not None or time.monotonic() > deadline:
                raise AllocatorGone(
                    f"the allocator (pid {owner.pid}) runs, but does not answer: it is "
                    f"{self._signs}. End it with `onecopy stop --runtime-dir "
                    f"{self._runtime_dir.path}`"
                )
            await asyncio.sleep(LOOK_EVERY_S)
        return False

    def _answers(self) -> bool:
        try:
            connect(self._runtime_dir, _ANSWER_S, label="server").close()
        except AllocatorError:
            return False
        return True

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
        except OSError:
            os.close(ready_read)
            raise
        finally:
            os.close(ready_write)
        try:
            await asyncio.wait_for(readable(ready_read), _START_TIMEOUT_S)
            answer = os.read(ready_read, 1)
        except asyncio.CancelledError:
            # Not yet able to end in order: that comes with `stop_if_unused`, once it is up, or has
            # had time enough for it.
            self._process = process
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(readable(ready_read), _STOP_S)
            raise
        except TimeoutError:
            process.kill()
            answer = b""
        finally:
            os.close(ready_read)
        if not answer:
            await end_of(process)
            raise AllocatorGone("the allocator did not start; its own message is above")
        self._process = process
        self._identity = ProcessIdentity.of(process.pid)

    # --- looking after it

    async def watch(self, awaited: Callable[[], bool]) -> None:
        """See to it that one runs, until this is cancelled. Instances go on with the memory they
        map; those that start later load anew where nothing could be adopted. `awaited`: whether
        anybody waits for an answer of it."""
        while True:
            if self._identity is None:
                await self._start_again()
            else:
                await self._until_ended(self._identity, awaited)

    async def _start_again(self) -> None:
        try:
            await self.find_or_start()
        except AllocatorError as error:
            if str(error) != self._told:
                log.warning("there is no allocator: %s", error)
            self._told = str(error)
            await asyncio.sleep(_RETRY_S)
        else:
            self._told = ""

    async def _until_ended(self, process: ProcessIdentity, awaited: Callable[[], bool]) -> None:
        try:
            pidfd = os.pidfd_open(process.pid)
        except ProcessLookupError:
            await self._ended(process)
            return
        ended = asyncio.ensure_future(readable(pidfd))
        try:
            while process.is_alive():
                await asyncio.wait({ended}, timeout=LOOK_EVERY_S)
                if ended.done():
                    break
                self._look_at(process, owes=awaited())
        finally:
            ended.cancel()
            await asyncio.gather(ended, return_exceptions=True)
            os.close(pidfd)
        await self._ended(process)

    def _look_at(self, process: ProcessIdentity, *, owes: bool) -> None:
        if not self._hang_timeout_s:
            return
        signs = self._signs
        signs.look(time.monotonic(), ProcessState.of(process.pid), owes=owes)
        before, self.unresponsive_since = self.unresponsive_since, signs.quiet_since
        if before is None and signs.quiet_since is not None:
            log.warning("the allocator (pid %d) does not move any more: %s", process.pid, signs)
        if before is not None and signs.quiet_since is None:
            log.info("the allocator moves again")
        if self._process is not None and signs.is_hung(self._hang_timeout_s, _WAITING_S):
            log.warning("the allocator hangs and is killed")
            self._process.kill()

    async def _ended(self, process: ProcessIdentity) -> None:
        self._identity, self.unresponsive_since = None, None
        if self._process is not None:
            status = await end_of(self._process)
            self._process = None
            log.warning("the allocator ended with status %d; starting another", status)
            return
        log.warning(
            "the allocator (pid %d), which was not started here, ended; another is started if "
            "nobody else does within %.0f s",
            process.pid,
            _OTHERS_S,
        )
        deadline = time.monotonic() + _OTHERS_S
        while self._runtime_dir.owner("allocator") is None and time.monotonic() < deadline:
            await asyncio.sleep(LOOK_EVERY_S)

    async def stop_if_unused(self) -> None:
        """End the allocator that was started here, unless another session still uses it."""
        process = self._process
        if process is None or self.keep or await asyncio.to_thread(self._is_used):
            return
        identity = ProcessIdentity.of(process.pid)
        gently = identity is None or await asyncio.to_thread(stop_process, identity, _STOP_S)
        await end_of(process)
        if not gently:
            log.warning("the allocator did not end, and was killed")
            await asyncio.to_thread(remove_leftovers, self._runtime_dir, "allocator")

    def _is_used(self) -> bool:
        """One that does not answer is ended all the same."""
        state = ProcessState.of(self._process.pid) if self._process is not None else None
        if self.unresponsive_since is not None or state is None or state.is_stopped:
            return False
        try:
            with connect(self._runtime_dir, _ANSWER_S, request_timeout_s=_ANSWER_S) as memory:
                found = memory.statistics().sessions
        except AllocatorError:
            return False
        # One of ours that had ended when the daemon before this one was killed is not known to
        # have, and nobody comes back for it.
        own = os.getpid()
        return sum(not (one.adopted and one.pid == own) for one in found) > 1
