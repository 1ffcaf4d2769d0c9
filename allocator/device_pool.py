"""A device's pool: its numbers, its memory and its part of the journal, joined.

Owns what requests about leases and blocks do. Invariants: the pool gets its segment with the first
lease; an extent that can't have memory is not leased; a change is in the journal before its reply
leaves. Knows nothing of weight sets, but that giving one up may make room.
"""

from collections.abc import Callable, Iterable, Iterator

from allocator.backends import Backend
from allocator.device_memory import AnyEffect, DeviceMemory, size
from allocator.errors import OutOfDeviceMemory
from allocator.fair_share import FairShare
from allocator.messages import (
    MAX_BATCH,
    Blocks,
    BlocksPut,
    Done,
    Extent,
    GetShare,
    Handle,
    Lease,
    Leased,
    LeaseId,
    LookUpBlocks,
    Message,
    PutBlocks,
    Reply,
    Return,
    Share,
    UnpinBlocks,
)
from allocator.records import BlocksKept, LeasesEnded, LeasesMade, Note, PinsChanged, PoolMade
from allocator.weight_set import SessionId

PoolRequest = Lease | Return | PutBlocks | LookUpBlocks | UnpinBlocks | GetShare


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
        self._shares = FairShare()

    def dispatch(self, session: SessionId, request: PoolRequest, now: float) -> Reply:
        """Do it. Raises AllocatorError."""
        device, pool = self._backend.device, self._memory.pool
        match request:
            case Lease(num_bytes=num_bytes, count=count):
                return self._within_share(session, num_bytes, count, now)
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
            case GetShare():
                return self._share(session, now)
            case UnpinBlocks(digests=digests):
                pool.unpin(session, digests, now)
                self._note_pins(session, digests, pinned=False)
        return Done()

    @property
    def handle(self) -> Handle | None:
        """The pool's segment, once somebody has leased from it."""
        return self._handle

    def end_session(self, session: SessionId) -> None:
        """It wants nothing any more."""
        self._shares.served(session)

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

    def _within_share(self, session: SessionId, num_bytes: int, count: int, now: float) -> Leased:
        """Lease, unless others lack what this session would hold beyond its share."""
        share = self._share(session, now)
        entitled = share.held_bytes + num_bytes * count <= share.fair_bytes
        if share.wanted and not entitled:
            raise OutOfDeviceMemory(
                f"other sessions lack room: this one holds {size(share.held_bytes)} of the KV "
                f"pool, an equal part is {size(share.fair_bytes)}"
            )
        try:
            leased = self._lease(session, num_bytes, count)
        except OutOfDeviceMemory:
            if entitled:
                self._shares.refused(session, now)
            raise
        self._shares.served(session)
        return leased

    def _share(self, session: SessionId, now: float) -> Share:
        memory, pool = self._memory, self._memory.pool
        total_bytes = pool.total_bytes
        if memory.limit_bytes is not None:
            rest = memory.limit_bytes - memory.sets.num_bytes("device")
            total_bytes = max(0, min(total_bytes, rest))
        held = pool.held_by_session()
        return Share(
            held_bytes=held[session],
            fair_bytes=self._shares.bytes_for(session, total_bytes, held, now),
            wanted=self._shares.is_wanted(session, now),
        )

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
