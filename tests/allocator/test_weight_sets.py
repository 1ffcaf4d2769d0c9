"""The life of weight sets: each transition as a row, and all of them at random against a model."""

from collections import Counter
from dataclasses import dataclass, field

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from allocator import (
    AllocatorError,
    FingerprintMismatch,
    InvalidMessage,
    NotWriter,
    StaleGeneration,
    UnknownWeightSet,
    WeightSetBusy,
)
from allocator.messages import Elected, Extent, Handle, Sealed
from allocator.weight_sets import Answer, Effect, Free, ReplyTo, Waiter, WeightSets

MADE_FROM = {"file": "a", "dtype": "bfloat16"}
WRITER, READER, STRANGER = 1, 2, 3
MANIFEST = Extent(offset=90, num_bytes=10)


def handle_of(generation: int, number: int = 1, num_bytes: int = 100) -> Handle:
    return Handle(backend="host", segment=f"/s{number}", num_bytes=num_bytes, generation=generation)


def in_state(state: str) -> tuple[WeightSets, int]:
    """A set "k" in this state and its generation; WRITER wrote it, READER alone reads it."""
    sets = WeightSets()
    if state == "absent":
        return sets, 0
    elected = sets.open(WRITER, "k", MADE_FROM)
    assert isinstance(elected, Elected)
    generation = elected.generation
    if state == "loading":
        return sets, generation
    sets.reserve(WRITER, "k", handle_of(generation))
    if state == "reserved":
        return sets, generation
    sets.seal(WRITER, "k", generation, MANIFEST)
    sets.release(WRITER, "k", generation, now=1.0)
    if state == "sealed":
        assert isinstance(sets.open(READER, "k", MADE_FROM), Sealed)
    return sets, generation


def act(sets: WeightSets, action: str, session: int, generation: int) -> object:
    """Do to "k" what the action's name says."""
    match action:
        case "open":
            return sets.open(session, "k", MADE_FROM)
        case "reserve":
            return sets.reserve(session, "k", handle_of(generation, 2))
        case "progress":
            return sets.progress(session, "k", generation, 50)
        case "seal":
            return sets.seal(session, "k", generation, MANIFEST)
        case "abandon":
            return sets.abandon(session, "k", generation)
        case "release":
            return sets.release(session, "k", generation, now=2.0)
        case "evict":
            return sets.evict("k")
    raise ValueError(action)


def state_of(sets: WeightSets) -> str:
    found = {weight_set.key: weight_set.state for weight_set in sets}
    return found.get("k", "absent")


@pytest.mark.parametrize(
    ("state", "action", "session", "outcome"),
    [
        ("absent", "open", STRANGER, "loading"),
        ("absent", "reserve", WRITER, UnknownWeightSet),
        ("absent", "progress", WRITER, UnknownWeightSet),
        ("absent", "seal", WRITER, UnknownWeightSet),
        ("absent", "abandon", WRITER, UnknownWeightSet),
        ("absent", "release", READER, UnknownWeightSet),
        ("absent", "evict", STRANGER, UnknownWeightSet),
        ("loading", "open", STRANGER, "loading"),
        ("loading", "reserve", WRITER, "loading"),
        ("loading", "reserve", STRANGER, NotWriter),
        ("loading", "progress", WRITER, InvalidMessage),
        ("loading", "seal", WRITER, InvalidMessage),
        ("loading", "seal", STRANGER, NotWriter),
        ("loading", "abandon", WRITER, "absent"),
        ("loading", "abandon", STRANGER, NotWriter),
        ("loading", "release", WRITER, UnknownWeightSet),
        ("loading", "evict", STRANGER, WeightSetBusy),
        ("reserved", "reserve", WRITER, InvalidMessage),
        ("reserved", "progress", WRITER, "loading"),
        ("reserved", "progress", STRANGER, NotWriter),
        ("reserved", "seal", WRITER, "sealed"),
        ("reserved", "seal", STRANGER, NotWriter),
        ("reserved", "abandon", WRITER, "absent"),
        ("reserved", "evict", STRANGER, WeightSetBusy),
        ("sealed", "open", STRANGER, "sealed"),
        ("sealed", "reserve", WRITER, NotWriter),
        ("sealed", "progress", WRITER, NotWriter),
        ("sealed", "seal", WRITER, NotWriter),
        ("sealed", "abandon", WRITER, NotWriter),
        ("sealed", "release", READER, "idle"),
        ("sealed", "release", STRANGER, UnknownWeightSet),
        ("sealed", "evict", READER, WeightSetBusy),
        ("idle", "open", STRANGER, "sealed"),
        ("idle", "reserve", WRITER, NotWriter),
        ("idle", "seal", WRITER, NotWriter),
        ("idle", "abandon", WRITER, NotWriter),
        ("idle", "release", READER, UnknownWeightSet),
        ("idle", "evict", STRANGER, "absent"),
    ],
)
def test_transition(
    state: str, action: str, session: int, outcome: str | type[AllocatorError]
) -> None:
    sets, generation = in_state(state)
    if isinstance(outcome, str):
        act(sets, action, session, generation)
        assert state_of(sets) == outcome
        return
    before = state_of(sets)
    with pytest.raises(outcome):
        act(sets, action, session, generation)
    assert state_of(sets) == before


@pytest.mark.parametrize("action", ["reserve", "progress", "seal", "abandon"])
@pytest.mark.parametrize("off_by", [-1, 1])
def test_another_generation_is_stale_even_for_the_writer(action: str, off_by: int) -> None:
    sets, generation = in_state("reserved" if action != "reserve" else "loading")
    with pytest.raises(StaleGeneration, match=f"generation {generation + off_by} of 'k' is gone"):
        act(sets, action, WRITER, generation + off_by)


def test_a_set_made_anew_has_another_generation() -> None:
    sets, first = in_state("idle")
    sets.evict("k")
    second = sets.open(WRITER, "k", MADE_FROM)
    assert isinstance(second, Elected)
    assert second.generation != first
    with pytest.raises(StaleGeneration):
        sets.release(READER, "k", first, now=3.0)


def test_a_mismatch_lists_the_fields_that_differ_and_no_others() -> None:
    sets, _ = in_state("sealed")
    with pytest.raises(FingerprintMismatch) as caught:
        sets.open(STRANGER, "k", {"file": "b", "dtype": "bfloat16", "layout": "plain"})
    assert "file was 'a' and is now 'b'" in str(caught.value)
    assert "layout was 'absent' and is now 'plain'" in str(caught.value)
    assert "dtype" not in str(caught.value)


@pytest.mark.parametrize(
    ("offset", "num_bytes", "fits"),
    [(0, 100, True), (100, 0, True), (0, 101, False), (101, 0, False), (1 << 62, 1 << 62, False)],
)
def test_the_manifest_must_lie_in_the_segment(offset: int, num_bytes: int, fits: bool) -> None:
    sets, generation = in_state("reserved")
    extent = Extent(offset=offset, num_bytes=num_bytes)
    if fits:
        sealed, _ = sets.seal(WRITER, "k", generation, extent)
        assert sealed.manifest == extent
    else:
        with pytest.raises(InvalidMessage, match="outside the segment"):
            sets.seal(WRITER, "k", generation, extent)
        assert state_of(sets) == "loading"


def test_waiters_are_elected_in_the_order_they_came() -> None:
    sets, generation = in_state("loading")
    for session in (5, 6):
        assert sets.open(session, "k", MADE_FROM) is None
        sets.wait("k", Waiter(session, (b"", b"%d" % session), deadline=9.0))
    for expected in (5, 6):
        [effect] = sets.end_session(next(iter(sets)).writer or 0, now=1.0)
        assert isinstance(effect, Answer)
        assert effect.waiter.session == expected
        assert isinstance(effect.message, Elected)
        assert effect.message.generation > generation


def test_a_waiter_that_dies_with_the_writer_is_not_elected_for_long() -> None:
    sets, _ = in_state("reserved")
    for session in (5, 6):
        sets.wait("k", Waiter(session, (b"", b"%d" % session), deadline=9.0))
    sets.end_session(WRITER, now=1.0)
    [effect] = sets.end_session(5, now=1.0)
    assert isinstance(effect, Answer)
    assert effect.waiter.session == 6


def test_the_idle_set_unused_for_longest_goes_first() -> None:
    sets = WeightSets()
    for number, key in enumerate("abc"):
        elected = sets.open(WRITER, key, {})
        assert isinstance(elected, Elected)
        sets.reserve(WRITER, key, handle_of(elected.generation, number))
        sets.seal(WRITER, key, elected.generation, MANIFEST)
        sets.release(WRITER, key, elected.generation, now=float(number))
    assert isinstance(sets.open(READER, "a", {}), Sealed)
    oldest = sets.least_recently_used()
    assert oldest is not None
    assert oldest.key == "b"  # "a" was released first, but it is read again


# --- at random, against a plain model

KEYS = st.sampled_from(["k", "l"])
SESSIONS = st.integers(1, 4)
THE_WRITER = 0
WRITERS = st.sampled_from([THE_WRITER, THE_WRITER, THE_WRITER, 1, 2, 3, 4])
OFF_BY = st.sampled_from([0, 0, 0, 0, -1, 1])


@dataclass
class Known:
    """What the model believes about one set."""

    fingerprint: str
    generation: int
    writer: int | None
    handle: Handle | None = None
    sealed: bool = False
    readers: Counter[int] = field(default_factory=Counter)
    waiting: list[Waiter] = field(default_factory=list)


class Lives(RuleBasedStateMachine):
    """Sessions come, go and err in any order; the model says what must happen."""

    def __init__(self) -> None:
        super().__init__()
        self.sets = WeightSets()
        self.known: dict[str, Known] = {}
        self.unfreed: set[str] = set()
        self.unanswered: set[ReplyTo] = set()
        self.now = 0.0
        self.num_requests = 0
        self.num_segments = 0

    # --- what the sessions do

    @rule(key=KEYS, session=SESSIONS, fingerprint=st.sampled_from("AAAB"), wait=st.integers(0, 5))
    def open(self, key: str, session: int, fingerprint: str, wait: int) -> None:
        known = self.known.get(key)
        if known is not None and known.fingerprint != fingerprint:
            with pytest.raises(FingerprintMismatch, match="f was"):
                self.sets.open(session, key, {"f": fingerprint})
            return
        answer = self.sets.open(session, key, {"f": fingerprint})
        if known is None:
            assert isinstance(answer, Elected)
            self.known[key] = Known(fingerprint, answer.generation, session)
        elif known.sealed:
            assert isinstance(answer, Sealed)
            assert answer.handle == known.handle
            known.readers[session] += 1
        else:
            assert answer is None
            self.num_requests += 1
            waiter = Waiter(session, (b"%d" % session, b"%d" % self.num_requests), self.now + wait)
            self.sets.wait(key, waiter)
            known.waiting.append(waiter)
            self.unanswered.add(waiter.reply_to)

    def refused(self, key: str, session: int, generation: int) -> type[AllocatorError] | None:
        known = self.known.get(key)
        if known is None:
            return UnknownWeightSet
        if known.generation != generation:
            return StaleGeneration
        return None if known.writer == session else NotWriter

    def writer_of(self, key: str) -> int:
        known = self.known.get(key)
        return (known.writer if known else None) or 1

    def generation(self, key: str, off_by: int) -> int:
        known = self.known.get(key)
        return (known.generation if known else 1) + off_by

    @rule(key=KEYS, session=WRITERS, off_by=OFF_BY, num_bytes=st.integers(1, 50))
    def reserve(self, key: str, session: int, off_by: int, num_bytes: int) -> None:
        session = session or self.writer_of(key)
        self.num_segments += 1
        handle = handle_of(self.generation(key, off_by), self.num_segments, num_bytes)
        error = self.refused(key, session, handle.generation)
        if error is None and self.known[key].handle is not None:
            error = InvalidMessage
        if error is not None:
            with pytest.raises(error):
                self.sets.reserve(session, key, handle)
            return
        self.sets.reserve(session, key, handle)
        self.known[key].handle = handle
        self.unfreed.add(handle.segment)

    @rule(key=KEYS, session=WRITERS, off_by=OFF_BY, num_bytes=st.integers(0, 60))
    def progress(self, key: str, session: int, off_by: int, num_bytes: int) -> None:
        session = session or self.writer_of(key)
        generation = self.generation(key, off_by)
        error = self.refused(key, session, generation)
        handle = self.known[key].handle if error is None else None
        if error is None and (handle is None or num_bytes > handle.num_bytes):
            error = InvalidMessage
        if error is not None:
            with pytest.raises(error):
                self.sets.progress(session, key, generation, num_bytes)
        else:
            self.sets.progress(session, key, generation, num_bytes)

    @rule(key=KEYS, session=WRITERS, off_by=OFF_BY)
    def seal(self, key: str, session: int, off_by: int) -> None:
        session = session or self.writer_of(key)
        generation = self.generation(key, off_by)
        extent = Extent(offset=0, num_bytes=1)
        error = self.refused(key, session, generation)
        if error is None and self.known[key].handle is None:
            error = InvalidMessage
        if error is not None:
            with pytest.raises(error):
                self.sets.seal(session, key, generation, extent)
            return
        sealed, effects = self.sets.seal(session, key, generation, extent)
        known = self.known[key]
        assert sealed.handle == known.handle
        known.sealed, known.writer = True, None
        known.readers[session] += 1
        waited, known.waiting = known.waiting, []
        for waiter in waited:
            known.readers[waiter.session] += 1
        assert self.apply(effects) == ([w.reply_to for w in waited], [])

    @rule(key=KEYS, session=WRITERS, off_by=OFF_BY)
    def abandon(self, key: str, session: int, off_by: int) -> None:
        session = session or self.writer_of(key)
        generation = self.generation(key, off_by)
        if error := self.refused(key, session, generation):
            with pytest.raises(error):
                self.sets.abandon(session, key, generation)
            return
        self.lose_writer(key, self.sets.abandon(session, key, generation))

    @rule(key=KEYS, session=SESSIONS, off_by=OFF_BY)
    def release(self, key: str, session: int, off_by: int) -> None:
        known = self.known.get(key)
        generation = self.generation(key, off_by)
        if known is not None and known.generation != generation:
            with pytest.raises(StaleGeneration):
                self.sets.release(session, key, generation, self.now)
        elif known is None or known.readers[session] == 0:
            with pytest.raises(UnknownWeightSet):
                self.sets.release(session, key, generation, self.now)
        else:
            self.sets.release(session, key, generation, self.now)
            known.readers[session] -= 1

    @rule(session=SESSIONS)
    def end_session(self, session: int) -> None:
        effects = self.sets.end_session(session, self.now)
        for known in self.known.values():
            gone = [w for w in known.waiting if w.session == session]
            self.unanswered -= {w.reply_to for w in gone}
            known.waiting = [w for w in known.waiting if w.session != session]
            del known.readers[session]
        written = [k for k, known in self.known.items() if known.writer == session]
        self.lose_writers(written, effects)

    @rule(key=KEYS)
    def evict(self, key: str) -> None:
        known = self.known.get(key)
        if known is None:
            with pytest.raises(UnknownWeightSet):
                self.sets.evict(key)
        elif not known.sealed or known.readers.total():
            with pytest.raises(WeightSetBusy):
                self.sets.evict(key)
        else:
            assert known.handle is not None
            assert self.apply(self.sets.evict(key)) == ([], [known.handle.segment])
            del self.known[key]

    @precondition(lambda self: self.unanswered)
    @rule(step=st.integers(1, 3))
    def time_passes(self, step: int) -> None:
        self.now += step
        late = {waiter.reply_to for _, waiter in self.sets.expired(self.now)}
        expected = set()
        for known in self.known.values():
            expected |= {w.reply_to for w in known.waiting if w.deadline <= self.now}
            known.waiting = [w for w in known.waiting if w.deadline > self.now]
        assert late == expected
        assert late <= self.unanswered
        self.unanswered -= late

    # --- what must follow

    def apply(self, effects: list[Effect]) -> tuple[list[ReplyTo], list[str]]:
        """Answers and frees in order; each must have been owed, and is owed no longer."""
        answered, freed = [], []
        for effect in effects:
            if isinstance(effect, Free):
                self.unfreed.remove(effect.handle.segment)
                freed.append(effect.handle.segment)
            else:
                self.unanswered.remove(effect.waiter.reply_to)
                answered.append(effect.waiter.reply_to)
        return answered, freed

    def lose_writer(self, key: str, effects: list[Effect]) -> None:
        self.lose_writers([key], effects)

    def lose_writers(self, keys: list[str], effects: list[Effect]) -> None:
        freed = {h.segment for key in keys if (h := self.known[key].handle) is not None}
        elected = {}
        for key in keys:
            known = self.known[key]
            known.handle, known.writer = None, None
            if not known.waiting:
                del self.known[key]
                continue
            successor = known.waiting.pop(0)
            known.writer = successor.session
            elected[successor.reply_to] = known
        for effect in effects:
            if isinstance(effect, Answer):
                assert isinstance(effect.message, Elected)
                elected[effect.waiter.reply_to].generation = effect.message.generation
        answered, gave = self.apply(effects)
        assert (set(answered), set(gave)) == (set(elected), freed)

    @invariant()
    def the_same_sets_in_the_same_states(self) -> None:
        expected = {
            key: (
                ("sealed" if known.readers.total() else "idle") if known.sealed else "loading",
                known.writer,
                +known.readers,
                known.generation,
                [w.reply_to for w in known.waiting],
            )
            for key, known in self.known.items()
        }
        assert expected == {
            s.key: (s.state, s.writer, s.readers, s.generation, [w.reply_to for w in s.waiters])
            for s in self.sets
        }

    @invariant()
    def nothing_reserved_is_lost(self) -> None:
        assert {handle.segment for handle in self.sets.handles()} == self.unfreed
        sizes = [k.handle.num_bytes for k in self.known.values() if k.handle is not None]
        assert self.sets.used_bytes() == sum(sizes)

    @invariant()
    def whoever_waits_has_a_deadline(self) -> None:
        deadlines = [w.deadline for known in self.known.values() for w in known.waiting]
        assert self.sets.next_deadline() == min(deadlines, default=None)

    def teardown(self) -> None:
        """All sessions end and all sets are evicted: nothing is held, nobody waits."""
        for session in range(1, 5):
            self.end_session(session)
        for key in list(self.known):
            self.evict(key)
        assert not self.unfreed
        assert not self.unanswered
        assert not list(self.sets)


Lives.TestCase.settings = settings(max_examples=120, stateful_step_count=40, deadline=None)
test_lives = Lives.TestCase
