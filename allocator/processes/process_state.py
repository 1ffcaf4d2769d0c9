"""What the kernel says a process is doing, for whoever must tell a hung one from a slow one.

Owns reading /proc/PID/stat and /proc/PID/status (proc(5)).
"""

import os
from dataclasses import dataclass
from pathlib import Path

_STAT_OF_COUNTS = (7, 9, 11, 12)  # minflt, majflt, utime, stime, counted from the state's field
_STAT_OF_EXIT_CODE = 49


@dataclass(frozen=True)
class ProcessState:
    """One process at one moment."""

    letter: str
    """R: runs, or would if a processor were free; S, D: waits; T: stopped by a signal; t: stopped
    by a debugger; Z: ended, and nobody has taken note of it yet."""
    counts: tuple[int, ...]
    """Grow while it does anything: processor time and page faults of all its threads, and how often
    the first of them was put on a processor."""
    exit_status: int
    """Of one that has ended: its status, or minus the signal's number."""

    @property
    def is_stopped(self) -> bool:
        """By somebody else, for no process goes on stopping itself."""
        return self.letter in "Tt"

    @property
    def has_ended(self) -> bool:
        """Only its status is left."""
        return self.letter in "ZX"

    @classmethod
    def of(cls, pid: int) -> "ProcessState | None":
        """None where there is no such process."""
        folder = Path(f"/proc/{pid}")
        try:
            # The name is in parentheses and may hold any byte, spaces and parentheses included.
            stat = (folder / "stat").read_bytes().rpartition(b")")[2].split()
            status = (folder / "status").read_bytes()
        except (FileNotFoundError, ProcessLookupError):
            return None
        lines = (line for line in status.splitlines() if b"_ctxt_switches:" in line)
        switches = [int(line.split()[1]) for line in lines]
        return cls(
            letter=stat[0].decode(),
            counts=(*(int(stat[index]) for index in _STAT_OF_COUNTS), *switches),
            exit_status=os.waitstatus_to_exitcode(int(stat[_STAT_OF_EXIT_CODE])),
        )
