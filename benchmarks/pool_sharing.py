"""How KV memory flows between two instances of one server: whoever needs it has it.

The allocator may use the weights and `--pool` bytes, far less than the requests want. First one
instance has 8 requests (256 tokens in, all different, 1,500 out) and the other has nothing to do:
the most of the pool that the loaded one holds. Then the other gets as many: the times from then
until it has its first token, until it holds 90 % of its share (half of the pool), and until the
first has given back all that is beyond its own. Then both go on for `--both-s` seconds: how the
pool is divided, and the tokens that each gave. The other's requests wait from the beginning, while
it is stopped (SIGSTOP), so that the router has nothing to choose.

What is held is read from the allocator every 10 ms: leased extents, and sealed blocks as often as
they are pinned (prompts have nothing in common, so nobody pins another's).

    python benchmarks/pool_sharing.py [--model demo] [--serve=--OPTION ...] [--rounds 5]
"""

import argparse
import asyncio
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from _client import random_prompt, stream
from _fleet import Fleet, stopped, two_instances
from _machine import describe_machine, spread
from _processes import Load, end_on_sigterm

from allocator import Client, connect
from server.admin.app import InstanceStatus

_NUM_REQUESTS = 8
_PROMPT = 256
_ANSWER = 1500
_LOOK_S = 0.01
_PATIENCE_S = 60.0
_NEARLY = 0.9
_ALL = 0.98


def main() -> None:
    """Print one JSON document."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--serve", action="append", default=[], metavar="OPTION")
    parser.add_argument("--pool", type=int, default=96 << 20, help="bytes beside the weights")
    parser.add_argument("--both-s", type=float, default=5.0)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    end_on_sigterm()
    limit = _weights_bytes(arguments.model) + arguments.pool
    options = ["--memory-limit", str(limit), *arguments.serve]
    with tempfile.TemporaryDirectory(prefix="onecopy-bench-") as folder:
        rounds, shares = [], []
        for number in range(arguments.rounds):
            runtime_dir = Path(folder) / f"run{number}"
            with (
                two_instances(arguments.model, runtime_dir, options) as fleet,
                connect(runtime_dir, label="benchmark") as memory,
            ):
                load = Load(fleet.pid)
                rounds.append(asyncio.run(_Round(fleet, memory, number).measure(arguments.both_s)))
                shares.append(load.shares())
    document = {
        "benchmark": "pool_sharing",
        **describe_machine(),
        "model": arguments.model,
        "serve_options": arguments.serve,
        "memory_limit_bytes": limit,
        **{name: round(statistics.median(one[name] for one in shares), 4) for name in shares[0]},
        "requests_each": _NUM_REQUESTS,
        **{name: spread([one[name] for one in rounds], 3) for name in rounds[0]},
    }
    print(json.dumps(document, indent=2))


class _Round:
    """One server: `first` is loaded, then `other` too."""

    def __init__(self, fleet: Fleet, memory: Client, number: int):
        self._fleet = fleet
        self._memory = memory
        self._rng = random.Random(number)
        found = memory.statistics()
        self._pool_bytes = found.limit_bytes - found.weights_bytes
        self._num_pieces: dict[int, int] = {}
        """By request; which instance has it comes out when the first of them gives tokens."""

    async def measure(self, both_s: float) -> dict[str, float]:
        """Shares are parts of the pool."""
        first, other = self._fleet.instances
        with stopped(other):
            requests = await self._ask_all()
            most = await self._fill(first)
            of_first = {index for index, count in self._num_pieces.items() if count}
        let_go = time.perf_counter()
        times = await self._take_share(first, other, of_first, let_go)
        before = dict(self._num_pieces)
        held = await self._watch(first, other, both_s)
        gained = {index: count - before[index] for index, count in self._num_pieces.items()}
        for one in requests:
            one.cancel()
        await asyncio.gather(*requests, return_exceptions=True)
        await self._fleet.until(lambda: not any(i.num_requests for i in self._fleet.instances))
        return {
            "loaded_alone_share": most,
            **times,
            "share_of_first_with_both": statistics.median(share for share, _ in held),
            "share_of_other_with_both": statistics.median(share for _, share in held),
            "tok_per_s_of_first_with_both": sum(gained[i] for i in of_first) / both_s,
            "tok_per_s_of_other_with_both": sum(gained[i] for i in gained if i not in of_first)
            / both_s,
        }

    async def _ask_all(self) -> list[asyncio.Task[Any]]:
        """As many for each, `other` being stopped."""
        requests = []
        for index in range(2 * _NUM_REQUESTS):
            self._num_pieces[index] = 0
            body = self._fleet.body(random_prompt(self._rng, _PROMPT), _ANSWER)

            def came(index: int = index) -> None:
                self._num_pieces[index] += 1

            asking = stream(f"{self._fleet.url}/v1/completions", body, on_piece=came)
            requests.append(asyncio.create_task(asking))
        await self._fleet.until(
            lambda: all(one.num_requests == _NUM_REQUESTS for one in self._fleet.instances)
        )
        return requests

    async def _fill(self, first: InstanceStatus) -> float:
        """Until all its requests have tokens and it holds (almost) everything, or no more for ten
        seconds: its largest share."""
        most, grown_at = 0.0, time.monotonic()
        while time.monotonic() - grown_at < 10.0:
            if most > _ALL and sum(map(bool, self._num_pieces.values())) == _NUM_REQUESTS:
                break
            share = self._share(first)
            if share > most:
                most, grown_at = share, time.monotonic()
            await asyncio.sleep(_LOOK_S)
        return most

    async def _take_share(
        self, first: InstanceStatus, other: InstanceStatus, of_first: set[int], let_go: float
    ) -> dict[str, float]:
        times: dict[str, float] = {}
        while len(times) < 3:
            elapsed = time.perf_counter() - let_go
            if elapsed > _PATIENCE_S:
                raise TimeoutError(f"after {elapsed:.0f} s only {times}")
            if any(self._num_pieces[i] for i in self._num_pieces if i not in of_first):
                times.setdefault("other_first_token_s", elapsed)
            if self._share(other) >= _NEARLY / 2:
                times.setdefault("other_at_share_s", elapsed)
            if self._share(first) <= 0.5 / _NEARLY:
                times.setdefault("first_gave_back_s", elapsed)
            await asyncio.sleep(_LOOK_S)
        return dict(sorted(times.items()))

    async def _watch(
        self, first: InstanceStatus, other: InstanceStatus, seconds: float
    ) -> list[tuple[float, float]]:
        held = []
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            held.append((self._share(first), self._share(other)))
            await asyncio.sleep(_LOOK_S)
        return held

    def _share(self, instance: InstanceStatus) -> float:
        found = self._memory.statistics()
        block_bytes = found.pool.cached_bytes / max(1, found.pool.num_blocks)
        held = sum(
            one.leased_bytes + one.num_pinned_blocks * block_bytes
            for one in found.sessions
            if one.pid == instance.pid
        )
        return held / self._pool_bytes


def _weights_bytes(model: str) -> int:
    """What the weights take of the allocator's memory, whole segment, as `onecopy plan` says."""
    answer = subprocess.run(
        [sys.executable, "-P", "-m", "server.cli", "plan", model, "--json"],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return int(json.loads(answer.stdout)["device"]["weights_bytes"])


if __name__ == "__main__":
    main()
