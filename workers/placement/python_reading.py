"""Threads that read where no library could be compiled: the interpreter's own.

Invariant: they do what those of reader.cpp do, piece by piece; but they take the interpreter's lock
between pieces, so a program that holds it holds them up.
"""

import ctypes
import os
import random
import signal
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from errno import EAGAIN
from typing import Final

from workers.placement.opened_file import REFUSALS, UNCACHED_FLAG
from workers.placement.reading import BLOCK, MAX_AGAIN, MAX_ENDED, Access, Outcome, Read, State


@dataclass
class _File:
    descriptor: int
    direct: int
    access: Access
    falls_back: bool


@dataclass
class _Job:
    number: int
    pieces: deque[Read]
    """Those that nobody has taken."""
    num_under_way: int = 0
    outcome: Outcome = field(default_factory=lambda: Outcome(State.RUNNING))

    @property
    def abandoned(self) -> bool:
        """Cancelled or failed: no piece begins, none goes on."""
        return self.outcome.state is not State.RUNNING

    @property
    def ended(self) -> bool:
        return self.abandoned and not self.num_under_way


class PythonThreads:
    """See `workers.placement.reading.ReadingThreads`."""

    def __init__(self, num_threads: int, piece_bytes: int, delay: tuple[int, float] | None) -> None:
        self.pid: int | None = None
        self._num_threads: Final = num_threads
        self._piece_bytes: Final = piece_bytes
        seed, self._delay_s = delay or (0, 0.0)
        self._random: Final = random.Random(seed)  # noqa: S311 - for tests
        self._changed: Final = threading.Condition()  # over all that follows
        self._files: list[_File] = []
        self._queue: deque[_Job] = deque()
        self._jobs: dict[int, _Job] = {}
        self._ended: OrderedDict[int, None] = OrderedDict()
        self._num_jobs = 0
        self._threads: list[threading.Thread] = []
        self._stopping = False
        self._num_bytes = 0
        self._reading_ns = 0

    def add(self, descriptor: int, direct: int, access: Access, falls_back: bool) -> int:
        """See ReadingThreads."""
        with self._changed:
            self._files.append(_File(descriptor, direct, access, falls_back))
            return len(self._files) - 1

    def access(self, file: int) -> Access:
        """See ReadingThreads."""
        return self._files[file].access

    def start(self, reads: Sequence[Read]) -> int:
        """See ReadingThreads."""
        self.pid = self.pid or os.getpid()
        with self._changed:
            if self._stopping:
                return 0
            self._start_threads()
            self._num_jobs += 1
            job = _Job(self._num_jobs, deque(self._cut(reads)))
            self._jobs[job.number] = job
            if job.pieces:
                self._queue.append(job)
                self._changed.notify_all()
            else:
                self._end(job, State.READ)
            return job.number

    def wait(self, job: int, timeout_s: float) -> Outcome:
        """See ReadingThreads."""
        with self._changed:
            found = self._jobs.get(job)
            if found is None:
                return Outcome(State.UNKNOWN)
            if timeout_s > 0:
                self._changed.wait_for(lambda: found.ended, timeout_s)
            return found.outcome if found.ended else found.outcome._replace(state=State.RUNNING)

    def cancel(self, job: int) -> None:
        """See ReadingThreads."""
        with self._changed:
            found = self._jobs.get(job)
            if found is not None and not found.abandoned:
                self._abandon(found, State.CANCELLED)

    def statistics(self) -> tuple[int, int]:
        """See ReadingThreads."""
        with self._changed:
            return self._num_bytes, self._reading_ns

    def stop(self) -> None:
        """See ReadingThreads."""
        if self.pid not in (None, os.getpid()):
            return
        with self._changed:
            self._stopping = True
            for job in list(self._jobs.values()):
                if not job.abandoned:
                    self._abandon(job, State.CANCELLED)
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    def _start_threads(self) -> None:
        """All, or as many as are to be had. The lock is held."""
        for _ in range(self._num_threads - len(self._threads)):
            thread = threading.Thread(target=self._work, name="onecopy:read", daemon=True)
            try:
                thread.start()
            except RuntimeError as error:
                if self._threads:
                    return
                raise OSError(EAGAIN, f"no thread to read with: {error}") from error
            self._threads.append(thread)

    def _cut(self, reads: Sequence[Read]) -> Iterator[Read]:
        """Cut at multiples of the block, so that no two pieces of a read share one."""
        for read in reads:
            at, end = read.begin, read.begin + read.num_bytes
            while at < end:
                limit = min(end, at - at % BLOCK + self._piece_bytes)
                address = read.address + at - read.begin
                yield Read(read.file, at, limit - at, address, read.in_blocks)
                at = limit

    def _work(self) -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        with self._changed:
            while True:
                self._changed.wait_for(lambda: self._stopping or self._queue)
                if not self._queue:
                    return
                job = self._queue[0]
                piece = job.pieces.popleft()
                if not job.pieces:
                    self._queue.popleft()
                if not job.outcome.begin_ns:
                    job.outcome = job.outcome._replace(begin_ns=time.monotonic_ns())
                job.num_under_way += 1
                self._delay(job)
                failure = None if job.abandoned else self._read_unlocked(piece, job)
                job.num_under_way -= 1
                if failure is not None and not job.abandoned:
                    job.outcome = job.outcome._replace(error=failure[0], begin=failure[1])
                    job.outcome = job.outcome._replace(file=piece.file)
                    self._abandon(job, State.FAILED)
                elif job.ended:
                    self._end(job, job.outcome.state)
                elif not job.num_under_way and not job.pieces:
                    self._end(job, State.READ)

    def _delay(self, job: _Job) -> None:
        """Before a piece is read, if somebody asked for it: over as soon as the job is."""
        if self._delay_s > 0:
            most_s = self._random.uniform(0, self._delay_s)
            self._changed.wait_for(lambda: job.abandoned, most_s)

    def _abandon(self, job: _Job, state: State) -> None:
        """Nothing more of it is read. The lock is held."""
        if job in self._queue:
            self._queue.remove(job)
        job.pieces.clear()
        if job.num_under_way:
            job.outcome = job.outcome._replace(state=state)
            self._changed.notify_all()
        else:
            self._end(job, state)

    def _end(self, job: _Job, state: State) -> None:
        """Forgets the job that ended MAX_ENDED before it. The lock is held."""
        now = time.monotonic_ns()
        begin_ns = job.outcome.begin_ns or now
        job.outcome = job.outcome._replace(state=state, begin_ns=begin_ns, end_ns=now)
        self._ended[job.number] = None
        if len(self._ended) > MAX_ENDED:
            del self._jobs[self._ended.popitem(last=False)[0]]
        self._changed.notify_all()

    def _read_unlocked(self, piece: Read, job: _Job) -> tuple[int, int] | None:
        """An errno, or 0 for a file's end, and where; None when all is there."""
        self._changed.release()
        begin_ns, num_bytes = time.monotonic_ns(), 0
        try:
            for reached in self._progress(piece):
                num_bytes = reached - piece.begin
                if job.abandoned:
                    break
        except OSError as error:
            return error.errno or 0, piece.begin + num_bytes
        except EOFError:
            return 0, piece.begin + num_bytes
        finally:
            reading_ns = time.monotonic_ns() - begin_ns
            self._changed.acquire()
            self._num_bytes += num_bytes
            self._reading_ns += reading_ns
        return None

    def _progress(self, piece: Read) -> Iterator[int]:
        """Reads all of it; yields after each call up to where in the file it is there. Raises
        OSError, EOFError."""
        file = self._files[piece.file]
        at, end = piece.begin, piece.begin + piece.num_bytes
        num_again, within_block = 0, False
        while at < end:
            access = Access.BUFFERED if within_block else file.access
            if access is Access.DIRECT and not piece.in_blocks:
                access = Access.BUFFERED
            direct = access is Access.DIRECT
            start = at - at % BLOCK if direct else at
            stop = end + -end % BLOCK if direct else end
            address = piece.address + (start - piece.begin)
            target = (ctypes.c_char * (stop - start)).from_address(address)
            descriptor = file.direct if direct else file.descriptor
            flags = UNCACHED_FLAG if access is Access.UNCACHED else 0
            try:
                count = os.preadv(descriptor, [target], start, flags)
            except OSError as error:
                if error.errno == EAGAIN and (num_again := num_again + 1) < MAX_AGAIN:
                    time.sleep(0.001)
                elif (
                    error.errno not in REFUSALS or access is Access.BUFFERED or not file.falls_back
                ):
                    raise
                else:
                    file.access = Access.BUFFERED
                yield at
                continue
            num_again = 0
            reached = min(end, start + count)
            if access is Access.BUFFERED and count:
                first = start - start % BLOCK
                past = start + count + -(start + count) % BLOCK
                os.posix_fadvise(descriptor, first, past - first, os.POSIX_FADV_DONTNEED)
            if direct and count % BLOCK:
                within_block = True  # the file's end, where direct reads stop
            elif reached <= at:
                raise EOFError
            at = max(at, reached)
            yield at
