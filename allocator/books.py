"""What one session holds, and how that changes: kept alike by its client and in the journal.

Owns the changes, each a message, and what they make of the books. Invariant: whoever enters the
same changes in the same order has the same books. Does not say what a change follows from: that is
`allocator.journaled`.
"""

from collections import Counter

from allocator.messages import BlockToPut, Extent, LeaseId, Message

SessionId = int
"""The number of a session; none has 0."""


class Books:
    """Leases and pins by what names them on the wire, weight sets by key and generation."""

    def __init__(self) -> None:
        self.leases: dict[tuple[int, int], int] = {}
        """(offset, generation) → bytes."""
        self.pins: Counter[bytes] = Counter()
        self.reads: Counter[tuple[str, int]] = Counter()
        self.writes: set[tuple[str, int]] = set()


class LeasesBegan(Message, tag="leases_began", frozen=True):
    """Extents are leased."""

    generation: int
    extents: tuple[Extent, ...]

    def enter(self, books: Books) -> None:
        for extent in self.extents:
            books.leases[extent.offset, self.generation] = extent.num_bytes

    def fits(self, books: Books) -> bool:
        return not any((one.offset, self.generation) in books.leases for one in self.extents)


class LeasesEnded(Message, tag="leases_ended", frozen=True):
    """Extents are returned."""

    leases: tuple[LeaseId, ...]

    def enter(self, books: Books) -> None:
        for lease in self.leases:
            books.leases.pop((lease.offset, lease.generation), None)

    def fits(self, books: Books) -> bool:
        return all((one.offset, one.generation) in books.leases for one in self.leases)


class LeasesSealed(Message, tag="leases_sealed", frozen=True):
    """Leased extents are blocks of the index now, and pinned."""

    blocks: tuple[BlockToPut, ...]

    def enter(self, books: Books) -> None:
        for block in self.blocks:
            books.leases.pop((block.offset, block.generation), None)
            books.pins[block.digest] += 1

    def fits(self, books: Books) -> bool:
        return all((one.offset, one.generation) in books.leases for one in self.blocks)


class PinsChanged(Message, tag="pins_changed", frozen=True):
    """Each of these blocks, as often as it is named, has one pin more, or one less."""

    digests: tuple[bytes, ...]
    pinned: bool

    def enter(self, books: Books) -> None:
        if self.pinned:
            books.pins.update(self.digests)
            return
        for digest in self.digests:
            books.pins[digest] -= 1
            if books.pins[digest] <= 0:
                del books.pins[digest]

    def fits(self, books: Books) -> bool:
        return self.pinned or all(
            books.pins[digest] >= count for digest, count in Counter(self.digests).items()
        )


class ReadsChanged(Message, tag="reads_changed", frozen=True):
    """A weight set is read so often more, or less."""

    key: str
    generation: int
    by: int

    def enter(self, books: Books) -> None:
        books.reads[self.key, self.generation] += self.by
        if books.reads[self.key, self.generation] <= 0:
            del books.reads[self.key, self.generation]

    def fits(self, books: Books) -> bool:
        return books.reads[self.key, self.generation] + self.by >= 0


class WriteBegan(Message, tag="write_began", frozen=True):
    """The session is a weight set's writer."""

    key: str
    generation: int

    def enter(self, books: Books) -> None:
        books.writes.add((self.key, self.generation))

    def fits(self, books: Books) -> bool:
        return (self.key, self.generation) not in books.writes


class WriteEnded(Message, tag="write_ended", frozen=True):
    """It no longer is."""

    key: str
    generation: int

    def enter(self, books: Books) -> None:
        books.writes.discard((self.key, self.generation))

    def fits(self, books: Books) -> bool:
        return (self.key, self.generation) in books.writes


Change = (
    LeasesBegan | LeasesEnded | LeasesSealed | PinsChanged | ReadsChanged | WriteBegan | WriteEnded
)
"""`enter` writes it into books. What it ends and they do not know of is as good as ended; `fits`
tells whether there is such a thing, or one that begins for the second time."""
