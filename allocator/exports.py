"""Descriptors that a client needs beside a reply, on devices whose handles alone map nothing.

Owns which replies need them, on both sides. Invariant: they leave in the order in which the reply
names what they are for, and before it. Knows nothing of what they map.
"""

import socket
from typing import Final

from allocator.backends import Backend
from allocator.errors import AllocatorError
from allocator.lifeline import MAX_DESCRIPTORS, close_all, send_descriptors
from allocator.messages import (
    Blocks,
    Extent,
    Handle,
    Leased,
    Moving,
    Reply,
    Reserved,
    Sealed,
)

_EXPORTING: Final = "cuda"
"""The backend whose handles need descriptors."""


def num_descriptors(reply: Reply) -> int:
    """How many come with a reply; the client's side."""
    return len(_needed(reply, _EXPORTING))


def send_exports(
    backend: Backend, lifeline: socket.socket, request_id: bytes, reply: Reply
) -> None:
    """Send those that the reply needs, a few at a time, so that many extents don't take many
    descriptors of our own. Raises OSError."""
    needed = _needed(reply, backend.name)
    for start in range(0, len(needed), MAX_DESCRIPTORS):
        descriptors: list[int] = []
        try:
            for handle, extent in needed[start : start + MAX_DESCRIPTORS]:
                descriptors.append(backend.export(handle.segment, extent))
            send_descriptors(lifeline, request_id, descriptors)
        except AllocatorError as error:
            raise OSError(str(error)) from error
        finally:
            close_all(descriptors)


def _needed(reply: Reply, backend: str) -> list[tuple[Handle, Extent | None]]:
    match reply:
        case Reserved(handle=handle) | Sealed(handle=handle) | Moving(handle=handle):
            return [(handle, None)] if handle.backend == backend else []
        case Leased(pool=pool, extents=extents) | Blocks(pool=pool, extents=extents):
            return [(pool, extent) for extent in extents] if pool.backend == backend else []
        case _:
            return []
