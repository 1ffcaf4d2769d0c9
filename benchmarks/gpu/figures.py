"""How much of the device is in use, as its driver says: the figure that claims are judged by."""

import time
from collections.abc import Callable

from allocator import InvalidSetting, device_usage
from allocator.backends.cuda_driver import call, current, find

_SETTLED_S = 8.0


def used_bytes(device: str) -> int:
    """Of all processes. From NVML; where that can't be asked, from a context of this process's own,
    whose memory then counts, too."""
    found = find(device)
    try:
        return device_usage(found.name).used_bytes
    except InvalidSetting:
        with current(found.ordinal) as driver:
            free, total = call(driver.cuMemGetInfo)
            return int(total - free)


def process_bytes(device: str, pid: int) -> int | None:
    """What the driver counts for one process, if it tells."""
    try:
        return device_usage(find(device).name).processes.get(pid)
    except InvalidSetting:
        return None


def settles(figure: Callable[[], int], wanted: Callable[[int], bool]) -> int:
    """The figure once it is as wanted, or after 8 s what it is by then: the driver gives the memory
    of a process that was killed back a moment later."""
    deadline = time.monotonic() + _SETTLED_S
    while not wanted(value := figure()) and time.monotonic() < deadline:
        time.sleep(0.02)
    return value
