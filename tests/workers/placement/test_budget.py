"""Which layers stay on the device."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workers.errors import InvalidSetting
from workers.placement.budget import Sizes, offloaded_layers, spread

MIB = 1 << 20
TWELVE = Sizes(layers=(10 * MIB,) * 12, slots=(11 * MIB,) * 12, others=20 * MIB)


@pytest.mark.parametrize(
    ("budget_mib", "offloaded"),
    [
        (140, ()),  # 20 + 12 x 10
        (139, (3, 7, 11)),  # 20 + 9 x 10 + 2 x 11 = 132
        (132, (3, 7, 11)),
        (131, (2, 5, 8, 11)),
        (42, tuple(range(12))),
    ],
)
def test_as_many_layers_stay_as_fit(budget_mib: int, offloaded: tuple[int, ...]) -> None:
    assert offloaded_layers(TWELVE, "auto", 1, budget_mib * MIB) == offloaded


def test_without_a_budget_all_stay() -> None:
    assert offloaded_layers(TWELVE, "auto", 1, None) == ()
    assert offloaded_layers(TWELVE, "none", 1, None) == ()


def test_some_and_all() -> None:
    assert offloaded_layers(TWELVE, "2", 1, None) == (5, 11)
    assert offloaded_layers(TWELVE, "0", 1, None) == ()
    assert offloaded_layers(TWELVE, "all", 3, None) == tuple(range(12))


def test_a_layer_that_cannot_be_read_alone_stays() -> None:
    sizes = Sizes(layers=(1, 1, 1), slots=(1, 0, 1), others=0)
    assert offloaded_layers(sizes, "all", 1, None) == (0, 2)
    with pytest.raises(InvalidSetting, match="--offload is 3, but there are 2 layers"):
        offloaded_layers(sizes, "3", 1, None)


@pytest.mark.parametrize(
    ("offload", "depth", "budget_mib", "says"),
    [
        ("auto", 1, 41, "42 MiB is the least, with --offload all"),
        ("none", 1, 100, "leave it to --offload auto"),
        ("all", 5, 45, "a smaller --offload-depth would do"),
    ],
)
def test_what_does_not_fit_is_refused_with_what_to_do(
    offload: str, depth: int, budget_mib: int, says: str
) -> None:
    with pytest.raises(InvalidSetting, match=f"--device-memory is {budget_mib} MiB.*{says}"):
        offloaded_layers(TWELVE, offload, depth, budget_mib * MIB)


@given(st.integers(1, 100), st.data())
def test_distances_differ_by_one_at_most(total: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(0, total))
    chosen = spread(range(total), count)
    assert len(chosen) == count
    around = [*chosen, *(index + total for index in chosen[:1])]  # passes follow one on another
    distances = {after - before for before, after in pairwise(around)}
    assert not distances or max(distances) - min(distances) <= 1
