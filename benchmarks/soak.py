"""Hours in minutes: does anything grow, and does anything get slower?

Measures what two instances can take (16 streams at once), then sends requests at 80 % of that rate
for `--minutes`: prompts of 16 to 512 tokens, a third of them with one of four common beginnings,
answers of 8 to 192 tokens; every fifth client leaves at a random moment. Every 10 s it looks at
each process of the server: private memory (proc(5), pool and segments aside), descriptors, threads;
and at the allocator's pool: leased, sealed and free. At the end the server must become idle.

Fails (exit status 1, the reasons under "failures") if, between the first and the last fifth of the
time (the first minute aside, or a tenth where that is less), a process's median of private memory
grew by more than 8 MB and 5 %, or its threads by more than 2; if a process has more than 2
descriptors more when all is over than before the load, idle both times; if extents stay leased, or
requests remain, when all is over; if the pool's bytes don't add up; if a request failed or
took more than 5 minutes; if the median time to first token or between tokens more than doubled.

    python benchmarks/soak.py --minutes 30 [--model demo] [--serve=--OPTION ...] [--rate R]

`--rate` (requests a second) spares the measurement of the capacity.
"""

import argparse
import asyncio
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from _client import Stream, random_prompt
from _fleet import Fleet, two_instances
from _machine import describe_machine, percentiles
from _processes import Load, end_on_sigterm, tree

from allocator import Client, connect
from server.machine import process_memory
from server.machine.handed_out import handed_out

_LOAD = 0.8
_LOOK_S = 10.0
_GROWN_BYTES = 8 << 20
_GROWN_SHARE = 1.05
_GROWN_COUNT = 2
_SLOWER = 2.0
_MOST_AT_ONCE = 200
_IDLE_S = 60.0
_REQUEST_S = 300.0


@dataclass(frozen=True)
class Look:
    """The server at one moment. `processes`: name -> (private bytes, descriptors, threads)."""

    at: float
    processes: dict[str, tuple[int, int, int]]
    pool: dict[str, int]


def main() -> None:
    """Print one JSON document."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--serve", action="append", default=[], metavar="OPTION")
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--rate", type=float, help="requests a second")
    arguments = parser.parse_args()
    end_on_sigterm()
    options = ["--threads", "1", *arguments.serve]
    with (
        tempfile.TemporaryDirectory(prefix="onecopy-bench-") as folder,
        two_instances(arguments.model, Path(folder) / "run", options) as fleet,
        connect(fleet.runtime_dir, label="benchmark") as memory,
    ):
        load = Load(fleet.pid)
        soak = Soak(fleet, memory, arguments.minutes * 60)
        figures = asyncio.run(soak.run(arguments.rate))
        shares = load.shares()
    document = {
        "benchmark": "soak",
        **describe_machine(),
        "model": arguments.model,
        "serve_options": arguments.serve,
        "minutes": arguments.minutes,
        **{name: round(share, 4) for name, share in shares.items()},
        **figures,
    }
    print(json.dumps(document, indent=2))
    sys.exit(1 if figures["failures"] else 0)


class Soak:
    """One server under load."""

    def __init__(self, fleet: Fleet, memory: Client, seconds: float):
        self._fleet = fleet
        self._memory = memory
        self._seconds = seconds
        self._rng = random.Random(4)
        self._beginnings = [random_prompt(self._rng, 192) for _ in range(4)]
        self._looks: list[Look] = []
        self._answers: list[tuple[float, Stream]] = []
        self._failures: list[str] = []
        self._num_sent = self._num_left = self._num_held_back = 0

    async def run(self, rate: float | None) -> dict[str, Any]:
        """Load, look, judge."""
        capacity = await self._capacity(16 if rate else 64)
        rate = rate or _LOAD * capacity
        await self._idle()
        started = time.monotonic()
        before = await asyncio.to_thread(self._look, started)
        looking = asyncio.create_task(self._keep_looking(started))
        running: set[asyncio.Task[None]] = set()
        while (elapsed := time.monotonic() - started) < self._seconds:
            if len(running) < _MOST_AT_ONCE:
                task = asyncio.create_task(self._request(elapsed))
                running.add(task)
                task.add_done_callback(running.discard)
            else:
                self._num_held_back += 1
            await asyncio.sleep(self._rng.expovariate(rate))
        await asyncio.gather(*running)
        looking.cancel()
        await self._idle()
        after = await asyncio.to_thread(self._look, started)
        windows = self._windows()
        for window in windows:
            if not all(self._within(*window)):
                raise SystemExit(f"nothing to judge by in seconds {window}: soak for longer")
        self._judge(windows, before, after)
        return {
            "requests_per_s": round(rate, 3),
            "num_requests": self._num_sent,
            "num_left_early": self._num_left,
            "num_held_back": self._num_held_back,
            "start": self._summary(*windows[0]),
            "end": self._summary(*windows[1]),
            "idle_before": {"pool": before.pool, "processes": _readable(before)},
            "idle_after": {"pool": after.pool, "processes": _readable(after)},
            "most_private_bytes": max(
                sum(one[0] for one in look.processes.values()) for look in self._looks
            ),
            "failures": self._failures,
        }

    # --- load

    async def _capacity(self, num_requests: int) -> float:
        """Requests a second with 16 at once, after as many to warm up."""
        for _ in range(2):
            started = time.monotonic()
            kinds = [self._lengths() for _ in range(num_requests)]
            room = asyncio.Semaphore(16)

            async def one(kind: tuple[list[int], int], room: asyncio.Semaphore = room) -> None:
                async with room:
                    await self._fleet.ask(*kind)

            await asyncio.gather(*(one(kind) for kind in kinds))
        return len(kinds) / (time.monotonic() - started)

    def _lengths(self) -> tuple[list[int], int]:
        prompt = random_prompt(self._rng, self._rng.randint(16, 512))
        if self._rng.random() < 1 / 3:
            prompt = self._rng.choice(self._beginnings) + prompt[:256]
        return prompt, self._rng.randint(8, 192)

    async def _request(self, elapsed: float) -> None:
        prompt, max_tokens = self._lengths()
        leaves = self._rng.randint(1, max_tokens) if self._rng.random() < 0.2 else None
        self._num_sent += 1
        self._num_left += leaves is not None
        try:
            async with asyncio.timeout(_REQUEST_S):
                answer = await self._fleet.ask(prompt, max_tokens, stop_after=leaves)
        except (RuntimeError, OSError, asyncio.IncompleteReadError) as error:
            if len(self._failures) < 20:
                self._failures.append(f"a request after {elapsed:.0f} s: {error!r}")
            return
        if leaves is None:
            if answer.num_tokens != max_tokens:
                self._failures.append(f"{answer.num_tokens} tokens came instead of {max_tokens}")
            self._answers.append((elapsed, answer))

    async def _idle(self) -> None:
        deadline = time.monotonic() + _IDLE_S
        while time.monotonic() < deadline:
            status = await asyncio.to_thread(self._fleet.admin.status)
            leased = sum(one.leased_bytes for one in self._memory.statistics().sessions)
            if not leased and not any(one.num_requests for one in status.instances):
                return
            await asyncio.sleep(0.2)
        self._failures.append(f"requests or leases are left {_IDLE_S:.0f} s after the last request")

    # --- looking

    async def _keep_looking(self, started: float) -> None:
        while True:
            self._looks.append(await asyncio.to_thread(self._look, started))
            await asyncio.sleep(min(_LOOK_S, self._seconds / 30))

    def _look(self, started: float) -> Look:
        processes = {}
        mapped = handed_out(self._memory)
        for pid in tree(self._fleet.pid):
            memory = process_memory.read(pid, mapped)
            if memory is not None and (name := _name(pid)):
                folder = Path(f"/proc/{pid}")
                num_fds = len(list((folder / "fd").iterdir()))
                num_threads = len(list((folder / "task").iterdir()))
                processes[name] = (memory.private_bytes, num_fds, num_threads)
        pool = self._memory.statistics().pool
        return Look(
            time.monotonic() - started,
            processes,
            {
                "leased_bytes": pool.leased_bytes,
                "cached_bytes": pool.cached_bytes,
                "pinned_bytes": pool.cached_bytes - pool.evictable_bytes,
                "free_bytes": pool.total_bytes - pool.leased_bytes - pool.cached_bytes,
                "num_leases": pool.num_leases,
                "num_blocks": pool.num_blocks,
            },
        )

    # --- judging

    def _windows(self) -> list[tuple[float, float]]:
        begin = min(60.0, self._seconds / 10)
        fifth = (self._seconds - begin) / 5
        return [(begin, begin + fifth), (self._seconds - fifth, self._seconds)]

    def _within(self, begin: float, end: float) -> tuple[list[Look], list[Stream]]:
        looks = [look for look in self._looks if begin <= look.at < end]
        return looks, [answer for at, answer in self._answers if begin <= at < end]

    def _summary(self, begin: float, end: float) -> dict[str, Any]:
        looks, answers = self._within(begin, end)
        return {
            "from_s": round(begin),
            "to_s": round(end),
            "ttft_ms": percentiles([one.ttft_ms for one in answers]),
            "itl_ms": percentiles([gap for one in answers for gap in one.itl_ms]),
            "processes": {
                name: dict(zip(_FIGURES, _medians(looks, name), strict=True))
                for name in _names(looks)
            },
            "pool": {
                name: statistics.median(look.pool[name] for look in looks) for name in looks[0].pool
            },
        }

    def _judge(self, windows: Sequence[tuple[float, float]], idle: Look, after: Look) -> None:
        (first_looks, first_answers), (last_looks, last_answers) = (
            self._within(*window) for window in windows
        )
        if set(_names(first_looks)) != set(_names(last_looks)):
            self._failures.append("the server's processes are not the same at the end")
        for name in set(_names(first_looks)) & set(_names(last_looks)):
            before, now = _medians(first_looks, name), _medians(last_looks, name)
            if now[0] > max(before[0] + _GROWN_BYTES, before[0] * _GROWN_SHARE):
                self._failures.append(f"{name}: private bytes grew from {before[0]} to {now[0]}")
            if now[2] > before[2] + _GROWN_COUNT:
                self._failures.append(f"{name}: threads grew from {before[2]} to {now[2]}")
        for name in idle.processes.keys() & after.processes.keys():
            fds = idle.processes[name][1], after.processes[name][1]
            if fds[1] > fds[0] + _GROWN_COUNT:
                self._failures.append(f"{name}: descriptors grew from {fds[0]} to {fds[1]}")
        for what, figure in (("ttft_ms", _ttft), ("itl_ms", _itl)):
            before_ms, now_ms = figure(first_answers), figure(last_answers)
            if now_ms > _SLOWER * before_ms:
                self._failures.append(f"{what} went from {before_ms:.1f} to {now_ms:.1f}")
        if after.pool["pinned_bytes"]:
            self._failures.append(f"{after.pool['pinned_bytes']} bytes are pinned though all ended")
        if any(one < 0 for one in after.pool.values()):
            self._failures.append(f"the pool does not add up: {after.pool}")
        self._memory.check_integrity()


_FIGURES = ("private_bytes", "num_fds", "num_threads")


def _readable(look: Look) -> dict[str, dict[str, int]]:
    return {name: dict(zip(_FIGURES, one, strict=True)) for name, one in look.processes.items()}


def _names(looks: Sequence[Look]) -> list[str]:
    return sorted(set.intersection(*(set(look.processes) for look in looks)))


def _medians(looks: Sequence[Look], name: str) -> list[float]:
    return [statistics.median(look.processes[name][i] for look in looks) for i in range(3)]


def _ttft(answers: Sequence[Stream]) -> float:
    return statistics.median(one.ttft_ms for one in answers)


def _itl(answers: Sequence[Stream]) -> float:
    return statistics.median(gap for one in answers for gap in one.itl_ms)


def _name(pid: int) -> str:
    """Of a process that lives as long as the server: its title or program, and its pid."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
        name = Path(f"/proc/{pid}/comm").read_text().strip()
    except (FileNotFoundError, ProcessLookupError):
        return ""
    if not name.startswith("onecopy:") and "-m" in words:
        name = words[words.index("-m") + 1]
    return f"{name} {pid}"


if __name__ == "__main__":
    main()
