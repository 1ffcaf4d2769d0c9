"""Linears travel by torch.distributed: broadcasts of whole extents, over gloo between processors.

Owns this rank's linears, one allocation each, and the windows for those of the others. Invariant: a
linear's bytes are in memory once on its own rank, and elsewhere in windows alone.
"""

from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from workers.errors import InvalidSetting
from workers.placement.group import Group, GroupArrival, MakeBackend, Ranks, check_forms
from workers.placement.transport import Fill


class GlooTransport:
    """See `Transport`. Connections are made over the interface that `GLOO_SOCKET_IFNAME` names,
    else over that which the host's name stands for."""

    def __init__(self, ranks: Ranks) -> None:
        if not dist.is_available() or not dist.is_gloo_available():
            raise InvalidSetting("this torch is built without gloo: install one that has it")
        self._ranks = ranks
        self.rank = ranks.rank
        self.num_ranks = ranks.num_ranks

    def open(self, series: str) -> "CollectiveChannel":
        """See `Transport`."""
        return CollectiveChannel(self._ranks, series, gloo_backend, torch.device("cpu"))


def gloo_backend(store: Any, ranks: Ranks) -> Any:
    """A group of gloo's, with the two threads that it has by default."""
    timeout = timedelta(seconds=ranks.join_timeout_s)
    return dist.ProcessGroupGloo(store, ranks.rank, ranks.num_ranks, timeout)


class CollectiveChannel:
    """See `Channel`."""

    maps_all = False

    def __init__(self, ranks: Ranks, series: str, make: MakeBackend, device: torch.device) -> None:
        self._ranks = ranks
        self._series = series
        self.device = device
        self._group = Group(ranks, series, make)
        self._own: dict[int, torch.Tensor] = {}

    def place(self, num_bytes: int, own: Mapping[int, Fill]) -> None:
        """See `Channel`."""
        for index, fill in own.items():
            extent = self.window(num_bytes)
            fill(extent)
            self._own[index] = extent

    def join(self, form: str) -> None:
        """See `Channel`."""
        check_forms(self._group.join(form), self._series, self._ranks.rank)

    def extent(self, index: int) -> torch.Tensor | None:
        """See `Channel`."""
        return self._own.get(index)

    def window(self, num_bytes: int) -> torch.Tensor:
        """See `Channel`."""
        return torch.empty(num_bytes, dtype=torch.uint8, device=self.device)

    def broadcast(self, extent: torch.Tensor, owner: int) -> GroupArrival:
        """See `Channel`."""
        return self._group.broadcast(extent, owner)

    def used(self, extent: torch.Tensor) -> None:
        """See `Channel`. The processor has computed what was given to it."""

    def leave(self) -> None:
        """See `Channel`."""
        self._group.leave()

    def close(self) -> None:
        """See `Channel`."""
        self.leave()
        self._own.clear()
