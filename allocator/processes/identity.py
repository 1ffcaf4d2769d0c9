"""Which process is meant, safely: a pid alone is reused by the kernel, pid and start time are not.

Owns reading /proc/PID/stat.
"""

import os
import signal
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class ProcessIdentity:
    """`start_ticks` is the process's start in clock ticks since boot (proc(5), field 22)."""

    pid: int
    start_ticks: int

    @classmethod
    def of(cls, pid: int) -> "ProcessIdentity | None":
        """The process that has this pid now; None where there is none, or only a zombie."""
        try:
            stat = Path(f"/proc/{pid}/stat").read_bytes()
        except (FileNotFoundError, ProcessLookupError):
            return None
        # The name is in parentheses and may hold any byte, spaces and parentheses included.
        fields = stat.rpartition(b")")[2].split()
        if fields[0] in (b"Z", b"X"):
            return None
        return cls(pid, int(fields[19]))

    @classmethod
    def own(cls) -> "ProcessIdentity":
        """This process."""
        own = cls.of(os.getpid())
        assert own is not None  # noqa: S101 - a running process has a stat file
        return own

    def is_alive(self) -> bool:
        """Whether this very process still runs."""
        return ProcessIdentity.of(self.pid) == self

    def send_signal(self, number: signal.Signals) -> bool:
        """Signal it if it still runs; by pidfd, so never another process that got its pid."""
        try:
            pidfd = os.pidfd_open(self.pid)
        except ProcessLookupError:
            return False
        try:
            if not self.is_alive():
                return False
            signal.pidfd_send_signal(pidfd, number)
        except ProcessLookupError:
            return False
        finally:
            os.close(pidfd)
        return True
