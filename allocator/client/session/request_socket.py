"""The socket over which a session's requests go, made and connected.

Owns its options. Invariant: what the daemon sends is bounded, and the end of the socket waits for
nobody. What goes over it is the connection's.
"""

import zmq

from allocator import messages
from allocator.errors import AllocatorGone
from allocator.lifeline import cant_connect


def opened(context: "zmq.Context[zmq.Socket[bytes]]") -> "zmq.Socket[bytes]":
    """Raises AllocatorGone where this process can have none."""
    try:
        return context.socket(zmq.DEALER)
    except zmq.ZMQError as error:
        raise AllocatorGone(cant_connect(error.strerror)) from error


def connect(socket: "zmq.Socket[bytes]", welcome: messages.Welcome) -> None:
    """To the daemon that said this, which lets in who shows the session's token."""
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.MAXMSGSIZE, messages.MAX_FRAME_BYTES)
    socket.setsockopt(zmq.PLAIN_USERNAME, messages.PLAIN_USER)
    socket.setsockopt(zmq.PLAIN_PASSWORD, messages.plain_password(welcome.token))
    socket.connect(welcome.requests)
