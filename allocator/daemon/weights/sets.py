"""The life of weight sets: absent → loading → sealed ⇄ idle, and down to a lower tier and back.

    absent ─► loading ─► sealed ⇄ idle ─► moving ─► asleep ─► moving ─► sealed
       ▲         │                 │                   │
       └─────────┴── writer ends ──┴──── evicted ──────┘

Owns who writes, who reads, who waits for what, and on which tiers there are copies. Pure: no I/O,
no clock of its own (the caller passes `now`, in seconds), so that every transition can be tested as
a table. Invariants:
  - a set has at most one writer, and readers only while a sealed copy lies on the device;
  - a copy is only given up once the move that replaces it is complete;
  - every segment handed in comes out of exactly one `Free`;
  - a session's end gives back all that it held, and elects the next writer if it wrote.
Knows nothing of how segments are made, or of what the bytes mean.
"""

from collections import Counter, deque
from collections.abc import Iterator, Mapping
from typing import Final, Literal

import msgspec

from allocator.books import SessionId
from allocator.daemon.weights.state import (
    TIERS,
    Answer,
    Copy,
    Discard,
    Effect,
    Free,
    Waiter,
    WeightSet,
)
from allocator.errors import (
    FingerprintMismatch,
    InvalidMessage,
    NotWriter,
    StaleGeneration,
    UnknownWeightSet,
    WeightSetBusy,
)
from allocator.messages import (
    Elected,
    Extent,
    Handle,
    LowerTier,
    Moving,
    Sealed,
    Sleep,
    Source,
    StillLoading,
    Tier,
)

SleepStep = Literal["asleep", "wait", "copy"]
"""It is down; a writer is at work on it; or it has to be copied."""
_ON_DISK: Final = ("asleep", "disk")
_LOWER_TIERS: Final[tuple[LowerTier, ...]] = ("host", "disk")


class WeightSets:
    """All weight sets of one device."""

    def __init__(self) -> None:
        self._sets: dict[str, WeightSet] = {}
        self._generation = 0

    def __iter__(self) -> Iterator[WeightSet]:
        return iter(self._sets.values())

    def get(self, key: str) -> WeightSet | None:
        """The set of that key, if there is one."""
        return self._sets.get(key)

    # --- joining

    def open(
        self,
        session: SessionId,
        key: str,
        fingerprint: Mapping[str, str] | None,
        image: Copy | None = None,
    ) -> Elected | Sealed | None:
        """Join `key` as reader or as writer; None where its writer is still at work. `image` is one
        that was found for a set which is absent.

        Raises FingerprintMismatch, with the fields that differ; without a fingerprint
        UnknownWeightSet.
        """
        weight_set = self._known(key) if fingerprint is None else self._sets.get(key)
        if fingerprint is None and weight_set is not None:
            fingerprint = weight_set.fingerprint
        fingerprint = fingerprint or {}
        on_disk = weight_set is not None and (weight_set.state, weight_set.tier) == _ON_DISK
        if weight_set and on_disk and _differences(weight_set.fingerprint, fingerprint):
            weight_set = None  # an image of what the key meant before; the file stays
        if weight_set is None:
            weight_set = self._sets[key] = WeightSet(key, dict(fingerprint))
            if image is not None:
                weight_set.copies["disk"] = image
        differing = _differences(weight_set.fingerprint, fingerprint)
        if differing:
            raise FingerprintMismatch(
                f"the weight set {key!r} was made from something else: " + "; ".join(differing)
            )
        if weight_set.writer is not None:
            return None
        if "device" in weight_set.copies:
            return self._admit(weight_set, session)
        return self._elect(weight_set, session, "device")

    def wait(self, key: str, waiter: Waiter) -> None:
        """Queue behind the writer of `key`: answered by an effect, or taken out by `expired`."""
        self._sets[key].waiters.append(waiter)

    def expired(self, now: float) -> list[tuple[WeightSet, Waiter]]:
        """Take out the waiters whose deadline has passed."""
        late: list[tuple[WeightSet, Waiter]] = []
        for weight_set in self._sets.values():
            if any(waiter.deadline <= now for waiter in weight_set.waiters):
                late += [(weight_set, w) for w in weight_set.waiters if w.deadline <= now]
                weight_set.waiters = deque(w for w in weight_set.waiters if w.deadline > now)
        return late

    def next_deadline(self) -> float | None:
        """The earliest deadline of any waiter."""
        return min((w.deadline for s in self._sets.values() for w in s.waiters), default=None)

    # --- writing

    def writing(self, session: SessionId, key: str, generation: int) -> WeightSet:
        """The set that this session writes. Raises UnknownWeightSet, StaleGeneration, NotWriter."""
        weight_set = self._get(key, generation)
        if weight_set.writer != session:
            raise NotWriter(f"this session is not the writer of {key!r}")
        return weight_set

    def may_reserve(self, session: SessionId, key: str, generation: int) -> WeightSet:
        """As `writing`, for a writer on the device that has no segment yet. Raises InvalidMessage
        for any other."""
        weight_set = self.writing(session, key, generation)
        if weight_set.target is not None or weight_set.target_tier != "device":
            raise InvalidMessage(f"the weight set {key!r} already has its segment")
        return weight_set

    def reserve(self, session: SessionId, key: str, handle: Handle) -> None:
        """The writer's one segment."""
        self.may_reserve(session, key, handle.generation).target = handle

    def progress(self, session: SessionId, key: str, generation: int, num_bytes: int) -> None:
        """`num_bytes` are written so far."""
        weight_set = self.writing(session, key, generation)
        source = weight_set.highest
        most = weight_set.target or (source.handle if source is not None else None)
        if most is None or num_bytes > most.num_bytes:
            raise InvalidMessage(f"more bytes written than the segment of {key!r} holds")
        weight_set.written_bytes = num_bytes

    def sealable(
        self,
        session: SessionId,
        key: str,
        generation: int,
        manifest: Extent,
        *,
        in_place: bool = False,
    ) -> WeightSet:
        """The set, where `seal` would succeed. Raises InvalidMessage where it would not."""
        weight_set = self.writing(session, key, generation)
        if weight_set.target_tier != "device":
            raise InvalidMessage(f"the weight set {key!r} moves to a lower tier: say Moved")
        if in_place:
            image = weight_set.copies.get("disk")
            if weight_set.target is not None or image is None:
                raise InvalidMessage(f"the weight set {key!r} has no image that could be mapped")
            handle = image.handle
        elif weight_set.target is None:
            raise InvalidMessage(f"the weight set {key!r} has no segment to seal")
        else:
            handle = weight_set.target
        # Compared without adding, so that no sum can overflow a client's arithmetic into range.
        if manifest.offset > handle.num_bytes or manifest.num_bytes > (
            handle.num_bytes - manifest.offset
        ):
            raise InvalidMessage(f"the manifest lies outside the segment of {key!r}")
        return weight_set

    def seal(
        self,
        session: SessionId,
        key: str,
        generation: int,
        manifest: Extent,
        manifest_digest: str = "",
        *,
        files: tuple[Handle, ...] = (),
        in_place: bool = False,
    ) -> tuple[Sealed, list[Effect]]:
        """Writable → read-only and shared. The writer and all who wait become readers; a copy that
        it was woken from is given up, an image on disk stays."""
        weight_set = self.sealable(session, key, generation, manifest, in_place=in_place)
        handle = weight_set.copies["disk"].handle if in_place else weight_set.target
        assert handle is not None  # noqa: S101 - checked by `sealable`
        handle = msgspec.structs.replace(handle, generation=weight_set.generation)
        weight_set.copies["device"] = Copy(handle, manifest, manifest_digest, files)
        weight_set.written_bytes = handle.num_bytes
        effects = self._drop(weight_set, "host")
        self._end_writing(weight_set)
        sealed = self._admit(weight_set, session)
        return sealed, effects + self._go_on(weight_set)

    def abandon(
        self, session: SessionId, key: str, generation: int, *, discard_source: bool = False
    ) -> list[Effect]:
        """The writer gives up: its segment is freed, the first waiter is elected. A source that
        turned out to be damaged goes as well."""
        weight_set = self.writing(session, key, generation)
        effects: list[Effect] = []
        if discard_source and weight_set.target_tier == "device" and weight_set.copies:
            effects += self._drop(weight_set, weight_set.tier)
        return effects + self._lose_writer(weight_set)

    # --- tiers

    def sleep(self, key: str, tier: LowerTier) -> tuple[SleepStep, list[Effect]]:
        """What a wish to have the set on `tier` means now.

        Raises UnknownWeightSet, WeightSetBusy.
        """
        weight_set = self._known(key)
        if weight_set.state == "loading" or weight_set.readers:
            raise WeightSetBusy(self._busy(weight_set))
        if weight_set.writer is not None:
            return "wait", []
        if TIERS.index(weight_set.tier) >= TIERS.index(tier):
            return "asleep", []
        highest = weight_set.highest
        if (tier == "disk" and "disk" in weight_set.copies) or (highest and highest.is_file):
            effects = self._drop(weight_set, "device") + self._drop(weight_set, "host")
            self._forget_if_empty(weight_set)
            return "asleep", effects
        return "copy", []

    def move(
        self, session: SessionId, key: str, tier: LowerTier, target: Handle | None, folder: str
    ) -> Moving:
        """This session copies the set down; `target` is its new segment, None for an image."""
        weight_set = self._sets[key]
        source = weight_set.highest
        assert source is not None  # noqa: S101 - `sleep` said that it has to be copied
        assert source.manifest is not None  # noqa: S101 - images are never copied
        elected = self._elect(weight_set, session, tier)
        if target is not None:
            weight_set.target = msgspec.structs.replace(target, generation=elected.generation)
        return Moving(
            generation=elected.generation,
            fingerprint=dict(weight_set.fingerprint),
            handle=source.handle,
            manifest=source.manifest,
            target=weight_set.target,
            image_folder=folder if target is None else "",
        )

    def moved(
        self, session: SessionId, key: str, generation: int, image: Handle | None = None
    ) -> list[Effect]:
        """The copy below is complete, the ones above it are given up. Raises InvalidMessage."""
        weight_set = self.writing(session, key, generation)
        tier, source = weight_set.target_tier, weight_set.highest
        handle = image if tier == "disk" else weight_set.target
        if tier == "device" or source is None or handle is None:
            raise InvalidMessage(f"the weight set {key!r} does not move to a lower tier")
        upper = weight_set.tier
        weight_set.copies[tier] = Copy(handle, source.manifest, source.manifest_digest)
        effects = self._drop(weight_set, upper)
        self._end_writing(weight_set)
        return effects + self._go_on(weight_set)

    def sleeping_in_host_memory(
        self, key: str, fingerprint: Mapping[str, str] | None
    ) -> WeightSet | None:
        """The set that `open` with these would wake from the host tier."""
        weight_set = self._sets.get(key)
        if weight_set is None or (weight_set.state, weight_set.tier) != ("asleep", "host"):
            return None
        if fingerprint is not None and _differences(weight_set.fingerprint, fingerprint):
            return None
        return weight_set

    def num_bytes_of(self, key: str) -> int:
        """Of the set's highest copy."""
        weight_set = self._sets[key]
        return weight_set.num_bytes(weight_set.tier)

    def relabel(self, key: str, tier: Literal["device", "host"]) -> None:
        """The one copy counts for another tier from now on: where the device's memory is the host's
        own, nothing has to move. Only for a set without readers and writer that has a copy on the
        other of the two tiers."""
        weight_set = self._sets[key]
        weight_set.copies[tier] = weight_set.copies.pop("host" if tier == "device" else "device")

    def found_image(self, key: str, image: Copy) -> bool:
        """There is an image of the set that nobody has told of: whoever wrote it, or the daemon
        that was told, ended just then. Whether that is news."""
        weight_set = self._sets.get(key)
        if weight_set is None or "disk" in weight_set.copies:
            return False
        weight_set.copies["disk"] = image
        return True

    # --- leaving

    def release(self, session: SessionId, key: str, generation: int, now: float) -> None:
        """One reader less. Raises UnknownWeightSet where this session does not read the set."""
        weight_set = self._get(key, generation)
        if weight_set.readers[session] == 0:
            raise UnknownWeightSet(f"this session does not read {key!r}")
        self._drop_reader(weight_set, session, 1, now)

    def end_session(self, session: SessionId, now: float) -> tuple[list[Effect], list[str]]:
        """Everything that a closed lifeline held comes back; also the keys of the sets that this
        changed."""
        effects: list[Effect] = []
        changed: list[str] = []
        for weight_set in list(self._sets.values()):
            weight_set.waiters = deque(w for w in weight_set.waiters if w.session != session)
            if weight_set.writer == session:
                changed.append(weight_set.key)
                effects += self._lose_writer(weight_set)
            if held := weight_set.readers[session]:
                changed.append(weight_set.key)
                self._drop_reader(weight_set, session, held, now)
            weight_set.readers += Counter()  # drops zero counts
        return effects, changed

    def pin(self, key: str, pinned: bool) -> None:
        """Whether making room may evict the set. Raises UnknownWeightSet."""
        self._known(key).pinned = pinned

    def evictable(self, key: str) -> WeightSet:
        """The set, where `evict` would succeed. Raises as that does."""
        weight_set = self._known(key)
        if weight_set.writer is not None or weight_set.readers:
            raise WeightSetBusy(self._busy(weight_set))
        return weight_set

    def evict(self, key: str, *, image: bool = False) -> list[Effect]:
        """Free an idle or sleeping set; with `image` its image as well. Raises UnknownWeightSet or
        WeightSetBusy."""
        weight_set = self.evictable(key)
        effects = self._drop(weight_set, "device") + self._drop(weight_set, "host")
        if image:
            effects += self._drop(weight_set, "disk")
        self._forget_if_empty(weight_set)
        return effects

    def least_recently_used(self, *, owned: bool = False) -> WeightSet | None:
        """The idle set on the device that nobody has used for the longest time, pinned ones aside.
        `owned`: of those that take memory of the device."""
        idle = [s for s in self._sets.values() if s.state == "idle" and not s.pinned]
        if owned:
            idle = [s for s in idle if s.owned_bytes]
        return min(idle, key=lambda weight_set: weight_set.idle_since, default=None)

    def num_bytes(self, tier: Tier) -> int:
        """Bytes of all copies on a tier, unfinished ones included."""
        return sum(weight_set.num_bytes(tier) for weight_set in self._sets.values())

    def handles(self) -> list[Handle]:
        """All segments, as at the daemon's own end; images are not among them."""
        found = [s.target for s in self._sets.values() if s.target is not None]
        for weight_set in self._sets.values():
            found += [copy.handle for tier, copy in weight_set.copies.items() if tier != "disk"]
        return found

    def restore(self, weight_set: WeightSet) -> None:
        """Take over a set as an earlier daemon left it."""
        self._sets[weight_set.key] = weight_set
        self._generation = max(self._generation, weight_set.generation)

    # --- steps

    def _known(self, key: str) -> WeightSet:
        weight_set = self._sets.get(key)
        if weight_set is None:
            raise UnknownWeightSet(f"no weight set is called {key!r}")
        return weight_set

    def _get(self, key: str, generation: int) -> WeightSet:
        weight_set = self._known(key)
        if weight_set.generation != generation:
            raise StaleGeneration(
                f"generation {generation} of {key!r} is gone; it is now {weight_set.generation}"
            )
        return weight_set

    def _elect(self, weight_set: WeightSet, session: SessionId, tier: Tier) -> Elected:
        self._generation += 1
        weight_set.generation = self._generation
        weight_set.writer = session
        weight_set.target_tier = tier
        weight_set.written_bytes = 0
        source = None
        for lower in _LOWER_TIERS:
            copy = weight_set.copies.get(lower)
            if copy is not None:
                source = Source(tier=lower, handle=copy.handle, manifest=copy.manifest)
                break
        return Elected(generation=weight_set.generation, source=source)

    def _admit(self, weight_set: WeightSet, session: SessionId) -> Sealed:
        copy = weight_set.copies["device"]
        assert copy.manifest is not None  # noqa: S101 - sealed implies a manifest
        weight_set.readers[session] += 1
        # A move that failed has left the copy as it was, but under a new generation.
        handle = msgspec.structs.replace(copy.handle, generation=weight_set.generation)
        return Sealed(handle=handle, manifest=copy.manifest, files=copy.files)

    def _drop(self, weight_set: WeightSet, tier: Tier) -> list[Effect]:
        copy = weight_set.copies.pop(tier, None)
        if copy is None:
            return []
        if tier == "disk":
            return [Discard(copy.handle)]
        return [Free(copy.handle)]

    def _drop_reader(
        self, weight_set: WeightSet, session: SessionId, count: int, now: float
    ) -> None:
        weight_set.readers[session] -= count
        weight_set.readers += Counter()  # drops zero counts
        if not weight_set.readers:
            weight_set.idle_since = now

    def _end_writing(self, weight_set: WeightSet) -> None:
        weight_set.writer = None
        weight_set.target = None
        weight_set.target_tier = "device"

    def _lose_writer(self, weight_set: WeightSet) -> list[Effect]:
        effects: list[Effect] = []
        if weight_set.target is not None:
            effects.append(Free(weight_set.target))
        self._end_writing(weight_set)
        weight_set.written_bytes = 0
        effects += self._go_on(weight_set)
        self._forget_if_empty(weight_set)
        return effects

    def _go_on(self, weight_set: WeightSet) -> list[Effect]:
        """A writer is done, or gone: all who wait learn what it means for them."""
        waiting, weight_set.waiters = weight_set.waiters, deque()
        effects: list[Effect] = []
        for waiter in waiting:
            if isinstance(waiter.request, Sleep):  # it asks again, and finds out
                told = StillLoading(writer_pid=0, num_bytes=0, total_bytes=0)
                effects.append(Answer(waiter, told))
            elif weight_set.writer is not None:
                weight_set.waiters.append(waiter)
            elif "device" in weight_set.copies:
                effects.append(Answer(waiter, self._admit(weight_set, waiter.session)))
            else:
                elected = self._elect(weight_set, waiter.session, "device")
                effects.append(Answer(waiter, elected))
        return effects

    def _forget_if_empty(self, weight_set: WeightSet) -> None:
        if weight_set.state == "absent":
            del self._sets[weight_set.key]

    def _busy(self, weight_set: WeightSet) -> str:
        by = "readers" if weight_set.readers else "writer"
        return f"the weight set {weight_set.key!r} is {weight_set.state}: stop its {by} first"


def _differences(ours: Mapping[str, str], theirs: Mapping[str, str]) -> list[str]:
    return [
        f"{name} was {ours.get(name, 'absent')!r} and is now {theirs.get(name, 'absent')!r}"
        for name in sorted(ours.keys() | theirs.keys())
        if ours.get(name) != theirs.get(name)
    ]
