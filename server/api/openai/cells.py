"""What nobody has looked at yet is looked at in a cell: a child that the kernel bounds.

Owns the server's warden (`workers.process.warden`), who may have a cell, and what becomes of one
that ends in another way than by its finding. Invariants: a turn in a lane aside, `run` returns
within its time, whatever its input does and whatever happens to the processes; a lane has no more
cells at once than it was made for, and no more that wait. Knows nothing of grammars and bodies.

The warden starts with the first task, and anew with the next one after it has ended.
"""

import asyncio
import contextlib
import itertools
import logging
import os
from collections.abc import AsyncIterator, Iterator, Mapping
from typing import Any, Final, Literal

from server.errors import Overloaded
from workers import Bound, Ended, Grant, Kill, Task, warden_launch, warden_receive, warden_send

_log = logging.getLogger("onecopy.server")

Kind = Literal["grammar", "body"]
_ATTEMPTS: Final = 3
"""A cell can be lost through no fault of its input: killed by a person, or by the kernel."""
_PATIENCE_S: Final = 2.0
"""How long a warden may take to end a cell."""
_RETRY_AFTER_S: Final = 2


class TooMuch(Exception):
    """The input needs more than it is granted, of `bound`."""

    def __init__(self, bound: Bound):
        super().__init__(bound)
        self.bound = bound


class _Lost(Exception):
    """The cell is gone, and nobody knows what it would have found."""


class Lane:
    """So many cells at once, and so many behind them."""

    def __init__(self, what: str, num_running: int, num_waiting: int) -> None:
        """`what` the lane is for, in words for who finds it full."""
        self._what = what
        self._most_waiting = num_waiting
        self._num_waiting = 0
        self._running = asyncio.Semaphore(num_running)

    @contextlib.asynccontextmanager
    async def turn(self) -> AsyncIterator[None]:
        """Wait for it. Raises `Overloaded` where too many do."""
        if self._num_waiting >= self._most_waiting and self._running.locked():
            raise Overloaded(
                f"{self._num_waiting} {self._what} wait to be looked at, which is all that this "
                "server takes: try again.",
                retry_after_s=_RETRY_AFTER_S,
            )
        self._num_waiting += 1
        try:
            await self._running.acquire()
        finally:
            self._num_waiting -= 1
        try:
            yield
        finally:
            self._running.release()


class Cells:
    """All cells of a server. Belongs to one event loop; close it there."""

    def __init__(self) -> None:
        self._warden: _Warden | None = None
        self._closed = False

    async def run(
        self,
        kind: Kind,
        given: bytes | int,
        options: Mapping[str, Any],
        grant: Grant,
        wall_s: float,
        lane: Lane,
    ) -> bytes:
        """What a cell finds about `given`, bytes or a descriptor of them, within `wall_s` of its
        start. Raises `TooMuch`, `Overloaded`, or `RuntimeError` for a fault of ours."""
        async with lane.turn():
            for _ in range(_ATTEMPTS):
                with contextlib.suppress(_Lost):
                    return await self._attempt(kind, given, options, grant, wall_s)
        raise Overloaded(
            f"The process that looks at a request's {kind} ended {_ATTEMPTS} times: the machine "
            "may be short of memory. Try again.",
            retry_after_s=_RETRY_AFTER_S,
        )

    def close(self) -> None:
        """End the warden, and with it all cells."""
        self._closed = True
        if self._warden is not None:
            self._warden.end()

    async def _attempt(
        self,
        kind: Kind,
        given: bytes | int,
        options: Mapping[str, Any],
        grant: Grant,
        wall_s: float,
    ) -> bytes:
        if self._closed:
            raise Overloaded("The server is shutting down.", retry_after_s=_RETRY_AFTER_S)
        try:
            if self._warden is None or self._warden.gone:
                self._warden = _Warden()
            with memory_file(given) as content, memory_file(b"") as found:
                ended = await self._warden.run(kind, options, grant, wall_s, content, found)
                if ended.status == 0:
                    return os.pread(found, os.fstat(found).st_size, 0)
        except OSError as error:  # no descriptor, no memory, no further process
            raise Overloaded(
                f"A request's {kind} can't be looked at now: {error.strerror}. Try again.",
                retry_after_s=_RETRY_AFTER_S,
            ) from error
        if ended.exceeded is not None:
            raise TooMuch(ended.exceeded)
        if ended.status == 1:
            raise RuntimeError(f"a cell for a {kind} failed: its error is in the log")
        _log.warning("a cell for a %s ended with status %d", kind, ended.status)
        raise _Lost


class _Warden:
    """The process, as the server sees it."""

    def __init__(self) -> None:
        self._process, self._control = warden_launch("server.api.openai.cell_tasks", {})
        self._ids = itertools.count()
        self._running: dict[int, asyncio.Future[Ended]] = {}
        asyncio.get_running_loop().add_reader(self._control, self._receive)
        self.gone = False

    async def run(
        self,
        kind: Kind,
        options: Mapping[str, Any],
        grant: Grant,
        wall_s: float,
        content: int,
        found: int,
    ) -> Ended:
        """How a cell ended. Raises `_Lost`, or `TooMuch` where it computed for most of the time."""
        task = Task(next(self._ids), kind, dict(options), grant)
        ended = self._running[task.id] = asyncio.get_running_loop().create_future()
        try:
            self._send(task, content, found)
            return await asyncio.wait_for(asyncio.shield(ended), wall_s)
        except TimeoutError:
            late = await self._killed(task, ended)
        except asyncio.CancelledError:
            with contextlib.suppress(_Lost):
                self._send(Kill(task.id))
            raise
        finally:
            self._running.pop(task.id, None)
            ended.cancel()
        if late.cpu_s > grant.cpu_s / 2:
            raise TooMuch("time")
        raise _Lost  # one that was stopped, or had no turn in all that time, is not to blame

    async def _killed(self, task: Task, ended: "asyncio.Future[Ended]") -> Ended:
        self._send(Kill(task.id))
        try:
            return await asyncio.wait_for(asyncio.shield(ended), _PATIENCE_S)
        except TimeoutError:
            _log.warning("the warden of the cells does not answer; the next task starts another")
            self.end()
            raise _Lost from None

    def _send(self, message: Task | Kill, *fds: int) -> None:
        try:
            warden_send(self._control, message, *fds)
        except OSError as error:
            self.end()
            raise _Lost from error

    def _receive(self) -> None:
        try:
            ended = warden_receive(self._control)
        except OSError:
            self.end()
            return
        if ended is not None:
            waiting = self._running.get(ended.id)
            if waiting is not None and not waiting.done():
                waiting.set_result(ended)

    def end(self) -> None:
        """Kill it, and tell all who wait for its cells, which end with it."""
        if self.gone:
            return
        self.gone = True
        asyncio.get_running_loop().remove_reader(self._control)
        self._control.close()
        self._process.kill()
        self._process.wait()
        for waiting in self._running.values():
            if not waiting.done():
                waiting.set_exception(_Lost())


@contextlib.contextmanager
def memory_file(content: bytes | int) -> Iterator[int]:
    """A descriptor of these bytes; one that is given stays its owner's."""
    if isinstance(content, int):
        yield content
        return
    file = os.memfd_create("onecopy-cell")
    try:
        left = memoryview(content)
        while left:
            left = left[os.write(file, left) :]
        yield file
    finally:
        os.close(file)
