"""Bytes of files brought into memory while something else computes.

Owns the files, and the threads that read them: several pieces at a time, straight to where the
bytes are wanted, so that nothing of them stays in the page cache.
Invariant: a job that was waited for has ended: its bytes are there or an error says why not, and
nothing is written to its addresses any more. Knows no tensor, and not whose the memory is.
"""

import logging
import os
import time
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from errno import EFAULT, EIO
from pathlib import Path
from typing import Final, Literal, Self

from workers.errors import ReadCancelled, ReaderClosed, ReadFailed, ReadTimedOut
from workers.model.native.library import Unavailable
from workers.placement.native_reading import NativeThreads
from workers.placement.opened_file import OpenedFile
from workers.placement.python_reading import PythonThreads
from workers.placement.reading import (
    BLOCK,
    MAX_ENDED,
    Access,
    AccessName,
    Outcome,
    Read,
    ReadingThreads,
    State,
)

__all__ = ["BLOCK", "MAX_ENDED", "Read", "Reader", "Statistics"]

_MAX_THREADS: Final = 64
_MAX_PIECE_BYTES: Final = 1 << 30
_MAX_PLACE: Final = (1 << 63) - 1 - BLOCK
_NAMES: Final[dict[Access, AccessName]] = {
    Access.UNCACHED: "uncached",
    Access.DIRECT: "direct",
    Access.BUFFERED: "buffered",
}
_WAYS: Final[dict[str, Access | None]] = {"auto": None} | {
    name: access for access, name in _NAMES.items()
}
_SLICE_S: Final = 0.1
"""As long a wait is without a look at the interpreter's signals."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Statistics:
    """Of one reader, since it was made."""

    bytes_read: int
    reading_s: float
    """Of all threads together."""


class Reader:
    """For any number of threads at a time. Its own threads start with the first job, so it may be
    made before a fork and used after it; a fork behind that leaves the child one to close."""

    def __init__(
        self,
        num_threads: int = 4,
        piece_bytes: int = 4 << 20,
        *,
        access: Literal["auto"] | AccessName = "auto",
        delay: tuple[int, float] | None = None,
    ) -> None:
        """`access` is how files are read: "auto" the best way that each allows. `delay`, a seed and
        seconds, lets each piece wait a random time of up to as long: for tests. Raises
        ValueError, MemoryError."""
        if not 1 <= num_threads <= _MAX_THREADS:
            raise ValueError(f"num_threads must be 1 to {_MAX_THREADS}, and not {num_threads}")
        if piece_bytes % BLOCK or not BLOCK <= piece_bytes <= _MAX_PIECE_BYTES:
            raise ValueError(
                f"piece_bytes must be a multiple of {BLOCK}, and {_MAX_PIECE_BYTES} at most, not "
                f"{piece_bytes}"
            )
        if access not in _WAYS:
            raise ValueError(f"access must be one of {', '.join(_WAYS)}, and not {access!r}")
        self._wanted: Final = _WAYS[access]
        self._threads: Final = _make_threads(num_threads, piece_bytes, delay)
        self._files: Final[dict[int, OpenedFile]] = {}
        self._end: Final = weakref.finalize(self, _end, self._threads, self._files)

    def open(self, path: Path) -> int:
        """A number for the regular file there, which stays open until the reader is closed. Raises
        OSError, ReaderClosed."""
        self._check_usable()
        file = OpenedFile(path, self._wanted)
        try:
            number = self._threads.add(file.descriptor, file.direct, file.access, file.falls_back)
            self._files[number] = file
            self._check_usable()  # who closed it meanwhile may have missed this file
        except BaseException:
            file.close()
            raise
        return number

    def access(self, file: int) -> AccessName:
        """How the file is read. Raises ValueError, ReaderClosed."""
        self._check_process()
        self._opened(file)
        return _NAMES[self._threads.access(file)]

    def status(self, file: int) -> os.stat_result:
        """Of the file as it is now, whatever lies at its path. Raises ValueError, ReaderClosed."""
        self._check_process()
        return os.fstat(self._opened(file).descriptor)

    def start(self, reads: Sequence[Read]) -> int:
        """A job's number, at once. Its pieces are read behind those of all jobs before it, several
        at a time. Raises ValueError, ReaderClosed, OSError where no thread is to be had."""
        self._check_usable()
        reads = list(reads)
        for read in reads:
            self._check_read(read)
        job = self._threads.start(reads)
        if not job:
            raise _closed()
        return job

    def done(self, job: int) -> bool:
        """Whether it has ended, in whatever way. Raises ValueError, ReaderClosed."""
        return self._outcome(job, 0).state is not State.RUNNING

    def wait(self, job: int, timeout_s: float | None = None) -> None:
        """Until all of its bytes are there. Any number of threads may wait for one job, and none
        holds the interpreter's lock. Raises ReadFailed or ReadCancelled, whereupon what lies at
        its addresses is undefined; ReadTimedOut, whereupon it goes on; ValueError, ReaderClosed."""
        outcome = self._ended(job, timeout_s)
        if outcome.state is State.FAILED:
            raise self._failed(outcome)
        if outcome.state is State.CANCELLED:
            raise ReadCancelled(f"job {job} was cancelled: start it again if its bytes are wanted")
        if outcome.state is State.RUNNING:
            raise ReadTimedOut(
                f"after {timeout_s} s job {job} has not been read: the disk is slower than that, "
                "or hangs; allow it more time, or look at the disk"
            )

    def cancel(self, job: int) -> None:
        """What of it has not begun is not read. Returns when no thread writes to its addresses any
        more. A job that has ended stays what it was. Raises ValueError, ReaderClosed."""
        self._check_process()
        self._threads.cancel(job)
        self._ended(job, None)

    def times(self, job: int) -> tuple[float, float]:
        """When the job's first piece was begun and when it ended, by time.monotonic's clock; known
        of the last MAX_ENDED jobs that ended. Raises ValueError, ReaderClosed."""
        outcome = self._outcome(job, 0)
        if outcome.state is State.RUNNING:
            raise ValueError(f"job {job} has not ended: wait for it first")
        return outcome.begin_ns / 1e9, outcome.end_ns / 1e9

    def statistics(self) -> Statistics:
        """What was done so far. Raises ReaderClosed."""
        self._check_process()
        num_bytes, reading_ns = self._threads.statistics()
        return Statistics(num_bytes, reading_ns / 1e9)

    def close(self) -> None:
        """Cancel all jobs, and return when no thread is left. In a forked child, where there are
        none, only what it inherited is closed. Whoever waits for a job is told ReadCancelled."""
        self._threads.stop()
        self._end()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _check_process(self) -> None:
        if self._threads.pid not in (None, os.getpid()):
            raise ReaderClosed(
                f"this reader's threads are in process {self._threads.pid}: make a reader in "
                "each process, after the fork"
            )

    def _check_usable(self) -> None:
        self._check_process()
        if not self._end.alive:
            raise _closed()

    def _opened(self, file: int) -> OpenedFile:
        if file not in self._files:
            raise ValueError(f"there is no file {file}: open it with this reader first")
        return self._files[file]

    def _check_read(self, read: Read) -> None:
        self._opened(read.file)
        if read.begin < 0 or read.num_bytes < 0 or read.address < 0:
            raise ValueError(f"{read}: a place or a size below 0")
        if max(read.begin, read.address) > _MAX_PLACE - read.num_bytes:
            raise ValueError(f"{read}: a place beyond all there are")
        if read.in_blocks and read.address % BLOCK != read.begin % BLOCK:
            raise ValueError(f"{read}: the address must be as far into a block of {BLOCK} as begin")

    def _outcome(self, job: int, timeout_s: float) -> Outcome:
        self._check_process()
        outcome = self._threads.wait(job, timeout_s)
        if outcome.state is State.UNKNOWN:
            raise ValueError(
                f"there is no job {job}: only the last {MAX_ENDED} that ended are remembered"
            )
        return outcome

    def _ended(self, job: int, timeout_s: float | None) -> Outcome:
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while True:
            left = _SLICE_S if deadline is None else deadline - time.monotonic()
            outcome = self._outcome(job, max(0.0, min(left, _SLICE_S)))
            if outcome.state is not State.RUNNING or left <= 0:
                return outcome

    def _failed(self, outcome: Outcome) -> ReadFailed:
        path = self._opened(outcome.file).path
        if not outcome.error:
            message = (
                f"{path} became shorter while it was read: nothing is left at byte "
                f"{outcome.begin}. Put the file back, and start again"
            )
        else:
            message = f"{path} can't be read at byte {outcome.begin}: {_reason(outcome.error)}"
        return ReadFailed(message, outcome.error, path, outcome.begin)


def _make_threads(
    num_threads: int, piece_bytes: int, delay: tuple[int, float] | None
) -> ReadingThreads:
    try:
        return NativeThreads(num_threads, piece_bytes, delay)
    except Unavailable as reason:
        _log.warning(
            "files are read by the interpreter's own threads, which other threads hold up (%s): "
            "install a C++ compiler, then onecopy again",
            str(reason),  # with its frames the error would keep the reader
        )
        return PythonThreads(num_threads, piece_bytes, delay)


def _end(threads: ReadingThreads, files: dict[int, OpenedFile]) -> None:
    threads.stop()
    for file in list(files.values()):
        file.close()


def _closed() -> ReaderClosed:
    return ReaderClosed("this reader is closed: make another")


def _reason(error: int) -> str:
    if error == EIO:
        return f"{os.strerror(error)}: the disk or its filesystem failed, the kernel's log has more"
    if error == EFAULT:
        return f"{os.strerror(error)}: not all of the memory that it goes to is mapped for writing"
    return os.strerror(error)
