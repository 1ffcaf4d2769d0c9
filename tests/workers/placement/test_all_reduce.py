"""Sums over ranks: their bits, their order, and what becomes of ranks that others wait for."""

import hashlib
import os
import random
import signal
from collections.abc import Callable
from typing import Any

import pytest
import torch

from allocator import Client, ProcessState
from tests.leaks import wait_until
from tests.workers.placement.ranks import Ranks
from workers.errors import GroupInUse, RankTimedOut
from workers.placement.all_reduce import AllReduce, form, num_bytes

CAPACITY = 100  # no multiple of a line's 16 numbers
Lease = Callable[..., torch.Tensor]


@pytest.fixture
def lease(memory: Client) -> Lease:
    """Memory of a group, leased from a real allocator, and the group formed in it."""

    def leased(num_ranks: int, capacity: int = CAPACITY, first: int = 0) -> torch.Tensor:
        extent = memory.lease(num_bytes(num_ranks, capacity)).tensor()
        form(extent, num_ranks, capacity, first)
        return extent

    return leased


def part(rank: int, count: int) -> torch.Tensor:
    """Numbers of such different sizes that the order in which they are added can be told."""
    generator = torch.Generator().manual_seed(1000 * count + rank)
    values = torch.randn(count, generator=generator)
    return values * 10.0 ** torch.randint(-4, 5, (count,), generator=generator)


def added(count: int, ranks: list[int]) -> torch.Tensor:
    """In this order."""
    total = part(ranks[0], count)
    for rank in ranks[1:]:
        total = total + part(rank, count)
    return total


def digest(values: torch.Tensor) -> str:
    return hashlib.sha256(values.numpy().tobytes()).hexdigest()


SIZES = [1, 15, 16, 17, 99, 100, 101, 1000, 5001]


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4])
def test_all_ranks_get_the_bits_of_a_sum_in_the_order_of_the_ranks(
    num_ranks: int, lease: Lease
) -> None:
    memory = lease(num_ranks)

    def work(rank: int) -> list[str]:
        with AllReduce(memory, rank, num_ranks) as group:
            return [digest(group.sum(part(rank, count))) for count in SIZES]

    with Ranks(num_ranks, work) as ranks:
        results = ranks.results()
    order = list(range(num_ranks))
    assert results == [[digest(added(count, order)) for count in SIZES]] * num_ranks
    if num_ranks > 2:  # of two numbers no order can be told
        assert digest(added(5001, order[::-1])) != digest(added(5001, order))


def test_thousands_of_rounds_with_ranks_that_dawdle(lease: Lease) -> None:
    """The rounds' number wraps around on the way."""
    num_ranks, num_rounds = 3, 4000
    memory = lease(num_ranks, first=2**32 - num_rounds // 2)

    def work(rank: int) -> int:
        dawdles = random.Random(rank)
        places = torch.arange(2 * CAPACITY, dtype=torch.float32)
        with AllReduce(memory, rank, num_ranks) as group:
            for index in range(num_rounds):
                count = 1 + (37 * index) % (2 * CAPACITY)
                got = group.sum(places[:count] + float(index * (rank + 1)))
                if not torch.equal(got, 3 * places[:count] + 6.0 * index):
                    return index
                if dawdles.random() < 0.1:
                    os.sched_yield()
                elif dawdles.random() < 0.1:
                    sum(range(dawdles.randrange(20_000)))
        return num_rounds

    with Ranks(num_ranks, work) as ranks:
        assert ranks.results() == [num_rounds] * num_ranks


def test_other_dtypes_and_layouts_are_summed_in_fp32(lease: Lease) -> None:
    memory = lease(2)

    def work(rank: int) -> str:
        rows = part(rank, 60).to(torch.bfloat16).view(6, 10).t()
        with AllReduce(memory, rank, 2) as group:
            got = group.sum(rows)
        expected = (
            part(0, 60).to(torch.bfloat16).float() + part(1, 60).to(torch.bfloat16).float()
        ).to(torch.bfloat16)
        assert torch.equal(got, expected.view(6, 10).t())
        return str(got.dtype)

    with Ranks(2, work) as ranks:
        assert ranks.results() == ["torch.bfloat16"] * 2


def _sums(memory: torch.Tensor, num_ranks: int, timeout_s: float) -> Callable[[int], Any]:
    """Sums until an error comes; rank 1 does something to itself after five."""

    def work(rank: int, then: Callable[[AllReduce], None]) -> None:
        with AllReduce(memory, rank, num_ranks, timeout_s) as group:
            for index in range(1_000_000):
                if rank == 1 and index == 5:
                    then(group)
                group.sum(torch.ones(3))

    return lambda then: lambda rank: work(rank, then)


def _blame(results: list[Any], rank: int) -> set[str]:
    """The errors, all of which must name that rank."""
    assert all(result is not None and result[1] == rank for result in results), results
    return {result[0] for result in results}


def test_a_rank_that_is_killed_is_told_at_once(lease: Lease) -> None:
    work = _sums(lease(3), 3, timeout_s=3000.0)
    with Ranks(3, work(lambda _: os.kill(os.getpid(), signal.SIGKILL))) as ranks:
        first, killed, last = ranks.results()
    assert killed is None
    errors = _blame([first, last], 1)
    assert "RankEnded" in errors
    assert errors <= {"RankEnded", "GroupBroken"}


def test_a_rank_that_is_stopped_is_waited_for_until_the_deadline(lease: Lease) -> None:
    memory = lease(3)
    work = _sums(memory, 3, timeout_s=2.0)
    with Ranks(3, work(lambda _: os.kill(os.getpid(), signal.SIGSTOP))) as ranks:
        results = [ranks.result(0), ranks.result(2)]
        errors = _blame(results, 1)
        assert "RankTimedOut" in errors
        assert errors <= {"RankTimedOut", "GroupBroken"}
        assert any("stopped" in result[2] for result in results)
        # It may go on where it was, and write: nobody else may have that memory.
        with pytest.raises(GroupInUse, match=f"process {ranks.pids[1]} "):
            form(memory, 3, CAPACITY)
        os.kill(ranks.pids[1], signal.SIGCONT)
        assert ranks.result(1)[:2] == ["GroupBroken", 1]
    form(memory, 2, CAPACITY)
    with Ranks(2, lambda rank: _one_sum(memory, rank)) as ranks:
        assert ranks.results() == [3.0, 3.0]


def _one_sum(memory: torch.Tensor, rank: int) -> float:
    with AllReduce(memory, rank, 2) as group:
        return float(group.sum(torch.tensor([rank + 1.0])))


def test_memory_is_used_again_after_a_rank_was_killed(lease: Lease) -> None:
    memory = lease(2)
    for _ in range(2):
        form(memory, 2, CAPACITY)
        work = _sums(memory, 2, timeout_s=3000.0)
        with Ranks(2, work(lambda _: os.kill(os.getpid(), signal.SIGKILL))) as ranks:
            assert ranks.result(0)[:2] == ["RankEnded", 1]
        form(memory, 2, CAPACITY)
        with Ranks(2, lambda rank: _one_sum(memory, rank)) as ranks:
            assert ranks.results() == [3.0, 3.0]


def test_a_rank_that_leaves_is_not_waited_for(lease: Lease) -> None:
    def leave(group: AllReduce) -> None:
        group.close()
        os._exit(0)

    with Ranks(2, _sums(lease(2), 2, timeout_s=3000.0)(leave)) as ranks:
        assert ranks.result(0)[:2] == ["RankLeft", 1]


def test_a_rank_that_never_comes_is_waited_for_until_the_deadline(lease: Lease) -> None:
    memory = lease(3)
    with pytest.raises(RankTimedOut, match="rank 0 of 3, which has not come,") as raised:
        AllReduce(memory, 2, 3, timeout_s=0.05)
    assert raised.value.rank == 0


def test_what_is_no_group_or_no_place_in_it_is_refused(lease: Lease) -> None:
    memory = lease(1)
    for rank, num_ranks in ((1, 1), (-1, 1), (0, 2), (1, 2)):
        with pytest.raises(ValueError, match=f"no group of {num_ranks} with a rank {rank}"):
            AllReduce(memory, rank, num_ranks)
    with pytest.raises(ValueError, match="no group"):
        AllReduce(torch.zeros(4096, dtype=torch.uint8), 0, 1)
    with pytest.raises(ValueError, match="no group"):
        AllReduce(memory[:64], 0, 1)
    with pytest.raises(ValueError, match="are needed"):
        form(memory[:64], 1, CAPACITY)
    with pytest.raises(ValueError, match="multiple of 64"):
        form(memory[1:], 1, 1)
    for wrong in (0, 65):
        with pytest.raises(ValueError, match="1 to 64 can be in a group"):
            num_bytes(wrong, 1)
    with pytest.raises(ValueError, match="sums of 0"):
        num_bytes(1, 0)
    with AllReduce(memory, 0, 1) as group:
        with pytest.raises(GroupInUse, match="a rank 0 already"):
            AllReduce(memory, 0, 1)
        with Ranks(1, lambda _: _refused(group)) as ranks:
            assert "must join by itself" in ranks.result(0)
        assert torch.equal(group.sum(torch.ones(3)), torch.ones(3))
    with pytest.raises(ValueError, match="left its group"):
        group.sum(torch.ones(1))


def _refused(group: AllReduce) -> str:
    try:
        group.sum(torch.ones(1))
    except ValueError as error:
        return str(error)
    return "nothing was refused"


def test_ranks_of_a_group_hold_descriptors_until_they_leave(lease: Lease) -> None:
    """Those are what tells of ends; the leak check counts them."""
    memory = lease(2)
    with Ranks(1, lambda _: _one_sum(memory, 1)) as ranks:
        with AllReduce(memory, 0, 2) as group:
            assert float(group.sum(torch.tensor([1.0]))) == 3.0
            wait_until(lambda: _has_ended(ranks.pids[0]), "the other rank has ended")
        assert ranks.result(0) == 3.0


def _has_ended(pid: int) -> bool:
    state = ProcessState.of(pid)
    return state is None or state.has_ended
