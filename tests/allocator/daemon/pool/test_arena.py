"""The arena against a plain model: no overlap, conservation, and every wrong free by name."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from allocator.daemon.pool.arena import Arena
from allocator.errors import DoubleFree, ForeignExtent, InvalidMessage

ALIGNMENT = 256


def test_a_new_arena_is_one_free_extent() -> None:
    arena = Arena(10 * ALIGNMENT + 5, ALIGNMENT)
    assert list(arena.extents()) == [(0, 10 * ALIGNMENT, True)]
    statistics = arena.statistics()
    assert statistics.free_bytes == statistics.largest_free_bytes == statistics.total_bytes
    assert statistics.fragmentation == 0
    assert arena.used_bytes == 0


@pytest.mark.parametrize("alignment", [0, -1, 3, 257])
def test_an_alignment_that_is_no_power_of_two_is_refused(alignment: int) -> None:
    with pytest.raises(ValueError, match="power of two"):
        Arena(1 << 20, alignment)


@pytest.mark.parametrize("num_bytes", [0, -1])
def test_a_size_that_is_not_positive_is_refused(num_bytes: int) -> None:
    with pytest.raises(InvalidMessage):
        Arena(1 << 20, ALIGNMENT).allocate(num_bytes)


def test_sizes_are_rounded_up_to_the_alignment() -> None:
    arena = Arena(4 * ALIGNMENT, ALIGNMENT)
    assert [arena.allocate(1), arena.allocate(ALIGNMENT + 1)] == [0, ALIGNMENT]
    assert arena.size_of(ALIGNMENT) == 2 * ALIGNMENT
    assert arena.allocate(2 * ALIGNMENT) is None
    assert arena.allocate(ALIGNMENT) == 3 * ALIGNMENT
    assert arena.statistics().free_bytes == 0


def test_all_of_it_can_be_leased_at_once_and_one_byte_more_can_not() -> None:
    arena = Arena(1000 * ALIGNMENT, ALIGNMENT)
    assert arena.allocate(1000 * ALIGNMENT + 1) is None
    assert arena.allocate(1 << 60) is None
    assert arena.allocate(1000 * ALIGNMENT) == 0


def test_free_neighbours_become_one_in_any_order() -> None:
    for order in ([0, 1, 2], [0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0]):
        arena = Arena(3 * ALIGNMENT, ALIGNMENT)
        offsets = [arena.allocate(ALIGNMENT) for _ in range(3)]
        for i in order:
            arena.free(offsets[i])
            arena.check()
        assert list(arena.extents()) == [(0, 3 * ALIGNMENT, True)]


def test_wrong_frees_are_refused_by_name_and_change_nothing() -> None:
    arena = Arena(100 * ALIGNMENT, ALIGNMENT)
    first, second = arena.allocate(10 * ALIGNMENT), arena.allocate(ALIGNMENT)
    arena.free(first)
    before = list(arena.extents())
    with pytest.raises(DoubleFree):
        arena.free(first)
    for offset in (second + 1, 1000 * ALIGNMENT, -1):
        with pytest.raises((ForeignExtent, DoubleFree)):
            arena.free(offset)
    assert list(arena.extents()) == before
    arena.check()


def test_memory_that_is_there_is_found_in_the_fullest_bin() -> None:
    """Sizes that share a bin: the one that fits is not at its head."""
    arena = Arena(400 * ALIGNMENT, ALIGNMENT)
    offsets = [arena.allocate(size * ALIGNMENT) for size in (67, 1, 64, 1)]
    rest = arena.allocate((400 - 133) * ALIGNMENT)
    arena.free(offsets[0])
    arena.free(offsets[2])
    assert arena.allocate(67 * ALIGNMENT) == offsets[0]
    arena.free(rest)
    arena.check()


# --- exactly there


@pytest.mark.parametrize(
    ("start", "size", "rest"),
    [
        (0, 10, []),
        (0, 3, [(3, 7)]),
        (7, 3, [(0, 7)]),
        (4, 2, [(0, 4), (6, 4)]),
    ],
)
def test_an_extent_can_be_leased_where_an_earlier_arena_had_it(
    start: int, size: int, rest: list[tuple[int, int]]
) -> None:
    arena = Arena(10 * ALIGNMENT, ALIGNMENT)
    arena.restore([(start * ALIGNMENT, size * ALIGNMENT)])
    arena.check()
    free = [(offset, length) for offset, length, is_free in arena.extents() if is_free]
    assert free == [(offset * ALIGNMENT, length * ALIGNMENT) for offset, length in rest]
    assert arena.size_of(start * ALIGNMENT) == size * ALIGNMENT
    arena.free(start * ALIGNMENT)
    assert list(arena.extents()) == [(0, 10 * ALIGNMENT, True)]


def test_an_arena_that_is_made_again_gives_out_only_the_rest() -> None:
    first = Arena(64 * ALIGNMENT, ALIGNMENT)
    offsets = [first.allocate(size * ALIGNMENT) for size in (5, 9, 1, 17, 2, 30)]
    for offset in offsets[::2]:
        first.free(offset)
    again = Arena(64 * ALIGNMENT, ALIGNMENT)
    leased = [(offset, length) for offset, length, free in first.extents() if not free]
    again.restore(reversed(leased))
    again.check()
    assert list(again.extents()) == list(first.extents())
    assert again.statistics() == first.statistics()


@pytest.mark.parametrize(
    ("offset", "num_bytes"),
    [
        (0, ALIGNMENT),  # leased
        (2 * ALIGNMENT, 3 * ALIGNMENT),  # begins in what is leased
        (5 * ALIGNMENT, 6 * ALIGNMENT),  # ends in what is leased
        (0, 20 * ALIGNMENT),  # all of it
        (3 * ALIGNMENT, ALIGNMENT),  # the end of what is leased
        (4 * ALIGNMENT + 1, ALIGNMENT),  # between two granules
        (4 * ALIGNMENT, ALIGNMENT - 1),
        (4 * ALIGNMENT, 0),
        (4 * ALIGNMENT, -ALIGNMENT),
        (-ALIGNMENT, ALIGNMENT),
        (19 * ALIGNMENT, 2 * ALIGNMENT),  # beyond the end
        (20 * ALIGNMENT, ALIGNMENT),
        (1 << 70, ALIGNMENT),
    ],
)
def test_what_is_not_all_free_is_refused(offset: int, num_bytes: int) -> None:
    arena = Arena(20 * ALIGNMENT, ALIGNMENT)
    leased = [(0, 4 * ALIGNMENT), (10 * ALIGNMENT, 2 * ALIGNMENT)]
    with pytest.raises(ForeignExtent, match="can't be leased"):
        arena.restore([*leased, (offset, num_bytes)])


class ArenaMachine(RuleBasedStateMachine):
    """Random leases and returns, beside a dict of what is leased."""

    leased = Bundle("leased")

    def __init__(self) -> None:
        super().__init__()
        self.total = 5000
        self.arena = Arena(self.total * ALIGNMENT, ALIGNMENT)
        self.model: dict[int, int] = {}
        self.returned: set[int] = set()

    @rule(target=leased, num_bytes=st.integers(1, 1200 * ALIGNMENT))
    def allocate(self, num_bytes: int) -> int | None:
        offset = self.arena.allocate(num_bytes)
        granules = -(-num_bytes // ALIGNMENT)
        if offset is None:
            assert all(
                size < granules * ALIGNMENT for _, size, free in self.arena.extents() if free
            )
            return None
        assert offset % ALIGNMENT == 0
        end = offset + granules * ALIGNMENT
        assert end <= self.total * ALIGNMENT
        assert all(end <= other or other + size <= offset for other, size in self.model.items()), (
            "overlap"
        )
        self.model[offset] = granules * ALIGNMENT
        self.returned.discard(offset)
        return offset

    @rule(start=st.integers(-1, 5005), size=st.integers(0, 300))
    def another_arena_goes_on(self, start: int, size: int) -> None:
        """With what this one has leased; and with something more, if that is free."""
        offset, end = start * ALIGNMENT, (start + size) * ALIGNMENT
        taken = any(offset < other + length and other < end for other, length in self.model.items())
        more = Arena(self.total * ALIGNMENT, ALIGNMENT)
        wanted = [*self.model.items(), (offset, size * ALIGNMENT)]
        if taken or start < 0 or size < 1 or start + size > self.total:
            with pytest.raises(ForeignExtent):
                more.restore(wanted)
        else:
            more.restore(wanted)
            more.check()
            more.free(offset)
            assert list(more.extents()) == list(self.arena.extents())
        self.arena = Arena(self.total * ALIGNMENT, ALIGNMENT)
        self.arena.restore(self.model.items())

    @rule(offset=consumes(leased))
    def give_back(self, offset: int | None) -> None:
        if offset is None:
            return
        self.arena.free(offset)
        del self.model[offset]
        self.returned.add(offset)

    @rule(offset=st.integers(-5, 5005))
    def free_what_is_not_leased(self, offset: int) -> None:
        if offset * ALIGNMENT in self.model:
            return
        with pytest.raises((DoubleFree, ForeignExtent)):
            self.arena.free(offset * ALIGNMENT)

    @invariant()
    def conserved(self) -> None:
        self.arena.check()
        leased = {offset: size for offset, size, free in self.arena.extents() if not free}
        assert leased == self.model
        statistics = self.arena.statistics()
        assert statistics.used_bytes == sum(self.model.values())
        assert statistics.used_bytes + statistics.free_bytes == statistics.total_bytes
        free = [size for _, size, is_free in self.arena.extents() if is_free]
        assert statistics.largest_free_bytes == max(free, default=0)


ArenaMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=60, deadline=None)
TestArenaMachine = pytest.mark.slow(ArenaMachine.TestCase)
