"""What the first rank of an instance has of the others: processes, memory for sums, its word.

Owns the way from forked processes to ranks that compute, and back. Invariants: all compute by the
same kernels, or all by transformers' modules, since these sum other numbers; whoever can't go on
ends the instance. Does not know requests.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Final

import torch

from allocator import Client
from workers.checkpoint import AttachedWeights
from workers.kv.common import CommonSource
from workers.kv.layout import KVLayout
from workers.model.batch import Batch
from workers.model.decoder import Model
from workers.placement.all_reduce import AllReduce, form, num_bytes
from workers.process.rank_lead import Lead
from workers.process.rank_link import Link
from workers.process.rank_messages import Begin
from workers.process.rank_processes import RankProcesses
from workers.settings import EngineSettings

_PATIENCE_S: Final = 60.0
"""How long a rank waits for another beyond what one may be stopped for: who looks at the processes
has seen a stopped one before."""
_FOR_EVER_S: Final = 20 * 24 * 3600.0
"""Sockets wait for 24 days at most."""
_PREPARED_S: Final = 300.0
"""What building a rank's part may take beyond the first rank's."""


def patience_s(hang_timeout_s: float) -> float:
    """How long a rank waits for another that has not ended, where a process may be stopped for so
    long; 0: for ever, as for a debugger. One that has ended is noticed at once."""
    return min(hang_timeout_s + _PATIENCE_S, _FOR_EVER_S) if hang_timeout_s else _FOR_EVER_S


class FirstRank:
    """One thread calls it."""

    def __init__(
        self,
        processes: RankProcesses,
        num_threads: int,
        threads_now: Callable[[], int] | None,
        timeout_s: float = _PATIENCE_S,
    ) -> None:
        """Each rank computes with up to `num_threads` threads, `threads_now` of them in a pass;
        None are all. None waits longer than `timeout_s` for another."""
        self._timeout_s = timeout_s
        self._processes = processes
        self._num_threads = num_threads
        self._lead = Lead(processes.links, timeout_s, threads_now or (lambda: num_threads))
        self._group: AllReduce | None = None

    @property
    def pids(self) -> tuple[int, ...]:
        """Of the others, in the order of their ranks."""
        return tuple(self._processes.pids)

    @property
    def links(self) -> list[Link]:
        """Readable where a rank has ended: `check` says so."""
        return self._processes.links

    def form(
        self,
        memory: Client,
        weights: AttachedWeights,
        settings: EngineSettings,
        capacity: int,
        max_model_len: int,
    ) -> AllReduce:
        """Let the others build their parts of the model, and be their group's first member, which
        sums `capacity` numbers at a time. Raises RankError, AllocatorError."""
        num_ranks = self._processes.num_ranks
        lease = memory.lease(num_bytes(num_ranks, capacity))
        form(lease.tensor(), num_ranks, capacity)
        begin = Begin(
            pool=lease.pool,
            group=lease.extent,
            weights=weights.reader.sealed,
            divides="model" if settings.tensor_parallel_size > 1 else "sequences",
            max_rows=settings.most_rows,
            max_model_len=max_model_len,
            num_threads=self._num_threads,
            module_threads=torch.get_num_threads(),
            kernels=settings.cpu_kernels,
            attention_workspace=settings.attention_workspace,
            timeout_s=self._timeout_s,
        )
        self._lead.begin(begin, lease)
        self._group = AllReduce(lease.tensor(), 0, num_ranks, self._timeout_s)
        return self._group

    def agree(self, model: Model, reason: str | None) -> str | None:
        """When all have built their parts, `model` being this one's: compute it together. `reason`
        is why the kernels can't compute this one, if so; returns why they can't compute all.
        Raises RankError."""
        prepared = self._lead.prepared(max(_PREPARED_S, self._timeout_s))
        kernels = {one.kernels for one in prepared} | {model.kernels or ""}
        if len(kernels) > 1 or "" in kernels:
            reasons = [reason, *(one.reason for one in prepared)]
            reason = next((one for one in reasons if one), "ranks with other kernels")
            model.compute_by_modules()
        self._lead.compute(natively=model.kernels is not None)
        model.passes = self.passes
        return reason

    def source(self, layout: KVLayout) -> CommonSource:
        """Blocks without an allocator."""
        return CommonSource(layout, self._processes.memory)

    def passes(self, batch: Batch) -> AbstractContextManager[None]:
        """In which each pass is made. Raises RanksLost."""
        return self._lead.passes(batch)

    def rest(self) -> None:
        """Nobody computes for now. Raises RanksLost."""
        self._lead.rest()

    def check(self) -> None:
        """Raises RanksLost where a rank has ended since it was last waited for."""
        self._lead.check()

    def close(self) -> None:
        """End the others, and wait for them. Idempotent."""
        if self._group is not None:
            self._group.close()
        self._processes.close()
