"""The order of work, driven by random arrivals, aborts, drafts and ends, in a room of few blocks.

The room is a model: a number of tokens that fit, by blocks, and who holds how many. It keeps none
of what was computed when a sequence gives up, so each must be computed anew from its first token.
"""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from workers.engine.scheduler import Chunk, Scheduler
from workers.engine.sequence import GenerationSequence
from workers.kv.cache import SequenceCache
from workers.kv.layout import KVLayer, KVLayout
from workers.kv.table import BlockTable
from workers.messages import SamplingParams
from workers.sampling import SequenceSampler, Tokens

BLOCK = 4
LAYOUT = KVLayout((KVLayer(1, 16),), torch.float32)
VOCAB_SIZE = 2048


class Room:
    """`num_blocks` blocks of `BLOCK` tokens. `known` tokens of whoever begins are there already."""

    def __init__(self, num_blocks: int = 1 << 30, known: int = 0) -> None:
        self.num_blocks = num_blocks
        self.known = known
        self.held: dict[GenerationSequence, int] = {}
        self.begun: list[str] = []

    @property
    def num_free(self) -> int:
        return self.num_blocks - sum(self.held.values())

    def admit(self, sequence: GenerationSequence) -> None:
        assert sequence not in self.held
        self.held[sequence] = 0
        self.begun.append(sequence.request_id)
        known = 0
        if sequence.may_skip and blocks_of(self.known) <= self.num_free:
            known = min(self.known, (sequence.num_pending - 1) // BLOCK * BLOCK)
            self.held[sequence] = blocks_of(known)
        sequence.cache = SequenceCache(BlockTable(LAYOUT, (), known), b"", known)

    def grow(self, sequence: GenerationSequence, num_tokens: int) -> bool:
        more = max(0, blocks_of(num_tokens) - self.held[sequence])
        if more > self.num_free:
            return False
        self.held[sequence] += more
        return True

    def give_up(self, sequence: GenerationSequence) -> None:
        del self.held[sequence]
        sequence.cache = None

    def end(self, sequence: GenerationSequence) -> None:
        """As the engine does with one that was removed from the schedule."""
        self.held.pop(sequence, None)
        sequence.cache = None


def blocks_of(num_tokens: int) -> int:
    return -(-num_tokens // BLOCK)


def sequence(
    name: str, num_tokens: int, num_new: int = 4, num_generated: int = 0, **changes: Any
) -> GenerationSequence:
    params = SamplingParams(max_tokens=num_new + num_generated)
    tokens = Tokens(list(range(num_tokens)), num_tokens - num_generated)
    return GenerationSequence(name, SequenceSampler(params, tokens, VOCAB_SIZE, ()), **changes)


def advance(scheduler: Scheduler, room: Room, chunks: Sequence[Chunk]) -> list[str]:
    """Do what an engine does with a step, with token 0 for every new token, and every second one
    of a draft right. Returns who ended."""
    ended = []
    for chunk in chunks:
        one = chunk.sequence
        one.table.commit(chunk.stop - chunk.start)
        if not chunk.samples:
            continue
        num_right = min(len(chunk.draft) // 2, one.sampling.max_tokens - one.num_generated - 1)
        one.token_ids.extend([0] * (num_right + 1))
        one.table.commit(num_right)
        if one.num_generated >= one.sampling.max_tokens:
            scheduler.remove(one.request_id)
            room.end(one)
            ended.append(one.request_id)
    return ended


def run(scheduler: Scheduler, room: Room, most_steps: int = 1000) -> list[str]:
    """Who ended, in order, when all have."""
    ended: list[str] = []
    for _ in range(most_steps):
        if not scheduler.num_running + scheduler.num_waiting:
            return ended
        ended += advance(scheduler, room, scheduler.schedule(room))
        scheduler.check()
    raise AssertionError(f"after {most_steps} steps some are still here; ended are {ended}")


def shape(chunks: Sequence[Chunk]) -> list[tuple[str, int, int]]:
    return [(chunk.sequence.request_id, chunk.start, chunk.stop) for chunk in chunks]


# --- shares of a step


def test_a_long_prompt_does_not_stop_the_others() -> None:
    scheduler, room = Scheduler(max_num_seqs=4, max_num_batched_tokens=10), Room()
    scheduler.add(sequence("short", 3, num_new=9))
    scheduler.add(sequence("long", 25))
    scheduler.add(sequence("late", 2))
    steps = []
    for _ in range(4):
        chunks = scheduler.schedule(room)
        steps.append(shape(chunks))
        advance(scheduler, room, chunks)
        scheduler.check()
    assert steps == [
        [("short", 0, 3), ("long", 0, 5), ("late", 0, 2)],
        [("short", 3, 4), ("late", 2, 3), ("long", 5, 15)],
        [("short", 4, 5), ("late", 3, 4), ("long", 15, 25)],
        [("short", 5, 6), ("long", 25, 26), ("late", 4, 5)],
    ]


def test_a_short_prompt_gets_its_share_at_once_beside_a_long_one() -> None:
    scheduler, room = Scheduler(max_num_seqs=8, max_num_batched_tokens=16), Room()
    scheduler.add(sequence("long", 1000))
    advance(scheduler, room, scheduler.schedule(room))
    scheduler.add(sequence("short", 8))
    chunks = scheduler.schedule(room)
    assert shape(chunks) == [("short", 0, 8)]  # the long one has had its step
    assert chunks[0].samples


def test_a_long_prompt_comes_on_in_every_other_step_though_short_ones_never_end() -> None:
    scheduler, room = Scheduler(max_num_seqs=64, max_num_batched_tokens=16), Room()
    scheduler.add(sequence("long", 160))
    took: list[int] = []
    for step in range(30):
        chunks = scheduler.schedule(room)
        took += [c.num_tokens for c in chunks if c.sequence.request_id == "long" and c.start < 160]
        advance(scheduler, room, chunks)
        scheduler.add(sequence(f"short {step}", 3, num_new=1))
        if step % 2 and sum(took) < 160:
            assert len(took) == step // 2 + 1
    assert sum(took) == 160
    assert min(took[:-1]) >= 8


@pytest.mark.parametrize("budget", [1, 2, 5, 16])
def test_a_long_prompt_comes_on_however_many_short_ones_arrive(budget: int) -> None:
    scheduler, room = Scheduler(max_num_seqs=64, max_num_batched_tokens=budget), Room()
    scheduler.add(sequence("long", 20 * budget))
    advance(scheduler, room, scheduler.schedule(room))
    for step in range(40):
        for index in range(3):
            scheduler.add(sequence(f"short {step} {index}", budget, num_new=1))
        chunks = scheduler.schedule(room)
        of_long = [chunk for chunk in chunks if chunk.sequence.request_id == "long"]
        assert of_long[0].num_tokens >= min(budget / 2, 20 * budget - of_long[0].start)
        if of_long[0].samples:
            return
        advance(scheduler, room, chunks)
    raise AssertionError("the long prompt took more than its half of each step allows")


def test_places_are_waited_for() -> None:
    scheduler, room = Scheduler(max_num_seqs=1, max_num_batched_tokens=100), Room()
    for name in ("a", "b", "c"):
        scheduler.add(sequence(name, 2, num_new=2))
    assert run(scheduler, room) == ["a", "b", "c"]


def test_what_is_known_is_not_computed_again_unless_it_must_be() -> None:
    scheduler, room = Scheduler(max_num_seqs=2, max_num_batched_tokens=100), Room(known=8)
    scheduler.add(sequence("skips", 20))
    scheduler.add(sequence("may not", 20, may_skip=False, most_per_step=6))
    scheduler.add(sequence("all known", 8))
    assert shape(scheduler.schedule(room)) == [("skips", 8, 20), ("may not", 0, 6)]


def test_generated_tokens_of_an_earlier_instance_are_computed_like_a_prompt() -> None:
    scheduler, room = Scheduler(max_num_seqs=2, max_num_batched_tokens=4), Room()
    scheduler.add(sequence("resumed", 6, num_new=2, num_generated=3))
    chunks = scheduler.schedule(room)
    assert shape(chunks) == [("resumed", 0, 4)]
    assert not chunks[0].samples
    advance(scheduler, room, chunks)
    chunks = scheduler.schedule(room)
    assert shape(chunks) == [("resumed", 4, 6)]
    assert chunks[0].samples


# --- priorities


def test_the_lower_priority_goes_first_and_of_equals_the_earlier() -> None:
    scheduler, room = Scheduler(max_num_seqs=1, max_num_batched_tokens=100), Room()
    for name, priority in (("a", 1), ("b", 0), ("c", 1), ("d", -1), ("e", 0)):
        scheduler.add(sequence(name, 2, num_new=1, priority=priority))
    assert run(scheduler, room) == ["d", "b", "e", "a", "c"]


def test_the_last_gives_way_to_one_that_is_more_urgent() -> None:
    scheduler, room = Scheduler(max_num_seqs=2, max_num_batched_tokens=100), Room()
    scheduler.add(sequence("first", 4))
    scheduler.add(sequence("second", 4))
    advance(scheduler, room, scheduler.schedule(room))
    scheduler.add(sequence("equal", 4))
    scheduler.add(sequence("urgent", 4, num_new=1, priority=-1))
    chunks = scheduler.schedule(room)
    assert shape(chunks) == [("first", 4, 5), ("urgent", 0, 4)]
    assert scheduler.num_preempted == 1
    assert advance(scheduler, room, chunks) == ["urgent"]
    # Its five tokens are computed anew; the sampled one among them is not lost.
    assert shape(scheduler.schedule(room)) == [("first", 5, 6), ("second", 0, 5)]


# --- room


def test_where_room_ends_the_last_gives_way_and_loses_nothing() -> None:
    scheduler, room = Scheduler(max_num_seqs=4, max_num_batched_tokens=100), Room(num_blocks=4)
    a, b = sequence("a", 6, num_new=8), sequence("b", 7, num_new=8)
    scheduler.add(a)
    scheduler.add(b)
    steps = [shape(step(scheduler, room)) for _ in range(3)]
    assert steps == [
        [("a", 0, 6), ("b", 0, 7)],
        [("a", 6, 7), ("b", 7, 8)],
        [("a", 7, 8)],
    ]
    assert scheduler.num_preempted == 1
    assert (b.num_computed, len(b.token_ids), b.num_generated) == (0, 9, 2)
    assert run(scheduler, room) == ["a", "b"]
    assert len(b.token_ids) == 15


def step(scheduler: Scheduler, room: Room) -> Sequence[Chunk]:
    chunks = scheduler.schedule(room)
    advance(scheduler, room, chunks)
    scheduler.check()
    return chunks


def test_half_computed_prompts_do_not_block_each_other() -> None:
    scheduler, room = Scheduler(max_num_seqs=4, max_num_batched_tokens=8), Room(num_blocks=6)
    for name in ("a", "b", "c"):
        scheduler.add(sequence(name, 20, num_new=1))
    steps = 0
    ended: list[str] = []
    while len(ended) < 3:
        chunks = scheduler.schedule(room)
        assert chunks, "there was room for one, and nothing was computed"
        ended += advance(scheduler, room, chunks)
        steps += 1
    assert ended == ["a", "b", "c"]
    assert steps <= 15


def test_nothing_is_scheduled_where_there_is_no_room_for_any() -> None:
    scheduler, room = Scheduler(max_num_seqs=4, max_num_batched_tokens=8), Room(num_blocks=0)
    scheduler.add(sequence("a", 3))
    for _ in range(3):
        assert scheduler.schedule(room) == ()
        scheduler.check()
    assert room.held == {}
    room.num_blocks = 2
    assert run(scheduler, room) == ["a"]


def test_one_without_room_is_not_overtaken() -> None:
    scheduler, room = Scheduler(max_num_seqs=4, max_num_batched_tokens=100), Room(num_blocks=4)
    scheduler.add(sequence("large", 20))
    scheduler.add(sequence("small", 1))
    assert [scheduler.schedule(room) for _ in range(4)] == [()] * 4
    room.num_blocks = 6
    assert run(scheduler, room) == ["large", "small"]


def test_one_without_room_is_not_tried_every_step_but_as_soon_as_someone_leaves() -> None:
    scheduler, room = Scheduler(max_num_seqs=4, max_num_batched_tokens=100), Room(num_blocks=4)
    scheduler.add(sequence("a", 4, num_new=8))
    scheduler.add(sequence("large", 16, num_new=1))
    scheduler.add(sequence("small", 1, num_new=1))
    for _ in range(4):
        step(scheduler, room)
    assert room.begun == ["a", "large"]  # and "small" does not overtake it
    scheduler.remove("a")
    room.end(next(iter(room.held)))
    assert run(scheduler, room) == ["large", "small"]


def test_a_draft_makes_nobody_give_way() -> None:
    scheduler, room = Scheduler(max_num_seqs=4, max_num_batched_tokens=100), Room(num_blocks=5)
    a, b = sequence("a", 4, num_new=9), sequence("b", 4, num_new=9)
    scheduler.add(a)
    scheduler.add(b)
    step(scheduler, room)
    a.draft = b.draft = (7,) * 4  # three blocks for each, of which there are five for both
    chunks = scheduler.schedule(room)
    assert shape(chunks) == [("a", 4, 5), ("b", 4, 5)]
    assert [len(chunk.draft) for chunk in chunks] == [4, 0]
    assert scheduler.num_preempted == 0


# --- misuse


def test_removing_is_for_waiting_and_running_alike() -> None:
    scheduler, room = Scheduler(max_num_seqs=1, max_num_batched_tokens=4), Room()
    scheduler.add(sequence("runs", 2))
    scheduler.add(sequence("waits", 2))
    scheduler.schedule(room)
    assert (scheduler.num_running, scheduler.num_waiting) == (1, 1)
    assert scheduler.remove("waits") is not None
    assert scheduler.remove("runs") is not None
    assert scheduler.remove("unknown") is None
    assert (scheduler.num_running, scheduler.num_waiting) == (0, 0)
    assert scheduler.schedule(room) == ()
    scheduler.check()


def test_misuse_is_refused() -> None:
    scheduler = Scheduler(max_num_seqs=1, max_num_batched_tokens=4)
    scheduler.add(sequence("a", 2))
    with pytest.raises(ValueError, match="here already"):
        scheduler.add(sequence("a", 2))
    for wrong in ((0, 1), (1, 0)):
        with pytest.raises(ValueError, match="at least 1"):
            Scheduler(*wrong)


LONGEST = 30 + 6


class Arrivals(RuleBasedStateMachine):
    """Requests come, guess, are aborted, give way and end, in any order."""

    @initialize(
        max_num_seqs=st.integers(1, 4),
        max_num_batched_tokens=st.integers(1, 9),
        spare=st.integers(0, 20),
        known=st.integers(0, 9),
    )
    def start(self, max_num_seqs: int, max_num_batched_tokens: int, spare: int, known: int) -> None:
        self.scheduler = Scheduler(max_num_seqs, max_num_batched_tokens)
        self.max_num_batched_tokens = max_num_batched_tokens
        # The longest sequence alone always has room.
        self.room = Room(blocks_of(LONGEST) + spare, known)
        self.alive: dict[str, GenerationSequence] = {}
        self.count = 0

    @rule(
        num_tokens=st.integers(1, 30),
        num_new=st.integers(1, 6),
        share=st.floats(0, 1, width=16),
        priority=st.integers(-1, 1),
        most_per_step=st.none() | st.integers(1, 5),
    )
    def add(
        self,
        num_tokens: int,
        num_new: int,
        share: float,
        priority: int,
        most_per_step: int | None,
    ) -> None:
        name = f"{self.count:04}"
        self.count += 1
        self.alive[name] = sequence(
            name,
            num_tokens,
            num_new,
            int(share * (num_tokens - 1)),
            priority=priority,
            most_per_step=most_per_step,
            may_skip=most_per_step is None,
        )
        self.scheduler.add(self.alive[name])

    @precondition(lambda self: self.alive)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.alive)))
        one = self.alive.pop(name)
        assert self.scheduler.remove(name) is one
        self.room.end(one)

    @rule(num_tokens=st.integers(0, 4))
    def guess(self, num_tokens: int) -> None:
        for one in self.alive.values():
            left = one.sampling.max_tokens - one.num_generated
            if one.is_decoding:
                one.draft = (0,) * min(num_tokens, left - 1)

    @rule()
    def step(self) -> None:
        running = self.scheduler.running
        decoding = {one.request_id for one in running if one.is_decoding}
        fits = decoding and self._decodes_fit(running)
        first = self.scheduler.next_waiting
        urgent = first is not None and running and first.priority < running[-1].priority
        preempted = self.scheduler.num_preempted
        chunks = self.scheduler.schedule(self.room)
        names = [chunk.sequence.request_id for chunk in chunks]
        assert len(set(names)) == len(names)
        if fits and not urgent:
            assert self.scheduler.num_preempted == preempted
        assert chunks or not self.alive, "there is room for one alone, and nothing was computed"
        # One that decoded may have given way, and begun anew in this very step.
        prefills = [chunk for chunk in chunks if not chunk.sequence.is_decoding]
        decodes = [chunk for chunk in chunks if chunk.sequence.is_decoding]
        assert {chunk.sequence.request_id for chunk in decodes} <= decoding
        assert chunks == (*decodes, *prefills)
        assert [chunk.stop - chunk.start for chunk in decodes] == [1] * len(decodes)
        assert sum(chunk.num_tokens for chunk in prefills) <= self.max_num_batched_tokens
        for chunk in chunks:
            one = chunk.sequence
            assert self.room.held[one] >= blocks_of(chunk.stop + len(chunk.draft))
            assert chunk.num_tokens <= (one.most_per_step or self.max_num_batched_tokens) + len(
                chunk.draft
            )
            assert chunk.start == one.num_computed
        for name in advance(self.scheduler, self.room, chunks):
            del self.alive[name]

    def _decodes_fit(self, running: Sequence[GenerationSequence]) -> bool:
        """Whether there is room for one more token of each that decodes, guesses aside."""
        more = sum(
            max(0, blocks_of(len(one.token_ids)) - self.room.held[one])
            for one in running
            if one.is_decoding
        )
        return more <= self.room.num_free

    @invariant()
    def all_in_order(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        self.scheduler.check()
        assert self.room.num_free >= 0
        assert set(self.room.held) == set(self.scheduler.running)
        assert [one.request_id for one in self.scheduler] == list(self.alive)
        assert self.scheduler.num_running + self.scheduler.num_waiting == len(self.alive)

    def teardown(self) -> None:
        """Nobody starves: what is left ends."""
        if not hasattr(self, "scheduler"):
            return
        # Even if each is computed anew for each of its tokens, after all that go before it.
        bound = 10 + sum(
            (one.sampling.max_tokens - one.num_generated + 1) * (LONGEST + 10)
            for one in self.alive.values()
        ) * max(1, len(self.alive))
        for _ in range(bound):
            if not self.alive:
                return
            self.step()
            self.all_in_order()
        assert not self.alive


Arrivals.TestCase.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)
TestArrivals = Arrivals.TestCase


def test_one_that_gave_way_may_begin_anew_in_the_same_step() -> None:
    state = Arrivals()
    state.start(max_num_seqs=3, max_num_batched_tokens=8, spare=0, known=0)
    state.add(num_tokens=21, num_new=2, share=0.0, priority=1, most_per_step=None)
    state.step()
    state.step()
    state.add(num_tokens=11, num_new=1, share=0.0, priority=0, most_per_step=None)
    state.step()
    state.add(num_tokens=1, num_new=1, share=0.0, priority=0, most_per_step=None)
    state.step()
    preempted = state.scheduler.num_preempted
    state.step()
    assert state.scheduler.num_preempted == preempted + 1
    state.teardown()
