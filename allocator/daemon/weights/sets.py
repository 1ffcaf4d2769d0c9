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
from collections.abc import Mapping
from typing import Final, Literal

import msgspec

from allocator.books import SessionId
from allocator.daemon.weights.table import SetTable
from allocator.daemon.weights.weight_set import (
    TIERS,
    Answer,
    Copy,
    Effect,
    Free,
    WeightSet,
)
from allocator.errors import (
    FingerprintMismatch,
    InvalidMessage,
    NotWriter,
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
    StillLoading,
)

SleepStep = Literal["asleep", "wait", "copy"]
"""It is down; a writer is at work on it; or it has to be copied."""
_ON_DISK: Final = ("asleep", "disk")


class WeightSets(SetTable):
    """All weight sets of one device, and what requests make of them."""

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
            return weight_set.admit(session)
        return weight_set.elect(session, "device", self._next_generation())

    # --- writing

    def writing(self, session: SessionId, key: str, generation: int) -> WeightSet:
        """The set that this session writes. Raises UnknownWeightSet, StaleGeneration, NotWriter."""
        weight_set = self._current(key, generation)
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
        effects = weight_set.drop("host")
        weight_set.end_writing()
        sealed = weight_set.admit(session)
        return sealed, effects + self._go_on(weight_set)

    def abandon(
        self, session: SessionId, key: str, generation: int, *, discard_source: bool = False
    ) -> list[Effect]:
        """The writer gives up: its segment is freed, the first waiter is elected. A source that
        turned out to be damaged goes as well."""
        weight_set = self.writing(session, key, generation)
        effects: list[Effect] = []
        if discard_source and weight_set.target_tier == "device" and weight_set.copies:
            effects += weight_set.drop(weight_set.tier)
        return effects + self._lose_writer(weight_set)

    # --- tiers

    def sleep(self, key: str, tier: LowerTier) -> tuple[SleepStep, list[Effect]]:
        """What a wish to have the set on `tier` means now.

        Raises UnknownWeightSet, WeightSetBusy.
        """
        weight_set = self._known(key)
        if weight_set.state == "loading" or weight_set.readers:
            raise WeightSetBusy(weight_set.busy)
        if weight_set.writer is not None:
            return "wait", []
        if TIERS.index(weight_set.tier) >= TIERS.index(tier):
            return "asleep", []
        highest = weight_set.highest
        if (tier == "disk" and "disk" in weight_set.copies) or (highest and highest.is_file):
            effects = weight_set.drop("device") + weight_set.drop("host")
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
        elected = weight_set.elect(session, tier, self._next_generation())
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
        effects = weight_set.drop(upper)
        weight_set.end_writing()
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
        weight_set = self._current(key, generation)
        if weight_set.readers[session] == 0:
            raise UnknownWeightSet(f"this session does not read {key!r}")
        weight_set.drop_reader(session, 1, now)

    def end_session(self, session: SessionId, now: float) -> tuple[list[Effect], list[str]]:
        """Everything that a closed lifeline held comes back; also the keys of the sets that this
        changed."""
        effects: list[Effect] = []
        changed: list[str] = []
        self.given_up(session)
        for weight_set in list(self._sets.values()):
            if weight_set.writer == session:
                changed.append(weight_set.key)
                effects += self._lose_writer(weight_set)
            if held := weight_set.readers[session]:
                changed.append(weight_set.key)
                weight_set.drop_reader(session, held, now)
            weight_set.readers += Counter()  # drops zero counts
        return effects, changed

    def pin(self, key: str, pinned: bool) -> None:
        """Whether making room may evict the set. Raises UnknownWeightSet."""
        self._known(key).pinned = pinned

    def evictable(self, key: str) -> WeightSet:
        """The set, where `evict` would succeed. Raises as that does."""
        weight_set = self._known(key)
        if weight_set.writer is not None or weight_set.readers:
            raise WeightSetBusy(weight_set.busy)
        return weight_set

    def evict(self, key: str, *, image: bool = False) -> list[Effect]:
        """Free an idle or sleeping set; with `image` its image as well. Raises UnknownWeightSet or
        WeightSetBusy."""
        weight_set = self.evictable(key)
        effects = weight_set.drop("device") + weight_set.drop("host")
        if image:
            effects += weight_set.drop("disk")
        self._forget_if_empty(weight_set)
        return effects

    # --- steps

    def _lose_writer(self, weight_set: WeightSet) -> list[Effect]:
        effects: list[Effect] = []
        if weight_set.target is not None:
            effects.append(Free(weight_set.target))
        weight_set.end_writing()
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
                effects.append(Answer(waiter, weight_set.admit(waiter.session)))
            else:
                elected = weight_set.elect(waiter.session, "device", self._next_generation())
                effects.append(Answer(waiter, elected))
        return effects

    def _forget_if_empty(self, weight_set: WeightSet) -> None:
        if weight_set.state == "absent":
            del self._sets[weight_set.key]


def _differences(ours: Mapping[str, str], theirs: Mapping[str, str]) -> list[str]:
    return [
        f"{name} was {ours.get(name, 'absent')!r} and is now {theirs.get(name, 'absent')!r}"
        for name in sorted(ours.keys() | theirs.keys())
        if ours.get(name) != theirs.get(name)
    ]
