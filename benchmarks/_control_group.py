"""A control group with a memory limit, for what a benchmark starts. Needs root."""

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_GROUPS = Path("/sys/fs/cgroup")
_ENTER = 'echo $$ > "$0" && exec "$@"'


@dataclass(frozen=True)
class MemoryGroup:
    """Of whichever version has the memory controller here."""

    folder: Path

    @property
    def enter(self) -> tuple[str, ...]:
        """A program that puts itself into the group and becomes the one that follows."""
        return ("sh", "-c", _ENTER, str(self.folder / "cgroup.procs"))

    @property
    def most_bytes(self) -> int:
        """The most that was ever charged to it, pages of files that could be given up included."""
        for name in ("memory.peak", "memory.max_usage_in_bytes"):
            with contextlib.suppress(FileNotFoundError):
                return int((self.folder / name).read_text())
        return 0

    @property
    def num_oom_kills(self) -> int:
        """How many processes the kernel has ended for want of memory."""
        is_second = (self.folder / "memory.events").exists()
        return self._figures("memory.events" if is_second else "memory.oom_control")["oom_kill"]

    @property
    def memory(self) -> tuple[int, int]:
        """What is charged to it now: private and shared memory, which can't be given up; and that
        with the files that are mapped."""
        figures = self._figures("memory.stat")
        private = figures.get("anon", figures.get("total_rss", 0))
        shared = figures.get("total_shmem", figures.get("shmem", 0))
        mapped = figures.get("file_mapped", figures.get("total_mapped_file", 0))
        return private + shared, private + max(shared, mapped)

    def limit(self, num_bytes: int) -> None:
        """From now on; what is over it is given up. Raises OSError where that can't be done. The
        most that was charged counts anew, where the kernel allows that."""
        (self.folder / _limit_file(self.folder)).write_text(str(num_bytes))
        for name in ("memory.peak", "memory.max_usage_in_bytes"):
            with contextlib.suppress(OSError):
                (self.folder / name).write_text("0")

    def _figures(self, name: str) -> dict[str, int]:
        lines = (self.folder / name).read_text().splitlines()
        return {key: int(value) for key, value in (line.split() for line in lines)}


@contextlib.contextmanager
def memory_group(limit_bytes: int, name: str = "bench") -> Iterator[MemoryGroup]:
    """What is in it at the end is ended. Raises OSError where none can be made."""
    is_second = (_GROUPS / "cgroup.controllers").exists()
    parent = _GROUPS if is_second else _GROUPS / "memory"
    folder = parent / f"onecopy-{name}-{os.getpid()}"
    folder.mkdir()
    try:
        (folder / _limit_file(folder)).write_text(str(limit_bytes))
        yield MemoryGroup(folder)
    finally:
        for pid in (folder / "cgroup.procs").read_text().split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        deadline = time.monotonic() + 20
        while (folder / "cgroup.procs").read_text() and time.monotonic() < deadline:
            time.sleep(0.05)
        folder.rmdir()


def _limit_file(folder: Path) -> str:
    return "memory.max" if (folder / "memory.max").exists() else "memory.limit_in_bytes"
