"""Series that are sharded among ranks: the same bits as in one place, and no rank ever hangs."""

import signal
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from tests.daemon_process import DaemonProcess
from tests.workers.placement.sharding_ranks import DEADLINE_S, RankProcesses, bytes_of

SHORT_S = 3.0
"""Of a pass that some rank does not make."""
pytestmark = pytest.mark.slow
CASES = [
    [num_linears, start, ahead]
    for num_linears in (1, 2, 3, 7, 61)
    for start in (0, 3, 58)
    for ahead in sorted({0, 1, num_linears - 1})
]
Places = Callable[..., list[dict[str, Any]]]


@pytest.fixture(scope="module")
def ranks() -> Iterator[RankProcesses]:
    """Four processes, which come to an end by themselves when nobody asks any more."""
    with RankProcesses(4) as processes:
        yield processes


@pytest.fixture
def places(tmp_path: Path) -> Places:
    """Where so many ranks meet."""

    def made(
        num_ranks: int, join_timeout_s: float = DEADLINE_S, daemon: DaemonProcess | None = None
    ) -> list[dict[str, Any]]:
        common = {
            "kind": "gloo" if daemon is None else "shm",
            "store": str(tmp_path / "store"),
            "num_ranks": num_ranks,
            "join_timeout_s": join_timeout_s,
            "runtime_dir": "" if daemon is None else str(daemon.runtime_dir.path),
        }
        return [{**common, "rank": rank} for rank in range(num_ranks)]

    return made


@pytest.fixture(autouse=True)
def nothing_left(ranks: RankProcesses) -> Iterator[None]:
    """Each rank has unloaded its series at the end, and has no more of anything than before."""
    yield
    ranks.settle()
    for left in ranks.all(range(4), "close"):
        assert not any(left.values()), left


@pytest.mark.parametrize("num_ranks", [2, 3, 4])
def test_results_are_those_of_one_place(
    ranks: RankProcesses, places: Places, num_ranks: int
) -> None:
    wrong = ranks.open(places(num_ranks), method="sweep", name="o_proj", cases=CASES)
    assert wrong == [[]] * num_ranks


@pytest.mark.parametrize("num_ranks", [2, 3, 4])
def test_in_shared_memory_nothing_moves(
    daemon: DaemonProcess, ranks: RankProcesses, places: Places, num_ranks: int
) -> None:
    wrong = ranks.open(places(num_ranks, daemon=daemon), method="sweep", name="o_proj", cases=CASES)
    assert wrong == [[]] * num_ranks
    with daemon.connect() as memory:
        assert memory.statistics().weight_sets == ()  # the last one has them evicted


def test_scales_and_zero_points_come_along(
    daemon: DaemonProcess, ranks: RankProcesses, places: Places
) -> None:
    cases = [[7, 3, 0], [7, 3, 2], [2, 0, 1]]
    for place in (places(3), places(3, daemon=daemon)):
        assert ranks.open(place, method="sweep", name="q_b_proj", cases=cases) == [[]] * 3


@pytest.mark.parametrize("how", ["early", "late", "sometime"])
def test_whenever_a_broadcast_arrives_results_are_the_same(
    ranks: RankProcesses, places: Places, how: str
) -> None:
    names = ["o_proj", "q_b_proj"]
    assert ranks.open(places(2), names=names, num_linears=7, ahead=2, how=how) == ["open"] * 2
    for number in range(3):
        assert ranks.all(range(2), "run", number=number) == ["equal"] * 2


def test_without_waiting_they_would_not_be(ranks: RankProcesses, places: Places) -> None:
    opened = ranks.open(
        places(2), names=["o_proj"], num_linears=7, ahead=2, how="late", waits=False
    )
    assert opened == ["open"] * 2
    assert ranks.all(range(2), "run", number=0) == ["different"] * 2


def test_a_pass_that_was_given_up_times_out_on_all_ranks(
    ranks: RankProcesses, places: Places
) -> None:
    names = ["q_b_proj", "o_proj"]
    ranks.open(places(3), names=names, num_linears=12, ahead=1)
    assert ranks.all(range(3), "run", number=0) == ["equal"] * 3
    for rank in range(3):
        fail_in = 4 if rank == 1 else None
        ranks.ask(rank, "run", number=1, fail_in=fail_in, timeout_s=SHORT_S)
    found = [ranks.answer(rank) for rank in range(3)]
    assert found == ["SeriesTimedOut", "RuntimeError", "SeriesTimedOut"]
    assert ranks.all(range(3), "run", number=2) == ["equal"] * 3
    assert ranks.all(range(3), "run", number=3) == ["equal"] * 3


@pytest.mark.parametrize(("first", "ahead"), [(0, 1), (1, 0)])
def test_who_makes_more_passes_than_others_times_out_and_so_do_they(
    ranks: RankProcesses, places: Places, first: int, ahead: int
) -> None:
    """In the middle of the pass, or with its first linear."""
    ranks.open(places(2), names=["o_proj"], num_linears=7, ahead=ahead)
    assert ranks.all(range(2), "run", number=0) == ["equal"] * 2
    for rank in (first, 1 - first):
        assert ranks.asked(rank, "run", number=1, timeout_s=SHORT_S) == "SeriesTimedOut"
    assert ranks.all(range(2), "run", number=2) == ["equal"] * 2


def test_a_rank_that_has_begun_again_is_let_in(
    daemon: DaemonProcess, ranks: RankProcesses, places: Places
) -> None:
    for place in (places(2), places(2, daemon=daemon)):
        opening = {"names": ["o_proj"], "num_linears": 7, "ahead": 1}
        ranks.open(place, **opening)
        ranks.asked(1, "close")
        assert ranks.asked(0, "run", number=0) == "SeriesTimedOut"
        ranks.ask(1, "open", place=place[1], **opening)
        assert ranks.asked(0, "rebuild") == "rebuilt"
        assert ranks.answer(1) == "open"
        assert ranks.all(range(2), "run", number=1) == ["equal"] * 2
        ranks.all(range(2), "close")


def test_ranks_that_do_not_mean_the_same_are_told(ranks: RankProcesses, places: Places) -> None:
    place = places(2)
    for rank in range(2):
        ranks.ask(rank, "open", place=place[rank], names=["o_proj"], num_linears=5, ahead=rank)
    for rank in range(2):
        other = 1 - rank
        told = f"InvalidSetting: rank {other} has another series o_proj than rank {rank}"
        assert ranks.answer(rank).startswith(told)


def test_who_waits_for_a_rank_that_never_comes_is_told(
    ranks: RankProcesses, places: Places
) -> None:
    [first, _] = places(2, join_timeout_s=1.0)
    told = ranks.asked(0, "open", place=first, names=["o_proj"], num_linears=5, ahead=1)
    assert told.startswith("SeriesTimedOut: no group of 2 ranks for the series o_proj within 1 s")


def test_a_rank_that_is_killed_or_stopped_is_an_error_on_the_others(places: Places) -> None:
    place, opening = places(2), {"names": ["o_proj"], "num_linears": 7, "ahead": 1}
    with RankProcesses(3) as three:
        three.open(place, **opening)
        assert three.all(range(2), "run", number=0) == ["equal"] * 2
        three.processes[1].kill()
        three.ask(2, "open", place=place[1], **opening)  # before anyone has noticed
        assert three.asked(0, "run", number=1) == "SeriesTimedOut"
        three.ask(0, "run", number=2)
        assert three.answer(2) == "open"
        assert three.asked(2, "run", number=2) == "equal"
        assert three.answer(0) == "equal"
        three.processes[2].send_signal(signal.SIGSTOP)
        assert three.asked(0, "run", number=3, timeout_s=SHORT_S) == "SeriesTimedOut"
        three.processes[2].kill()


def test_of_a_checkpoint_a_rank_reads_its_own_linears_only(
    daemon: DaemonProcess, ranks: RankProcesses, places: Places, tmp_path: Path
) -> None:
    config = LlamaConfig(
        hidden_size=512,
        intermediate_size=64,
        num_hidden_layers=7,
        num_attention_heads=4,
        num_key_value_heads=1,
        vocab_size=64,
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(tmp_path / "all")
    one = bytes_of(model, "o_proj")
    for rank in range(3):  # each has a file of its own, in which what is others' is nonsense
        copy = deepcopy(model)
        for number, layer in enumerate(copy.model.layers):
            if number % 3 != rank:
                layer.self_attn.o_proj.weight.data.fill_(7.0)
        copy.save_pretrained(tmp_path / str(rank))
    for place in (places(3), places(3, daemon=daemon)):
        for rank in range(3):
            own_path = str(tmp_path / str(rank))
            path = str(tmp_path / "all")
            ranks.ask(rank, "read", place=place[rank], path=path, own_path=own_path, ahead=1)
        for rank, num_linears in enumerate((3, 2, 2)):
            answer = ranks.answer(rank)
            assert answer["equal"]
            assert num_linears * one <= answer["read"] < (num_linears + 1) * one
