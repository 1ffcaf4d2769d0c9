"""Linears travel by torch.distributed: broadcasts of whole extents, over NCCL between GPUs.

Owns what is particular to a device that computes behind the processor's back. Invariant: before a
window is overwritten, the stream that broadcasts waits for the event of its last consumer,
whichever stream that ran on. Untested: it is written against torch's documentation, and has run on
no machine with several GPUs yet, of which NCCL wants one for each rank.

A broadcast waits by itself for what its own stream was given before. The processor waits for each
arrival, since NCCL knows no other deadline that can be caught: an `ahead` of 1 or more keeps the
device busy meanwhile. NCCL's own watchdog, which ends the process, has twice the deadline.
"""

from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from workers.errors import InvalidSetting
from workers.placement.group import GroupArrival, Ranks
from workers.placement.transport_gloo import CollectiveChannel


class NcclTransport:
    """See `Transport`; `device` is this rank's own, as `cuda:0`."""

    def __init__(self, ranks: Ranks, device: torch.device) -> None:
        if not dist.is_available() or not dist.is_nccl_available():
            raise InvalidSetting("this torch is built without NCCL: install one for CUDA")
        self._ranks = ranks
        self._device = device
        self.rank = ranks.rank
        self.num_ranks = ranks.num_ranks

    def open(self, series: str) -> "NcclChannel":
        """See `Transport`."""
        return NcclChannel(self._ranks, series, nccl_backend, self._device)


def nccl_backend(store: Any, ranks: Ranks) -> Any:
    """A group of NCCL's."""
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = timedelta(seconds=2 * ranks.timeout_s)
    return dist.ProcessGroupNCCL(store, ranks.rank, ranks.num_ranks, options)


class NcclChannel(CollectiveChannel):
    """See `Channel`."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._last_use: dict[int, torch.Event] = {}
        """By the address of a window."""

    def broadcast(self, extent: torch.Tensor, owner: int) -> GroupArrival:
        """See `Channel`."""
        event = self._last_use.pop(extent.data_ptr(), None)
        if event is not None:
            event.wait(torch.accelerator.current_stream(self.device))
        return super().broadcast(extent, owner)

    def used(self, extent: torch.Tensor) -> None:
        """See `Channel`."""
        event = torch.Event(self.device)
        event.record(torch.accelerator.current_stream(self.device))
        self._last_use[extent.data_ptr()] = event

    def leave(self) -> None:
        """See `Channel`."""
        self._last_use.clear()
        super().leave()
