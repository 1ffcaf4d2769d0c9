"""The memory limits of the control groups that this process runs in, of both versions.

Owns reading them (cgroups(7); the kernel's admin-guide/cgroup-v1/memory and cgroup-v2). Invariant:
every group from our own up to the root that can be seen counts, since the kernel ends processes at
the least of them. What can't be read is no limit.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Final

_NO_LIMIT: Final = 1 << 62
"""From here on a limit is version 1's way to say that there is none: the largest whole page."""


@dataclass(frozen=True)
class ControlGroup:
    """One that has a limit. `used_bytes` is charged to it, shared memory included, without pages of
    files that nobody has used lately: those the kernel takes back before it ends anybody."""

    path: str
    limit_bytes: int
    used_bytes: int

    @property
    def free_bytes(self) -> int:
        """What may still be charged to it."""
        return max(0, self.limit_bytes - self.used_bytes)


@dataclass(frozen=True)
class _Files:
    """What the kernel calls things in one version."""

    mount: str
    limits: tuple[str, ...]
    used: str
    inactive: str


_VERSION_1: Final = _Files(
    "sys/fs/cgroup/memory",
    ("memory.limit_in_bytes",),
    "memory.usage_in_bytes",
    "total_inactive_file",
)
_VERSION_2: Final = _Files(
    "sys/fs/cgroup",
    ("memory.max", "memory.high"),  # beyond the second one the kernel slows processes to a crawl
    "memory.current",
    "inactive_file",
)


def limited_groups(root: Path = Path("/")) -> list[ControlGroup]:
    """All that have a limit, our own group first. In a container those above it can't be seen, and
    the path may be the host's: then the mount itself is the container's group."""
    found: list[ControlGroup] = []
    for line in (_read(root / "proc/self/cgroup") or "").splitlines():
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0":
            files = _VERSION_2
        elif "memory" in controllers.split(","):
            files = _VERSION_1
        else:
            continue
        group = Path(path.lstrip("/"))
        for one in (group, *group.parents):
            limited = _limited(root / files.mount / one, f"/{'' if one == Path() else one}", files)
            found += [limited] if limited is not None else []
    return found


def _limited(folder: Path, path: str, files: _Files) -> ControlGroup | None:
    limits = [number for name in files.limits if (number := _number(folder / name)) is not None]
    limit = min(limits, default=_NO_LIMIT)
    if limit >= _NO_LIMIT:
        return None
    used = _number(folder / files.used) or 0
    inactive = 0
    for line in (_read(folder / "memory.stat") or "").splitlines():
        key, _, value = line.partition(" ")
        if key == files.inactive and value.isdecimal():
            inactive = int(value)
    return ControlGroup(path, limit, max(0, used - inactive))


def _number(path: Path) -> int | None:
    text = (_read(path) or "").strip()
    return int(text) if text.isdecimal() else None  # "max"


def _read(path: Path) -> str | None:
    try:
        return path.read_text()
    except OSError:
        return None
