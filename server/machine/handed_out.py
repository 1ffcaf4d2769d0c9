"""What an allocator has handed out, by the names that the kernel has for it.

Owns the question to the allocator. Invariant: an object counts as handed out by the allocator's own
word, never by what it is called; but for `seen_by_name`, whose figures are only for people to look
at in a moment in which no allocator answers.
"""

import contextlib
from collections.abc import Collection
from typing import Final

from allocator import AllocatorError, Client, RuntimeDir, StaleGeneration, connect, kernel_object
from server.machine.doctor import SHM_ROOT
from server.machine.process_memory import HandedOut, object_of

_ANSWER_S: Final = 2.0
"""Figures to look at are not worth a longer wait."""
_POOL_SUFFIX: Final = "-pool"  # allocator/device.py


def handed_out(memory: Client, keys: Collection[str] | None = None) -> HandedOut:
    """What the session's device has handed out: all, or of its weight sets only these. Raises
    AllocatorError."""
    segments: dict[str, str] = {}
    pools: set[str] = set()
    for one in memory.handed_out():
        if one.key and keys is not None and one.key not in keys:
            continue
        with contextlib.suppress(StaleGeneration):  # given up, or replaced, since it was listed
            if found := kernel_object(one.handle):
                if one.key:
                    segments[found] = one.handle.segment
                else:
                    pools.add(found)
    return HandedOut(segments, frozenset(pools))


def seen(runtime_dir: RuntimeDir) -> HandedOut:
    """For people to look at: what all devices have handed out, or where no allocator answers, what
    is called like it."""
    try:
        with connect(runtime_dir, _ANSWER_S) as memory:
            devices = memory.devices
            found = [handed_out(memory)]
        for device in devices[1:]:
            with connect(runtime_dir, _ANSWER_S, device=device) as memory:
                found.append(handed_out(memory))
    except AllocatorError:
        return seen_by_name(runtime_dir)
    segments = {inode: name for one in found for inode, name in one.segments.items()}
    return HandedOut(segments, frozenset().union(*(one.pools for one in found)))


def seen_by_name(runtime_dir: RuntimeDir) -> HandedOut:
    """What lies in shared memory under the directory's names."""
    segments: dict[str, str] = {}
    pools: set[str] = set()
    for path in SHM_ROOT.glob(f"{runtime_dir.segment_prefix.removeprefix('/')}*"):
        with contextlib.suppress(FileNotFoundError):
            if path.name.endswith(_POOL_SUFFIX):
                pools.add(object_of(path.stat()))
            else:
                segments[object_of(path.stat())] = f"/{path.name}"
    return HandedOut(segments, frozenset(pools))
