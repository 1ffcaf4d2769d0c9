"""What both sides have to know of requests and replies, beside their fields.

Owns which requests can be asked again, and what a reply lets its client map: the descriptors that
go with a reply follow from that. What is journaled of a request is in `allocator.journaled`.
"""

from collections.abc import Callable, Mapping
from typing import Any, Final

from allocator.messages import (
    Blocks,
    CheckIntegrity,
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
    Moving,
    Open,
    Pin,
    Progress,
    Reply,
    Request,
    Reserved,
    Sealed,
    SetQuota,
)

REPEATABLE: Final[frozenset[type[Request]]] = frozenset(
    {
        Open,
        Progress,
        Pin,
        Lease,
        MakeRoom,
        LookUpBlocks,
        GetShare,
        SetQuota,
        GetStatistics,
        GetRegions,
        GetEvents,
        GetHoldings,
        GetSegments,
        CheckIntegrity,
    }
)
"""They can be asked again when nobody knows whether they were done: what one of them gave is given
back first, or it gives nothing."""

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
