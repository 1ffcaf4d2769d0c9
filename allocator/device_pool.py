"""A device's pool: its numbers, its memory and its part of the journal, joined.

Owns what requests about leases and blocks do. Invariants: the pool gets its segment with the first
lease; an extent that can't have memory is not leased; a change is in the journal before its reply
leaves. Knows nothing of weight sets, but that giving one up may make room.
"""

from collections.abc import Callable, Iterable, Iterator

from allocator.backends import Backend
from allocator.device_memory import AnyEffect, DeviceMemory
from allocator.errors import OutOfDeviceMemory
from allocator.messages import (
    MAX_BATCH,
    Blocks,
    BlocksPut,
    Done,
    Extent,
    Handle,
    Lease,
    Leased,
    LeaseId,
    LookUpBlocks,
    Message,
    PutBlocks,
    Reply,
    Return,
    UnpinBlocks,
)
from allocator.records import BlocksKept, LeasesEnded, LeasesMade, Note, PinsChanged, PoolMade
from allocator.weight_set import SessionId

PoolRequest = Lease | Return | PutBlocks | LookUpBlocks | UnpinBlocks


class DevicePool:
    """Of one device."""

    def __init__(
        self,
        backend: Backend,
        memory: DeviceMemory,
        new_handle: Callable[[int], Handle],
        apply: Callable[[Iterable[AnyEffect]], None],
        note: Note,
        adopted: Handle | None,
    ) -> None:
        """`new_handle` names a segment of so many bytes; `adopted` is an earlier daemon's pool."""
        self._backend = backend
        self._memory = memory
        self._new_handle = new_handle
        self._apply = apply
        self._note = note
        self._handle = adopted

    def dispatch(self, session: SessionId, request: PoolRequest, now: float) -> Reply:
        """Do it. Raises AllocatorError."""
        device, pool = self._backend.device, self._memory.pool
        match request:
            case Lease(num_bytes=num_bytes, count=count):
                return self._lease(session, num_bytes, count)
            case Return(leases=leases):
                self._apply(self._memory.give_back(session, leases))
                offsets = tuple(lease.offset for lease in leases)
                self._note(LeasesEnded(device=device, session=session, offsets=offsets))
            case PutBlocks(blocks=blocks):
                stored = self._memory.put(session, blocks, now)
                kept = [b.digest for b, new in zip(blocks, stored, strict=True) if new]
                if kept:
                    taken = tuple((digest, pool.block(digest)) for digest in kept)
                    self._note(BlocksKept(device=device, session=session, blocks=taken))
                return BlocksPut(stored=tuple(stored))
            case LookUpBlocks(digests=digests):
                found = pool.look_up(session, digests, now)
                if found:
                    self._note_pins(session, digests[: len(found)], pinned=True)
                return Blocks(pool=self._made(), extents=tuple(found))
            case UnpinBlocks(digests=digests):
                pool.unpin(session, digests, now)
                self._note_pins(session, digests, pinned=False)
        return Done()

    def free_extent(self, extent: Extent) -> None:
        """Take its memory back."""
        if self._handle is not None:
            self._backend.free_extent(self._handle.segment, extent)

    def close(self) -> None:
        """Give the segment back."""
        if self._handle is not None:
            self._backend.free(self._handle.segment)

    def records(self) -> Iterator[Message]:
        """All that the next daemon needs to know of the pool."""
        if self._handle is None:
            return
        device, pool = self._backend.device, self._memory.pool
        yield self._record(self._handle)
        for session, generation, extent in pool.leases():
            yield LeasesMade(
                device=device, session=session, generation=generation, extents=(extent,)
            )
        for digest, extent in pool.blocks():
            yield BlocksKept(device=device, session=0, blocks=((digest, extent),))
        for session, digest, count in pool.pins():
            for start in range(0, count, MAX_BATCH):
                digests = (digest,) * min(MAX_BATCH, count - start)
                yield PinsChanged(device=device, session=session, digests=digests, pinned=True)

    # --- steps

    def _lease(self, session: SessionId, num_bytes: int, count: int) -> Leased:
        handle, pool = self._made(), self._memory.pool
        extents, effects = self._memory.lease(session, num_bytes, count)
        self._apply(effects)
        generation = pool.generation
        made: list[Extent] = []
        try:
            for extent in extents:
                self._reserve(handle, extent)
                made.append(extent)
        except OutOfDeviceMemory:
            for extent in made:
                self._backend.free_extent(handle.segment, extent)
            pool.give_back(session, [LeaseId(extent.offset, generation) for extent in extents])
            raise
        leased = Leased(pool=handle, extents=tuple(extents), generation=generation)
        self._note(
            LeasesMade(
                device=self._backend.device,
                session=session,
                generation=generation,
                extents=leased.extents,
            )
        )
        return leased

    def _reserve(self, handle: Handle, extent: Extent) -> None:
        """Others use the device as well, so it can be short below our limit."""
        while True:
            try:
                self._backend.reserve_extent(handle.segment, extent)
            except OutOfDeviceMemory:
                effects = self._memory.evict_one()
                if not effects:
                    raise
                self._apply(effects)
            else:
                return

    def _made(self) -> Handle:
        if self._handle is None:
            handle = self._new_handle(self._memory.pool.total_bytes)
            self._backend.reserve_pool(handle.segment, handle.num_bytes)
            self._handle = handle
            self._note(self._record(handle), True)
        return self._handle

    def _record(self, handle: Handle) -> PoolMade:
        identity = self._backend.identity(handle.segment)
        return PoolMade(device=self._backend.device, handle=handle, identity=identity)

    def _note_pins(self, session: SessionId, digests: tuple[bytes, ...], *, pinned: bool) -> None:
        device = self._backend.device
        self._note(PinsChanged(device=device, session=session, digests=digests, pinned=pinned))
