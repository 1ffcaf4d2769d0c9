"""Where the sockets of one onecopy lie. Everyone who shares a runtime directory shares memory.

Owns the directory's choice, its checks (ours, 0700, short enough for Unix sockets, at a place where
nobody else can put another) and the names in it. Invariant: a `RuntimeDir` that was opened can be
used.
"""

import contextlib
import fcntl
import hashlib
import os
import stat
import tempfile
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec

from allocator.errors import AlreadyRunning, RuntimeDirError
from allocator.processes.identity import ProcessIdentity

MAX_SOCKET_PATH_BYTES: Final = 107
"""sun_path holds 108 bytes with its terminating zero (unix(7))."""
LONGEST_NAME: Final = "allocator-requests.sock"
_MOST_LINKS: Final = 40
"""As many as the kernel follows (path_resolution(7))."""
_FLAGS: Final = os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
_MAX_LOCK_BYTES: Final = 4096


class Owner(msgspec.Struct, frozen=True):
    """What a running daemon writes into its lock file."""

    pid: int
    start_ticks: int
    url: str = ""

    @property
    def process(self) -> ProcessIdentity:
        """The daemon's process, whether or not it still runs."""
        return ProcessIdentity(self.pid, self.start_ticks)


@dataclass(frozen=True)
class RuntimeDir:
    """An existing, private, writable directory with a path short enough for sockets."""

    path: Path

    @classmethod
    def open(cls, path: Path | str | None = None, *, create: bool = True) -> "RuntimeDir":
        """Checks the directory, making it where it is missing. Raises `RuntimeDirError`."""
        chosen = Path(path) if path is not None else cls.default_path()
        chosen = chosen.absolute()
        if os.fsencode(chosen).decode(errors="ignore") != str(chosen):
            raise RuntimeDirError(
                f"the name of the runtime directory {os.fsencode(chosen)!r} is no UTF-8: choose "
                "another one with --runtime-dir or ONECOPY_RUNTIME_DIR."
            )
        if len(os.fsencode(chosen / LONGEST_NAME)) > MAX_SOCKET_PATH_BYTES:
            raise RuntimeDirError(
                f"the runtime directory {chosen} is too long: Unix socket paths are limited to "
                f"{MAX_SOCKET_PATH_BYTES} bytes. Choose a shorter one with --runtime-dir or "
                "ONECOPY_RUNTIME_DIR."
            )
        try:
            _check_way(chosen)
            if create:
                chosen.mkdir(mode=0o700, parents=True, exist_ok=True)
                _check_way(chosen)
            status = chosen.stat()
        except OSError as error:
            raise RuntimeDirError(
                f"the runtime directory {chosen} can't be used: {error.strerror}. Choose another "
                "one with --runtime-dir or ONECOPY_RUNTIME_DIR."
            ) from error
        if not chosen.is_dir():
            raise RuntimeDirError(f"{chosen} is not a directory, so it can't hold our sockets")
        if status.st_uid != os.geteuid():
            raise RuntimeDirError(
                f"the runtime directory {chosen} belongs to user id {status.st_uid}, not to "
                f"{os.geteuid()}: run as that user, or choose another with --runtime-dir."
            )
        if status.st_mode & 0o077:
            raise RuntimeDirError(
                f"the runtime directory {chosen} is open to other users (mode "
                f"{status.st_mode & 0o777:04o}): run `chmod 700 {chosen}`."
            )
        if not os.access(chosen, os.W_OK | os.X_OK):
            raise RuntimeDirError(
                f"the runtime directory {chosen} is not writable: choose another with "
                "--runtime-dir or ONECOPY_RUNTIME_DIR."
            )
        return cls(chosen)

    @staticmethod
    def default_path() -> Path:
        """`$ONECOPY_RUNTIME_DIR`, else systemd's `$RUNTIME_DIRECTORY`, else
        `$XDG_RUNTIME_DIR/onecopy`, else a private directory under the system's temporary one."""
        if named := os.environ.get("ONECOPY_RUNTIME_DIR"):
            return Path(named)
        if given := os.environ.get("RUNTIME_DIRECTORY"):
            return Path(given.split(":")[0])
        if xdg := os.environ.get("XDG_RUNTIME_DIR"):
            return Path(xdg) / "onecopy"
        return Path(tempfile.gettempdir()) / f"onecopy-{os.getuid()}"

    @property
    def lifeline(self) -> Path:
        """The allocator's Unix socket for credentials, descriptors and liveness."""
        return self.path / "allocator.sock"

    @property
    def allocator_requests(self) -> str:
        """The ZeroMQ endpoint of the allocator."""
        return f"ipc://{self.path / LONGEST_NAME}"

    @property
    def journal(self) -> Path:
        """What the allocator holds, for the one that comes after it."""
        return self.path / "allocator.journal"

    @property
    def cores(self) -> Path:
        """Where instances say that they compute; theirs alone."""
        return self.path / "cores.lock"

    def engine(self, name: str) -> Path:
        """The socket on which an instance awaits its server."""
        return self.path / f"engine-{name}.sock"

    def engines(self) -> list[Path]:
        """All of these that there are."""
        return list(self.path.glob("engine-*.sock"))

    @property
    def admin(self) -> Path:
        """The Unix socket of the server's admin API."""
        return self.path / "admin.sock"

    @property
    def segment_prefix(self) -> str:
        """The start of the names of all segments that belong to this directory. The inode keeps two
        directories apart, the user id keeps us from another user's names."""
        status = self.path.stat()
        seed = f"{status.st_dev}:{status.st_ino}:{status.st_uid}:{self.path}"
        return f"/onecopy-{hashlib.sha256(seed.encode()).hexdigest()[:12]}-"

    def owner(self, role: str) -> Owner | None:
        """Who runs as `role` ("allocator" or "server") here; None where nobody does. Raises
        RuntimeDirError where something else than a file has the lock's name.

        Reads the lock file and asks the kernel for the process, rather than trying the lock: a
        probe that holds the lock for a moment could refuse a daemon that starts just then.
        """
        path = self._lock_path(role)
        try:
            fd = os.open(path, os.O_RDONLY | _FLAGS)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise _unusable(path, error) from error
        try:
            _check_is_file(fd, path)
            owner = msgspec.json.decode(os.pread(fd, _MAX_LOCK_BYTES, 0), type=Owner)
        except (msgspec.DecodeError, UnicodeDecodeError):
            return None
        except OSError as error:
            raise _unusable(path, error) from error
        finally:
            os.close(fd)
        return owner if owner.process.is_alive() else None

    def lock(self, role: str) -> "RoleLock":
        """Become the one process of this role here. Raises `AlreadyRunning`, `RuntimeDirError`."""
        path = self._lock_path(role)
        while True:
            try:
                fd = os.open(path, os.O_RDWR | os.O_CREAT | _FLAGS, 0o600)
            except OSError as error:
                raise _unusable(path, error) from error
            try:
                _check_is_file(fd, path)
            except RuntimeDirError:
                os.close(fd)
                raise
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(fd)
                owner = self.owner(role)
                who = f" (pid {owner.pid})" if owner else ""
                raise AlreadyRunning(
                    f"another {role}{who} runs in {self.path}: stop it with `onecopy stop "
                    f"--runtime-dir {self.path}`, or choose another --runtime-dir."
                ) from None
            try:
                same = os.fstat(fd).st_ino == path.lstat().st_ino
            except FileNotFoundError:
                same = False
            if same:
                break
            os.close(fd)  # the last owner unlinked the file between our open and our lock
        lock = RoleLock(path, fd)
        try:
            lock.announce()
        except OSError as error:
            lock.release()
            raise _unusable(path, error) from error
        return lock

    def _lock_path(self, role: str) -> Path:
        return self.path / f"{role}.lock"


def _unusable(path: Path, error: OSError) -> RuntimeDirError:
    return RuntimeDirError(
        f"{path} can't be used ({error.strerror}): make room there, or remove what lies there once "
        "nothing of onecopy runs there, or choose another --runtime-dir."
    )


class RoleLock:
    """The held lock: an flock, so the kernel drops it when its process ends, however it ends."""

    def __init__(self, path: Path, fd: int):
        self._path = path
        self._fd = fd

    def announce(self, url: str = "") -> None:
        """Write who we are, and where we serve."""
        own = ProcessIdentity.own()
        text = msgspec.json.encode(Owner(own.pid, own.start_ticks, url))
        os.ftruncate(self._fd, 0)
        os.pwrite(self._fd, text, 0)

    def release(self) -> None:
        """Unlink the file, then drop the lock."""
        with contextlib.suppress(OSError):  # what is left is seen to be a dead one's
            self._path.unlink(missing_ok=True)
        os.close(self._fd)


def _check_is_file(fd: int, path: Path) -> None:
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        raise RuntimeDirError(f"the lock file {path} is no file: remove what lies there")


def _check_way(path: Path) -> None:
    """Whoever owns a directory, or a link, on the way to `path` decides what lies there: that must
    be us, or root. Looks as far as there is something. Raises RuntimeDirError, OSError."""
    here, steps, num_links = Path("/"), deque(path.parts[1:]), 0
    while steps:
        step = steps.popleft()
        if step == "..":
            here = here.parent
            continue
        there = here / step
        try:
            status = there.lstat()
        except FileNotFoundError:
            return
        if stat.S_ISLNK(status.st_mode):
            num_links += 1
            if status.st_uid not in (0, os.geteuid()) or num_links > _MOST_LINKS:
                raise _insecure(path, there, f"is a link of user id {status.st_uid}")
            target = there.readlink()
            here = Path("/") if target.is_absolute() else here
            steps.extendleft(reversed(target.parts[1:] if target.is_absolute() else target.parts))
            continue
        here = there
        if not steps:
            return  # the directory itself, which is checked for more
        if status.st_uid not in (0, os.geteuid()):
            raise _insecure(path, there, f"belongs to user id {status.st_uid}")
        if status.st_mode & stat.S_IWOTH and not status.st_mode & stat.S_ISVTX:
            raise _insecure(path, there, "is one that everybody may write to")


def _insecure(path: Path, step: Path, what: str) -> RuntimeDirError:
    return RuntimeDirError(
        f"the runtime directory {path} is not safe: on the way to it, {step} {what}, so that "
        "another user could put something else in its place. Choose another with --runtime-dir or "
        "ONECOPY_RUNTIME_DIR."
    )
