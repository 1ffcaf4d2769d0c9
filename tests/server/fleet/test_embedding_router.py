"""Texts to embed on real instances of a tiny model: spread over all, moved when one ends, forgotten
when nobody waits."""

import asyncio
import os
import signal
from array import array
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.errors import InvalidRequest, NotReady
from server.fleet.embedding import PART_TOKENS, cut
from server.fleet.fleet import Fleet
from server.fleet.instance import Instance
from server.fleet.router import Router
from server.settings import Settings
from tests.daemon_process import DaemonProcess
from tests.workers.model.tiny_embedders import (
    MAX_POSITIONS,
    VOCAB_SIZE,
    config_of,
    reference_model,
    texts,
    write_checkpoint,
)
from workers import EngineSettings
from workers.messages import MAX_EMBED_INPUTS

TIMEOUT_S = 600.0
MANY = texts(*[1 + index % MAX_POSITIONS for index in range(300)])

Serve = Callable[[], AbstractAsyncContextManager[tuple[Router, Fleet]]]


@given(st.lists(st.integers(1, 3000), max_size=600))
def test_parts_hold_every_text_once_and_are_bounded(lengths: list[int]) -> None:
    parts = cut(lengths)
    assert sorted(index for part in parts for index in part) == list(range(len(lengths)))
    for part in parts:
        assert 1 <= len(part) <= MAX_EMBED_INPUTS
        assert len(part) == 1 or sum(lengths[index] for index in part) <= PART_TOKENS
        assert [lengths[index] for index in part] == sorted(
            (lengths[index] for index in part), reverse=True
        )


@pytest.fixture
def serve(daemon: DaemonProcess, tmp_path: Path) -> Serve:
    folder = write_checkpoint(tmp_path / "tiny", reference_model("bert"), config_of("bert"))

    @asynccontextmanager
    async def served() -> AsyncIterator[tuple[Router, Fleet]]:
        settings = Settings(
            model=folder,
            served_model_name="tiny",
            runtime_dir=daemon.runtime_dir.path,
            num_instances=2,
            hang_timeout_s=0,  # they are stopped here to hold them, and are not to be replaced
            engine=EngineSettings(max_num_batched_tokens=64, threads=1),
        )
        router = Router(settings)
        fleet = Fleet(settings, daemon.runtime_dir, router.listeners, folder / "tokenizer.json")
        router.bind(fleet)
        fleet.launch()
        try:
            await fleet.wait_ready()
            yield router, fleet
        finally:
            await fleet.close()

    return served


def within_timeout(test: Callable[[], Any]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(TIMEOUT_S):
            await test()

    asyncio.run(bounded())


async def until(condition: Callable[[], object]) -> None:
    """The test's timeout bounds it."""
    while not condition():
        await asyncio.sleep(0.01)


def signalled(instance: Instance, number: int) -> None:
    assert instance.pid is not None
    os.kill(instance.pid, number)


def assert_same(ours: list[bytes], theirs: list[bytes]) -> None:
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        assert array("f", one).tolist() == pytest.approx(array("f", other).tolist(), abs=1e-5)


def test_texts_are_spread_moved_and_forgotten(serve: Serve) -> None:
    async def test() -> None:
        async with serve() as (router, fleet):
            facts = router.facts
            assert (facts.task, facts.embedding_size, facts.max_model_len) == ("embed", 32, 64)
            first, second = fleet.ready_instances
            whole = await router.embed("whole", MANY)
            assert_same(await router.embed("alone", MANY[7:8]), whole[7:8])
            assert {len(one) for one in whole} == {4 * 32}

            # Both had parts of it; those of the one that ends go to the other.
            signalled(first, signal.SIGSTOP)
            moved = asyncio.create_task(router.embed("moved", MANY))
            await until(lambda: 0 < router.num_streams <= router.num_requests(first))
            assert not moved.done()
            signalled(first, signal.SIGKILL)
            assert_same(await moved, whole)
            await fleet.wait_ready()

            # Nobody waits any more: nothing is left of it anywhere.
            signalled(second, signal.SIGSTOP)
            unwanted = asyncio.create_task(router.embed("unwanted", MANY))
            await until(lambda: router.num_requests(second))
            unwanted.cancel()
            with pytest.raises(asyncio.CancelledError):
                await unwanted
            assert router.num_streams == 0
            assert not any(router.num_requests(one) for one in fleet.instances)
            signalled(second, signal.SIGCONT)
            assert_same(await router.embed("after", MANY), whole)

            # What an instance refuses is the request's fault.
            with pytest.raises(InvalidRequest, match="outside the model's vocabulary"):
                await router.embed("wrong", [[5], [VOCAB_SIZE]])
            assert router.num_streams == 0

            # A request that was admitted is answered while the server shuts down; no other is.
            last = asyncio.create_task(router.embed("last", MANY))
            await until(lambda: router.num_streams)
            router.draining = True
            assert await router.wait_idle(TIMEOUT_S)
            await asyncio.sleep(0)
            assert last.done()
            assert_same(await last, whole)
            with pytest.raises(NotReady):
                await router.embed("late", MANY[:1])

    within_timeout(test)
