"""What a new daemon takes over from one that was killed: live segments, sealed sets, leases.

Owns the proof that what the journal says is still so. Invariants: a segment is taken over only if
it is the very one that the journal names, of this boot, and the bytes of its tensors still have
their digests; what a process held that is gone is free.
"""

import logging
from collections import Counter
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass

import msgspec

from allocator.backends import Backend, for_handle
from allocator.books import Books, SessionId
from allocator.daemon.device.budget import DeviceMemory, Holder
from allocator.daemon.journal.records import KeptDevice, SetKept
from allocator.daemon.weights.weight_set import Copy, WeightSet
from allocator.digests import differing, digest
from allocator.errors import AllocatorError
from allocator.messages import Extent, Handle, Tier, decode_manifest

log = logging.getLogger("onecopy.allocator")


@dataclass
class Adopted:
    """What a device goes on with."""

    memory: DeviceMemory
    pool: Handle | None
    num_sets: int


def adopt(
    kept: KeptDevice,
    sessions: Mapping[SessionId, Books],
    holders: Mapping[SessionId, Holder],
    backend: Backend,
    host_tier: Backend,
    *,
    limit_bytes: int | None,
    quotas: dict[tuple[str, str], int],
    now: float,
) -> Adopted:
    """The device's memory with everything of `kept` that is still true; of one that contradicts
    itself the quotas alone, which say nothing of memory. `sessions` are those of the device and
    `holders` whom they are charged to, whether or not their processes live: the caller ends the
    dead ones."""

    def attempt(kept: KeptDevice, books: Mapping[SessionId, Books]) -> Adopted:
        proof = _Proof(kept, books, backend, host_tier, now)
        adopted = proof.adopted(holders, limit_bytes, quotas)
        adopted.memory.check()
        return adopted

    try:
        return attempt(kept, sessions)
    except (AllocatorError, AssertionError, LookupError, ValueError, OSError) as error:
        log.error("nothing is adopted of %s: %s: %s", backend.device, type(error).__name__, error)  # noqa: TRY400
        bare = KeptDevice(quotas=kept.quotas)
        return attempt(bare, {number: Books() for number in sessions})


class _Proof:
    """That what the journal says of a device is still so."""

    def __init__(
        self,
        kept: KeptDevice,
        books: Mapping[SessionId, Books],
        backend: Backend,
        host_tier: Backend,
        now: float,
    ) -> None:
        self._kept = kept
        self._books = books
        self._backend = backend
        self._host_tier = host_tier
        self._now = now

    def adopted(
        self,
        holders: Mapping[SessionId, Holder],
        limit_bytes: int | None,
        quotas: dict[tuple[str, str], int],
    ) -> Adopted:
        """Raises whatever a contradiction leads to."""
        pool = self._pool()
        most = self._backend.limit_bytes()
        pool_bytes = max(self._backend.granularity, min(limit_bytes or most, most))
        memory = DeviceMemory(
            pool.num_bytes if pool is not None else pool_bytes,
            self._backend.granularity,
            limit_bytes=limit_bytes,
            quotas={**self._kept.quotas, **quotas},
        )
        for session in self._books:
            memory.begin_session(session, holders[session])
        if pool is not None:
            self._restore_pool(memory, pool)
        num_sets = 0
        for one in self._kept.sets.values():
            weight_set = self._proven(one)
            if weight_set is not None:
                memory.sets.restore(weight_set)
                num_sets += weight_set.state in ("sealed", "idle")
        memory.tolerate_present_use()
        return Adopted(memory, pool, num_sets)

    # --- the pool

    def _pool(self) -> Handle | None:
        made = self._kept.pool
        if made is None:
            return None
        if not made.identity or self._backend.identity(made.handle.segment) != made.identity:
            log.warning("the pool %s is gone or another: its leases are void", made.handle.segment)
            return None
        return made.handle

    def _restore_pool(self, memory: DeviceMemory, pool: Handle) -> None:
        books = self._books.items()
        memory.pool.restore(
            leases=[
                (session, generation, Extent(offset=offset, num_bytes=num_bytes))
                for session, one in books
                for (offset, generation), num_bytes in one.leases.items()
            ],
            blocks=self._kept.blocks.items(),
            pins=[
                (session, name, count) for session, one in books for name, count in one.pins.items()
            ],
            now=self._now,
        )
        # The earlier daemon may have been killed when it had noted an extent's end, and still had
        # to take its memory back.
        for region in memory.pool.regions():
            if region.kind == "free":
                extent = Extent(offset=region.offset, num_bytes=region.num_bytes)
                self._backend.free_extent(pool.segment, extent)

    # --- weight sets

    def _proven(self, kept: SetKept) -> WeightSet | None:
        """The set with those of its copies that are what the journal says, and its writer with what
        it has of the next one."""
        copies: dict[Tier, Copy] = {}
        for tier, copy in kept.copies.items():
            if not all(self._is_there(kept, handle) for handle in (copy.handle, *copy.files)):
                log.warning("%s: its copy on the %s tier is gone", kept.key, tier)
            elif tier != "disk" and (wrong := _wrong_bytes(copy)):
                log.error("%s: its copy on the %s tier is damaged: %s", kept.key, tier, wrong)
            else:
                copies[tier] = copy
        # A session's end is noted before the end of what it writes.
        writing = kept.writer in self._books and (
            kept.target is None or self._is_there(kept, kept.target)
        )
        readers = {
            session: books.reads[kept.key, kept.generation]
            for session, books in self._books.items()
            if "device" in copies and books.reads[kept.key, kept.generation]
        }
        weight_set = WeightSet(
            kept.key,
            kept.fingerprint,
            model=kept.model,
            user=kept.user,
            generation=kept.generation,
            copies=copies,
            writer=kept.writer if writing else None,
            target_tier=kept.target_tier if writing else "device",
            target=kept.target if writing else None,
            readers=Counter(readers),
            idle_since=self._now,
            pinned=kept.pinned,
        )
        return None if weight_set.state == "absent" else weight_set

    def _is_there(self, kept: SetKept, handle: Handle) -> bool:
        expected = kept.identities.get(handle.segment, "")
        sides = {self._backend.name: self._backend, self._host_tier.name: self._host_tier}
        try:
            found = (sides.get(handle.backend) or for_handle(handle)).identity(handle.segment)
        except (OSError, AllocatorError):
            return False
        return bool(expected) and found == expected


def _wrong_bytes(copy: Copy) -> str:
    """What of a copy's manifest and tensors is not as its writer left it; "" where all is."""
    if copy.manifest is None:
        return "it has no manifest"
    try:
        mapping = for_handle(copy.handle).map(copy.handle, writable=False)
    except (OSError, AllocatorError) as error:
        return str(error)
    with closing(mapping):
        return _wrong_bytes_in(mapping.buffer, copy.manifest, copy.manifest_digest)


def _wrong_bytes_in(segment: memoryview, manifest: Extent, manifest_digest: str) -> str:
    """As `_wrong_bytes`. No view of the segment is left."""
    begin, end = manifest.offset, manifest.offset + manifest.num_bytes
    with segment[begin:end] as described:
        if digest(described) != manifest_digest:
            return "its manifest"
        try:
            entries = decode_manifest(described).tensors
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            return str(error)
    own = {name: entry for name, entry in entries.items() if entry.segment == 0}
    return ", ".join(differing(segment, own)[:5])
