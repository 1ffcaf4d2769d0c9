"""A session on which anything can be sent: a lifeline and a DEALER socket, and no client library.

Invariant: every wait is bounded. Knows nothing of what the answers should be.
"""

import itertools
import socket
from collections.abc import Sequence

import zmq

from allocator import RuntimeDir
from allocator.backends import for_handle
from allocator.lifeline import Lifeline
from allocator.messages import (
    PLAIN_USER,
    PROTOCOL_VERSION,
    REQUEST_ID_BYTES,
    Elected,
    Extent,
    Failed,
    Handle,
    Hello,
    Message,
    Open,
    Release,
    Reply,
    Reserve,
    Reserved,
    Seal,
    Sealed,
    Welcome,
    decode_reply,
    encode,
    plain_password,
)

TIMEOUT_S = 300.0
Socket = zmq.Socket[bytes]


class RawSession:
    """One session. Requests can be sent without waiting for their answers."""

    def __init__(self, runtime_dir: RuntimeDir, *, resume: bytes = b"", device: str = "") -> None:
        hello = Hello(version=PROTOCOL_VERSION, device=device, label="raw", resume=resume)
        self.lifeline = Lifeline.connect(runtime_dir.lifeline, TIMEOUT_S, hello)
        self.token = self.lifeline.welcome.token
        self._context = zmq.Context(io_threads=1)
        self._socket = requests_socket(self._context, self.lifeline.welcome)
        self._ids = itertools.count(1)

    def send_frames(self, frames: Sequence[bytes]) -> None:
        """Whatever they are."""
        self._socket.send_multipart(frames)

    def send(self, payload: bytes, token: bytes | None = None) -> bytes:
        """A request with a correct envelope; its id."""
        request_id = next(self._ids).to_bytes(REQUEST_ID_BYTES, "big")
        self.send_frames([request_id, self.token if token is None else token, payload])
        return request_id

    def receive(self, timeout_s: float = TIMEOUT_S) -> tuple[bytes, Reply]:
        """The next answer, and which request it is for. It must be one that a client can read."""
        assert self._socket.poll(int(timeout_s * 1000)), "no reply"
        request_id, frame = self._socket.recv_multipart()
        return request_id, decode_reply(frame)

    def poll(self) -> bool:
        """Whether an answer is there."""
        return bool(self._socket.poll(0))

    def await_reply(self, request_id: bytes) -> Reply:
        """The answer to this request; earlier ones are thrown away."""
        while True:
            answered, reply = self.receive()
            if answered == request_id:
                return reply

    def ask(self, request: Message, token: bytes | None = None) -> Reply:
        """One round trip."""
        return self.await_reply(self.send(encode(request), token))

    def code(self, request: Message) -> str:
        """The code that a request is refused with."""
        reply = self.ask(request)
        assert isinstance(reply, Failed), reply
        return reply.code

    # --- shortcuts

    def elected(self, key: str, fingerprint: dict[str, str] | None = None) -> int:
        """Become the writer of a set; its generation."""
        reply = self.ask(Open(key=key, fingerprint=fingerprint or {}, wait_ms=0))
        assert isinstance(reply, Elected), reply
        return reply.generation

    def reserved(self, key: str, generation: int, num_bytes: int) -> Handle:
        """The writer's segment."""
        reply = self.ask(Reserve(key=key, generation=generation, num_bytes=num_bytes))
        assert isinstance(reply, Reserved), reply
        return reply.handle

    def sealed(self, key: str, num_bytes: int, fingerprint: dict[str, str] | None = None) -> Handle:
        """A set that this session reads. Its manifest is nothing that could be read."""
        generation = self.elected(key, fingerprint)
        commit(self.reserved(key, generation, num_bytes))
        manifest = Extent(offset=0, num_bytes=0)
        reply = self.ask(
            Seal(key=key, generation=generation, manifest=manifest, manifest_digest="")
        )
        assert isinstance(reply, Sealed), reply
        return reply.handle

    def idle(self, key: str, num_bytes: int) -> Handle:
        """A set that nobody reads."""
        handle = self.sealed(key, num_bytes)
        self.ask(Release(key=key, generation=handle.generation))
        return handle

    def close(self) -> None:
        """End the session."""
        self.lifeline.close()
        self._context.destroy(0)


def requests_socket(context: "zmq.Context[zmq.Socket[bytes]]", welcome: Welcome) -> Socket:
    """A DEALER that the daemon lets in."""
    dealer = context.socket(zmq.DEALER)
    dealer.setsockopt(zmq.LINGER, 0)
    dealer.setsockopt(zmq.PLAIN_USERNAME, PLAIN_USER)
    dealer.setsockopt(zmq.PLAIN_PASSWORD, plain_password(welcome.token))
    dealer.connect(welcome.requests)
    return dealer


def commit(handle: Handle) -> Handle:
    """Give a segment of host memory all its memory, as whoever seals it must have done."""
    if handle.backend == "host":
        for_handle(handle).map(handle, writable=True).close()
    return handle


def raw_lifeline(runtime_dir: RuntimeDir) -> socket.socket:
    """A connection to the lifeline's listener, on which nothing was said yet."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
    connection.connect(str(runtime_dir.lifeline))  # blocking: it waits for room in the queue
    connection.settimeout(TIMEOUT_S)
    return connection
