"""Limits of a process (getrlimit(2)) under which shared memory can't work.

Owns how much it takes. Invariant: who would fail later, in the middle of something, is told at the
start what to do. Changes no limit.
"""

import contextlib
import resource
from typing import Final

from allocator.backends.capacity import shareable_bytes
from allocator.backends.room import size
from allocator.errors import DeviceError, InvalidSetting

_PROGRAM_BYTES: Final = 8 << 30
"""Addresses that a process takes for itself: torch and what it brings reserve gigabytes."""


def address_space_failure(limit_bytes: int | None = None) -> str | None:
    """Why RLIMIT_AS is too low for processes that share `limit_bytes`, or all that there could be;
    None where it is not. Each reserves the pool's addresses, used or not, and maps weights."""
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    needed = 2 * _shared_bytes(limit_bytes) + _PROGRAM_BYTES
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return None
    return (
        f"processes may have {size(soft)} of addresses only, and need {size(needed)}, most of them "
        "without memory behind: `ulimit -v unlimited`, under systemd `LimitAS=infinity`"
    )


def file_size_failure(limit_bytes: int | None = None) -> str | None:
    """As `address_space_failure`, for RLIMIT_FSIZE: a segment is a file."""
    soft, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
    needed = _shared_bytes(limit_bytes)
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return None
    return (
        f"files may have {size(soft)} only, and shared memory needs one of {size(needed)}: "
        "`ulimit -f unlimited`, under systemd `LimitFSIZE=infinity`"
    )


def check_limits(limit_bytes: int | None = None) -> None:
    """Raises InvalidSetting where one of them stands in the way."""
    for failure in (address_space_failure(limit_bytes), file_size_failure(limit_bytes)):
        if failure is not None:
            raise InvalidSetting(failure)


def _shared_bytes(limit_bytes: int | None) -> int:
    most = 0
    with contextlib.suppress(DeviceError):  # which is told by whoever needs /dev/shm
        most = shareable_bytes()
    return min(most, limit_bytes or most)
