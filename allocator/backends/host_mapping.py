"""Shared memory in a client's address space: one segment, or the extents of a pool.

Owns the mappings and the descriptors that commit them. Invariants: what is writable through an
address was committed before; what is read-only was mapped on a descriptor that was opened
read-only; giving up never fails.
"""

import errno
import logging
import mmap
import os
from collections.abc import Callable
from io import FileIO

from allocator.backends.address_space import AddressRange, address_of, populate, punch_hole
from allocator.backends.capacity import CommitWatch, no_shared_memory
from allocator.backends.numa import Placement, huge_page_bytes
from allocator.backends.room import size
from allocator.errors import (
    DeviceError,
    InvalidMessage,
    OutOfDeviceMemory,
    SharedMemoryFull,
)
from allocator.messages import Extent

log = logging.getLogger("onecopy.allocator")

OnShortage = Callable[[SharedMemoryFull], None]
"""Returns where it makes sense to try again, raises where not."""

_NO_ROOM = (errno.ENOSPC, errno.ENOMEM, errno.EFBIG)
_commits = CommitWatch()


class HostMapping:
    """One mmap of a segment. Views keep it alive; `close` only drops our reference."""

    def __init__(self, descriptor: int, num_bytes: int, placement: Placement | None = None):
        """`descriptor` stays the caller's. Writable where there is a `placement`, and then nothing
        is committed yet."""
        protection = mmap.PROT_READ | (mmap.PROT_WRITE if placement is not None else 0)
        try:
            mapped = mmap.mmap(descriptor, num_bytes, mmap.MAP_SHARED, protection)
        except OSError as error:
            raise _no_addresses(num_bytes, error) from error
        self._file: FileIO | None = None
        self._huge_address: int | None = None
        if placement is not None:
            placement.apply(address_of(mapped), num_bytes)
            if placement.uses_huge_pages:
                self._huge_address = address_of(mapped)
            self._file = FileIO(os.dup(descriptor), "r+")
        self._mapped: mmap.mmap | None = mapped
        self._buffer: memoryview | None = memoryview(mapped)
        self._num_bytes = num_bytes
        self.on_shortage: OnShortage | None = None

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

    def commit(self, offset: int, num_bytes: int) -> None:
        """See `Mapping.commit`."""
        file = self._writable(offset, num_bytes)
        if num_bytes:
            self._with_room(lambda: self._commit(file, offset, num_bytes))

    def complete(self) -> None:
        """See `Mapping.complete`."""
        file = self._writable(0, self._num_bytes)
        if os.fstat(file.fileno()).st_blocks * 512 < self._num_bytes:
            self._with_room(lambda: _commit(file.fileno(), 0, self._num_bytes))

    def write(self, offset: int, data: bytes | memoryview) -> None:
        """See `Mapping.write`. By pwrite, which takes no page faults and commits without zeroing
        first."""
        view = memoryview(data)
        file = self._writable(offset, view.nbytes)
        if view.nbytes:
            self._with_room(lambda: self._write(file, offset, view.cast("B")))

    def read(self, offset: int, out: memoryview) -> None:
        """See `Mapping.read`."""
        self._check(offset, out.nbytes)
        if out.nbytes:
            out.cast("B")[:] = self.buffer[offset : offset + out.nbytes]

    def will_need(self) -> None:
        """Let the kernel start to read what is not in memory yet."""
        if self._mapped is not None:
            self._mapped.madvise(mmap.MADV_WILLNEED)

    def close(self) -> None:
        """Idempotent. With no view left the kernel unmaps at once."""
        if self._file is not None:
            self._file.close()
        self._buffer = None
        self._mapped = None

    def _writable(self, offset: int, num_bytes: int) -> FileIO:
        self._check(offset, num_bytes)
        if self._file is None:
            raise TypeError("the mapping is read-only")
        return self._file

    def _check(self, offset: int, num_bytes: int) -> None:
        if self._buffer is None:
            raise ValueError("the mapping is closed")
        if offset < 0 or num_bytes < 0 or num_bytes > self._num_bytes - offset:
            raise ValueError(f"{num_bytes} bytes at {offset} lie outside the segment")

    def _with_room(self, attempt: Callable[[], None]) -> None:
        """Again, as long as there is somebody to ask for room who made some."""
        while True:
            try:
                return attempt()
            except SharedMemoryFull as error:
                if self.on_shortage is None:
                    raise
                self.on_shortage(error)

    def _commit(self, file: FileIO, offset: int, num_bytes: int) -> None:
        _commits.about_to(num_bytes)
        self._use_huge_pages(offset, num_bytes)
        _commit(file.fileno(), offset, num_bytes)

    def _write(self, file: FileIO, offset: int, view: memoryview) -> None:
        _commits.about_to(len(view))
        self._use_huge_pages(offset, len(view))
        done = 0
        while done < len(view):
            try:
                done += os.pwrite(file.fileno(), view[done:], offset + done)
            except OSError as error:
                if error.errno in _NO_ROOM:
                    reason = error.strerror or str(error)
                    raise no_shared_memory(len(view) - done, reason) from error
                raise

    def _use_huge_pages(self, offset: int, num_bytes: int) -> None:
        # Only faults bring them; one in the midst of a huge page brings all of it.
        if self._huge_address is not None:
            start = offset - offset % mmap.PAGESIZE
            populate(self._huge_address + start, offset + num_bytes - start)


class HostPoolWindow:
    """One range of addresses; extents of the pool come and go in it, at their offsets."""

    def __init__(self, readable: int, writable: int, num_bytes: int, placement: Placement):
        """Two descriptors of the pool, opened so; they stay the caller's."""
        self._placement = placement
        # Huge pages need addresses that are as aligned as the offsets are.
        alignment = huge_page_bytes() if placement.uses_huge_pages else mmap.PAGESIZE
        self._range: AddressRange | None = _reserved(num_bytes, alignment)
        self._left: list[tuple[int, int]] = []
        """Offsets and sizes of what nobody has any more, and the kernel could not unmap yet."""
        self._num_bytes = num_bytes
        self._readable = FileIO(os.dup(readable), "r")
        self._writable = FileIO(os.dup(writable), "r+")

    @property
    def num_bytes(self) -> int:
        """The pool's size."""
        return self._num_bytes

    @property
    def buffer(self) -> memoryview:
        """The whole window."""
        return self._addresses().buffer

    def map(self, extent: Extent, *, writable: bool, descriptor: int | None = None) -> None:
        """See `PoolWindow.map`. Where it fails the extent is not accessible."""
        addresses, offset, num_bytes = self._addresses(), *self._within(extent)
        if not writable:
            _mapped(addresses, self._readable, offset, num_bytes, writable=False)
            self._taken(offset, num_bytes)
            return
        _commits.about_to(num_bytes)
        _mapped(addresses, self._writable, offset, num_bytes, writable=True)
        self._taken(offset, num_bytes)
        try:
            self._placement.apply(addresses.address + offset, num_bytes)
            if self._placement.uses_huge_pages:
                populate(addresses.address + offset, num_bytes)
            _commit(self._writable.fileno(), offset, num_bytes)
        except BaseException:
            self._unmap(addresses, offset, num_bytes)
            raise

    def settle(self) -> None:
        """It always is."""

    def unmap(self, extent: Extent, *, discard: bool = False) -> None:
        """See `PoolWindow.unmap`. Where the kernel can't, for a mapping that is split takes one
        more and there are as many as it allows, the extent stays mapped, though nobody has it, and
        is unmapped with a later one."""
        addresses, offset, num_bytes = self._addresses(), *self._within(extent)
        if discard:
            try:
                punch_hole(self._writable.fileno(), offset, num_bytes)
            except OSError as error:  # the allocator does it again when it frees the extent
                log.warning("%s of the pool were not discarded: %s", size(num_bytes), error)
        self._unmap(addresses, offset, num_bytes)

    def close(self) -> None:
        """Idempotent. A view that is left keeps the addresses, without access."""
        if self._range is not None:
            self._left.clear()
            self._unmap(self._range, 0, self._num_bytes)
        self._range = None
        self._readable.close()
        self._writable.close()

    def _taken(self, offset: int, num_bytes: int) -> None:
        """What was left there has made room, and must not take this away later."""
        end = offset + num_bytes
        self._left = [one for one in self._left if one[0] >= end or sum(one) <= offset]

    def _unmap(self, addresses: AddressRange, offset: int, num_bytes: int) -> None:
        """And what was left before, as far as it goes."""
        self._left.append((offset, num_bytes))
        while self._left:
            try:
                addresses.unmap(*self._left[-1])
            except OSError as error:
                if self._left[-1] == (offset, num_bytes):
                    log.warning("an extent of the pool stays mapped for now: %s", error)
                return
            self._left.pop()

    def _addresses(self) -> AddressRange:
        if self._range is None:
            raise ValueError("the window is closed")
        return self._range

    def _within(self, extent: Extent) -> tuple[int, int]:
        offset, num_bytes = extent.offset, extent.num_bytes
        if offset % mmap.PAGESIZE or num_bytes % mmap.PAGESIZE:
            raise InvalidMessage(f"the extent of {num_bytes} bytes at {offset} is not whole pages")
        if offset < 0 or num_bytes < 1 or num_bytes > self._num_bytes - offset:
            raise InvalidMessage(f"the extent of {num_bytes} bytes at {offset} is not in the pool")
        return offset, num_bytes


def _reserved(num_bytes: int, alignment: int) -> AddressRange:
    try:
        return AddressRange(num_bytes, alignment)
    except OSError as error:
        raise _no_addresses(num_bytes, error) from error


def _no_addresses(num_bytes: int, error: OSError) -> Exception:
    if error.errno != errno.ENOMEM:
        return DeviceError(f"{size(num_bytes)} can't be mapped: {error.strerror}")
    return OutOfDeviceMemory(
        f"this process has no addresses for {size(num_bytes)} of shared memory: raise what it may "
        "have with `ulimit -v unlimited`, under systemd `LimitAS=infinity`"
    )


def _mapped(
    addresses: AddressRange, file: FileIO, offset: int, num_bytes: int, *, writable: bool
) -> None:
    try:
        addresses.map(file.fileno(), offset, num_bytes, writable=writable)
    except OSError as error:
        if error.errno == errno.ENOMEM:
            raise OutOfDeviceMemory(
                "this process can't map a further extent: it has as many mappings as the kernel "
                "allows. Raise it with `sysctl vm.max_map_count=262144`, or lease larger extents."
            ) from error
        raise


def _commit(descriptor: int, offset: int, num_bytes: int) -> None:
    try:
        os.posix_fallocate(descriptor, offset, num_bytes)
    except OSError as error:
        if error.errno in _NO_ROOM:
            raise no_shared_memory(num_bytes, error.strerror or str(error)) from error
        raise
