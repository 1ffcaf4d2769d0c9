"""What a client and the allocator say to each other. Read this before any other file.

Owns the wire types, one union per direction, and the manifest that lies inside a sealed segment.
Invariant: every message is bounded and validated when it is decoded, and its size does not depend
on the number of tensors. Knows nothing of what the bytes mean.

Two sockets carry a session (docs/architecture.md):
  lifeline   Unix SOCK_SEQPACKET: the client sends one `Hello`, the daemon answers with `Welcome` or
             `Refused`, and later only with descriptors (`Descriptor`) where a device needs them, or
             to say that requests are lost (`AskAgain`); that it stays open is the lease on
             everything the session holds.
  requests   ZeroMQ DEALER → ROUTER, which lets in who shows a session's token (PLAIN): frames
             [request id, 8 bytes][session token, 16 bytes][request], answered by
             [request id][reply].
"""

from typing import Annotated, Final, Literal

import msgspec

PROTOCOL_VERSION: Final = 5
MAX_FRAME_BYTES: Final = 1 << 20
TOKEN_BYTES: Final = 16
REQUEST_ID_BYTES: Final = 8
ALIGNMENT: Final = 256
"""Offsets inside a segment are multiples of this many bytes, which suits every vector unit."""
MAX_BATCH: Final = 1024
"""Extents or blocks that one request can name."""
MAX_BYTES: Final = 1 << 62
"""Whatever is counted in bytes, a sum as well, ends here."""

Bytes = Annotated[int, msgspec.Meta(ge=0, le=MAX_BYTES)]
PositiveBytes = Annotated[int, msgspec.Meta(ge=1, le=MAX_BYTES)]
Count = Annotated[int, msgspec.Meta(ge=1, le=MAX_BATCH)]
Generation = Annotated[int, msgspec.Meta(ge=0, le=(1 << 62))]
Key = Annotated[str, msgspec.Meta(min_length=1, max_length=512)]
Name = Annotated[str, msgspec.Meta(max_length=256)]
Word = Annotated[str, msgspec.Meta(max_length=4096)]
Fields = Annotated[dict[Word, Word], msgspec.Meta(max_length=256)]
Milliseconds = Annotated[int, msgspec.Meta(ge=0, le=(1 << 62))]
WaitMs = Annotated[int, msgspec.Meta(ge=0, le=60_000)]
BlockDigest = Annotated[bytes, msgspec.Meta(min_length=16, max_length=64)]
"""Content address of a KV block. Equal digests mean equal bytes: who makes them answers for it."""

Tier = Literal["device", "host", "disk"]
LowerTier = Literal["host", "disk"]


class Message(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of everything on the wire and in a manifest."""


class Extent(Message, frozen=True):
    """Bytes [offset, offset + num_bytes) of a segment or of the pool."""

    offset: Bytes
    num_bytes: Bytes


class Handle(Message, frozen=True, kw_only=True):
    """What is needed to map a segment: its backend and device, its name there, its size, its
    generation. `page_policy` is how a writer should commit it, `identity` what a file must still
    be."""

    backend: Name
    device: Name = ""
    segment: Word
    num_bytes: Bytes
    generation: Generation
    page_policy: Name = ""
    identity: Name = ""


# --- lifeline


class Hello(Message, tag="hello", frozen=True):
    """A session is wanted. `device` is "" for the daemon's first. What it holds is charged to
    `model` and `user`; `label` is for people. `resume` is the token of a session that this process
    had with an earlier daemon of the runtime directory."""

    version: int
    device: Name = ""
    model: Name = ""
    user: Name = ""
    label: Name = ""
    resume: Annotated[bytes, msgspec.Meta(max_length=TOKEN_BYTES)] = b""


class Welcome(Message, tag="welcome", frozen=True):
    """The session exists. `requests` is the ZeroMQ endpoint, `token` goes with every request.
    `resumed`: it holds what it held before."""

    version: int
    pid: int
    token: bytes
    requests: Word
    device: Name
    devices: tuple[Name, ...]
    resumed: bool = False


class Refused(Message, tag="refused", frozen=True):
    """No session: `code` and `message` as in `Failed`. The daemon closes the lifeline after it."""

    code: Word
    message: Word


class Descriptor(Message, tag="descriptor", frozen=True):
    """Comes with file descriptors (SCM_RIGHTS) for the handle in the reply to this request, and
    before that reply."""

    request_id: bytes


class AskAgain(Message, tag="ask_again", frozen=True):
    """Requests that have not been answered are lost, and their answers may be: the daemon has begun
    its ZeroMQ socket anew. A client connects to it anew, and asks what it holds."""


# --- client → daemon: weight sets


class Open(Message, tag="open", frozen=True):
    """Take part in the weight set `key`: read it if it is sealed, write it if nobody does, else
    wait up to `wait_ms` for its writer. Answered by Sealed, Elected or StillLoading. Without a
    fingerprint: whatever there is under that key, but only if there is something."""

    key: Key
    fingerprint: Fields | None
    wait_ms: WaitMs


class Reserve(Message, tag="reserve", frozen=True):
    """Writer only: one allocation for the whole weight set. Answered by Reserved."""

    key: Key
    generation: Generation
    num_bytes: PositiveBytes


class Progress(Message, tag="progress", frozen=True):
    """Writer only: `num_bytes` of the set are written. Answered by Done."""

    key: Key
    generation: Generation
    num_bytes: Bytes


class Seal(Message, tag="seal", frozen=True):
    """Writer only: all bytes are written; `manifest` says where in the segment they are described.
    `manifest_digest` is the digest of the manifest's bytes. `files` are mapped beside the segment
    (`TensorEntry.segment`); `in_place` says that no segment was reserved since the image that the
    writer was elected with serves as it is. Answered by Sealed; the writer is a reader from then
    on."""

    key: Key
    generation: Generation
    manifest: Extent
    manifest_digest: Name
    files: Annotated[tuple[Handle, ...], msgspec.Meta(max_length=MAX_BATCH)] = ()
    in_place: bool = False


class Abandon(Message, tag="abandon", frozen=True):
    """Writer only: give up; the next one who waits is elected. With `discard_source` the copy on a
    lower tier, which turned out to be damaged, goes too. Answered by Done."""

    key: Key
    generation: Generation
    discard_source: bool = False


class Release(Message, tag="release", frozen=True):
    """Reader only: this session no longer maps the set. Answered by Done."""

    key: Key
    generation: Generation


class Evict(Message, tag="evict", frozen=True):
    """Free an idle or sleeping weight set; its image on disk goes only with `image`. Answered by
    Done."""

    key: Key
    image: bool = False


class Pin(Message, tag="pin", frozen=True):
    """A pinned set is never evicted to make room. Answered by Done."""

    key: Key
    pinned: bool


class Sleep(Message, tag="sleep", frozen=True):
    """Move an idle set to a lower tier. Answered by Done where it is there, Moving where this
    session is to copy it, StillLoading where another one does after `wait_ms`."""

    key: Key
    tier: LowerTier
    wait_ms: WaitMs


class Moved(Message, tag="moved", frozen=True):
    """The mover's word that the copy on the lower tier is complete; the upper one is freed then.
    Answered by Done."""

    key: Key
    generation: Generation


# --- client → daemon: the pool


class Lease(Message, tag="lease", frozen=True):
    """`count` extents of `num_bytes` each. Answered by Leased, or Failed: all or none.
    `alone_since_ms`: this session works at one task only, which began then (CLOCK_MONOTONIC), and
    has nothing else to give way for it; 0 where that is not so."""

    num_bytes: PositiveBytes
    count: Count = 1
    alone_since_ms: Milliseconds = 0


class MakeRoom(Message, tag="make_room", frozen=True):
    """What this session was given could not be committed: the device is short of `num_bytes`, since
    others use it, too. Answered by Done where some room was made, so that it is worth trying again,
    else by Failed."""

    num_bytes: PositiveBytes


class LeaseId(Message, frozen=True, array_like=True):
    """One leased extent. The generation tells it from an earlier lease of the same offset."""

    offset: Bytes
    generation: Generation


class Return(Message, tag="return", frozen=True):
    """Give leased extents back. Answered by Done; nothing is returned if one of them is refused."""

    leases: Annotated[tuple[LeaseId, ...], msgspec.Meta(max_length=MAX_BATCH)]


class BlockToPut(Message, frozen=True, array_like=True):
    """A leased extent that holds a full block, never to be written again."""

    digest: BlockDigest
    offset: Bytes
    generation: Generation


class PutBlocks(Message, tag="put_blocks", frozen=True):
    """Hand leased extents over to the index of sealed blocks; this session keeps them pinned.
    Answered by BlocksPut."""

    blocks: Annotated[tuple[BlockToPut, ...], msgspec.Meta(max_length=MAX_BATCH)]


class LookUpBlocks(Message, tag="look_up_blocks", frozen=True):
    """How many of these blocks, from the first on, are in the index? Those are pinned. Answered by
    Blocks."""

    digests: Annotated[tuple[BlockDigest, ...], msgspec.Meta(max_length=MAX_BATCH)]


class UnpinBlocks(Message, tag="unpin_blocks", frozen=True):
    """This session no longer maps these blocks. Answered by Done."""

    digests: Annotated[tuple[BlockDigest, ...], msgspec.Meta(max_length=MAX_BATCH)]


class GetShare(Message, tag="get_share", frozen=True):
    """How much of the pool may this session hold? Answered by Share. Asked now and then by who
    holds some, it also shows that this one is at work."""


# --- client → daemon: looking


class SetQuota(Message, tag="set_quota", frozen=True):
    """What a model's or a user's sessions and sets may hold together; None lifts it. Answered by
    Done."""

    kind: Literal["model", "user"]
    name: Annotated[str, msgspec.Meta(min_length=1, max_length=256)]
    num_bytes: Bytes | None


class GetStatistics(Message, tag="get_statistics", frozen=True):
    """Answered by Statistics."""


class GetRegions(Message, tag="get_regions", frozen=True):
    """Answered by Regions."""


class GetEvents(Message, tag="get_events", frozen=True):
    """What happened after event number `after`. Answered by Events."""

    after: Generation = 0


class GetHoldings(Message, tag="get_holdings", frozen=True):
    """What this session holds, page by page from 0 on. Answered by Holdings."""

    page: Generation = 0


class GetSegments(Message, tag="get_segments", frozen=True):
    """What this device has handed out to be mapped, page by page from 0 on. Answered by
    Segments."""

    page: Generation = 0


class CheckIntegrity(Message, tag="check_integrity", frozen=True):
    """Check every invariant of the device now. Answered by Done; a daemon that finds one broken
    ends."""


Request = (
    Open
    | Reserve
    | Progress
    | Seal
    | Abandon
    | Release
    | Evict
    | Pin
    | Sleep
    | Moved
    | Lease
    | MakeRoom
    | Return
    | PutBlocks
    | LookUpBlocks
    | UnpinBlocks
    | GetShare
    | SetQuota
    | GetStatistics
    | GetRegions
    | GetEvents
    | GetHoldings
    | GetSegments
    | CheckIntegrity
)


# --- daemon → client


class Done(Message, tag="done", frozen=True):
    """It is so."""


class Source(Message, frozen=True):
    """A copy of the set on a lower tier. `manifest` is None for an image, whose own record says
    where it lies."""

    tier: LowerTier
    handle: Handle
    manifest: Extent | None


class Elected(Message, tag="elected", frozen=True):
    """The session is the set's writer under this generation. With a `source` it wakes the set:
    there is a copy to fill it from."""

    generation: Generation
    source: Source | None = None


class Reserved(Message, tag="reserved", frozen=True):
    """The writer's segment, to be mapped writable."""

    handle: Handle


class Sealed(Message, tag="sealed", frozen=True):
    """The session is a reader of the sealed set."""

    handle: Handle
    manifest: Extent
    files: tuple[Handle, ...] = ()


class Moving(Message, tag="moving", frozen=True):
    """The session is to copy the set from `handle` into `target`, or, where that is None, into an
    image in `image_folder`, and then to say Moved."""

    generation: Generation
    fingerprint: Fields
    handle: Handle
    manifest: Extent
    target: Handle | None
    image_folder: Word


class StillLoading(Message, tag="still_loading", frozen=True):
    """The wait ran out; the writer is alive. Ask again."""

    writer_pid: int
    num_bytes: Bytes
    total_bytes: Bytes


class Leased(Message, tag="leased", frozen=True):
    """Extents of the pool, this session's until it returns them or ends."""

    pool: Handle
    extents: tuple[Extent, ...]
    generation: Generation


class BlocksPut(Message, tag="blocks_put", frozen=True):
    """For each block whether the index took it; where not, it had those bytes already, and the
    extent stays leased."""

    stored: tuple[bool, ...]


class Blocks(Message, tag="blocks", frozen=True):
    """The blocks that are there, in the order asked for, up to the first that is not."""

    pool: Handle
    extents: tuple[Extent, ...]


class Failed(Message, tag="failed", frozen=True):
    """A typed error: `code` is one of `allocator.errors`."""

    code: Word
    message: Word


class SetHeld(Message, frozen=True, array_like=True):
    """How often a session reads a set, and whether it writes it."""

    key: Key
    generation: Generation
    num_reads: int
    writes: bool


class BlockHeld(Message, frozen=True, array_like=True):
    """How often a session pins a block."""

    digest: BlockDigest
    num_pins: int


class Holdings(Message, tag="holdings", frozen=True):
    """One page of what a session holds; `more` where it is not the last one."""

    sets: tuple[SetHeld, ...]
    leases: tuple[LeaseId, ...]
    blocks: tuple[BlockHeld, ...]
    more: bool


WeightSetState = Literal["absent", "loading", "sealed", "idle", "moving", "asleep"]


class WeightSetStatistics(Message, frozen=True):
    """One weight set. `tier` is the highest that holds a copy; `segment` names that copy, `files`
    what is mapped beside it, with sizes. `reader_pids` has one entry for each reading session.
    """

    key: str
    state: WeightSetState
    tier: Tier
    generation: int
    segment: str
    files: tuple[tuple[str, int], ...]
    num_bytes: Bytes
    written_bytes: Bytes
    writer_pid: int | None
    reader_pids: tuple[int, ...]
    idle_s: float
    pinned: bool
    model: str
    user: str
    has_image: bool


class SessionStatistics(Message, frozen=True):
    """One session. `adopted`: its client has not come back since the daemon was replaced."""

    number: int
    pid: int
    label: str
    model: str
    user: str
    leased_bytes: Bytes
    num_leases: int
    num_pinned_blocks: int
    adopted: bool


class Share(Message, tag="share", frozen=True):
    """What a session holds of the pool, leased and pinned, and an equal part of it for everybody
    who holds or wants some. `wanted`: another session lacks room, and what is held beyond the equal
    part should be given back. `older_since_ms`: the only task of another session, which began then,
    lacks room, and what tasks that began later hold should be given back; 0: there is none."""

    held_bytes: Bytes
    fair_bytes: Bytes
    wanted: bool
    older_since_ms: Milliseconds = 0


class PoolStatistics(Message, frozen=True):
    """Extents for KV blocks. total = leased + cached + free, in bytes; cached blocks that nobody
    pins are evicted when room is needed."""

    total_bytes: Bytes
    leased_bytes: Bytes
    cached_bytes: Bytes
    evictable_bytes: Bytes
    largest_free_bytes: Bytes
    fragmentation: float
    num_leases: int
    num_blocks: int
    num_lookups: int
    num_hits: int
    num_block_evictions: int


class QuotaStatistics(Message, frozen=True):
    """What a model or a user may hold, and holds."""

    kind: str
    name: str
    limit_bytes: Bytes
    used_bytes: Bytes


class Statistics(Message, tag="statistics", frozen=True):
    """A consistent picture of one device. `used_bytes` counts weight sets on the device, leased
    extents and cached blocks; `limit_bytes` is what we may use at most. The host tier counts for
    itself."""

    pid: int
    uptime_s: float
    device: str
    limit_bytes: Bytes
    used_bytes: Bytes
    weights_bytes: Bytes
    host_tier_bytes: Bytes
    host_tier_limit_bytes: Bytes
    num_sessions: int
    num_adopted_sets: int
    num_evictions: int
    num_events: int
    weight_sets: tuple[WeightSetStatistics, ...]
    sessions: tuple[SessionStatistics, ...]
    pool: PoolStatistics
    quotas: tuple[QuotaStatistics, ...]


class Region(Message, frozen=True, array_like=True):
    """Part of the pool: free, leased by a session (its number and pid) or cached (pins)."""

    offset: Bytes
    num_bytes: Bytes
    kind: Literal["free", "leased", "cached"]
    holder: int = 0
    pid: int = 0


class Regions(Message, tag="regions", frozen=True):
    """The pool by offset; neighbours of one kind and holder are one region. `truncated` where
    there are more than fit into a frame."""

    total_bytes: Bytes
    regions: tuple[Region, ...]
    truncated: bool = False


class SegmentHandedOut(Message, frozen=True):
    """A segment of the weight set `key`, or a file that is mapped beside it; with "" the pool's.
    The handle's `identity` is what the segment must still be."""

    key: Annotated[str, msgspec.Meta(max_length=512)]
    handle: Handle


class Segments(Message, tag="segments", frozen=True):
    """One page of them; `more` where it is not the last one."""

    segments: tuple[SegmentHandedOut, ...]
    more: bool


class Event(Message, frozen=True):
    """Something that happened, at `time_s` since the epoch."""

    number: int
    time_s: float
    kind: str
    text: str


class Events(Message, tag="events", frozen=True):
    """In order; older ones than the history keeps are gone."""

    events: tuple[Event, ...]


Reply = (
    Done
    | Elected
    | Reserved
    | Sealed
    | Moving
    | StillLoading
    | Leased
    | BlocksPut
    | Blocks
    | Share
    | Failed
    | Statistics
    | Regions
    | Events
    | Holdings
    | Segments
)


# --- inside a sealed segment


class TensorEntry(Message, frozen=True):
    """One tensor: `dtype` as torch prints it without "torch.", strides in elements. Two entries
    with one extent are tied. `segment` is 0 for the set's own segment, else i for its i-th file;
    `digest` is that of the bytes (`allocator.digests`), "" where none was made."""

    dtype: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: Bytes
    num_bytes: Bytes
    digest: str = ""
    segment: int = 0


class Manifest(Message, frozen=True):
    """What a sealed segment holds, and whatever its writer wants its readers to know."""

    version: int
    tensors: dict[str, TensorEntry]
    metadata: dict[str, str]


DIGEST_CHARACTERS: Final = 32


def manifest_bytes(manifest: Manifest) -> int:
    """How many bytes of the segment the manifest takes once every tensor has its digest."""
    filled = {
        name: msgspec.structs.replace(entry, digest="0" * DIGEST_CHARACTERS)
        for name, entry in manifest.tensors.items()
    }
    return len(encode(msgspec.structs.replace(manifest, tensors=filled)))


FromDaemon = Welcome | Refused | Descriptor | AskAgain
"""What the daemon says on the lifeline."""

_encoder = msgspec.msgpack.Encoder()
_lifeline: msgspec.msgpack.Decoder[FromDaemon] = msgspec.msgpack.Decoder(FromDaemon)
_hello: msgspec.msgpack.Decoder[Hello] = msgspec.msgpack.Decoder(Hello)
_request: msgspec.msgpack.Decoder[Request] = msgspec.msgpack.Decoder(Request)
_reply: msgspec.msgpack.Decoder[Reply] = msgspec.msgpack.Decoder(Reply)
_manifest: msgspec.msgpack.Decoder[Manifest] = msgspec.msgpack.Decoder(Manifest)


PLAIN_USER: Final = b"onecopy"
"""The name that goes with a session's token when the requests' socket is connected."""


def plain_password(token: bytes) -> bytes:
    """A token as the handshake takes it."""
    return token.hex().encode()


def plain_token(password: bytes) -> bytes:
    """The reverse; b"" for what is no token."""
    try:
        return bytes.fromhex(password.decode())
    except ValueError:
        return b""


def encode(message: Message) -> bytes:
    """One message as one frame."""
    return _encoder.encode(message)


def decode_lifeline(frame: bytes) -> FromDaemon:
    """Raises `msgspec.DecodeError` on anything but a valid message."""
    return _lifeline.decode(frame)


def decode_hello(frame: bytes) -> Hello:
    """Raises `msgspec.DecodeError` on anything but a valid message."""
    return _hello.decode(frame)


def decode_request(frame: bytes | memoryview) -> Request:
    """Raises `msgspec.DecodeError` on anything but a valid message."""
    return _request.decode(frame)


def decode_reply(frame: bytes | memoryview) -> Reply:
    """Raises `msgspec.DecodeError` on anything but a valid message."""
    return _reply.decode(frame)


def decode_manifest(frame: bytes | memoryview) -> Manifest:
    """Raises `msgspec.DecodeError` on anything but a valid manifest."""
    return _manifest.decode(frame)
