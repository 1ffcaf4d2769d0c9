"""Processes that ended and that nobody waits for: descendants of this one whose parent was gone.

The server is the parent of what its instances and wardens leave behind (`workers.process.linux`:
`adopt_orphans`), so the last trace of each is its to remove. Invariant: the status of a process
that was started here goes to whoever started it, who waits for it without delay; what is still
there after `_LEFT_S` is nobody's.
"""

import contextlib
import os
from pathlib import Path
from typing import Final

from allocator import ProcessState

_LEFT_S: Final = 10.0


class Orphans:
    """Those of this process."""

    def __init__(self) -> None:
        self._ended: dict[int, float] = {}
        """Process → when it was first seen to have ended."""

    def look(self, now: float) -> None:
        """Wait for those that ended long ago, by a clock in seconds. Cheap where there are none."""
        try:
            any_ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:
            any_ended = None
        ended = [] if any_ended is None else [pid for pid in _children() if _has_ended(pid)]
        self._ended = {pid: self._ended.get(pid, now) for pid in ended}
        for pid, since in self._ended.items():
            if now - since > _LEFT_S:
                with contextlib.suppress(ChildProcessError):
                    os.waitpid(pid, os.WNOHANG)


def _children() -> list[int]:
    """Of all threads: an orphan is given to any of them."""
    found: list[int] = []
    for thread in Path("/proc/self/task").iterdir():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it may have ended
            found += [int(pid) for pid in (thread / "children").read_text().split()]
    return found


def _has_ended(pid: int) -> bool:
    state = ProcessState.of(pid)
    return state is not None and state.has_ended
