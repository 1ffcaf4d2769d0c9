"""The life of weight sets: absent → loading → sealed ⇄ idle → absent.

Owns who writes, who reads and who waits for what. Pure: no I/O, no clock of its own (the caller
passes `now`, in seconds), so that every transition can be tested as a table. Invariants:
  - a set has at most one writer, and readers only once it is sealed;
  - its state is derived from its writer, manifest and readers, never stored;
  - every segment handed in by `reserve` comes out of exactly one `Free`;
  - a session's end gives back all that it held, and elects the next writer if it wrote.
Knows nothing of how segments are made, or of what the bytes mean.
"""

from collections import Counter, deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from allocator.errors import (
    FingerprintMismatch,
    InvalidMessage,
    NotWriter,
    StaleGeneration,
    UnknownWeightSet,
    WeightSetBusy,
)
from allocator.messages import Elected, Extent, Handle, Sealed, WeightSetState

SessionId = int
ReplyTo = tuple[bytes, bytes]
"""ZeroMQ identity and request id; opaque here."""


@dataclass(frozen=True)
class Waiter:
    """A request that will be answered later."""

    session: SessionId
    reply_to: ReplyTo
    deadline: float


@dataclass(frozen=True)
class Answer:
    """Effect: tell this waiter."""

    waiter: Waiter
    message: Elected | Sealed


@dataclass(frozen=True)
class Free:
    """Effect: nobody needs this segment any more."""

    handle: Handle


Effect = Answer | Free


@dataclass
class WeightSet:
    """The named, sealed tensors of one checkpoint in one layout, or the making of them."""

    key: str
    fingerprint: Mapping[str, str]
    generation: int = 0
    writer: SessionId | None = None
    handle: Handle | None = None
    manifest: Extent | None = None
    written_bytes: int = 0
    readers: Counter[SessionId] = field(default_factory=Counter)
    waiters: deque[Waiter] = field(default_factory=deque)
    idle_since: float = 0.0

    @property
    def state(self) -> WeightSetState:
        """Derived, see the module's invariant."""
        if self.manifest is not None:
            return "sealed" if self.readers else "idle"
        return "loading" if self.writer is not None else "absent"


class WeightSets:
    """All weight sets of one device."""

    def __init__(self) -> None:
        self._sets: dict[str, WeightSet] = {}
        self._generation = 0

    def __iter__(self) -> Iterator[WeightSet]:
        return iter(self._sets.values())

    def open(
        self, session: SessionId, key: str, fingerprint: Mapping[str, str]
    ) -> Elected | Sealed | None:
        """Join `key` as reader or as writer; None where its writer is still at work.

        Raises FingerprintMismatch, with the fields that differ.
        """
        weight_set = self._sets.get(key)
        if weight_set is None:
            weight_set = self._sets[key] = WeightSet(key, dict(fingerprint))
        differing = _differences(weight_set.fingerprint, fingerprint)
        if differing:
            raise FingerprintMismatch(
                f"the weight set {key!r} was made from something else: " + "; ".join(differing)
            )
        if weight_set.state in ("sealed", "idle"):
            return self._admit(weight_set, session)
        if weight_set.state == "absent":
            return self._elect(weight_set, session)
        return None

    def wait(self, key: str, waiter: Waiter) -> None:
        """Queue behind the writer of `key`: answered by an effect, or taken out by `expired`."""
        self._sets[key].waiters.append(waiter)

    def expired(self, now: float) -> list[tuple[WeightSet, Waiter]]:
        """Take out the waiters whose deadline has passed."""
        late: list[tuple[WeightSet, Waiter]] = []
        for weight_set in self._sets.values():
            late += [
                (weight_set, waiter) for waiter in weight_set.waiters if waiter.deadline <= now
            ]
            weight_set.waiters = deque(w for w in weight_set.waiters if w.deadline > now)
        return late

    def next_deadline(self) -> float | None:
        """The earliest deadline of any waiter."""
        return min((w.deadline for s in self._sets.values() for w in s.waiters), default=None)

    def writing(self, session: SessionId, key: str, generation: int) -> WeightSet:
        """The set that this session writes. Raises UnknownWeightSet, StaleGeneration, NotWriter."""
        weight_set = self._get(key, generation)
        if weight_set.writer != session:
            raise NotWriter(f"this session is not the writer of {key!r}")
        return weight_set

    def reserve(self, session: SessionId, key: str, handle: Handle) -> None:
        """The writer's one segment."""
        weight_set = self.writing(session, key, handle.generation)
        if weight_set.handle is not None:
            raise InvalidMessage(f"the weight set {key!r} already has its segment")
        weight_set.handle = handle

    def progress(self, session: SessionId, key: str, generation: int, num_bytes: int) -> None:
        """`num_bytes` are written so far."""
        weight_set = self.writing(session, key, generation)
        if weight_set.handle is None or num_bytes > weight_set.handle.num_bytes:
            raise InvalidMessage(f"more bytes written than the segment of {key!r} holds")
        weight_set.written_bytes = num_bytes

    def seal(
        self, session: SessionId, key: str, generation: int, manifest: Extent
    ) -> tuple[Sealed, list[Effect]]:
        """Writable → read-only and shared. The writer and all who wait become readers."""
        weight_set = self.writing(session, key, generation)
        handle = weight_set.handle
        if handle is None:
            raise InvalidMessage(f"the weight set {key!r} has no segment to seal")
        # Compared without adding, so that no sum can overflow a client's arithmetic into range.
        if manifest.offset > handle.num_bytes or manifest.num_bytes > (
            handle.num_bytes - manifest.offset
        ):
            raise InvalidMessage(f"the manifest lies outside the segment of {key!r}")
        weight_set.manifest = manifest
        weight_set.writer = None
        weight_set.written_bytes = handle.num_bytes
        effects: list[Effect] = [
            Answer(waiter, self._admit(weight_set, waiter.session)) for waiter in weight_set.waiters
        ]
        weight_set.waiters.clear()
        return self._admit(weight_set, session), effects

    def abandon(self, session: SessionId, key: str, generation: int) -> list[Effect]:
        """The writer gives up: its segment is freed, the first waiter is elected."""
        weight_set = self.writing(session, key, generation)
        return self._lose_writer(weight_set)

    def release(self, session: SessionId, key: str, generation: int, now: float) -> None:
        """One reader less. Raises UnknownWeightSet where this session does not read the set."""
        weight_set = self._get(key, generation)
        if weight_set.readers[session] == 0:
            raise UnknownWeightSet(f"this session does not read {key!r}")
        self._drop_reader(weight_set, session, 1, now)

    def end_session(self, session: SessionId, now: float) -> list[Effect]:
        """Everything that a closed lifeline held comes back."""
        effects: list[Effect] = []
        for weight_set in list(self._sets.values()):
            weight_set.waiters = deque(w for w in weight_set.waiters if w.session != session)
            if weight_set.writer == session:
                effects += self._lose_writer(weight_set)
            if held := weight_set.readers[session]:
                self._drop_reader(weight_set, session, held, now)
            weight_set.readers += Counter()  # drops zero counts
        return effects

    def evict(self, key: str) -> list[Effect]:
        """Free an idle set. Raises UnknownWeightSet or WeightSetBusy."""
        weight_set = self._sets.get(key)
        if weight_set is None or weight_set.state == "absent":
            raise UnknownWeightSet(f"no weight set is called {key!r}")
        if weight_set.state != "idle":
            raise WeightSetBusy(
                f"the weight set {key!r} is {weight_set.state}: stop its "
                f"{'readers' if weight_set.readers else 'writer'} first"
            )
        del self._sets[key]
        assert weight_set.handle is not None  # noqa: S101 - idle implies sealed
        return [Free(weight_set.handle)]

    def least_recently_used(self) -> WeightSet | None:
        """The idle set that nobody has used for the longest time."""
        idle = [weight_set for weight_set in self._sets.values() if weight_set.state == "idle"]
        return min(idle, key=lambda weight_set: weight_set.idle_since, default=None)

    def used_bytes(self) -> int:
        """Bytes of all segments."""
        return sum(s.handle.num_bytes for s in self._sets.values() if s.handle is not None)

    def handles(self) -> list[Handle]:
        """All segments, as at the daemon's own end."""
        return [s.handle for s in self._sets.values() if s.handle is not None]

    def _get(self, key: str, generation: int) -> WeightSet:
        weight_set = self._sets.get(key)
        if weight_set is None:
            raise UnknownWeightSet(f"no weight set is called {key!r}")
        if weight_set.generation != generation:
            raise StaleGeneration(
                f"generation {generation} of {key!r} is gone; it is now {weight_set.generation}"
            )
        return weight_set

    def _elect(self, weight_set: WeightSet, session: SessionId) -> Elected:
        self._generation += 1
        weight_set.generation = self._generation
        weight_set.writer = session
        weight_set.written_bytes = 0
        return Elected(generation=weight_set.generation)

    def _admit(self, weight_set: WeightSet, session: SessionId) -> Sealed:
        assert weight_set.handle is not None  # noqa: S101 - sealed implies a segment
        assert weight_set.manifest is not None  # noqa: S101
        weight_set.readers[session] += 1
        return Sealed(handle=weight_set.handle, manifest=weight_set.manifest)

    def _drop_reader(
        self, weight_set: WeightSet, session: SessionId, count: int, now: float
    ) -> None:
        weight_set.readers[session] -= count
        weight_set.readers += Counter()  # drops zero counts
        if not weight_set.readers:
            weight_set.idle_since = now

    def _lose_writer(self, weight_set: WeightSet) -> list[Effect]:
        effects: list[Effect] = []
        if weight_set.handle is not None:
            effects.append(Free(weight_set.handle))
        weight_set.handle = None
        weight_set.writer = None
        weight_set.written_bytes = 0
        if weight_set.waiters:
            successor = weight_set.waiters.popleft()
            effects.append(Answer(successor, self._elect(weight_set, successor.session)))
        else:
            del self._sets[weight_set.key]
        return effects


def _differences(ours: Mapping[str, str], theirs: Mapping[str, str]) -> list[str]:
    return [
        f"{name} was {ours.get(name, 'absent')!r} and is now {theirs.get(name, 'absent')!r}"
        for name in sorted(ours.keys() | theirs.keys())
        if ours.get(name) != theirs.get(name)
    ]
