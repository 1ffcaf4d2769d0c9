"""Ranks of a test: forked processes that compute together, and what became of each.

Invariant: when the context ends, all of them have ended and are waited for.
"""

import gc
import json
import os
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch

from allocator import RuntimeDir
from server.machine.proof import prove
from tests.daemon_process import TIMEOUT_S
from workers.errors import RankError
from workers.process import linux

_ANY_NUMBER = 1 << 40
"""Of private bytes: what a process has, it may have in common with the one it was forked from."""


def anonymous_bytes() -> int:
    """Of this process, with what it still has in common with the one that it was forked from."""
    fields = Path("/proc/self/statm").read_text().split()
    return (int(fields[1]) - int(fields[2])) * os.sysconf("SC_PAGE_SIZE")


class Ranks:
    """One process for each rank, forked from this one, which shall have no other threads."""

    def __init__(self, num_ranks: int, work: Callable[[int], Any]) -> None:
        """`work(rank)` returns what JSON can hold. What it raises is a result, too."""
        self._pipes: list[int] = []
        self.pids: list[int] = []
        for rank in range(num_ranks):
            read, write = os.pipe()
            pid = os.fork()
            if pid == 0:
                _run(work, rank, write)
            os.close(write)
            self._pipes.append(read)
            self.pids.append(pid)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: Any, trace: TracebackType | None
    ) -> None:
        for pid, pipe in zip(self.pids, self._pipes, strict=True):
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            os.close(pipe)

    def result(self, rank: int) -> Any:
        """Of one rank, when it has ended: what its work returned; of a RankError its class's name,
        the rank that it names and its message; None where it was killed."""
        text, deadline = b"", time.monotonic() + TIMEOUT_S
        while True:
            readable, _, _ = select.select(
                [self._pipes[rank]], [], [], max(0.0, deadline - time.monotonic())
            )
            assert readable, f"rank {rank} hung for {TIMEOUT_S} s"
            if not (piece := os.read(self._pipes[rank], 1 << 16)):
                break
            text += piece
        if not text:
            return None
        answer = json.loads(text)
        assert "unexpected" not in answer, answer["unexpected"]
        return answer["result"]

    def results(self) -> list[Any]:
        """Of all ranks, when they have ended."""
        return [self.result(rank) for rank in range(len(self.pids))]


def of_one_copy(
    num_ranks: int,
    runtime_dir: RuntimeDir,
    most_bytes: int,
    work: Callable[[int, Callable[[], None]], Any],
) -> list[Any]:
    """What `work(rank, look)` returns for each. Each calls `look` when it has computed and still
    holds what it computes with. Asserts that they then have one copy, by the kernel's figures, and
    that none has grown by `most_bytes`: what it has is that of the process it was forked from."""
    (proven_read, proven_write), (computed_read, computed_write) = os.pipe(), os.pipe()

    def run(rank: int) -> tuple[Any, int]:
        os.close(proven_write)
        gc.collect()
        linux.trim_heap()  # what is free would be taken first, and not be growth
        before, grown = anonymous_bytes(), []

        def look() -> None:
            grown.append(anonymous_bytes() - before)
            os.write(computed_write, b"c")
            os.read(proven_read, 1)

        return work(rank, look), grown[0]

    with Ranks(num_ranks, run) as ranks:
        os.close(proven_read)
        os.close(computed_write)
        for _ in range(num_ranks):
            assert os.read(computed_read, 1), "a rank has ended"
        os.close(computed_read)
        named = [(f"rank {rank}", pid) for rank, pid in enumerate(ranks.pids)]
        verdict = prove(runtime_dir, named, _ANY_NUMBER)
        os.close(proven_write)
        results, grown = zip(*ranks.results(), strict=True)
    assert verdict.holds, verdict.problems
    assert max(grown) < most_bytes
    return list(results)


def _run(work: Callable[[int], Any], rank: int, pipe: int) -> None:
    """In the child; never returns."""
    torch.set_num_threads(1)  # a pool of the parent's is not there
    try:
        try:
            answer: dict[str, Any] = {"result": work(rank)}
        except RankError as error:
            answer = {"result": [type(error).__name__, error.rank, str(error)]}
        except BaseException:  # noqa: BLE001 - the parent shows it
            answer = {"unexpected": traceback.format_exc()}
        os.write(pipe, json.dumps(answer).encode())
        sys.stderr.flush()
    finally:
        os._exit(0)
