"""The one interface to a device's memory, and the choice of a backend.

Invariant: code outside this folder never touches a device API. A backend's two sides never meet in
one process: the daemon reserves, seals and frees; a client maps.
"""

from typing import Protocol

from allocator.messages import Handle


class Mapping(Protocol):
    """A segment in this process's address space, until the last view of it is gone."""

    @property
    def buffer(self) -> memoryview:
        """The segment's bytes; writing to a read-only mapping's raises TypeError."""

    @property
    def num_bytes(self) -> int:
        """The segment's size."""

    def close(self) -> None:
        """Drop this reference. The address range goes when no view of it is left."""


class Backend(Protocol):
    """Reserve, export, map, free. The same contract tests run against every implementation."""

    name: str
    device: str

    def limit_bytes(self) -> int:
        """What the device could hold if nothing else used it."""

    def reserve(self, segment: str, num_bytes: int) -> None:
        """Make a segment. Raises OutOfDeviceMemory, naming the fix, and then leaves nothing."""

    def seal(self, segment: str) -> None:
        """From now on the segment can be mapped read-only."""

    def free(self, segment: str) -> None:
        """Give the segment back. Processes that map it keep their mapping until they drop it."""

    def sweep(self, prefix: str) -> list[str]:
        """Free what an earlier daemon of this prefix left behind; return the names."""

    def map(self, handle: Handle, *, writable: bool) -> Mapping:
        """Client side. Writable only for a writer before the seal. Raises StaleGeneration where the
        segment is gone, NotWriter where it is sealed, OutOfDeviceMemory where its memory can't be
        committed."""


def by_name(name: str) -> Backend:
    """The backend that a handle names. Raises ValueError for an unknown one."""
    if name == "host":
        from allocator.backends.host import HostBackend

        return HostBackend()
    raise ValueError(f"no backend is called {name!r}")
