"""The order in which slots are filled."""

from itertools import islice

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workers.placement.ring import Fill, Ring


def test_in_order_every_item_but_the_first_is_on_its_way_before_it_is_used() -> None:
    for num_items in range(1, 13):
        for depth in range(num_items + 2):
            ring = Ring(num_items, depth)
            fills: list[int] = []
            for count, item in enumerate(item for _ in range(3) for item in range(num_items)):
                asked = set(fills[count:])  # before this use
                _, new = ring.use(item)
                fills += [fill.item for fill in new]
                if depth and count and ring.num_slots < num_items:
                    assert item in asked
            passes = 1 if ring.num_slots == num_items else 3
            wanted = [item for _ in range(passes + 1) for item in range(num_items)]
            assert fills == list(islice(wanted, len(fills)))
            ahead = 0 if passes == 1 else ring.num_slots - 1
            assert len(fills) == passes * num_items + ahead


def test_of_many_slots_none_is_filled_twice() -> None:
    ring = Ring(3, 5)
    assert ring.num_slots == 3
    assert ring.use(1) == (0, (Fill(1, 0), Fill(2, 1), Fill(0, 2)))
    assert ring.use(0) == (2, ())
    assert ring.use(0) == (2, ())
    assert ring.use(2) == (1, ())


def test_an_item_that_is_used_again_stays() -> None:
    ring = Ring(5, 1)
    slot, _ = ring.use(3)
    assert ring.use(3) == (slot, ())


def test_what_is_skipped_makes_room() -> None:
    ring = Ring(8, 3)
    ring.use(0)  # and 1, 2, 3 on their way
    slot, fills = ring.use(2)
    assert slot == 2
    assert fills == (Fill(4, 0), Fill(5, 1))


def test_what_comes_as_no_one_expected_is_filled_first() -> None:
    ring = Ring(8, 2)
    ring.use(0)
    slot, fills = ring.use(6)
    assert [fill.item for fill in fills] == [6, 7, 0]
    assert slot == fills[0].slot


def test_what_was_forgotten_is_filled_anew() -> None:
    ring = Ring(4, 1)
    ring.use(0)
    ring.forget()
    _, fills = ring.use(1)
    assert [fill.item for fill in fills] == [1, 2]


@pytest.mark.parametrize(("num_items", "depth"), [(0, 1), (3, -1)])
def test_there_is_something_to_hold(num_items: int, depth: int) -> None:
    with pytest.raises(ValueError, match="ahead"):
        Ring(num_items, depth)


def test_an_item_that_there_is_not_is_refused() -> None:
    with pytest.raises(ValueError, match="item 3 of 3"):
        Ring(3, 1).use(3)


@given(
    st.integers(1, 9),
    st.integers(0, 10),
    st.lists(st.one_of(st.none(), st.integers(0, 8)), max_size=40),
)
def test_slots_hold_what_they_were_last_filled_with(
    num_items: int, depth: int, uses: list[int | None]
) -> None:
    ring = Ring(num_items, depth)
    contents: dict[int, int] = {}
    in_use: int | None = None
    for use in uses:
        if use is None:
            ring.forget()
            contents.clear()
            in_use = None
            continue
        item = use % num_items
        before = in_use
        slot, fills = ring.use(item)
        for fill in fills:
            contents[fill.slot] = fill.item
        in_use = slot
        assert contents[slot] == item
        assert slot not in [fill.slot for fill in fills[1:]]
        if before is not None and not fills:
            assert contents[before] in [held.item for held in ring.held]
        assert {held.slot: held.item for held in ring.held} == contents
        assert len({held.item for held in ring.held}) == len(ring.held) <= depth + 1
