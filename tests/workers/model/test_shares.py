"""Cuts of heads and widths among ranks: all of it, once, and even where it can be."""

import itertools

import pytest

from workers.errors import InvalidSetting
from workers.model.shares import Share, head_shares, shares, width_shares

HEADS = [
    (num_kv_heads * group, num_kv_heads)
    for num_kv_heads in (1, 2, 3, 4, 5, 8, 12)
    for group in (1, 2, 3, 4, 7, 8)
]
NUM_RANKS = range(1, 9)


def assert_whole(found: list[Share], length: int) -> None:
    assert found[0].begin == 0
    assert found[-1].end == length
    assert all(one.size > 0 for one in found)
    assert all(one.end == other.begin for one, other in itertools.pairwise(found))


@pytest.mark.parametrize(("num_heads", "num_kv_heads"), HEADS)
@pytest.mark.parametrize("num_ranks", NUM_RANKS)
def test_every_head_has_a_rank_that_has_its_keys(
    num_heads: int, num_kv_heads: int, num_ranks: int
) -> None:
    if num_ranks > num_heads:
        with pytest.raises(InvalidSetting, match=f"at most {num_heads} is possible"):
            head_shares(num_heads, num_kv_heads, num_ranks)
        return
    found = head_shares(num_heads, num_kv_heads, num_ranks)
    assert len(found) == num_ranks
    assert_whole([one.queries for one in found], num_heads)
    group = num_heads // num_kv_heads
    for queries, kept in found:
        own_group, rest = divmod(queries.size, kept.size)
        assert rest == 0
        for head in range(queries.begin, queries.end):
            # As a rank's attention counts: the head's place, in groups, among its own.
            assert kept.begin + (head - queries.begin) // own_group == head // group
    sizes = [one.keys_values.size for one in found]
    assert max(sizes) - min(sizes) <= 1
    if num_ranks <= num_kv_heads:
        assert sum(sizes) == num_kv_heads  # none is kept twice
    else:
        assert max(sizes) == 1
        assert {one.keys_values.begin for one in found} == set(range(num_kv_heads))


@pytest.mark.parametrize("num_ranks", NUM_RANKS)
@pytest.mark.parametrize("width", [8, 9, 77, 96, 100, 257, 1536, 1537, 4096, 11008, 14336])
def test_a_width_is_cut_evenly(width: int, num_ranks: int) -> None:
    found = width_shares(width, num_ranks)
    assert len(found) == num_ranks
    assert_whole(list(found), width)
    sizes = [one.size for one in found]
    if width >= 4 * num_ranks:
        assert max(sizes) <= 1.5 * min(sizes) + 1
    if width >= 64 * 4 * num_ranks:
        assert all(one.begin % 64 == 0 for one in found)


@pytest.mark.parametrize("num_ranks", NUM_RANKS)
@pytest.mark.parametrize("group", [1, 32, 128])
def test_groups_are_not_cut(group: int, num_ranks: int) -> None:
    for num_groups in range(1, 12):
        length = num_groups * group
        if num_ranks > num_groups:
            with pytest.raises(InvalidSetting, match=f"may be {num_groups} at most"):
                shares(length, num_ranks, group)
            continue
        found = shares(length, num_ranks, group)
        assert_whole(list(found), length)
        assert all(one.begin % group == 0 for one in found)
        sizes = [one.size for one in found]
        assert max(sizes) - min(sizes) <= group


def test_examples() -> None:
    assert head_shares(9, 3, 2) == ((Share(0, 3), Share(0, 1)), (Share(3, 9), Share(1, 3)))
    assert head_shares(9, 3, 4) == (
        (Share(0, 3), Share(0, 1)),
        (Share(3, 6), Share(1, 2)),
        (Share(6, 7), Share(2, 3)),
        (Share(7, 9), Share(2, 3)),
    )
    assert width_shares(1536, 4)[1] == Share(384, 768)
    assert Share(2, 5).of(16) == Share(32, 80)
