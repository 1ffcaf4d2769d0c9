"""What a sum over the ranks of one host costs, beside torch.distributed's over gloo.

Ranks are processes, each on a core of its own where there are as many. All three ways take turns,
so that what else the machine does hits them alike: `library` is a call of the compiled function,
which is what the native decoder pays, `python` one of `AllReduce.sum`.

    python benchmarks/all_reduce.py [--ranks 2] [--rows 8] [--width 576] [--sums 3000] [--turns 5]
"""

import argparse
import json
import mmap
import os
import tempfile
import time
from collections.abc import Callable
from ctypes import byref, c_int64
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from _machine import describe_machine, percentiles, steal_ticks

from workers.placement.all_reduce import AllReduce, form, num_bytes

TIMEOUT_S = 60.0


def main() -> None:
    """Print one JSON document."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("ranks", 2), ("rows", 8), ("width", 576), ("sums", 3000), ("turns", 5)):
        parser.add_argument(f"--{name}", type=int, default=default)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    machine, steal = describe_machine(), steal_ticks()
    count = arguments.rows * arguments.width
    size = num_bytes(arguments.ranks, count)
    memory = torch.frombuffer(mmap.mmap(-1, size), dtype=torch.uint8)
    form(memory, arguments.ranks, count)
    with tempfile.TemporaryDirectory(prefix="onecopy-bench-") as folder:
        children = [
            _forked(lambda rank=rank: _rank(rank, memory, arguments, Path(folder)))
            for rank in range(1, arguments.ranks)
        ]
        times = _rank(0, memory, arguments, Path(folder))
        for child in children:
            _, status = os.waitpid(child, 0)
            assert status == 0, f"a rank ended with {status}"
    document = {
        "benchmark": "all_reduce",
        **machine,
        "steal_ticks": steal_ticks() - steal,
        **{name: getattr(arguments, name) for name in ("ranks", "rows", "width")},
        **{f"{way}_us": percentiles(values) for way, values in times.items()},
    }
    print(json.dumps(document, indent=2))


def _forked(work: Callable[[], Any]) -> int:
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            work()
            status = 0
        finally:
            os._exit(status)
    return pid


def _rank(
    rank: int, memory: torch.Tensor, arguments: argparse.Namespace, folder: Path
) -> dict[str, list[float]]:
    """Microseconds of every sum, as this rank saw them."""
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[rank % len(cores)]})
    torch.distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=arguments.ranks,
        timeout=timedelta(seconds=TIMEOUT_S),
    )
    times: dict[str, list[float]] = {"library": [], "python": [], "gloo": []}
    with AllReduce(memory, rank, arguments.ranks, TIMEOUT_S) as group:
        values = torch.zeros(arguments.rows, arguments.width)
        ways = {
            "library": _library_call(group, values),
            "python": lambda: group.sum(values),
            "gloo": lambda: torch.distributed.all_reduce(values),
        }
        for _ in range(arguments.turns):
            for way, call in ways.items():
                times[way] += _timed(call, arguments.sums)
    torch.distributed.destroy_process_group()
    return times


def _library_call(group: AllReduce, values: torch.Tensor) -> Callable[[], object]:
    outcome, function = (c_int64 * 2)(), group._library["onecopy_group_all_reduce"]
    arguments = (
        group.handle,
        c_int64(values.data_ptr()),
        c_int64(values.numel()),
        c_int64(int(TIMEOUT_S * 1e9)),
        byref(outcome),
    )

    def call() -> None:
        function(*arguments)
        assert not outcome[0], "a rank is missing"

    return call


def _timed(call: Callable[[], object], num_calls: int) -> list[float]:
    for _ in range(num_calls // 10):
        call()
    times = []
    for _ in range(num_calls):
        begun = time.perf_counter_ns()
        call()
        times.append((time.perf_counter_ns() - begun) / 1000)
    return times


if __name__ == "__main__":
    main()
