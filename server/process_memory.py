"""What the kernel says of a process's memory: /proc/PID/smaps (proc(5)). Nothing is counted by us.

Owns the sorting of mappings into shared weights, KV blocks and the rest. Invariants: a segment is
known by its inode, so two processes that show the same inode map the same bytes; private memory is
what only this process has and the kernel could not read again from a file. Knows nothing of models.
"""

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Final

SEGMENT_PREFIX: Final = "/dev/shm/onecopy-"  # noqa: S108 - a name that the kernel shows
FILE_SUFFIXES: Final = (".weights", ".safetensors")
"""Files that are mapped, shared and read-only, as segments: images, and checkpoints as they are."""
POOL_SUFFIX: Final = "-pool"
"""How the name of a pool's segment ends (allocator/device.py)."""


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
    private_bytes: int
    """Private, dirty or swapped, segments and pools aside."""
    pss_bytes: int
    """All mappings, each page divided by the number of processes that map it."""

    @property
    def shared_bytes(self) -> int:
        """Resident bytes of all segments."""
        return sum(segment.resident_bytes for segment in self.segments)


def read(pid: int) -> ProcessMemory | None:
    """The process's memory now; None where it is gone. Another user's raises PermissionError."""
    try:
        text = Path(f"/proc/{pid}/smaps").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    segments: dict[str, list[tuple[str, str, int, dict[str, int]]]] = defaultdict(list)
    kv_bytes = private_bytes = pss_bytes = 0
    for permissions, inode, path, size, figures in _mappings(text):
        pss_bytes += figures["Pss"]
        if _is_pool(path):
            kv_bytes += figures["Rss"]
        elif _is_segment(permissions, path):
            segments[inode].append((path, permissions, size, figures))
        else:
            private_bytes += figures["Private_Dirty"] + figures["Swap"]
    return ProcessMemory(
        pid,
        tuple(_segment(inode, parts) for inode, parts in segments.items()),
        kv_bytes,
        private_bytes,
        pss_bytes,
    )


def _is_pool(path: str) -> bool:
    name = path.removesuffix(" (deleted)")
    return name.startswith(SEGMENT_PREFIX) and name.endswith(POOL_SUFFIX)


def _is_segment(permissions: str, path: str) -> bool:
    if path.startswith(SEGMENT_PREFIX):
        return True
    name = path.removesuffix(" (deleted)")
    return permissions == "r--s" and name.startswith("/") and name.endswith(FILE_SUFFIXES)


def _segment(inode: str, parts: list[tuple[str, str, int, dict[str, int]]]) -> SegmentMapping:
    return SegmentMapping(
        name=parts[0][0].removeprefix("/dev/shm").removesuffix(" (deleted)"),  # noqa: S108
        inode=inode,
        mapped_bytes=sum(size for _, _, size, _ in parts),
        resident_bytes=sum(figures["Rss"] for _, _, _, figures in parts),
        pss_bytes=sum(figures["Pss"] for _, _, _, figures in parts),
        writable=any("w" in permissions for _, permissions, _, _ in parts),
        shared=all("s" in permissions for _, permissions, _, _ in parts),
    )


def _mappings(text: str) -> list[tuple[str, str, str, int, dict[str, int]]]:
    """(permissions, device:inode, path, size, figures in bytes) of each mapping."""
    found: list[tuple[str, str, str, int, dict[str, int]]] = []
    for line in text.splitlines():
        head, _, rest = line.partition(" ")
        if not head.endswith(":"):  # "START-END PERMS OFFSET DEVICE INODE PATH"
            permissions, _offset, device, inode, *path = rest.split(maxsplit=4)
            start, end = (int(bound, 16) for bound in head.split("-"))
            figures: dict[str, int] = defaultdict(int)
            found.append(
                (permissions, f"{device}:{inode}", "".join(path).strip(), end - start, figures)
            )
        elif rest.endswith("kB"):
            figures[head[:-1]] = int(rest.split()[0]) * 1024
    return found
