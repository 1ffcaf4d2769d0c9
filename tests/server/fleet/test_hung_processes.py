"""Instances and a forkserver that are stopped, or only slow: who is hung is replaced and loses no
request, who is slow is left alone."""

import asyncio
import os
import signal
import threading
from pathlib import Path

import pytest

from allocator import ProcessIdentity, ProcessState
from server.fleet.instance import Instance
from server.processes.endings import OutOfMemoryKills, ending_of
from tests.daemon_process import DaemonProcess
from tests.server.fleet.tiny_fleet import (
    Serve,
    all_tokens,
    first_tokens,
    hold,
    next_instance,
    within_timeout,
)

HANG_TIMEOUT_S = 1.0


class Slowed:
    """A process that is stopped for most of the time, and continued until it has done something."""

    def __init__(self, instance: Instance) -> None:
        self._pid = instance.pid or 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._slow_down)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        os.kill(self._pid, signal.SIGCONT)

    def _slow_down(self) -> None:
        while not self._over.is_set():
            os.kill(self._pid, signal.SIGSTOP)
            self._over.wait(0.13)
            before = ProcessState.of(self._pid)
            os.kill(self._pid, signal.SIGCONT)
            while not self._over.wait(0.01) and self._idle_since(before):
                pass

    def _idle_since(self, before: ProcessState | None) -> bool:
        """On a busy machine it may have to wait for its turn."""
        now = ProcessState.of(self._pid)
        return before is not None and now is not None and now.counts == before.counts


def test_who_is_hung_is_replaced_and_who_is_slow_is_not(serve: Serve) -> None:
    async def test() -> None:
        async with serve(2, hang_timeout_s=HANG_TIMEOUT_S) as served:
            fleet = served.fleet
            await fleet.wait_ready()
            whole = await all_tokens(await served.submit(max_tokens=300))

            # As on a machine that is 14 times slower than usual.
            instance = fleet.instances[0]
            with Slowed(instance):
                streams = [await served.submit(name, max_tokens=100) for name in "ab"]
                for stream in streams:
                    assert await all_tokens(stream) == whole[:100]
            assert [stream.num_moves for stream in streams] == [0, 0]
            assert served.ended == []

            # Stopped, with a request.
            stream = await served.submit(max_tokens=300)
            first = await next_instance(stream, None)
            identity = ProcessIdentity.of(first.pid or 0)
            assert identity is not None
            hold(first)
            await served.until(lambda: first.unresponsive_since is not None)
            # Nobody is sent there any more, though it has fewer requests than the other.
            others = [await served.submit(f"other {number}") for number in range(3)]
            assert all(one.instance is not first for one in others)
            await served.until(lambda: first.is_gone)
            await all_tokens(stream)
            assert stream.generated == whole
            assert (stream.num_moves, stream.num_blamed) == (1, 0)
            assert [ending.given_up for ending in served.endings] == [True]
            await served.until(lambda: first.state == "ended")
            assert not identity.is_alive()
            await fleet.wait_ready()
            for one in others:
                await all_tokens(one)

            # It is to end, has nothing to do, and is stopped: nobody waits for it.
            hold(fleet.instances[0])
            await fleet.drain(600.0)
            assert [one for one in fleet.instances if not one.is_gone] == []

    within_timeout(test)


def test_who_is_continued_in_time_goes_on(serve: Serve) -> None:
    async def test() -> None:
        async with serve(1, hang_timeout_s=600.0) as served:
            await served.fleet.wait_ready()
            stream = await served.submit(max_tokens=300)
            instance = await next_instance(stream, None)
            hold(instance)
            await served.until(lambda: instance.unresponsive_since is not None)
            assert served.router.num_ready == 0
            waiting = await served.submit("b")  # it will be back, or be replaced
            os.kill(instance.pid or 0, signal.SIGCONT)
            await all_tokens(stream)
            await all_tokens(waiting)
            assert (stream.num_moves, instance.unresponsive_since) == (0, None)
            assert served.ended == []

    within_timeout(test)


def test_a_forkserver_is_replaced_without_its_instances(serve: Serve) -> None:
    async def test() -> None:
        async with serve(2, hang_timeout_s=HANG_TIMEOUT_S) as served:
            fleet = served.fleet
            await fleet.wait_ready()
            before = [one.pid for one in fleet.instances]
            streams = [await served.submit(name, max_tokens=1000) for name in "ab"]
            for stream in streams:
                await first_tokens(stream, 1)
            killed = fleet.forkserver_pid or 0
            os.kill(killed, signal.SIGKILL)
            await served.until(lambda: fleet.forkserver_pid not in (None, killed))
            for stream in streams:
                await all_tokens(stream)
                assert (len(stream.generated), stream.num_moves) == (1000, 0)
            assert [one.pid for one in fleet.instances] == before
            # An instance whose forkserver is gone ends as any other, and is replaced by the next.
            os.kill(before[0] or 0, signal.SIGSEGV)
            await served.until(lambda: served.endings)
            assert served.endings[0].how == "signal 11"
            await fleet.wait_ready()

            # One that is stopped does not answer, and what was asked of it is no phantom.
            stopped = fleet.forkserver_pid or 0
            os.kill(stopped, signal.SIGSTOP)
            await fleet.scale(3)
            assert sorted(one.state for one in fleet.instances) == ["ready", "ready", "starting"]
            assert before[1] in [one.pid for one in fleet.instances]
            await fleet.wait_ready()
            assert fleet.forkserver_pid not in (None, stopped)
            assert [one.state for one in fleet.instances] == ["ready"] * 3
            # One that hangs is not waited for, to learn how an instance ended.
            os.kill(fleet.forkserver_pid or 0, signal.SIGSTOP)
            os.kill(fleet.instances[0].pid or 0, signal.SIGABRT)
            await served.until(lambda: len(served.endings) > 2)
            assert served.endings[-1].how == "signal 6"

    within_timeout(test)


def test_streams_go_on_without_an_allocator_that_is_stopped(
    serve: Serve, daemon: DaemonProcess
) -> None:
    async def test() -> None:
        async with serve(2) as served:
            fleet = served.fleet
            await fleet.wait_ready()
            whole = await all_tokens(await served.submit(max_tokens=300))
            os.kill(daemon.pid, signal.SIGSTOP)
            try:
                streams = [await served.submit(name, max_tokens=300) for name in "abcd"]
                assert [await all_tokens(stream) for stream in streams] == [whole] * 4
                assert fleet.allocator_silent_since is not None
                assert fleet.awaits_allocator
            finally:
                os.kill(daemon.pid, signal.SIGCONT)
            while fleet.allocator_silent_since is not None:
                await asyncio.sleep(0.01)
            assert await all_tokens(await served.submit(max_tokens=300)) == whole
            assert served.ended == []

    within_timeout(test)


# --- whose fault it is


@pytest.mark.parametrize(
    ("status", "out_of_memory", "by_itself"),
    [
        (0, False, False),
        (1, False, True),
        (None, False, False),
        (-signal.SIGKILL, False, False),
        (-signal.SIGKILL, True, True),
        (-signal.SIGTERM, False, False),
        (-signal.SIGTERM, True, False),
        (-signal.SIGSEGV, False, True),
        (-signal.SIGBUS, False, True),
        (-signal.SIGABRT, False, True),
        (-signal.SIGILL, False, True),
    ],
)
def test_what_others_do_to_a_process_is_nobodys_fault(
    status: int | None, out_of_memory: bool, by_itself: bool
) -> None:
    ending = ending_of(status, out_of_memory=out_of_memory, names=frozenset({"a"}))
    assert ending.by_itself is by_itself
    assert ending.may_be_caused_by("a") is by_itself
    assert not ending.may_be_caused_by("b")
    unknown = ending_of(status, out_of_memory=out_of_memory)
    assert unknown.may_be_caused_by("b") is by_itself


def test_kills_for_want_of_memory_are_counted(tmp_path: Path) -> None:
    missing, events = tmp_path / "missing", tmp_path / "memory.events"
    events.write_text("low 0\noom 7\noom_kill 3\noom_group_kill 0\n")
    kills = OutOfMemoryKills((missing, events))
    assert not kills.just_now()
    events.write_text("low 0\noom 8\noom_kill 4\noom_group_kill 0\n")
    assert kills.just_now()
    assert kills.just_now()  # for a while: the process may take its time to end
    assert not OutOfMemoryKills((missing,)).just_now()
    assert not OutOfMemoryKills().just_now()
