"""What the allocator itself costs: the arena, a request's round trip, attaching to a sealed set.

arena        allocate + free pairs a second, with 10² to 10⁵ live extents
round_trip   a request for a sealed set's handle and its reply, alone and beside 8 busy client
             processes that ask for the same and give it back, as fast as they can
attach       open, map and build the tensors of a sealed set of 1,000 tensors, at two sizes

  python benchmarks/allocator_costs.py [--large-gb 8]
"""

import argparse
import json
import multiprocessing
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

from _machine import describe_machine, spread, steal_ticks

from allocator import (
    ALIGNMENT,
    Client,
    Manifest,
    TensorEntry,
    WeightSetWriter,
    connect,
    manifest_bytes,
)
from allocator.daemon.pool.arena import Arena
from allocator.messages import Done, Open, Release, Sealed

NUM_TENSORS = 1000
NUM_BUSY = 8


def main() -> None:
    """Print one JSON document."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--large-gb", type=float, default=8.0)
    arguments = parser.parse_args()
    steal = steal_ticks()
    with tempfile.TemporaryDirectory(prefix="onecopy-bench-") as folder:
        ready_read, ready_write = os.pipe()
        command = [sys.executable, "-P", "-m", "allocator", "--quiet", "--runtime-dir", folder]
        daemon = subprocess.Popen(
            [*command, "--ready-fd", str(ready_write)], pass_fds=[ready_write]
        )
        os.close(ready_write)
        os.read(ready_read, 1)
        try:
            with connect(folder) as memory:
                document = {
                    "benchmark": "allocator_costs",
                    **describe_machine(),
                    "arena_pairs_per_s": {
                        str(live): _arena_pairs(live) for live in (100, 1000, 10_000, 100_000)
                    },
                    "round_trip_us": _round_trips(memory, Path(folder)),
                    "attach_ms": _attaches(memory, [100e6, arguments.large_gb * 1e9]),
                }
        finally:
            daemon.terminate()
            daemon.wait()
    print(json.dumps({**document, "steal_ticks": steal_ticks() - steal}, indent=2))


def _arena_pairs(num_live: int, num_pairs: int = 100_000) -> int:
    """Median of three runs, random sizes of up to 1 MB."""
    chance = random.Random(0)
    rates = []
    for _ in range(3):
        arena = Arena(1 << 40, ALIGNMENT)
        live = [arena.allocate(chance.randrange(1, 1 << 20)) for _ in range(num_live)]
        sizes = [chance.randrange(1, 1 << 20) for _ in range(num_pairs)]
        victims = [chance.randrange(num_live) for _ in range(num_pairs)]
        started = time.perf_counter()
        for size, victim in zip(sizes, victims, strict=True):
            arena.free(live[victim])
            live[victim] = arena.allocate(size)
        rates.append(num_pairs / (time.perf_counter() - started))
    return round(statistics.median(rates))


def _round_trips(memory: Client, runtime_dir: Path) -> dict[str, Any]:
    _seal(memory, 1_000_000)
    context = multiprocessing.get_context("spawn")
    stop = context.Event()
    alone = _time_requests(memory)
    busy = [context.Process(target=_be_busy, args=(runtime_dir, stop)) for _ in range(NUM_BUSY)]
    for process in busy:
        process.start()
    while memory.statistics().num_sessions <= NUM_BUSY:
        os.sched_yield()
    beside = _time_requests(memory)
    stop.set()
    for process in busy:
        process.join()
    return {"alone": alone, f"beside_{NUM_BUSY}_busy_clients": beside}


def _be_busy(runtime_dir: Path, stop: Event) -> None:
    with connect(runtime_dir) as memory:
        while not stop.is_set():
            _ask_for_handle(memory)


def _ask_for_handle(memory: Client) -> float:
    """Seconds until the handle is there; giving it back is not counted."""
    started = time.perf_counter()
    opened = Open(key="bench-1000000", fingerprint={}, wait_ms=0)
    handle = memory.request(opened, Sealed).handle
    elapsed = time.perf_counter() - started
    memory.request(Release(key=opened.key, generation=handle.generation), Done)
    return elapsed


def _time_requests(memory: Client, count: int = 3000) -> dict[str, float]:
    times = []
    for _ in range(count):
        times.append(_ask_for_handle(memory) * 1e6)
    times.sort()
    return {"p50": round(times[count // 2], 1), "p99": round(times[count * 99 // 100], 1)}


def _attaches(memory: Client, sizes: list[float]) -> dict[str, Any]:
    keys = {f"{size / 1e9:g} GB": _seal(memory, int(size)) for size in sizes}
    times: dict[str, list[float]] = {name: [] for name in keys}
    for _ in range(21):
        for name, key in keys.items():  # interleaved
            started = time.perf_counter()
            reader = memory.open_weight_set(key, {})
            assert not isinstance(reader, WeightSetWriter)
            tensors = reader.tensors()
            times[name].append((time.perf_counter() - started) * 1000)
            assert len(tensors) == NUM_TENSORS
            del tensors
            reader.release()
    return {name: spread(values) for name, values in times.items()}


def _seal(memory: Client, num_bytes: int) -> str:
    """A set of 1,000 bfloat16 tensors whose pages are committed and never written."""
    each = num_bytes // NUM_TENSORS // ALIGNMENT * ALIGNMENT
    entries = {
        f"model.layers.{i}.weight": TensorEntry(
            dtype="bfloat16", shape=(each // 2,), stride=(1,), offset=i * each, num_bytes=each
        )
        for i in range(NUM_TENSORS)
    }
    manifest = Manifest(version=1, tensors=entries, metadata={})
    key = f"bench-{num_bytes}"
    writer = memory.open_weight_set(key, {})
    assert isinstance(writer, WeightSetWriter)
    writer.reserve(each * NUM_TENSORS + manifest_bytes(manifest))
    writer.seal(manifest, each * NUM_TENSORS).release()
    return key


if __name__ == "__main__":
    main()
