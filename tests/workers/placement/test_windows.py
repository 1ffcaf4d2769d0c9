"""Which linears of a series are in which windows."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workers.placement.windows import Broadcast, Windows


def in_order(windows: Windows, start: int, num_linears: int, num_passes: int) -> list[Broadcast]:
    """All that is begun; fails where what is used is not there, or is overwritten."""
    begun: list[Broadcast] = []
    contents: dict[int, int] = {}
    for index in [start + i for _ in range(num_passes) for i in range(num_linears)]:
        assert windows.follows(index)
        for broadcast in windows.use(index):
            begun.append(broadcast)
            if broadcast.window is not None:
                contents[broadcast.window] = broadcast.index
        window = windows.window(index)
        assert window is None or contents[window] == index
    return begun


@given(
    start=st.integers(0, 70),
    num_linears=st.integers(1, 20),
    ahead=st.integers(0, 22),
    num_ranks=st.integers(1, 5),
    rank=st.integers(0, 4),
)
def test_ranks_begin_the_same_and_have_windows_enough(
    start: int, num_linears: int, ahead: int, num_ranks: int, rank: int
) -> None:
    own = [i for i in range(start, start + num_linears) if i % num_ranks == rank % num_ranks]
    windows = Windows(start, num_linears, ahead, own)
    begun = [one.index for one in in_order(windows, start, num_linears, 3)]
    if ahead >= num_linears - 1:  # all stay
        assert begun == [start + i for i in range(num_linears)]
    else:
        assert begun == [start + i % num_linears for i in range(3 * num_linears + ahead)]
    assert windows.num_windows <= min(ahead + 1, num_linears - len(own))


def test_a_use_begins_what_the_formula_says() -> None:
    windows = Windows(3, 58, 2, [])
    assert [one.index for one in windows.use(3)] == [3, 4, 5]
    for i in range(4, 61):
        [begun] = windows.use(i)
        assert begun.index == windows.next_index(i) == (i - 3 + 2) % 58 + 3


def test_what_is_in_use_is_used_again_where_it_is() -> None:
    windows = Windows(0, 5, 1, [])
    windows.use(0)
    assert windows.use(0) == ()
    [begun] = windows.use(1)
    assert begun == Broadcast(2, 0)
    assert windows.window(1) == 1


def test_another_order_is_seen() -> None:
    windows = Windows(2, 5, 1, [])
    assert not windows.follows(3)
    windows.use(2)
    assert [i for i in range(9) if windows.follows(i)] == [2, 3]
    with pytest.raises(ValueError, match="linear 5 does not follow"):
        windows.use(5)
    windows.forget()
    assert windows.follows(2)
    assert [one.index for one in windows.use(2)] == [2, 3]


def test_where_all_stay_any_order_will_do() -> None:
    windows = Windows(2, 3, 2, [3])
    assert [one.index for one in windows.use(2)] == [2, 3, 4]
    assert windows.use(4) == windows.use(3) == windows.use(2) == ()
    assert not windows.follows(5)
    assert not windows.follows(1)


@pytest.mark.parametrize(("start", "num_linears", "ahead"), [(0, 0, 1), (-1, 3, 1), (0, 3, -1)])
def test_there_is_something_to_hold(start: int, num_linears: int, ahead: int) -> None:
    with pytest.raises(ValueError, match="ahead"):
        Windows(start, num_linears, ahead, [])
