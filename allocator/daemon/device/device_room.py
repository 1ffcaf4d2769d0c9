"""How much a device has room for, asked again and again: others use it, too.

Owns when it is asked, and what of its answer is ours. Invariant: what is reserved and not yet
committed counts as taken, since whoever it was promised to will commit it. Knows nothing of what is
given up where the answer is less than what is owned.
"""

import logging
from collections.abc import Callable
from typing import Final, TypeVar

from allocator.backends import Backend
from allocator.daemon.device.budget import DeviceMemory
from allocator.errors import DeviceError, OutOfDeviceMemory
from allocator.messages import Handle

log = logging.getLogger("onecopy.allocator")

_LOOK_EVERY_S: Final = 0.05
"""Our own reservations don't change the answer, and what others take in between the clients meet
(MakeRoom)."""


Taken = TypeVar("Taken")


class DeviceRoom:
    """Of one device."""

    def __init__(
        self, backend: Backend, memory: DeviceMemory, pool: Callable[[], Handle | None]
    ) -> None:
        """`pool` is the device's pool, once it is made."""
        self._backend = backend
        self._memory = memory
        self._pool = pool
        self._looked_at = float("-inf")

    def look(self, now: float) -> None:
        """Let `DeviceMemory` know, unless it was just told."""
        if now >= self._looked_at + _LOOK_EVERY_S:
            self.look_anew(now)

    def while_taking(self, now: float, take: Callable[[], Taken]) -> Taken:
        """What `take` returns, refused only by a look that is no older than `now`. Raises as it
        does."""
        self.look(now)
        try:
            return take()
        except OutOfDeviceMemory:
            if not self._look_again(now):
                raise
            return take()

    def look_anew(self, now: float) -> None:
        """Let `DeviceMemory` know. A device that can't be asked at the moment leaves it as it
        was."""
        self._looked_at = now
        try:
            # In this order, what a client commits in between counts as free and as committed:
            # rather a promise too much, which is told of, than something given up in vain.
            room = self._backend.room()
            if room is None:
                self._memory.see(self._backend.limit_bytes())
                return
            available = room.available_bytes - self.outstanding_bytes()
            self._memory.see(self._memory.owned_bytes + available, room)
        except DeviceError as error:
            log.warning("%s", error)

    def outstanding_bytes(self, backend: Backend | None = None) -> int:
        """Reserved on this device, or by the other `backend`, and not yet committed by their
        writers."""
        backend = backend or self._backend
        targets = [s.target for s in self._memory.sets if s.target is not None]
        outstanding = sum(
            max(0, target.num_bytes - backend.committed_bytes(target.segment))
            for target in targets
            if target.backend == backend.name
        )
        pool = self._pool()
        if pool is not None and pool.backend == backend.name:
            leased = self._memory.pool.leased_bytes + self._memory.pool.cached_bytes
            outstanding += max(0, leased - backend.committed_bytes(pool.segment))
        return outstanding

    def _look_again(self, now: float) -> bool:
        """As `look`, even where it was just told; False where that was at this very moment, so that
        there is nothing new."""
        if now == self._looked_at:
            return False
        self.look_anew(now)
        return True
