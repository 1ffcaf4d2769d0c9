"""What the journal holds: records, and what they say together.

    what a thing is       SessionBegan, SetKept, PoolMade, BlocksKept, QuotaKept
    that it is no more    SessionEnded, SetGone, BlockGone
    what a session holds  SessionChanged: of sets and pool alike, by the changes of its books, which
                          follow from each request (`allocator.journaled`): so of a lease that ends

Owns the records, their encoding, and what each does to `Kept`, beside its fields. Invariant:
entering the records in order gives what the daemon held when it wrote the last one. A daemon writes
its state and reads its predecessor's by these types alone. Knows nothing of files, nor of what is
still true.
"""

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import msgspec

from allocator.books import Books, Change, LeasesSealed, PinsChanged, SessionId
from allocator.daemon.weights.weight_set import Copy
from allocator.messages import Extent, Handle, Message, Tier

log = logging.getLogger("onecopy.allocator")

JOURNAL_VERSION: Final = 2


@dataclass
class KeptDevice:
    """What the journal says of one device, but for what sessions hold of it."""

    sets: dict[str, "SetKept"] = field(default_factory=dict)
    quotas: dict[tuple[str, str], int] = field(default_factory=dict)
    pool: "PoolMade | None" = None
    blocks: dict[bytes, Extent] = field(default_factory=dict)
    """The index, those that were used last at the end."""

    def used(self, digests: Iterable[bytes]) -> None:
        """Raises KeyError for a block that is not in the index."""
        for digest in digests:
            self.blocks[digest] = self.blocks.pop(digest)


@dataclass
class Kept:
    """What the journal says."""

    sessions: dict[SessionId, "SessionBegan"] = field(default_factory=dict)
    books: dict[SessionId, Books] = field(default_factory=dict)
    devices: dict[str, KeptDevice] = field(default_factory=dict)

    def device(self, name: str) -> KeptDevice:
        """That of one device; empty where it is not mentioned."""
        return self.devices.setdefault(name, KeptDevice())

    def segments(self) -> set[str]:
        """The names of all that it mentions in shared memory."""
        handles = [device.pool.handle for device in self.devices.values() if device.pool]
        for device in self.devices.values():
            for one in device.sets.values():
                handles += [copy.handle for copy in one.copies.values()]
                handles += [one.target] if one.target is not None else []
        return {handle.segment for handle in handles if handle.backend != "file"}


class RunBegan(Message, tag="run_began", frozen=True):
    """First record. Memory of another boot is gone whatever the records say."""

    version: int
    boot_id: str

    def enter(self, kept: Kept) -> None:
        """It says nothing of what is held."""


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

    def enter(self, kept: Kept) -> None:
        kept.sessions[self.number] = self
        kept.books[self.number] = Books()


class SessionChanged(Message, tag="session_changed", frozen=True):
    """What a session holds has changed, by one request or as it is written anew."""

    session: int
    changes: tuple[Change, ...]

    def enter(self, kept: Kept) -> None:
        books = kept.books[self.session]
        device = kept.device(kept.sessions[self.session].device)
        for change in self.changes:
            if not change.fits(books):
                raise LookupError(f"session {self.session}: {change}")
            if isinstance(change, LeasesSealed):
                for block in change.blocks:
                    num_bytes = books.leases[block.offset, block.generation]
                    device.blocks[block.digest] = Extent(offset=block.offset, num_bytes=num_bytes)
            elif isinstance(change, PinsChanged):
                device.used(change.digests)
            change.enter(books)


class SessionEnded(Message, tag="session_ended", frozen=True):
    """All that it held is free."""

    number: int

    def enter(self, kept: Kept) -> None:
        session, books = kept.sessions.pop(self.number), kept.books.pop(self.number)
        kept.device(session.device).used(books.pins)


class SetKept(Message, tag="set_kept", frozen=True):
    """A weight set as it now is, but for its readers. `identities` are its segments', as the
    backend tells them."""

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
    pinned: bool

    def enter(self, kept: Kept) -> None:
        kept.device(self.device).sets[self.key] = self


class SetGone(Message, tag="set_gone", frozen=True):
    """No copy and no writer is left."""

    device: str
    key: str

    def enter(self, kept: Kept) -> None:
        kept.device(self.device).sets.pop(self.key, None)


class PoolMade(Message, tag="pool_made", frozen=True):
    """The device's pool has its segment."""

    device: str
    handle: Handle
    identity: str

    def enter(self, kept: Kept) -> None:
        kept.device(self.device).pool = self


class BlocksKept(Message, tag="blocks_kept", frozen=True):
    """Blocks are in the index, as it is written anew: who put them there is told by a change."""

    device: str
    blocks: tuple[tuple[bytes, Extent], ...]

    def enter(self, kept: Kept) -> None:
        kept.device(self.device).blocks.update(self.blocks)


class BlockGone(Message, tag="block_gone", frozen=True):
    """A block was evicted."""

    device: str
    digest: bytes

    def enter(self, kept: Kept) -> None:
        del kept.device(self.device).blocks[self.digest]


class QuotaKept(Message, tag="quota_kept", frozen=True):
    """A quota as it now is; None: there is none."""

    device: str
    kind: str
    name: str
    num_bytes: int | None

    def enter(self, kept: Kept) -> None:
        quotas = kept.device(self.device).quotas
        if self.num_bytes is None:
            quotas.pop((self.kind, self.name), None)
        else:
            quotas[self.kind, self.name] = self.num_bytes


Record = (
    RunBegan
    | SessionBegan
    | SessionChanged
    | SessionEnded
    | SetKept
    | SetGone
    | PoolMade
    | BlocksKept
    | BlockGone
    | QuotaKept
)
"""`enter` makes it part of what is kept. Raises LookupError where it contradicts what was told
before."""

Note = Callable[..., None]
"""Append a record to the journal: `note(record, sync=False)`."""

_decoder: msgspec.msgpack.Decoder[Record] = msgspec.msgpack.Decoder(Record)


def decode_record(payload: bytes) -> Record:
    """Raises `msgspec.DecodeError`."""
    return _decoder.decode(payload)


def boot_id() -> str:
    """Of the running kernel: memory of another boot is gone (random(4), proc(5))."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def read_records(payloads: Iterable[bytes]) -> Kept:
    """What a journal says; nothing where it is of another boot or version; of one that contradicts
    itself the quotas alone, which say nothing of memory."""
    try:
        records = [decode_record(payload) for payload in payloads]
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        log.warning("the journal can't be read, nothing is adopted: %s", error)
        return Kept()
    if not records:
        return Kept()
    first = records[0]
    if not isinstance(first, RunBegan) or first.version != JOURNAL_VERSION:
        log.warning("the journal is another version's, nothing is adopted")
        return Kept()
    if first.boot_id != boot_id():
        log.info("the journal is of an earlier boot: its memory is gone")
        return Kept()
    kept = Kept()
    try:
        for record in records:
            record.enter(kept)
    except LookupError as error:
        log.error("the journal contradicts itself, nothing is adopted: %r", error)  # noqa: TRY400
        kept = Kept()
        for record in records:
            if isinstance(record, QuotaKept):
                record.enter(kept)
    return kept
