"""Descriptors that a client needs beside a reply, on devices whose handles alone map nothing.

Owns their way to the client. Invariant: they leave in the order in which the reply names what they
are for, and before it.
"""

import socket

from allocator.backends import Backend
from allocator.errors import AllocatorError
from allocator.lifeline import MAX_DESCRIPTORS, close_all, send_descriptors
from allocator.messages import Reply
from allocator.requests import mappable


def send_exports(
    backend: Backend, lifeline: socket.socket, request_id: bytes, reply: Reply
) -> None:
    """Send those that the reply needs, a few at a time, so that many extents don't take many
    descriptors of our own. Raises OSError."""
    needed = [one for one in mappable(reply) if one[0].backend == backend.name]
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
