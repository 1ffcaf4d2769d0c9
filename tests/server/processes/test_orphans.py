"""What nobody waits for is waited for, and only that."""

import os
import signal
import subprocess
import sys

from allocator import ProcessState
from server.processes.orphans import Orphans
from tests.leaks import wait_until
from workers.process import linux

_LEAVES_A_CHILD = """
import subprocess, sys
pause = [sys.executable, "-c", "import signal; signal.pause()"]
child = subprocess.Popen(pause, stdout=subprocess.DEVNULL)
print(child.pid, flush=True)
"""


def _has_ended(pid: int) -> bool:
    state = ProcessState.of(pid)
    return state is not None and state.has_ended


def test_an_orphan_is_waited_for_when_it_is_plain_that_nobody_else_does() -> None:
    linux.adopt_orphans()
    parent = subprocess.run(
        [sys.executable, "-c", _LEAVES_A_CHILD], stdout=subprocess.PIPE, check=True, timeout=60
    )
    orphan = int(parent.stdout)
    os.kill(orphan, signal.SIGKILL)
    wait_until(lambda: _has_ended(orphan), "the end of the orphan")
    orphans = Orphans()
    for now in (0.0, 5.0, 10.0):
        orphans.look(now)
        assert _has_ended(orphan), now
    orphans.look(10.1)
    assert ProcessState.of(orphan) is None


def test_who_started_a_process_gets_its_status() -> None:
    process = subprocess.Popen([sys.executable, "-c", "raise SystemExit(7)"])
    wait_until(lambda: _has_ended(process.pid), "the end of the child")
    orphans = Orphans()
    orphans.look(0.0)
    assert process.wait(60) == 7
    orphans.look(11.0)  # its number may be another process's by now
