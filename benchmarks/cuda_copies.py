"""How fast a weight set in host memory reaches a GPU, and comes back.

write       `Mapping.write` from shared memory, by 1, 2, 4 and 8 threads in pieces of 32 MiB
pageable    one copy by the driver from memory that is not pinned
registered  the same bytes: pinned (cuMemHostRegister), one copy, unpinned again
pinned      the copy alone, from memory that is pinned already: what the link can do; on one stream,
            and in halves on two
read        `Mapping.read` into shared memory, by one thread
In turns in one run; medians. Prints why where there is no GPU.

  python benchmarks/cuda_copies.py [--gb 2] [--rounds 5]
"""

import argparse
import json
import mmap
import os
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from _machine import describe_machine, spread

from allocator.backends import open_device
from allocator.backends.cuda import CUDABackend
from allocator.backends.cuda_driver import call, current
from allocator.backends.cuda_memory import CUDAMapping
from allocator.errors import InvalidSetting
from allocator.messages import Handle

PIECE_BYTES = 32 << 20
THREADS = (1, 2, 4, 8)


def main() -> None:
    """Print one JSON document."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gb", type=float, default=2.0)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    document: dict[str, Any] = {"benchmark": "cuda_copies", **describe_machine()}
    try:
        backend = open_device("cuda:0")
    except InvalidSetting as error:
        print(json.dumps({**document, "skipped": str(error)}, indent=2))
        return
    assert isinstance(backend, CUDABackend)
    num_bytes = int(arguments.gb * 1e9) >> 12 << 12
    with tempfile.TemporaryFile(dir="/dev/shm", prefix="onecopy-bench-") as file:
        os.posix_fallocate(file.fileno(), 0, num_bytes)
        source = mmap.mmap(file.fileno(), num_bytes)
        np.frombuffer(source, np.uint8)[:] = 7
        mapping = _mapped(backend, num_bytes)
        rates = _measure(mapping, memoryview(source), arguments.rounds)
        mapping.close()
    model = backend._device.model
    print(json.dumps({**document, "device": model, "gb_per_s": rates}, indent=2))


def _mapped(backend: CUDABackend, num_bytes: int) -> CUDAMapping:
    handle = Handle(
        backend="cuda", device=backend.device, segment="bench", num_bytes=num_bytes, generation=1
    )
    backend.reserve("bench", num_bytes)
    descriptor = backend.export("bench")
    try:
        return backend.map(handle, writable=True, descriptor=descriptor)
    finally:
        os.close(descriptor)


def _measure(mapping: CUDAMapping, source: memoryview, rounds: int) -> dict[str, Any]:
    ways: dict[str, Callable[[], float]] = {
        f"write_{n}_threads": lambda n=n: _write(mapping, source, n) for n in THREADS
    }
    ways["pageable"] = lambda: _pageable(mapping, source)
    ways["registered"] = lambda: _registered(mapping, source, 1)[0]
    ways["pinned_1_stream"] = lambda: _registered(mapping, source, 1)[1]
    ways["pinned_2_streams"] = lambda: _registered(mapping, source, 2)[1]
    ways["read_1_thread"] = lambda: _timed(lambda: mapping.read(0, source))
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds + 1):
        for name, way in ways.items():
            times[name].append(way())
    return {name: spread([len(source) / 1e9 / s for s in some[1:]]) for name, some in times.items()}


def _write(mapping: CUDAMapping, source: memoryview, num_threads: int) -> float:
    def piece(start: int) -> None:
        mapping.write(start, source[start : start + PIECE_BYTES])

    with ThreadPoolExecutor(num_threads) as threads:
        return _timed(lambda: list(threads.map(piece, range(0, len(source), PIECE_BYTES))))


def _pageable(mapping: CUDAMapping, source: memoryview) -> float:
    address = np.frombuffer(source, np.uint8).ctypes.data
    with current(mapping.__dlpack_device__()[1]) as driver:
        return _timed(lambda: call(driver.cuMemcpyHtoD, mapping.address, address, len(source)))


def _registered(mapping: CUDAMapping, source: memoryview, num_streams: int) -> tuple[float, float]:
    """Seconds with pinning and unpinning, and without; a part of the bytes on each stream."""
    address = np.frombuffer(source, np.uint8).ctypes.data
    with current(mapping.__dlpack_device__()[1]) as driver:
        streams = [call(driver.cuStreamCreate, 1) for _ in range(num_streams)]  # non-blocking
        started = time.perf_counter()
        call(driver.cuMemHostRegister, address, len(source), 0)
        pinned = time.perf_counter()
        part = -(-len(source) // num_streams)
        for stream, begin in zip(streams, range(0, len(source), part), strict=True):
            size = min(part, len(source) - begin)
            call(driver.cuMemcpyHtoDAsync, mapping.address + begin, address + begin, size, stream)
        for stream in streams:
            call(driver.cuStreamSynchronize, stream)
        copied = time.perf_counter()
        call(driver.cuMemHostUnregister, address)
        ended = time.perf_counter()
        for stream in streams:
            call(driver.cuStreamDestroy, stream)
        return ended - started, copied - pinned


def _timed(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
