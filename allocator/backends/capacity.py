"""How much shared memory this machine has left, and what to say where it is not enough.

Invariant: whoever runs out of it reads what was wanted, what there is, and what would help. Owns no
memory.
"""

import os
from pathlib import Path

from allocator.backends.placement import SHM_ROOT
from allocator.errors import OutOfDeviceMemory


def check_shared_memory(num_bytes: int, outstanding_bytes: int = 0) -> None:
    """Raises OutOfDeviceMemory where /dev/shm can't hold so much beside what is outstanding."""
    status = os.statvfs(SHM_ROOT)
    if num_bytes > status.f_bavail * status.f_frsize - outstanding_bytes:
        raise no_shared_memory(num_bytes, "it is too small", outstanding_bytes)


def check_memory(num_bytes: int, outstanding_bytes: int = 0) -> None:
    """Raises OutOfDeviceMemory where the machine can't: /dev/shm promises more than there may be.
    Takes some 30 microseconds."""
    available = max(0, _available_memory() - outstanding_bytes)
    if num_bytes > available:
        raise OutOfDeviceMemory(
            f"{_size(num_bytes)} of shared memory are needed, but the machine has only "
            f"{_size(available)} of memory left: stop something, or serve a smaller model."
        )


def no_shared_memory(num_bytes: int, reason: str, outstanding_bytes: int = 0) -> OutOfDeviceMemory:
    """The error for `num_bytes` that /dev/shm can't give, with the size that it should have."""
    status = os.statvfs(SHM_ROOT)
    total = status.f_blocks * status.f_frsize
    free = status.f_bavail * status.f_frsize
    wanted = -(-(total - free + outstanding_bytes + num_bytes) // (1 << 20))
    awaited = (
        f" and {_size(outstanding_bytes)} of those are promised already"
        if outstanding_bytes
        else ""
    )
    return OutOfDeviceMemory(
        f"{_size(num_bytes)} of shared memory are needed, but {SHM_ROOT} can't give them "
        f"({reason}): it holds {_size(total)}, of which {_size(free)} are free{awaited}. Enlarge "
        f"it with `mount -o remount,size={wanted}M {SHM_ROOT}`, or in Docker with `--shm-size "
        f"{wanted}m`."
    )


def _available_memory() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 1 << 62


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.1f} MB"
