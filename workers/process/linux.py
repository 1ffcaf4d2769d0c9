"""The few things of Linux and glibc that Python does not offer.

Each function names the manual page that it follows.
"""

import ctypes
import errno
import fcntl
import os
import platform
import signal
from typing import Final

_PR_SET_NAME: Final = 15
_PR_SET_CHILD_SUBREAPER: Final = 36
_F_SETSIG: Final = 10
_SET_MEMPOLICY: Final = {"x86_64": 238, "aarch64": 237}  # glibc has no name for it
_MPOL_PREFERRED: Final = 1
_LONG_BITS: Final = 64

_libc = ctypes.CDLL(None, use_errno=True)


def die_with(pipe: int) -> None:
    """Be killed when nobody can write to `pipe` any more, be it that the last who could closed it
    or ended, and whatever this process does or can't do then (fcntl(2), O_ASYNC, F_SETSIG); at once
    where that is so already.

    Other than with PR_SET_PDEATHSIG it need not be the parent that this process ends with. Nobody
    else may hold the same opened pipe for reading: the signal goes to whoever asked for it last.
    """
    fcntl.fcntl(pipe, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(pipe, _F_SETSIG, signal.SIGKILL)
    flags = fcntl.fcntl(pipe, fcntl.F_GETFL)
    fcntl.fcntl(pipe, fcntl.F_SETFL, flags | os.O_ASYNC | os.O_NONBLOCK)
    try:
        os.read(pipe, 1)
    except BlockingIOError:
        return
    os.kill(os.getpid(), signal.SIGKILL)


def adopt_orphans() -> None:
    """From now on a process whose parent ends becomes a child of this one, if it descends from it:
    so its exit status can be had (prctl(2), PR_SET_CHILD_SUBREAPER)."""
    if _libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER) failed")


def set_process_name(name: str) -> None:
    """What `ps` and `top` show, cut to 15 bytes (prctl(2), PR_SET_NAME)."""
    _libc.prctl(_PR_SET_NAME, name.encode()[:15], 0, 0, 0)


def prefer_memory_of(node: int) -> None:
    """Let what this thread, and those it starts, touch first lie on that NUMA node, where it has
    room (set_mempolicy(2), MPOL_PREFERRED). Raises OSError."""
    number = _SET_MEMPOLICY.get(platform.machine())
    if number is None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    if not 0 <= node < _LONG_BITS - 1:  # the kernel counts one bit less than it is told of
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
    bits = ctypes.c_ulong(1 << node)
    if _libc.syscall(number, _MPOL_PREFERRED, ctypes.byref(bits), ctypes.c_ulong(_LONG_BITS)):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def trim_heap() -> None:
    """Give free heap pages back to the kernel (malloc_trim(3)); a no-op where libc lacks it."""
    trim = getattr(_libc, "malloc_trim", None)
    if trim is not None:
        trim(0)
