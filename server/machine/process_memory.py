"""What the kernel says of a process's memory: /proc/PID/smaps (proc(5)). Nothing is counted by us.

Owns the sorting of memory into what the allocator handed out and the process's own. Invariants: an
object is known by device and inode, never by its name, so two processes that show the same object
map the same bytes; whatever is neither the allocator's nor part of a program's file is the
process's own, whoever else maps it.

    mapped                                     counts as
    a segment, a file that was handed out      shared
    a pool that was handed out                 KV blocks
    anonymous memory                           own, as far as no other process has the same page
    a program's file (executable somewhere)    own, as far as it was written to
    any other file, memfd or shared memory     own, all that is in memory
    (a descriptor of such memory, unmapped)    own, all of it
"""

import contextlib
import os
import stat
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from server.machine.doctor import SHM_ROOT

_ANONYMOUS: Final = "anonymous memory"
_BLOCK_BYTES: Final = 512
"""Of `st_blocks`, whatever the file system's own are (stat(2))."""


@dataclass(frozen=True)
class HandedOut:
    """What the allocator lets processes map. An object is "device:inode", as /proc shows it."""

    segments: Mapping[str, str] = field(default_factory=dict)
    """Object → the segment's name, or the file's path."""
    pools: frozenset[str] = frozenset()


NOTHING: Final = HandedOut()


@dataclass(frozen=True)
class SegmentMapping:
    """One segment in one process. Bytes; `pss_bytes` is the proportional share of this process."""

    name: str
    inode: str
    mapped_bytes: int
    resident_bytes: int
    pss_bytes: int
    writable: bool
    shared: bool


@dataclass(frozen=True)
class ProcessMemory:
    """One process, in bytes."""

    pid: int
    segments: tuple[SegmentMapping, ...]
    kv_bytes: int
    """Resident bytes of the pool: leased blocks, and sealed ones that others may map as well."""
    private_parts: Mapping[str, int]
    """Its own memory, in memory or swapped, by what it is mapped from."""
    pss_bytes: int
    """All mappings, each page divided by the number of processes that map it."""

    @property
    def private_bytes(self) -> int:
        """All of its own memory."""
        return sum(self.private_parts.values())

    @property
    def shared_bytes(self) -> int:
        """Resident bytes of all segments."""
        return sum(segment.resident_bytes for segment in self.segments)


def read(pid: int, handed_out: HandedOut = NOTHING) -> ProcessMemory | None:
    """The process's memory now; None where it is gone. Another user's raises PermissionError."""
    try:
        mappings = list(_mappings(Path(f"/proc/{pid}/smaps").read_text(errors="replace")))
        devices = _memory_devices(pid)
        held = dict(_held_memory(pid, devices))
    except (FileNotFoundError, ProcessLookupError):
        return None
    executable = {one.object for one in mappings if "x" in one.permissions}
    programs = {one for one in executable if one.rpartition(":")[0] not in devices}
    segments: dict[str, list[_Mapping]] = defaultdict(list)
    own: dict[tuple[str, str], int] = defaultdict(int)
    kv_bytes = 0
    for one in mappings:
        if one.object in handed_out.pools:
            kv_bytes += one.figures["Rss"]
        elif one.object in handed_out.segments:
            segments[one.object].append(one)
        else:
            own[one.object, one.path] += one.own_bytes(is_program=one.object in programs)
    for inode, (path, num_bytes) in held.items():
        if inode not in handed_out.pools and inode not in handed_out.segments:
            mapped = sum(size for (known, _), size in own.items() if known == inode)
            own[inode, path] += max(0, num_bytes - mapped)
    private: dict[str, int] = defaultdict(int)
    for (_, path), num_bytes in own.items():
        private[path] += num_bytes
    return ProcessMemory(
        pid,
        tuple(_segment(handed_out.segments[inode], parts) for inode, parts in segments.items()),
        kv_bytes,
        {path: num_bytes for path, num_bytes in private.items() if num_bytes},
        sum(one.figures["Pss"] for one in mappings),
    )


def read_all(
    pids: Iterable[int | None], handed_out: HandedOut = NOTHING
) -> list[ProcessMemory | None]:
    """Of each in turn; None where there is no process, or not any more."""
    return [None if pid is None else read(pid, handed_out) for pid in pids]


@dataclass(frozen=True)
class _Mapping:
    permissions: str
    object: str
    path: str
    num_bytes: int
    figures: dict[str, int] = field(default_factory=lambda: defaultdict(int))

    def own_bytes(self, *, is_program: bool) -> int:
        """What of it is the process's own."""
        figures = self.figures
        huge = figures["Private_Hugetlb"] + figures["Shared_Hugetlb"]  # counted by nothing else
        if self.path == _ANONYMOUS:
            # A page that came with the fork is its parent's until one of them writes to it.
            private = figures["Private_Clean"] + figures["Private_Dirty"]
            return private + figures["SwapPss"] + huge
        if is_program:
            return figures["Private_Dirty"] + figures["SwapPss"]
        return figures["Rss"] + figures["Swap"] + huge


def _held_memory(pid: int, devices: Collection[str]) -> Iterator[tuple[str, tuple[str, int]]]:
    """(object, (name, bytes)) of each file on these devices that the process has open: it takes
    memory also where nobody maps it."""
    for entry in list(Path(f"/proc/{pid}/fd").iterdir()):
        try:
            status, path = entry.stat(), str(entry.readlink())
        except OSError:  # closed meanwhile
            continue
        if stat.S_ISREG(status.st_mode) and _shown(status.st_dev) in devices:
            yield object_of(status), (_name(path), status.st_blocks * _BLOCK_BYTES)


def _memory_devices(pid: int) -> set[str]:
    """Of the files that are memory: /dev/shm as the process sees it, and the kernel's own file
    system for memfds, SysV and anonymous shared memory."""
    descriptor = os.memfd_create("onecopy", os.MFD_CLOEXEC)
    try:
        devices = {os.fstat(descriptor).st_dev}
    finally:
        os.close(descriptor)
    with contextlib.suppress(OSError):  # it has none, or may not be looked at
        devices.add(Path(f"/proc/{pid}/root{SHM_ROOT}").stat().st_dev)
    return {_shown(device) for device in devices}


def object_of(status: os.stat_result) -> str:
    """Of a file in memory. On disk, stat(2) may have another name for it than /proc."""
    return f"{_shown(status.st_dev)}:{status.st_ino}"


def _shown(device: int) -> str:
    """As /proc/PID/smaps shows it."""
    return f"{os.major(device):02x}:{os.minor(device):02x}"


def _segment(name: str, parts: list[_Mapping]) -> SegmentMapping:
    return SegmentMapping(
        name=name,
        inode=parts[0].object,
        mapped_bytes=sum(one.num_bytes for one in parts),
        resident_bytes=sum(one.figures["Rss"] for one in parts),
        pss_bytes=sum(one.figures["Pss"] for one in parts),
        writable=any("w" in one.permissions for one in parts),
        shared=all("s" in one.permissions for one in parts),
    )


def _mappings(text: str) -> Iterator[_Mapping]:
    current: _Mapping | None = None
    for line in text.splitlines():
        head, _, rest = line.partition(" ")
        if not head.endswith(":"):  # "START-END PERMISSIONS OFFSET DEVICE INODE PATH"
            permissions, _offset, device, inode, *path = rest.split(maxsplit=4)
            start, end = (int(bound, 16) for bound in head.split("-"))
            name = _ANONYMOUS if inode == "0" else _name("".join(path).strip())
            if current is not None:
                yield current
            current = _Mapping(permissions, f"{device}:{inode}", name, end - start)
        elif rest.endswith("kB") and current is not None:
            current.figures[head[:-1]] = int(rest.split()[0]) * 1024
    if current is not None:
        yield current


def _name(path: str) -> str:
    return path.removesuffix(" (deleted)")
