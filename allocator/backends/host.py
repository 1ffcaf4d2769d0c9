"""Host memory as a device: POSIX shared memory, named, 0600, committed before it is written.

Owns names under /dev/shm. Invariants: a mapping that is handed out has all its memory committed (a
sparse segment would mean SIGBUS in the middle of a forward pass); after the seal a client can map
read-only only, on a descriptor that was opened read-only, so mprotect can't undo it.
"""

import errno
import mmap
import os
from pathlib import Path
from typing import Final

import posix_ipc

from allocator.errors import NotWriter, OutOfDeviceMemory, StaleGeneration
from allocator.messages import Handle

SHM_ROOT: Final = Path("/dev/shm")  # noqa: S108 - where Linux mounts POSIX shared memory
READ_ONLY: Final = 0o400
READ_WRITE: Final = 0o600


class HostMapping:
    """One mmap of a segment. Views keep it alive; `close` only drops our reference."""

    def __init__(self, mapped: mmap.mmap):
        self._mapped: mmap.mmap | None = mapped
        self._buffer: memoryview | None = memoryview(mapped)
        self._num_bytes = len(mapped)

    @property
    def buffer(self) -> memoryview:
        """The segment's bytes."""
        if self._buffer is None:
            raise ValueError("the mapping is closed")
        return self._buffer

    @property
    def num_bytes(self) -> int:
        """The segment's size."""
        return self._num_bytes

    def close(self) -> None:
        """Idempotent. With no view left the kernel unmaps at once."""
        self._buffer = None
        self._mapped = None


class HostBackend:
    """Shared host memory behind the one backend interface."""

    name = "host"
    device = "host:0"

    def limit_bytes(self) -> int:
        """The size of /dev/shm."""
        status = os.statvfs(SHM_ROOT)
        return status.f_blocks * status.f_frsize

    def reserve(self, segment: str, num_bytes: int) -> None:
        """Check for room and create the segment. Its pages are committed by the writer's `map`, so
        that reserving a large one does not hold up the daemon's other clients."""
        _check_room(num_bytes)
        shared = posix_ipc.SharedMemory(segment, posix_ipc.O_CREX, mode=READ_WRITE, size=0)
        try:
            os.ftruncate(shared.fd, num_bytes)
        except OSError as error:
            posix_ipc.unlink_shared_memory(segment)
            raise _no_room(num_bytes, error.strerror or str(error)) from error
        finally:
            shared.close_fd()

    def seal(self, segment: str) -> None:
        """Take write permission from the name."""
        (SHM_ROOT / segment.lstrip("/")).chmod(READ_ONLY)

    def free(self, segment: str) -> None:
        """Unlink the name; a name that is already gone is fine."""
        try:
            posix_ipc.unlink_shared_memory(segment)
        except posix_ipc.ExistentialError:
            return

    def sweep(self, prefix: str) -> list[str]:
        """Unlink every name with our prefix."""
        stale = sorted(f"/{path.name}" for path in SHM_ROOT.glob(f"{prefix.lstrip('/')}*"))
        for segment in stale:
            self.free(segment)
        return stale

    def map(self, handle: Handle, *, writable: bool) -> HostMapping:
        """See `Backend.map`."""
        try:
            shared = posix_ipc.SharedMemory(handle.segment, read_only=not writable)
        except posix_ipc.ExistentialError as error:
            raise StaleGeneration(f"the segment {handle.segment} is gone") from error
        except posix_ipc.PermissionsError as error:
            raise NotWriter(f"the segment {handle.segment} is sealed, or not ours") from error
        try:
            if os.fstat(shared.fd).st_size != handle.num_bytes:
                raise StaleGeneration(f"the segment {handle.segment} has another size")
            if writable:
                _commit(shared.fd, handle.num_bytes)
            protection = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
            mapped = mmap.mmap(shared.fd, handle.num_bytes, mmap.MAP_SHARED, protection)
        finally:
            shared.close_fd()
        return HostMapping(mapped)


def _commit(fd: int, num_bytes: int) -> None:
    try:
        os.posix_fallocate(fd, 0, num_bytes)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.ENOMEM):
            raise _no_room(num_bytes, error.strerror or str(error)) from error
        raise


def _check_room(num_bytes: int) -> None:
    status = os.statvfs(SHM_ROOT)
    if num_bytes > status.f_bavail * status.f_frsize:
        raise _no_room(num_bytes, "it is too small")
    available = _available_memory()
    if num_bytes > available:
        raise OutOfDeviceMemory(
            f"{_size(num_bytes)} of shared memory are needed, but the machine has only "
            f"{_size(available)} of memory left: stop something, or serve a smaller model."
        )


def _no_room(num_bytes: int, reason: str) -> OutOfDeviceMemory:
    status = os.statvfs(SHM_ROOT)
    total = status.f_blocks * status.f_frsize
    free = status.f_bavail * status.f_frsize
    wanted = -(-(total - free + num_bytes) // (1 << 20))
    return OutOfDeviceMemory(
        f"{_size(num_bytes)} of shared memory are needed, but /dev/shm can't give them ({reason}): "
        f"it holds {_size(total)}, of which {_size(free)} are free. Enlarge it with `mount -o "
        f"remount,size={wanted}M /dev/shm`, or in Docker with `--shm-size {wanted}m`."
    )


def _available_memory() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 1 << 62


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.1f} MB"
