"""Ranks of an instance on NUMA nodes: each one's threads, and the memory that it has for itself.

Owns which rank is on which node. Invariants: a rank is on one node, and ranks take turns over the
nodes; where there is only one node nothing is changed, and that is said. What ranks share lies
where the allocator has put it (`--page-policy`).
"""

import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from allocator import node_cpus
from workers.errors import InvalidSetting
from workers.process import linux
from workers.settings import EngineSettings

log = logging.getLogger("onecopy.instance")


@dataclass(frozen=True, slots=True)
class Pinning:
    """Of one instance."""

    nodes: tuple[int, ...]
    """In turn the ranks'."""
    cpus: tuple[frozenset[int], ...]
    """Of each of them, those that this process may use."""
    num_ranks: int

    @classmethod
    def of(cls, settings: EngineSettings, root: Path = Path("/")) -> Self | None:
        """As it was asked for, on the machine that `root`'s sys describes; None for none, and where
        there is one node. To be called before anything is pinned. Raises InvalidSetting."""
        if settings.numa_nodes == "none":
            return None
        known, allowed = node_cpus(root), os.sched_getaffinity(0)
        if settings.numa_nodes == "all":
            wanted = [node for node, cpus in known.items() if cpus & allowed][: settings.num_ranks]
        else:
            wanted = [int(node) for node in settings.numa_nodes.split(",")]
        for node in wanted:
            if node not in known:
                there = ", ".join(map(str, known)) or "none"
                raise InvalidSetting(
                    f"--numa-nodes is {settings.numa_nodes}, and this machine has no processors on "
                    f"node {node}: it has nodes {there}"
                )
            if not known[node] & allowed:
                raise InvalidSetting(
                    f"--numa-nodes is {settings.numa_nodes}, and this process may use no processor "
                    f"of node {node}: its cpuset or affinity has others"
                )
        if len(known) < 2:
            return None
        cpus = tuple(known[node] & allowed for node in wanted)
        return cls(tuple(wanted), cpus, settings.num_ranks)

    @property
    def ranks_a_node(self) -> int:
        """That compute beside each other, at most."""
        return -(-self.num_ranks // len(self.nodes))

    @property
    def num_cores(self) -> int:
        """Of the smallest of the nodes."""
        return min(map(len, self.cpus))

    def pin(self, rank: int) -> None:
        """This process, before it has other threads: they inherit it. Where the kernel refuses
        memory policies only the processors are fixed, which is said."""
        turn = rank % len(self.nodes)
        os.sched_setaffinity(0, self.cpus[turn])
        try:
            linux.prefer_memory_of(self.nodes[turn])
        except OSError as error:
            log.warning(
                "rank %d runs on NUMA node %d, but its memory may lie elsewhere: the kernel "
                "refuses memory policies to this process (%s). A container needs --cap-add "
                "SYS_NICE",
                rank,
                self.nodes[turn],
                error.strerror,
            )


def pin_first(settings: EngineSettings, root: Path = Path("/")) -> Pinning | None:
    """The first rank's process, of which others are told; says where there is nothing to do. Raises
    InvalidSetting."""
    pinning = Pinning.of(settings, root)
    if pinning is not None:
        pinning.pin(0)
    elif settings.numa_nodes != "none":
        log.info("--numa-nodes changes nothing: this machine has one NUMA node")
    return pinning


def pin_rank(rank: int, settings: EngineSettings) -> None:
    """A further rank's process. What is wrong with the settings, the first rank says."""
    try:
        pinning = Pinning.of(settings)
    except InvalidSetting:
        return
    if pinning is not None:
        pinning.pin(rank)
