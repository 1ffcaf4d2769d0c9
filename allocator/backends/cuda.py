"""NVIDIA GPUs: memory that the daemon makes, exports as file descriptors, and clients map.

Owns the driver's handles of segments and of extents of pools. Invariants: the daemon's side makes
no CUDA context (which would take hundreds of megabytes of the device), so it can only make, export
and release memory, never touch it; each leased extent is an allocation of its own, so that pools
take memory only as it is leased. What a client maps is in `cuda_memory`.

Memory lives as long as a handle, a descriptor or a mapping of it, in whatever process. So what is
freed is back only when the last client has unmapped it; a daemon that is killed leaves nothing but
what its clients map; and its successor can't adopt that, since nobody is left to export it.
Descriptors have no access mode: that readers map read-only is up to the client's library, and the
boundary is the user.
"""

import logging
import os
from collections.abc import Collection
from typing import TYPE_CHECKING, Any, Final

from allocator.backends.cuda_driver import (
    DriverError,
    allocation_properties,
    call,
    descriptor_type,
    find,
    load,
)
from allocator.backends.nvml import device_usage
from allocator.backends.room import Room, size
from allocator.errors import InvalidMessage, InvalidSetting, OutOfDeviceMemory, StaleGeneration
from allocator.messages import Extent, Handle

if TYPE_CHECKING:
    from allocator.backends.cuda_memory import CUDAMapping, CUDAPoolWindow

log = logging.getLogger("onecopy.allocator")

_NO_ROOM: Final = "CUDA_ERROR_OUT_OF_MEMORY"
_HEADROOM_PART: Final = 10
_LEAST_HEADROOM_BYTES: Final = 2 << 30
"""For two instances: a context takes some 500 MB, what torch computes with as much again."""


class CUDABackend:
    """One GPU behind the one backend interface."""

    name = "cuda"
    placement = ""
    exports = True

    def __init__(self, device: str, placement: str = ""):
        """`device` is "cuda:N" or "cuda:GPU-<UUID>". Raises InvalidSetting where this process
        can't see such a device or share its memory."""
        if placement:
            raise InvalidSetting(
                f"the device {device} knows no placement: {placement!r} is for the device host"
            )
        self._device = find(device)
        self.device = self._device.name
        self.granularity = self._device.granularity
        self._segments: dict[str, tuple[int, Any]] = {}  # number of bytes, handle
        self._pools: dict[str, dict[Extent, Any]] = {}

    # --- the daemon's side

    def limit_bytes(self) -> int:
        """The device's memory. How much of it is free only a context could tell; what is not there
        shows when it is asked for."""
        return self._device.total_bytes

    def default_limit_bytes(self, clients: Collection[int]) -> int:
        """A tenth of the device, 2 GiB at least, stays free for those that compute: torch and the
        driver take memory as they go (contexts, kernels, workspaces) and can't ask others to give
        some back. So does what other programs have now, as far as the driver tells."""
        total = self._device.total_bytes
        headroom = min(max(total // _HEADROOM_PART, _LEAST_HEADROOM_BYTES), total // 2)
        left = max(0, total - headroom - self._others_bytes(clients))
        return max(1, left // self.granularity) * self.granularity

    def room(self) -> Room | None:
        """None: only a context could tell."""
        return None

    def reserve(self, segment: str, num_bytes: int, *, outstanding_bytes: int = 0) -> None:
        """All of the memory at once, in whole units of the granularity."""
        if segment in self._segments or segment in self._pools:
            raise InvalidMessage(f"there is a segment {segment} already")
        rounded = self._rounded(num_bytes)
        self._segments[segment] = rounded, self._create(rounded, outstanding_bytes)

    def seal(self, segment: str) -> None:
        """Nothing changes in the device: readers ask for read-only access themselves."""
        self._handle(segment)

    def free(self, segment: str) -> None:
        """Release the handles; a name that is already gone is fine."""
        if segment in self._segments:
            _, handle = self._segments.pop(segment)
            call(load().cuMemRelease, handle)
        for extent in list(self._pools.get(segment, ())):
            self.free_extent(segment, extent)
        self._pools.pop(segment, None)

    def committed_bytes(self, segment: str) -> int:
        """Of a segment that is gone, 0."""
        if segment in self._segments:
            return self._segments[segment][0]
        return sum(extent.num_bytes for extent in self._pools.get(segment, ()))

    def identity(self, segment: str) -> str:
        """Always "": device memory can't be exported by another daemon than the one that made it,
        so none can adopt it."""
        return ""

    def sweep(self, prefix: str, keep: frozenset[str] = frozenset()) -> list[str]:
        """Nothing has a name that could be left behind."""
        return []

    def reserve_pool(self, pool: str, num_bytes: int) -> None:
        """Only the name: its extents are the memory."""
        if pool in self._segments or pool in self._pools:
            raise InvalidMessage(f"there is a segment {pool} already")
        self._pools[pool] = {}

    def hold_pool(self, pool: str) -> None:
        """Raises StaleGeneration where it is gone."""
        self._extents(pool)

    def reserve_extent(self, pool: str, extent: Extent) -> None:
        """One allocation. Raises OutOfDeviceMemory."""
        extents = self._extents(pool)
        if extent in extents:
            raise InvalidMessage(f"the extent at {extent.offset} of {pool} is reserved already")
        if extent.num_bytes < 1 or (extent.offset | extent.num_bytes) % self.granularity:
            raise InvalidMessage(
                f"the extent of {extent.num_bytes} bytes at {extent.offset} is not whole pages of "
                f"{self.granularity}"
            )
        extents[extent] = self._create(extent.num_bytes, 0)

    def free_extent(self, pool: str, extent: Extent) -> None:
        """Release it: whoever still maps it keeps the memory until it unmaps. One that is gone is
        fine."""
        handle = self._pools.get(pool, {}).pop(extent, None)
        if handle is not None:
            call(load().cuMemRelease, handle)

    def export(self, segment: str, extent: Extent | None = None) -> int:
        """See `Backend.export`. Raises StaleGeneration where there is no such memory."""
        driver = load()
        handle = self._handle(segment, extent)
        descriptor = int(
            call(driver.cuMemExportToShareableHandle, handle, descriptor_type(driver), 0)
        )
        os.set_inheritable(descriptor, False)
        return descriptor

    # --- the client's side

    def map(
        self, handle: Handle, *, writable: bool, commit: bool = True, descriptor: int | None = None
    ) -> "CUDAMapping":
        """See `Backend.map`. NotWriter is never raised: see the module's words on access modes."""
        if handle.num_bytes < 1:
            raise InvalidMessage(f"the segment {handle.segment} holds nothing to map")
        if descriptor is None:
            raise InvalidMessage(f"to map {handle.segment} takes its descriptor")
        # Only clients need it, and with it numpy.
        from allocator.backends.cuda_memory import CUDAMapping, DeviceRange

        mapped = DeviceRange(self._device, self._rounded(handle.num_bytes))
        mapped.map(0, mapped.num_bytes, descriptor, writable=writable)
        return CUDAMapping(mapped, handle.num_bytes, writable=writable)

    def kernel_object(self, handle: Handle) -> str:
        """See `Backend.kernel_object`: a device's memory is not among them."""
        return ""

    def open_pool(self, handle: Handle) -> "CUDAPoolWindow":
        """See `Backend.open_pool`; but only the daemon knows whether the pool is gone, and says so
        when an extent is exported."""
        if handle.num_bytes < 1:
            raise InvalidMessage(f"the pool {handle.segment} holds nothing to map")
        from allocator.backends.cuda_memory import CUDAPoolWindow, DeviceRange

        reserved = DeviceRange(self._device, self._rounded(handle.num_bytes))
        return CUDAPoolWindow(reserved, handle.num_bytes)

    # --- both

    def _others_bytes(self, clients: Collection[int]) -> int:
        try:
            processes = device_usage(self.device).processes
        except InvalidSetting as error:
            log.info("what others have of %s is not known: %s", self.device, error)
            return 0
        return sum(size or 0 for pid, size in processes.items() if pid not in clients)

    def _rounded(self, num_bytes: int) -> int:
        return -(-num_bytes // self.granularity) * self.granularity

    def _create(self, num_bytes: int, outstanding_bytes: int) -> Any:
        if num_bytes + outstanding_bytes > self.limit_bytes():
            raise self._no_room(num_bytes)
        driver = load()
        properties = allocation_properties(driver, self._device.ordinal)
        try:
            return call(driver.cuMemCreate, num_bytes, properties, 0)
        except DriverError as error:
            if error.result != _NO_ROOM:
                raise
            raise self._no_room(num_bytes) from error

    def _no_room(self, num_bytes: int) -> OutOfDeviceMemory:
        own = sum(map(self.committed_bytes, [*self._segments, *self._pools]))
        return OutOfDeviceMemory(
            f"{size(num_bytes)} of device memory are needed, but {self.device} "
            f"({self._device.model}) can't give them: it holds {size(self.limit_bytes())} in all, "
            f"of which {size(own)} are this allocator's. Stop what else runs on that GPU "
            "(`nvidia-smi` lists it), or instances that still map weights that were freed; let "
            "idle weight sets sleep; or serve a smaller model."
        )

    def _extents(self, pool: str) -> dict[Extent, Any]:
        if pool not in self._pools:
            raise StaleGeneration(f"the pool {pool} is gone")
        return self._pools[pool]

    def _handle(self, segment: str, extent: Extent | None = None) -> Any:
        if extent is not None:
            extents = self._extents(segment)
            if extent not in extents:
                raise StaleGeneration(f"the extent at {extent.offset} of {segment} is gone")
            return extents[extent]
        if segment not in self._segments:
            raise StaleGeneration(f"the segment {segment} is gone")
        return self._segments[segment][1]
