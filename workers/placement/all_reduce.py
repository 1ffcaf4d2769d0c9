"""Sums over the ranks of one host, in memory that all of them have mapped.

Owns a rank's handle of the library compiled from all_reduce.cpp. Invariants: all ranks that get a
sum get the same bits, added in the order of the ranks; nobody waits longer than its deadline for a
rank that ended, stopped or left, and an error names that rank. After an error the group is of no
more use: its members leave, and another is formed. Does not know who computes what is summed.

    lease ─► form ─► fork ─► each rank: AllReduce(memory, rank) ─► sum, sum, … ─► close

The memory is an extent that one process has leased and the others have mapped before: they are
forked from it. It is the lease's, and is used as long as any rank is a member.
"""

import ctypes
import errno
import functools
import sysconfig
import threading
import weakref
from ctypes import POINTER, byref, c_int32, c_int64, c_uint32, c_void_p
from pathlib import Path
from typing import Any, ClassVar, Final, Self

import torch

from allocator import ProcessState
from workers.errors import GroupBroken, GroupInUse, RankEnded, RankLeft, RankTimedOut
from workers.model.native.library import Ranks, Unavailable

FILE: Final = Path(__file__).with_name(f"_all_reduce{sysconfig.get_config_var('EXT_SUFFIX')}")
_LINE: Final = 64
_TIMED_OUT, _ENDED, _LEFT, _BROKEN, _FORKED = range(1, 6)


class _Outcome(ctypes.Structure):
    """Outcome."""

    _fields_: ClassVar = [("result", c_int64), ("rank", c_int64)]


@functools.cache
def load() -> Any:
    """The library. Raises Unavailable."""
    if not FILE.exists():
        raise Unavailable("not compiled when onecopy was installed")
    library = ctypes.CDLL(str(FILE))
    size_of = getattr(library, "onecopy_group_size_of_outcome", None)
    if size_of is None or size_of() != ctypes.sizeof(_Outcome):
        raise Unavailable(f"{FILE.name} was compiled from other sources: build it again")
    for name, result, arguments in (
        ("max_ranks", c_int32, []),
        ("num_bytes", c_int64, [c_int64, c_int64]),
        ("in_use", c_int64, [c_void_p, c_int64]),
        ("form", None, [c_void_p, c_int64, c_int64, c_uint32]),
        ("join", c_void_p, [c_void_p, *(c_int64,) * 3, POINTER(c_int32)]),
        ("meet", None, [c_void_p, c_int64, POINTER(_Outcome)]),
        ("all_reduce", None, [c_void_p, c_void_p, c_int64, c_int64, POINTER(_Outcome)]),
        ("pid_of", c_int32, [c_void_p, c_int64]),
        ("capacity", c_int64, [c_void_p]),
        ("leave", None, [c_void_p]),
        ("destroy", None, [c_void_p]),
    ):
        function = getattr(library, f"onecopy_group_{name}")
        function.restype = result
        function.argtypes = arguments
    return library


def num_bytes(num_ranks: int, capacity: int) -> int:
    """What a group of `num_ranks` needs that sums `capacity` numbers at a time; more are summed in
    pieces. Raises Unavailable, ValueError."""
    _check(num_ranks, capacity)
    needed: int = load().onecopy_group_num_bytes(num_ranks, capacity)
    return needed


def form(memory: torch.Tensor, num_ranks: int, capacity: int, first: int = 0) -> None:
    """Make a group in `memory`, uint8 # [num_bytes or more] at a multiple of 64, before any rank
    joins. Its rounds are counted on from `first`. Raises GroupInUse where a member of an earlier
    group could still write to it, Unavailable, ValueError."""
    if memory.dtype != torch.uint8 or not memory.is_contiguous() or memory.data_ptr() % _LINE:
        raise ValueError("the memory must be bytes in one piece, at a multiple of 64")
    if memory.nbytes < num_bytes(num_ranks, capacity):
        raise ValueError(f"{memory.nbytes} bytes: {num_bytes(num_ranks, capacity)} are needed")
    pid = load().onecopy_group_in_use(memory.data_ptr(), memory.nbytes)
    if pid:
        raise GroupInUse(
            f"process {pid} is a member of the group that is in this memory, and may write to it: "
            "end it first"
        )
    load().onecopy_group_form(memory.data_ptr(), num_ranks, capacity, first)


class AllReduce:
    """A rank of a group. Any thread may call it; they wait for each other. Of one process: in a
    forked child every call is refused."""

    def __init__(
        self, memory: torch.Tensor, rank: int, num_ranks: int, timeout_s: float = 60.0
    ) -> None:
        """Join the group that was formed in `memory`, and wait until all ranks have; no later call
        waits longer than `timeout_s` either. Raises RankTimedOut, RankEnded, RankLeft, GroupBroken,
        GroupInUse where somebody has that rank, Unavailable, ValueError."""
        self._library = load()
        self.rank: Final = rank
        self.num_ranks: Final = num_ranks
        self.timeout_s: Final = timeout_s
        self._memory = memory  # as long as the handle is there
        self._lock = threading.Lock()
        error = c_int32()
        handle = self._library.onecopy_group_join(
            memory.data_ptr(), memory.nbytes, rank, num_ranks, byref(error)
        )
        if error.value == errno.EBUSY:
            raise GroupInUse(f"there is a rank {rank} already: each has one process")
        if error.value == errno.ENOMEM:
            raise MemoryError("no memory for a rank of a group")
        if not handle:
            raise ValueError(f"no group of {num_ranks} with a rank {rank} in this memory")
        self.handle: Final = c_void_p(handle)
        """For native code."""
        self._finalizer = weakref.finalize(self, _end, self._library, self.handle, memory)
        # When the interpreter ends, a thread may still be inside: the process takes it along.
        self._finalizer.atexit = False
        outcome = _Outcome()
        self._library.onecopy_group_meet(self.handle, self._timeout_ns, byref(outcome))
        try:
            self._check(outcome)
        except BaseException:
            self.close()
            raise

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """The sum of all ranks' `values`, which have one shape, in fp32, rounded to their dtype:
        `values` themselves where they are fp32, in one piece and on the processor. Raises
        RankTimedOut, RankEnded, RankLeft, GroupBroken, ValueError."""
        summed = values.to("cpu", torch.float32).contiguous()
        outcome = _Outcome()
        with self._lock:
            self._check_open()
            self._library.onecopy_group_all_reduce(
                self.handle, summed.data_ptr(), summed.numel(), self._timeout_ns, byref(outcome)
            )
        self._check(outcome)
        return summed.to(values.device, values.dtype)

    def raise_for(self, result: int, rank: int) -> None:
        """The error that native code met at that rank, if any. Raises as `sum`."""
        self._check(_Outcome(result, rank))

    @property
    def capacity(self) -> int:
        """Numbers that are summed at a time."""
        return int(self._library.onecopy_group_capacity(self.handle))

    def native(self) -> Ranks:
        """For native code that writes its part where the others read it. As long as this lives."""
        functions = ("own_part", "part_of", "publish", "wait")
        addresses = (
            ctypes.cast(self._library[f"onecopy_group_{name}"], c_void_p) for name in functions
        )
        return Ranks(self.handle, *addresses, self._timeout_ns, self.num_ranks)

    def close(self) -> None:
        """Leave: who waits for this rank is told so. A second time does nothing."""
        with self._lock:
            self._finalizer()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def _timeout_ns(self) -> int:
        return int(self.timeout_s * 1e9)

    def _check_open(self) -> None:
        if not self._finalizer.alive:
            raise ValueError("this rank has left its group")

    def _check(self, outcome: _Outcome) -> None:
        rank = outcome.rank
        if outcome.result == _TIMED_OUT:
            raise RankTimedOut(f"{self._named(rank)} was waited for {self.timeout_s:g} s", rank)
        if outcome.result == _ENDED:
            raise RankEnded(f"{self._named(rank)} has ended", rank)
        if outcome.result == _LEFT:
            raise RankLeft(f"{self._named(rank)} has left its group", rank)
        if outcome.result == _BROKEN:
            raise GroupBroken(f"another rank gave up waiting for {self._named(rank)}", rank)
        if outcome.result == _FORKED:
            raise ValueError("a rank is of one process: its child must join by itself")

    def _named(self, rank: int) -> str:
        pid = self._library.onecopy_group_pid_of(self.handle, rank)
        state = ProcessState.of(pid) if pid else None
        stopped = ", which somebody has stopped," if state is not None and state.is_stopped else ""
        who = f" (process {pid}{stopped})" if pid else ", which has not come,"
        return f"rank {rank} of {self.num_ranks}{who}"


def _end(library: Any, handle: c_void_p, _memory: torch.Tensor) -> None:
    library.onecopy_group_leave(handle)
    library.onecopy_group_destroy(handle)


def _check(num_ranks: int, capacity: int) -> None:
    most = load().onecopy_group_max_ranks()
    if not 1 <= num_ranks <= most:
        raise ValueError(f"{num_ranks} ranks: 1 to {most} can be in a group")
    if capacity < 1:
        raise ValueError(f"sums of {capacity} numbers")
