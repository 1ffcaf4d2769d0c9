"""Giving up what nobody uses: which goes first, and what then becomes of it, from top to bottom.

    choose   `Eviction`: idle sets and unpinned blocks, least recently used first. Pure
    follow   `Effects`: the journal and people hear of it, memory goes back, images are deleted

Owns the order, and what every effect of a device does. Invariants: what is pinned, read or written
is never given up; an extent is free for others only once its memory was taken back or is known to
be unclean. How much has to go is the caller's to say (`device.budget`).
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from allocator.backends.room import size
from allocator.daemon.device.notes import Notes
from allocator.daemon.device.segments import PoolSegment, Segments
from allocator.daemon.journal.events import History
from allocator.daemon.journal.records import BlockGone
from allocator.daemon.pool.kv_pool import KVPool
from allocator.daemon.weights.image_folder import ImageFolder
from allocator.daemon.weights.sets import WeightSets
from allocator.daemon.weights.state import Answer, Discard, Effect, Free, ReplyTo
from allocator.errors import DiskError
from allocator.messages import Extent, Handle, Reply


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


class Effects:
    """What follows, for one device. What it follows from is in the journal already, evictions
    aside."""

    def __init__(
        self,
        segments: Segments,
        pool: PoolSegment,
        images: ImageFolder,
        notes: Notes,
        history: History,
        reply: Callable[[ReplyTo, int, Reply], None],
    ) -> None:
        self._segments = segments
        self._pool = pool
        self._images = images
        self._notes = notes
        self._history = history
        self._reply = reply

    def apply(self, effects: Iterable[AnyEffect]) -> None:
        """Let them happen, in their order."""
        for effect in effects:
            match effect:
                case Evicted(key="", digest=digest):
                    self._notes.note(BlockGone(device=self._notes.device, digest=digest))
                case Evicted(key=key, num_bytes=num_bytes):
                    self._notes.set(key)
                    self._history.add("evicted", f"{key}, {size(num_bytes)}, to make room")
                case Free(handle=handle):
                    self._segments.free(handle)
                case FreeExtent(extent=extent):
                    self._pool.free(extent)
                case Discard(handle=handle):
                    self._discard(handle)
                case Answer(waiter=waiter, message=message):
                    self._notes.changes(waiter.session, waiter.request, message)
                    self._reply(waiter.reply_to, waiter.session, message)

    def _discard(self, image: Handle) -> None:
        """Nobody finds it any more, even if its file stays."""
        try:
            if self._images.discard(image):
                self._history.add("discarded", f"the image {image.segment}")
        except DiskError as error:
            self._images.give_up(image)
            self._history.add("disk", str(error))
