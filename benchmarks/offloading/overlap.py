"""How much of reading blocks is hidden behind computing them, and what memory that takes.

A block is one matrix that a few rows are multiplied with, on one thread, by as many of its outputs
as take a wanted share of the time of reading it. Every depth has blocks and a file of its own, and
all take turns. What a read and a computation take is measured with nothing read ahead (depth 0), in
the same round; the critical path follows from that.
"""

import os
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from _machine import spread
from offloading.schedule import Span, overlap, steady_s
from torch import nn

from allocator import Client, connect
from workers.checkpoint.offloaded import FileRun, OffloadedTensor
from workers.placement.blocks import OffloadedBlocks, offload
from workers.placement.layer_slots import LayerSlots, memory_bytes
from workers.placement.reader import Read, Reader
from workers.placement.slots import slot_layout

_TRIES = 4
"""Of numbers of outputs, each in proportion to what the one before took."""
_NUM_ROWS = 16


class Matrix(nn.Module):
    """Of one block."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width, width), requires_grad=False)

    def forward(self, rows: torch.Tensor, num_outputs: int) -> None:
        """Computes so many, all of them several times where there are not so many."""
        compute(self.weight, rows, num_outputs)


def compute(weight: torch.Tensor, rows: torch.Tensor, num_outputs: int) -> None:
    """On one thread, without the interpreter's lock."""
    for begin in range(0, num_outputs, len(weight)):
        nn.functional.linear(rows, weight[: num_outputs - begin])


@dataclass(frozen=True)
class Size:
    """Of the blocks: `width` rows and columns of float32."""

    num_blocks: int
    width: int
    passes: int

    @property
    def block_bytes(self) -> int:
        """Of one."""
        return self.width * self.width * 4

    def blocks(self) -> list[Matrix]:
        """With numbers of their own."""
        return [Matrix(self.width) for _ in range(self.num_blocks)]

    def rows(self) -> torch.Tensor:
        """What is computed with."""
        return torch.randn(_NUM_ROWS, self.width)


@dataclass(frozen=True)
class Passes:
    """What was measured of each block, on average over the passes, and of all passes."""

    reads: list[float]
    """For as long it was waited."""
    computes: list[float]
    total_s: float

    @property
    def ratio(self) -> float:
        """Of computing to reading, where nothing is read ahead."""
        return sum(self.computes) / sum(self.reads)


def measured(
    size: Size, blocks: Sequence[Matrix], offloaded: OffloadedBlocks, num_outputs: int
) -> Passes:
    """Passes in which slots are as the passes before left them: one, which is not counted, goes
    before."""
    rows = size.rows()
    for block in blocks:
        block(rows, num_outputs)
    passes = size.passes
    waits, computes = [0.0] * len(blocks), [0.0] * len(blocks)
    begun = time.perf_counter()
    for _ in range(passes):
        for number, block in enumerate(blocks):
            waited, before = offloaded.waited_s, time.perf_counter()
            block(rows, num_outputs)
            wait_s = offloaded.waited_s - waited
            waits[number] += wait_s / passes
            computes[number] += (time.perf_counter() - before - wait_s) / passes
    return Passes(waits, computes, time.perf_counter() - begun)


def measure_overlap(
    size: Size, ratios: Iterable[float], depths: Sequence[int], rounds: int, directory: Path
) -> dict[str, Any]:
    """By ratio of computing to reading, by depth: the overlap, and how long a pass takes over the
    longer of computing all blocks and reading them."""
    torch.set_num_threads(1)
    every: dict[int, tuple[list[Matrix], OffloadedBlocks]] = {}
    for depth in (0, *depths):
        blocks = size.blocks()
        # Never closed: that would bring them back into memory.
        every[depth] = (blocks, offload(blocks, depth=depth, directory=directory))
    results = {}
    num_outputs = size.width
    for ratio in ratios:
        num_outputs = num_outputs_for(size, *every[0], ratio, num_outputs)
        results[f"{ratio:g}"] = _rounds(size, every, num_outputs, rounds)
    return results


def num_outputs_for(
    size: Size, blocks: Sequence[Matrix], offloaded: OffloadedBlocks, ratio: float, guess: int
) -> int:
    """That takes so long, over what reading a block takes. `offloaded` reads nothing ahead."""
    for _ in range(_TRIES):
        found = measured(size, blocks, offloaded, guess)
        guess = max(1, round(guess * ratio / found.ratio))
    return guess


def _rounds(
    size: Size,
    every: dict[int, tuple[list[Matrix], OffloadedBlocks]],
    num_outputs: int,
    rounds: int,
) -> dict[str, Any]:
    ratios, rates = [], []
    found: dict[int, dict[str, list[float]]] = {
        depth: {"overlap": [], "over_longer": [], "over_best": []} for depth in every if depth
    }
    for _ in range(rounds):
        passes = {depth: measured(size, *one, num_outputs) for depth, one in every.items()}
        sync = passes.pop(0)
        ratios.append(sync.ratio)
        rates.append(size.num_blocks * size.block_bytes / 1e9 / sum(sync.reads))
        longer_s = size.passes * max(sum(sync.computes), sum(sync.reads))
        for depth, one in passes.items():
            best_s = steady_s(sync.reads, sync.computes, depth, size.passes)
            found[depth]["overlap"].append(overlap(sync.total_s, one.total_s, best_s))
            found[depth]["over_longer"].append(one.total_s / longer_s)
            found[depth]["over_best"].append(one.total_s / best_s)
    return {
        "outputs": num_outputs,
        "compute_over_transfer": spread(ratios, 2),
        "read_gb_per_s": spread(rates, 2),
        "depths": {
            str(depth): {name: spread(values, 3) for name, values in one.items()}
            for depth, one in found.items()
        },
    }


def memory_by_depth(
    size: Size, depths: Iterable[int], runtime_dir: Path, directory: Path
) -> dict[str, Any]:
    """What the allocator that runs there has leased for slots, at most, by its own records, which
    are asked for after each block; and by how much the process's shared memory grew."""
    rows = size.rows()
    found = {}
    for depth in depths:
        blocks = size.blocks()
        with connect(runtime_dir) as memory:
            before = _shared_bytes()
            leased, resident = [], []
            with offload(blocks, depth=depth, directory=directory, memory=memory):
                for _ in range(size.passes):
                    for block in blocks:
                        block(rows, 1)
                        leased.append(_leased_bytes(memory))
                        resident.append(_shared_bytes() - before)
        found[str(depth)] = {
            "leased_bytes": max(leased),
            "resident_bytes": max(resident),
            "blocks": max(leased) / size.block_bytes,
            "limit_blocks": depth + 1,
        }
    return found


def _leased_bytes(memory: Client) -> int:
    return memory.statistics().pool.leased_bytes


def _shared_bytes() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssShmem:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("the kernel does not tell RssShmem")


class _NotedReader(Reader):
    """Knows which jobs there were, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.jobs: list[int] = []

    def start(self, reads: Sequence[Read]) -> int:
        """See Reader."""
        job = super().start(reads)
        self.jobs.append(job)
        return job


@dataclass(frozen=True)
class Line:
    """One block in one pass: which slot it was read into, and when it was read and computed."""

    item: int
    slot: int
    read: Span
    compute: Span


def timeline(size: Size, num_outputs: int, depth: int, directory: Path) -> list[Line]:
    """The last of a few passes, by blocks: each with its read, which for the first ones was in the
    pass before. Times count from the pass's begin."""
    torch.set_num_threads(1)
    rows = size.rows()
    layouts = [
        slot_layout(
            {
                "weight": OffloadedTensor(
                    "float32",
                    (size.width, size.width),
                    (FileRun(0, number * size.block_bytes, size.block_bytes),),
                )
            }
        )
        for number in range(size.num_blocks)
    ]
    uses: list[tuple[int, int, Span]] = []
    with tempfile.NamedTemporaryFile(dir=directory) as file, _NotedReader() as reader:
        for _ in range(size.num_blocks):
            file.write(torch.randn(size.width, size.width).numpy().data)
        file.flush()
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        reader.open(Path(file.name))
        own = torch.empty(memory_bytes(layouts, depth) + 4096, dtype=torch.uint8)
        memory = own[-own.data_ptr() % 4096 :]
        slots = LayerSlots(layouts, depth, memory, reader)
        for _ in range(size.passes + 1):
            for item in range(size.num_blocks):
                slot = slots.use(item)
                begin_s = time.monotonic()
                compute(slots.views(item, slot)["weight"], rows, num_outputs)
                uses.append((item, slot, Span(begin_s, time.monotonic())))
        for job in reader.jobs:
            reader.wait(job)
        reads = [Span(*reader.times(job)) for job in reader.jobs]
    zero = uses[-size.num_blocks - 1][2].end_s
    return [
        Line(item, slot, _since(zero, read), _since(zero, compute))
        for (item, slot, compute), read in list(zip(uses, reads, strict=False))[-size.num_blocks :]
    ]


def _since(zero: float, span: Span) -> Span:
    return Span(span.begin_s - zero, span.end_s - zero)
