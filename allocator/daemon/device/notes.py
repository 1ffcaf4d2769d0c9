"""What one device writes into the journal: each change as it happens, and all of it anew.

Owns the way from the numbers to records. Invariant: what `records` gives says the same as all that
was noted one by one. What a session holds follows from the table of requests
(`allocator.journaled`); what a set or the pool is, is noted here.
"""

from collections.abc import Iterator
from typing import Final

from allocator.books import Change, LeasesBegan, PinsChanged, ReadsChanged, WriteBegan, WriteEnded
from allocator.daemon.clients.sessions import Sessions
from allocator.daemon.device.segments import PoolSegment, Segments
from allocator.daemon.journal.records import (
    BlocksKept,
    Note,
    PoolMade,
    Record,
    SessionChanged,
    SetGone,
    SetKept,
)
from allocator.daemon.pool.kv_pool import KVPool
from allocator.daemon.weights.sets import WeightSets
from allocator.daemon.weights.weight_set import WeightSet
from allocator.journaled import changes
from allocator.messages import MAX_BATCH, Handle, Reply, Request

_PART_OF_A_SET: Final = (WriteBegan, WriteEnded)
"""Changes that the journal tells otherwise: whoever writes a set is part of what the set is."""


class Notes:
    """Of one device."""

    def __init__(
        self,
        sets: WeightSets,
        pool: KVPool,
        segments: Segments,
        pool_segment: PoolSegment,
        note: Note,
        sessions: Sessions,
    ) -> None:
        self.device = segments.backend.device
        self._sets = sets
        self._pool = pool
        self._segments = segments
        self._pool_segment = pool_segment
        self.note = note
        self._sessions = sessions

    def changes(self, session: int, request: Request, reply: Reply) -> None:
        """What the session holds more or less, as this was asked and is answered so. Nothing where
        it has ended meanwhile, as one does that can't be given descriptors."""
        if self._sessions.by_number(session) is None:
            return
        what = [one for one in changes(request, reply) if not isinstance(one, _PART_OF_A_SET)]
        if what:
            self.note(_changed(session, *what))

    def set(self, key: str) -> None:
        """A weight set as it now is, or that it is no more."""
        weight_set = self._sets.get(key)
        if weight_set is None:
            self.note(SetGone(device=self.device, key=key))
        else:
            self.note(self._set_kept(weight_set))

    def pool_made(self, handle: Handle) -> None:
        """The pool has its segment: on the disk before anything lies in it."""
        self.note(self._pool_made(handle), sync=True)

    def records(self) -> Iterator[Record]:
        """All that the next daemon needs to know of sets and pool. After those of the sessions."""
        for weight_set in self._sets:
            yield self._set_kept(weight_set)
            for session, count in weight_set.readers.items():
                yield _changed(session, _reads(weight_set, count))
        if self._pool_segment.handle is None:
            return
        yield self._pool_made(self._pool_segment.handle)
        for digest, extent in self._pool.blocks():
            yield BlocksKept(device=self.device, blocks=((digest, extent),))
        for session, generation, extent in self._pool.leases():
            yield _changed(session, LeasesBegan(generation=generation, extents=(extent,)))
        for session, digest, count in self._pool.pins():
            for start in range(0, count, MAX_BATCH):
                digests = (digest,) * min(MAX_BATCH, count - start)
                yield _changed(session, PinsChanged(digests=digests, pinned=True))

    # --- steps

    def _set_kept(self, s: WeightSet) -> SetKept:
        return SetKept(
            device=self.device,
            key=s.key,
            fingerprint=dict(s.fingerprint),
            model=s.model,
            user=s.user,
            generation=s.generation,
            copies=s.copies,
            writer=s.writer,
            target_tier=s.target_tier,
            target=s.target,
            identities={one.segment: self._segments.identity(one) for one in s.mapped()},
            pinned=s.pinned,
        )

    def _pool_made(self, handle: Handle) -> PoolMade:
        identity = self._segments.identity(handle)
        return PoolMade(device=self.device, handle=handle, identity=identity)


def _changed(session: int, *what: Change) -> SessionChanged:
    return SessionChanged(session=session, changes=what)


def _reads(weight_set: WeightSet, count: int) -> ReadsChanged:
    return ReadsChanged(key=weight_set.key, generation=weight_set.generation, by=count)
