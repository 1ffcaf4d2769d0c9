"""Ranks on NUMA nodes: of a machine that a tree of sysfs describes, with this one's processors."""

import logging
import os
from pathlib import Path

import pytest

from allocator import node_cpus
from tests.workers.placement.ranks import Ranks
from workers.errors import InvalidSetting
from workers.process import linux
from workers.process.node_pinning import Pinning, pin_first
from workers.settings import EngineSettings, checked

ALLOWED = sorted(os.sched_getaffinity(0))
two_cores = pytest.mark.skipif(len(ALLOWED) < 2, reason="wants two processors")


def machine(root: Path, **nodes: str) -> Path:
    """Each node's processors as the kernel lists them."""
    for name, cpus in nodes.items():
        folder = root / "sys/devices/system/node" / name
        folder.mkdir(parents=True)
        (folder / "cpulist").write_text(f"{cpus}\n")
    return root


def settings(nodes: str, num_ranks: int = 2) -> EngineSettings:
    return checked({"numa_nodes": nodes, "tensor_parallel_size": num_ranks})


def test_processors_are_read_as_the_kernel_lists_them(tmp_path: Path) -> None:
    root = machine(tmp_path, node0="0-3,8-11", node1="4,6-7", node10="5", node2="")
    assert node_cpus(root) == {
        0: {0, 1, 2, 3, 8, 9, 10, 11},
        1: {4, 6, 7},
        10: {5},
    }  # the third has memory alone
    assert list(node_cpus(root)) == [0, 1, 10]
    assert node_cpus(tmp_path / "without") == {}
    here = node_cpus()
    assert not here or set(ALLOWED) <= set().union(*here.values())


@two_cores
def test_each_rank_is_on_a_node_and_ranks_take_turns(tmp_path: Path) -> None:
    first, second = ALLOWED[:2]
    root = machine(tmp_path, node0=str(first), node3=f"{second},4095")

    def work(pinning: Pinning, rank: int) -> list[int]:
        pinning.pin(rank)
        with Ranks(1, lambda _: sorted(os.sched_getaffinity(0))) as child:
            inherited: list[int] = child.result(0)
        return inherited

    for nodes, expected in (
        ("all", [[first], [second], [first]]),
        ("3", [[second]] * 3),
        ("3,0", [[second], [first], [second]]),
    ):
        pinning = Pinning.of(settings(nodes, 3), root)
        assert pinning is not None
        with Ranks(3, lambda rank, pinning=pinning: work(pinning, rank)) as ranks:
            assert ranks.results() == expected
        assert pinning.num_cores == 1
        assert pinning.ranks_a_node == (3 if nodes == "3" else 2)
    assert sorted(os.sched_getaffinity(0)) == ALLOWED


def test_on_one_node_nothing_changes_and_that_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = machine(tmp_path / "one", node0=",".join(map(str, ALLOWED)))
    with caplog.at_level(logging.INFO, "onecopy.instance"):
        assert pin_first(settings("all"), root) is None
        assert pin_first(settings("0"), root) is None
        assert pin_first(settings("none"), root) is None
    assert caplog.messages == ["--numa-nodes changes nothing: this machine has one NUMA node"] * 2
    assert sorted(os.sched_getaffinity(0)) == ALLOWED


def test_what_is_not_there_is_refused_by_name(tmp_path: Path) -> None:
    root = machine(tmp_path, node0=str(ALLOWED[0]), node1="4095")
    with pytest.raises(InvalidSetting, match="no processors on node 7: it has nodes 0, 1"):
        Pinning.of(settings("0,7"), root)
    with pytest.raises(InvalidSetting, match="may use no processor of node 1: its cpuset"):
        Pinning.of(settings("1"), root)
    pinning = Pinning.of(settings("all"), root)  # of those that it may use
    assert pinning is not None
    assert pinning.nodes == (0,)


@pytest.mark.parametrize(
    ("nodes", "num_ranks", "says"),
    [
        ("all", 1, "--numa-nodes is all, and each instance is one rank"),
        ("0,1", 1, "each instance has 1 rank, each on one node"),
        ("0,1,2", 2, "each instance has 2 ranks"),
        ("0-1", 2, "--numa-nodes is '0-1': it is none, all, or numbers of nodes as 0,1"),
        ("", 2, "--numa-nodes is ''"),
    ],
)
def test_more_nodes_than_ranks_are_refused(nodes: str, num_ranks: int, says: str) -> None:
    with pytest.raises(InvalidSetting, match=says):
        settings(nodes, num_ranks)


def test_memory_is_preferred_where_the_kernel_lets_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A node that is not there has none: the kernel says so, and the rank runs all the same."""

    def touched(_: int) -> str:
        try:
            linux.prefer_memory_of(0)
        except OSError as error:
            return os.strerror(error.errno or 0)
        return "done"

    with Ranks(1, touched) as ranks:
        assert ranks.result(0) in ("done", "Operation not permitted", "Function not implemented")
    for node in (62, 63, 5000):
        with pytest.raises(OSError):
            linux.prefer_memory_of(node)
    root = machine(tmp_path, node0="4095", node62=str(ALLOWED[0]))
    pinning = Pinning.of(settings("62", 1), root)
    assert pinning is not None

    def pinned(_: int) -> list[str]:
        with caplog.at_level(logging.WARNING, "onecopy.instance"):
            pinning.pin(0)
        return [*caplog.messages, str(sorted(os.sched_getaffinity(0)))]

    with Ranks(1, pinned) as ranks:
        said, cpus = ranks.result(0)
    assert "runs on NUMA node 62, but its memory may lie elsewhere" in said
    assert cpus == str(ALLOWED[:1])
