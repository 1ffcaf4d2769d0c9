"""Host memory as a device: POSIX shared memory, named, 0600, committed before it is written.

Owns what the daemon and a client do with segments. Invariants: memory that can be written through
an address was committed before (a sparse segment would mean SIGBUS in the middle of a forward
pass), and nothing sparse is sealed; after the seal a client can map read-only only, on a descriptor
that was opened read-only, so mprotect can't undo it. Names are in `segments`.
"""

import contextlib
import errno
import os
from collections.abc import Collection, Iterator
from typing import NoReturn

from allocator.backends import segments
from allocator.backends.address_space import kernel_object, punch_hole
from allocator.backends.capacity import (
    check_room,
    no_shared_memory,
    shareable_bytes,
    shareable_room,
)
from allocator.backends.host_mapping import HostMapping, HostPoolWindow
from allocator.backends.numa import SHM_ROOT as SHM_ROOT
from allocator.backends.numa import parse_page_policy
from allocator.backends.room import Room
from allocator.errors import DeviceError, InvalidMessage, NameTaken, StaleGeneration
from allocator.messages import Extent, Handle

_NO_ROOM = (errno.ENOSPC, errno.ENOMEM, errno.EFBIG)


class HostBackend:
    """Shared host memory behind the one backend interface."""

    name = "host"
    device = "host"
    granularity = 64 << 10
    exports = False

    def __init__(self, page_policy: str = ""):
        """`page_policy` as `parse_page_policy` takes it. Raises InvalidSetting."""
        self.page_policy = page_policy
        self._page_policy = parse_page_policy(page_policy)
        self._pools: dict[str, int] = {}
        """Descriptors by which holes are punched: to open one then could fail."""

    # --- the daemon's side

    def limit_bytes(self) -> int:
        """What /dev/shm, the machine and our control groups could hold at most."""
        return shareable_bytes()

    def room(self) -> Room:
        """What they can still give, less what processes need for themselves."""
        return shareable_room()

    def default_limit_bytes(self, clients: Collection[int]) -> None:
        """None: /dev/shm and the machine are looked at whenever there is something to reserve."""

    def reserve(self, segment: str, num_bytes: int, *, outstanding_bytes: int = 0) -> None:
        """Check for room and create the segment. Its pages are committed by the writer, so that
        reserving a large one does not hold up the daemon's other clients."""
        check_room(num_bytes, outstanding_bytes)
        _create(segment, num_bytes)

    def seal(self, segment: str) -> None:
        """Take write permission from the name. Raises StaleGeneration where somebody has removed
        it, InvalidMessage where some of it was never written: its readers would end by SIGBUS."""
        status = segments.status_of(segment)
        if status is None:
            raise _removed(segment)
        if status.st_blocks * 512 < status.st_size:
            raise InvalidMessage(
                f"of the {status.st_size} bytes of the segment {segment} only "
                f"{status.st_blocks * 512} have memory: commit what is not written"
            )
        try:
            segments.seal(segment)
        except FileNotFoundError as error:
            raise _removed(segment) from error
        except OSError as error:
            raise DeviceError(f"{segment} can't be sealed: {error.strerror}") from error

    def free(self, segment: str) -> None:
        """Unlink the name; a name that is already gone is fine."""
        descriptor = self._pools.pop(segment, None)
        if descriptor is not None:
            os.close(descriptor)
        segments.remove(segment)

    def committed_bytes(self, segment: str) -> int:
        """Of a segment that is gone, 0."""
        status = segments.status_of(segment)
        return status.st_blocks * 512 if status is not None else 0  # stat(2): whatever the block

    def identity(self, segment: str) -> str:
        """Inode, size and mode: sealing is part of it."""
        status = segments.status_of(segment)
        return "" if status is None else _identity(status)

    def sweep(self, prefix: str, keep: frozenset[str] = frozenset()) -> list[str]:
        """Unlink every name of ours with our prefix, but those in `keep`."""
        found = {f"/{name}" for name in segments.names_of(prefix)}
        stale = sorted(found - keep)
        for segment in stale:
            self.free(segment)
        return stale

    def reserve_pool(self, pool: str, num_bytes: int) -> None:
        """A sparse segment."""
        _create(pool, num_bytes)

    def hold_pool(self, pool: str) -> None:
        """Keep what `free_extent` needs. Raises DeviceError."""
        if pool not in self._pools:
            try:
                with segments.opened(pool, writable=True) as descriptor:
                    self._pools[pool] = os.dup(descriptor)
            except OSError as error:
                raise DeviceError(f"{pool} can't be held open: {error.strerror}") from error

    def close(self) -> None:
        """Let go of what `hold_pool` holds; the pools stay. Idempotent."""
        for descriptor in self._pools.values():
            os.close(descriptor)
        self._pools.clear()

    def reserve_extent(self, pool: str, extent: Extent) -> None:
        """Nothing: the client's window commits, and whether there is room `room` has said."""

    def free_extent(self, pool: str, extent: Extent) -> None:
        """Punch a hole. Nothing is left to do in a pool that is gone. Raises DeviceError."""
        try:
            self.hold_pool(pool)
            punch_hole(self._pools[pool], extent.offset, extent.num_bytes)
        except StaleGeneration:
            return
        except OSError as error:
            raise DeviceError(
                f"the memory of an extent of {pool} can't be taken back: {error.strerror}"
            ) from error

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
            mapping = HostMapping(opened, handle.num_bytes, self._page_policy if writable else None)
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
            return HostPoolWindow(read, write, handle.num_bytes, self._page_policy)


def _removed(segment: str) -> StaleGeneration:
    return StaleGeneration(
        f"the segment {segment} was removed by another program: load the set anew"
    )


def _identity(status: os.stat_result) -> str:
    return f"{status.st_ino}:{status.st_size}:{status.st_mode:o}"


def _create(segment: str, num_bytes: int) -> None:
    try:
        segments.create(segment, num_bytes)
    except FileExistsError as error:
        raise NameTaken(f"there is a file {segments.path_of(segment)} already") from error
    except OSError as error:
        if error.errno in _NO_ROOM:
            raise no_shared_memory(num_bytes, error.strerror or str(error)) from error
        raise DeviceError(
            f"no segment of shared memory can be made in {SHM_ROOT}: {error.strerror}"
        ) from error


@contextlib.contextmanager
def _opened(handle: Handle, *, writable: bool) -> Iterator[int]:
    """The descriptor of what the handle names, closed at the end."""
    with segments.opened(handle.segment, writable=writable) as descriptor:
        if os.fstat(descriptor).st_size != handle.num_bytes:
            raise StaleGeneration(f"the segment {handle.segment} has another size")
        yield descriptor
