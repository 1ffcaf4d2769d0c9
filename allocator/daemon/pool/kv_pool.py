"""The pool: extents that sessions lease for KV blocks, and the index of blocks they have sealed.

    lease            put                       evict (least recently used, unpinned)
    free ──► leased ──────► cached, pinned ⇄ cached ──► free
      ▲         │
      └─────────┘ return, or the session's end

Owns which extent is whose; the blocks themselves are `pool.block_index`'s. A block is
content-addressed: its digest names the bytes, so that who looks it up maps what another computed.
Pure: no memory, no I/O, no clock of its own. Invariants:
  - leased + cached + free = total, and no two extents overlap;
  - a block is evicted only while no session pins it;
  - a session's end gives back its leases and its pins.
Knows nothing of models or tokens.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from allocator.books import SessionId
from allocator.daemon.pool.arena import Arena
from allocator.daemon.pool.block_index import BlockIndex
from allocator.errors import DoubleFree, ForeignExtent, StaleGeneration
from allocator.messages import BlockToPut, Extent, LeaseId, PoolStatistics, Region


@dataclass(slots=True)
class _Lease:
    session: SessionId
    generation: int
    num_bytes: int


class KVPool:
    """Offsets [0, num_bytes) of one device's pool."""

    def __init__(self, num_bytes: int, granularity: int) -> None:
        self._arena = Arena(num_bytes, granularity)
        self._generation = 0
        self._leases: dict[int, _Lease] = {}  # by offset
        self._held: defaultdict[SessionId, set[int]] = defaultdict(set)  # offsets
        self._held_bytes: Counter[SessionId] = Counter()
        self._index = BlockIndex()
        self._num_lookups = self._num_hits = 0

    @property
    def total_bytes(self) -> int:
        """The pool's size, a multiple of the granularity."""
        return self._arena.total_bytes

    @property
    def leased_bytes(self) -> int:
        """Of all sessions together."""
        return self._arena.used_bytes - self._index.cached_bytes

    @property
    def cached_bytes(self) -> int:
        """Of all blocks of the index."""
        return self._index.cached_bytes

    @property
    def evictable_bytes(self) -> int:
        """Of the blocks that nobody pins."""
        return self._index.evictable_bytes

    @property
    def free_bytes(self) -> int:
        """Neither leased nor cached, in however many pieces."""
        return self._arena.total_bytes - self._arena.used_bytes

    # --- leases

    def rounded(self, num_bytes: int) -> int:
        """What an extent of so many bytes takes."""
        return self._arena.rounded(num_bytes)

    def lease(self, session: SessionId, num_bytes: int, count: int) -> list[Extent] | None:
        """`count` extents under a new `generation`; None, and nothing leased, where they do not fit
        as the pool is now fragmented."""
        extents: list[Extent] = []
        for _ in range(count):
            offset = self._arena.allocate(num_bytes)
            if offset is None:
                for extent in extents:
                    self._arena.free(extent.offset)
                return None
            extents.append(Extent(offset=offset, num_bytes=self._arena.size_of(offset)))
        self._generation += 1
        for extent in extents:
            self._hold(session, extent, self._generation)
        return extents

    def most_leases(self, num_bytes: int) -> int:
        """How many extents of that size there could be once every block that nobody pins is gone.
        Looks through all extents."""
        evictable = self._index.unpinned_offsets()
        rounded, found, run = self._arena.rounded(num_bytes), 0, 0
        for offset, length, free in self._arena.extents():
            if free or offset in evictable:
                run += length
            else:
                found, run = found + run // rounded, 0
        return found + run // rounded

    @property
    def generation(self) -> int:
        """That of the latest lease."""
        return self._generation

    def give_back(self, session: SessionId, leases: Sequence[LeaseId]) -> list[Extent]:
        """Free leased extents: all, or none where one is refused.

        Raises DoubleFree, ForeignExtent, StaleGeneration.
        """
        seen: set[int] = set()
        for lease in leases:
            if lease.offset in seen:
                raise DoubleFree(f"the extent at offset {lease.offset} is named twice")
            seen.add(lease.offset)
            self._check_lease(session, lease.offset, lease.generation)
        return [self._let_go(lease.offset, free=True) for lease in leases]

    # --- blocks

    def put(self, session: SessionId, blocks: Sequence[BlockToPut], now: float) -> list[bool]:
        """Hand leased extents to the index, pinned by this session; False where the index has the
        digest already, and the extent stays leased. Refusals as for `give_back`, and then nothing
        is put."""
        seen: set[int] = set()
        for block in blocks:
            if block.offset in seen:
                raise DoubleFree(f"the extent at offset {block.offset} is named twice")
            seen.add(block.offset)
            self._check_lease(session, block.offset, block.generation)
        stored: list[bool] = []
        for block in blocks:
            stored.append(block.digest not in self._index)
            if stored[-1]:
                extent = self._let_go(block.offset, free=False)
                self._index.keep(block.digest, extent, now)
                self._index.pin(session, block.digest, now)
        return stored

    def look_up(self, session: SessionId, digests: Sequence[bytes], now: float) -> list[Extent]:
        """The blocks from the first up to the first that is missing, each pinned once more."""
        found: list[Extent] = []
        for digest in digests:
            extent = self._index.extent(digest)
            if extent is None:
                break
            self._index.pin(session, digest, now)
            found.append(extent)
        self._num_lookups += len(digests)
        self._num_hits += len(found)
        return found

    def unpin(self, session: SessionId, digests: Sequence[bytes], now: float) -> None:
        """One pin less on each. Raises ForeignExtent, and unpins nothing, where this session does
        not pin one of them so often."""
        for digest, count in Counter(digests).items():
            if self._index.num_pins(session, digest) < count:
                raise ForeignExtent(f"this session does not pin the block {digest.hex()}")
        for digest in digests:
            self._index.unpin(session, digest, now)

    def oldest_block(self) -> float | None:
        """When the block that would be evicted next was used last; None where there is none."""
        return self._index.oldest()

    def evict_block(self) -> tuple[bytes, Extent] | None:
        """Free the least recently used block that nobody pins."""
        evicted = self._index.evict()
        if evicted is not None:
            self._arena.free(evicted[1].offset)
        return evicted

    # --- sessions

    def end_session(self, session: SessionId, now: float) -> list[Extent]:
        """Its leases are freed, its pins dropped."""
        self._index.end_session(session, now)
        freed = [self._let_go(offset, free=True) for offset in sorted(self._held[session])]
        del self._held[session]
        self._held_bytes.pop(session, None)
        return freed

    def held(self, session: SessionId) -> tuple[int, int, int]:
        """(leased bytes, leases, pins) of a session."""
        return (
            self._held_bytes[session],
            len(self._held.get(session, ())),
            sum(count for _, count in self._index.pins_of(session)),
        )

    def held_by_session(self) -> Counter[SessionId]:
        """Bytes that each session leases or pins; a block that several pin counts for each."""
        return self._held_bytes + self._index.pinned_bytes

    def leases_of(self, session: SessionId) -> list[LeaseId]:
        """By offset."""
        return [
            LeaseId(offset, self._leases[offset].generation)
            for offset in sorted(self._held.get(session, ()))
        ]

    def pins_of(self, session: SessionId) -> list[tuple[bytes, int]]:
        """(digest, how often)."""
        return self._index.pins_of(session)

    # --- taking over what an earlier daemon left

    def leases(self) -> Iterator[tuple[SessionId, int, Extent]]:
        """(session, generation, extent) of every lease."""
        for offset, lease in self._leases.items():
            yield (
                lease.session,
                lease.generation,
                Extent(offset=offset, num_bytes=lease.num_bytes),
            )

    def blocks(self) -> Iterator[tuple[bytes, Extent]]:
        """Every block of the index, those that were used last at the end."""
        return iter(self._index)

    def pins(self) -> Iterator[tuple[SessionId, bytes, int]]:
        """(session, digest, how often)."""
        return self._index.pins()

    def restore(
        self,
        leases: Iterable[tuple[SessionId, int, Extent]],
        blocks: Iterable[tuple[bytes, Extent]],
        pins: Iterable[tuple[SessionId, bytes, int]],
        now: float,
    ) -> None:
        """Hold exactly this, as `leases`, `blocks` and `pins` tell it; nothing is held yet. Raises
        ForeignExtent where extents overlap or do not fit, KeyError for a pin of no block; the pool
        is of no use then."""
        leases, blocks = list(leases), list(blocks)
        extents = [extent for _, _, extent in leases] + [extent for _, extent in blocks]
        self._arena.restore((extent.offset, extent.num_bytes) for extent in extents)
        for session, generation, extent in leases:
            self._hold(session, extent, generation)
            self._generation = max(self._generation, generation)
        for digest, extent in blocks:
            self._index.keep(digest, extent, now)
        for session, digest, count in pins:
            for _ in range(count):
                self._index.pin(session, digest, now)

    # --- looking

    def statistics(self) -> PoolStatistics:
        """All in one picture."""
        arena = self._arena.statistics()
        return PoolStatistics(
            total_bytes=arena.total_bytes,
            leased_bytes=arena.used_bytes - self._index.cached_bytes,
            cached_bytes=self._index.cached_bytes,
            evictable_bytes=self._index.evictable_bytes,
            largest_free_bytes=arena.largest_free_bytes,
            fragmentation=arena.fragmentation,
            num_leases=len(self._leases),
            num_blocks=len(self._index),
            num_lookups=self._num_lookups,
            num_hits=self._num_hits,
            num_block_evictions=self._index.num_evictions,
        )

    def regions(self) -> Iterator[Region]:
        """The whole pool by offset, neighbours of one kind and holder merged."""
        cached = self._index.offsets()
        last: Region | None = None
        for offset, num_bytes, free in self._arena.extents():
            if free:
                region = Region(offset, num_bytes, "free")
            elif offset in cached:
                region = Region(offset, num_bytes, "cached")
            else:
                region = Region(offset, num_bytes, "leased", self._leases[offset].session)
            if last is not None and (last.kind, last.holder) == (region.kind, region.holder):
                last = Region(last.offset, last.num_bytes + num_bytes, last.kind, last.holder)
                continue
            if last is not None:
                yield last
            last = region
        if last is not None:
            yield last

    def check(self) -> None:
        """Raise AssertionError where an invariant does not hold."""
        self._arena.check()
        taken = {offset: num_bytes for offset, num_bytes, free in self._arena.extents() if not free}
        ours = {offset: lease.num_bytes for offset, lease in self._leases.items()}
        for _, extent in self._index:
            _assert(extent.offset not in ours, "an extent is leased and cached")
            ours[extent.offset] = extent.num_bytes
        _assert(ours == taken, "leases and blocks are not what the arena has given out")
        held = {offset for offsets in self._held.values() for offset in offsets}
        _assert(held == self._leases.keys(), "a lease belongs to no session")
        for session, offsets in self._held.items():
            num_bytes = sum(self._leases[offset].num_bytes for offset in offsets)
            _assert(num_bytes == self._held_bytes[session], "a session's bytes do not add up")
        self._index.check()

    # --- steps

    def _check_lease(self, session: SessionId, offset: int, generation: int) -> None:
        lease = self._leases.get(offset)
        if lease is None:
            self._arena.refuse_unknown(offset)
            raise ForeignExtent(f"the extent at offset {offset} is a sealed block")
        if lease.session != session:
            raise ForeignExtent(f"the extent at offset {offset} belongs to another session")
        if lease.generation != generation:
            raise StaleGeneration(
                f"the lease of offset {offset} in generation {generation} is gone; it is now "
                f"{lease.generation}"
            )

    def _hold(self, session: SessionId, extent: Extent, generation: int) -> None:
        self._leases[extent.offset] = _Lease(session, generation, extent.num_bytes)
        self._held[session].add(extent.offset)
        self._held_bytes[session] += extent.num_bytes

    def _let_go(self, offset: int, *, free: bool) -> Extent:
        lease = self._leases.pop(offset)
        self._held[lease.session].discard(offset)
        self._held_bytes[lease.session] -= lease.num_bytes
        if free:
            self._arena.free(offset)
        return Extent(offset=offset, num_bytes=lease.num_bytes)


def _assert(holds: object, message: str) -> None:
    if not holds:
        raise AssertionError(message)
