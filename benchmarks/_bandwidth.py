"""How fast this machine's memory is read: what a decoding step can't beat.

A buffer as large as the demo model's weights, each half looked through by a thread of its own for a
byte that isn't there (memchr(3): the C library's widest loads, nothing computed, no lock held).
"""

import ctypes
import mmap
import threading
import time

BUFFER_BYTES = 269_030_016
"""SmolLM2-135M in bfloat16, every byte of which one step reads."""


class ReadBandwidth:
    """The buffer, written once. `close` gives it back."""

    def __init__(self, num_threads: int):
        self._num_threads = num_threads
        self._memory = mmap.mmap(-1, BUFFER_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._address = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
        ctypes.memset(self._address, 1, BUFFER_BYTES)
        library = ctypes.CDLL(None)
        self._memchr = library.memchr
        self._memchr.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
        self._memchr.restype = ctypes.c_void_p

    def gb_per_s(self, passes: int = 5) -> float:
        """The best of some passes: what the machine can, not what its neighbours left."""
        return max(self._once() for _ in range(passes))

    def _once(self) -> float:
        part = BUFFER_BYTES // self._num_threads
        barrier = threading.Barrier(self._num_threads + 1)

        def read(begin: int) -> None:
            barrier.wait()
            assert self._memchr(self._address + begin, 0, part) is None

        threads = [
            threading.Thread(target=read, args=(index * part,))
            for index in range(self._num_threads)
        ]
        for one in threads:
            one.start()
        barrier.wait()
        started = time.perf_counter()
        for one in threads:
            one.join()
        return part * self._num_threads / (time.perf_counter() - started) / 1e9
