"""A device's pool: its numbers, its memory and its part of the journal, joined.

Owns what requests about leases and blocks do. Invariants: the pool gets its segment with the first
lease; an extent that can't have memory is not leased, nor one whose last holder's bytes are still
in it; a change is in the journal before its reply leaves. Knows nothing of weight sets, but that
giving one up may make room.
"""

import logging
from collections.abc import Callable, Iterable, Iterator

from allocator.backends import Backend
from allocator.backends.room import size
from allocator.daemon.budget import AnyEffect, DeviceMemory
from allocator.daemon.journal.records import (
    BlocksKept,
    LeasesEnded,
    LeasesMade,
    Note,
    PinsChanged,
    PoolMade,
)
from allocator.daemon.pool.fair_share import FairShare
from allocator.daemon.weights.state import SessionId
from allocator.errors import DeviceError, OutOfDeviceMemory, RoomTaken
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

log = logging.getLogger("onecopy.allocator")

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
        """`new_handle` makes the pool's segment of so many bytes; `adopted` is an earlier daemon's
        pool."""
        self._backend = backend
        self._memory = memory
        self._new_handle = new_handle
        self._apply = apply
        self._note = note
        self._handle = adopted
        self._shares = FairShare()
        self._unclean: dict[int, Extent] = {}
        """By offset: free, but their memory could not be taken back yet."""

    def dispatch(self, session: SessionId, request: PoolRequest, now: float) -> Reply:
        """Do it. Raises AllocatorError."""
        device, pool = self._backend.device, self._memory.pool
        self._shares.heard(session, now)
        match request:
            case Lease():
                return self._within_share(session, request, now)
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
        self._shares.ended(session)

    def lacks_room(self, session: SessionId, now: float) -> bool:
        """What it was leased could not be committed, and nothing is left to be given up for it:
        others must give back. Whether any are at work."""
        share = self._share(session, now)
        if share.held_bytes <= share.fair_bytes:
            self._shares.refused(session, now)
        return self._shares.others_come_on(session, self._memory.pool.held_by_session(), now)

    def free_extent(self, extent: Extent) -> None:
        """Take its memory back. Where that fails it is tried again before anybody leases it."""
        if self._handle is None:
            return
        try:
            self._backend.free_extent(self._handle.segment, extent)
        except DeviceError as error:
            log.warning("%s", error)
            self._unclean[extent.offset] = extent

    def hold(self) -> None:
        """Be able to take extents' memory back, whatever becomes scarce later. Raises
        DeviceError."""
        if self._handle is not None:
            self._backend.hold_pool(self._handle.segment)

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

    def _within_share(self, session: SessionId, lease: Lease, now: float) -> Leased:
        """Lease, unless others lack what this session would hold beyond its share, or an older task
        of another session lacks room for itself."""
        shares, share = self._shares, self._share(session, now)
        num_bytes = self._memory.pool.rounded(lease.num_bytes) * lease.count
        entitled = share.held_bytes + num_bytes <= share.fair_bytes
        older = shares.older_than(session, lease.alone_since_ms, now)
        try:
            if older is not None:
                raise RoomTaken("another session lacks room for a task that is older")
            if share.wanted and not entitled and not lease.alone_since_ms:
                raise RoomTaken(
                    f"other sessions lack room: this one holds {size(share.held_bytes)} of the KV "
                    f"pool, an equal part is {size(share.fair_bytes)}"
                )
            leased = self._lease(session, lease.num_bytes, lease.count)
        except OutOfDeviceMemory as error:
            could_fit = share.held_bytes + num_bytes <= self._memory.leasable_bytes
            if older is None and could_fit:
                if entitled:
                    shares.refused(session, now)
                if lease.alone_since_ms:
                    shares.refused_alone(session, lease.alone_since_ms, now)
            held = self._memory.pool.held_by_session()
            if could_fit and shares.others_come_on(session, held, now):
                raise RoomTaken(str(error)) from error
            raise OutOfDeviceMemory(str(error)) from error
        shares.served(session)
        return leased

    def _share(self, session: SessionId, now: float) -> Share:
        memory, held = self._memory, self._memory.pool.held_by_session()
        older = self._shares.older_than(session, 0, now)
        return Share(
            held_bytes=held[session],
            fair_bytes=self._shares.bytes_for(session, memory.leasable_bytes, held, now),
            wanted=self._shares.is_wanted(session, now) or memory.overdrawn_bytes > 0,
            older_since_ms=0 if older is None else older.since_ms,
        )

    def _lease(self, session: SessionId, num_bytes: int, count: int) -> Leased:
        handle, pool = self._made(), self._memory.pool
        extents, effects = self._memory.lease(session, num_bytes, count)
        self._apply(effects)
        generation = pool.generation
        made: list[Extent] = []
        try:
            for extent in extents:
                self._clean(handle, extent)
                self._reserve(handle, extent)
                made.append(extent)
        except (OutOfDeviceMemory, DeviceError):
            for extent in made:
                self.free_extent(extent)
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

    def _clean(self, handle: Handle, extent: Extent) -> None:
        """What was left in it by its last holder goes. Raises DeviceError."""
        end = extent.offset + extent.num_bytes
        for offset, left in list(self._unclean.items()):
            if offset < end and extent.offset < offset + left.num_bytes:
                self._backend.free_extent(handle.segment, left)
                del self._unclean[offset]

    def _reserve(self, handle: Handle, extent: Extent) -> None:
        """A device that only tells by refusing can be short below our limit."""
        while True:
            try:
                self._backend.reserve_extent(handle.segment, extent)
            except OutOfDeviceMemory:
                effects = self._memory.evict_one(owned=True)
                if not effects:
                    raise
                self._apply(effects)
            else:
                return

    def _made(self) -> Handle:
        if self._handle is None:
            handle = self._new_handle(self._memory.pool.total_bytes)
            self._handle = handle
            self._note(self._record(handle), True)
        return self._handle

    def _record(self, handle: Handle) -> PoolMade:
        identity = self._backend.identity(handle.segment)
        return PoolMade(device=self._backend.device, handle=handle, identity=identity)

    def _note_pins(self, session: SessionId, digests: tuple[bytes, ...], *, pinned: bool) -> None:
        device = self._backend.device
        self._note(PinsChanged(device=device, session=session, digests=digests, pinned=pinned))
