"""The server's side of the forkserver, where the other side does not do its part."""

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys

import pytest

from workers import EngineSettings
from workers.client import Forkserver, ForkserverBusy, ForkserverEnded
from workers.messages import InstanceSpec, decode_start

SPEC = InstanceSpec(
    name="i0",
    runtime_dir="/run",
    engines="ipc:///run/engines.sock",
    server_pid=1,
    model="/models/x" * 100,
    served_model_name="x",
    requested_at=0.0,
    settings=EngineSettings(),
    num_threads=1,
)


def test_one_that_does_not_read_is_busy_and_was_not_asked() -> None:
    """Whoever asks must not count on an instance that will never come."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.setblocking(False)
    with theirs, ours, subprocess.Popen([sys.executable, "-c", ""]) as process:
        forkserver = Forkserver(process, ours, -1)
        num_asked = 0
        with contextlib.suppress(ForkserverBusy):
            while True:
                forkserver.start(SPEC).close()
                num_asked += 1
        with pytest.raises(ForkserverBusy):
            forkserver.start(SPEC)
        theirs.setblocking(False)
        for _ in range(num_asked):
            assert decode_start(theirs.recv(1 << 16)).spec == SPEC
        with pytest.raises(BlockingIOError):
            theirs.recv(1 << 16)
        forkserver.start(SPEC).close()  # there is room again
        theirs.close()
        with pytest.raises(ForkserverEnded):
            forkserver.start(SPEC)


@pytest.mark.parametrize("kills", [False, True])
def test_one_that_is_stopped_as_it_begins_is_ended(kills: bool) -> None:
    """It has not said yet by what it is to end."""

    async def launch_and_end() -> int:
        forkserver = Forkserver.launch("nowhere", "auto")
        os.kill(forkserver.pid, signal.SIGSTOP)
        if kills:
            forkserver.kill()
        return await forkserver.close()

    async def bounded() -> int:
        async with asyncio.timeout(300):
            return await launch_and_end()

    assert asyncio.run(bounded()) == -signal.SIGKILL
