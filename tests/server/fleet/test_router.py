"""Router and fleet with a real forkserver, real instances and a tiny model: which instance serves a
request, and what goes on when that instance, or all of them, end."""

import asyncio
import itertools
import os
import signal
from pathlib import Path

import pytest

from server.errors import DeadlineExceeded, InstanceFailed, InvalidRequest, NotReady, Overloaded
from server.fleet.starts import StartError
from server.generation import RequestOptions
from tests.server.fleet.tiny_fleet import (
    NUM_TOKENS,
    TIMEOUT_S,
    Serve,
    all_tokens,
    crash,
    first_tokens,
    hold,
    kill,
    next_instance,
    within_timeout,
)
from tests.workers.tiny_models import VOCAB_SIZE, write_checkpoint
from workers.messages import Exited, Output, SamplingParams


def test_a_request_goes_on_wherever_its_instance_ended(serve: Serve) -> None:
    async def test() -> None:
        async with serve() as served:
            router, fleet = served.router, served.fleet
            with pytest.raises(NotReady):
                await served.submit()
            with pytest.raises(NotReady):
                _ = router.facts
            # The first one alone finds out whether the model can be served.
            while not fleet.ready_instances:
                assert len(fleet.instances) <= 1
                await fleet.change()
            await fleet.wait_ready()
            assert [one.ready.loaded for one in fleet.instances] == [True, False]
            whole = await all_tokens(await served.submit(max_tokens=1500))
            assert len(whole) == 1500

            # To the idle one at once: it has the tokens so far, and the index of the next one.
            moved = await served.submit(max_tokens=1500)
            begun = await first_tokens(moved, 20)
            kill(moved.instance)
            rest = await all_tokens(moved)
            assert moved.generated == begun + rest
            # Far on, rounding may decide: it differs where a prompt is computed in one piece.
            assert (moved.generated[:200], len(moved.generated)) == (whole[:200], 1500)
            assert moved.num_moves == 1
            await fleet.wait_ready()

            # Else to the one that takes its place, and no token of anybody else reaches it.
            held, busy = [await served.submit(name, max_tokens=200) for name in "ab"]
            assert held.instance is not busy.instance is not None
            hold(held.instance)
            hold(busy.instance)
            stranger = Output(request_id="a", token_ids=(1, 2, 3), finish_reason="stop")
            assert busy.instance is not None
            router.listeners.output(busy.instance.name, stranger)
            router.listeners.output("nobody", stranger)
            before = {one.name for one in fleet.instances}
            kill(held.instance)
            assert await all_tokens(held) == whole[:200]
            assert busy.num_moves == 0
            kill(busy.instance)
            assert await all_tokens(busy) == whole[:200]
            await fleet.wait_ready()
            assert not before & {one.name for one in fleet.instances}

            # All end at once, and nobody can start another for a while.
            streams = [await served.submit(name, max_tokens=200) for name in "abc"]
            for one in fleet.instances:
                hold(one)
            assert fleet.forkserver_pid is not None
            old = fleet.forkserver_pid
            os.kill(old, signal.SIGKILL)
            for one in fleet.instances:
                kill(one)
            await served.until(lambda: not fleet.ready_instances)
            late = await served.submit("late", max_tokens=200)  # admitted, since they will be back
            for stream in (*streams, late):
                assert await all_tokens(stream) == whole[:200]
            assert [stream.num_moves for stream in streams] == [1] * 3
            assert fleet.forkserver_pid not in (None, old)
            assert await router.wait_idle(1)
            await fleet.wait_ready()
            assert [router.num_requests(one) for one in fleet.instances] == [0, 0]

    within_timeout(test)


def test_however_often_its_instance_is_killed_a_request_goes_on(serve: Serve) -> None:
    async def test() -> None:
        async with serve(1) as served:
            await served.fleet.wait_ready()
            whole = await all_tokens(await served.submit(max_tokens=300))
            stream = await served.submit(max_tokens=300)
            for number in range(5):
                await first_tokens(stream, 1)
                while stream.instance is None:  # that one was from before the last end
                    await first_tokens(stream, 1)
                kill(stream.instance)
                await served.until(lambda number=number: len(served.ended) > number)
            await all_tokens(stream)
            assert stream.generated == whole
            assert (stream.num_moves, stream.num_blamed) == (5, 0)
            assert {ending.how for ending in served.endings} == {"signal 9"}

    within_timeout(test)


def test_what_ends_instance_after_instance_goes_on_alone_and_then_is_given_up(serve: Serve) -> None:
    async def test() -> None:
        async with serve(1) as served:
            fleet = served.fleet
            await fleet.wait_ready()
            suspect, instance = await served.submit("suspect", max_tokens=60_000), None
            for number in range(2):
                instance = await next_instance(suspect, instance)
                assert (instance.alone, suspect.num_blamed) == (False, number)
                # Who is there, but was not computed, has nothing to do with it.
                hold(instance)
                other = await served.submit(f"other {number}")
                assert other.instance is instance
                crash(instance)
                await served.until(lambda number=number: len(served.ended) > number)
                assert (other.num_moves, other.num_blamed) == (1, 0)
                assert len(await all_tokens(other)) == NUM_TOKENS
            assert suspect.is_suspect
            alone = await next_instance(suspect, instance)
            assert alone.alone
            # Others have the ordinary instance, and don't wait.
            neighbours = [await served.submit(f"{number}") for number in range(3)]
            for one in neighbours:
                assert len(await all_tokens(one)) == NUM_TOKENS
                assert (one.num_moves, one.num_waits) == (0, 0)
            assert suspect.instance is alone
            assert served.router.num_requests(alone) == 1
            # Killed by somebody else, it gets another one for itself.
            kill(alone)
            again = await next_instance(suspect, alone)
            assert again.alone
            busy = await served.submit("busy", max_tokens=2000)
            crash(again)
            with pytest.raises(InstanceFailed, match="3 instances ended by themselves"):
                await all_tokens(suspect)
            assert len(await all_tokens(busy)) == 2000
            assert busy.num_moves == 0
            await served.until(lambda: [one.alone for one in fleet.instances] == [False])
            assert await served.router.wait_idle(1)

    within_timeout(test)


def test_suspects_take_turns_and_all_end(serve: Serve) -> None:
    """Whoever was computed beside what ends instances is suspected, too; none of them starves."""

    async def test() -> None:
        async with serve(1) as served:
            await served.fleet.wait_ready()
            whole = await all_tokens(await served.submit(max_tokens=200))
            streams = [await served.submit(name, max_tokens=200) for name in "abcd"]
            instance = None
            for number in range(2):
                instance = await next_instance(streams[0], instance)
                crash(instance)
                await served.until(lambda number=number: len(served.ended) > number)
            for stream in streams:
                await all_tokens(stream)
                assert stream.generated == whole
            assert max(stream.num_blamed for stream in streams) == 2
            await served.until(lambda: [one.alone for one in served.fleet.instances] == [False])

    within_timeout(test)


def test_a_deadline_holds_whatever_the_instance_does(serve: Serve) -> None:
    async def test() -> None:
        async with serve(1) as served:
            await served.fleet.wait_ready()
            hold(served.fleet.instances[0])
            stream = await served.submit(options=RequestOptions(deadline_s=0.2))
            with pytest.raises(DeadlineExceeded):
                await all_tokens(stream)
            assert await served.router.wait_idle(1)
            assert served.router.num_requests(served.fleet.instances[0]) == 0

    within_timeout(test)


def test_what_is_too_much_or_impossible_is_refused(serve: Serve) -> None:
    async def test() -> None:
        async with serve(1, max_num_seqs=2, max_queued=1) as served:
            router = served.router
            await served.fleet.wait_ready()
            hold(served.fleet.instances[0])
            streams = [await served.submit(name) for name in "abc"]
            with pytest.raises(Overloaded):
                await served.submit("d")
            assert router.num_streams == 3
            for stream in streams:
                await stream.aclose()
                await stream.aclose()
            assert await router.wait_idle(1)
            await served.submit("e")
            assert not await router.wait_idle(0.01)
            kill(served.fleet.instances[0])
            await served.until(lambda: served.ended and router.num_ready)
            await router.wait_idle(TIMEOUT_S)

            wrong = await router.submit("f", [VOCAB_SIZE], SamplingParams(max_tokens=1))
            with pytest.raises(InvalidRequest, match="vocabulary"):
                await all_tokens(wrong)
            router.draining = True
            with pytest.raises(NotReady, match="shutting down"):
                await served.submit("g")

    within_timeout(test)


def test_drained_instances_finish_and_end_and_are_not_replaced(serve: Serve) -> None:
    async def test() -> None:
        async with serve() as served:
            fleet = served.fleet
            await fleet.wait_ready()
            streams = [await served.submit(name, max_tokens=400) for name in "abcd"]
            await fleet.drain(TIMEOUT_S)
            assert [len(await all_tokens(stream)) for stream in streams] == [400] * 4
            assert (fleet.instances, len(served.ended), fleet.num_replaced) == ([], 2, 0)

    within_timeout(test)


def test_a_drain_sees_ends_however_near_to_each_other(serve: Serve) -> None:
    """Some turns of the loop apart: one may come between a look and the wait for a change. Going
    to sleep drains, too, and can be done more than once."""

    async def test() -> None:
        async with serve() as served:
            fleet = served.fleet
            for num_turns in range(6):
                await fleet.wait_ready()
                asleep = asyncio.create_task(fleet.sleep(10 * TIMEOUT_S, served.router.wait_idle))
                first, second = fleet.instances
                while second.state != "draining":
                    await asyncio.sleep(0)
                for one in (first, second):
                    for _ in range(num_turns):
                        await asyncio.sleep(0)
                    ended = Exited(name=one.name, pid=one.pid or 0, status=0)
                    fleet._supervision.on_forkserver_event(ended)
                assert await asleep
                assert fleet.instances == []
                fleet.wake()

    within_timeout(test)


def test_a_drain_does_not_wait_for_ever(serve: Serve) -> None:
    async def test() -> None:
        async with serve(1) as served:
            await served.fleet.wait_ready()
            await served.submit()
            hold(served.fleet.instances[0])
            await served.fleet.drain(0.2)
            assert [one.state for one in served.fleet.instances] == ["draining"]

    within_timeout(test)


def test_what_can_not_start_is_tried_again_ever_more_slowly(serve: Serve, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "late", "llama")
    config = folder / "config.json"
    sound = config.read_text()
    config.write_text("{")

    async def test() -> None:
        async with serve(1, model=folder) as served:
            with pytest.raises(StartError, match="not valid JSON"):
                await served.fleet.wait_ready()
            await served.until(lambda: len(served.ended) == 4)
            asked = [one.requested_at for one in served.ended]
            delays = [later - earlier for earlier, later in itertools.pairwise(asked)]
            assert all(delay >= 0.2 * 2**i for i, delay in enumerate(delays)), delays
            config.write_text(sound)
            await served.until(lambda: served.fleet.ready_instances)
            assert served.fleet.num_replaced == 0
            # From now on a loss is a loss, and no failure to start: it is replaced at once, not
            # after the pause that a fifth failure would bring.
            kill(served.fleet.ready_instances[0])
            await served.until(lambda: served.fleet.num_replaced)
            await served.fleet.wait_ready()
            replacement = served.fleet.instances[0]
            assert replacement.requested_at - served.ended_at < 0.2 * 2**4
            assert len(await all_tokens(await served.submit())) == NUM_TOKENS

    within_timeout(test)
