"""Ending processes that react, and some that can't."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from allocator import Client, ProcessIdentity, ProcessState, RuntimeDir, remove_leftovers
from server.processes.stopping import answers_nothing, stop_process
from tests.daemon_process import DaemonProcess
from tests.leaks import segments, wait_until

pytestmark = pytest.mark.slow

GENTLE = "import time; print(flush=True); time.sleep(600)"
DEAF = f"import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); {GENTLE}"
BUSY = (
    "import signal, sys, time\n"
    "def end(*_):\n"
    "    until = time.process_time() + 3\n"
    "    while time.process_time() < until: pass\n"
    "    sys.exit(0)\n"
    f"signal.signal(signal.SIGTERM, end); {GENTLE}"
)
Start = Callable[[str], tuple["subprocess.Popen[bytes]", ProcessIdentity]]


@pytest.fixture
def start() -> Iterator[Start]:
    started: list[subprocess.Popen[bytes]] = []

    def run(program: str) -> tuple["subprocess.Popen[bytes]", ProcessIdentity]:
        child = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE)
        started.append(child)
        assert child.stdout is not None
        child.stdout.readline()
        identity = ProcessIdentity.of(child.pid)
        assert identity is not None
        return child, identity

    yield run
    for child in started:
        child.kill()
        child.wait()
        assert child.stdout is not None
        child.stdout.close()


def test_who_reacts_is_not_killed(start: Start) -> None:
    for program, status in ((GENTLE, -signal.SIGTERM), (BUSY, 0)):
        child, identity = start(program)
        assert stop_process(identity, 600.0)
        assert child.wait() == status
        assert stop_process(identity, 600.0)  # there is nobody any more


def test_who_can_not_react_is_killed_long_before_the_time_is_over(start: Start) -> None:
    child, identity = start(DEAF)
    assert not stop_process(identity, 600.0)
    assert child.wait() == -signal.SIGKILL
    for is_mute in (None, lambda: False):
        child, identity = start(GENTLE)
        os.kill(child.pid, signal.SIGSTOP)
        wait_until(lambda pid=child.pid: ProcessState.of(pid).is_stopped, "it to be stopped")
        assert not stop_process(identity, 600.0, is_mute)
        assert child.wait() == -signal.SIGKILL
    # It may wait as long as it wants, but has to answer.
    child, identity = start(DEAF)
    assert not stop_process(identity, 600.0, lambda: True)
    assert child.wait() == -signal.SIGKILL


def test_who_listens_and_does_not_answer_is_mute(tmp_path: Path) -> None:
    path = tmp_path / "s"
    assert not answers_nothing(path)  # not there yet, or no longer
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listening:
        listening.bind(os.fspath(path))
        listening.listen()
        assert answers_nothing(path)
    assert not answers_nothing(path)


def test_what_a_killed_allocator_leaves_is_removed_but_not_from_under_another(
    daemon: DaemonProcess, memory: Client, runtime_dir: RuntimeDir
) -> None:
    memory.lease(1 << 20)
    memory.close()
    assert remove_leftovers(runtime_dir, "allocator") == []  # it runs
    assert segments(runtime_dir.segment_prefix) != []
    os.kill(daemon.pid, signal.SIGSTOP)
    identity = ProcessIdentity.of(daemon.pid)
    assert identity is not None
    assert not stop_process(identity, 600.0)
    daemon.process.wait()
    removed = remove_leftovers(runtime_dir, "allocator")
    assert {"allocator.sock", "allocator.journal", "allocator-requests.sock"} <= set(removed)
    assert segments(runtime_dir.segment_prefix) == []
    wait_until(lambda: list(runtime_dir.path.iterdir()) == [], "an empty directory")
