"""The life of weight sets: each transition as a row, and all of them at random against a model."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import msgspec
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
from allocator.daemon.weights.sets import WeightSets
from allocator.daemon.weights.weight_set import Answer, Discard, Effect, Free, ReplyTo, Waiter
from allocator.messages import (
    Elected,
    Extent,
    Handle,
    LowerTier,
    Open,
    Sealed,
    Sleep,
    StillLoading,
)

OPEN = Open(key="k", fingerprint={}, wait_ms=0)
SLEEP = Sleep(key="k", tier="host", wait_ms=0)
MADE_FROM = {"file": "a", "dtype": "bfloat16"}
WRITER, READER, STRANGER, MOVER = 1, 2, 3, 4
MANIFEST = Extent(offset=90, num_bytes=10)
LOWER = Handle(backend="host", segment="/lower", num_bytes=100, generation=0)
IMAGE = Handle(backend="file", segment="/images/k", num_bytes=100, generation=0, identity="1:2")


def handle_of(generation: int, number: int = 1, num_bytes: int = 100) -> Handle:
    return Handle(backend="host", segment=f"/s{number}", num_bytes=num_bytes, generation=generation)


def in_state(state: str) -> tuple[WeightSets, int]:
    """A set "k" in this state and its generation; WRITER wrote it, READER alone reads it, MOVER
    takes it to host memory."""
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
    if state in ("moving", "asleep"):
        generation = sets.move(MOVER, "k", "host", LOWER, "").generation
    if state == "asleep":
        sets.moved(MOVER, "k", generation)
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
        case "moved":
            return sets.moved(session, "k", generation)
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
        ("idle", "moved", WRITER, NotWriter),
        ("reserved", "moved", WRITER, InvalidMessage),
        ("moving", "open", STRANGER, "moving"),
        ("moving", "reserve", MOVER, InvalidMessage),
        ("moving", "progress", MOVER, "moving"),
        ("moving", "progress", STRANGER, NotWriter),
        ("moving", "seal", MOVER, InvalidMessage),
        ("moving", "moved", MOVER, "asleep"),
        ("moving", "moved", STRANGER, NotWriter),
        ("moving", "abandon", MOVER, "idle"),
        ("moving", "release", MOVER, UnknownWeightSet),
        ("moving", "evict", STRANGER, WeightSetBusy),
        ("asleep", "open", STRANGER, "moving"),
        ("asleep", "reserve", MOVER, NotWriter),
        ("asleep", "seal", MOVER, NotWriter),
        ("asleep", "moved", MOVER, NotWriter),
        ("asleep", "abandon", MOVER, NotWriter),
        ("asleep", "release", READER, UnknownWeightSet),
        ("asleep", "evict", STRANGER, "absent"),
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
        sets.wait("k", Waiter(session, (b"", b"%d" % session), 9.0, OPEN))
    for expected in (5, 6):
        [effect], changed = sets.end_session(next(iter(sets)).writer or 0, now=1.0)
        assert changed == ["k"]
        assert isinstance(effect, Answer)
        assert effect.waiter.session == expected
        assert isinstance(effect.message, Elected)
        assert effect.message.generation > generation


def test_a_waiter_that_dies_with_the_writer_is_not_elected_for_long() -> None:
    sets, _ = in_state("reserved")
    for session in (5, 6):
        sets.wait("k", Waiter(session, (b"", b"%d" % session), 9.0, OPEN))
    sets.end_session(WRITER, now=1.0)
    [effect], _ = sets.end_session(5, now=1.0)
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


# --- tiers, step by step


def asleep(tier: LowerTier) -> tuple[WeightSets, int]:
    """A set "k" whose only copy lies on `tier`, and its generation."""
    sets, _ = in_state("idle")
    moving = sets.move(MOVER, "k", tier, LOWER if tier == "host" else None, "/images")
    image = IMAGE if tier == "disk" else None
    sets.moved(MOVER, "k", moving.generation, image)
    return sets, moving.generation


def test_a_set_that_was_moved_down_frees_what_it_had_above() -> None:
    sets, _ = in_state("idle")
    upper = sets.handles()
    assert sets.sleep("k", "host") == ("copy", [])
    moving = sets.move(MOVER, "k", "host", LOWER, "")
    assert state_of(sets) == "moving"
    assert (moving.handle, moving.manifest) == (upper[0], MANIFEST)
    assert moving.target == msgspec.structs.replace(LOWER, generation=moving.generation)
    assert sets.num_bytes("host") == LOWER.num_bytes  # counted before it is written
    assert sets.moved(MOVER, "k", moving.generation) == [Free(upper[0])]
    assert state_of(sets) == "asleep"
    assert (sets.num_bytes("device"), sets.num_bytes("host")) == (0, LOWER.num_bytes)
    assert sets.sleep("k", "host") == ("asleep", [])


def test_who_opens_a_sleeping_set_is_told_where_its_bytes_are() -> None:
    sets, before = asleep("host")
    elected = sets.open(WRITER, "k", MADE_FROM)
    assert isinstance(elected, Elected)
    assert elected.generation > before
    assert elected.source is not None
    assert (elected.source.tier, elected.source.manifest) == ("host", MANIFEST)
    assert state_of(sets) == "moving"
    sets.reserve(WRITER, "k", handle_of(elected.generation, 2))
    _, effects = sets.seal(WRITER, "k", elected.generation, MANIFEST)
    assert [type(effect) for effect in effects] == [Free]  # the copy in host memory
    assert state_of(sets) == "sealed"


@pytest.mark.parametrize("reserved", [False, True])
def test_who_fails_to_wake_a_set_leaves_it_asleep(reserved: bool) -> None:
    sets, _ = asleep("host")
    elected = sets.open(WRITER, "k", MADE_FROM)
    assert isinstance(elected, Elected)
    if reserved:
        sets.reserve(WRITER, "k", handle_of(elected.generation, 2))
    effects = sets.abandon(WRITER, "k", elected.generation)
    assert effects == ([Free(handle_of(elected.generation, 2))] if reserved else [])
    assert state_of(sets) == "asleep"


@pytest.mark.parametrize("tier", ["host", "disk"])
def test_a_damaged_copy_is_given_up_and_the_set_is_loaded_anew(tier: LowerTier) -> None:
    sets, _ = asleep(tier)
    elected = sets.open(WRITER, "k", MADE_FROM)
    assert isinstance(elected, Elected)
    assert sets.open(READER, "k", MADE_FROM) is None
    sets.wait("k", Waiter(READER, (b"", b"r"), 9.0, OPEN))
    [gone, answer] = sets.abandon(WRITER, "k", elected.generation, discard_source=True)
    assert gone == (Discard(IMAGE) if tier == "disk" else Free(in_generation(LOWER, sets, -2)))
    assert isinstance(answer, Answer)
    assert isinstance(answer.message, Elected)
    assert answer.message.source is None
    assert state_of(sets) == "loading"


def in_generation(handle: Handle, sets: WeightSets, off_by: int) -> Handle:
    """The handle as the set that was elected for so many elections ago has it."""
    generation = next(iter(sets)).generation + off_by
    return msgspec.structs.replace(handle, generation=generation)


def test_an_image_can_be_mapped_as_it_is() -> None:
    sets, _ = asleep("disk")
    elected = sets.open(WRITER, "k", MADE_FROM)
    assert isinstance(elected, Elected)
    sealed, effects = sets.seal(WRITER, "k", elected.generation, MANIFEST, in_place=True)
    assert sealed.handle.segment == IMAGE.segment
    assert effects == []
    sets.release(WRITER, "k", elected.generation, now=1.0)
    # To sleep again takes no copying, on whichever tier it was wished.
    assert sets.sleep("k", "host")[0] == "asleep"
    assert state_of(sets) == "asleep"


def test_what_is_in_place_already_cannot_be_reserved_as_well() -> None:
    sets, _ = asleep("disk")
    elected = sets.open(WRITER, "k", MADE_FROM)
    assert isinstance(elected, Elected)
    sets.reserve(WRITER, "k", handle_of(elected.generation, 2))
    with pytest.raises(InvalidMessage, match="no image that could be mapped"):
        sets.seal(WRITER, "k", elected.generation, MANIFEST, in_place=True)


@pytest.mark.parametrize("ends", ["abandon", "end"])
def test_a_move_that_fails_leaves_the_set_where_it_was_and_usable(ends: str) -> None:
    """Also its readers can leave it: the generation that they know is the set's."""
    sets, _ = in_state("idle")
    moving = sets.move(MOVER, "k", "host", LOWER, "")
    assert sets.open(READER, "k", MADE_FROM) is None
    sets.wait("k", Waiter(READER, (b"", b"r"), 9.0, OPEN))
    effects = (
        sets.abandon(MOVER, "k", moving.generation)
        if ends == "abandon"
        else sets.end_session(MOVER, now=2.0)[0]
    )
    [freed, answer] = effects
    assert freed == Free(msgspec.structs.replace(LOWER, generation=moving.generation))
    assert isinstance(answer, Answer)
    assert isinstance(answer.message, Sealed)
    assert state_of(sets) == "sealed"
    again = sets.open(STRANGER, "k", MADE_FROM)
    assert isinstance(again, Sealed)
    for session, sealed in ((READER, answer.message), (STRANGER, again)):
        sets.release(session, "k", sealed.handle.generation, now=3.0)
    assert state_of(sets) == "idle"


def test_who_wants_a_set_to_sleep_that_another_moves_asks_again_later() -> None:
    sets, _ = in_state("idle")
    moving = sets.move(MOVER, "k", "host", LOWER, "")
    assert sets.sleep("k", "host") == ("wait", [])
    sets.wait("k", Waiter(STRANGER, (b"", b"s"), 9.0, SLEEP))
    [_, answer] = sets.moved(MOVER, "k", moving.generation)
    assert isinstance(answer, Answer)
    assert isinstance(answer.message, StillLoading)
    assert sets.sleep("k", "host") == ("asleep", [])


@pytest.mark.parametrize("state", ["loading", "reserved", "sealed"])
def test_what_is_used_cannot_sleep(state: str) -> None:
    sets, _ = in_state(state)
    with pytest.raises(WeightSetBusy):
        sets.sleep("k", "disk")


def test_a_writer_on_the_device_cannot_say_that_it_moved() -> None:
    sets, generation = in_state("reserved")
    with pytest.raises(InvalidMessage, match="does not move"):
        sets.moved(WRITER, "k", generation, IMAGE)
    assert state_of(sets) == "loading"


def test_a_mover_cannot_seal_reserve_or_say_that_it_moved_without_an_image() -> None:
    sets, _ = in_state("idle")
    moving = sets.move(MOVER, "k", "disk", None, "/images")
    for wrong in (
        lambda: sets.seal(MOVER, "k", moving.generation, MANIFEST),
        lambda: sets.reserve(MOVER, "k", handle_of(moving.generation, 2)),
        lambda: sets.moved(MOVER, "k", moving.generation),
    ):
        with pytest.raises(InvalidMessage):
            wrong()
    assert state_of(sets) == "moving"


def test_an_image_of_what_the_key_meant_before_does_not_stand_in_the_way() -> None:
    sets, _ = asleep("disk")
    elected = sets.open(WRITER, "k", {"file": "b"})
    assert isinstance(elected, Elected)
    assert elected.source is None
    assert state_of(sets) == "loading"


@pytest.mark.parametrize(("image", "left"), [(False, "asleep"), (True, "absent")])
def test_an_image_goes_only_if_that_is_asked_for(image: bool, left: str) -> None:
    sets, _ = asleep("disk")
    assert sets.evict("k", image=image) == ([Discard(IMAGE)] if image else [])
    assert state_of(sets) == left


def test_a_set_with_files_of_its_own_sleeps_by_being_forgotten() -> None:
    """Its bytes lie in a file that can be mapped again at no cost, so nothing is copied."""
    sets, generation = in_state("reserved")
    file = Handle(backend="file", segment="/model", num_bytes=1000, generation=0, identity="1")
    sets.seal(WRITER, "k", generation, MANIFEST, files=(file,))
    assert sets.num_bytes("device") == 1100
    sets.release(WRITER, "k", generation, now=1.0)
    assert sets.sleep("k", "host") == ("asleep", [Free(handle_of(generation))])
    assert state_of(sets) == "absent"


# --- at random, against a plain model

KEYS = st.sampled_from(["k", "l"])
SESSIONS = st.integers(1, 4)
THE_WRITER = 0
WRITERS = st.sampled_from([THE_WRITER, THE_WRITER, THE_WRITER, 1, 2, 3, 4])
OFF_BY = st.sampled_from([0, 0, 0, 0, -1, 1])
TIERS = ("device", "host", "disk")


@dataclass
class Known:
    """What the model believes about one set."""

    fingerprint: str
    generation: int = 0
    writer: int | None = None
    target: Handle | None = None
    goes_to: str = "device"
    copies: dict[str, Handle] = field(default_factory=dict)
    readers: Counter[int] = field(default_factory=Counter)
    waiting: list[Waiter] = field(default_factory=list)

    @property
    def state(self) -> str:
        if self.writer is not None:
            return "moving" if self.copies else "loading"
        if "device" in self.copies:
            return "sealed" if self.readers.total() else "idle"
        return "asleep" if self.copies else "absent"

    @property
    def tier(self) -> str:
        return next((tier for tier in TIERS if tier in self.copies), "device")


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
        self.elections = 0

    # --- what the sessions do

    @rule(key=KEYS, session=SESSIONS, fingerprint=st.sampled_from("AAAB"), wait=st.integers(0, 5))
    def open(self, key: str, session: int, fingerprint: str, wait: int) -> None:
        known = self.known.get(key)
        if known is not None and known.fingerprint != fingerprint:
            if (known.state, known.tier) != ("asleep", "disk"):
                with pytest.raises(FingerprintMismatch, match="f was"):
                    self.sets.open(session, key, {"f": fingerprint})
                return
            known = None
        answer = self.sets.open(session, key, {"f": fingerprint})
        if known is None:
            known = self.known[key] = Known(fingerprint)
        if known.writer is not None:
            assert answer is None
            self.wait(known, key, session, wait, opens=True)
        elif "device" in known.copies:
            assert isinstance(answer, Sealed)
            self.admitted(known, session, answer)
        else:
            assert isinstance(answer, Elected)
            self.elected(known, session, "device", answer)

    @rule(key=KEYS, session=SESSIONS)
    def open_whatever_there_is(self, key: str, session: int) -> None:
        known = self.known.get(key)
        if known is None:
            with pytest.raises(UnknownWeightSet):
                self.sets.open(session, key, None)
            return
        self.open(key, session, known.fingerprint, 1)

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

    def new_handle(self, generation: int, num_bytes: int) -> Handle:
        self.num_segments += 1
        return handle_of(generation, self.num_segments, num_bytes)

    @rule(key=KEYS, session=WRITERS, off_by=OFF_BY, num_bytes=st.integers(1, 50))
    def reserve(self, key: str, session: int, off_by: int, num_bytes: int) -> None:
        session = session or self.writer_of(key)
        handle = self.new_handle(self.generation(key, off_by), num_bytes)
        error = self.refused(key, session, handle.generation)
        known = self.known.get(key) or Known("")
        if error is None and (known.target is not None or known.goes_to != "device"):
            error = InvalidMessage
        if error is not None:
            with pytest.raises(error):
                self.sets.reserve(session, key, handle)
            return
        self.sets.reserve(session, key, handle)
        known.target = handle
        self.unfreed.add(handle.segment)

    @rule(key=KEYS, session=WRITERS, off_by=OFF_BY, num_bytes=st.integers(0, 60))
    def progress(self, key: str, session: int, off_by: int, num_bytes: int) -> None:
        session = session or self.writer_of(key)
        generation = self.generation(key, off_by)
        error = self.refused(key, session, generation)
        if error is None:
            known = self.known[key]
            most = known.target or known.copies.get(known.tier)
            if most is None or num_bytes > most.num_bytes:
                error = InvalidMessage
        if error is not None:
            with pytest.raises(error):
                self.sets.progress(session, key, generation, num_bytes)
        else:
            self.sets.progress(session, key, generation, num_bytes)
            assert next(s for s in self.sets if s.key == key).written_bytes == num_bytes

    @rule(key=KEYS, session=WRITERS, off_by=OFF_BY, in_place=st.booleans())
    def seal(self, key: str, session: int, off_by: int, in_place: bool) -> None:
        session = session or self.writer_of(key)
        generation = self.generation(key, off_by)
        extent = Extent(offset=0, num_bytes=1)
        error = self.refused(key, session, generation)
        if error is None:
            known = self.known[key]
            if known.goes_to != "device" or (
                (known.target is not None or "disk" not in known.copies)
                if in_place
                else known.target is None
            ):
                error = InvalidMessage
        if error is not None:
            with pytest.raises(error):
                self.sets.seal(session, key, generation, extent, in_place=in_place)
            return
        sealed, effects = self.sets.seal(session, key, generation, extent, in_place=in_place)
        sealed_bytes = known.copies["disk"] if in_place else known.target
        assert sealed_bytes is not None
        woken_from = known.copies.pop("host", None)
        known.copies["device"] = msgspec.structs.replace(sealed_bytes, generation=generation)
        self.no_writer(known)
        self.admitted(known, session, sealed)
        self.expect(key, effects, freed=[woken_from])

    @rule(key=KEYS, session=WRITERS, off_by=OFF_BY, discard=st.booleans())
    def abandon(self, key: str, session: int, off_by: int, discard: bool) -> None:
        session = session or self.writer_of(key)
        generation = self.generation(key, off_by)
        if error := self.refused(key, session, generation):
            with pytest.raises(error):
                self.sets.abandon(session, key, generation)
            return
        effects = self.sets.abandon(session, key, generation, discard_source=discard)
        known = self.known[key]
        freed, discarded = [known.target], []
        if discard and known.goes_to == "device":
            (discarded if known.tier == "disk" else freed).append(
                known.copies.pop(known.tier, None)
            )
        self.no_writer(known)
        self.expect(key, effects, freed=freed, discarded=discarded)

    @rule(
        key=KEYS, session=SESSIONS, tier=st.sampled_from(["host", "disk"]), wait=st.integers(0, 5)
    )
    def sleep(self, key: str, session: int, tier: LowerTier, wait: int) -> None:
        known = self.known.get(key)
        if known is None:
            with pytest.raises(UnknownWeightSet):
                self.sets.sleep(key, tier)
            return
        if known.state in ("loading", "sealed"):
            with pytest.raises(WeightSetBusy):
                self.sets.sleep(key, tier)
            return
        step, effects = self.sets.sleep(key, tier)
        highest = known.copies[known.tier]
        if known.writer is not None:
            assert (step, effects) == ("wait", [])
            self.wait(known, key, session, wait, opens=False)
        elif TIERS.index(known.tier) >= TIERS.index(tier):
            assert (step, effects) == ("asleep", [])
        elif highest.backend == "file" or (tier == "disk" and "disk" in known.copies):
            assert step == "asleep"
            freed = [known.copies.pop("device", None), known.copies.pop("host", None)]
            self.expect(key, effects, freed=freed)
        else:
            assert (step, effects) == ("copy", [])
            target = self.new_handle(0, highest.num_bytes) if tier == "host" else None
            moving = self.sets.move(session, key, tier, target, "/images")
            assert moving.handle == highest
            self.elections += 1
            assert moving.generation == self.elections
            known.generation, known.writer, known.goes_to = moving.generation, session, tier
            known.target = moving.target
            if moving.target is not None:
                self.unfreed.add(moving.target.segment)

    @rule(key=KEYS, session=WRITERS, off_by=OFF_BY, written=st.booleans())
    def moved(self, key: str, session: int, off_by: int, written: bool) -> None:
        session = session or self.writer_of(key)
        generation = self.generation(key, off_by)
        error = self.refused(key, session, generation)
        known = self.known.get(key) or Known("")
        self.num_segments += 1
        image = msgspec.structs.replace(IMAGE, segment=f"/images/{self.num_segments}")
        if error is None and (
            known.goes_to == "device" or (known.goes_to == "disk" and not written)
        ):
            error = InvalidMessage
        if error is not None:
            with pytest.raises(error):
                self.sets.moved(session, key, generation, image if written else None)
            return
        effects = self.sets.moved(session, key, generation, image if written else None)
        upper = known.copies.pop(known.tier)
        below = image if known.goes_to == "disk" else known.target
        assert below is not None
        known.copies[known.goes_to] = below
        self.no_writer(known)
        self.expect(key, effects, freed=[upper])

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
        effects, changed = self.sets.end_session(session, self.now)
        expected = []
        for key, known in list(self.known.items()):
            gone = [w for w in known.waiting if w.session == session]
            self.unanswered -= {w.reply_to for w in gone}
            known.waiting = [w for w in known.waiting if w.session != session]
            if known.writer == session:
                target = known.target
                self.no_writer(known)
                expected.append(key)
                mine = [e for e in effects if self.is_about(e, key, target)]
                effects = [e for e in effects if e not in mine]
                self.expect(key, mine, freed=[target])
            if known.readers.pop(session, 0):
                expected.append(key)
        assert effects == []
        assert sorted(changed) == sorted(expected)

    def is_about(self, effect: Effect, key: str, target: Handle | None) -> bool:
        if isinstance(effect, Answer):
            return effect.waiter in self.known[key].waiting
        return effect.handle == target

    @rule(key=KEYS, image=st.booleans())
    def evict(self, key: str, image: bool) -> None:
        known = self.known.get(key)
        if known is None:
            with pytest.raises(UnknownWeightSet):
                self.sets.evict(key, image=image)
        elif known.writer is not None or known.readers.total():
            with pytest.raises(WeightSetBusy):
                self.sets.evict(key, image=image)
        else:
            effects = self.sets.evict(key, image=image)
            freed = [known.copies.pop("device", None), known.copies.pop("host", None)]
            discarded = [known.copies.pop("disk", None)] if image else []
            self.expect(key, effects, freed=freed, discarded=discarded)

    @rule(session=SESSIONS)
    def ask_for_something_else(self, session: int) -> None:
        given_up = {waiter.reply_to for _, waiter in self.sets.given_up(session)}
        expected = set()
        for known in self.known.values():
            expected |= {w.reply_to for w in known.waiting if w.session == session}
            known.waiting = [w for w in known.waiting if w.session != session]
        assert given_up == expected
        self.unanswered -= given_up

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

    def wait(self, known: Known, key: str, session: int, wait: int, *, opens: bool) -> None:
        self.num_requests += 1
        reply_to = (b"%d" % session, b"%d" % self.num_requests)
        waiter = Waiter(session, reply_to, self.now + wait, OPEN if opens else SLEEP)
        self.sets.wait(key, waiter)
        known.waiting.append(waiter)
        self.unanswered.add(reply_to)

    def admitted(self, known: Known, session: int, sealed: Sealed) -> None:
        """Whoever reads can map the very bytes, and release them by the generation it was told."""
        assert sealed.handle.segment == known.copies["device"].segment
        assert sealed.handle.generation == known.generation
        known.readers[session] += 1

    def elected(self, known: Known, session: int, tier: str, elected: Elected) -> None:
        self.elections += 1
        assert elected.generation == self.elections  # never one that was there before
        lower = next((t for t in ("host", "disk") if t in known.copies), None)
        assert (elected.source and elected.source.tier) == lower
        if elected.source is not None and lower is not None:
            assert elected.source.handle == known.copies[lower]
        known.generation, known.writer, known.goes_to = elected.generation, session, tier

    def no_writer(self, known: Known) -> None:
        known.writer, known.target, known.goes_to = None, None, "device"

    def expect(
        self,
        key: str,
        effects: list[Effect],
        *,
        freed: Sequence[Handle | None] = (),
        discarded: Sequence[Handle | None] = (),
    ) -> None:
        """What was freed and discarded, and what everybody who waits was told, in their order."""
        known = self.known[key]
        gone = [effect.handle.segment for effect in effects if isinstance(effect, Free)]
        assert sorted(gone) == sorted(handle.segment for handle in freed if handle is not None)
        self.unfreed -= set(gone)
        images = [effect.handle for effect in effects if isinstance(effect, Discard)]
        assert images == [handle for handle in discarded if handle is not None]
        answers = [effect for effect in effects if isinstance(effect, Answer)]
        waiting, known.waiting = known.waiting, []
        for waiter in waiting:
            if waiter.request is OPEN and known.writer is not None:
                known.waiting.append(waiter)
                continue
            answer = answers.pop(0)
            assert answer.waiter == waiter
            self.unanswered.remove(waiter.reply_to)
            if waiter.request is SLEEP:
                assert isinstance(answer.message, StillLoading)
            elif "device" in known.copies:
                assert isinstance(answer.message, Sealed)
                self.admitted(known, waiter.session, answer.message)
            else:
                assert isinstance(answer.message, Elected)
                self.elected(known, waiter.session, "device", answer.message)
        assert answers == []
        if known.state == "absent":
            del self.known[key]

    @invariant()
    def the_same_sets_in_the_same_states(self) -> None:
        expected = {
            key: (
                (known.state, known.tier, known.writer, +known.readers, known.generation),
                {tier: handle.segment for tier, handle in known.copies.items()},
                [w.reply_to for w in known.waiting],
            )
            for key, known in self.known.items()
        }
        assert expected == {
            s.key: (
                (s.state, s.tier, s.writer, s.readers, s.generation),
                {tier: copy.handle.segment for tier, copy in s.copies.items()},
                [w.reply_to for w in s.waiters],
            )
            for s in self.sets
        }

    @invariant()
    def nothing_reserved_is_lost(self) -> None:
        ours = {handle.segment for handle in self.sets.handles() if handle.backend == "host"}
        assert ours == self.unfreed
        for tier in TIERS:
            sizes = [k.copies[tier].num_bytes for k in self.known.values() if tier in k.copies]
            targets = [k.target for k in self.known.values() if k.target and k.goes_to == tier]
            assert self.sets.num_bytes(tier) == sum(sizes) + sum(t.num_bytes for t in targets)

    @invariant()
    def whoever_waits_has_a_deadline(self) -> None:
        deadlines = [w.deadline for known in self.known.values() for w in known.waiting]
        assert self.sets.next_deadline() == min(deadlines, default=None)

    def teardown(self) -> None:
        """All sessions end and all sets are evicted: nothing is held, nobody waits."""
        for session in range(1, 5):
            self.end_session(session)
        for key in list(self.known):
            self.evict(key, image=True)
        assert not self.unfreed
        assert not self.unanswered
        assert not list(self.sets)


Lives.TestCase.settings = settings(
    max_examples=150, stateful_step_count=50, deadline=None, derandomize=True
)
test_lives = pytest.mark.slow(Lives.TestCase)
