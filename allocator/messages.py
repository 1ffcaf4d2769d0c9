"""What a client and the allocator say to each other. Read this before any other file of the room.

Owns the wire types, one union per direction, and the manifest that lies inside a sealed segment.
Invariant: every message is bounded and validated when it is decoded, and its size does not depend
on the number of tensors. Knows nothing of what the bytes mean.

Two sockets carry a session (docs/architecture.md):
  lifeline   Unix SOCK_SEQPACKET: the daemon sends one `Welcome` or `Refused` and then nothing; that
             it stays open is the lease on everything the session holds.
  requests   ZeroMQ DEALER → ROUTER, frames [request id, 8 bytes][session token, 16 bytes][request],
             answered by [request id][reply].
"""

from typing import Annotated, Final, Literal

import msgspec

PROTOCOL_VERSION: Final = 1
MAX_FRAME_BYTES: Final = 1 << 20
TOKEN_BYTES: Final = 16
REQUEST_ID_BYTES: Final = 8
ALIGNMENT: Final = 256
"""Offsets inside a segment are multiples of this many bytes, which suits every vector unit."""

Bytes = Annotated[int, msgspec.Meta(ge=0, le=(1 << 62))]
Key = Annotated[str, msgspec.Meta(min_length=1, max_length=512)]
Word = Annotated[str, msgspec.Meta(max_length=4096)]
Fields = Annotated[dict[Word, Word], msgspec.Meta(max_length=256)]
WaitMs = Annotated[int, msgspec.Meta(ge=0, le=60_000)]


class Message(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of everything on the wire and in a manifest."""


class Extent(Message, frozen=True):
    """Bytes [offset, offset + num_bytes) of a segment."""

    offset: Bytes
    num_bytes: Bytes


class Handle(Message, frozen=True):
    """What is needed to map a segment: its backend, its name there, its size, its generation."""

    backend: Word
    segment: Word
    num_bytes: Bytes
    generation: int


# --- lifeline


class Welcome(Message, tag="welcome", frozen=True):
    """The session exists. `requests` is the ZeroMQ endpoint, `token` goes with every request."""

    version: int
    pid: int
    token: bytes
    requests: Word


class Refused(Message, tag="refused", frozen=True):
    """No session: `code` and `message` as in `Failed`. The daemon closes the lifeline after it."""

    code: Word
    message: Word


# --- client → daemon


class Open(Message, tag="open", frozen=True):
    """Take part in the weight set `key`: read it if it is sealed, write it if nobody does, else
    wait up to `wait_ms` for its writer. Answered by Sealed, Elected or StillLoading."""

    key: Key
    fingerprint: Fields
    wait_ms: WaitMs


class Reserve(Message, tag="reserve", frozen=True):
    """Writer only: one allocation for the whole weight set. Answered by Reserved."""

    key: Key
    generation: int
    num_bytes: Annotated[int, msgspec.Meta(ge=1, le=(1 << 62))]


class Progress(Message, tag="progress", frozen=True):
    """Writer only: `num_bytes` of the set are written. Answered by Done."""

    key: Key
    generation: int
    num_bytes: Bytes


class Seal(Message, tag="seal", frozen=True):
    """Writer only: all bytes are written; `manifest` says where in the segment they are described.
    Answered by Sealed; the writer is a reader from then on."""

    key: Key
    generation: int
    manifest: Extent


class Abandon(Message, tag="abandon", frozen=True):
    """Writer only: give up; the next one who waits is elected. Answered by Done."""

    key: Key
    generation: int


class Release(Message, tag="release", frozen=True):
    """Reader only: this session no longer maps the set. Answered by Done."""

    key: Key
    generation: int


class Evict(Message, tag="evict", frozen=True):
    """Free an idle weight set. Answered by Done."""

    key: Key


class GetStatistics(Message, tag="get_statistics", frozen=True):
    """Answered by Statistics."""


Request = Open | Reserve | Progress | Seal | Abandon | Release | Evict | GetStatistics


# --- daemon → client


class Done(Message, tag="done", frozen=True):
    """It is so."""


class Elected(Message, tag="elected", frozen=True):
    """The session is the set's writer under this generation."""

    generation: int


class Reserved(Message, tag="reserved", frozen=True):
    """The writer's segment, to be mapped writable."""

    handle: Handle


class Sealed(Message, tag="sealed", frozen=True):
    """The session is a reader of the sealed set."""

    handle: Handle
    manifest: Extent


class StillLoading(Message, tag="still_loading", frozen=True):
    """The wait ran out; the writer is alive. Ask again."""

    writer_pid: int
    num_bytes: Bytes
    total_bytes: Bytes


class Failed(Message, tag="failed", frozen=True):
    """A typed error: `code` is one of `allocator.errors`."""

    code: Word
    message: Word


WeightSetState = Literal["absent", "loading", "sealed", "idle"]


class WeightSetStatistics(Message, frozen=True):
    """One weight set. `reader_pids` has one entry for each reading session."""

    key: str
    state: WeightSetState
    generation: int
    segment: str
    num_bytes: Bytes
    written_bytes: Bytes
    writer_pid: int | None
    reader_pids: tuple[int, ...]
    idle_s: float


class Statistics(Message, tag="statistics", frozen=True):
    """A consistent picture of everything the daemon owns. Bytes of the device: total = used + free,
    where `used_bytes` counts our segments and `limit_bytes` is what we may use at most."""

    pid: int
    uptime_s: float
    device: str
    limit_bytes: Bytes
    used_bytes: Bytes
    num_sessions: int
    weight_sets: tuple[WeightSetStatistics, ...]


Reply = Done | Elected | Reserved | Sealed | StillLoading | Failed | Statistics


# --- inside a sealed segment


class TensorEntry(Message, frozen=True):
    """One tensor: `dtype` as torch prints it without "torch.", strides in elements. Two entries
    with one extent are tied."""

    dtype: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: Bytes
    num_bytes: Bytes


class Manifest(Message, frozen=True):
    """What a sealed segment holds, and whatever its writer wants its readers to know."""

    version: int
    tensors: dict[str, TensorEntry]
    metadata: dict[str, str]


_encoder = msgspec.msgpack.Encoder()
_lifeline: msgspec.msgpack.Decoder[Welcome | Refused] = msgspec.msgpack.Decoder(Welcome | Refused)
_request: msgspec.msgpack.Decoder[Request] = msgspec.msgpack.Decoder(Request)
_reply: msgspec.msgpack.Decoder[Reply] = msgspec.msgpack.Decoder(Reply)
_manifest: msgspec.msgpack.Decoder[Manifest] = msgspec.msgpack.Decoder(Manifest)


def encode(message: Message) -> bytes:
    """One message as one frame."""
    return _encoder.encode(message)


def decode_lifeline(frame: bytes) -> Welcome | Refused:
    """Raises `msgspec.DecodeError` on anything but a valid message."""
    return _lifeline.decode(frame)


def decode_request(frame: bytes | memoryview) -> Request:
    """Raises `msgspec.DecodeError` on anything but a valid message."""
    return _request.decode(frame)


def decode_reply(frame: bytes | memoryview) -> Reply:
    """Raises `msgspec.DecodeError` on anything but a valid message."""
    return _reply.decode(frame)


def decode_manifest(frame: bytes | memoryview) -> Manifest:
    """Raises `msgspec.DecodeError` on anything but a valid manifest."""
    return _manifest.decode(frame)
