"""Ending a process from outside: asked first, killed where it can't react.

Owns the order. Invariant: what is stopped or stuck is not waited for. Knows nothing of what the
process is.
"""

import os
import select
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from allocator import ProcessIdentity, ProcessState

_LOOK_EVERY_S: Final = 0.25
_STUCK_S: Final = 1.5
_STOPPED_S: Final = 0.5
_MUTE_S: Final = 1.0
_NUM_MUTE: Final = 3
_KILLED_S: Final = 10.0


def stop_process(
    process: ProcessIdentity,
    timeout_s: float,
    is_mute: Callable[[], bool] | None = None,
    *,
    asked: bool = False,
) -> bool:
    """SIGTERM, unless it was `asked` by other means, wait for the end, SIGKILL after `timeout_s`.
    True where no SIGKILL was needed.

    What can't react is killed at once: a process that somebody stopped; one that does nothing at
    all after it was asked to end; or, where `is_mute` is given, because waiting is what it may be
    doing, one of which that says several times in a row that it does not answer.
    """
    if not asked and not process.send_signal(signal.SIGTERM):
        return True
    if _ends(process, time.monotonic() + timeout_s, is_mute):
        return True
    process.send_signal(signal.SIGKILL)
    _ends(process, time.monotonic() + _KILLED_S, lambda: False)
    return False


def answers_nothing(path: Path) -> bool:
    """Whether a server listens on this Unix socket, and does not answer HTTP within a second."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as asked:
        asked.settimeout(_MUTE_S)
        try:
            asked.connect(os.fspath(path))
            asked.sendall(b"GET /status HTTP/1.1\r\nHost: admin\r\nConnection: close\r\n\r\n")
            asked.recv(1)
        except (TimeoutError, BlockingIOError):
            return True
        except OSError:  # nobody listens: it has not begun to, or no longer does
            return False
    return False


def _ends(process: ProcessIdentity, deadline: float, is_mute: Callable[[], bool] | None) -> bool:
    """Whether it ends before the deadline, and before it is seen that it can't."""
    try:
        pidfd = os.pidfd_open(process.pid)
    except ProcessLookupError:
        return True
    try:
        counts: tuple[int, ...] = ()
        stopped_s = stuck_s = 0.0
        num_mute = 0
        # Its first thread may be gone before the others, which hold its locks and files until then:
        # only the kernel's word counts.
        while ProcessIdentity.of(process.pid) in (process, None):
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                return False
            if select.select([pidfd], [], [], min(left_s, _LOOK_EVERY_S))[0]:
                return True
            state = ProcessState.of(process.pid)
            if state is None:
                return True
            moves = state.counts != counts or state.letter == "R"
            counts = state.counts
            stopped_s = stopped_s + _LOOK_EVERY_S if state.is_stopped else 0.0
            stuck_s = 0.0 if moves else stuck_s + _LOOK_EVERY_S
            if stopped_s >= _STOPPED_S or (is_mute is None and stuck_s >= _STUCK_S):
                return False
            if is_mute is not None:
                num_mute = num_mute + 1 if is_mute() else 0
                if num_mute >= _NUM_MUTE:
                    return False
        return True
    finally:
        os.close(pidfd)
