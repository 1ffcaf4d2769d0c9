"""One weight set: its copies, who writes and reads it, and who waits for it.

Owns the derivation of its state, and the single steps that change it. Invariant: the state follows
from writer, copies and readers, and is never stored. Which steps a request takes, and when they are
allowed, is said in `weights.sets`.
"""

from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

import msgspec

from allocator.books import SessionId
from allocator.messages import (
    Elected,
    Extent,
    Handle,
    LowerTier,
    Open,
    Sealed,
    Sleep,
    Source,
    StillLoading,
    Tier,
    WeightSetState,
)

ReplyTo = tuple[bytes, bytes]
"""ZeroMQ identity and request id; opaque here."""

TIERS: Final[tuple[Tier, ...]] = ("device", "host", "disk")
"""From the highest down."""
_LOWER_TIERS: Final[tuple[LowerTier, ...]] = ("host", "disk")


@dataclass(frozen=True)
class Waiter:
    """A request that will be answered later: an Open, or a Sleep."""

    session: SessionId
    reply_to: ReplyTo
    deadline: float
    request: Open | Sleep


@dataclass(frozen=True)
class Answer:
    """Effect: tell this waiter."""

    waiter: Waiter
    message: Elected | Sealed | StillLoading


@dataclass(frozen=True)
class Free:
    """Effect: nobody needs this segment any more."""

    handle: Handle


@dataclass(frozen=True)
class Discard:
    """Effect: this image on disk is to be removed."""

    handle: Handle


Effect = Answer | Free | Discard


class Copy(msgspec.Struct, frozen=True):
    """All bytes of a set, on one tier. An image's `manifest` is known once it was read."""

    handle: Handle
    manifest: Extent | None
    manifest_digest: str = ""
    files: tuple[Handle, ...] = ()

    @property
    def num_bytes(self) -> int:
        """The segment's and the files'."""
        return self.handle.num_bytes + sum(file.num_bytes for file in self.files)

    @property
    def owned_bytes(self) -> int:
        """What of it takes memory of its tier, rather than being a file's own pages."""
        return 0 if self.handle.backend == "file" else self.handle.num_bytes

    @property
    def is_file(self) -> bool:
        """Whether some of it is a file's own pages, which cost nothing to map again."""
        return self.handle.backend == "file" or bool(self.files)


@dataclass
class WeightSet:
    """The named, sealed tensors of one checkpoint in one layout, or the making of them."""

    key: str
    fingerprint: Mapping[str, str]
    model: str = ""
    user: str = ""
    generation: int = 0
    copies: dict[Tier, Copy] = field(default_factory=dict)
    writer: SessionId | None = None
    target_tier: Tier = "device"
    target: Handle | None = None
    written_bytes: int = 0
    readers: Counter[SessionId] = field(default_factory=Counter)
    waiters: deque[Waiter] = field(default_factory=deque)
    idle_since: float = 0.0
    pinned: bool = False

    @property
    def state(self) -> WeightSetState:
        """Derived, see the module's invariant."""
        if self.writer is not None:
            return "moving" if self.copies else "loading"
        if "device" in self.copies:
            return "sealed" if self.readers else "idle"
        return "asleep" if self.copies else "absent"

    @property
    def tier(self) -> Tier:
        """The highest that has a copy; "device" for a set that is being loaded."""
        return next((tier for tier in TIERS if tier in self.copies), "device")

    @property
    def highest(self) -> Copy | None:
        """The copy on `tier`."""
        return self.copies.get(self.tier)

    def num_bytes(self, tier: Tier) -> int:
        """What it takes there, a copy that is being written included."""
        copy = self.copies.get(tier)
        sealed = copy.num_bytes if copy is not None else 0
        return sealed + (self.target.num_bytes if self.target and self.target_tier == tier else 0)

    @property
    def owned_bytes(self) -> int:
        """What of it takes memory of the device, a copy that is being written included."""
        copy = self.copies.get("device")
        sealed = copy.owned_bytes if copy is not None else 0
        return sealed + (self.target.num_bytes if self.target and self.is_for_device else 0)

    def mapped(self) -> list[Handle]:
        """All that clients may map of it: its copies, what is mapped beside them, and what is being
        written."""
        handles = [one for copy in self.copies.values() for one in (copy.handle, *copy.files)]
        return [*handles, self.target] if self.target is not None else handles

    @property
    def is_for_device(self) -> bool:
        """Where what is being written is to lie."""
        return self.target_tier == "device"

    # --- steps

    def elect(self, session: SessionId, tier: Tier, generation: int) -> Elected:
        """This session writes the copy on `tier`, from the highest of those on lower tiers."""
        self.generation = generation
        self.writer = session
        self.target_tier = tier
        self.written_bytes = 0
        source = None
        for lower in _LOWER_TIERS:
            copy = self.copies.get(lower)
            if copy is not None:
                source = Source(tier=lower, handle=copy.handle, manifest=copy.manifest)
                break
        return Elected(generation=generation, source=source)

    def end_writing(self) -> None:
        """It is done, or given up."""
        self.writer = None
        self.target = None
        self.target_tier = "device"

    def admit(self, session: SessionId) -> Sealed:
        """This session reads the copy on the device."""
        copy = self.copies["device"]
        assert copy.manifest is not None  # noqa: S101 - sealed implies a manifest
        self.readers[session] += 1
        # A move that failed has left the copy as it was, but under a new generation.
        handle = msgspec.structs.replace(copy.handle, generation=self.generation)
        return Sealed(handle=handle, manifest=copy.manifest, files=copy.files)

    def drop_reader(self, session: SessionId, count: int, now: float) -> None:
        """It reads the set so often less."""
        self.readers[session] -= count
        self.readers += Counter()  # drops zero counts
        if not self.readers:
            self.idle_since = now

    def drop(self, tier: Tier) -> list[Effect]:
        """The copy there is given up, if there is one."""
        copy = self.copies.pop(tier, None)
        if copy is None:
            return []
        return [Discard(copy.handle) if tier == "disk" else Free(copy.handle)]

    @property
    def busy(self) -> str:
        """What who wants it otherwise is told."""
        by = "readers" if self.readers else "writer"
        return f"the weight set {self.key!r} is {self.state}: stop its {by} first"
