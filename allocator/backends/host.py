"""Host memory as a device: POSIX shared memory, named, 0600, committed before it is written.

Owns names under /dev/shm. Invariants: memory that can be written through an address was committed
before (a sparse segment would mean SIGBUS in the middle of a forward pass); after the seal a client
can map read-only only, on a descriptor that was opened read-only, so mprotect can't undo it.
"""

import contextlib
import os
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Final, NoReturn

import posix_ipc

from allocator.backends.address_space import kernel_object, punch_hole
from allocator.backends.capacity import check_memory, check_shared_memory, no_shared_memory
from allocator.backends.host_mapping import HostMapping, HostPoolWindow
from allocator.backends.placement import SHM_ROOT as SHM_ROOT
from allocator.backends.placement import parse_placement
from allocator.errors import InvalidMessage, NotWriter, StaleGeneration
from allocator.messages import Extent, Handle

READ_ONLY: Final = 0o400
READ_WRITE: Final = 0o600
_WRITE_BITS: Final = 0o222
_LOOK_AT_MEMORY_EVERY_BYTES: Final = 64 << 20
"""Reading /proc/meminfo takes longer than leasing an extent, so small extents share one look."""


class HostBackend:
    """Shared host memory behind the one backend interface."""

    name = "host"
    device = "host"
    granularity = 64 << 10
    exports = False

    def __init__(self, placement: str = ""):
        """`placement` as `parse_placement` takes it. Raises InvalidSetting."""
        self.placement = placement
        self._placement = parse_placement(placement)
        self._bytes_since_look = 0

    # --- the daemon's side

    def limit_bytes(self) -> int:
        """The size of /dev/shm."""
        status = os.statvfs(SHM_ROOT)
        return status.f_blocks * status.f_frsize

    def default_limit_bytes(self, clients: Collection[int]) -> None:
        """None: /dev/shm and the machine are looked at whenever there is something to reserve."""

    def reserve(self, segment: str, num_bytes: int, *, outstanding_bytes: int = 0) -> None:
        """Check for room and create the segment. Its pages are committed by the writer, so that
        reserving a large one does not hold up the daemon's other clients."""
        check_shared_memory(num_bytes, outstanding_bytes)
        check_memory(num_bytes, outstanding_bytes)
        _create(segment, num_bytes)

    def seal(self, segment: str) -> None:
        """Take write permission from the name."""
        _path(segment).chmod(READ_ONLY)

    def free(self, segment: str) -> None:
        """Unlink the name; a name that is already gone is fine."""
        with contextlib.suppress(posix_ipc.ExistentialError):
            posix_ipc.unlink_shared_memory(segment)

    def committed_bytes(self, segment: str) -> int:
        """Of a segment that is gone, 0."""
        try:
            return _path(segment).lstat().st_blocks * 512  # stat(2): whatever the block size
        except FileNotFoundError:
            return 0

    def identity(self, segment: str) -> str:
        """Inode, size and mode: sealing is part of it."""
        try:
            return _identity(_path(segment).lstat())
        except FileNotFoundError:
            return ""

    def sweep(self, prefix: str, keep: frozenset[str] = frozenset()) -> list[str]:
        """Unlink every name with our prefix, but those in `keep`."""
        found = (f"/{path.name}" for path in SHM_ROOT.glob(f"{prefix.lstrip('/')}*"))
        stale = sorted(set(found) - keep)
        for segment in stale:
            self.free(segment)
        return stale

    def reserve_pool(self, pool: str, num_bytes: int) -> None:
        """A sparse segment."""
        _create(pool, num_bytes)

    def reserve_extent(self, pool: str, extent: Extent) -> None:
        """Only look for room; the client's window commits."""
        check_shared_memory(extent.num_bytes)
        self._bytes_since_look += extent.num_bytes
        if self._bytes_since_look >= _LOOK_AT_MEMORY_EVERY_BYTES:
            check_memory(extent.num_bytes)
            self._bytes_since_look = 0

    def free_extent(self, pool: str, extent: Extent) -> None:
        """Punch a hole. Nothing is left to do in a pool that is gone."""
        try:
            descriptor = os.open(_path(pool), os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        except FileNotFoundError:
            return
        try:
            punch_hole(descriptor, extent.offset, extent.num_bytes)
        finally:
            os.close(descriptor)

    def export(self, segment: str, extent: Extent | None = None) -> NoReturn:
        """Never: see `exports`."""
        raise InvalidMessage(f"{segment} is mapped by its name, without a descriptor")

    # --- the client's side

    def map(
        self, handle: Handle, *, writable: bool, commit: bool = True, descriptor: int | None = None
    ) -> HostMapping:
        """See `Backend.map`."""
        if handle.num_bytes < 1:
            raise InvalidMessage(f"the segment {handle.segment} holds nothing to map")
        with _opened(handle, writable=writable) as opened:
            mapping = HostMapping(opened, handle.num_bytes, self._placement if writable else None)
        if writable and commit:
            try:
                mapping.commit(0, handle.num_bytes)
            except BaseException:
                mapping.close()
                raise
        return mapping

    def kernel_object(self, handle: Handle) -> str:
        """See `Backend.kernel_object`."""
        with _opened(handle, writable=False) as opened:
            if handle.identity and _identity(os.fstat(opened)) != handle.identity:
                raise StaleGeneration(f"another segment is called {handle.segment} now")
            return kernel_object(opened)

    def open_pool(self, handle: Handle) -> HostPoolWindow:
        """See `Backend.open_pool`."""
        with (
            _opened(handle, writable=True) as write,
            _opened(handle, writable=False) as read,
        ):
            return HostPoolWindow(read, write, handle.num_bytes, self._placement)


def _path(segment: str) -> Path:
    return SHM_ROOT / segment.removeprefix("/")


def _identity(status: os.stat_result) -> str:
    return f"{status.st_ino}:{status.st_size}:{status.st_mode:o}"


def _create(segment: str, num_bytes: int) -> None:
    shared = posix_ipc.SharedMemory(segment, posix_ipc.O_CREX, mode=READ_WRITE, size=0)
    try:
        os.ftruncate(shared.fd, num_bytes)
    except OSError as error:
        posix_ipc.unlink_shared_memory(segment)
        raise no_shared_memory(num_bytes, error.strerror or str(error)) from error
    finally:
        shared.close_fd()


@contextlib.contextmanager
def _opened(handle: Handle, *, writable: bool) -> Iterator[int]:
    """The descriptor of what the handle names, closed at the end."""
    try:
        shared = posix_ipc.SharedMemory(handle.segment, read_only=not writable)
    except posix_ipc.ExistentialError as error:
        raise StaleGeneration(f"the segment {handle.segment} is gone") from error
    except posix_ipc.PermissionsError as error:
        raise NotWriter(f"the segment {handle.segment} is sealed, or not ours") from error
    try:
        status = os.fstat(shared.fd)
        if status.st_size != handle.num_bytes:
            raise StaleGeneration(f"the segment {handle.segment} has another size")
        if writable and not status.st_mode & _WRITE_BITS:  # root may open it all the same
            raise NotWriter(f"the segment {handle.segment} is sealed")
        yield shared.fd
    finally:
        shared.close_fd()
