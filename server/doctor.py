"""What `onecopy doctor` reads from this machine, and in which order it judges it.

Owns reading. Invariants: nothing is changed or left behind; what can't be read is None, which the
check judges; no server and no allocator is needed. Knows no criteria: those are in `checks` and
`package_checks`.
"""

import contextlib
import ctypes
import importlib.metadata
import os
import platform
import pwd
import re
import resource
import signal
import subprocess
import sys
from pathlib import Path
from typing import Final

from allocator import InvalidSetting, RuntimeDir, RuntimeDirError, device_usages
from server import checks, package_checks
from server.checks import Check
from workers import NotThisProcessor, usable_kernels

SHM_ROOT: Final = Path("/dev/shm")  # noqa: S108 - where Linux mounts POSIX shared memory
PACKAGES: Final = ("torch", "transformers", "pyzmq")
"""The dependencies that have a line of their own; the others share one."""
LOGIND_DIRS: Final = ("etc/systemd", "run/systemd", "usr/local/lib/systemd", "usr/lib/systemd")
"""In the order of precedence (logind.conf(5))."""

_CAP_IPC_LOCK: Final = 14
_READ_SMAPS: Final = "import sys; sys.exit('Pss:' not in open(sys.argv[1]).read() and 'no Pss')"
_CHILD_TIMEOUT_S: Final = 30.0
_NO_PLACE: Final = (
    "there is none, and it can't be made there: choose another one with --runtime-dir or "
    "ONECOPY_RUNTIME_DIR."
)
_NO_LIMIT: Final = 1 << 62
"""From here on a limit is version 1's way to say that there is none: the largest whole page."""


def examine(runtime_dir: Path | None) -> list[Check]:
    """All checks, of this machine now."""
    return [*_software(), *_memory(), *_limits(), *_onecopy(runtime_dir), *_devices()]


# --- each group


def _software() -> list[Check]:
    uname = os.uname()
    found = [checks.kernel(uname.sysname, uname.release, _pidfd_failure())]
    try:
        own = importlib.metadata.distribution("onecopy")
    except importlib.metadata.PackageNotFoundError:
        own = None
    wanted = own.metadata["Requires-Python"] if own else None
    found.append(package_checks.python(platform.python_version(), wanted))
    found.append(package_checks.own_package(own.version if own else None))
    ranges = package_checks.declared(own.requires or [] if own else [])
    for name in PACKAGES:
        found.append(package_checks.package(name, _version(name), ranges.get(name, "")))
    others = [
        package_checks.package(name, _version(name), wanted)
        for name, wanted in ranges.items()
        if name not in PACKAGES
    ]
    if others:
        found.append(package_checks.other_packages(others))
    return found


def _memory() -> list[Check]:
    meminfo = read_text("/proc/meminfo")
    limit = group_limit(Path("/"))
    size: tuple[int, int] | None = None
    with contextlib.suppress(OSError):
        status = os.statvfs(SHM_ROOT)
        size = status.f_blocks * status.f_frsize, status.f_bavail * status.f_frsize
    total = checks.meminfo_bytes(meminfo, "MemTotal")
    room = min((one for one in (total, limit) if one is not None), default=None)
    return [
        checks.shared_memory(
            read_text("/proc/mounts"), size, os.access(SHM_ROOT, os.W_OK | os.X_OK), room
        ),
        checks.memory(meminfo),
        checks.memory_limit(limit, meminfo, size[0] if size else None),
        checks.huge_pages(read_text("/sys/kernel/mm/transparent_hugepage/shmem_enabled")),
        checks.numa(read_text("/sys/devices/system/node/online")),
    ]


def _limits() -> list[Check]:
    capabilities = re.search(r"^CapEff:\s+(\w+)", read_text("/proc/self/status") or "", re.M)
    may_lock = bool(capabilities and int(capabilities[1], 16) >> _CAP_IPC_LOCK & 1)
    user_id = os.geteuid()
    user = _user_name(user_id)
    return [
        checks.open_files(*resource.getrlimit(resource.RLIMIT_NOFILE)),
        checks.locked_memory(
            resource.getrlimit(resource.RLIMIT_MEMLOCK)[0], may_lock, bool(_nvidia_files())
        ),
        checks.memory_maps(read_text("/proc/sys/vm/max_map_count")),
        checks.overcommit(read_text("/proc/sys/vm/overcommit_memory")),
        checks.smaps(_smaps_failure()),
        checks.remove_ipc(
            logind_configurations(Path("/")),
            user_id,
            user,
            Path("/var/lib/systemd/linger", user).exists(),
        ),
    ]


def _onecopy(path: Path | None) -> list[Check]:
    try:
        directory = RuntimeDir.open(path, create=False)
    except RuntimeDirError as error:
        missing = (path or RuntimeDir.default_path()).absolute()
        failure: str | None = str(error)
        if isinstance(error.__cause__, FileNotFoundError):  # fine, where it can be made
            failure = None if can_be_made(missing) else _NO_PLACE
        return [checks.runtime_dir(str(missing), failure, exists=False)]
    shown = str(directory.path)
    try:
        allocator, server = directory.owner("allocator"), directory.owner("server")
    except RuntimeDirError as error:  # a lock file that is no file, or not readable
        return [checks.runtime_dir(shown, str(error), exists=True)]
    prefix, sizes = directory.segment_prefix, list[int]()
    for segment in SHM_ROOT.glob(f"{prefix.lstrip('/')}*"):
        with contextlib.suppress(FileNotFoundError):  # freed meanwhile
            sizes.append(segment.stat().st_blocks * 512)
    allocator_pid, server_pid = (one.pid if one else None for one in (allocator, server))
    return [
        checks.runtime_dir(shown, None, exists=True),
        checks.allocator(allocator_pid, server_pid),
        checks.server(server_pid, server.url if server else ""),
        checks.segments(prefix, sizes, allocator_pid),
    ]


def _devices() -> list[Check]:
    usable = {one: os.access(one, os.R_OK | os.W_OK) for one in _nvidia_files()}
    found = [checks.nvidia(read_text("/proc/driver/nvidia/version"), usable, _libcuda_failure())]
    if usable:
        found += _gpus()
    reasons = {
        name: str(reason or "")
        for name, reason in usable_kernels().items()
        if not isinstance(reason, NotThisProcessor)
    }
    return [*found, checks.cpu(read_text("/proc/cpuinfo")), checks.cpu_kernels(reasons)]


def _gpus() -> list[Check]:
    try:
        usages = device_usages()
    except InvalidSetting as error:
        return [checks.info("GPU", f"nothing more is known: {error}")]
    return [
        checks.gpu(one.name, one.model, one.total_bytes - one.used_bytes, one.compute_mode)
        for one in usages
    ]


# --- reading


def read_text(path: str | Path) -> str | None:
    """A file's text; None where it can't be read."""
    try:
        return Path(path).read_text(errors="replace")
    except OSError:
        return None


def can_be_made(path: Path) -> bool:
    """Whether we may create this directory, and those above it that are missing."""
    if path.is_symlink():  # one that leads nowhere; mkdir does not follow it
        return False
    above = next(one for one in path.parents if one.exists())
    return above.is_dir() and os.access(above, os.W_OK | os.X_OK)


def group_limit(root: Path) -> int | None:
    """The least memory limit, in bytes, of our control group and those above it (cgroups(7), both
    versions); None where there is none. In a container the groups above it can't be seen, and the
    path may be the host's: then the mount itself is the container's group."""
    limits = []
    for line in (read_text(root / "proc/self/cgroup") or "").splitlines():
        number, controllers, path = line.split(":", 2)
        if number == "0":
            mount, name = root / "sys/fs/cgroup", "memory.max"
        elif "memory" in controllers.split(","):
            mount, name = root / "sys/fs/cgroup/memory", "memory.limit_in_bytes"
        else:
            continue
        group = Path(path.lstrip("/"))
        for one in (group, *group.parents):
            text = read_text(mount / one / name)
            if text is not None and text.strip() != "max" and int(text) < _NO_LIMIT:
                limits.append(int(text))
    return min(limits, default=None)


def logind_configurations(root: Path) -> list[str] | None:
    """systemd-logind's files, the one that counts most last; None where it does not run."""
    if not (root / "run/systemd/seats").is_dir():  # it makes this one when it starts
        return None
    folders = [root / folder for folder in LOGIND_DIRS]
    main = next((one for folder in folders if (one := folder / "logind.conf").exists()), None)
    drop_ins = {
        path.name: path
        for folder in reversed(folders)
        for path in (folder / "logind.conf.d").glob("*.conf")
    }
    paths = [*([main] if main else []), *(drop_ins[name] for name in sorted(drop_ins))]
    return [text for path in paths if (text := read_text(path)) is not None]


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _user_name(user_id: int) -> str:
    try:
        return pwd.getpwuid(user_id).pw_name
    except KeyError:  # usual in containers
        return str(user_id)


def _pidfd_failure() -> str | None:
    try:
        pidfd = os.pidfd_open(os.getpid())
        try:
            signal.pidfd_send_signal(pidfd, 0)
        finally:
            os.close(pidfd)
    except OSError as error:
        return error.strerror or str(error)
    return None


def _smaps_failure() -> str | None:
    """Reading one's own is always allowed, so another process reads ours."""
    try:
        ended = subprocess.run(  # noqa: S603 - our own interpreter and program
            [sys.executable, "-IS", "-c", _READ_SMAPS, f"/proc/{os.getpid()}/smaps"],
            capture_output=True,
            text=True,
            timeout=_CHILD_TIMEOUT_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    return ended.stderr.strip().rpartition("\n")[2] if ended.returncode else None


def _nvidia_files() -> list[str]:
    pattern = re.compile(r"nvidia(\d+|ctl|-uvm)")
    return sorted(str(one) for one in Path("/dev").glob("nvidia*") if pattern.fullmatch(one.name))


def _libcuda_failure() -> str | None:
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        return str(error)
    return None
