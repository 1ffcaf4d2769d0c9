"""The arena: which bytes of a segment are leased, and where the next ones come from. Pure.

Owns offsets, by a two-level segregated fit: free extents lie in bins by size, two levels of bit
maps tell which bins are not empty, and neighbours are linked, so that allocating and freeing take
constant time however many extents there are. (M. Masmano, I. Ripoll, A. Crespo and J. Real, "TLSF:
a new dynamic memory allocator for real-time systems", ECRTS 2004.)

Invariants: extents never overlap, leased + free = total, and no two free extents are neighbours.
Knows nothing of segments, sessions or memory.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Final

from allocator.errors import DoubleFree, ForeignExtent, InvalidMessage

_SECOND_LEVEL_BITS: Final = 4
"""Each power of two is divided into 16 bins: at most 1/16 of a fit is wasted in the search."""
_SECOND_LEVEL: Final = 1 << _SECOND_LEVEL_BITS


class _Chunk:
    """An extent of granules [start, start + size), leased or free, and its links."""

    __slots__ = ("after", "before", "bin_next", "bin_previous", "free", "size", "start")

    def __init__(self, start: int, size: int):
        self.start = start
        self.size = size
        self.free = False
        self.before: _Chunk | None = None  # the neighbour at the lower offset
        self.after: _Chunk | None = None
        self.bin_previous: _Chunk | None = None
        self.bin_next: _Chunk | None = None


@dataclass(frozen=True)
class ArenaStatistics:
    """Bytes. `fragmentation` is 0 where all that is free is in one piece, and goes towards 1."""

    total_bytes: int
    used_bytes: int
    free_bytes: int
    largest_free_bytes: int
    num_extents: int

    @property
    def fragmentation(self) -> float:
        """1 - largest free extent / all that is free."""
        return 1 - self.largest_free_bytes / self.free_bytes if self.free_bytes else 0.0


class Arena:
    """Offsets [0, num_bytes), leased in multiples of `alignment` bytes."""

    def __init__(self, num_bytes: int, alignment: int):
        """`alignment` is a power of two; what does not fill a whole multiple at the end is lost."""
        if alignment < 1 or alignment & (alignment - 1):
            raise ValueError(f"the alignment {alignment} is not a power of two")
        self._shift = alignment.bit_length() - 1
        self._total = num_bytes >> self._shift
        if self._total < 1:
            raise ValueError(f"{num_bytes} bytes do not hold one extent of {alignment}")
        self._free = 0
        self._leased: dict[int, _Chunk] = {}  # by start, in granules
        self._first_level_map = 0
        self._second_level_maps = [0] * (self._total.bit_length() + 1)
        self._bins: list[_Chunk | None] = [None] * (_SECOND_LEVEL * len(self._second_level_maps))
        self._first = _Chunk(0, self._total)
        self._put(self._first)

    def allocate(self, num_bytes: int) -> int | None:
        """The offset of a new extent, in bytes; None where no free extent is large enough.

        Raises InvalidMessage for a size that is not positive.
        """
        if num_bytes < 1:
            raise InvalidMessage(f"an extent of {num_bytes} bytes can't be leased")
        size = (num_bytes + (1 << self._shift) - 1) >> self._shift
        block = self._find(size)
        if block is None:
            return None
        self._take(block)
        if block.size > size:
            self._put(self._split(block, size))
        self._leased[block.start] = block
        return block.start << self._shift

    def restore(self, extents: Iterable[tuple[int, int]]) -> None:
        """Lease exactly these (offset, bytes), as an earlier arena had; nothing is leased yet.
        Takes the time of sorting them.

        Raises ForeignExtent where they overlap, or are no multiples of the alignment; the arena is
        of no use then.
        """
        rest = self._first
        self._take(rest)
        for offset, num_bytes in sorted(extents):
            start, size = offset >> self._shift, num_bytes >> self._shift
            aligned = start << self._shift == offset and size << self._shift == num_bytes
            if not aligned or size < 1 or start < rest.start or start + size > self._total:
                raise ForeignExtent(f"the {num_bytes} bytes at offset {offset} can't be leased")
            if start > rest.start:
                block = self._split(rest, start - rest.start)
                self._put(rest)
            else:
                block = rest
            self._leased[start] = block
            if start + size == self._total:
                return
            rest = self._split(block, size)
        self._put(rest)

    def free(self, offset: int) -> None:
        """Give back the extent that `allocate` put at `offset`.

        Raises DoubleFree where that extent is free already, ForeignExtent where none begins there.
        """
        block = self._leased.pop(offset >> self._shift, None)
        if block is None or offset != block.start << self._shift:
            if block is not None:
                self._leased[block.start] = block
            raise self._unknown(offset)
        after, before = block.after, block.before
        if after is not None and after.free:
            self._take(after)
            self._absorb(block, after)
        if before is not None and before.free:
            self._take(before)
            self._absorb(before, block)
            block = before
        self._put(block)

    def size_of(self, offset: int) -> int:
        """Bytes of the leased extent at `offset`. Raises as `free` does."""
        block = self._leased.get(offset >> self._shift)
        if block is None or offset != block.start << self._shift:
            raise self._unknown(offset)
        return block.size << self._shift

    def rounded(self, num_bytes: int) -> int:
        """`num_bytes` as an extent of that size would count."""
        return -(-num_bytes // (1 << self._shift)) << self._shift

    def refuse_unknown(self, offset: int) -> None:
        """Raise DoubleFree or ForeignExtent where no extent is leased at `offset`."""
        if self._leased.get(offset >> self._shift) is None or offset % (1 << self._shift):
            raise self._unknown(offset)

    @property
    def total_bytes(self) -> int:
        """Leased and free together."""
        return self._total << self._shift

    @property
    def used_bytes(self) -> int:
        """Leased."""
        return (self._total - self._free) << self._shift

    def statistics(self) -> ArenaStatistics:
        """Looks through one bin for the largest free extent; the rest is known."""
        return ArenaStatistics(
            total_bytes=self._total << self._shift,
            used_bytes=(self._total - self._free) << self._shift,
            free_bytes=self._free << self._shift,
            largest_free_bytes=self._largest_free() << self._shift,
            num_extents=len(self._leased),
        )

    def extents(self) -> Iterator[tuple[int, int, bool]]:
        """(offset, bytes, whether it is free) of all extents, by offset."""
        block: _Chunk | None = self._first
        while block is not None:
            yield block.start << self._shift, block.size << self._shift, block.free
            block = block.after

    def check(self) -> None:
        """Raise AssertionError where an invariant does not hold. For tests and idle moments."""
        end = free = 0
        previous: _Chunk | None = None
        block: _Chunk | None = self._first
        while block is not None:
            _assert(block.start == end and block.before is previous, "the chain is broken")
            _assert(not (block.free and previous and previous.free), "free neighbours")
            _assert(block.free != (self._leased.get(block.start) is block), "leased and free")
            end += block.size
            free += block.size if block.free else 0
            previous, block = block, block.after
        _assert(end == self._total and free == self._free, "leased + free is not the total")
        binned = 0
        for index, head in enumerate(self._bins):
            level, second = divmod(index, _SECOND_LEVEL)
            _assert(
                bool(self._second_level_maps[level] >> second & 1) == (head is not None),
                "a bit map does not match its bin",
            )
            while head is not None:
                _assert(head.free and _bin_of(head.size) == (level, second), "in the wrong bin")
                binned += head.size
                head = head.bin_next
        _assert(binned == free, "a free extent is in no bin")

    # --- bins

    def _find(self, size: int) -> _Chunk | None:
        # The first bin all of whose extents fit; of the bin that `size` itself belongs to, only the
        # head is looked at, which keeps the time constant and finds what just came back.
        level, second = _bin_of(size)
        if level < len(self._second_level_maps):
            head = self._bins[level * _SECOND_LEVEL + second]
            if head is not None and head.size >= size:
                return head
            bits = self._second_level_maps[level] >> (second + 1) << (second + 1)
        else:
            return None
        if not bits:
            levels = self._first_level_map >> (level + 1) << (level + 1)
            if not levels:
                return self._last_resort(level, second, size)
            level = (levels & -levels).bit_length() - 1
            bits = self._second_level_maps[level]
        return self._bins[level * _SECOND_LEVEL + (bits & -bits).bit_length() - 1]

    def _last_resort(self, level: int, second: int, size: int) -> _Chunk | None:
        """Before memory is called short, the whole bin that `size` belongs to is looked through."""
        block = self._bins[level * _SECOND_LEVEL + second]
        while block is not None and block.size < size:
            block = block.bin_next
        return block

    def _put(self, block: _Chunk) -> None:
        level, second = _bin_of(block.size)
        index = level * _SECOND_LEVEL + second
        head = self._bins[index]
        block.free = True
        block.bin_previous = None
        block.bin_next = head
        if head is not None:
            head.bin_previous = block
        self._bins[index] = block
        self._second_level_maps[level] |= 1 << second
        self._first_level_map |= 1 << level
        self._free += block.size

    def _take(self, block: _Chunk) -> None:
        previous, following = block.bin_previous, block.bin_next
        if following is not None:
            following.bin_previous = previous
        if previous is not None:
            previous.bin_next = following
        else:
            level, second = _bin_of(block.size)
            self._bins[level * _SECOND_LEVEL + second] = following
            if following is None:
                self._second_level_maps[level] &= ~(1 << second)
                if not self._second_level_maps[level]:
                    self._first_level_map &= ~(1 << level)
        block.free = False
        self._free -= block.size

    def _split(self, block: _Chunk, size: int) -> _Chunk:
        """Cut `block`, which is in no bin, to `size` granules; the rest is returned, in no bin."""
        rest = _Chunk(block.start + size, block.size - size)
        block.size = size
        rest.before, rest.after = block, block.after
        if block.after is not None:
            block.after.before = rest
        block.after = rest
        return rest

    def _absorb(self, block: _Chunk, after: _Chunk) -> None:
        block.size += after.size
        block.after = after.after
        if after.after is not None:
            after.after.before = block

    def _largest_free(self) -> int:
        if not self._first_level_map:
            return 0
        level = self._first_level_map.bit_length() - 1
        second = self._second_level_maps[level].bit_length() - 1
        largest, block = 0, self._bins[level * _SECOND_LEVEL + second]
        while block is not None:
            largest = max(largest, block.size)
            block = block.bin_next
        return largest

    def _unknown(self, offset: int) -> ForeignExtent | DoubleFree:
        for start, num_bytes, free in self.extents():
            if free and start <= offset < start + num_bytes:
                return DoubleFree(f"the extent at offset {offset} is free already")
        return ForeignExtent(f"no extent was leased at offset {offset}")


def _bin_of(size: int) -> tuple[int, int]:
    """(power of two, sixteenth of it) that a size in granules, at least 1, belongs to."""
    level = size.bit_length() - 1
    if level < _SECOND_LEVEL_BITS:
        return 0, size  # small sizes have a bin each, all in the first row
    return level - _SECOND_LEVEL_BITS + 1, (size >> (level - _SECOND_LEVEL_BITS)) - _SECOND_LEVEL


def _assert(holds: object, message: str) -> None:
    if not holds:
        raise AssertionError(message)
