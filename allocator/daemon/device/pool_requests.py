"""What the requests on a device's pool do: leases, blocks, and everybody's share.

Owns their handlers. Invariants: the pool gets its segment with the first lease; an extent that
can't have memory is not leased; a refused request changes nothing.
"""

from allocator.backends.room import size
from allocator.daemon.device.parts import Asked, Parts
from allocator.daemon.pool.fair_share import FairShare
from allocator.errors import DeviceError, OutOfDeviceMemory, RoomTaken
from allocator.messages import (
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
    MakeRoom,
    PutBlocks,
    Return,
    Share,
    UnpinBlocks,
)


class PoolRequests:
    """Of one device."""

    def __init__(self, parts: Parts, prefix_cache_limit: int | None) -> None:
        """Blocks that nobody pins may take `prefix_cache_limit` bytes."""
        self._parts = parts
        self._memory = parts.memory
        self._shares = FairShare()
        self._prefix_cache_limit = prefix_cache_limit

    # --- leases

    def lease(self, asked: Asked, lease: Lease) -> Leased:
        """Lease, unless others lack what this session would hold beyond its share, or an older task
        of another session lacks room for itself."""
        session, now, pool = asked.number, asked.now, self._memory.pool
        self._shares.heard(session, now)
        shares, share = self._shares, self._share(session, now)
        num_bytes = pool.rounded(lease.num_bytes) * lease.count
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
            if could_fit and shares.others_come_on(session, pool.held_by_session(), now):
                raise RoomTaken(str(error)) from error
            raise OutOfDeviceMemory(str(error)) from error
        shares.served(session)
        return leased

    def give_back(self, asked: Asked, request: Return) -> Done:
        """Their extents are free, and their memory is the device's again."""
        self._shares.heard(asked.number, asked.now)
        self._parts.apply(self._memory.give_back(asked.number, request.leases))
        return Done()

    def make_room(self, asked: Asked, request: MakeRoom) -> Done:
        """The device refused to commit what fits by our count: others use it, and may use other
        bounds than we see. Raises RoomTaken, OutOfDeviceMemory."""
        room, memory = self._parts.room, self._memory
        room.look_anew(asked.now)
        effects = memory.give_way(request.num_bytes)
        self._parts.apply(effects)
        room.look_anew(asked.now)
        if effects or not memory.overdrawn_bytes:
            return Done()
        problem = memory.shortage(request.num_bytes)
        if self._lacks_room(asked.number, asked.now):
            raise RoomTaken(problem)
        raise OutOfDeviceMemory(problem)

    # --- blocks

    def put(self, asked: Asked, request: PutBlocks) -> BlocksPut:
        """Extents become blocks of the index, pinned by who put them."""
        self._shares.heard(asked.number, asked.now)
        stored = self._memory.put(asked.number, request.blocks, asked.now)
        return BlocksPut(stored=tuple(stored))

    def look_up(self, asked: Asked, request: LookUpBlocks) -> Blocks:
        """What is there is pinned once more."""
        self._shares.heard(asked.number, asked.now)
        found = self._memory.pool.look_up(asked.number, request.digests, asked.now)
        return Blocks(pool=self._segment(), extents=tuple(found))

    def unpin(self, asked: Asked, request: UnpinBlocks) -> Done:
        """Whom nobody pins may stay, as long as the prefix cache may hold it."""
        self._shares.heard(asked.number, asked.now)
        self._memory.pool.unpin(asked.number, request.digests, asked.now)
        return Done()

    def shed(self) -> None:
        """Nobody needs more unpinned blocks than the prefix cache may hold."""
        if self._prefix_cache_limit is not None:
            self._parts.apply(self._memory.eviction.blocks_until(self._prefix_cache_limit))

    # --- shares

    def share(self, asked: Asked, _request: GetShare) -> Share:
        """It also shows that this session is at work."""
        self._shares.heard(asked.number, asked.now)
        return self._share(asked.number, asked.now)

    def end_session(self, session: int) -> None:
        """It wants nothing any more."""
        self._shares.ended(session)

    def _share(self, session: int, now: float) -> Share:
        memory, held = self._memory, self._memory.pool.held_by_session()
        older = self._shares.older_than(session, 0, now)
        return Share(
            held_bytes=held[session],
            fair_bytes=self._shares.bytes_for(session, memory.leasable_bytes, held, now),
            wanted=self._shares.is_wanted(session, now) or memory.overdrawn_bytes > 0,
            older_since_ms=0 if older is None else older.since_ms,
        )

    def _lacks_room(self, session: int, now: float) -> bool:
        """What it was leased could not be committed, and nothing is left to be given up for it:
        others must give back. Whether any are at work."""
        share = self._share(session, now)
        if share.held_bytes <= share.fair_bytes:
            self._shares.refused(session, now)
        return self._shares.others_come_on(session, self._memory.pool.held_by_session(), now)

    # --- steps

    def _lease(self, session: int, num_bytes: int, count: int) -> Leased:
        handle, pool = self._segment(), self._memory.pool
        extents, effects = self._memory.lease(session, num_bytes, count)
        self._parts.apply(effects)
        generation = pool.generation
        made: list[Extent] = []
        try:
            for extent in extents:
                self._parts.pool.clean(handle, extent)
                self._reserve(handle, extent)
                made.append(extent)
        except (OutOfDeviceMemory, DeviceError):
            for extent in made:
                self._parts.pool.free(extent)
            pool.give_back(session, [LeaseId(extent.offset, generation) for extent in extents])
            raise
        return Leased(pool=handle, extents=tuple(extents), generation=generation)

    def _reserve(self, handle: Handle, extent: Extent) -> None:
        """A device that only tells by refusing can be short below our limit."""
        while True:
            try:
                self._parts.backend.reserve_extent(handle.segment, extent)
            except OutOfDeviceMemory:
                effects = self._memory.eviction.one(owned=True)
                if not effects:
                    raise
                self._parts.apply(effects)
            else:
                return

    def _segment(self) -> Handle:
        """The pool's, which is made for the first who needs it."""
        handle = self._parts.pool.handle
        if handle is None:
            handle = self._parts.pool.make(self._memory.pool.total_bytes)
            self._parts.notes.pool_made(handle)
        return handle
