"""A router and a fleet of real instances of a tiny model, and what tests do to them.

Owns what the tests of the router share. Invariant: what a test submits is read by nobody else, and
every process is gone when it is over.
"""

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from allocator import RuntimeDir
from server.fleet.fleet import Fleet
from server.fleet.instance import Instance, Listeners
from server.fleet.router import Router, Stream
from server.generation import NO_OPTIONS, RequestOptions
from server.processes.endings import Ending
from server.settings import Settings
from tests.workers.tiny_models import prompt
from workers import EngineSettings
from workers.messages import SamplingParams

PROMPT = prompt(12)
NUM_TOKENS = 80
TIMEOUT_S = 600.0


class Served:
    """A router and its fleet; `ended` holds the instances that ended, in order, and how they did,
    `ended_at` when the last of them did."""

    def __init__(self, settings: Settings, runtime_dir: RuntimeDir):
        self.router = Router(settings)
        self.ended: list[Instance] = []
        self.endings: list[Ending] = []
        self.ended_at = 0.0
        told = self.router.listeners

        def on_ended(instance: Instance, ending: Ending) -> None:
            self.ended.append(instance)
            self.endings.append(ending)
            self.ended_at = time.monotonic()
            told.lost(instance, ending)

        listeners = Listeners(told.output, told.ready, on_ended, told.num_requests)
        self.fleet = Fleet(settings, runtime_dir, listeners, settings.model / "tokenizer.json")
        self.router.bind(self.fleet)

    async def until(self, condition: Callable[[], object]) -> None:
        while not condition():
            await self.fleet.change()

    async def submit(
        self, name: str = "a", options: RequestOptions = NO_OPTIONS, **changes: Any
    ) -> Stream:
        sampling = SamplingParams(
            **{"max_tokens": NUM_TOKENS, "temperature": 0.0, **changes}, ignore_eos=True
        )
        return await self.router.submit(name, PROMPT, sampling, options)


Serve = Callable[..., Any]


@asynccontextmanager
async def served(
    runtime_dir: RuntimeDir,
    usual_model: Path,
    num_instances: int = 2,
    max_num_seqs: int = 4,
    **changes: Any,
) -> AsyncIterator[Served]:
    """Launched, and closed at the end. `changes` are those of the settings, the model included."""
    # Instances are stopped here to hold them, and must not be taken for hung.
    given = {"hang_timeout_s": 0, "model": usual_model, **changes}
    settings = Settings(
        **given,
        served_model_name="tiny",
        runtime_dir=runtime_dir.path,
        num_instances=num_instances,
        engine=EngineSettings(max_num_seqs=max_num_seqs, threads=1),
    )
    one = Served(settings, runtime_dir)
    one.fleet.launch()
    try:
        yield one
    finally:
        await one.router.close()
        await one.fleet.close()


def within_timeout(test: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(TIMEOUT_S):
            await test()

    asyncio.run(bounded())


async def all_tokens(stream: Stream) -> list[int]:
    chunks = [chunk async for chunk in stream]
    assert [chunk.finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1].finish_reason == "length"
    return [token for chunk in chunks for token in chunk.token_ids]


async def first_tokens(stream: Stream, count: int) -> list[int]:
    tokens: list[int] = []
    async for chunk in stream:
        tokens += chunk.token_ids
        if len(tokens) >= count:
            break
    return tokens


async def next_instance(stream: Stream, before: Instance | None) -> Instance:
    """The one that it goes on with, once it is computed there."""
    while True:
        await first_tokens(stream, 1)
        instance = stream.instance
        if instance is None or instance is before:
            continue
        beat = instance.leash.look()
        if beat is not None and stream.request_id in (beat.names or ()):
            return instance


def kill(instance: Instance | None) -> None:
    assert instance is not None
    assert instance.pid is not None
    os.kill(instance.pid, signal.SIGKILL)


def crash(instance: Instance | None) -> None:
    """What a process does to itself."""
    assert instance is not None
    assert instance.pid is not None
    os.kill(instance.pid, signal.SIGSEGV)
    os.kill(instance.pid, signal.SIGCONT)  # it may be held


def hold(instance: Instance | None) -> None:
    """Let it answer nothing more. It can still be killed."""
    assert instance is not None
    assert instance.pid is not None
    os.kill(instance.pid, signal.SIGSTOP)
