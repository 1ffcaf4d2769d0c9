"""The work that goes on as long as the server does, besides its requests.

Owns those tasks. Invariant: none ends unobserved. One that fails is told of and begun again, ever
more slowly; one that the server can't do without ends the server, with a message; one that is about
a single thing hands its error to who wanted that.
"""

import asyncio
import errno
import logging
import time
from collections.abc import Awaitable, Callable, Coroutine
from typing import Final

log = logging.getLogger("onecopy.server")

_FIRST_PAUSE_S: Final = 0.1
_LAST_PAUSE_S: Final = 5.0
_EXHAUSTED: Final = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)
"""The machine's fault, not ours: where in the code it was met says nothing."""
_LONG_S: Final = 60.0
"""Work that went well for so long begins again without a pause."""


class WorkEnded(Exception):
    """Something that the server can't do without has ended. The message names it."""


class Background:
    """All such tasks of one server."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[None]] = set()
        self._broken = asyncio.Event()
        self._problem: WorkEnded | None = None

    def keep(self, name: str, work: Callable[[], Awaitable[None]]) -> None:
        """Do `work`, and again whenever it fails; where it returns, it is done."""
        self._run(self._kept(name, work), name)

    def need(self, name: str, work: Callable[[], Awaitable[None]]) -> None:
        """Do `work`, without which there is no server: `run` raises when it ends."""
        self._run(self._needed(name, work), name)

    def once(
        self,
        name: str,
        work: Callable[[], Awaitable[None]],
        on_error: Callable[[Exception], None] = lambda _error: None,
    ) -> None:
        """Do `work`; `on_error` is told where it fails, and so is the log."""
        self._run(self._done_once(name, work, on_error), name)

    async def run(self) -> None:
        """Until something ended that is needed. Raises WorkEnded."""
        await self._broken.wait()
        if self._problem is not None:
            raise self._problem

    async def close(self) -> None:
        """Cancel all that still goes on, and wait for it."""
        while tasks := [one for one in self._tasks if one is not asyncio.current_task()]:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def _run(self, work: Coroutine[object, object, None], name: str) -> None:
        task = asyncio.get_running_loop().create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _kept(self, name: str, work: Callable[[], Awaitable[None]]) -> None:
        pause_s = _FIRST_PAUSE_S
        while True:
            started = time.monotonic()
            try:
                return await work()
            except Exception as error:
                if time.monotonic() - started > _LONG_S:
                    pause_s = _FIRST_PAUSE_S
                if isinstance(error, OSError) and error.errno in _EXHAUSTED:
                    log.warning("%s can't go on now, again in %.1f s: %s", name, pause_s, error)
                else:
                    log.exception("%s failed; it begins again in %.1f s", name, pause_s)
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, _LAST_PAUSE_S)

    async def _needed(self, name: str, work: Callable[[], Awaitable[None]]) -> None:
        try:
            await work()
            self._problem = WorkEnded(f"{name} ended, without which nothing can be served")
        except Exception as error:
            log.exception("%s failed", name)
            self._problem = WorkEnded(f"{name} failed: {error}")
        self._broken.set()

    async def _done_once(
        self,
        name: str,
        work: Callable[[], Awaitable[None]],
        on_error: Callable[[Exception], None],
    ) -> None:
        try:
            await work()
        except Exception as error:
            log.exception("%s failed", name)
            on_error(error)
