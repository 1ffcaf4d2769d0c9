"""What another process holds, mapped by its word: for processes that are parts of one.

Owns mappings without a session. Invariant: nothing is asked of the allocator, so that what is
mapped here is there only as long as whoever holds it says so. It holds it for as long as any of
these processes may touch it: they end with it, or are told before it lets go. Only memory that
handles alone map.

    session: Lease.pool, Lease.extent ─── any wire ───► PoolView.map
             WeightSetReader.sealed   ─── any wire ───► WeightSetView
"""

from collections import Counter
from typing import TYPE_CHECKING

from allocator.backends import Mapping, for_handle
from allocator.client.weights.weight_set import map_handle, read_manifest
from allocator.messages import Extent, Handle, Manifest, Sealed

if TYPE_CHECKING:
    import torch


class PoolView:
    """Extents of a pool that another process leases or pins."""

    def __init__(self, pool: Handle) -> None:
        """Raises StaleGeneration where it is gone, OutOfDeviceMemory."""
        self._window = for_handle(pool).open_pool(pool)
        self._users: Counter[int] = Counter()
        self._bytes: torch.Tensor | None = None

    def window(self) -> "torch.Tensor":
        """The whole pool, uint8 # [num_bytes of the pool], of which what is mapped can be touched:
        one tensor however often it is asked for. Imports torch."""
        if self._bytes is None:
            from allocator.client.weights.tensor import as_bytes

            self._bytes = as_bytes(self._window)
        return self._bytes

    def map(self, extent: Extent, *, writable: bool) -> None:
        """Once more; it is mapped until it was unmapped as often. Raises OutOfDeviceMemory."""
        if writable or not self._users[extent.offset]:
            self._window.map(extent, writable=writable)
        self._users[extent.offset] += 1

    def protect(self, extent: Extent) -> None:
        """Nobody here writes to it any more. Raises OutOfDeviceMemory."""
        self._window.map(extent, writable=False)

    def unmap(self, extent: Extent) -> None:
        """Once less."""
        self._users[extent.offset] -= 1
        if not self._users[extent.offset]:
            del self._users[extent.offset]
            self._window.unmap(extent)

    def close(self) -> None:
        """Nothing of it is mapped any more."""
        self._bytes = None
        self._window.close()


class WeightSetView:
    """A sealed weight set that another process reads. Tensors taken from it keep it mapped."""

    def __init__(self, sealed: Sealed) -> None:
        """Raises StaleGeneration where it is gone, InvalidMessage, OutOfDeviceMemory."""
        self._mappings: list[Mapping] = []
        try:
            for handle in (sealed.handle, *sealed.files):
                self._mappings.append(map_handle(handle))
            self.manifest: Manifest = read_manifest(self._mappings[0], sealed.manifest)
        except BaseException:
            self.close()
            raise

    def tensors(self) -> "dict[str, torch.Tensor]":
        """Name → aliased, read-only tensor. Imports torch."""
        from allocator.client.weights.tensor import tensors

        return tensors(self._mappings, self.manifest.tensors)

    def close(self) -> None:
        """Tensors that are left stay valid."""
        for mapping in self._mappings:
            mapping.close()
