"""What `onecopy doctor` reads from this machine, and in which order it judges it.

Owns reading, and the one thing that can be mended here (`clear_up`). Invariants: looking changes
nothing and leaves nothing behind; what can't be read is None, which the check judges; no server and
no allocator is needed. Knows no criteria: those are in `checks` and `package_checks`.
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

from allocator import (
    AbandonedRun,
    InvalidSetting,
    RuntimeDir,
    RuntimeDirError,
    abandoned_runs,
    address_space_failure,
    device_usages,
    file_size_failure,
    memory_bounds,
    remove_abandoned,
)
from server.machine import checks, device_checks, package_checks
from server.machine.checks import Check
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


def examine(runtime_dir: Path | None) -> list[Check]:
    """All checks, of this machine now."""
    return [*_software(), *_memory(), *_limits(), *_onecopy(runtime_dir), *_devices()]


def clear_up() -> list[AbandonedRun]:
    """Remove from /dev/shm what allocators of this user have left that are gone, and nobody uses:
    that is proven by locks, whatever namespace a process is in. Returns what was removed."""
    removed = (remove_abandoned(run.run) for run in abandoned_runs() if run.may_be_removed)
    return [run for run in removed if run is not None]


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
    groups = [bound for bound in memory_bounds() if bound.bound == "group"]
    group = min(groups, key=lambda one: one.available_bytes, default=None)
    size: tuple[int, int] | None = None
    with contextlib.suppress(OSError):
        status = os.statvfs(SHM_ROOT)
        size = status.f_blocks * status.f_frsize, status.f_bavail * status.f_frsize
    total = checks.meminfo_bytes(meminfo, "MemTotal")
    limits = [total, *(one.total_bytes for one in groups)]
    room = min((one for one in limits if one is not None), default=None)
    return [
        checks.shared_memory(
            read_text("/proc/mounts"), size, os.access(SHM_ROOT, os.W_OK | os.X_OK), room
        ),
        checks.memory(meminfo),
        checks.memory_limit(group, meminfo),
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
        checks.address_space(resource.getrlimit(resource.RLIMIT_AS)[0], address_space_failure()),
        checks.file_size(resource.getrlimit(resource.RLIMIT_FSIZE)[0], file_size_failure()),
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
        return [checks.runtime_dir(str(missing), failure, exists=False), _left_behind("")]
    shown = str(directory.path)
    try:
        allocator, server = directory.owner("allocator"), directory.owner("server")
    except RuntimeDirError as error:  # a lock file that is no file, or not readable
        return [checks.runtime_dir(shown, str(error), exists=True)]
    prefix, sizes = directory.segment_prefix, list[int]()
    for segment in SHM_ROOT.glob(f"{prefix.lstrip('/')}*"):
        if segment.name.endswith("-owner"):
            continue
        with contextlib.suppress(FileNotFoundError):  # freed meanwhile
            sizes.append(segment.lstat().st_blocks * 512)
    allocator_pid, server_pid = (one.pid if one else None for one in (allocator, server))
    return [
        checks.runtime_dir(shown, None, exists=True),
        checks.allocator(allocator_pid, server_pid),
        checks.server(server_pid, server.url if server else ""),
        checks.segments(prefix, sizes, allocator_pid),
        _left_behind(prefix),
    ]


def _left_behind(own_prefix: str) -> Check:
    """Of other runtime directories than this one; those that are still there clear up themselves,
    when onecopy starts there, but until then they hold memory as well."""
    return checks.left_behind(abandoned_runs(but=own_prefix))


def _devices() -> list[Check]:
    usable = {one: os.access(one, os.R_OK | os.W_OK) for one in _nvidia_files()}
    found = [
        device_checks.nvidia(read_text("/proc/driver/nvidia/version"), usable, _libcuda_failure())
    ]
    if usable:
        found += _gpus()
    reasons = {
        name: str(reason or "")
        for name, reason in usable_kernels().items()
        if not isinstance(reason, NotThisProcessor)
    }
    return [
        *found,
        device_checks.cpu(read_text("/proc/cpuinfo")),
        device_checks.cpu_kernels(reasons),
    ]


def _gpus() -> list[Check]:
    try:
        usages = device_usages()
    except InvalidSetting as error:
        return [checks.info("GPU", f"nothing more is known: {error}")]
    return [
        device_checks.gpu(one.name, one.model, one.total_bytes - one.used_bytes, one.compute_mode)
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
