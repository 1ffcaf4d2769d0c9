"""The allocator beside a server: found, waited for, started."""

import asyncio
import os
import signal

import pytest

from allocator import AllocatorSilent, RuntimeDir
from server import daemons
from server.daemons import AllocatorProcess
from tests.daemon_process import DaemonProcess


def test_one_that_runs_is_used_once_it_answers(
    daemon: DaemonProcess, runtime_dir: RuntimeDir
) -> None:
    found = AllocatorProcess(runtime_dir)
    asyncio.run(found.find_or_start())
    asyncio.run(found.stop_if_unused())
    assert daemon.process.poll() is None  # it was not started here


def test_one_that_hangs_is_no_allocator(
    daemon: DaemonProcess, runtime_dir: RuntimeDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    connect = daemons.connect
    monkeypatch.setattr(daemons, "connect", lambda where, label: connect(where, 1.0, label=label))
    os.kill(daemon.pid, signal.SIGSTOP)
    try:
        with pytest.raises(AllocatorSilent, match=r"does not answer within 1 s.*kill -CONT"):
            asyncio.run(AllocatorProcess(runtime_dir).find_or_start())
    finally:
        os.kill(daemon.pid, signal.SIGCONT)


def test_one_that_has_not_come_up_is_waited_for_and_replaced_if_it_never_does(
    runtime_dir: RuntimeDir,
) -> None:
    """It is there, but does not listen: as while it takes over from another."""
    lock = runtime_dir.lock("allocator")  # of this process, which is no allocator
    probes = 0

    async def wait() -> None:
        nonlocal probes
        allocator = AllocatorProcess(runtime_dir)
        probe = allocator._probe

        def counted() -> None:
            nonlocal probes
            probes += 1
            probe()

        allocator._probe = counted  # type: ignore[method-assign]
        waiting = asyncio.create_task(allocator.find_or_start())
        while probes < 3:
            await asyncio.sleep(0.01)
            assert not waiting.done()
        # The lock is held on; who holds it is gone, as far as the file says.
        lock.release()
        await waiting
        await allocator.stop_if_unused()

    asyncio.run(wait())
