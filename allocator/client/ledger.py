"""What a session holds, as its own process knows: to be compared with what an allocator says.

Owns one session's books. Invariant: they are kept by requests and their answers alone, so that they
are right whenever no request is on its way. After an allocator was killed, its successor may have
another opinion: it did not hear what was given up meanwhile, and what its predecessor gave in its
last moment was never heard of here. `differing` says how to tell it. Knows nothing of mappings, nor
of sockets.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import TypeVar

from allocator.messages import (
    MAX_BATCH,
    Abandon,
    Blocks,
    BlocksPut,
    Done,
    Elected,
    Holdings,
    Lease,
    Leased,
    LeaseId,
    LookUpBlocks,
    Moved,
    Moving,
    Open,
    PutBlocks,
    Release,
    Reply,
    Request,
    Return,
    Seal,
    Sealed,
    Sleep,
    UnpinBlocks,
)

T = TypeVar("T")


class Books:
    """Leases and pins by what names them on the wire, weight sets by key and generation."""

    def __init__(self) -> None:
        self._leases: set[tuple[int, int]] = set()
        self._pins: Counter[bytes] = Counter()
        self._reads: Counter[tuple[str, int]] = Counter()
        self._writes: set[tuple[str, int]] = set()

    def clear(self) -> None:
        """Nothing is held: another session began."""
        self._leases.clear()
        self._pins.clear()
        self._reads.clear()
        self._writes.clear()

    def enter(self, request: Request, reply: Reply) -> None:
        """This was asked and so it was answered."""
        match request, reply:
            case Lease(), Leased(extents=extents, generation=generation):
                self._leases |= {(extent.offset, generation) for extent in extents}
            case Return(leases=leases), Done():
                self._leases -= {(lease.offset, lease.generation) for lease in leases}
            case PutBlocks(blocks=blocks), BlocksPut(stored=stored):
                for block, taken in zip(blocks, stored, strict=True):
                    if taken:
                        self._leases.discard((block.offset, block.generation))
                        self._pins[block.digest] += 1
            case LookUpBlocks(digests=digests), Blocks(extents=extents):
                self._pins.update(digests[: len(extents)])
            case UnpinBlocks(digests=digests), Done():
                self._pins -= Counter(digests)
            case (Open(key=key), Elected(generation=generation)) | (
                Sleep(key=key),
                Moving(generation=generation),
            ):
                self._writes.add((key, generation))
            case Open(key=key), Sealed(handle=handle):
                self._reads[key, handle.generation] += 1
            case Seal(key=key, generation=generation), Sealed(handle=handle):
                self._writes.discard((key, generation))
                self._reads[key, handle.generation] += 1
            case (Abandon(key=key, generation=generation), Done()) | (
                Moved(key=key, generation=generation),
                Done(),
            ):
                self._writes.discard((key, generation))
            case Release(key=key, generation=generation), Done():
                self._reads -= Counter([(key, generation)])

    def differing(self, pages: Iterable[Holdings]) -> Iterator[Request]:
        """What to ask for so that an allocator which says this goes on with what is held here. What
        it does not know of is struck off: nobody can give it back."""
        leases: set[tuple[int, int]] = set()
        pins: Counter[bytes] = Counter()
        reads: Counter[tuple[str, int]] = Counter()
        writes: set[tuple[str, int]] = set()
        for page in pages:
            leases |= {(lease.offset, lease.generation) for lease in page.leases}
            pins.update({held.digest: held.num_pins for held in page.blocks})
            for held in page.sets:
                reads[held.key, held.generation] += held.num_reads
                writes |= {(held.key, held.generation)} if held.writes else set()
        requests: list[Request] = [
            Abandon(key=key, generation=generation) for key, generation in writes - self._writes
        ]
        for key, generation in (reads - self._reads).elements():
            requests.append(Release(key=key, generation=generation))
        for part in _parts(sorted((pins - self._pins).elements())):
            requests.append(UnpinBlocks(digests=part))
        for some in _parts(sorted(leases - self._leases)):
            requests.append(Return(leases=tuple(LeaseId(*lease) for lease in some)))
        self._leases &= leases
        self._pins &= pins
        self._reads &= reads
        self._writes &= writes
        yield from requests


def _parts(items: list[T]) -> Iterator[tuple[T, ...]]:
    for start in range(0, len(items), MAX_BATCH):
        yield tuple(items[start : start + MAX_BATCH])
