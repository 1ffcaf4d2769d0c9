"""A file that is well laid out already as a segment: mapped where it lies, never copied.

Owns nothing: the page cache holds the one copy. Invariant: what is mapped is the very file whose
identity its handle names, read-only; who changes it afterwards in place harms its readers, and who
truncates it ends them by SIGBUS. The daemon has no such device, so its side is refused.
"""

import contextlib
import mmap
import os
import stat
from collections.abc import Iterator
from typing import Final, NoReturn

from allocator.backends.address_space import kernel_object
from allocator.backends.host_mapping import HostMapping
from allocator.errors import InvalidMessage, NotWriter, StaleGeneration
from allocator.messages import Handle

_FLAGS: Final = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
"""Not blocking, since the path may have become a pipe that nobody writes to."""


class FileBackend:
    """The client's side for handles whose `segment` is the path of a file."""

    name = "file"
    device = "file"
    granularity = mmap.PAGESIZE
    page_policy = ""
    exports = False

    def identity(self, segment: str) -> str:
        """Device, inode, size and time of the last change; "" where no regular file lies there. Of
        a symbolic link too: resolve it first."""
        try:
            return _identity(os.lstat(segment))
        except OSError:
            return ""

    def map(
        self, handle: Handle, *, writable: bool, commit: bool = True, descriptor: int | None = None
    ) -> HostMapping:
        """See `Backend.map`; `handle.segment` is an absolute path. Raises StaleGeneration where the
        file is not the one that the handle was made for."""
        if writable:
            raise NotWriter(f"the file {handle.segment} is only read")
        if handle.num_bytes < 1:
            raise InvalidMessage(f"of the file {handle.segment} nothing is to be mapped")
        with _opened(handle) as opened:
            mapping = HostMapping(opened, handle.num_bytes)
        mapping.will_need()
        return mapping

    def kernel_object(self, handle: Handle) -> str:
        """See `Backend.kernel_object`."""
        with _opened(handle) as opened:
            return kernel_object(opened)

    def _refuse(self, *_: object, **__: object) -> NoReturn:
        raise NotWriter("files are mapped by clients; no allocator reserves, seals or frees them")

    limit_bytes = default_limit_bytes = room = hold_pool = _refuse
    reserve = seal = free = committed_bytes = sweep = _refuse
    reserve_pool = reserve_extent = free_extent = export = open_pool = _refuse


@contextlib.contextmanager
def _opened(handle: Handle) -> Iterator[int]:
    """The descriptor of the very file that the handle was made for, closed at the end."""
    try:
        opened = os.open(handle.segment, _FLAGS)
    except OSError as error:
        raise StaleGeneration(
            f"the file {handle.segment} can't be opened any more: {error.strerror}"
        ) from error
    try:
        status = os.fstat(opened)
        identity = _identity(status)
        if not identity or identity != handle.identity or status.st_size < handle.num_bytes:
            raise StaleGeneration(
                f"the file {handle.segment} has changed since its weight set was made: load the "
                "model anew"
            )
        yield opened
    finally:
        os.close(opened)


def _identity(status: os.stat_result) -> str:
    # What is not a regular file has none.
    if not stat.S_ISREG(status.st_mode):
        return ""
    return f"{status.st_dev}:{status.st_ino}:{status.st_size}:{status.st_mtime_ns}"
