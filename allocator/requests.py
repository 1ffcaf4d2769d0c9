"""The table of requests: what both sides have to know of each, beside its fields.

Owns which replies change what a session holds, and how; which requests can be asked again; and what
a reply lets its client map. A client's ledger, the daemon's journal and the descriptors that go
with a reply all follow from these rows; what a request does is the daemon's table
(`allocator.daemon.device.device`). Invariant: every request of `allocator.messages` has its row.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from allocator.books import (
    Change,
    LeasesBegan,
    LeasesEnded,
    LeasesSealed,
    PinsChanged,
    ReadsChanged,
    WriteBegan,
    WriteEnded,
)
from allocator.messages import (
    Abandon,
    Blocks,
    BlocksPut,
    CheckIntegrity,
    Done,
    Elected,
    Evict,
    Extent,
    GetEvents,
    GetHoldings,
    GetRegions,
    GetSegments,
    GetShare,
    GetStatistics,
    Handle,
    Lease,
    Leased,
    LookUpBlocks,
    MakeRoom,
    Moved,
    Moving,
    Open,
    Pin,
    Progress,
    PutBlocks,
    Release,
    Reply,
    Request,
    Reserve,
    Reserved,
    Return,
    Seal,
    Sealed,
    SetQuota,
    Sleep,
    UnpinBlocks,
)

Follows = Callable[[Any, Any], tuple[Change, ...]]
"""(request, reply) → what the session holds more, or less."""


@dataclass(frozen=True)
class Row:
    """Of one type of request. By reply, what changes; with any other nothing does. `repeatable`:
    it can be asked again when nobody knows whether it was done, as what it gave is given back
    first, or it gives nothing."""

    changes: Mapping[type[Reply], Follows] = field(default_factory=dict)
    repeatable: bool = False


def _reads(request: Open | Seal, sealed: Sealed) -> tuple[Change, ...]:
    return (ReadsChanged(key=request.key, generation=sealed.handle.generation, by=1),)


def _sealed(seal: Seal, sealed: Sealed) -> tuple[Change, ...]:
    return *_no_longer_writes(seal, sealed), *_reads(seal, sealed)


def _writes(request: Open | Sleep, elected: Elected | Moving) -> tuple[Change, ...]:
    return (WriteBegan(key=request.key, generation=elected.generation),)


def _no_longer_writes(request: Seal | Abandon | Moved, _reply: Reply) -> tuple[Change, ...]:
    return (WriteEnded(key=request.key, generation=request.generation),)


def _released(release: Release, _done: Done) -> tuple[Change, ...]:
    return (ReadsChanged(key=release.key, generation=release.generation, by=-1),)


def _leased(_lease: Lease, leased: Leased) -> tuple[Change, ...]:
    return (LeasesBegan(generation=leased.generation, extents=leased.extents),)


def _returned(request: Return, _done: Done) -> tuple[Change, ...]:
    return (LeasesEnded(leases=request.leases),) if request.leases else ()


def _put(request: PutBlocks, put: BlocksPut) -> tuple[Change, ...]:
    taken = tuple(b for b, stored in zip(request.blocks, put.stored, strict=True) if stored)
    return (LeasesSealed(blocks=taken),) if taken else ()


def _found(request: LookUpBlocks, found: Blocks) -> tuple[Change, ...]:
    digests = request.digests[: len(found.extents)]
    return (PinsChanged(digests=digests, pinned=True),) if digests else ()


def _unpinned(request: UnpinBlocks, _done: Done) -> tuple[Change, ...]:
    return (PinsChanged(digests=request.digests, pinned=False),) if request.digests else ()


REQUESTS: Final[Mapping[type[Request], Row]] = {
    # weight sets
    Open: Row({Sealed: _reads, Elected: _writes}, repeatable=True),
    Reserve: Row(),
    Progress: Row(repeatable=True),
    Seal: Row({Sealed: _sealed}),
    Abandon: Row({Done: _no_longer_writes}),
    Release: Row({Done: _released}),
    Evict: Row(),
    Pin: Row(repeatable=True),
    Sleep: Row({Moving: _writes}),
    Moved: Row({Done: _no_longer_writes}),
    # the pool
    Lease: Row({Leased: _leased}, repeatable=True),
    MakeRoom: Row(repeatable=True),
    Return: Row({Done: _returned}),
    PutBlocks: Row({BlocksPut: _put}),
    LookUpBlocks: Row({Blocks: _found}, repeatable=True),
    UnpinBlocks: Row({Done: _unpinned}),
    GetShare: Row(repeatable=True),
    # looking
    SetQuota: Row(repeatable=True),
    GetStatistics: Row(repeatable=True),
    GetRegions: Row(repeatable=True),
    GetEvents: Row(repeatable=True),
    GetHoldings: Row(repeatable=True),
    GetSegments: Row(repeatable=True),
    CheckIntegrity: Row(repeatable=True),
}


def changes(request: Request, reply: Reply) -> tuple[Change, ...]:
    """What the session that asked this and was answered so holds more, or less."""
    follows = REQUESTS[type(request)].changes.get(type(reply))
    return () if follows is None else follows(request, reply)


# --- what a client maps

Mappable = tuple[Handle, Extent | None]
"""A segment, or an extent of it."""


def _one_handle(reply: Reserved | Sealed | Moving) -> list[Mappable]:
    return [(reply.handle, None)]


def _extents(reply: Leased | Blocks) -> list[Mappable]:
    return [(reply.pool, extent) for extent in reply.extents]


_MAPPABLE: Final[Mapping[type[Reply], Callable[[Any], list[Mappable]]]] = {
    Reserved: _one_handle,
    Sealed: _one_handle,
    Moving: _one_handle,
    Leased: _extents,
    Blocks: _extents,
}


def mappable(reply: Reply) -> list[Mappable]:
    """What the reply lets its client map, in the order in which it names it. On devices whose
    handles alone map nothing, a descriptor for each goes before the reply."""
    told = _MAPPABLE.get(type(reply))
    return [] if told is None else told(reply)
