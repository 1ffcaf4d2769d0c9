"""What it costs to have each linear of a series on one rank only, instead of on all.

Ranks compute the same passes with a series that is replicated, sharded over gloo, and sharded in
shared memory, in turns in one run; a pass takes as long as its slowest rank. Each layer computes,
then applies its linear. Its computing takes `--ratio` times what a broadcast of one linear takes:
device     on another processor than ours, as on an accelerator: ours only waits for it
processor  on the processor that broadcasts, too, which then has both to do
`overhead` is of the medians, over the replicated series; `bytes` what the series takes of a rank,
of one replicated linear each; those in shared memory are counted on the rank that sealed them.

  python benchmarks/layer_sharding.py [--ranks 2] [--layers 24] [--width 1024] [--rounds 9]
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from allocator import connect
from workers.placement.group import Group, Ranks
from workers.placement.sharded import shard_series
from workers.placement.transport import Transport
from workers.placement.transport_gloo import GlooTransport, gloo_backend
from workers.placement.transport_shm import ShmTransport

KINDS = ("replicated", "gloo", "shm")
COMPUTING = ("device", "processor")


def main() -> None:
    """Print one JSON document."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--ahead", type=int, default=1)
    parser.add_argument("--ratio", type=float, default=1.5)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rank is not None:
        print(json.dumps(_Rank(arguments).measured()))
        return

    from _machine import describe_machine, steal_ticks  # a rank does not find it, nor need it

    steal = steal_ticks()
    with tempfile.TemporaryDirectory(prefix="onecopy-bench-") as folder:
        found = _measured(arguments, Path(folder))
    document = {
        "benchmark": "layer_sharding",
        **describe_machine(),
        **{name: getattr(arguments, name) for name in ("ranks", "layers", "width", "rows")},
        **{name: getattr(arguments, name) for name in ("ahead", "ratio", "rounds")},
        **_summary(found, arguments.layers),
        "steal_ticks": steal_ticks() - steal,
    }
    print(json.dumps(document, indent=2))


def _measured(arguments: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """What each rank says."""
    runtime_dir = folder / "run"
    runtime_dir.mkdir(mode=0o700)
    ready_read, ready_write = os.pipe()
    daemon = subprocess.Popen(
        [
            *(sys.executable, "-P", "-m", "allocator", "--quiet"),
            *("--runtime-dir", str(runtime_dir), "--ready-fd", str(ready_write)),
            *("--image-dir", str(folder / "images")),
        ],
        pass_fds=[ready_write],
    )
    try:
        os.close(ready_write)
        assert os.read(ready_read, 1), "the allocator did not start"
        os.close(ready_read)
        given = [
            f"--{name}={getattr(arguments, name)}"
            for name in ("ranks", "layers", "width", "rows", "ahead", "ratio", "rounds")
        ]
        command = [sys.executable, "-P", __file__, *given, f"--folder={folder}"]
        ranks = [
            subprocess.Popen([*command, f"--rank={rank}"], stdout=subprocess.PIPE, text=True)
            for rank in range(arguments.ranks)
        ]
        return [json.loads(rank.communicate()[0]) for rank in ranks]
    finally:
        daemon.terminate()
        daemon.wait()


def _summary(found: list[dict[str, Any]], num_layers: int) -> dict[str, Any]:
    result: dict[str, Any] = {
        "linear_bytes": found[0]["linear_bytes"],
        "broadcast_ms": round(1000 * found[0]["broadcast_s"], 3),
        "replicated_bytes_per_rank": num_layers * found[0]["linear_bytes"],
        "bytes_per_rank": {
            kind: [rank["bytes"][kind] for rank in found] for kind in ("gloo", "shm")
        },
    }
    for computing in COMPUTING:
        medians = {}
        for kind in KINDS:
            each = zip(*(rank["passes_s"][computing][kind] for rank in found), strict=True)
            medians[kind] = statistics.median(max(one_pass) for one_pass in each)
        result[computing] = {
            "pass_ms": {kind: round(1000 * value, 2) for kind, value in medians.items()},
            "overhead": {
                kind: round(medians[kind] / medians["replicated"] - 1, 4)
                for kind in ("gloo", "shm")
            },
        }
    return result


class _Layer(nn.Module):
    def __init__(self, width: int, compute: Callable[[], None]) -> None:
        super().__init__()
        self.o_proj = nn.Linear(width, width, bias=False)
        self.compute = compute

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.compute()
        return self.o_proj(x).tanh()


class _Rank:
    def __init__(self, arguments: argparse.Namespace) -> None:
        torch.set_num_threads(1)
        torch.set_grad_enabled(False)
        self._arguments = arguments
        self._group = Group(self._ranks("bench"), "bench", gloo_backend)
        self._compute: Callable[[], None] = lambda: None

    def measured(self) -> dict[str, Any]:
        """All that this rank finds."""
        arguments = self._arguments
        self._group.join("")
        broadcast_s = self._broadcast_s()
        computes = {
            "device": lambda: time.sleep(arguments.ratio * broadcast_s),
            "processor": _busy(arguments.ratio * broadcast_s),
        }
        passes: dict[str, dict[str, list[float]]] = {
            computing: {kind: [] for kind in KINDS} for computing in COMPUTING
        }
        with ExitStack() as ends:
            memory = ends.enter_context(connect(arguments.folder / "run"))
            transports: dict[str, Transport] = {
                "gloo": GlooTransport(self._ranks("gloo")),
                "shm": ShmTransport(self._ranks("shm"), memory),
            }
            models = {kind: self._model() for kind in KINDS}
            taken = {}
            for kind, transport in transports.items():
                sharded = shard_series(models[kind], ["o_proj"], transport, ahead=arguments.ahead)
                taken[kind] = ends.enter_context(sharded).num_bytes
            x = torch.randn(arguments.rows, arguments.width)
            for number in range(arguments.rounds + 1):
                for computing, compute in computes.items():
                    self._compute = compute
                    for kind in KINDS:
                        self._barrier()
                        begun = time.perf_counter()
                        models[kind](x)
                        if number:  # the first warms up
                            passes[computing][kind].append(time.perf_counter() - begun)
            self._barrier()
        self._group.leave()
        return {
            "linear_bytes": 4 * arguments.width**2,
            "broadcast_s": broadcast_s,
            "bytes": taken,
            "passes_s": passes,
        }

    def _ranks(self, kind: str) -> Ranks:
        store = dist.FileStore(str(self._arguments.folder / f"store-{kind}"), -1)
        return Ranks(store, self._arguments.rank, self._arguments.ranks)

    def _model(self) -> nn.Module:
        torch.manual_seed(0)
        arguments = self._arguments
        return _Layers(
            _Layer(arguments.width, lambda: self._compute()) for _ in range(arguments.layers)
        )

    def _broadcast_s(self) -> float:
        """Of one linear, the median; the same on all ranks."""
        linear = torch.ones(self._arguments.width**2)
        times = []
        for _ in range(21):
            self._barrier()
            begun = time.perf_counter()
            self._group.broadcast(linear, 0).wait()
            times.append(time.perf_counter() - begun)
        median = torch.tensor([statistics.median(times)], dtype=torch.float64)
        self._group.broadcast(median, self._arguments.ranks - 1).wait()
        return float(median)

    def _barrier(self) -> None:
        for rank in range(self._arguments.ranks):
            self._group.broadcast(torch.zeros(1), rank).wait()


class _Layers(nn.ModuleList):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self:
            x = layer(x)
        return x


def _busy(seconds: float) -> Callable[[], None]:
    """Work that takes one thread about so long where nobody else computes."""
    matrix = torch.ones(128, 128)

    def work(count: int) -> None:
        for _ in range(count):
            torch.mm(matrix, matrix)

    times = []
    for _ in range(5):
        begun = time.perf_counter()
        work(50)
        times.append((time.perf_counter() - begun) / 50)
    count = max(1, round(seconds / min(times)))
    return lambda: work(count)


if __name__ == "__main__":
    main()
