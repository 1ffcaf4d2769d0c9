"""What a new daemon takes over from one that was killed: live segments, sealed sets, leases.

Owns the reading of the journal and the proof that what it says is still so. Invariants: a segment
is taken over only if it is the very one that the journal names, of this boot, and the bytes of its
tensors still have their digests; what a process held that is gone is free. Knows nothing of
sockets.
"""

import logging
from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from allocator.backends import Backend, for_handle
from allocator.daemon.budget import DeviceMemory, Holder
from allocator.daemon.journal.records import (
    JOURNAL_VERSION,
    BlockGone,
    BlocksKept,
    LeasesEnded,
    LeasesMade,
    PinsChanged,
    PoolMade,
    QuotaKept,
    ReadersChanged,
    Record,
    RunBegan,
    SessionBegan,
    SessionEnded,
    SetGone,
    SetKept,
    decode_record,
)
from allocator.daemon.sessions import Session
from allocator.daemon.weights.state import Copy, WeightSet
from allocator.digests import differing, digest
from allocator.errors import AllocatorError
from allocator.messages import Extent, Handle, decode_manifest
from allocator.processes.identity import ProcessIdentity

log = logging.getLogger("onecopy.allocator")


@dataclass
class Legacy:
    """What one device's part of the journal says, as far as replaying it tells."""

    sets: dict[str, SetKept] = field(default_factory=dict)
    readers: dict[str, Counter[int]] = field(default_factory=dict)
    pool: PoolMade | None = None
    pool_records: list[Record] = field(default_factory=list)
    quotas: dict[tuple[str, str], int] = field(default_factory=dict)


@dataclass
class Journaled:
    """What the journal says."""

    sessions: dict[int, Session] = field(default_factory=dict)
    devices: dict[str, Legacy] = field(default_factory=dict)

    def segments(self) -> set[str]:
        """The names of all that it mentions in shared memory."""
        handles = [legacy.pool.handle for legacy in self.devices.values() if legacy.pool]
        for legacy in self.devices.values():
            for kept in legacy.sets.values():
                handles += [copy.handle for copy in kept.copies.values()]
                handles += [kept.target] if kept.target is not None else []
        return {handle.segment for handle in handles if handle.backend != "file"}

    def device(self, name: str) -> Legacy:
        """That of one device; empty where it is not mentioned."""
        return self.devices.setdefault(name, Legacy())


def boot_id() -> str:
    """Of the running kernel: memory of another boot is gone (random(4), proc(5))."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def read_records(payloads: Iterable[bytes]) -> Journaled:
    """Replay a journal; nothing where it is of another boot or version."""
    journaled = Journaled()
    try:
        records = [decode_record(payload) for payload in payloads]
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        log.warning("the journal can't be read, nothing is adopted: %s", error)
        return journaled
    if not records:
        return journaled
    first = records[0]
    if not isinstance(first, RunBegan) or first.version != JOURNAL_VERSION:
        log.warning("the journal is another version's, nothing is adopted")
        return journaled
    if first.boot_id != boot_id():
        log.info("the journal is of an earlier boot: its memory is gone")
        return journaled
    try:
        for record in records[1:]:
            _replay(journaled, record)
    except LookupError as error:
        log.error("the journal contradicts itself, nothing is adopted: %r", error)  # noqa: TRY400
        return Journaled()
    return journaled


def _replay(journaled: Journaled, record: Record) -> None:
    match record:
        case RunBegan():
            return
        case SessionBegan():
            journaled.sessions[record.number] = Session(
                record.number,
                ProcessIdentity(record.pid, record.start_ticks),
                record.token,
                record.device,
                record.model,
                record.user,
                record.label,
            )
        case SessionEnded(number=number):
            journaled.sessions.pop(number, None)
            for device in journaled.devices.values():
                device.pool_records.append(record)
                for readers in device.readers.values():
                    readers.pop(number, None)
        case SetKept(device=device, key=key):
            journaled.device(device).sets[key] = record
            journaled.device(device).readers[key] = Counter(record.readers)
        case ReadersChanged(device=device, key=key, session=session, delta=delta):
            journaled.device(device).readers[key][session] += delta
        case SetGone(device=device, key=key):
            journaled.device(device).sets.pop(key, None)
            journaled.device(device).readers.pop(key, None)
        case PoolMade(device=device):
            journaled.device(device).pool = record
        case QuotaKept(device=device, kind=kind, name=name, num_bytes=num_bytes):
            quotas = journaled.device(device).quotas
            if num_bytes is None:
                quotas.pop((kind, name), None)
            else:
                quotas[kind, name] = num_bytes
        case LeasesMade() | LeasesEnded() | BlocksKept() | PinsChanged() | BlockGone():
            journaled.device(record.device).pool_records.append(record)


@dataclass
class Adopted:
    """What a device goes on with."""

    memory: DeviceMemory
    pool: Handle | None
    num_sets: int


def adopt(
    legacy: Legacy,
    sessions: Collection[Session],
    backend: Backend,
    host_tier: Backend,
    *,
    limit_bytes: int | None,
    quotas: dict[tuple[str, str], int],
    now: float,
) -> Adopted:
    """The device's memory with everything of `legacy` that is still true; nothing of it where it
    contradicts itself. `sessions` are those of the device, whether or not their processes live: the
    caller ends the dead ones."""

    def attempt(legacy: Legacy) -> Adopted:
        adopted = _adopt(
            legacy, sessions, backend, host_tier, limit_bytes=limit_bytes, quotas=quotas, now=now
        )
        adopted.memory.check()
        return adopted

    try:
        return attempt(legacy)
    except (AllocatorError, AssertionError, LookupError, ValueError, OSError) as error:
        log.error("nothing is adopted of %s: %s: %s", backend.device, type(error).__name__, error)  # noqa: TRY400
        return attempt(Legacy())


def _adopt(
    legacy: Legacy,
    sessions: Collection[Session],
    backend: Backend,
    host_tier: Backend,
    *,
    limit_bytes: int | None,
    quotas: dict[tuple[str, str], int],
    now: float,
) -> Adopted:
    pool = legacy.pool
    if pool is not None and (
        not pool.identity or backend.identity(pool.handle.segment) != pool.identity
    ):
        log.warning("the pool %s is gone or another: its leases are void", pool.handle.segment)
        pool = None
    most = backend.limit_bytes()
    pool_bytes = max(backend.granularity, min(limit_bytes or most, most))
    memory = DeviceMemory(
        pool.handle.num_bytes if pool is not None else pool_bytes,
        backend.granularity,
        limit_bytes=limit_bytes,
        quotas={**legacy.quotas, **quotas},
    )
    for session in sessions:
        memory.begin_session(session.number, Holder(session.model, session.user))
    if pool is not None:
        memory.pool.begin_restoring()
        for record in legacy.pool_records:
            _replay_pool(memory, record, now)
        memory.pool.end_restoring()
        _empty_what_is_free(memory, backend, pool.handle)
    num_sets = 0
    known = {session.number for session in sessions}
    for kept in legacy.sets.values():
        readers = legacy.readers[kept.key] + Counter()  # without those that read it no longer
        weight_set = _proven(kept, readers, known, backend, host_tier, now)
        if weight_set is not None:
            memory.sets.restore(weight_set)
            num_sets += weight_set.state in ("sealed", "idle")
    memory.tolerate_present_use()
    return Adopted(memory, pool.handle if pool is not None else None, num_sets)


def _empty_what_is_free(memory: DeviceMemory, backend: Backend, pool: Handle) -> None:
    """The earlier daemon may have been killed when it had noted an extent's end, and still had to
    take its memory back."""
    for region in memory.pool.regions():
        if region.kind == "free":
            extent = Extent(offset=region.offset, num_bytes=region.num_bytes)
            backend.free_extent(pool.segment, extent)


def _replay_pool(memory: DeviceMemory, record: Record, now: float) -> None:
    pool = memory.pool
    match record:
        case SessionEnded(number=number):
            pool.end_session(number, now)
        case LeasesMade(session=session, generation=generation, extents=extents):
            for extent in extents:
                pool.restore_lease(session, generation, extent)
        case LeasesEnded(session=session, offsets=offsets):
            pool.end_leases(session, offsets)
        case BlocksKept(session=session, blocks=blocks):
            if session:
                pool.end_leases(session, [extent.offset for _, extent in blocks])
            for digest_, extent in blocks:
                pool.restore_block(digest_, extent, now)
            if session:
                pool.restore_pins(session, [digest_ for digest_, _ in blocks], now)
        case PinsChanged(session=session, digests=digests, pinned=True):
            pool.restore_pins(session, digests, now)
        case PinsChanged(session=session, digests=digests):
            pool.unpin(session, digests, now)
        case BlockGone(digest=digest_):
            pool.drop_block(digest_)
        case _:
            raise AssertionError(f"{record} is not about the pool")


def _proven(
    kept: SetKept,
    readers: Counter[int],
    sessions: set[int],
    backend: Backend,
    host_tier: Backend,
    now: float,
) -> WeightSet | None:
    """The set with those of its copies that are what the journal says, and its writer with what it
    has of the next one."""

    def is_there(handle: Handle) -> bool:
        expected = kept.identities.get(handle.segment, "")
        side = {backend.name: backend, host_tier.name: host_tier}.get(handle.backend)
        try:
            found = (side or for_handle(handle)).identity(handle.segment)
        except (OSError, AllocatorError):
            return False
        return bool(expected) and found == expected

    copies: dict[str, Copy] = {}
    for tier, copy in kept.copies.items():
        if not all(is_there(handle) for handle in (copy.handle, *copy.files)):
            log.warning("%s: its copy on the %s tier is gone", kept.key, tier)
        elif tier != "disk" and (wrong := _wrong_bytes(copy)):
            log.error("%s: its copy on the %s tier is damaged: %s", kept.key, tier, wrong)
        else:
            copies[tier] = copy
    # A session's end is noted before the end of what it writes.
    writing = kept.writer in sessions and (kept.target is None or is_there(kept.target))
    weight_set = WeightSet(
        kept.key,
        kept.fingerprint,
        model=kept.model,
        user=kept.user,
        generation=kept.generation,
        copies={tier: copies[tier] for tier in kept.copies if tier in copies},
        writer=kept.writer if writing else None,
        target_tier=kept.target_tier if writing else "device",
        target=kept.target if writing else None,
        readers=readers if "device" in copies else Counter(),
        idle_since=now,
        pinned=kept.pinned,
    )
    return None if weight_set.state == "absent" else weight_set


def _wrong_bytes(copy: Copy) -> str:
    """What of a copy's manifest and tensors is not as its writer left it; "" where all is."""
    if copy.manifest is None:
        return "it has no manifest"
    try:
        mapping = for_handle(copy.handle).map(copy.handle, writable=False)
    except (OSError, AllocatorError) as error:
        return str(error)
    begin, end = copy.manifest.offset, copy.manifest.offset + copy.manifest.num_bytes
    described = mapping.buffer[begin:end]
    if digest(described) != copy.manifest_digest:
        return "its manifest"
    try:
        entries = decode_manifest(described).tensors
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        return str(error)
    finally:
        del described
    own = {name: entry for name, entry in entries.items() if entry.segment == 0}
    wrong = differing(mapping.buffer, own)
    mapping.close()
    return ", ".join(wrong[:5])
