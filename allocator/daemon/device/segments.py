"""The segments that one device and its host tier hold: made under names of ours, freed again.

Owns their names, and the pool's one segment. Invariants: a name that another user's file has taken
is passed over; the pool's memory can be taken back whatever becomes scarce later; where that
failed, the last holder's bytes are known to be still there. Who holds them is counted elsewhere.
"""

import logging
from collections.abc import Callable, Iterator
from typing import Final

from allocator.backends import Backend
from allocator.errors import DeviceError, NameTaken
from allocator.messages import Extent, Handle

log = logging.getLogger("onecopy.allocator")

_POOL_SUFFIX: Final = "-pool"
"""Tells the pool's segment from those of weights where the kernel shows its name."""
_NAMES_TRIED: Final = 64


class Segments:
    """Of one device, and of what sleeps beside it in host memory."""

    def __init__(self, backend: Backend, host_tier: Backend, names: Iterator[str]) -> None:
        """`names` never repeat."""
        self.backend = backend
        self.host_tier = host_tier
        self._names = names

    def made(
        self,
        backend: Backend,
        num_bytes: int,
        reserve: Callable[[Handle], None],
        *,
        generation: int = 0,
        suffix: str = "",
    ) -> Handle:
        """A segment that `reserve` has made. Other users of the machine may make files where ours
        should be; a name that is taken is passed over. Raises as `reserve` does."""
        for _ in range(_NAMES_TRIED):
            handle = Handle(
                backend=backend.name,
                device=backend.device,
                segment=next(self._names) + suffix,
                num_bytes=num_bytes,
                generation=generation,
                placement=backend.placement,
            )
            try:
                reserve(handle)
            except NameTaken as error:
                log.warning("%s", error)
            else:
                return handle
        raise DeviceError("the names of our segments are all taken by files of other users")

    def free(self, handle: Handle) -> None:
        """Give it back. Files are nobody's to free."""
        if handle.backend == self.backend.name:
            self.backend.free(handle.segment)
        elif handle.backend == self.host_tier.name:
            self.host_tier.free(handle.segment)

    def identity(self, handle: Handle) -> str:
        """Which segment that is, as the next daemon will ask again."""
        if handle.backend == "file":
            return handle.identity
        backend = self.backend if handle.backend == self.backend.name else self.host_tier
        return backend.identity(handle.segment)

    @property
    def shares_host_memory(self) -> bool:
        """Whether the device's memory is the host's own."""
        return self.backend.name == self.host_tier.name


class PoolSegment:
    """The memory of one device's pool. `handle` is there once somebody has leased from it."""

    def __init__(self, segments: Segments, handle: Handle | None) -> None:
        """`handle` is that of a pool that was adopted. Raises DeviceError."""
        self._segments = segments
        self._backend = segments.backend
        self.handle = handle
        self._unclean: dict[int, Extent] = {}
        """By offset: free, but their memory could not be taken back yet."""
        if handle is not None:
            self._backend.hold_pool(handle.segment)

    def make(self, num_bytes: int) -> Handle:
        """Raises OutOfDeviceMemory, DeviceError."""

        def reserve(handle: Handle) -> None:
            self._backend.reserve_pool(handle.segment, num_bytes)
            try:
                self._backend.hold_pool(handle.segment)
            except DeviceError:
                self._backend.free(handle.segment)
                raise

        self.handle = self._segments.made(self._backend, num_bytes, reserve, suffix=_POOL_SUFFIX)
        return self.handle

    def clean(self, handle: Handle, extent: Extent) -> None:
        """What was left in it by its last holder goes. Raises DeviceError."""
        end = extent.offset + extent.num_bytes
        for offset, left in list(self._unclean.items()):
            if offset < end and extent.offset < offset + left.num_bytes:
                self._backend.free_extent(handle.segment, left)
                del self._unclean[offset]

    def free(self, extent: Extent) -> None:
        """Take its memory back. Where that fails it is tried again before anybody leases it."""
        if self.handle is None:
            return
        try:
            self._backend.free_extent(self.handle.segment, extent)
        except DeviceError as error:
            log.warning("%s", error)
            self._unclean[extent.offset] = extent

    def close(self) -> None:
        """Give the segment back."""
        if self.handle is not None:
            self._backend.free(self.handle.segment)
