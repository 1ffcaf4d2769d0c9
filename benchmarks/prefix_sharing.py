"""What a prompt costs an instance when another instance of the server has computed it.

A prompt of 1,000 tokens is answered by instance A, then sent to instance B; another one, which
nobody has seen, is sent to B for comparison. B's time to first token, the tokens that it says were
cached, its private memory while it answers (proc(5): private and dirty, the pool aside) against
before, and what the pool holds more (leased and sealed blocks). In turns, medians.

    python benchmarks/prefix_sharing.py [--model demo] [--serve=--OPTION ...] [--rounds 10]
"""

import argparse
import asyncio
import json
import random
import tempfile
from pathlib import Path
from typing import Any

from _client import Stream, random_prompt
from _fleet import Fleet, two_instances
from _machine import describe_machine, spread
from _processes import Load, end_on_sigterm

from allocator import Client, connect
from server.machine import process_memory
from server.machine.handed_out import handed_out

_PROMPT = 1000
_ANSWER = 16
_LOOK_AT = 8
"""The token at which B's memory is read: it computes still, and holds all that it needs."""


def main() -> None:
    """Print one JSON document."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--serve", action="append", default=[], metavar="OPTION")
    parser.add_argument("--rounds", type=int, default=10)
    arguments = parser.parse_args()
    end_on_sigterm()
    with (
        tempfile.TemporaryDirectory(prefix="onecopy-bench-") as folder,
        two_instances(arguments.model, Path(folder) / "run", arguments.serve) as fleet,
        connect(fleet.runtime_dir, label="benchmark") as memory,
    ):
        load = Load(fleet.pid)
        turns = asyncio.run(_Turns(fleet, memory).measure(arguments.rounds))
        shares = load.shares()
    shared, cold = turns["shared"], turns["cold"]
    document = {
        "benchmark": "prefix_sharing",
        **describe_machine(),
        "model": arguments.model,
        "serve_options": arguments.serve,
        **{name: round(share, 4) for name, share in shares.items()},
        "prompt_tokens": _PROMPT,
        **{
            kind: {name: spread(some) for name, some in turn.items()}
            for kind, turn in turns.items()
        },
        "cold_over_shared_ttft": round(
            spread(cold["ttft_ms"])["median"] / spread(shared["ttft_ms"])["median"], 2
        ),
    }
    print(json.dumps(document, indent=2))


class _Turns:
    """B is asked, with A stopped, and the other way round."""

    def __init__(self, fleet: Fleet, memory: Client):
        self._fleet = fleet
        self._memory = memory
        self._a, self._b = fleet.instances
        self._rng = random.Random(3)

    async def measure(self, rounds: int) -> dict[str, dict[str, list[float]]]:
        """Figures of B by kind of turn; the first round warms up."""
        turns: dict[str, dict[str, list[float]]] = {"shared": {}, "cold": {}}
        for number in range(rounds + 1):
            prompt = random_prompt(self._rng, _PROMPT)
            async with self._fleet.without(self._b):
                by_a = await self._fleet.ask(prompt, _ANSWER)
            async with self._fleet.without(self._a):
                cold, _ = await self._ask_b(random_prompt(self._rng, _PROMPT))
                shared, by_b = await self._ask_b(prompt)
            shared["same_tokens_as_a"] = float(by_b.token_ids == by_a.token_ids)
            for kind, figures in (("cold", cold), ("shared", shared)):
                for name, figure in figures.items() if number else ():
                    turns[kind].setdefault(name, []).append(figure)
        return turns

    async def _ask_b(self, prompt: list[int]) -> tuple[dict[str, float], Stream]:
        num_pieces = 0
        private = pool = 0

        def look() -> None:
            nonlocal num_pieces, private, pool
            num_pieces += 1
            if num_pieces == _LOOK_AT:
                private, pool = self._private_bytes(), self._pool_bytes()

        private_before, pool_before = self._private_bytes(), self._pool_bytes()
        answer = await self._fleet.ask(prompt, _ANSWER, on_piece=look)
        figures: dict[str, Any] = {
            "ttft_ms": answer.ttft_ms,
            "added_private_bytes": private - private_before,
            "added_pool_bytes": pool - pool_before,
        }
        if answer.num_cached is not None:
            figures["cached_tokens"] = answer.num_cached
        return figures, answer

    def _private_bytes(self) -> int:
        assert self._b.pid is not None
        memory = process_memory.read(self._b.pid, handed_out(self._memory))
        assert memory is not None
        return memory.private_bytes

    def _pool_bytes(self) -> int:
        pool = self._memory.statistics().pool
        return pool.leased_bytes + pool.cached_bytes


if __name__ == "__main__":
    main()
