"""What the journal holds: each record is one change, and all of them together are the state.

Owns the records' types and their encoding. Invariant: reading the records in order gives what the
daemon held when it wrote the last one. Knows nothing of files, nor of what becomes of them.
"""

from collections.abc import Callable
from typing import Final

import msgspec

from allocator.daemon.weights.state import Copy
from allocator.messages import Extent, Handle, Message, Tier

JOURNAL_VERSION: Final = 1


class RunBegan(Message, tag="run_began", frozen=True):
    """First record. Memory of another boot is gone whatever the records say."""

    version: int
    boot_id: str


class SessionBegan(Message, tag="session_began", frozen=True):
    """A client came; its process is known by pid and start time."""

    number: int
    pid: int
    start_ticks: int
    token: bytes
    device: str
    model: str
    user: str
    label: str


class SessionEnded(Message, tag="session_ended", frozen=True):
    """All that it held is free."""

    number: int


class SetKept(Message, tag="set_kept", frozen=True):
    """A weight set as it now is. `identities` are its segments', as the backend tells them."""

    device: str
    key: str
    fingerprint: dict[str, str]
    model: str
    user: str
    generation: int
    copies: dict[Tier, Copy]
    writer: int | None
    target_tier: Tier
    target: Handle | None
    identities: dict[str, str]
    readers: dict[int, int]
    pinned: bool


class ReadersChanged(Message, tag="readers_changed", frozen=True):
    """A session reads the set once more, or once less."""

    device: str
    key: str
    session: int
    delta: int


class SetGone(Message, tag="set_gone", frozen=True):
    """No copy and no writer is left."""

    device: str
    key: str


class PoolMade(Message, tag="pool_made", frozen=True):
    """The device's pool has its segment."""

    device: str
    handle: Handle
    identity: str


class LeasesMade(Message, tag="leases_made", frozen=True):
    """Extents went to a session."""

    device: str
    session: int
    generation: int
    extents: tuple[Extent, ...]


class LeasesEnded(Message, tag="leases_ended", frozen=True):
    """A session returned them."""

    device: str
    session: int
    offsets: tuple[int, ...]


class BlocksKept(Message, tag="blocks_kept", frozen=True):
    """Extents went to the index. `session` leased them until then and pins them now; 0: neither."""

    device: str
    session: int
    blocks: tuple[tuple[bytes, Extent], ...]


class PinsChanged(Message, tag="pins_changed", frozen=True):
    """Each of these blocks has one pin of the session more, or one less."""

    device: str
    session: int
    digests: tuple[bytes, ...]
    pinned: bool


class BlockGone(Message, tag="block_gone", frozen=True):
    """A block was evicted."""

    device: str
    digest: bytes


class QuotaKept(Message, tag="quota_kept", frozen=True):
    """A quota as it now is; None: there is none."""

    device: str
    kind: str
    name: str
    num_bytes: int | None


Record = (
    RunBegan
    | SessionBegan
    | SessionEnded
    | SetKept
    | ReadersChanged
    | SetGone
    | PoolMade
    | LeasesMade
    | LeasesEnded
    | BlocksKept
    | PinsChanged
    | BlockGone
    | QuotaKept
)

Note = Callable[..., None]
"""Append a record to the journal: `note(record, sync=False)`."""

_decoder: msgspec.msgpack.Decoder[Record] = msgspec.msgpack.Decoder(Record)


def decode_record(payload: bytes) -> Record:
    """Raises `msgspec.DecodeError`."""
    return _decoder.decode(payload)
