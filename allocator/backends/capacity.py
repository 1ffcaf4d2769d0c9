"""How much memory can still be shared here, and what to say where it is not enough.

Owns the figures of /dev/shm, of the machine and of the control groups. Invariants: the least of
them counts; of what bounds processes as well as shared memory a part stays free for what those need
for themselves (`headroom_bytes`); whoever runs out reads what was wanted, what there is, and what
would help. Owns no memory.
"""

import dataclasses
import os
from pathlib import Path
from typing import Final

from allocator.backends.control_group import limited_groups
from allocator.backends.numa import SHM_ROOT
from allocator.backends.room import Room, size
from allocator.errors import DeviceError, SharedMemoryFull

_HEADROOM_PART: Final = 10
_LEAST_HEADROOM_BYTES: Final = 64 << 20
_MOST_HEADROOM_BYTES: Final = 2 << 30
_LOOK_EVERY_BYTES: Final = 4 << 20
"""Reading /proc/meminfo takes longer than committing a few pages, so small commits share a look."""


def headroom_bytes(total_bytes: int) -> int:
    """What of the machine's memory, or of a control group's, is never given out: a tenth, between
    64 MiB and 2 GiB. Processes grow at work, by what a step computes with, and the kernel ends them
    where shared memory has left nothing for that."""
    return min(_MOST_HEADROOM_BYTES, max(_LEAST_HEADROOM_BYTES, total_bytes // _HEADROOM_PART))


def memory_bounds(root: Path = Path("/")) -> list[Room]:
    """The machine and each limited control group, without headroom: what processes and shared
    memory can take together."""
    found: list[Room] = []
    figures = _meminfo(root)
    total, available = figures.get("MemTotal"), figures.get("MemAvailable")
    if total is not None and available is not None:
        found.append(Room(available, total, "machine", "this machine"))
    for group in limited_groups(root):
        name = f"the control group {group.path}"
        found.append(Room(group.free_bytes, group.limit_bytes, "group", name))
    return found


def shared_memory_bound() -> Room:
    """What /dev/shm itself has. Raises DeviceError where it can't be asked."""
    try:
        status = os.statvfs(SHM_ROOT)
    except OSError as error:
        raise DeviceError(f"{SHM_ROOT} can't be used: {error.strerror}") from error
    block = status.f_frsize
    return Room(status.f_bavail * block, status.f_blocks * block, "shm", str(SHM_ROOT))


def shareable_room() -> Room:
    """What can still be committed in shared memory: by whichever bound leaves the least. Takes some
    50 microseconds, and more in a control group. Raises DeviceError."""
    bounds = [shared_memory_bound()]
    for bound in memory_bounds():
        left = max(0, bound.available_bytes - headroom_bytes(bound.total_bytes))
        bounds.append(dataclasses.replace(bound, available_bytes=left))
    return min(bounds, key=lambda bound: bound.available_bytes)


def shareable_bytes() -> int:
    """What could be shared at most if nothing else ran here. Raises DeviceError."""
    bounds = [shared_memory_bound().total_bytes]
    bounds += [one.total_bytes - headroom_bytes(one.total_bytes) for one in memory_bounds()]
    return max(0, min(bounds))


def check_room(num_bytes: int, outstanding_bytes: int = 0) -> None:
    """Raises OutOfDeviceMemory where so much can't be committed beside what is outstanding."""
    room = shareable_room()
    if num_bytes > room.available_bytes - outstanding_bytes:
        raise no_room(room, num_bytes, "it is too small", outstanding_bytes)


class CommitWatch:
    """Keeps this process from committing what the kernel would end processes for.

    /dev/shm has a size of its own, and says when it is full. The machine and a control group don't:
    the kernel gives, and ends somebody. The daemon counts for all, but its groups need not be ours,
    and processes grow. So who commits looks for itself, now and then, and stops at half the
    headroom.
    """

    def __init__(self) -> None:
        self._bytes_since_look = _LOOK_EVERY_BYTES

    def about_to(self, num_bytes: int) -> None:
        """Raises SharedMemoryFull where so much should not be committed now."""
        self._bytes_since_look += num_bytes
        if self._bytes_since_look < _LOOK_EVERY_BYTES:
            return
        for bound in memory_bounds():
            left = max(0, bound.available_bytes - headroom_bytes(bound.total_bytes) // 2)
            if num_bytes > left:
                raise no_room(dataclasses.replace(bound, available_bytes=left), num_bytes, "")
        self._bytes_since_look = 0


def no_shared_memory(num_bytes: int, reason: str) -> SharedMemoryFull:
    """The error for `num_bytes` that the kernel refused to commit in /dev/shm."""
    return no_room(shared_memory_bound(), num_bytes, reason)


def no_room(
    room: Room, num_bytes: int, reason: str, outstanding_bytes: int = 0
) -> SharedMemoryFull:
    """The error for `num_bytes` that do not fit, with the size that what bounds them should
    have."""
    awaited = (
        f" and {size(outstanding_bytes)} of those are promised already" if outstanding_bytes else ""
    )
    short = num_bytes + outstanding_bytes - room.available_bytes
    remedy = room.remedy(short)
    if room.bound == "shm":
        can_not = f"{room.name} can't give them ({reason}): it holds {size(room.total_bytes)}"
    else:
        can_not = f"{room.words}"
    return SharedMemoryFull(
        f"{size(num_bytes)} of shared memory are needed, but {can_not}, of which "
        f"{size(room.available_bytes)} are free{awaited}. {remedy[0].upper()}{remedy[1:]}.",
        num_bytes,
    )


def _meminfo(root: Path) -> dict[str, int]:
    """MemTotal and MemAvailable, in bytes, which are among the first lines; as far as they can be
    read."""
    try:
        lines = (root / "proc/meminfo").read_text().splitlines()
    except OSError:
        return {}
    split = [line.split() for line in lines if line.startswith(("MemTotal:", "MemAvailable:"))]
    return {key.removesuffix(":"): int(kilobytes) * 1024 for key, kilobytes, *_ in split}
