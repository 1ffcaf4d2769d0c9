"""How an instance ended, and whether what it was doing may be the reason.

Owns that judgement. Invariant: what somebody else did to a process (SIGKILL, SIGTERM, SIGSTOP) is
nobody's fault; what a process did to itself, or memory that ran out, may be the fault of those that
it was computing.
"""

import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final

_OWN_SIGNALS: Final = frozenset(
    {
        signal.SIGABRT,
        signal.SIGBUS,
        signal.SIGFPE,
        signal.SIGILL,
        signal.SIGSEGV,
        signal.SIGSYS,
        signal.SIGTRAP,
    }
)
_JUST_NOW_S: Final = 10.0
"""The kernel counts a process that it kills for memory before that has ended, which may take
seconds."""


@dataclass(frozen=True)
class Ending:
    """Why an instance answers no more."""

    how: str
    """For a person."""
    by_itself: bool
    names: frozenset[str] | None = None
    """The requests that it was computing; None where that is not known."""
    given_up: bool = False
    """Whether it had to be ended, because it answered no more."""

    def may_be_caused_by(self, request_id: str) -> bool:
        """Whether this request may be what ended it."""
        return self.by_itself and (self.names is None or request_id in self.names)


def ending_of(
    status: int | None, *, out_of_memory: bool, names: frozenset[str] | None = None
) -> Ending:
    """`status` is an exit status, or minus a signal's number; None where nobody knows.
    `out_of_memory`: the kernel has just killed some process of ours for that."""
    if status is None:
        return Ending("nobody can tell how", by_itself=False, names=names)
    if status >= 0:
        return Ending(f"exit status {status}", by_itself=status > 0, names=names)
    if status == -signal.SIGKILL and out_of_memory:
        return Ending("killed by the kernel, out of memory", by_itself=True, names=names)
    return Ending(f"signal {-status}", by_itself=-status in _OWN_SIGNALS, names=names)


class OutOfMemoryKills:
    """How often the kernel has killed a process of our control group for want of memory; of the
    whole machine, where there is no such group."""

    def __init__(self, files: tuple[Path, ...] | None = None) -> None:
        """`files`: where to read, the first that is there (by default what the kernel says)."""
        self._file = next((one for one in files or _files() if _count(one) is not None), None)
        self._count = self._now()
        self._grew_at: float | None = None

    def just_now(self) -> bool:
        """Whether there was one in the last seconds, as far as this is asked often enough."""
        count, at = self._now(), time.monotonic()
        if count > self._count:
            self._count, self._grew_at = count, at
        return self._grew_at is not None and at - self._grew_at < _JUST_NOW_S

    def _now(self) -> int:
        return (_count(self._file) if self._file is not None else None) or 0


def _files() -> tuple[Path, ...]:
    """cgroups(7): version 2 counts what is below as well; version 1 has it with the memory
    controller."""
    found: list[Path] = []
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        lines = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            found.append(Path("/sys/fs/cgroup", path.lstrip("/"), "memory.events"))
        elif "memory" in controllers.split(","):
            folder = Path("/sys/fs/cgroup/memory")
            found.append(folder / path.lstrip("/") / "memory.oom_control")
            found.append(folder / "memory.oom_control")  # seen from within a container
    return (*found, Path("/proc/vmstat"))


def _count(file: Path) -> int | None:
    try:
        lines = file.read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), None)
