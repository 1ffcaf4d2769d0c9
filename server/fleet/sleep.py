"""Putting the served model to sleep and waking it: instances first, then their weights.

Owns the order. Invariants: weights go to sleep only after every instance has ended by itself; if
they can't, the instances come back; a model that is awake answers as soon as one instance is ready.
"""

import asyncio
import logging
from typing import Final

from allocator import AllocatorError, Client, RuntimeDir, connect
from server.fleet.fleet import Fleet
from server.fleet.router import Router
from server.fleet.starts import MOST_FAILURES, StartError

log = logging.getLogger("onecopy.server")

_ANSWER_S: Final = 10.0
"""What the allocator may take for an answer, while it frees memory too."""


class CannotSleep(Exception):
    """The model is as awake, or as asleep, as before. The message says why."""


class Sleeper:
    """One served model's sleep."""

    def __init__(
        self,
        fleet: Fleet,
        router: Router,
        runtime_dir: RuntimeDir,
        drain_timeout_s: float,
        turn: asyncio.Lock,
    ):
        """`turn` is held by whoever changes the fleet as a whole."""
        self._fleet = fleet
        self._router = router
        self._runtime_dir = runtime_dir
        self._drain_timeout_s = drain_timeout_s
        self._turn = turn

    async def sleep(self, level: int) -> None:
        """End the instances after their requests; keep the weights in host memory (level 1) or on
        disk (level 2). Raises CannotSleep."""
        async with self._turn:
            key = self._fleet.model.weight_set
            if key is None:
                raise CannotSleep("no instance is ready yet: there is nothing to put to sleep")
            if not await self._fleet.sleep(self._drain_timeout_s, self._router.wait_idle):
                raise CannotSleep(
                    f"instances are still busy after {self._drain_timeout_s:.0f} s; the model "
                    "stays awake: try again"
                )
            try:
                await asyncio.to_thread(self._sleep_weights, key, level)
            except AllocatorError as error:
                self._fleet.wake()
                raise CannotSleep(f"the model stays awake: {error}") from error
            log.info("the model sleeps (level %d)", level)

    async def wake(self) -> None:
        """Bring the weights back and start the instances; returns once they are ready. Raises
        CannotSleep."""
        async with self._turn:
            if not self._fleet.asleep:
                return
            key = self._fleet.model.weight_set
            try:
                if key is not None:
                    await asyncio.to_thread(self._wake_weights, key)
            except AllocatorError as error:
                # Not fatal: the first instance loads the checkpoint anew.
                log.warning("the weights can't be woken, they are loaded again: %s", error)
            self._fleet.wake()
            try:
                await self._fleet.wait_ready(MOST_FAILURES)
            except StartError as error:
                raise CannotSleep(f"no instance can start: {error}") from error

    def _sleep_weights(self, key: str, level: int) -> None:
        with self._connected() as memory:
            memory.sleep(key, level=level)

    def _wake_weights(self, key: str) -> None:
        with self._connected() as memory:
            memory.wake(key)

    def _connected(self) -> Client:
        return connect(self._runtime_dir, _ANSWER_S, label="server", request_timeout_s=_ANSWER_S)
