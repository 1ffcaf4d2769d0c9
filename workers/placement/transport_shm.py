"""Ranks on one host: each seals its linears in shared memory, and the others map them.

Owns this rank's weight set in the allocator, and the mappings of the others'. Invariants: a
linear's bytes are in memory once, however many ranks there are, and none of them moves; what is
broadcast is one byte, a fence: who waits for a linear knows that its owner has got as far in the
pass. The last rank that closes has the allocator evict the sets.
"""

import contextlib
import json
import uuid
from collections.abc import Mapping

import torch

from allocator import (
    AllocatorGone,
    Client,
    UnknownWeightSet,
    WeightSetBusy,
    WeightSetReader,
    WeightSetWriter,
)
from workers.checkpoint.formats.checkpoint import SourceTensor
from workers.checkpoint.plan import make_plan
from workers.errors import InvalidSetting, SeriesTimedOut
from workers.placement.group import Group, GroupArrival, Ranks, check_forms
from workers.placement.transport import Fill
from workers.placement.transport_gloo import gloo_backend


class ShmTransport:
    """See `Transport`; `memory` is a session with the allocator that all ranks use, about the
    host's memory."""

    def __init__(self, ranks: Ranks, memory: Client) -> None:
        if not memory.device.startswith("host"):
            raise InvalidSetting(
                f"the session is about {memory.device}, and ranks share the host's memory: "
                'connect(device="host")'
            )
        self._ranks = ranks
        self._memory = memory
        self.rank = ranks.rank
        self.num_ranks = ranks.num_ranks

    def open(self, series: str) -> "ShmChannel":
        """See `Transport`."""
        return ShmChannel(self._ranks, series, self._memory)


class ShmChannel:
    """See `Channel`."""

    device = torch.device("cpu")
    maps_all = True

    def __init__(self, ranks: Ranks, series: str, memory: Client) -> None:
        self._ranks = ranks
        self._series = series
        self._memory = memory
        self._group = Group(ranks, series, gloo_backend)
        self._fence = torch.zeros(1, dtype=torch.uint8)
        self._key = ""
        """Of this rank's own set; empty where it has no linears."""
        self._readers: dict[str, WeightSetReader] = {}
        self._extents: dict[int, torch.Tensor] = {}

    def place(self, num_bytes: int, own: Mapping[int, Fill]) -> None:
        """See `Channel`. Raises OutOfDeviceMemory, QuotaExceeded, AllocatorGone."""
        if not own:
            return
        key = f"series/{self._series}/{self._ranks.rank}/{uuid.uuid4().hex}"
        sources = [SourceTensor(str(index), (num_bytes,), torch.uint8) for index in own]
        plan = make_plan(sources, {})
        opened = self._memory.open_weight_set(key, {"series": self._series})
        assert isinstance(opened, WeightSetWriter)  # noqa: S101 - nobody else has that key
        with opened as writer:
            writer.reserve(plan.segment_bytes)
            tensors = writer.writable_tensors(plan.manifest)
            for index, fill in own.items():
                fill(tensors[str(index)])
            del tensors
            self._readers[key] = writer.seal(plan.manifest, plan.num_bytes)
        self._key = key

    def join(self, form: str) -> None:
        """See `Channel`. Raises UnknownWeightSet, AllocatorGone, too."""
        said = [json.loads(each) for each in self._group.join(json.dumps([form, self._key]))]
        check_forms(tuple(each[0] for each in said), self._series, self._ranks.rank)
        keys = [each[1] for each in said if each[1]]
        self._extents.clear()
        for key in self._readers.keys() - set(keys):  # of a rank that has begun again
            self._release(key)
        for key in keys:
            if key not in self._readers:
                self._readers[key] = self._opened(key)
            for index, tensor in self._readers[key].tensors().items():
                self._extents[int(index)] = tensor

    def extent(self, index: int) -> torch.Tensor | None:
        """See `Channel`."""
        return self._extents[index]

    def window(self, num_bytes: int) -> torch.Tensor:
        """See `Channel`."""
        return torch.empty(num_bytes, dtype=torch.uint8)

    def broadcast(self, extent: torch.Tensor, owner: int) -> GroupArrival:
        """See `Channel`."""
        return self._group.broadcast(self._fence, owner)

    def used(self, extent: torch.Tensor) -> None:
        """See `Channel`. What is sealed is not overwritten."""

    def leave(self) -> None:
        """See `Channel`."""
        self._group.leave()

    def close(self) -> None:
        """See `Channel`."""
        self.leave()
        self._extents.clear()
        for key in list(self._readers):
            self._release(key)

    def _opened(self, key: str) -> WeightSetReader:
        opened = self._memory.open_weight_set(key, None, timeout_s=self._ranks.join_timeout_s)
        if isinstance(opened, WeightSetWriter):
            opened.abandon()
            raise SeriesTimedOut(f"the rank that had {key} has left, and its linears with it")
        return opened

    def _release(self, key: str) -> None:
        with contextlib.suppress(AllocatorGone):
            self._readers.pop(key).release()
            with contextlib.suppress(WeightSetBusy, UnknownWeightSet):  # the last one does it
                self._memory.evict(key)
