"""What a session holds, as its own process knows: to be compared with what an allocator says.

Owns one session's books in its client. Invariant: they are kept by requests and their answers
alone, so that they are right whenever no request is on its way. After an allocator was killed, its
successor may have another opinion: it did not hear what was given up meanwhile, and what its
predecessor gave in its last moment was never heard of here. `differing` says how to tell it.
"""

from collections.abc import Iterable, Iterator
from typing import TypeVar

from allocator.books import Books
from allocator.journaled import changes
from allocator.messages import (
    MAX_BATCH,
    Abandon,
    Holdings,
    LeaseId,
    Release,
    Reply,
    Request,
    Return,
    UnpinBlocks,
)

T = TypeVar("T")


class Ledger:
    """Of one session."""

    def __init__(self) -> None:
        self._books = Books()

    def clear(self) -> None:
        """Nothing is held: another session began."""
        self._books = Books()

    def enter(self, request: Request, reply: Reply) -> None:
        """This was asked and so it was answered."""
        for change in changes(request, reply):
            change.enter(self._books)

    def differing(self, pages: Iterable[Holdings]) -> Iterator[Request]:
        """What to ask for so that an allocator which says this goes on with what is held here. What
        it does not know of is struck off: nobody can give it back."""
        ours, told = self._books, _told(pages)
        requests: list[Request] = [
            Abandon(key=key, generation=generation) for key, generation in told.writes - ours.writes
        ]
        for key, generation in (told.reads - ours.reads).elements():
            requests.append(Release(key=key, generation=generation))
        for part in _parts(sorted((told.pins - ours.pins).elements())):
            requests.append(UnpinBlocks(digests=part))
        for some in _parts(sorted(told.leases.keys() - ours.leases.keys())):
            requests.append(Return(leases=tuple(LeaseId(*lease) for lease in some)))
        for lease in ours.leases.keys() - told.leases.keys():
            del ours.leases[lease]
        ours.pins &= told.pins
        ours.reads &= told.reads
        ours.writes &= told.writes
        yield from requests


def _told(pages: Iterable[Holdings]) -> Books:
    """An allocator's answer as books."""
    told = Books()
    for page in pages:
        told.leases |= {(lease.offset, lease.generation): 0 for lease in page.leases}
        told.pins.update({held.digest: held.num_pins for held in page.blocks})
        for held in page.sets:
            told.reads[held.key, held.generation] += held.num_reads
            told.writes |= {(held.key, held.generation)} if held.writes else set()
    return told


def _parts(items: list[T]) -> Iterator[tuple[T, ...]]:
    for start in range(0, len(items), MAX_BATCH):
        yield tuple(items[start : start + MAX_BATCH])
