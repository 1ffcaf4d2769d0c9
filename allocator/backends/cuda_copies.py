"""Copies between a process's memory and a GPU's, through small pinned buffers; and zeros.

Owns the pinned buffers of one mapping. Invariants: a thread that copies has two buffers to itself
and fills one while the GPU empties the other, so a mapping pins at most 8 MiB a thread, and none
after `close`; a copy has ended when the call returns.

Why not let the driver copy from pageable memory: it has one staging buffer of its own, at which
threads would queue. Why not pin the source itself: pinning costs about what copying once does, and
these bytes are copied once. Both are beliefs; nothing here has been measured on a GPU yet.
"""

import contextlib
import ctypes
import os
import weakref
from collections.abc import Iterator
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from allocator.backends.cuda_driver import call, current

_BUFFER_BYTES: Final = 4 << 20

Bytes = npt.NDArray[np.uint8]


class _Buffer:
    """Pinned memory with a stream of its own, whose end of work is the end of its use."""

    def __init__(self, driver: Any) -> None:
        self.stream = _stream(driver)
        try:
            self.address = int(call(driver.cuMemHostAlloc, _BUFFER_BYTES, 0))
        except BaseException:
            call(driver.cuStreamDestroy, self.stream)
            raise
        memory = (ctypes.c_uint8 * _BUFFER_BYTES).from_address(self.address)
        self.bytes: Bytes = np.frombuffer(memoryview(memory).cast("B"), np.uint8)

    def wait(self, driver: Any) -> None:
        call(driver.cuStreamSynchronize, self.stream)

    def free(self, driver: Any) -> None:
        self.wait(driver)
        call(driver.cuStreamDestroy, self.stream)
        call(driver.cuMemFreeHost, self.address)


_Pair = tuple[_Buffer, _Buffer]


class Copier:
    """Copies for one mapping. Threads may call it at once."""

    def __init__(self, ordinal: int) -> None:
        """Of the device with this ordinal here."""
        self._ordinal = ordinal
        self._idle: list[_Pair] = []  # append and pop are atomic
        weakref.finalize(self, _free, os.getpid(), ordinal, self._idle).atexit = False

    def to_device(self, address: int, source: memoryview) -> None:
        """All of `source`, which lies contiguous. Raises DriverError."""
        given: Bytes = np.frombuffer(source, np.uint8)
        with current(self._ordinal) as driver, self._buffers(driver) as buffers:
            for number, start in enumerate(range(0, len(given), _BUFFER_BYTES)):
                buffer = buffers[number % 2]
                piece = given[start : start + _BUFFER_BYTES]
                buffer.wait(driver)
                buffer.bytes[: len(piece)] = piece
                call(
                    driver.cuMemcpyHtoDAsync,
                    *(address + start, buffer.address, len(piece), buffer.stream),
                )
            for buffer in buffers:
                buffer.wait(driver)

    def to_host(self, address: int, out: memoryview) -> None:
        """Fill `out`, which lies contiguous, with what is there when all work that was given to the
        device before this call has ended. Raises DriverError."""
        wanted: Bytes = np.frombuffer(out, np.uint8)
        with current(self._ordinal) as driver, self._buffers(driver) as buffers:
            call(driver.cuCtxSynchronize)
            begun: tuple[_Buffer, Bytes] | None = None
            for number, start in enumerate(range(0, len(wanted), _BUFFER_BYTES)):
                buffer, piece = buffers[number % 2], wanted[start : start + _BUFFER_BYTES]
                call(
                    driver.cuMemcpyDtoHAsync,
                    *(buffer.address, address + start, len(piece), buffer.stream),
                )
                _finish(driver, begun)
                begun = (buffer, piece)
            _finish(driver, begun)

    def close(self) -> None:
        """Free the buffers, once no thread copies any more. Idempotent."""
        _free(os.getpid(), self._ordinal, self._idle)

    @contextlib.contextmanager
    def _buffers(self, driver: Any) -> Iterator[_Pair]:
        try:
            pair = self._idle.pop()
        except IndexError:
            pair = (_Buffer(driver), _Buffer(driver))
        try:
            yield pair
        finally:
            self._idle.append(pair)


_erasing: dict[int, Any] = {}
"""Ordinal → a stream for `erase`, kept for the process's life."""


def erase(ordinal: int, address: int, num_bytes: int) -> None:
    """Zeros there, when this returns; other work of the device is not waited for. Raises
    DriverError."""
    with current(ordinal) as driver:
        if ordinal not in _erasing:
            _erasing[ordinal] = _stream(driver)
        call(driver.cuMemsetD8Async, address, 0, num_bytes, _erasing[ordinal])
        call(driver.cuStreamSynchronize, _erasing[ordinal])


def _stream(driver: Any) -> Any:
    # One that does not wait for torch's default stream, nor makes it wait.
    return call(driver.cuStreamCreate, driver.CUstream_flags.CU_STREAM_NON_BLOCKING)


def _free(pid: int, ordinal: int, idle: list[_Pair]) -> None:
    if not idle or os.getpid() != pid:  # what a forked child inherited is its parent's
        return
    with current(ordinal) as driver:
        while idle:
            for buffer in idle.pop():
                buffer.free(driver)


def _finish(driver: Any, begun: tuple[_Buffer, Bytes] | None) -> None:
    if begun is not None:
        buffer, piece = begun
        buffer.wait(driver)
        piece[:] = buffer.bytes[: len(piece)]
