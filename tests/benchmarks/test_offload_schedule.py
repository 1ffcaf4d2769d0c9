"""The critical path of layers that are read ahead, and that the ring's own order reaches it."""

import itertools
import sys
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.daemon_process import ROOT
from workers.placement.ring import Ring

sys.path.append(str(ROOT / "benchmarks"))

from offloading.schedule import critical_path, overlap, steady_s

PASSES = 3


def played(ring: Ring, reads: Sequence[float], computes: Sequence[float]) -> float:
    """How long PASSES passes take behind a first one, on a clock of our own: one disk, that reads
    what the ring asks for, in this order, and one processor, that waits for what it uses."""
    now = disk = first = 0.0
    there: dict[int, float] = {}
    for number in range(PASSES + 1):
        for item, compute_s in enumerate(computes):
            _, fills = ring.use(item)
            for fill in fills:
                disk = max(disk, now) + reads[fill.item]
                there[fill.item] = disk
            now = max(now, there[item]) + compute_s
        if not number:
            first = now
    return now - first


@pytest.mark.parametrize("ratio", [0.25, 0.5, 1.0, 2.0, 4.0])
@pytest.mark.parametrize("num_layers", range(2, 13))
def test_the_ring_hides_all_that_can_be_hidden(num_layers: int, ratio: float) -> None:
    reads, computes = [1.0] * num_layers, [ratio] * num_layers
    sync_s = played(Ring(num_layers, 0), reads, computes)
    assert sync_s == pytest.approx(PASSES * num_layers * (1 + ratio))
    for depth in range(1, num_layers + 1):
        async_s = played(Ring(num_layers, depth), reads, computes)
        best_s = steady_s(reads, computes, depth, PASSES)
        assert overlap(sync_s, async_s, best_s) == pytest.approx(1)
        if num_layers > depth + 1:
            assert best_s == pytest.approx(PASSES * num_layers * max(1, ratio))


TIMES = st.lists(st.tuples(st.floats(0.01, 9), st.floats(0.01, 9)), min_size=2, max_size=12)


@given(TIMES, st.integers(1, 12))
def test_also_where_no_two_layers_take_as_long(
    times: list[tuple[float, float]], depth: int
) -> None:
    reads, computes = [one[0] for one in times], [one[1] for one in times]
    async_s = played(Ring(len(times), depth), reads, computes)
    best_s = steady_s(reads, computes, depth, PASSES)
    assert async_s == pytest.approx(best_s)
    sync_s = played(Ring(len(times), 0), reads, computes)
    assert overlap(sync_s, async_s, best_s) == pytest.approx(1)


class Late(Ring):
    """Asks for a layer one use later than it could."""

    def __init__(self, num_items: int, depth: int) -> None:
        super().__init__(num_items, depth - 1)


def test_a_ring_that_asks_late_hides_less() -> None:
    reads, computes = [1.0, 3.0, 1.0, 2.0, 1.0], [2.0, 1.0, 3.0, 1.0, 1.0]
    sync_s = played(Ring(5, 0), reads, computes)
    for depth in (1, 2):
        late_s = played(Late(5, depth), reads, computes)
        assert overlap(sync_s, late_s, steady_s(reads, computes, depth, PASSES)) < 0.99


@given(TIMES, st.integers(1, 5))
def test_a_path_keeps_to_one_disk_one_processor_and_the_slots(
    times: list[tuple[float, float]], depth: int
) -> None:
    steps = critical_path([one[0] for one in times], [one[1] for one in times], depth)
    for before, after in itertools.pairwise(steps):
        assert after.read.begin_s >= before.read.end_s
        assert after.compute.begin_s >= before.compute.end_s
    for number, step in enumerate(steps):
        assert step.compute.begin_s >= step.read.end_s
        at_once = [one for one in steps if one.read.begin_s < step.compute.end_s]
        in_slots = [one for one in at_once if one.compute.end_s > step.compute.begin_s]
        assert len(in_slots) <= depth + 1, number
        if number > depth:
            assert step.read.begin_s >= steps[number - depth - 1].compute.end_s
