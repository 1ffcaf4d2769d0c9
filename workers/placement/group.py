"""The process group of one series, made anew when ranks have lost step.

Owns its making and its end. Invariants: no wait is longer than the deadline; a group is of ranks
that all were in the same epoch and said the same; what torch.distributed raises becomes
SeriesTimedOut. Does not know what is broadcast.

Each rank has an epoch in the store: that of the group that it is in, or will join next. It goes
up when the rank leaves a group, and when a process joins its first. Ranks that join follow the
highest, and those that wait look again, so that they meet whoever failed how often.
"""

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Final

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore

from workers.errors import InvalidSetting, SeriesTimedOut

_SLICE_S: Final = 1.0
"""Who waits for others to join looks as often whether they have gone on to another epoch."""


@dataclass(frozen=True)
class Ranks:
    """Those who shard series among them; the same for all of them, but for `rank`."""

    store: Any
    """A torch.distributed.Store that all of them reach: of a TCP address, or of a file where they
    are on one host."""
    rank: int
    num_ranks: int
    timeout_s: float = 60.0
    """How long a rank waits for another one in a pass."""
    join_timeout_s: float = 300.0
    """How long a rank waits until all have come to make a group."""

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.num_ranks:
            raise InvalidSetting(f"rank {self.rank} of {self.num_ranks}: ranks count from 0")
        if self.timeout_s <= 0 or self.join_timeout_s <= 0:
            raise InvalidSetting(
                f"deadlines of {self.timeout_s} s and {self.join_timeout_s} s: give some above 0"
            )


MakeBackend = Callable[[Any, Ranks], Any]
"""A group with all ranks, by way of a store of its own. Raises RuntimeError."""


class Group:
    """Of one series. With one rank there is nothing to wait for."""

    def __init__(self, ranks: Ranks, series: str, make: MakeBackend) -> None:
        self._ranks = ranks
        self._series = series
        self._store = PrefixStore(f"onecopy/{series}", ranks.store)
        self._make = make
        self._backend: Any = None
        self._is_new = True
        self._is_in = False

    def join(self, said: str) -> tuple[str, ...]:
        """Be in a group with all ranks. Returns what each of them says. Raises SeriesTimedOut."""
        if self._ranks.num_ranks == 1:
            return (said,)
        self._is_in = True
        try:
            if self._is_new:  # whoever was this rank before may not have got to leave
                self._next_epoch()
                self._is_new = False
            epoch = self._meet(said)
            own = PrefixStore(f"group/{epoch}", self._store)
            self._backend = self._make(own, self._ranks)
            return tuple(
                self._store.get(_key(epoch, rank)).decode() for rank in range(self._ranks.num_ranks)
            )
        except RuntimeError as error:
            self.leave()
            raise SeriesTimedOut(
                f"no group of {self._ranks.num_ranks} ranks for the series {self._series} within "
                f"{self._ranks.join_timeout_s:g} s: each rank makes one pass after the other, and "
                f"all make as many ({error})"
            ) from error

    def broadcast(self, extent: torch.Tensor, owner: int) -> "GroupArrival":
        """Begin one, in the same order on all ranks. Raises SeriesTimedOut."""
        if self._ranks.num_ranks == 1:
            return GroupArrival(self, None, owner)
        options = dist.BroadcastOptions()
        options.rootRank = owner
        options.rootTensor = 0
        options.asyncOp = True
        options.timeout = timedelta(seconds=self._ranks.timeout_s)
        try:
            work = self._backend.broadcast([extent], options)
        except RuntimeError as error:
            raise self._lost(owner, error) from error
        return GroupArrival(self, work, owner)

    def wait(self, work: Any, owner: int) -> None:
        """As `Arrival.wait`."""
        try:
            work.wait(timedelta(seconds=self._ranks.timeout_s))
        except RuntimeError as error:
            raise self._lost(owner, error) from error

    def leave(self) -> None:
        """Give up the group; its threads and connections end. Drop the arrivals before."""
        if not self._is_in:
            return
        self._is_in = False
        backend, self._backend = self._backend, None
        with contextlib.suppress(RuntimeError):
            if backend is not None:
                backend.abort()  # gloo's goes on until the deadline of what is under way
        del backend
        with contextlib.suppress(RuntimeError):  # without a store nobody joins any more
            self._next_epoch()

    def _next_epoch(self) -> None:
        self._store.add(f"epoch/{self._ranks.rank}", 1)

    def _meet(self, said: str) -> int:
        """The epoch in which all ranks are."""
        deadline = time.monotonic() + self._ranks.join_timeout_s
        numbers = range(self._ranks.num_ranks)
        store = self._store
        while True:
            epochs = [store.add(f"epoch/{rank}", 0) for rank in numbers]
            epoch = max(epochs)
            store.add(f"epoch/{self._ranks.rank}", epoch - epochs[self._ranks.rank])
            store.set(_key(epoch, self._ranks.rank), said)
            left_s = deadline - time.monotonic()
            try:
                keys = [_key(epoch, rank) for rank in numbers]
                store.wait(keys, timedelta(seconds=max(0.001, min(_SLICE_S, left_s))))
            except RuntimeError:
                if left_s <= _SLICE_S:
                    raise
            else:
                return epoch

    def _lost(self, owner: int, error: RuntimeError) -> SeriesTimedOut:
        return SeriesTimedOut(
            f"a linear of the series {self._series} did not get from rank {owner} to the others "
            f"within {self._ranks.timeout_s:g} s: a rank has left the pass, or was not in it "
            f"({error})"
        )


@dataclass(frozen=True, slots=True)
class GroupArrival:
    """See `Arrival`."""

    group: Group
    work: Any
    owner: int

    def wait(self) -> None:
        """See `Arrival.wait`."""
        if self.work is not None:
            self.group.wait(self.work, self.owner)


def _key(epoch: int, rank: int) -> str:
    return f"joined/{epoch}/{rank}"


def check_forms(said: tuple[str, ...], series: str, rank: int) -> None:
    """All ranks must mean the same series. Raises InvalidSetting."""
    for other, form in enumerate(said):
        if form != said[rank]:
            raise InvalidSetting(
                f"rank {other} has another series {series} than rank {rank}: {form} instead of "
                f"{said[rank]}"
            )
