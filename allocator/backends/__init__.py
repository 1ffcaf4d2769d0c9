"""The one interface to a device's memory, and the choice of a backend.

Invariant: code outside this folder never touches a device API. A backend's two sides never meet in
one process: the daemon reserves, seals, exports and frees; a client maps. A segment holds one
weight set; a pool is a range of offsets of which extents get memory one by one.

    pool, as the daemon counts it      | extent |      free      | extent | extent |   free   |
    pool, in one client's addresses    | mapped | (no access)    | (another's)     |          |
"""

from collections.abc import Callable, Collection
from pathlib import Path
from typing import Protocol

from allocator.backends.room import Room
from allocator.errors import SharedMemoryFull
from allocator.messages import Extent, Handle


class Mapping(Protocol):
    """A segment in this process's address space, until the last view of it is gone."""

    on_shortage: Callable[[SharedMemoryFull], None] | None
    """Asked for room where memory can't be committed. Returns where trying again makes sense."""

    @property
    def buffer(self) -> memoryview:
        """The segment's bytes; writing to a read-only mapping's raises TypeError. Memory that the
        processor can't address raises TypeError, too; `read` and `write` work for any."""

    @property
    def num_bytes(self) -> int:
        """The segment's size."""

    def commit(self, offset: int, num_bytes: int) -> None:
        """Give these bytes memory before they are written through `buffer`. For a mapping that was
        made with `commit=False`. Raises OutOfDeviceMemory."""

    def write(self, offset: int, data: bytes | memoryview) -> None:
        """Copy `data` to `offset`, committing as it goes. Threads may write at once. Raises
        OutOfDeviceMemory."""

    def complete(self) -> None:
        """Commit what was not written, so that nobody who reads the segment meets a hole. Raises
        OutOfDeviceMemory."""

    def read(self, offset: int, out: memoryview) -> None:
        """Fill `out` from `offset`."""

    def close(self) -> None:
        """Drop this reference. The address range goes when no view of it is left."""


class PoolWindow(Protocol):
    """A client's addresses for a whole pool: one range, in which extents are mapped at their
    offsets. Touching an offset that is not mapped ends the process by SIGSEGV, and harms no other.
    """

    @property
    def num_bytes(self) -> int:
        """The pool's size; the window costs no memory by itself."""

    @property
    def buffer(self) -> memoryview:
        """The whole window, writable; offsets are the pool's. As for `Mapping.buffer`."""

    def map(self, extent: Extent, *, writable: bool, descriptor: int | None = None) -> None:
        """Make an extent accessible; a writable one has all its memory committed. Mapping again
        changes the access. `descriptor` is what `Backend.export` made; it stays the caller's.
        Raises OutOfDeviceMemory, StaleGeneration."""

    def settle(self) -> None:
        """What this process has written, or told the device to write, is there for every process
        that maps it once this returns."""

    def unmap(self, extent: Extent, *, discard: bool = False) -> None:
        """Make it inaccessible; with `discard` its memory goes back to the device first. The
        backend says what it does where that fails; nobody may touch it in any case."""

    def close(self) -> None:
        """Unmap all. Views of `buffer` that are left must not be touched any more."""


class Backend(Protocol):
    """Reserve, export, map, free. The same contract tests run against every implementation."""

    name: str
    device: str
    """For people and for `Handle.device`: "host", or "cuda:GPU-<UUID>"."""
    granularity: int
    """Bytes; extents of the pool begin and end at multiples of it."""
    page_policy: str
    """Goes into handles, for the client's side of this backend. "" where there is no choice."""
    exports: bool
    """Whether a client needs a descriptor (`export`) to map."""

    def limit_bytes(self) -> int:
        """What the device could hold if nothing else used it. Raises DeviceError."""

    def room(self) -> Room | None:
        """What it can hold beside what is committed now; None for a device that only tells by
        refusing. Raises DeviceError."""

    def default_limit_bytes(self, clients: Collection[int]) -> int | None:
        """How much is given out where nobody says; None for what the device can give. `clients`
        are the pids of those whose memory is ours."""

    def reserve(self, segment: str, num_bytes: int, *, outstanding_bytes: int = 0) -> None:
        """Make a segment. `outstanding_bytes` were reserved earlier and may not be committed yet.
        Raises OutOfDeviceMemory, naming the fix, NameTaken or DeviceError, and then leaves
        nothing."""

    def seal(self, segment: str) -> None:
        """From now on the segment can be mapped read-only. Raises StaleGeneration where it is gone,
        InvalidMessage where some of it has no memory."""

    def free(self, segment: str) -> None:
        """Give the segment back. Processes that map it keep their mapping until they drop it."""

    def committed_bytes(self, segment: str) -> int:
        """How many bytes of a segment or a pool have memory."""

    def identity(self, segment: str) -> str:
        """What tells this very segment from any other that ever had its name; "" where it is gone,
        or where it can't outlive the daemon."""

    def sweep(self, prefix: str, keep: frozenset[str] = frozenset()) -> list[str]:
        """Free what an earlier daemon of this prefix left behind, but `keep`; return the names."""

    def reserve_pool(self, pool: str, num_bytes: int) -> None:
        """Make a pool; it takes no memory before its extents do. Raises as `reserve` does."""

    def hold_pool(self, pool: str) -> None:
        """Have what it takes to free extents of a pool that is there, whatever becomes scarce
        later. Raises StaleGeneration, DeviceError."""

    def reserve_extent(self, pool: str, extent: Extent) -> None:
        """Make an extent leasable. Raises OutOfDeviceMemory where the device refuses."""

    def free_extent(self, pool: str, extent: Extent) -> None:
        """Take an extent's memory back, whoever still maps it: a client of the host backend that
        does would read zeros. Raises DeviceError, and then it may not have gone."""

    def export(self, segment: str, extent: Extent | None = None) -> int:
        """A descriptor for a client to map, the caller's to close. Only where `exports`."""

    def map(
        self, handle: Handle, *, writable: bool, commit: bool = True, descriptor: int | None = None
    ) -> Mapping:
        """Client side. Writable only for a writer before the seal. Raises StaleGeneration where the
        segment is gone, NotWriter where it is sealed, OutOfDeviceMemory where its memory can't be
        committed."""

    def kernel_object(self, handle: Handle) -> str:
        """Client side: what /proc/PID/maps shows of a mapping of this very segment, as
        "device:inode"; "" for memory that it does not show. Raises StaleGeneration where the
        segment is gone, or another one has its name."""

    def open_pool(self, handle: Handle) -> PoolWindow:
        """Client side: addresses for the pool. Raises StaleGeneration where it is gone."""


def open_device(device: str, page_policy: str = "") -> Backend:
    """The backend of a device that a daemon should own: "host" or "cuda:N". Raises InvalidSetting
    for an unknown device or page policy, or one that this machine does not have."""
    if device == "host":
        from allocator.backends.host import HostBackend

        return HostBackend(page_policy)
    if device.startswith("cuda"):
        from allocator.backends.cuda import CUDABackend

        return CUDABackend(device, page_policy)
    from allocator.errors import InvalidSetting

    raise InvalidSetting(f"the device {device!r} is not one of host, cuda:N, cuda:GPU-UUID")


def device_fault(device: str) -> str | None:
    """Why this process can't use the device "host" or "cuda:…" any more, as after a kernel that
    touched memory that is not its own; None where it can. Other processes are not concerned, and
    only a new one can go on. Waits for what the device was told; for clients, which have a context.
    """
    if not device.startswith("cuda"):
        return None
    from allocator.backends.cuda_driver import fault

    return fault(device)


def file_handle(path: Path) -> Handle:
    """A handle for the regular file that is at `path` now, without symbolic links. Raises
    StaleGeneration where there is none."""
    from allocator.backends.file import FileBackend
    from allocator.errors import StaleGeneration

    identity = FileBackend().identity(str(path))
    if not identity:
        raise StaleGeneration(f"{path} is no regular file")
    return Handle(
        backend="file",
        segment=str(path),
        num_bytes=path.stat().st_size,
        generation=0,
        identity=identity,
    )


def kernel_object(handle: Handle) -> str:
    """See `Backend.kernel_object`."""
    return for_handle(handle).kernel_object(handle)


def for_handle(handle: Handle) -> Backend:
    """The client's side of the backend that a handle names. Raises InvalidSetting for an unknown
    one."""
    if handle.backend == "file":
        from allocator.backends.file import FileBackend

        return FileBackend()
    return open_device(handle.device or handle.backend, handle.page_policy)
