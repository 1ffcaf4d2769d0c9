"""What a test must give back: descriptors, child processes, shared memory, files of its directory.

Owns the comparison of before and after. Invariant: only what belongs to the watched runtime
directories and to this process counts, so other programs on the machine can't fail a test.
"""

import ctypes
import gc
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from allocator import RuntimeDir
from allocator.backends.host import SHM_ROOT
from allocator.backends.segments import OWNER

T = TypeVar("T")

_PR_SET_CHILD_SUBREAPER = 36  # prctl(2)
_POLL_S = 0.003


def wait_until(condition: Callable[[], T], what: str, timeout_s: float = 300.0) -> T:
    """The first true value of `condition`. Fails with `what` when the deadline passes."""
    deadline = time.monotonic() + timeout_s
    while not (value := condition()):
        assert time.monotonic() < deadline, f"after {timeout_s} s still not so: {what}"
        time.sleep(_POLL_S)
    return value


def adopt_orphans() -> None:
    """Let grandchildren whose parent dies become our children, so that none can hide."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def children() -> dict[int, str]:
    """pid → state and name of every direct child, zombies included."""
    found: dict[int, str] = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdecimal():
            continue
        try:
            before, _, after = (entry / "stat").read_bytes().rpartition(b")")
        except (FileNotFoundError, ProcessLookupError):
            continue
        state, parent = after.split()[:2]
        if int(parent) == os.getpid():
            found[int(entry.name)] = f"{state.decode()} {before.partition(b'(')[2]!r}"
    return found


def descriptors() -> dict[int, str]:
    """fd → what it is open on."""
    found: dict[int, str] = {}
    for name in os.listdir("/proc/self/fd"):  # noqa: PTH208 - the names are numbers
        try:
            found[int(name)] = os.readlink(f"/proc/self/fd/{name}")  # noqa: PTH115
        except FileNotFoundError:
            continue  # the listing's own
    return found


def shared_files(prefix: str) -> list[str]:
    """Names in /dev/shm that belong to one runtime directory."""
    return sorted(path.name for path in SHM_ROOT.glob(f"{prefix.lstrip('/')}*"))


def segments(prefix: str) -> list[str]:
    """Those of them that hold something: without the files that say whose they are."""
    return [name for name in shared_files(prefix) if not name.endswith(f"-{OWNER}")]


def _reap(pids: set[int]) -> None:
    """Take the status of adopted children that have ended; of others it has been taken."""
    for pid in pids:
        try:
            os.waitpid(pid, os.WNOHANG)
        except ChildProcessError:
            continue


class Leaks:
    """A snapshot at the start of a test, and the check at its end."""

    def __init__(self, *, not_ours: tuple[str, ...] = (), timeout_s: float = 300.0) -> None:
        """Descriptors on paths that begin with one of `not_ours` don't count: a library's own.
        What is left has `timeout_s` to go."""
        self._not_ours = not_ours
        self._timeout_s = timeout_s
        self._children = set(children())
        self._descriptors = self._counted()
        self._directories: list[tuple[Path, str]] = []

    def watch(self, runtime_dir: RuntimeDir) -> None:
        """From now on this directory must be empty, and its segments gone, at the end."""
        self._directories.append((runtime_dir.path, runtime_dir.segment_prefix))

    def found(self) -> list[str]:
        """One line for each thing left behind."""
        new = {pid: what for pid, what in children().items() if pid not in self._children}
        _reap({pid for pid, what in new.items() if what.startswith("Z")})
        lines = [f"child {pid}: {what}" for pid, what in new.items() if not what.startswith("Z")]
        for path, prefix in self._directories:
            lines += [f"segment {name}" for name in shared_files(prefix)]
            if path.exists():
                lines += [f"file {file}" for file in path.iterdir()]
        # A number may have been used again for a thing of the same kind: only growth is a leak.
        now = self._counted()
        if len(now) > len(self._descriptors):
            lines += [
                f"descriptor {fd}: {target}"
                for fd, target in now.items()
                if self._descriptors.get(fd) != target
            ]
        return lines

    def check(self) -> None:
        """Fails, naming each thing, where something is left when the deadline has passed. It is
        then ended and removed, so that the tests that follow do not suffer."""
        deadline = time.monotonic() + self._timeout_s
        while lines := self.found():
            gc.collect()
            if time.monotonic() > deadline:
                self._clear()
                raise AssertionError("left behind:\n" + "\n".join(lines))
            time.sleep(_POLL_S)

    def _counted(self) -> dict[int, str]:
        return {
            fd: target
            for fd, target in descriptors().items()
            if not target.startswith(self._not_ours)
        }

    def _clear(self) -> None:
        for pid in children().keys() - self._children:
            os.kill(pid, signal.SIGKILL)
        for _, prefix in self._directories:
            for name in shared_files(prefix):
                (SHM_ROOT / name).unlink()
        self._descriptors = self._counted()
