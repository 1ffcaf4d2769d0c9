"""The allocator that a server looks after: its own or another's, ended, hung, or not to be started
for a while."""

import asyncio
import os
import resource
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager

import pytest

from allocator import AllocatorGone, ProcessState, RuntimeDir, connect
from server.background import Background
from server.fleet import daemons
from server.fleet.daemons import AllocatorProcess
from tests.daemon_process import DaemonProcess
from tests.leaks import descriptors, segments

pytestmark = pytest.mark.slow

TIMEOUT_S = 600.0
HANG_TIMEOUT_S = 1.0


def within_timeout(test: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(TIMEOUT_S):
            await test()

    asyncio.run(bounded())


async def until(condition: Callable[[], object]) -> None:
    while not condition():
        await asyncio.sleep(0.01)


@asynccontextmanager
async def looked_after(
    runtime_dir: RuntimeDir, awaited: Callable[[], bool] = lambda: False
) -> AsyncIterator[AllocatorProcess]:
    allocator, background = (
        AllocatorProcess(runtime_dir, hang_timeout_s=HANG_TIMEOUT_S),
        Background(),
    )
    try:
        await allocator.find_or_start()
        background.keep("the watch over the allocator", lambda: allocator.watch(awaited))
        yield allocator
    finally:
        await background.close()
        await allocator.stop_if_unused()


@contextmanager
def no_descriptors_left() -> Iterator[None]:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = max(descriptors()) + 1
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, limits[1]))
    held: list[int] = []
    try:
        for _ in range(most):
            try:
                held.append(os.dup(0))
            except OSError:
                break
        yield
    finally:
        for one in held:
            os.close(one)
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_its_own_is_replaced_however_it_fails(runtime_dir: RuntimeDir) -> None:
    async def test() -> None:
        async with looked_after(runtime_dir) as allocator:
            assert allocator.is_ours
            seen = [allocator.pid]
            for number in (signal.SIGKILL, signal.SIGSTOP):
                os.kill(allocator.pid or 0, number)
                await until(lambda: allocator.pid not in (None, *seen))
                seen.append(allocator.pid)
                assert allocator.unresponsive_since is None
            with connect(runtime_dir) as memory:
                assert memory.daemon_pid == allocator.pid
            # One that hangs is not waited for at the end, and nothing of it is left.
            with connect(runtime_dir) as memory:
                memory.lease(1 << 16)
            os.kill(allocator.pid or 0, signal.SIGSTOP)
        assert segments(runtime_dir.segment_prefix) == []
        assert list(runtime_dir.path.iterdir()) == []

    within_timeout(test)


def test_the_watch_outlives_a_lack_of_descriptors(
    runtime_dir: RuntimeDir, caplog: pytest.LogCaptureFixture
) -> None:
    async def test() -> None:
        async with looked_after(runtime_dir) as allocator:
            first = allocator.pid
            with no_descriptors_left():
                os.kill(first or 0, signal.SIGKILL)
                await until(lambda: "Too many open files" in caplog.text)
            await until(lambda: allocator.pid not in (None, first))

    within_timeout(test)


def test_anothers_is_replaced_where_nobody_else_does(
    start_daemon: Callable[[], DaemonProcess],
    runtime_dir: RuntimeDir,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def test() -> None:
        first = start_daemon()
        async with looked_after(runtime_dir) as allocator:
            assert (allocator.pid, allocator.is_ours) == (first.pid, False)
            # It may hang, which is told, but is not the server's to kill.
            os.kill(first.pid, signal.SIGSTOP)
            await until(lambda: allocator.unresponsive_since is not None)
            os.kill(first.pid, signal.SIGCONT)
            await until(lambda: allocator.unresponsive_since is None)
            first.kill()
            await until(lambda: allocator.pid is None)
            second = start_daemon()
            await until(lambda: allocator.pid == second.pid)
            assert not allocator.is_ours
            monkeypatch.setattr(daemons, "_OTHERS_S", 0.2)
            second.kill()
            await until(lambda: allocator.pid not in (None, second.pid))
            assert allocator.is_ours

    within_timeout(test)


def test_one_that_hangs_is_told_of_at_the_start(
    daemon: DaemonProcess, runtime_dir: RuntimeDir
) -> None:
    os.kill(daemon.pid, signal.SIGSTOP)
    try:
        state = ProcessState.of(daemon.pid)
        assert state is not None

        async def test() -> None:
            with pytest.raises(AllocatorGone, match=rf"pid {daemon.pid}.* stopped.*onecopy stop"):
                await AllocatorProcess(runtime_dir).find_or_start()

        within_timeout(test)
    finally:
        os.kill(daemon.pid, signal.SIGCONT)


def test_one_that_has_not_come_up_is_waited_for_and_replaced_if_it_never_does(
    runtime_dir: RuntimeDir,
) -> None:
    """It is there, but does not listen: as while it takes over from another."""
    lock = runtime_dir.lock("allocator")  # of this process, which is no allocator
    num_asked = 0

    async def test() -> None:
        nonlocal num_asked
        allocator = AllocatorProcess(runtime_dir)
        answers = allocator._answers

        def counted() -> bool:
            nonlocal num_asked
            num_asked += 1
            return answers()

        allocator._answers = counted  # type: ignore[method-assign]
        waiting = asyncio.create_task(allocator.find_or_start())
        await until(lambda: num_asked >= 3)
        assert not waiting.done()
        # The lock is held on; who holds it is gone, as far as the file says.
        lock.release()
        await waiting
        await allocator.stop_if_unused()

    within_timeout(test)
