"""The order of work, driven by random arrivals, aborts and ends."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from workers.messages import SamplingParams
from workers.scheduler import Chunk, GenerationSequence, Scheduler, total_tokens


def sequence(
    name: str, num_tokens: int, num_new: int = 4, num_generated: int = 0
) -> GenerationSequence:
    return GenerationSequence(
        request_id=name,
        token_ids=list(range(num_tokens)),
        sampling=SamplingParams(max_tokens=num_new + num_generated),
        num_generated=num_generated,
        num_initial=num_tokens,
    )


def advance(scheduler: Scheduler, chunks: tuple[Chunk, ...]) -> list[str]:
    """Do what an engine does with a step, with token 0 for every new token. Returns who ended."""
    ended = []
    for chunk in chunks:
        scheduler.computed(chunk)
        if chunk.samples:
            one = chunk.sequence
            one.token_ids.append(0)
            one.num_generated += 1
            if one.num_generated >= one.sampling.max_tokens:
                scheduler.remove(one.request_id)
                ended.append(one.request_id)
    return ended


def shape(chunks: tuple[Chunk, ...]) -> list[tuple[str, int, int]]:
    return [(chunk.sequence.request_id, chunk.start, chunk.stop) for chunk in chunks]


def test_a_long_prompt_does_not_stop_the_others() -> None:
    scheduler = Scheduler(max_num_seqs=4, token_budget=10)
    scheduler.add(sequence("short", 3, num_new=9))
    scheduler.add(sequence("long", 25))
    scheduler.add(sequence("late", 2))
    steps = []
    for _ in range(4):
        chunks = scheduler.schedule()
        steps.append(shape(chunks))
        advance(scheduler, chunks)
        scheduler.check()
    assert steps == [
        [("short", 0, 3), ("long", 0, 7)],
        [("short", 3, 4), ("long", 7, 17)],
        [("short", 4, 5), ("long", 17, 25), ("late", 0, 2)],
        [("short", 5, 6), ("long", 25, 26), ("late", 2, 3)],
    ]


def test_admission_waits_for_room() -> None:
    scheduler = Scheduler(max_num_seqs=1, token_budget=100)
    for name in ("a", "b", "c"):
        scheduler.add(sequence(name, 2, num_new=2))
    ended: list[str] = []
    while scheduler.num_running or scheduler.num_waiting:
        ended += advance(scheduler, scheduler.schedule())
        assert scheduler.num_running <= 1
    assert ended == ["a", "b", "c"]


def test_generated_tokens_of_an_earlier_instance_are_computed_like_a_prompt() -> None:
    scheduler = Scheduler(max_num_seqs=2, token_budget=4)
    scheduler.add(sequence("resumed", 6, num_new=2, num_generated=3))
    chunks = scheduler.schedule()
    assert shape(chunks) == [("resumed", 0, 4)]
    assert not chunks[0].samples
    advance(scheduler, chunks)
    chunks = scheduler.schedule()
    assert shape(chunks) == [("resumed", 4, 6)]
    assert chunks[0].samples


def test_removing_is_for_waiting_and_running_alike() -> None:
    scheduler = Scheduler(max_num_seqs=1, token_budget=4)
    scheduler.add(sequence("runs", 2))
    scheduler.add(sequence("waits", 2))
    scheduler.schedule()
    assert (scheduler.num_running, scheduler.num_waiting) == (1, 1)
    assert scheduler.remove("waits") is not None
    assert scheduler.remove("runs") is not None
    assert scheduler.remove("unknown") is None
    assert (scheduler.num_running, scheduler.num_waiting) == (0, 0)
    assert scheduler.schedule() == ()
    scheduler.check()


def test_misuse_is_refused() -> None:
    scheduler = Scheduler(max_num_seqs=1, token_budget=4)
    scheduler.add(sequence("a", 2))
    with pytest.raises(ValueError, match="here already"):
        scheduler.add(sequence("a", 2))
    (chunk,) = scheduler.schedule()
    scheduler.computed(chunk)
    with pytest.raises(ValueError, match="2 tokens computed"):
        scheduler.computed(chunk)
    for wrong in ((0, 1), (1, 0)):
        with pytest.raises(ValueError, match="at least 1"):
            Scheduler(*wrong)


class Arrivals(RuleBasedStateMachine):
    """Requests come, are aborted, and end, in any order."""

    @initialize(max_num_seqs=st.integers(1, 4), token_budget=st.integers(1, 9))
    def start(self, max_num_seqs: int, token_budget: int) -> None:
        self.scheduler = Scheduler(max_num_seqs, token_budget)
        self.max_num_seqs, self.token_budget = max_num_seqs, token_budget
        self.alive: dict[str, GenerationSequence] = {}
        self.admitted: list[str] = []
        self.computed: dict[str, list[int]] = {}
        self.count = 0

    @rule(num_tokens=st.integers(1, 30), num_new=st.integers(1, 6), share=st.floats(0, 1, width=16))
    def add(self, num_tokens: int, num_new: int, share: float) -> None:
        name = f"{self.count:04}"
        self.count += 1
        num_generated = int(share * (num_tokens - 1))
        self.alive[name] = sequence(name, num_tokens, num_new, num_generated)
        self.computed[name] = []
        self.scheduler.add(self.alive[name])

    @precondition(lambda self: self.alive)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.alive)))
        assert self.scheduler.remove(name) is self.alive.pop(name)

    @rule()
    def step(self) -> None:
        before = {name: one.is_decoding for name, one in self.alive.items()}
        running = {one for one in self.alive if self.computed[one]}
        chunks = self.scheduler.schedule()
        names = [chunk.sequence.request_id for chunk in chunks]
        assert len(set(names)) == len(names)
        decodes = [chunk for chunk in chunks if before[chunk.sequence.request_id]]
        prefills = chunks[len(decodes) :]
        assert [chunk.sequence.request_id for chunk in decodes] == sorted(
            name for name, decoding in before.items() if decoding
        )
        assert total_tokens(decodes) == len(decodes)
        assert total_tokens(prefills) <= self.token_budget
        if any(not before[name] for name in running) or len(running) < min(
            self.max_num_seqs, len(self.alive)
        ):
            assert prefills, "there was a prompt to compute, and nothing of it was"
        for chunk in chunks:
            done = self.computed[chunk.sequence.request_id]
            if not done:
                self.admitted.append(chunk.sequence.request_id)
            done.extend(range(chunk.start, chunk.stop))
            assert done == list(range(chunk.stop))
        for name in advance(self.scheduler, chunks):
            del self.alive[name]

    @invariant()
    def all_in_order(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        self.scheduler.check()
        assert [one.request_id for one in self.scheduler] == list(self.alive)
        assert self.admitted == sorted(self.admitted)
        assert self.scheduler.num_running + self.scheduler.num_waiting == len(self.alive)

    def teardown(self) -> None:
        """Nobody starves: what is left ends within the steps that it takes one after the other."""
        if not hasattr(self, "scheduler"):
            return
        bound = sum(
            one.num_pending + one.sampling.max_tokens - one.num_generated
            for one in self.alive.values()
        )
        for _ in range(bound):
            self.step()
            self.all_in_order()
        assert not self.alive


Arrivals.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestArrivals = Arrivals.TestCase
