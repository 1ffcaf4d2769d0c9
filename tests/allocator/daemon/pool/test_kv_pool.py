"""The pool of extents and the index of sealed blocks: each rule by itself, then all at random.

The random test runs about 12,000 operations beside a model of dicts and compares the two after
each of them; now and then the pool is made again from what it says of itself, to be the same.
"""

from collections import Counter
from dataclasses import dataclass, field
from itertools import pairwise

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from allocator.daemon.pool.kv_pool import KVPool
from allocator.errors import AllocatorError, DoubleFree, ForeignExtent, StaleGeneration
from allocator.messages import BlockToPut, Extent, LeaseId, Region

pytestmark = pytest.mark.slow

GRANULE = 1024
OWNER, OTHER = 1, 2


def pool_of(num_granules: int) -> KVPool:
    return KVPool(num_granules * GRANULE, GRANULE)


def digest(number: int) -> bytes:
    return number.to_bytes(16, "big")


def leased(pool: KVPool, session: int = OWNER, size: int = 1, count: int = 1) -> list[LeaseId]:
    extents = pool.lease(session, size * GRANULE, count)
    assert extents is not None
    return [LeaseId(extent.offset, pool.generation) for extent in extents]


def cached(pool: KVPool, number: int, *, now: float = 0.0, size: int = 1) -> Extent:
    """A block that nobody pins, last used at `now`."""
    [lease] = leased(pool, size=size)
    block = BlockToPut(digest(number), lease.offset, lease.generation)
    assert pool.put(OWNER, [block], now) == [True]
    pool.unpin(OWNER, [digest(number)], now)
    return Extent(offset=lease.offset, num_bytes=size * GRANULE)


def at(granule: int, size: int = 1) -> Extent:
    return Extent(offset=granule * GRANULE, num_bytes=size * GRANULE)


# --- leases


def test_extents_are_whole_granules_that_do_not_overlap() -> None:
    pool = pool_of(8)
    assert pool.lease(OWNER, 1, 2) == [at(0), at(1)]
    assert pool.lease(OWNER, GRANULE + 1, 1) == [at(2, 2)]
    assert pool.held(OWNER) == (4 * GRANULE, 3, 0)
    assert (pool.total_bytes, pool.leased_bytes, pool.cached_bytes) == (8192, 4096, 0)
    assert [pool.rounded(n) for n in (1, GRANULE, GRANULE + 1)] == [1024, 1024, 2048]


def test_a_lease_that_does_not_fit_takes_nothing() -> None:
    pool = pool_of(8)
    generation = pool.generation
    before = list(pool.regions())
    for size, count in ((1, 9), (3, 3), (9, 1), (1 << 50, 1)):
        assert pool.lease(OWNER, size * GRANULE, count) is None
    assert list(pool.regions()) == before
    assert pool.generation == generation
    assert pool.held(OWNER) == (0, 0, 0)
    assert len(leased(pool, count=8)) == 8


def test_an_extent_that_is_leased_again_has_another_generation() -> None:
    pool = pool_of(1)
    [first] = leased(pool)
    assert pool.give_back(OWNER, [first]) == [at(0)]
    [second] = leased(pool, OTHER)
    assert second.offset == first.offset
    assert second.generation > first.generation
    with pytest.raises(ForeignExtent, match="belongs to another session"):
        pool.give_back(OWNER, [first])
    pool.give_back(OTHER, [second])
    [third] = leased(pool)
    with pytest.raises(StaleGeneration, match=f"in generation {first.generation} is gone"):
        pool.give_back(OWNER, [first])
    pool.give_back(OWNER, [third])


def wrong_leases() -> dict[str, tuple[LeaseId, type[AllocatorError], str]]:
    """What nobody may return or put, in the pool of `test_what_is_not_leased_…`."""
    return {
        "returned before": (LeaseId(0, 1), DoubleFree, "is free already"),
        "never leased": (LeaseId(7 * GRANULE, 1), DoubleFree, "is free already"),
        "beyond the end": (LeaseId(8 * GRANULE, 1), ForeignExtent, "no extent was leased"),
        "no granule": (LeaseId(GRANULE + 1, 2), ForeignExtent, "no extent was leased"),
        "the middle of a lease": (LeaseId(4 * GRANULE, 4), ForeignExtent, "no extent was leased"),
        "another session's": (LeaseId(2 * GRANULE, 3), ForeignExtent, "another session"),
        "an older generation": (LeaseId(GRANULE, 1), StaleGeneration, "it is now 2"),
        "a generation to come": (LeaseId(GRANULE, 99), StaleGeneration, "it is now 2"),
        "a sealed block": (LeaseId(5 * GRANULE, 5), ForeignExtent, "is a sealed block"),
        "named twice": (LeaseId(3 * GRANULE, 4), DoubleFree, "named twice"),
    }


@pytest.mark.parametrize("call", ["give_back", "put"])
@pytest.mark.parametrize(
    ("lease", "error", "message"), wrong_leases().values(), ids=wrong_leases().keys()
)
def test_what_is_not_leased_by_the_session_is_refused_and_all_else_with_it(
    call: str, lease: LeaseId, error: type[AllocatorError], message: str
) -> None:
    pool = pool_of(8)
    [returned], [good], _, [long], [block] = (
        leased(pool),
        leased(pool),
        leased(pool, OTHER),
        leased(pool, size=2),
        leased(pool),
    )
    pool.give_back(OWNER, [returned])
    pool.put(OWNER, [BlockToPut(digest(0), block.offset, block.generation)], 0.0)
    before = (list(pool.regions()), pool.held(OWNER), list(pool.blocks()))
    together = [long, lease]
    blocks = [BlockToPut(digest(n), i.offset, i.generation) for n, i in enumerate(together, 1)]
    with pytest.raises(error, match=message):
        pool.give_back(OWNER, together) if call == "give_back" else pool.put(OWNER, blocks, 0.0)
    assert (list(pool.regions()), pool.held(OWNER), list(pool.blocks())) == before
    pool.check()
    assert pool.give_back(OWNER, [good, long]) == [at(1), at(3, 2)]


# --- blocks


def test_who_puts_a_block_pins_it_and_leases_it_no_longer() -> None:
    pool = pool_of(4)
    [lease] = leased(pool)
    assert pool.put(OWNER, [BlockToPut(digest(1), lease.offset, lease.generation)], 1.0) == [True]
    assert pool.held(OWNER) == (0, 0, 1)
    assert (pool.leased_bytes, pool.cached_bytes, pool.evictable_bytes) == (0, GRANULE, 0)
    assert dict(pool.blocks())[digest(1)] == at(0)
    assert pool.evict_block() is None
    with pytest.raises(ForeignExtent, match="sealed block"):
        pool.give_back(OWNER, [lease])


def test_what_the_index_has_already_stays_leased() -> None:
    pool = pool_of(4)
    cached(pool, 1)
    first, second, third = leased(pool, count=3)
    blocks = [
        BlockToPut(digest(n), i.offset, i.generation)
        for n, i in ((1, first), (2, second), (2, third))
    ]
    assert pool.put(OWNER, blocks, 1.0) == [False, True, False]
    assert pool.held(OWNER) == (2 * GRANULE, 2, 1)
    assert pool.give_back(OWNER, [first, third]) == [at(1), at(3)]


def test_a_look_up_ends_at_the_first_block_that_is_missing() -> None:
    pool = pool_of(8)
    extents = {n: cached(pool, n) for n in (1, 2, 4)}
    assert pool.look_up(OTHER, [digest(n) for n in (1, 2, 3, 4)], 1.0) == [extents[1], extents[2]]
    assert pool.held(OTHER) == (0, 0, 2)
    assert pool.look_up(OTHER, [digest(3), digest(1)], 1.0) == []
    assert pool.look_up(OTHER, [], 1.0) == []
    assert pool.evictable_bytes == GRANULE  # block 4: it was not reached
    statistics = pool.statistics()
    assert (statistics.num_lookups, statistics.num_hits) == (6, 2)


def test_pins_are_counted_for_each_session() -> None:
    pool = pool_of(2)
    cached(pool, 1)
    for session in (OWNER, OTHER, OTHER):
        pool.look_up(session, [digest(1)], 0.0)
    assert (pool.held(OWNER)[2], pool.held(OTHER)[2]) == (1, 2)
    with pytest.raises(ForeignExtent, match=f"does not pin the block {digest(1).hex()}"):
        pool.unpin(OWNER, [digest(1), digest(1)], 0.0)
    assert pool.held(OWNER)[2] == 1  # neither of the two
    pool.unpin(OWNER, [digest(1)], 0.0)
    pool.unpin(OTHER, [digest(1)], 0.0)
    assert pool.evict_block() is None
    pool.unpin(OTHER, [digest(1)], 0.0)
    assert pool.evict_block() == (digest(1), at(0))


@pytest.mark.parametrize("unknown", [[digest(1)], [digest(2)], [digest(2), digest(1)]])
def test_what_is_not_pinned_cannot_be_unpinned(unknown: list[bytes]) -> None:
    pool = pool_of(2)
    cached(pool, 1)
    cached(pool, 2)
    pool.look_up(OWNER, [digest(2)], 0.0)
    with pytest.raises(ForeignExtent):
        pool.unpin(OTHER if unknown == [digest(2)] else OWNER, unknown, 0.0)
    assert pool.held(OWNER)[2] == 1
    pool.check()


def test_the_block_unused_for_longest_goes_first_and_only_unpinned_ones_do() -> None:
    pool = pool_of(8)
    for number in range(4):
        cached(pool, number, now=float(number))
    pool.look_up(OTHER, [digest(0)], 4.0)
    pool.look_up(OTHER, [digest(2)], 5.0)
    pool.unpin(OTHER, [digest(0)], 6.0)
    order = []
    while (oldest := pool.oldest_block()) is not None:
        evicted = pool.evict_block()
        assert evicted is not None
        order.append((evicted[0], oldest))
    assert order == [(digest(1), 1.0), (digest(3), 3.0), (digest(0), 6.0)]
    assert pool.evict_block() is None  # the one that is pinned
    assert pool.statistics().num_block_evictions == 3
    assert pool.cached_bytes == GRANULE


def test_the_end_of_a_session_gives_back_leases_and_pins_of_no_other() -> None:
    pool = pool_of(8)
    leased(pool, OTHER)
    mine = leased(pool, OWNER, size=2, count=2)
    cached(pool, 1)
    for session in (OWNER, OWNER, OTHER):
        pool.look_up(session, [digest(1)], 0.0)
    freed = pool.end_session(OWNER, 1.0)
    assert freed == [Extent(offset=i.offset, num_bytes=2 * GRANULE) for i in mine]
    assert pool.held(OWNER) == (0, 0, 0)
    assert pool.held(OTHER) == (GRANULE, 1, 1)
    pool.check()
    assert pool.end_session(OWNER, 2.0) == []  # and once more is nothing
    assert pool.end_session(OTHER, 2.0) == [at(0)]
    assert (pool.leased_bytes, pool.evictable_bytes) == (0, GRANULE)


def test_how_many_extents_there_could_be_once_blocks_are_gone() -> None:
    pool = pool_of(10)
    keep = leased(pool, count=10)
    pool.give_back(OWNER, [keep[2], keep[3], keep[6]])
    assert [pool.most_leases(n * GRANULE) for n in (1, 2, 3)] == [3, 1, 0]
    block = BlockToPut(digest(1), keep[4].offset, keep[4].generation)
    pool.put(OWNER, [block], 0.0)
    assert pool.most_leases(3 * GRANULE) == 0  # it is pinned
    pool.unpin(OWNER, [digest(1)], 0.0)
    assert [pool.most_leases(n * GRANULE) for n in (1, 2, 3, 4)] == [4, 1, 1, 0]


# --- looking


def test_regions_cover_the_pool_and_join_neighbours() -> None:
    pool = pool_of(10)
    leased(pool, OWNER, count=2)
    leased(pool, OTHER, size=2)
    cached(pool, 1)
    cached(pool, 2)
    leased(pool, OWNER)
    assert list(pool.regions()) == [
        Region(0, 2 * GRANULE, "leased", OWNER),
        Region(2 * GRANULE, 2 * GRANULE, "leased", OTHER),
        Region(4 * GRANULE, 2 * GRANULE, "cached"),
        Region(6 * GRANULE, GRANULE, "leased", OWNER),
        Region(7 * GRANULE, 3 * GRANULE, "free"),
    ]


def test_statistics_tell_how_broken_up_the_pool_is() -> None:
    pool = pool_of(8)
    leases = leased(pool, count=8)
    pool.give_back(OWNER, leases[::2])
    statistics = pool.statistics()
    assert statistics.total_bytes == 8 * GRANULE
    assert (statistics.leased_bytes, statistics.num_leases) == (4 * GRANULE, 4)
    assert (statistics.largest_free_bytes, statistics.fragmentation) == (GRANULE, 0.75)


# --- taking over


def made_again(pool: KVPool) -> KVPool:
    """A second pool, from what the first one says of itself."""
    again = KVPool(pool.total_bytes, GRANULE)
    again.restore(pool.leases(), pool.blocks(), pool.pins(), 0.0)
    again.check()
    return again


def test_a_pool_that_is_made_again_goes_on_where_the_first_one_was() -> None:
    pool = pool_of(16)
    [lease] = leased(pool, size=3)
    blocks = {n: cached(pool, n) for n in (1, 2, 3)}
    pool.look_up(OTHER, [digest(2)], 0.0)
    again = made_again(pool)
    assert list(again.regions()) == list(pool.regions())
    assert [again.held(session) for session in (OWNER, OTHER)] == [(3 * GRANULE, 1, 0), (0, 0, 1)]
    assert again.generation == lease.generation
    assert again.evict_block() == (digest(1), blocks[1])  # in the order of their last use
    assert again.evict_block() == (digest(3), blocks[3])
    assert again.evict_block() is None
    assert again.give_back(OWNER, [lease]) == [at(0, 3)]


@pytest.mark.parametrize(
    ("lease", "block"),
    [
        ((OTHER, 6, at(1)), None),
        ((OTHER, 6, at(2)), None),
        (None, (digest(1), at(0, 2))),
        (None, (digest(1), at(3, 2))),
    ],
)
def test_what_is_taken_cannot_be_taken_over_again(
    lease: tuple[int, int, Extent] | None, block: tuple[bytes, Extent] | None
) -> None:
    """Granules 1 and 2 of 4, and then something that overlaps them, or does not fit."""
    leases = [(OWNER, 5, at(1, 2)), *([lease] if lease else [])]
    with pytest.raises(ForeignExtent):
        pool_of(4).restore(leases, [block] if block else [], [], 0.0)


def test_a_pin_of_no_block_is_no_part_of_a_pool() -> None:
    with pytest.raises(KeyError):
        pool_of(4).restore([(OWNER, 5, at(1, 2))], [], [(OWNER, digest(9), 1)], 0.0)


def test_the_next_lease_is_younger_than_all_that_were_taken_over() -> None:
    pool = pool_of(4)
    pool.restore([(OWNER, 5, at(1, 2)), (OTHER, 3, at(0))], [], [], 0.0)
    pool.check()
    assert (pool.leased_bytes, pool.generation) == (3 * GRANULE, 5)
    assert leased(pool)[0].generation == 6


# --- at random, against a plain model

SESSIONS = st.integers(1, 3)
DIGESTS = st.integers(0, 6)
NUM_GRANULES = 24


@dataclass
class Cached:
    """What the model believes about one block."""

    extent: Extent
    pins: Counter[int] = field(default_factory=Counter)
    used: int = 0


class PoolMachine(RuleBasedStateMachine):
    """Sessions lease, return, put, look up and end in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = pool_of(NUM_GRANULES)
        self.leases: dict[LeaseId, tuple[int, int]] = {}  # whose, bytes
        self.gone: list[LeaseId] = []
        self.blocks: dict[int, Cached] = {}
        self.now = 0

    def tick(self) -> float:
        self.now += 1
        return float(self.now)

    @rule(session=SESSIONS, size=st.integers(1, 6 * GRANULE), count=st.integers(1, 3))
    def lease(self, session: int, size: int, count: int) -> None:
        extents = self.pool.lease(session, size, count)
        rounded = -(-size // GRANULE) * GRANULE
        if extents is None:
            free = [r.num_bytes // rounded for r in self.pool.regions() if r.kind == "free"]
            assert sum(free) < count  # free neighbours are one region
            return
        assert [extent.num_bytes for extent in extents] == [rounded] * count
        for extent in extents:
            self.leases[LeaseId(extent.offset, self.pool.generation)] = (session, rounded)

    @rule(session=SESSIONS, picks=st.lists(st.integers(0, 50), max_size=3), own=st.booleans())
    def give_back(self, session: int, picks: list[int], own: bool) -> None:
        """The session's own, or among them what was returned before and what is another's."""
        everything = [*self.leases, *self.gone[-3:]]
        mine = [lease for lease, (owner, _) in self.leases.items() if owner == session]
        among = mine if own else everything
        chosen = [among[pick % len(among)] for pick in picks] if among else []
        good = len(set(chosen)) == len(chosen) and all(
            lease in self.leases and self.leases[lease][0] == session for lease in chosen
        )
        if not good:
            with pytest.raises((DoubleFree, ForeignExtent, StaleGeneration)):
                self.pool.give_back(session, chosen)
            return
        freed = self.pool.give_back(session, chosen)
        assert freed == [
            Extent(offset=lease.offset, num_bytes=self.leases.pop(lease)[1]) for lease in chosen
        ]
        self.gone += chosen

    @rule(session=SESSIONS, numbers=st.lists(DIGESTS, max_size=3))
    def put(self, session: int, numbers: list[int]) -> None:
        mine = [lease for lease, (owner, _) in self.leases.items() if owner == session]
        pairs = list(zip(numbers, mine, strict=False))
        now = self.tick()
        stored = self.pool.put(
            session, [BlockToPut(digest(n), i.offset, i.generation) for n, i in pairs], now
        )
        expected = []
        for number, lease in pairs:
            expected.append(number not in self.blocks)
            if expected[-1]:
                extent = Extent(offset=lease.offset, num_bytes=self.leases.pop(lease)[1])
                self.blocks[number] = Cached(extent, Counter([session]), self.now)
                self.gone.append(lease)
        assert stored == expected

    @rule(session=SESSIONS, numbers=st.lists(DIGESTS, max_size=4))
    def look_up(self, session: int, numbers: list[int]) -> None:
        found = self.pool.look_up(session, [digest(n) for n in numbers], self.tick())
        expected = []
        for number in numbers:
            if number not in self.blocks:
                break
            block = self.blocks[number]
            expected.append(block.extent)
            block.pins[session] += 1
            block.used = self.now
        assert found == expected

    @rule(session=SESSIONS, numbers=st.lists(DIGESTS, min_size=1, max_size=3))
    def unpin(self, session: int, numbers: list[int]) -> None:
        digests = [digest(n) for n in numbers]
        now = self.tick()
        if any(
            number not in self.blocks or self.blocks[number].pins[session] < times
            for number, times in Counter(numbers).items()
        ):
            with pytest.raises(ForeignExtent):
                self.pool.unpin(session, digests, now)
            return
        self.pool.unpin(session, digests, now)
        for number in numbers:
            self.blocks[number].pins[session] -= 1
            self.blocks[number].used = self.now

    @rule()
    def evict(self) -> None:
        unpinned = {n: block for n, block in self.blocks.items() if not block.pins.total()}
        evicted = self.pool.evict_block()
        if not unpinned:
            assert evicted is None
            return
        assert evicted is not None
        number = int.from_bytes(evicted[0], "big")
        assert unpinned[number].used == min(block.used for block in unpinned.values())
        assert evicted[1] == self.blocks.pop(number).extent

    @rule(session=SESSIONS)
    def end_session(self, session: int) -> None:
        freed = self.pool.end_session(session, self.tick())
        mine = [lease for lease, (owner, _) in self.leases.items() if owner == session]
        assert sorted(extent.offset for extent in freed) == sorted(lease.offset for lease in mine)
        for lease in mine:
            del self.leases[lease]
        for block in self.blocks.values():
            if block.pins.pop(session, 0):
                block.used = self.now

    @rule()
    def go_on_in_another(self) -> None:
        """As a daemon does with what an earlier one wrote down."""
        again = made_again(self.pool)
        assert list(again.regions()) == list(self.pool.regions())
        assert dict(again.blocks()) == dict(self.pool.blocks())
        pinned = sorted(pin for pin in self.pool.pins() if pin[2])
        assert sorted(again.pins()) == pinned
        ours = sorted((s, g, e.offset, e.num_bytes) for s, g, e in self.pool.leases())
        assert sorted((s, g, e.offset, e.num_bytes) for s, g, e in again.leases()) == ours

    @invariant()
    def as_the_model_says(self) -> None:
        self.pool.check()
        taken = {lease.offset: size for lease, (_, size) in self.leases.items()}
        taken |= {b.extent.offset: b.extent.num_bytes for b in self.blocks.values()}
        ends = [(offset, offset + size) for offset, size in sorted(taken.items())]
        assert len(taken) == len(self.leases) + len(self.blocks)
        assert all(end <= begin for (_, end), (begin, _) in pairwise(ends))
        pool = self.pool
        assert pool.leased_bytes == sum(size for _, size in self.leases.values())
        assert pool.cached_bytes == sum(b.extent.num_bytes for b in self.blocks.values())
        assert pool.evictable_bytes == sum(
            b.extent.num_bytes for b in self.blocks.values() if not b.pins.total()
        )
        assert pool.leased_bytes + pool.cached_bytes + pool.free_bytes == pool.total_bytes
        for session in range(1, 4):
            mine = [size for owner, size in self.leases.values() if owner == session]
            pins = sum(block.pins[session] for block in self.blocks.values())
            assert pool.held(session) == (sum(mine), len(mine), pins)


PoolMachine.TestCase.settings = settings(
    max_examples=160, stateful_step_count=80, deadline=None, derandomize=True
)
test_at_random = PoolMachine.TestCase
