"""Names under /dev/shm, and proof that nobody uses what one of them stands for.

    onecopy-HASH-RUN-owner      locked by the allocator of that run for as long as it lives
    onecopy-HASH-RUN-NUMBER     a segment, locked by whoever has opened or mapped it

HASH stands for a runtime directory, RUN for one allocator's life. /dev/shm is shared with all
users, and between containers also with processes whose pids can't be seen. So nothing is concluded
from a name, a pid or a path. Whoever opens a segment takes a shared flock on what it opened. The
kernel drops that lock when the descriptor *and* every mapping made from it are gone, however that
comes about, and shows it in every namespace. What can be locked exclusively is therefore used by
nobody.

Owns these files. Invariants: only regular files of our own user are ours, and no link is followed;
a file of another's is never opened for writing, changed or removed. Knows nothing of what segments
hold.
"""

import contextlib
import errno
import fcntl
import logging
import os
import re
import secrets
import stat
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

import msgspec

from allocator.backends.numa import SHM_ROOT
from allocator.errors import DeviceError, NotWriter, StaleGeneration

log = logging.getLogger("onecopy.allocator")

READ_ONLY: Final = 0o400
READ_WRITE: Final = 0o600
OWNER: Final = "owner"
_WRITE_BITS: Final = 0o222
_FLAGS: Final = os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
"""Not blocking, since somebody may have put a pipe under the name."""
_NAME: Final = re.compile(r"(onecopy-[0-9a-f]{12}-[0-9a-f]{8})-(.+)")
_MAX_RECORD_BYTES: Final = 16384
_LOCK_PATIENCE_S: Final = 1.0
"""Who looks for what is left behind holds a lock for some microseconds."""
_PAUSE_S: Final = 0.002


class RunOwner(msgspec.Struct, frozen=True):
    """What an allocator writes into its run's file: the runtime directory, and what tells it from
    any other that ever had this path."""

    directory: str
    device: int
    inode: int

    @classmethod
    def of(cls, directory: Path) -> Self:
        """Of a directory that exists."""
        status = directory.stat()
        return cls(str(directory), status.st_dev, status.st_ino)

    @property
    def is_here(self) -> bool:
        """Whether that very directory can be seen from here: then its own next allocator takes
        over, or clears up."""
        try:
            status = Path(self.directory).lstat()
        except OSError:
            return False
        return (status.st_dev, status.st_ino) == (self.device, self.inode)


# --- one segment


def path_of(segment: str) -> Path:
    """The file of a segment's name, which begins with a slash as POSIX has it."""
    return SHM_ROOT / segment.removeprefix("/")


def create(segment: str, num_bytes: int) -> None:
    """A sparse segment, 0600. Raises FileExistsError where the name is taken, OSError."""
    path = path_of(segment)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | _FLAGS, READ_WRITE)
    try:
        os.ftruncate(descriptor, num_bytes)
    except BaseException:
        path.unlink()
        raise
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def opened(segment: str, *, writable: bool) -> Iterator[int]:
    """A descriptor, locked as in use for as long as it or a mapping made from it lives; closed at
    the end. Raises StaleGeneration where the segment is gone or is not ours, NotWriter where it is
    sealed and should be written."""
    try:
        descriptor = os.open(path_of(segment), (os.O_RDWR if writable else os.O_RDONLY) | _FLAGS)
    except FileNotFoundError as error:
        raise StaleGeneration(f"the segment {segment} is gone") from error
    except PermissionError as error:
        raise NotWriter(f"the segment {segment} is sealed, or not ours") from error
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENXIO, errno.EISDIR):
            raise StaleGeneration(f"the segment {segment} is no file of ours") from error
        raise DeviceError(f"the segment {segment} can't be opened: {error.strerror}") from error
    try:
        status = os.fstat(descriptor)
        if not _is_ours(status):
            raise StaleGeneration(f"the segment {segment} is no file of ours")
        if writable and not status.st_mode & _WRITE_BITS:  # root may open it all the same
            raise NotWriter(f"the segment {segment} is sealed")
        _lock_as_used(descriptor, segment)
        yield descriptor
    finally:
        os.close(descriptor)


def seal(segment: str) -> None:
    """Take write permission from it. Raises FileNotFoundError where it is gone, or is not ours."""
    with _ours(segment) as descriptor:
        os.fchmod(descriptor, READ_ONLY)


def remove(segment: str) -> None:
    """Unlink the name, if it is ours and still there. Never raises: what can't be removed is
    logged, and is found again by `abandoned_runs`."""
    path = path_of(segment)
    try:
        if _is_ours(path.lstat()):
            path.unlink()
    except FileNotFoundError:
        return
    except OSError as error:
        log.warning("%s can't be removed: %s", path, error.strerror)


def status_of(segment: str) -> os.stat_result | None:
    """None where it is gone, can't be asked, or is not ours."""
    try:
        status = path_of(segment).lstat()
    except OSError:
        return None
    return status if _is_ours(status) else None


def names_of(prefix: str) -> list[str]:
    """Of all files of ours whose names begin so, without the owners' files. What others have put
    under such names is none of our business."""
    wanted = prefix.removeprefix("/")
    return [name for name in _listed() if name.startswith(wanted)]


# --- one allocator's run


class RunLock:
    """That this process is the owner of a run's segments."""

    def __init__(self, run: str, descriptor: int) -> None:
        """See `take`."""
        self.run = run
        self._descriptor = descriptor

    @classmethod
    def take(cls, run: str, owner: RunOwner) -> Self:
        """Make the run's file, or take over that of an allocator that is gone. `run` is the common
        beginning of its segments' names, without the last dash. Raises DeviceError."""
        path = SHM_ROOT / f"{run.removeprefix('/')}-{OWNER}"
        deadline = time.monotonic() + _LOCK_PATIENCE_S
        while True:
            try:
                descriptor = os.open(path, os.O_RDWR | os.O_CREAT | _FLAGS, READ_WRITE)
            except OSError as error:
                raise DeviceError(f"{path} can't be made: {error.strerror}") from error
            if not _is_ours(os.fstat(descriptor)):
                os.close(descriptor)
                raise DeviceError(f"{path} is no file of ours: remove it")
            if _try_lock(descriptor, fcntl.LOCK_EX):
                if os.fstat(descriptor).st_nlink:
                    break
            elif time.monotonic() > deadline:
                os.close(descriptor)
                raise DeviceError(f"another allocator owns {path}")
            else:
                time.sleep(_PAUSE_S)
            os.close(descriptor)  # removed by one who cleared up, between our open and our lock
        try:
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, msgspec.json.encode(owner), 0)
        except OSError as error:  # a full /dev/shm: the lock alone is what counts
            log.warning("%s can't be written: %s", path, error.strerror)
        return cls(run, descriptor)

    def release(self) -> None:
        """The run has ended and nothing of it is left."""
        remove(f"{self.run}-{OWNER}")
        os.close(self._descriptor)

    def leave(self) -> None:
        """What is left of the run is for another allocator to take."""
        os.close(self._descriptor)


def run_of(segment: str) -> str:
    """The run that a segment belongs to; "" for a name that is none of ours."""
    match = _NAME.fullmatch(segment.removeprefix("/"))
    return f"/{match[1]}" if match else ""


def runs_of(prefix: str) -> list[str]:
    """All runs of ours whose names begin so."""
    return [run for run in _by_run() if run.startswith(prefix)]


def new_run(prefix: str) -> str:
    """One that nobody can guess: else another user could take its names before we do."""
    return f"{prefix}{secrets.token_hex(4)}"


# --- what allocators that are gone have left


@dataclass(frozen=True)
class AbandonedRun:
    """Segments of ours that no allocator owns. `owner` is None where the run's file does not say
    whose they were."""

    run: str
    segments: tuple[str, ...]
    num_bytes: int
    owner: RunOwner | None
    takes_locks: bool
    """Whether the run has its file. Without it, those who map them may be of a version that takes
    no locks."""
    in_use: bool
    """Whether a process still has one of them open or mapped."""

    @property
    def may_be_removed(self) -> bool:
        """Whether it is proven that nobody uses them."""
        return self.takes_locks and not self.in_use


def abandoned_runs(but: str = "") -> list[AbandonedRun]:
    """All of our user's, by name, but those that begin with `but`. Looks, and changes nothing."""
    found = []
    for run, segments in _by_run().items():
        if but and run.startswith(but):
            continue
        with _held(run) as held:
            if held is not None:
                found.append(_abandoned(run, segments, held))
    return found


def remove_abandoned(run: str) -> AbandonedRun | None:
    """Remove a run's segments where it is proven that nobody uses them; None where it is not, or
    not any more."""
    with _held(run) as held, contextlib.ExitStack() as locks:
        segments = _by_run().get(run, [])
        if held is None or not held.is_locked or not segments:
            return None
        abandoned = _abandoned(run, segments, held)
        for segment in abandoned.segments:  # held until all are gone: nobody can open one meanwhile
            if not _lock_against_all(segment, locks):
                return None
        if not abandoned.may_be_removed:
            return None
        for segment in abandoned.segments:
            remove(segment)
        remove(f"{run}-{OWNER}")
        return abandoned


@dataclass(frozen=True)
class _Held:
    """A run whose allocator is gone. `is_locked`: its file is there, and ours for the moment."""

    owner: RunOwner | None
    is_locked: bool


@contextlib.contextmanager
def _held(run: str) -> Iterator[_Held | None]:
    """None where its allocator lives."""
    try:
        descriptor = os.open(path_of(f"{run}-{OWNER}"), os.O_RDONLY | _FLAGS)
    except OSError:
        yield _Held(None, is_locked=False)
        return
    try:
        if not _is_ours(os.fstat(descriptor)):
            yield _Held(None, is_locked=False)
        elif not _try_lock(descriptor, fcntl.LOCK_EX):
            yield None
        else:
            yield _Held(_decoded(os.pread(descriptor, _MAX_RECORD_BYTES, 0)), is_locked=True)
    finally:
        os.close(descriptor)


def _abandoned(run: str, segments: Sequence[str], held: _Held) -> AbandonedRun:
    num_bytes, in_use = 0, False
    for segment in segments:
        status = status_of(segment)
        num_bytes += status.st_blocks * 512 if status is not None else 0
        with contextlib.ExitStack() as lock:
            in_use = in_use or not _lock_against_all(segment, lock)
    own = tuple(one for one in segments if not one.endswith(f"-{OWNER}"))
    return AbandonedRun(run, own, num_bytes, held.owner, held.is_locked, in_use)


def _lock_against_all(segment: str, locks: contextlib.ExitStack) -> bool:
    """Whether nobody has it open or mapped; if so nobody can until the locks are given up. True for
    one that is gone."""
    if segment.endswith(f"-{OWNER}"):
        return True
    try:
        descriptor = os.open(path_of(segment), os.O_RDONLY | _FLAGS)
    except FileNotFoundError:
        return True
    except OSError:
        return False
    locks.callback(os.close, descriptor)
    return _is_ours(os.fstat(descriptor)) and _try_lock(descriptor, fcntl.LOCK_EX)


def _by_run() -> dict[str, list[str]]:
    """Run → names of its files, the owner's among them."""
    runs: dict[str, list[str]] = {}
    for name in sorted(_listed(with_owners=True)):
        if run := run_of(name):
            runs.setdefault(run, []).append(f"/{name}")
    return runs


# --- parts


def _listed(*, with_owners: bool = False) -> list[str]:
    found = []
    try:
        with os.scandir(SHM_ROOT) as entries:
            for entry in entries:
                if not entry.name.startswith("onecopy-"):
                    continue
                if entry.name.endswith(f"-{OWNER}") and not with_owners:
                    continue
                with contextlib.suppress(OSError):  # gone meanwhile
                    if _is_ours(entry.stat(follow_symlinks=False)):
                        found.append(entry.name)
    except OSError as error:
        log.warning("%s can't be listed: %s", SHM_ROOT, error.strerror)
    return found


def _is_ours(status: os.stat_result) -> bool:
    return stat.S_ISREG(status.st_mode) and status.st_uid == os.geteuid()


@contextlib.contextmanager
def _ours(segment: str) -> Iterator[int]:
    descriptor = os.open(path_of(segment), os.O_RDONLY | _FLAGS)
    try:
        if not _is_ours(os.fstat(descriptor)):
            raise FileNotFoundError(errno.ENOENT, "no file of ours", segment)
        yield descriptor
    finally:
        os.close(descriptor)


def _lock_as_used(descriptor: int, segment: str) -> None:
    deadline = time.monotonic() + _LOCK_PATIENCE_S
    while not _try_lock(descriptor, fcntl.LOCK_SH):
        if time.monotonic() > deadline:
            raise StaleGeneration(f"the segment {segment} is being removed")
        time.sleep(_PAUSE_S)
    if not os.fstat(descriptor).st_nlink:
        raise StaleGeneration(f"the segment {segment} is gone")


def _try_lock(descriptor: int, kind: int) -> bool:
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _decoded(text: bytes) -> RunOwner | None:
    try:
        return msgspec.json.decode(text, type=RunOwner)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None
