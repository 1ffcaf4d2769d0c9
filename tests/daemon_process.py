"""A real allocator in a process of its own.

Owns the process. Invariant: once constructed it answers, and after `stop` or `kill` it is gone and
waited for.
"""

import os
import signal
import subprocess
import sys
from pathlib import Path

from allocator import Client, RuntimeDir, connect
from tests.warm import Started, Warm

ROOT = Path(__file__).parents[1]
TIMEOUT_S = 300.0
"""A deadline that only a fault misses, on however slow a machine."""


class DaemonProcess:
    """`python -m allocator`, started and ready."""

    def __init__(
        self,
        runtime_dir: RuntimeDir,
        *arguments: str,
        program: str = "",
        warm: Warm | None = None,
    ):
        """`program`: to be run instead of `-m allocator`, with the same arguments. `warm` has
        imported `allocator.daemon.command`: it starts the daemon at less cost."""
        self.runtime_dir = runtime_dir
        ready_read, ready_write = os.pipe()
        options = ("--runtime-dir", str(runtime_dir.path), "--ready-fd", str(ready_write))
        self.process: subprocess.Popen[bytes] | Started
        try:
            if warm is not None and not program and warm.starts_the_same():
                self.process = warm.start(
                    *options, *arguments, cwd=str(ROOT), pass_fds=[ready_write]
                )
            else:
                self.process = subprocess.Popen(
                    [
                        *(sys.executable, *(("-c", program) if program else ("-m", "allocator"))),
                        *options,
                        *arguments,
                    ],
                    pass_fds=[ready_write],
                    stdin=subprocess.DEVNULL,
                    cwd=ROOT,
                )
        finally:
            os.close(ready_write)
        try:
            ready = os.read(ready_read, 1)  # an end of file where it did not come up
        finally:
            os.close(ready_read)
        if not ready:
            raise AssertionError(f"the allocator ended with status {self.process.wait(TIMEOUT_S)}")

    @property
    def pid(self) -> int:
        """The daemon's process."""
        return self.process.pid

    def connect(self, **options: str) -> Client:
        """A session of the test's own process; options as `allocator.connect` takes them."""
        return connect(self.runtime_dir, **options)

    def stop(self) -> int:
        """SIGTERM, and the exit status. Idempotent."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self.process.wait(TIMEOUT_S)

    def kill(self) -> None:
        """SIGKILL: no line of the daemon's code runs any more."""
        self.process.kill()
        self.process.wait(TIMEOUT_S)
