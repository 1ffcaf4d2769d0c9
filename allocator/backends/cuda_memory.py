"""Device memory in a client's address space: one segment, or the extents of a pool.

Owns device addresses. Invariants: what is mapped is unmapped only when the device has done all that
it was told before, and addresses go back to the driver only when no view of them is left; a
descriptor is the caller's, and the driver's handle made of it is released as soon as it is mapped,
so that the mapping alone keeps the memory.

Read-only is what this process's own mapping says (cuMemSetAccess): a kernel that writes there ends
this process's context with CUDA_ERROR_ILLEGAL_ADDRESS, which nothing but a new process mends, and
harms nobody else. The descriptor itself carries no access mode.
"""

import bisect
import logging
import os
import weakref
from collections.abc import Callable
from typing import Final

from allocator.backends import dlpack
from allocator.backends.cuda_copies import Copier, erase
from allocator.backends.cuda_driver import (
    CUDADevice,
    DriverError,
    call,
    current,
    descriptor_type,
    load,
    location,
)
from allocator.errors import (
    InvalidMessage,
    OutOfDeviceMemory,
    SharedMemoryFull,
    StaleGeneration,
)
from allocator.messages import Extent

log = logging.getLogger("onecopy.allocator")

_ENDED: Final = "CUDA_ERROR_DEINITIALIZED"
"""The driver has ended before us, at the process's end, and has taken all back."""


class DeviceRange:
    """Reserved device addresses and what is mapped in them, until the last view is gone."""

    def __init__(self, device: CUDADevice, num_bytes: int):
        """`num_bytes` in whole units of the device's granularity. Raises OutOfDeviceMemory."""
        self.device = device
        self.num_bytes = num_bytes
        self._mapped: dict[int, int] = {}  # offset → number of bytes
        self._offsets: list[int] = []  # the same offsets, in order
        with current(device.ordinal) as driver:
            try:
                reserved = call(driver.cuMemAddressReserve, num_bytes, device.granularity, 0, 0)
            except DriverError as error:
                raise OutOfDeviceMemory(
                    f"this process can't reserve {num_bytes} bytes of device addresses: {error}"
                ) from error
        self.address = int(reserved)
        # Not at exit: tensors may still be in use then, and the process's end frees all anyway.
        weakref.finalize(
            self, _give_back, os.getpid(), device.ordinal, self.address, num_bytes, self._mapped
        ).atexit = False

    def map(self, offset: int, num_bytes: int, descriptor: int, *, writable: bool) -> None:
        """Raises OutOfDeviceMemory, or StaleGeneration where the descriptor is not that of
        `num_bytes` of this device's memory; then nothing is mapped there."""
        start = self.address + offset
        with current(self.device.ordinal) as driver:
            try:
                imported = call(
                    driver.cuMemImportFromShareableHandle, descriptor, descriptor_type(driver)
                )
                try:
                    call(driver.cuMemMap, start, num_bytes, 0, imported, 0)
                finally:
                    call(driver.cuMemRelease, imported)
                self._mapped[offset] = num_bytes
                bisect.insort(self._offsets, offset)
                self._set_access(offset, writable=writable)
            except DriverError as error:
                if offset in self._mapped:
                    self.unmap(offset)
                raise _explained(error, num_bytes, self.device) from error

    def set_access(self, offset: int, *, writable: bool) -> None:
        """Of what is mapped there, once the device has done what it was told before."""
        with current(self.device.ordinal) as driver:
            call(driver.cuCtxSynchronize)
            self._set_access(offset, writable=writable)

    def unmap(self, offset: int) -> None:
        """Make it inaccessible. Its memory goes when no process maps it and the allocator has freed
        it."""
        with current(self.device.ordinal) as driver:
            call(driver.cuCtxSynchronize)
            call(driver.cuMemUnmap, self.address + offset, self._mapped[offset])
        del self._mapped[offset]
        self._offsets.remove(offset)

    def overlapping(self, offset: int, num_bytes: int) -> list[Extent]:
        """What is mapped that has bytes in [offset, offset + num_bytes)."""
        first = bisect.bisect_right(self._offsets, offset)
        if first and self._offsets[first - 1] + self._mapped[self._offsets[first - 1]] > offset:
            first -= 1
        end = bisect.bisect_left(self._offsets, offset + num_bytes)
        found = self._offsets[first:end]
        return [Extent(offset=start, num_bytes=self._mapped[start]) for start in found]

    def _set_access(self, offset: int, *, writable: bool) -> None:
        driver = load()
        flags = driver.CUmemAccess_flags
        wanted = driver.CUmemAccessDesc()
        wanted.location = location(driver, self.device.ordinal)
        wanted.flags = (
            flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE
            if writable
            else flags.CU_MEM_ACCESS_FLAGS_PROT_READ
        )
        call(driver.cuMemSetAccess, self.address + offset, self._mapped[offset], [wanted], 1)


class _DeviceView:
    """What mappings and windows share: addresses that a tensor can be made over."""

    _CLOSED = "the mapping is closed"

    def __init__(self, device_range: DeviceRange, num_bytes: int):
        self._range: DeviceRange | None = device_range
        self._num_bytes = num_bytes

    @property
    def buffer(self) -> memoryview:
        """Always TypeError."""
        raise TypeError("the processor can't address this memory: use read, write or tensors")

    @property
    def num_bytes(self) -> int:
        """The segment's or the pool's size."""
        return self._num_bytes

    @property
    def address(self) -> int:
        """The device address of offset 0."""
        return self._opened().address

    def __dlpack__(self, **_options: object) -> object:
        """For `torch.from_dlpack`: all of it as uint8. The tensor keeps the addresses."""
        opened = self._opened()
        return dlpack.capsule(opened.address, self._num_bytes, self.__dlpack_device__(), opened)

    def __dlpack_device__(self) -> tuple[int, int]:
        """(CUDA, this process's ordinal of the device)."""
        return dlpack.CUDA, self._opened().device.ordinal

    def _opened(self) -> DeviceRange:
        if self._range is None:
            raise ValueError(self._CLOSED)
        return self._range


class CUDAMapping(_DeviceView):
    """One segment of device memory."""

    def __init__(self, device_range: DeviceRange, num_bytes: int, *, writable: bool):
        """All of `device_range` is mapped already."""
        super().__init__(device_range, num_bytes)
        self._is_writable = writable
        self.on_shortage: Callable[[SharedMemoryFull], None] | None = None
        self._copier = Copier(device_range.device.ordinal)

    def commit(self, offset: int, num_bytes: int) -> None:
        """Device memory is committed from the start."""
        self._check(offset, num_bytes, write=True)

    def complete(self) -> None:
        """Nothing is missing."""

    def write(self, offset: int, data: bytes | memoryview) -> None:
        """See `Mapping.write`. Ended when it returns."""
        view = memoryview(data)
        opened = self._check(offset, view.nbytes, write=True)
        if view.nbytes:
            self._copier.to_device(opened.address + offset, view.cast("B"))

    def read(self, offset: int, out: memoryview) -> None:
        """See `Mapping.read`. Waits for what the device was told before."""
        opened = self._check(offset, out.nbytes)
        if out.nbytes:
            self._copier.to_host(opened.address + offset, out.cast("B"))

    def close(self) -> None:
        """Idempotent. What was written is there for other processes once this returns, even where
        views are left."""
        if self._range is None:
            return
        opened, self._range = self._range, None
        if self._is_writable:
            with current(opened.device.ordinal) as driver:
                call(driver.cuCtxSynchronize)
        self._copier.close()

    def _check(self, offset: int, num_bytes: int, *, write: bool = False) -> DeviceRange:
        opened = self._opened()
        if offset < 0 or num_bytes < 0 or num_bytes > self._num_bytes - offset:
            raise ValueError(f"{num_bytes} bytes at {offset} lie outside the segment")
        if write and not self._is_writable:
            raise TypeError("the mapping is read-only")
        return opened


class CUDAPoolWindow(_DeviceView):
    """One range of device addresses as large as the pool, so that kernels have one base address;
    extents of the pool come and go in it, at their offsets."""

    _CLOSED = "the window is closed"

    def map(self, extent: Extent, *, writable: bool, descriptor: int | None = None) -> None:
        """See `PoolWindow.map`. With a descriptor its memory takes the place of what was mapped
        there, for that may belong to an earlier lease; without one only the access changes. What
        was not mapped before and becomes writable is a new lease, and zeroed: the driver does not
        say what new memory holds."""
        opened = self._within(extent)
        there = opened.overlapping(extent.offset, extent.num_bytes)
        if descriptor is None:
            if there != [extent]:
                raise InvalidMessage(f"to map the extent at {extent.offset} takes its descriptor")
            opened.set_access(extent.offset, writable=writable)
            return
        for stale in there:
            opened.unmap(stale.offset)
        opened.map(extent.offset, extent.num_bytes, descriptor, writable=writable)
        if writable and there != [extent]:
            erase(opened.device.ordinal, opened.address + extent.offset, extent.num_bytes)

    def settle(self) -> None:
        """See `PoolWindow.settle`."""
        with current(self._opened().device.ordinal) as driver:
            call(driver.cuCtxSynchronize)

    def unmap(self, extent: Extent, *, discard: bool = False) -> None:
        """See `PoolWindow.unmap`. `discard` asks for nothing more: an extent's memory goes when the
        allocator has freed it and nobody maps it."""
        opened = self._within(extent)
        for there in opened.overlapping(extent.offset, extent.num_bytes):
            opened.unmap(there.offset)

    def close(self) -> None:
        """Idempotent. A view that is left keeps the addresses, without memory. Where a fault has
        spoilt the context nothing can be unmapped, and the process's end does it."""
        if self._range is None:
            return
        opened, self._range = self._range, None
        try:
            for there in opened.overlapping(0, opened.num_bytes):
                opened.unmap(there.offset)
        except DriverError as error:
            log.warning("what is mapped of the pool stays so until this process ends: %s", error)

    def _within(self, extent: Extent) -> DeviceRange:
        opened, offset, num_bytes = self._opened(), extent.offset, extent.num_bytes
        unit = opened.device.granularity
        if offset % unit or num_bytes % unit:
            raise InvalidMessage(
                f"the extent of {num_bytes} bytes at {offset} is not whole pages of {unit}"
            )
        if offset < 0 or num_bytes < 1 or num_bytes > self._num_bytes - offset:
            raise InvalidMessage(f"the extent of {num_bytes} bytes at {offset} is not in the pool")
        return opened


def _explained(error: DriverError, num_bytes: int, device: CUDADevice) -> Exception:
    if error.result == "CUDA_ERROR_OUT_OF_MEMORY":
        return OutOfDeviceMemory(f"{device.name} has no room to map {num_bytes} bytes: {error}")
    if error.result in ("CUDA_ERROR_INVALID_VALUE", "CUDA_ERROR_INVALID_DEVICE"):
        return StaleGeneration(
            f"the descriptor is not that of {num_bytes} bytes of {device.name}: {error}"
        )
    return error


def _give_back(
    pid: int, ordinal: int, address: int, num_bytes: int, mapped: dict[int, int]
) -> None:
    """Not in a forked child: what it inherited is the parent's. An error can only be logged, since
    this runs wherever the last reference is dropped; after one the other steps are still made."""
    if os.getpid() != pid:
        return

    def attempt(name: str, *arguments: int) -> None:
        try:
            with current(ordinal) as driver:
                call(getattr(driver, name), *arguments)
        except DriverError as error:
            if error.result != _ENDED:
                log.warning("device addresses could not be given back: %s", error)

    attempt("cuCtxSynchronize")
    for offset, size in mapped.items():
        attempt("cuMemUnmap", address + offset, size)
    attempt("cuMemAddressFree", address, num_bytes)
