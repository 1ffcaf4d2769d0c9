"""Names under /dev/shm, and proof that nobody uses what one of them stands for.

    onecopy-HASH-RUN-owner      of the allocator of that run (`backends.runs`)
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
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from allocator.backends.numa import SHM_ROOT
from allocator.errors import DeviceError, NotWriter, StaleGeneration

log = logging.getLogger("onecopy.allocator")

READ_ONLY: Final = 0o400
READ_WRITE: Final = 0o600
OWNER: Final = "owner"
_WRITE_BITS: Final = 0o222
FLAGS: Final = os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
"""Not blocking, since somebody may have put a pipe under the name."""
LOCK_PATIENCE_S: Final = 1.0
"""Who looks for what is left behind holds a lock for some microseconds."""
PAUSE_S: Final = 0.002


def path_of(segment: str) -> Path:
    """The file of a segment's name, which begins with a slash as POSIX has it."""
    return SHM_ROOT / segment.removeprefix("/")


def create(segment: str, num_bytes: int) -> None:
    """A sparse segment, 0600. Raises FileExistsError where the name is taken, OSError."""
    path = path_of(segment)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | FLAGS, READ_WRITE)
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
        descriptor = os.open(path_of(segment), (os.O_RDWR if writable else os.O_RDONLY) | FLAGS)
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
        if not is_ours(status):
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
    logged, and is found again by `runs.abandoned_runs`."""
    path = path_of(segment)
    try:
        if is_ours(path.lstat()):
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
    return status if is_ours(status) else None


def names_of(prefix: str) -> list[str]:
    """Of all files of ours whose names begin so, without the owners' files. What others have put
    under such names is none of our business."""
    wanted = prefix.removeprefix("/")
    return [name for name in listed() if name.startswith(wanted)]


# --- parts


def listed(*, with_owners: bool = False) -> list[str]:
    """The names of all files of ours, of whichever runs."""
    found = []
    try:
        with os.scandir(SHM_ROOT) as entries:
            for entry in entries:
                if not entry.name.startswith("onecopy-"):
                    continue
                if entry.name.endswith(f"-{OWNER}") and not with_owners:
                    continue
                with contextlib.suppress(OSError):  # gone meanwhile
                    if is_ours(entry.stat(follow_symlinks=False)):
                        found.append(entry.name)
    except OSError as error:
        log.warning("%s can't be listed: %s", SHM_ROOT, error.strerror)
    return found


def is_ours(status: os.stat_result) -> bool:
    """Whether that is a regular file of our own user."""
    return stat.S_ISREG(status.st_mode) and status.st_uid == os.geteuid()


@contextlib.contextmanager
def _ours(segment: str) -> Iterator[int]:
    descriptor = os.open(path_of(segment), os.O_RDONLY | FLAGS)
    try:
        if not is_ours(os.fstat(descriptor)):
            raise FileNotFoundError(errno.ENOENT, "no file of ours", segment)
        yield descriptor
    finally:
        os.close(descriptor)


def _lock_as_used(descriptor: int, segment: str) -> None:
    deadline = time.monotonic() + LOCK_PATIENCE_S
    while not try_lock(descriptor, fcntl.LOCK_SH):
        if time.monotonic() > deadline:
            raise StaleGeneration(f"the segment {segment} is being removed")
        time.sleep(PAUSE_S)
    if not os.fstat(descriptor).st_nlink:
        raise StaleGeneration(f"the segment {segment} is gone")


def try_lock(descriptor: int, kind: int) -> bool:
    """Whether the lock could be had at once. `kind` as flock(2) has it."""
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
