"""The index of sealed blocks: which bytes are where, who pins them, which go first. Pure.

Owns blocks by their digest. Invariants: a block is evicted only while nobody pins it, the least
recently used first; a session's pins on it count one by one. Where extents lie, and that they do
not overlap, is the pool's.
"""

from collections import Counter, OrderedDict, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

from allocator.books import SessionId
from allocator.messages import Extent


@dataclass(slots=True)
class _Cached:
    extent: Extent
    num_pins: int
    last_used: float


class BlockIndex:
    """Of one pool."""

    def __init__(self) -> None:
        self._blocks: dict[bytes, _Cached] = {}
        self._pins: defaultdict[SessionId, Counter[bytes]] = defaultdict(Counter)
        self._unpinned: OrderedDict[bytes, None] = OrderedDict()  # least recently used first
        self.pinned_bytes: Counter[SessionId] = Counter()
        """Of each session; a block that several pin counts for each."""
        self.cached_bytes = 0
        self.evictable_bytes = 0
        """Of the blocks that nobody pins."""
        self.num_evictions = 0

    def __len__(self) -> int:
        return len(self._blocks)

    def __contains__(self, digest: bytes) -> bool:
        return digest in self._blocks

    def __iter__(self) -> Iterator[tuple[bytes, Extent]]:
        """Every block, those that were used last at the end."""
        order = [*self._unpinned, *(d for d in self._blocks if d not in self._unpinned)]
        for digest in order:
            yield digest, self._blocks[digest].extent

    def extent(self, digest: bytes) -> Extent | None:
        """Where it lies."""
        block = self._blocks.get(digest)
        return None if block is None else block.extent

    def offsets(self) -> set[int]:
        """Where all of them lie."""
        return {block.extent.offset for block in self._blocks.values()}

    def unpinned_offsets(self) -> set[int]:
        """Where those lie that nobody pins."""
        return {self._blocks[digest].extent.offset for digest in self._unpinned}

    # --- keeping and giving up

    def keep(self, digest: bytes, extent: Extent, now: float) -> None:
        """A new block, which nobody pins yet."""
        self._blocks[digest] = _Cached(extent, 0, now)
        self._unpinned[digest] = None
        self.cached_bytes += extent.num_bytes
        self.evictable_bytes += extent.num_bytes

    def oldest(self) -> float | None:
        """When the block that would be evicted next was used last; None where there is none."""
        digest = next(iter(self._unpinned), None)
        return None if digest is None else self._blocks[digest].last_used

    def evict(self) -> tuple[bytes, Extent] | None:
        """Forget the least recently used block that nobody pins."""
        digest = next(iter(self._unpinned), None)
        if digest is None:
            return None
        extent = self._blocks.pop(digest).extent
        del self._unpinned[digest]
        self.cached_bytes -= extent.num_bytes
        self.evictable_bytes -= extent.num_bytes
        self.num_evictions += 1
        return digest, extent

    # --- pins

    def pin(self, session: SessionId, digest: bytes, now: float) -> None:
        """Once more. Raises KeyError where there is no such block."""
        block = self._blocks[digest]
        if block.num_pins == 0:
            del self._unpinned[digest]
            self.evictable_bytes -= block.extent.num_bytes
        block.num_pins += 1
        block.last_used = now
        if not self._pins[session][digest]:
            self.pinned_bytes[session] += block.extent.num_bytes
        self._pins[session][digest] += 1

    def unpin(self, session: SessionId, digest: bytes, now: float) -> None:
        """Once less; the session pins it."""
        block = self._blocks[digest]
        block.num_pins -= 1
        block.last_used = now
        if block.num_pins == 0:
            self._unpinned[digest] = None
            self.evictable_bytes += block.extent.num_bytes
        self._pins[session][digest] -= 1
        if not self._pins[session][digest]:
            del self._pins[session][digest]
            self.pinned_bytes[session] -= block.extent.num_bytes

    def num_pins(self, session: SessionId, digest: bytes) -> int:
        """How often the session pins the block."""
        return self._pins[session][digest]

    def pins_of(self, session: SessionId) -> list[tuple[bytes, int]]:
        """(digest, how often)."""
        return list(self._pins.get(session, Counter()).items())

    def pins(self) -> Iterator[tuple[SessionId, bytes, int]]:
        """(session, digest, how often)."""
        for session, digests in self._pins.items():
            for digest, count in digests.items():
                yield session, digest, count

    def end_session(self, session: SessionId, now: float) -> None:
        """Its pins are dropped."""
        for digest, count in self.pins_of(session):
            for _ in range(count):
                self.unpin(session, digest, now)
        self._pins.pop(session, None)
        self.pinned_bytes.pop(session, None)

    def check(self) -> None:
        """Raise AssertionError where an invariant does not hold."""
        pins: Counter[bytes] = Counter()
        for counts in self._pins.values():
            pins.update(counts)
        for digest, block in self._blocks.items():
            _assert(block.num_pins == pins[digest], "a block's pins do not add up")
            _assert((digest in self._unpinned) == (block.num_pins == 0), "an unpinned block hides")
        _assert(pins.keys() <= self._blocks.keys(), "a block that is gone is pinned")
        sizes = {digest: block.extent.num_bytes for digest, block in self._blocks.items()}
        for session, counts in self._pins.items():
            num_bytes = sum(sizes[digest] for digest in counts)
            _assert(num_bytes == self.pinned_bytes[session], "pinned bytes do not add up")
        _assert(sum(sizes.values()) == self.cached_bytes, "cached bytes do not add up")
        evictable = sum(sizes[digest] for digest in self._unpinned)
        _assert(evictable == self.evictable_bytes, "evictable bytes do not add up")


def _assert(holds: object, message: str) -> None:
    if not holds:
        raise AssertionError(message)
