"""What every benchmark says of the machine and the commit it ran on."""

import os
import platform
import statistics
import time
from pathlib import Path
from typing import TypedDict

import numpy as np
from _commit import commit


class Machine(TypedDict):
    """Where and what was measured."""

    commit: str
    cpu: str
    num_cores: int
    memory_bytes: int
    memory_read_gb_s: float
    kernel: str
    python: str


def describe_machine() -> Machine:
    """Read from git and from the kernel."""
    cpus = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.split(":")[1].strip() for line in cpus if "model name" in line), "unknown")
    return Machine(
        commit=commit(),
        cpu=model,
        num_cores=len(os.sched_getaffinity(0)),
        memory_read_gb_s=round(memory_read_gb_s(), 1),
        memory_bytes=os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        kernel=platform.release(),
        python=platform.python_version(),
    )


def memory_read_gb_s() -> float:
    """How fast one thread adds up 256 MB now, the best of three. Other guests of the host may take
    nine tenths of it, and steal does not tell."""
    numbers = np.ones(32 << 20)
    times = []
    for _ in range(3):
        begun = time.perf_counter()
        numbers.sum()
        times.append(time.perf_counter() - begun)
    return numbers.nbytes / min(times) / 1e9


def steal_ticks() -> int:
    """Clock ticks that the host took from this machine's processors since boot (proc(5), stat)."""
    return int(Path("/proc/stat").read_text().splitlines()[0].split()[8])


def percentiles(values: list[float]) -> dict[str, float]:
    """Median, 95th and 99th percentile and the largest of many measurements."""
    ordered = sorted(values)
    ranks = {f"p{rank}": ordered[(len(ordered) - 1) * rank // 100] for rank in (50, 95, 99)}
    return {name: round(value, 1) for name, value in {**ranks, "max": ordered[-1]}.items()} | {
        "num": len(ordered)
    }


def spread(values: list[float], digits: int = 1) -> dict[str, float]:
    """Median and extremes of repeated measurements."""
    ordered = sorted(values)
    return {
        "median": round(statistics.median(ordered), digits),
        "min": round(ordered[0], digits),
        "max": round(ordered[-1], digits),
        "num": len(ordered),
    }
