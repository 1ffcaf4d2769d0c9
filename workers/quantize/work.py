"""All units, by several threads: rounding those that are not done, and reading everything again.

Owns the threads and their order. Invariants: memory is that of the threads' buffers, and a byte for
each unit; the first error stops all of them, and no thread is left when it is told; what is said to
be done was on the disk, and was read back from there with its digest.
"""

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from typing import Final

from workers.errors import OutputDamaged
from workers.quantize.journal import Journal
from workers.quantize.plan import Plan
from workers.quantize.request import Progress, Tell
from workers.quantize.source import Source
from workers.quantize.tile import Rounding
from workers.quantize.units import UnitWorker

_TELL_S: Final = 0.2
_REST_S: Final = 0.05


class Work:
    """On one output."""

    def __init__(
        self,
        plan: Plan,
        source: Source,
        files: Sequence[int],
        journal: Journal,
        rounding: Rounding,
        num_threads: int,
    ):
        self._plan = plan
        self._files = files
        self._journal = journal
        *self._workers, self._reader = [
            UnitWorker(plan, source, files, rounding) for _ in range(num_threads + 1)
        ]
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._rounded_bytes = self._verified_bytes = 0
        self._to_verify: deque[int] = deque()
        self.resumed_bytes = 0
        """Of the source, which an earlier run has left."""
        self.rounded_s = 0.0
        """Until everything was written, though not all of it was on the disk."""

    def run(self, tell: Tell) -> None:
        """Until the disk has all of it, and it was read back. Raises WorkerError, DiskFull,
        OSError."""
        numbers = iter(range(self._plan.num_units))
        rounded = threading.Event()

        def round_all(worker: UnitWorker) -> None:
            while (number := self._next(numbers)) is not None:
                self._round(worker, number)

        def verify_meanwhile() -> None:
            while not rounded.wait(_REST_S) and not self._stopping.is_set():
                for number in self._on_disk():
                    if rounded.is_set() or self._stopping.is_set():
                        self._to_verify.append(number)
                    else:
                        self._verify(self._reader, number)

        self._together(round_all, verify_meanwhile, rounded, lambda: tell(self._progress()))
        left = iter(self._on_disk())

        def verify_all(worker: UnitWorker) -> None:
            while (number := self._next(left)) is not None:
                self._verify(worker, number)

        self._together(verify_all, None, None, lambda: tell(self._progress()))

    def _together(
        self,
        each: Callable[[UnitWorker], None],
        beside: Callable[[], None] | None,
        ended: threading.Event | None,
        tell: Callable[[], None],
    ) -> None:
        """`each` in as many threads as there are workers, and one thing beside them."""
        count, began = len(self._workers) + 1, time.monotonic()
        with ThreadPoolExecutor(count, thread_name_prefix="quantize") as threads:
            working = {threads.submit(each, worker) for worker in self._workers}
            running = working | ({threads.submit(beside)} if beside is not None else set())
            try:
                while running:
                    over, running = wait(running, _TELL_S, FIRST_COMPLETED)
                    for future in over:
                        future.result()
                    if ended is not None and not working & running and not ended.is_set():
                        ended.set()
                        self.rounded_s = time.monotonic() - began
                    tell()
            except BaseException:
                self._stopping.set()
                raise

    def _next(self, numbers: Iterator[int]) -> int | None:
        with self._lock:
            return None if self._stopping.is_set() else next(numbers, None)

    def _round(self, worker: UnitWorker, number: int) -> None:
        num_bytes = self._plan.unit_bytes(self._plan.unit(number))
        digest = self._journal.digest(number)
        is_there = digest is not None and worker.written(number) == digest
        if not is_there:
            self._journal.done(number, worker.done(number))
        self._to_verify.append(number)
        with self._lock:
            self._rounded_bytes += num_bytes
            self.resumed_bytes += num_bytes * is_there

    def _on_disk(self) -> list[int]:
        """Units whose bytes the disk has, and memory has not any more."""
        numbers = [self._to_verify.popleft() for _ in range(len(self._to_verify))]
        for file in self._files:
            os.fdatasync(file)
        return numbers

    def _verify(self, worker: UnitWorker, number: int) -> None:
        unit = self._plan.unit(number)
        num_bytes = 0
        for extent in self._plan.extents(unit):
            os.posix_fadvise(
                *(self._files[extent.file], extent.begin, extent.num_bytes),
                os.POSIX_FADV_DONTNEED,
            )
            num_bytes += extent.num_bytes
        if worker.written(number) != self._journal.digest(number):
            raise OutputDamaged(
                f"what lies on the disk of {self._plan.tensors[unit.tensor].source.name} is not "
                "what was written: see whether the disk is sound, and run the same command again"
            )
        with self._lock:
            self._verified_bytes += num_bytes

    def _progress(self) -> Progress:
        total = self._plan.source_bytes
        if self._rounded_bytes < total:
            return Progress("rounding", self._rounded_bytes, total, self.resumed_bytes)
        return Progress(
            "verifying", self._verified_bytes, self._plan.unit_output_bytes, self.resumed_bytes
        )
