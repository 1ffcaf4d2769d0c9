"""Threads that read without the interpreter's lock: the library compiled from reader.cpp.

Owns its handle and its C structures. Invariants: the structures are those of reader.cpp, and their
sizes are compared; a handle is given back when nothing can call it any more.
"""

import ctypes
import functools
import os
import sysconfig
import weakref
from array import array
from collections.abc import Sequence
from ctypes import POINTER, byref, c_double, c_int32, c_int64, c_uint64, c_void_p
from errno import ENOMEM, ESHUTDOWN
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar, Final

from workers.model.native.library import Unavailable
from workers.placement.reading import Access, Outcome, Read, State

FILE: Final = Path(__file__).with_name(f"_reader{sysconfig.get_config_var('EXT_SUFFIX')}")
_READ_BYTES: Final = 5 * ctypes.sizeof(c_int64)


class _Outcome(ctypes.Structure):
    """Outcome."""

    _fields_: ClassVar = [
        (name, c_int64) for name in ("state", "error", "file", "begin", "begin_ns", "end_ns")
    ]


class _Statistics(ctypes.Structure):
    """Statistics."""

    _fields_: ClassVar = [("num_bytes", c_int64), ("reading_ns", c_int64)]


@functools.cache
def load() -> Any:
    """The library. Raises Unavailable."""
    if not FILE.exists():
        raise Unavailable("not compiled when onecopy was installed")
    library = ctypes.CDLL(str(FILE))
    sizes = {
        "read": _READ_BYTES,
        "outcome": ctypes.sizeof(_Outcome),
        "statistics": ctypes.sizeof(_Statistics),
    }
    for name, num_bytes in sizes.items():
        size_of = getattr(library, f"onecopy_reader_size_of_{name}", None)
        if size_of is None or size_of() != num_bytes:
            raise Unavailable(f"{FILE.name} was compiled from other sources: build it again")
    for name, result, arguments in (
        ("create", c_void_p, [c_int32, c_int64, c_uint64, c_double]),
        ("add", c_int64, [c_void_p, c_int32, c_int32, c_int32, c_int32]),
        ("access", c_int32, [c_void_p, c_int64]),
        ("start", c_int64, [c_void_p, c_void_p, c_int64]),
        ("wait", None, [c_void_p, c_int64, c_int64, POINTER(_Outcome)]),
        ("cancel", None, [c_void_p, c_int64]),
        ("statistics", None, [c_void_p, POINTER(_Statistics)]),
        ("stop", None, [c_void_p]),
        ("destroy", None, [c_void_p]),
    ):
        function = getattr(library, f"onecopy_reader_{name}")
        function.restype = result
        function.argtypes = arguments
    return library


class NativeThreads:
    """See `workers.placement.reading.ReadingThreads`."""

    def __init__(self, num_threads: int, piece_bytes: int, delay: tuple[int, float] | None) -> None:
        """Raises Unavailable, MemoryError."""
        self._library = load()
        seed, most_s = delay or (0, 0.0)
        handle = self._library.onecopy_reader_create(num_threads, piece_bytes, seed, most_s)
        if not handle:
            raise MemoryError("no memory for a reader")
        self.handle: Final = c_void_p(handle)
        self.pid: int | None = None
        # When the interpreter ends, a thread may still be inside: the process takes it along.
        weakref.finalize(self, self._library.onecopy_reader_destroy, self.handle).atexit = False

    def add(self, descriptor: int, direct: int, access: Access, falls_back: bool) -> int:
        """See ReadingThreads."""
        number: int = self._library.onecopy_reader_add(
            self.handle, descriptor, direct, access, falls_back
        )
        if number == -ENOMEM:
            raise MemoryError("no memory for a reader's file")
        return number

    def access(self, file: int) -> Access:
        """See ReadingThreads."""
        return Access(self._library.onecopy_reader_access(self.handle, file))

    def start(self, reads: Sequence[Read]) -> int:
        """See ReadingThreads."""
        self.pid = self.pid or os.getpid()
        words = array("q", chain.from_iterable(reads))
        job: int = self._library.onecopy_reader_start(
            self.handle, words.buffer_info()[0], len(reads)
        )
        if job == -ENOMEM:
            raise MemoryError("no memory for a reader's job")
        if job < 0 and job != -ESHUTDOWN:
            raise OSError(-job, f"no thread to read with: {os.strerror(-job)}")
        return max(job, 0)

    def wait(self, job: int, timeout_s: float) -> Outcome:
        """See ReadingThreads."""
        found = _Outcome()
        self._library.onecopy_reader_wait(self.handle, job, int(timeout_s * 1e9), byref(found))
        return Outcome(
            State(found.state),
            *(found.error, found.file, found.begin, found.begin_ns, found.end_ns),
        )

    def cancel(self, job: int) -> None:
        """See ReadingThreads."""
        self._library.onecopy_reader_cancel(self.handle, job)

    def statistics(self) -> tuple[int, int]:
        """See ReadingThreads."""
        found = _Statistics()
        self._library.onecopy_reader_statistics(self.handle, byref(found))
        return found.num_bytes, found.reading_ns

    def stop(self) -> None:
        """See ReadingThreads."""
        self._library.onecopy_reader_stop(self.handle)
