"""A control group with a memory limit, for processes of the tests.

Owns the group: of version 1 or 2, whichever has the memory controller here, below our own group, so
that what bounds us bounds it as well. Invariant: at the end nothing runs in it, and it is gone.
"""

import contextlib
import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.leaks import wait_until

_ROOT = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class MemoryGroup:
    """Its files; processes that it has are ended with it."""

    folder: Path
    version: int

    def enter(self) -> None:
        """This process is in it from now on: for a child between fork and exec."""
        (self.folder / "cgroup.procs").write_text(str(os.getpid()))

    @property
    def pids(self) -> list[int]:
        """Of all that are in it."""
        return [int(pid) for pid in (self.folder / "cgroup.procs").read_text().split()]

    @property
    def num_oom_kills(self) -> int:
        """How many processes the kernel has ended for want of memory."""
        name = "memory.oom_control" if self.version == 1 else "memory.events"
        return self._figures(name)["oom_kill"]

    @property
    def most_bytes(self) -> int:
        """The most that was ever charged to it, files that could be given up included."""
        name = "memory.max_usage_in_bytes" if self.version == 1 else "memory.peak"
        return int((self.folder / name).read_text())

    def statistics(self) -> dict[str, int]:
        """memory.stat, by the names that version 2 has for them."""
        found = self._figures("memory.stat")
        if self.version == 2:
            return found
        names = {
            "anon": "total_rss",
            "shmem": "total_shmem",
            "inactive_file": "total_inactive_file",
        }
        return {name: found[old] for name, old in names.items() if old in found}

    def _figures(self, name: str) -> dict[str, int]:
        lines = (self.folder / name).read_text().splitlines()
        return {key: int(value) for key, value in (line.split() for line in lines)}


@contextlib.contextmanager
def memory_group(limit_bytes: int, name: str) -> Iterator[MemoryGroup]:
    """Skips, saying why, where this user or this machine can make none."""
    group = _made(limit_bytes, name)
    if isinstance(group, str):
        pytest.skip(f"no control group with a memory limit can be made here: {group}")
    try:
        yield group
    finally:
        for pid in group.pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        wait_until(lambda: not group.pids, "the group is empty")
        wait_until(lambda: _removed(group.folder), "the group is gone")


def _made(limit_bytes: int, name: str) -> MemoryGroup | str:
    reason = "the kernel names none of our own"
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        number, controllers, path = line.split(":", 2)
        version = 2 if number == "0" else 1
        if version == 1 and "memory" not in controllers.split(","):
            continue
        mount = _ROOT if version == 2 else _ROOT / "memory"
        folder = mount / path.lstrip("/") / f"onecopy-{name}-{os.getpid()}"
        limit = "memory.max" if version == 2 else "memory.limit_in_bytes"
        try:
            folder.mkdir()
        except OSError as error:
            reason = f"{folder.parent}: {error.strerror}"
            continue
        try:
            (folder / limit).write_text(str(limit_bytes))
        except OSError as error:
            folder.rmdir()
            reason = f"{folder / limit}: {error.strerror}"
            continue
        return MemoryGroup(folder, version)
    return reason


def _removed(folder: Path) -> bool:
    try:
        folder.rmdir()
    except OSError:
        return False
    return True
