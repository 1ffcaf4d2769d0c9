"""Giving up what nobody uses, to make room: which goes first.

Idle sets and unpinned blocks, least recently used first, whichever of both it is; the oldest set is
`WeightSets`' to say, the oldest block `KVPool`'s. How much has to go, and whether blocks alone are
to go, is the caller's (`device.budget`); what then becomes of it is `device.effects`'. Pure.
Invariant: what is pinned, read or written is never given up.
"""

from collections.abc import Callable
from dataclasses import dataclass

from allocator.daemon.pool.kv_pool import KVPool
from allocator.daemon.weights.sets import WeightSets
from allocator.daemon.weights.weight_set import Effect
from allocator.messages import Extent


@dataclass(frozen=True)
class Evicted:
    """Effect: this set or block was given up to make room."""

    key: str
    digest: bytes
    num_bytes: int


@dataclass(frozen=True)
class FreeExtent:
    """Effect: nobody needs this extent of the pool any more."""

    extent: Extent


AnyEffect = Effect | FreeExtent | Evicted


class Eviction:
    """The order in which one device's sets and blocks are given up."""

    def __init__(self, sets: WeightSets, pool: KVPool) -> None:
        self._sets = sets
        self._pool = pool
        self.num_sets = 0
        """How many sets were given up so."""

    def one(self, *, owned: bool = False) -> list[AnyEffect]:
        """Give up the least recently used of the idle sets and unpinned blocks; [] if there is
        none. `owned`: of those that take memory of the device."""
        idle = self._sets.least_recently_used(owned=owned)
        block = self._pool.oldest_block()
        if idle is not None and (block is None or idle.idle_since <= block):
            num_bytes = idle.num_bytes("device")
            self.num_sets += 1
            return [Evicted(idle.key, b"", num_bytes), *self._sets.evict(idle.key)]
        return self.block()

    def block(self) -> list[AnyEffect]:
        """Give up the least recently used unpinned block; [] if there is none."""
        evicted = self._pool.evict_block()
        if evicted is None:
            return []
        digest, extent = evicted
        return [Evicted("", digest, extent.num_bytes), FreeExtent(extent)]

    def until(self, fits: Callable[[], bool], *, owned: bool = False) -> list[AnyEffect]:
        """Give up one after the other until it fits, or nothing is left."""
        effects: list[AnyEffect] = []
        while not fits():
            evicted = self.one(owned=owned)
            if not evicted:
                break
            effects += evicted
        return effects

    def blocks_until(self, most_bytes: int) -> list[AnyEffect]:
        """Give up unpinned blocks until all of them take `most_bytes`."""
        effects: list[AnyEffect] = []
        while self._pool.evictable_bytes > most_bytes:
            effects += self.block()
        return effects
