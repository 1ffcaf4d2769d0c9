"""What is journaled of each request: what its session holds more, or less, once it is answered so.

Owns the table. The daemon's journal and a client's ledger are both written by it, so that the two
can be compared when another daemon has taken over. What a request does is the daemon's own table
(`allocator.daemon.device.device`); what no session holds, such as what a weight set is and who
writes it, has its records in `allocator.daemon.journal.records`. Invariant: every request of
`allocator.messages` has its row.
"""

from collections.abc import Callable, Mapping
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
    GetEvents,
    GetHoldings,
    GetRegions,
    GetSegments,
    GetShare,
    GetStatistics,
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
    Return,
    Seal,
    Sealed,
    SetQuota,
    Sleep,
    UnpinBlocks,
)

Follows = Callable[[Any, Any], tuple[Change, ...]]
"""(request, reply) → what the session holds more, or less."""


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


JOURNALED: Final[Mapping[type[Request], Mapping[type[Reply], Follows]]] = {
    # weight sets
    Open: {Sealed: _reads, Elected: _writes},
    Reserve: {},
    Progress: {},
    Seal: {Sealed: _sealed},
    Abandon: {Done: _no_longer_writes},
    Release: {Done: _released},
    Evict: {},
    Pin: {},
    Sleep: {Moving: _writes},
    Moved: {Done: _no_longer_writes},
    # the pool
    Lease: {Leased: _leased},
    MakeRoom: {},
    Return: {Done: _returned},
    PutBlocks: {BlocksPut: _put},
    LookUpBlocks: {Blocks: _found},
    UnpinBlocks: {Done: _unpinned},
    GetShare: {},
    # looking
    SetQuota: {},
    GetStatistics: {},
    GetRegions: {},
    GetEvents: {},
    GetHoldings: {},
    GetSegments: {},
    CheckIntegrity: {},
}
"""By request, and by its reply. With any other reply nothing changes."""


def changes(request: Request, reply: Reply) -> tuple[Change, ...]:
    """What the session that asked this and was answered so holds more, or less."""
    follows = JOURNALED[type(request)].get(type(reply))
    return () if follows is None else follows(request, reply)
