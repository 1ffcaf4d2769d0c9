"""Whether others are felt: a stream's gaps while requests come and go, and a short prompt's wait.

steady  one stream of 1,200 tokens from one instance with two threads: alone for its first 200
        tokens; then requests arrive about every 0.4 s (64 tokens in, 16 to 96 out, at most 7 at a
        time, every fifth leaves before its end) until 150 tokens before its end. The gaps between
        the stream's tokens (itl_ms) by the number of others at that moment: a step has as many
        rows as there are streams, and its time should hardly change.
ttft    a prompt of 64 tokens on the idle instance, and while one of `--long` tokens is being
        computed; half a second between two; only those count whose first token came before the
        long one's. The long prompt's own time to first token, alone and with short ones beside.

    python benchmarks/engine_latency.py [--model demo] [--serve=--OPTION ...] [--probes 12]
"""

import argparse
import asyncio
import json
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from _client import Stream, random_prompt, stream
from _machine import describe_machine, percentiles, spread
from _peers import OverHTTP, onecopy
from _processes import Load, end_on_sigterm

_STREAM_TOKENS = 1200
_ALONE_TOKENS = 200
_LAST_TOKENS = 150
_MOST_OTHERS = 7
_ARRIVAL_S = 0.4
_SHORT = 64
_PROBE_S = 0.5


def main() -> None:
    """Print one JSON document."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--serve", action="append", default=[], metavar="OPTION")
    parser.add_argument("--probes", type=int, default=12, help="short prompts of each kind")
    parser.add_argument("--long", type=int, default=8000, help="tokens of the long prompt")
    arguments = parser.parse_args()
    end_on_sigterm()
    with (
        tempfile.TemporaryDirectory(prefix="onecopy-bench-") as folder,
        onecopy(arguments.model, Path(folder) / "run", arguments.serve) as engine,
    ):
        engine.generate([random_prompt(random.Random(0), _SHORT)] * 2, 16)
        load = Load(engine.pid)
        steady = asyncio.run(_Steady(engine).measure())
        ttft = asyncio.run(_first_tokens(engine, arguments.probes, arguments.long))
        shares = load.shares()
    document = {
        "benchmark": "engine_latency",
        **describe_machine(),
        "model": arguments.model,
        "serve_options": arguments.serve,
        **{name: round(share, 4) for name, share in shares.items()},
        "steady": steady,
        "ttft": ttft,
    }
    print(json.dumps(document, indent=2))


class _Steady:
    """One long stream, and others that come and go."""

    def __init__(self, engine: OverHTTP):
        self._engine = engine
        self._rng = random.Random(1)
        self._num_pieces = 0
        self._counts: list[tuple[float, int]] = []  # (since then, so many others)
        self._others: set[asyncio.Task[Stream]] = set()
        self._num_arrived = self._num_left = 0

    async def measure(self) -> dict[str, Any]:
        """Figures by number of others."""
        body = self._engine.body(random_prompt(self._rng, _SHORT), _STREAM_TOKENS)
        main = asyncio.create_task(stream(self._engine.url, body, on_piece=self._came))
        while self._num_pieces < _ALONE_TOKENS and not main.done():
            await asyncio.sleep(0.02)
        while self._num_pieces < _STREAM_TOKENS - _LAST_TOKENS and not main.done():
            if len(self._others) < _MOST_OTHERS:
                self._arrive()
            await asyncio.sleep(self._rng.uniform(0.5, 1.5) * _ARRIVAL_S)
        long = await main
        await asyncio.gather(*self._others)
        gaps = self._by_others(long)
        alone = statistics.median(gaps[0])
        beside = [gap for number, some in gaps.items() if number for gap in some]
        return {
            "itl_ms": {str(number): percentiles(some) for number, some in sorted(gaps.items())},
            "itl_ms_beside_others": percentiles(beside),
            "median_beside_over_alone": round(statistics.median(beside) / alone, 2),
            "num_arrived": self._num_arrived,
            "num_left_early": self._num_left,
        }

    def _came(self) -> None:
        self._num_pieces += 1

    def _arrive(self) -> None:
        self._num_arrived += 1
        leaves = self._num_arrived % 5 == 0
        body = self._engine.body(random_prompt(self._rng, _SHORT), self._rng.randrange(16, 96))
        asking = stream(self._engine.url, body, stop_after=8 if leaves else None)
        self._num_left += leaves
        task = asyncio.create_task(asking)
        self._others.add(task)
        task.add_done_callback(self._ended)
        self._count()

    def _ended(self, task: "asyncio.Task[Stream]") -> None:
        self._others.discard(task)
        self._count()

    def _count(self) -> None:
        self._counts.append((time.perf_counter(), len(self._others)))

    def _by_others(self, long: Stream) -> dict[int, list[float]]:
        """Each gap counts for the number of others at its end."""
        gaps: dict[int, list[float]] = {0: []}
        changes = iter([*self._counts, (float("inf"), 0)])
        since, following = next(changes)
        number = 0
        for (before, _), (at, count) in zip(long.pieces, long.pieces[1:], strict=False):
            while since <= at:
                number = following
                since, following = next(changes)
            gaps.setdefault(number, []).extend([(at - before) * 1000 / count] * count)
        return gaps


async def _first_tokens(engine: OverHTTP, num_probes: int, long_tokens: int) -> dict[str, Any]:
    rng = random.Random(2)

    async def ask(num_tokens: int) -> Stream:
        return await stream(engine.url, engine.body(random_prompt(rng, num_tokens), 1))

    idle = []
    for _ in range(num_probes):
        idle.append((await ask(_SHORT)).ttft_ms)
        await asyncio.sleep(0.05)
    long_alone = (await ask(long_tokens)).ttft_ms
    beside: list[float] = []
    long_beside: list[float] = []
    while len(beside) < num_probes:
        long = asyncio.create_task(ask(long_tokens))
        await asyncio.sleep(_PROBE_S / 2)
        probes: list[Stream] = []
        while not long.done():
            probes.append(await ask(_SHORT))
            await asyncio.sleep(_PROBE_S)
        answer = await long
        counted = [one.ttft_ms for one in probes if one.ended_at < answer.ended_at]
        if not counted:
            raise RuntimeError(f"no short prompt was answered before one of {long_tokens} tokens")
        beside += counted
        long_beside.append(answer.ttft_ms)
    return {
        "short_tokens": _SHORT,
        "long_tokens": long_tokens,
        "idle_ms": spread(idle),
        "beside_long_ms": spread(beside),
        "beside_over_idle": round(statistics.median(beside) / statistics.median(idle), 2),
        "long_alone_ms": round(long_alone, 1),
        "long_beside_short_ones_ms": spread(long_beside),
    }


if __name__ == "__main__":
    main()
