"""The process that instances of one model are forked from: launched, seen to hang, replaced.

Owns it. Invariants: as long as nobody has closed this there is one, or another is tried, more and
more slowly; an instance is asked for only where it can be forked at once. What becomes of the
instances is the fleet's.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

from allocator import ProcessState
from server.processes.endings import OutOfMemoryKills, ending_of
from server.processes.vital_signs import VitalSigns
from workers.client import Forkserver, ForkserverEnded, Leash
from workers.messages import FromForkserver, InstanceSpec

log = logging.getLogger("onecopy.server")

WAITING_AT_START_S: Final = 30.0
"""How long what starts, or imports, may wait for something, using no processor: a disk may be
slow."""


@dataclass(frozen=True)
class Preload:
    """What it imports: the architecture of what lies at `model`, or of the set with this
    `metadata`."""

    model: str
    dtype: str
    metadata: Mapping[str, str] | None


@dataclass(frozen=True)
class ForksListeners:
    """Who is told what. All but `retry_delay_s` are called as something happens."""

    up: Callable[[], None]
    """Instances can be forked now."""
    event: Callable[[FromForkserver], None]
    """It told of one of its instances."""
    ended: Callable[[bool], None]
    """It is gone; whether by its own fault, before it was up."""
    retry_delay_s: Callable[[], float]
    """Asked how long to wait before another is launched."""


class Forks:
    """Of one fleet."""

    def __init__(
        self,
        preload: Callable[[], Preload],
        listeners: ForksListeners,
        memory_kills: OutOfMemoryKills,
        hang_timeout_s: float,
    ):
        """`preload` is asked at each launch; `hang_timeout_s` 0: it may hang for ever."""
        self._preload = preload
        self._listeners = listeners
        self._memory_kills = memory_kills
        self._hang_timeout_s = hang_timeout_s
        self._process: Forkserver | None = None
        self._signs = VitalSigns()
        self._closing = False
        self.is_up = False
        """Whether instances can be forked now; it imports before."""

    @property
    def pid(self) -> int | None:
        """Its process."""
        return self._process.pid if self._process is not None else None

    def start(self, spec: InstanceSpec) -> Leash:
        """Ask for an instance. Raises ForkserverEnded, ForkserverBusy, OSError."""
        if self._process is None:
            raise ForkserverEnded
        return self._process.start(spec)

    async def keep(self) -> None:
        """Until `stop`: launch it, pass on what it tells, and launch another when it ends."""
        while not self._closing:
            preload = self._preload()
            process = self._process = Forkserver.launch(
                preload.model, preload.dtype, preload.metadata
            )
            self._signs = VitalSigns()
            try:
                up = await process.up()
                log.info("forkserver up after %.1f s", up.import_ms / 1000)
                self.is_up = True
                self._listeners.up()
                while True:
                    self._listeners.event(await process.receive())
            except ForkserverEnded:
                was_up = self.is_up
            finally:
                self.is_up = False
                status = await process.close()
                self._process = None
            out_of_memory = self._memory_kills.just_now()
            faulty = not was_up and ending_of(status, out_of_memory=out_of_memory).by_itself
            self._listeners.ended(faulty)
            if not self._closing:
                log.warning("the forkserver ended; starting another. Instances go on")
                await asyncio.sleep(self._listeners.retry_delay_s())

    def look(self, *, asked: bool) -> None:
        """Kill it where it hangs. `asked`: somebody waits for an instance from it."""
        process = self._process
        if process is None or not self._hang_timeout_s:
            return
        owes = asked or not self.is_up
        self._signs.look(time.monotonic(), ProcessState.of(process.pid), owes=owes)
        if self._signs.is_hung(self._hang_timeout_s, WAITING_AT_START_S):
            log.warning("the forkserver (pid %d) hangs and is killed: %s", process.pid, self._signs)
            process.kill()

    def stop(self) -> None:
        """Launch no other."""
        self._closing = True

    async def close(self) -> None:
        """End it."""
        self.stop()
        if self._process is not None:
            await self._process.close()
