"""What `onecopy doctor` thinks of what was read from a machine. Pure.

Owns the criteria and the advice. Invariants: a check takes what the kernel or a file said, as it
was said, and None where it could not be read; each warning and problem names what to do. Knows
neither how it is read (`doctor`) nor how it is shown. Of processors and GPUs: `device_checks`.
"""

import re
from collections.abc import Sequence
from typing import Final, Literal

from pydantic import BaseModel

from allocator import AbandonedRun, Room, headroom_bytes
from server.units import size_text

Status = Literal["ok", "info", "warning", "problem"]

SMALL_BYTES: Final = 1_000_000_000
"""Below this much memory a server with a small model has no room: the demo's weights and processes
take about as much."""
LEAST_OPEN_FILES: Final = 1024
LEAST_MAPS: Final = 65530
"""The kernel's own default (vm.max_map_count)."""
LAST_SYSTEM_UID: Final = 999
_NAMES_SHOWN: Final = 4

_UPGRADE: Final = "upgrade to Linux 5.3 or later"
_FALSE: Final = ("0", "no", "n", "false", "f", "off")
_TRUE: Final = ("1", "yes", "y", "true", "t", "on")


class Check(BaseModel, frozen=True):
    """One line of the result: what was looked at, what was seen, and what to do about it."""

    name: str
    status: Status
    seen: str
    fix: str = ""


# --- the kernel and its limits


def kernel(sysname: str, release: str, failure: str | None) -> Check:
    """`failure`: why a pidfd of our own process could not be used; None where it could."""
    seen = f"{sysname} {release}"
    if sysname != "Linux":
        return problem("kernel", seen, "run onecopy on Linux")
    old = release_numbers(release) < (5, 3)
    if failure is None and old:
        return warning("kernel", f"{seen}, older than 5.3 but pidfds work", _UPGRADE)
    if failure is None:
        return ok("kernel", f"{seen}, pidfds work")
    # A kernel that has them but refuses them has been told to, by a container's seccomp profile.
    sandbox = "update Docker or Podman, or start with `--security-opt seccomp=unconfined`"
    return problem("kernel", f"{seen}, pidfds do not work: {failure}", _UPGRADE if old else sandbox)


# --- memory


def shared_memory(
    mounts: str | None, size: tuple[int, int] | None, writable: bool, room_bytes: int | None
) -> Check:
    """Where segments lie. `mounts`: /proc/mounts; `size`: (all, free) bytes, None where there is no
    such directory; `room_bytes`: the memory of this machine or container."""
    name = "/dev/shm"  # noqa: S108 - what is checked
    gigabytes = max(1, (room_bytes or 0) // 2 >> 30)
    mount = f"as root: `mount -t tmpfs -o size={gigabytes}G,mode=1777 tmpfs /dev/shm`"
    enlarge = (
        f"in a container start it with `--shm-size {gigabytes}g`, "
        f"else as root: `mount -o remount,size={gigabytes}G /dev/shm`"
    )
    if size is None:
        return problem(name, "missing", mount)
    all_bytes, free_bytes = size
    seen = f"{size_text(all_bytes)}, {size_text(free_bytes)} free"
    types = [
        fields[2]
        for line in (mounts or "").splitlines()
        if len(fields := line.split()) > 2 and fields[1] == name
    ]  # of several on one directory, the last one is seen
    if not writable:
        return problem(name, "not writable", "as root: `mount -o remount,rw,mode=1777 /dev/shm`")
    if types and types[-1] == "tmpfs" and all_bytes == 0:
        return problem(name, "mounted without a size: the allocator sees no room in it", enlarge)
    if mounts is not None and (not types or types[-1] != "tmpfs"):
        kind = types[-1] if types else "not a mount"
        return warning(name, f"{kind}, not tmpfs: shared memory would go to the disk", mount)
    if all_bytes < SMALL_BYTES:
        return warning(name, f"{seen}: too small for most models", enlarge)
    if free_bytes < SMALL_BYTES:
        fix = "`ls -lS /dev/shm` shows what holds it; remove what nobody uses"
        return warning(name, seen, fix)
    return ok(name, seen)


def memory(meminfo: str | None) -> Check:
    """/proc/meminfo."""
    available, total = (meminfo_bytes(meminfo, key) for key in ("MemAvailable", "MemTotal"))
    if available is None or total is None:
        fix = "mount all of /proc: under systemd `ProcSubset=all`"
        return problem("memory", "/proc/meminfo can't be read", fix)
    seen = f"{size_text(available)} available of {size_text(total)}"
    if available < SMALL_BYTES:
        fix = "`ps aux --sort=-rss | head` shows what holds it; stop something"
        return warning("memory", seen, fix)
    return ok("memory", seen)


def memory_limit(group: Room | None, meminfo: str | None) -> Check:
    """`group`: the control group that leaves the least. Shared memory counts against its limit, and
    the kernel kills at it; so the allocator gives out less, by what processes need to grow."""
    name, total = "memory limit", meminfo_bytes(meminfo, "MemTotal")
    if group is None or (total is not None and group.total_bytes >= total):
        return ok(name, "none by a control group")
    seen = size_text(group.total_bytes) + (f" of {size_text(total)}" if total is not None else "")
    seen = f"{seen} by {group.name}, {size_text(group.available_bytes)} free"
    if group.total_bytes < SMALL_BYTES or group.available_bytes < SMALL_BYTES // 2:
        fix = "raise it: `docker run --memory 4g`, under systemd `MemoryMax=4G`"
        return warning(name, seen, fix)
    headroom = size_text(headroom_bytes(group.total_bytes))
    return info(name, f"{seen}; shared memory counts, and leaves {headroom} to processes")


def address_space(soft: int, failure: str | None) -> Check:
    """RLIMIT_AS in bytes, -1 for none; `failure`: why that is not enough, with the fix."""
    if failure is not None:
        return problem("address space", size_text(soft), failure)
    return ok("address space", "unlimited" if soft == -1 else size_text(soft))


def file_size(soft: int, failure: str | None) -> Check:
    """RLIMIT_FSIZE in bytes, -1 for none, which counts for shared memory, too; `failure`: why that
    is not enough, with the fix."""
    if failure is not None:
        return problem("file size", size_text(soft), failure)
    return ok("file size", "unlimited" if soft == -1 else size_text(soft))


def locked_memory(soft: int, unlimited: bool, has_nvidia: bool) -> Check:
    """RLIMIT_MEMLOCK in bytes, -1 for none; `unlimited` where CAP_IPC_LOCK lifts it."""
    name = "locked memory"
    if soft == -1 or unlimited:
        return ok(name, "unlimited")
    if not has_nvidia:
        return info(name, f"{size_text(soft)}; matters only with a GPU")
    return warning(
        name,
        f"{size_text(soft)}: pinned memory for the GPU may be refused",
        "`ulimit -l unlimited`; under systemd `LimitMEMLOCK=infinity`; "
        "in Docker `--ulimit memlock=-1`",
    )


def open_files(soft: int, hard: int) -> Check:
    """RLIMIT_NOFILE, -1 for none."""
    name, seen = "open files", "unlimited" if soft == -1 else str(soft)
    if soft == -1 or soft >= LEAST_OPEN_FILES:
        return ok(name, seen)
    if hard == -1 or hard >= LEAST_OPEN_FILES:
        fix = f"`ulimit -n {4096 if hard == -1 else min(hard, 4096)}`"
    else:
        fix = "as root: `ulimit -n 4096`; under systemd `LimitNOFILE=4096`"
    return warning(name, f"{seen}: each connection takes one", fix)


def memory_maps(max_map_count: str | None) -> Check:
    """/proc/sys/vm/max_map_count."""
    if max_map_count is None:
        return info("memory maps", "vm.max_map_count can't be read")
    if int(max_map_count) >= LEAST_MAPS:
        return ok("memory maps", f"{int(max_map_count)} a process")
    fix = f"as root: `sysctl vm.max_map_count={LEAST_MAPS}`"
    return warning("memory maps", f"{int(max_map_count)} a process", fix)


def overcommit(mode: str | None) -> Check:
    """/proc/sys/vm/overcommit_memory."""
    if mode is None:
        return info("overcommit", "vm.overcommit_memory can't be read")
    if mode.strip() != "2":
        return ok("overcommit", "allowed")
    return warning(
        "overcommit",
        "forbidden (vm.overcommit_memory=2): memory counts once mapped, used or not",
        "as root: `sysctl vm.overcommit_memory=0`",
    )


def huge_pages(shmem_enabled: str | None) -> Check:
    """/sys/kernel/mm/transparent_hugepage/shmem_enabled: the chosen word is in brackets."""
    chosen = re.search(r"\[(\w+)\]", shmem_enabled or "")
    return info("huge pages", f"for shared memory: {chosen[1] if chosen else 'not supported'}")


def numa(online: str | None) -> Check:
    """/sys/devices/system/node/online, such as 0-1,4."""
    count = 0
    for part in filter(None, (online or "0").strip().split(",")):
        first, _, last = part.partition("-")
        count += int(last or first) - int(first) + 1
    return info("NUMA", f"{count} node{'' if count == 1 else 's'}")


# --- what may take memory or insight away


def remove_ipc(configurations: Sequence[str] | None, uid: int, user: str, lingers: bool) -> Check:
    """systemd's RemoveIPC=. `configurations`: logind.conf and its drop-ins, that which counts most
    last; None where no systemd-logind runs. Its default is yes; system users are spared."""
    if configurations is None:
        return ok("logout", "no systemd-logind here")
    removes = True
    for text in configurations:
        section = ""
        for line in map(str.strip, text.splitlines()):
            if line.startswith("["):
                section = line
            key, _, value = (part.strip() for part in line.partition("="))
            if section == "[Login]" and key == "RemoveIPC":
                removes = value.lower() in _TRUE or (removes and value.lower() not in _FALSE)
    if not removes:
        return ok("logout", "keeps shared memory (RemoveIPC=no)")
    if uid <= LAST_SYSTEM_UID:
        return ok("logout", f"keeps the shared memory of system users such as {user}")
    if lingers:
        return ok("logout", f"keeps shared memory: {user} lingers")
    return warning(
        "logout",
        f"systemd-logind deletes shared memory when {user} logs out (RemoveIPC=yes)",
        f"as root: `loginctl enable-linger {user}`",
    )


def smaps(failure: str | None) -> Check:
    """Whether one process can read another's /proc/PID/smaps as the same user; `failure`: why not.
    Neither Yama's ptrace_scope (it restricts attaching, not reading) nor hidepid (it hides other
    users' processes) stands in the way, so what counts is whether it works."""
    if failure is None:
        return ok("smaps", "readable, as `onecopy verify` needs it")
    fix = "`onecopy verify` and `onecopy ps` need it; mount an unrestricted /proc"
    return warning("smaps", f"/proc/PID/smaps can't be read: {failure}", fix)


# --- onecopy itself


def runtime_dir(path: str, failure: str | None, exists: bool) -> Check:
    """`failure`: why it can't be used, with the fix, as RuntimeDirError puts it."""
    if failure is not None:
        return problem("runtime directory", path, failure)
    return ok("runtime directory", path if exists else f"{path}, made when onecopy starts")


def allocator(pid: int | None, server_pid: int | None) -> Check:
    """Whether one runs; a lock file that a dead one left does not matter."""
    if pid is not None:
        return ok("allocator", f"runs, pid {pid}")
    if server_pid is None:
        return info("allocator", "none runs")
    fix = "`onecopy stop`, then start again"
    return warning("allocator", "none runs, but a server does: no further instance can start", fix)


def server(pid: int | None, url: str) -> Check:
    """Whether one runs; `url` is empty until it serves."""
    if pid is None:
        return info("server", "none runs")
    return ok("server", f"runs, pid {pid}{f', {url}' if url else ', starting'}")


def segments(prefix: str, num_bytes: Sequence[int], allocator_pid: int | None) -> Check:
    """The sizes of what has this runtime directory's prefix in /dev/shm."""
    if not num_bytes:
        return ok("segments", "none")
    seen = f"{len(num_bytes)}, {size_text(sum(num_bytes))}"
    if allocator_pid is not None:
        return ok("segments", f"{seen}, of the allocator")
    fix = "start onecopy once, which takes them over or clears them up; or `onecopy doctor --fix`"
    return warning("segments", f"{seen}, left by an allocator that is gone", fix)


def left_behind(runs: Sequence[AbandonedRun]) -> Check:
    """What allocators of this user have left in /dev/shm that are gone with their directories, as
    when a container was restarted in its pod."""
    name = "left behind"
    if not runs:
        return ok(name, "nothing")
    runs = sorted(runs, key=lambda run: (not run.may_be_removed, -run.num_bytes))
    removable = [run for run in runs if run.may_be_removed]
    seen = "; ".join(
        f"{len(run.segments)} segments ({', '.join(run.segments[:_NAMES_SHOWN])}), "
        f"{size_text(run.num_bytes)}, left by {_whose(run)}"
        for run in runs[:_NAMES_SHOWN]
    )
    if len(runs) > _NAMES_SHOWN:
        rest = runs[_NAMES_SHOWN:]
        seen += f"; {size_text(sum(run.num_bytes for run in rest))} by {len(rest)} more"
    if removable:
        return warning(name, seen, "`onecopy doctor --fix` removes what nobody uses any more")
    if all(run.takes_locks for run in runs):
        return info(name, f"{seen}; still in use")
    fix = "if no onecopy of an earlier version runs any more: " + " ".join(
        f"`rm /dev/shm{run.run}-*`" for run in runs if not run.takes_locks
    )
    return warning(name, seen, fix)


def _whose(run: AbandonedRun) -> str:
    if run.owner is not None:
        return f"an allocator of {run.owner.directory}"
    return "an allocator" if run.takes_locks else "an allocator of an earlier version"


# --- parts


def worst(checks: Sequence[Check]) -> Status:
    """The gravest status; "ok" where there is nothing but information."""
    found = {one.status for one in checks}
    return "problem" if "problem" in found else "warning" if "warning" in found else "ok"


def meminfo_bytes(meminfo: str | None, key: str) -> int | None:
    """A figure of /proc/meminfo."""
    match = re.search(rf"^{key}:\s+(\d+) kB", meminfo or "", re.MULTILINE)
    return int(match[1]) * 1024 if match else None


def release_numbers(version: str) -> tuple[int, ...]:
    """The leading numbers without trailing zeros, so that 2.13 and 2.13.0 are equal."""
    match = re.match(r"\d+(\.\d+)*", version)
    numbers = [int(part) for part in match[0].split(".")] if match else []
    while numbers and not numbers[-1]:
        numbers.pop()
    return tuple(numbers)


def ok(name: str, seen: str) -> Check:
    """All is well."""
    return Check(name=name, status="ok", seen=seen)


def info(name: str, seen: str) -> Check:
    """Nothing to do, whatever it says."""
    return Check(name=name, status="info", seen=seen)


def warning(name: str, seen: str, fix: str) -> Check:
    """It runs, but may not go far."""
    return Check(name=name, status="warning", seen=seen, fix=fix)


def problem(name: str, seen: str, fix: str) -> Check:
    """It does not run like this."""
    return Check(name=name, status="problem", seen=seen, fix=fix)
