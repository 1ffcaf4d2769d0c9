"""The few things of Linux and glibc that Python does not offer. Knows nothing of models.

Each function names the manual page that it follows.
"""

import ctypes
import os
import signal
from typing import Final

_PR_SET_PDEATHSIG: Final = 1
_PR_SET_NAME: Final = 15

_libc = ctypes.CDLL(None, use_errno=True)


def die_with_parent(parent_pid: int) -> None:
    """Be killed when the parent ends, however it ends (prctl(2), PR_SET_PDEATHSIG).

    `parent_pid` is the parent that the caller was forked from; if it is gone already, end at once.
    """
    if _libc.prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != parent_pid:
        os._exit(1)


def set_process_name(name: str) -> None:
    """What `ps` and `top` show, cut to 15 bytes (prctl(2), PR_SET_NAME)."""
    _libc.prctl(_PR_SET_NAME, name.encode()[:15], 0, 0, 0)


def trim_heap() -> None:
    """Give free heap pages back to the kernel (malloc_trim(3)); a no-op where libc lacks it."""
    trim = getattr(_libc, "malloc_trim", None)
    if trim is not None:
        trim(0)
