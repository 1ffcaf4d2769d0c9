"""The contract of every backend, as tests. A device's test module derives a class from it.

Invariant: what is asserted here holds for memory that the processor can address and for memory that
it can't; what only one device promises is tested beside its own class.
"""

import contextlib
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import ClassVar

import msgspec
import pytest

from allocator import NotWriter, OutOfDeviceMemory, RuntimeDir, StaleGeneration
from allocator.backends import Backend, Mapping, PoolWindow, for_handle, open_device
from allocator.errors import InvalidMessage
from allocator.messages import Extent, Handle
from tests.allocator.backends.backend_peer import Died, Peer, peek, poke

SIZE = 3 * 4096 + 5
PATTERN = bytes(range(256)) * (SIZE // 256) + bytes(SIZE % 256)
POOL_EXTENTS = 64


@contextlib.contextmanager
def exported(backend: Backend, segment: str, extent: Extent | None = None) -> Iterator[int | None]:
    """The descriptor that a client needs, if it needs one."""
    descriptor = backend.export(segment, extent) if backend.exports else None
    try:
        yield descriptor
    finally:
        if descriptor is not None:
            os.close(descriptor)


def mapped(backend: Backend, handle: Handle, *, writable: bool, commit: bool = True) -> Mapping:
    """What a client does with a handle."""
    with exported(backend, handle.segment) as descriptor:
        client = for_handle(handle)
        return client.map(handle, writable=writable, commit=commit, descriptor=descriptor)


def shown_objects() -> set[str]:
    """device:inode of all that this process maps."""
    lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
    return {f"{fields[3]}:{fields[4]}" for fields in lines}


def map_extent(
    backend: Backend, pool: Handle, window: PoolWindow | Peer, extent: Extent, *, writable: bool
) -> None:
    """In a window of this process, or in a peer's."""
    with exported(backend, pool.segment, extent) as descriptor:
        if isinstance(window, Peer):
            place = (extent.offset, extent.num_bytes)
            window.given(descriptor).map_extent(*place, writable)
        else:
            window.map(extent, writable=writable, descriptor=descriptor)


def bytes_of(mapping: Mapping, offset: int = 0, num_bytes: int = SIZE) -> bytes:
    """Through `read`."""
    out = bytearray(num_bytes)
    mapping.read(offset, memoryview(out))
    return bytes(out)


class BackendContract:
    """Derive `TestX` with a fixture `backend`."""

    FAULT: ClassVar[type[Exception]] = Died
    """What a peer's command raises that touches memory it may not."""
    FAULT_SIGNAL: ClassVar[int] = signal.SIGSEGV

    @pytest.fixture
    def backend(self) -> Backend:
        raise NotImplementedError

    @pytest.fixture
    def prefix(self, backend: Backend, runtime_dir: RuntimeDir) -> Iterator[str]:
        yield runtime_dir.segment_prefix
        backend.sweep(runtime_dir.segment_prefix)

    @pytest.fixture
    def handle(self, backend: Backend, prefix: str) -> Iterator[Handle]:
        """A reserved segment."""
        backend.reserve(f"{prefix}1", SIZE)
        yield self.handle_of(backend, f"{prefix}1", SIZE)
        backend.free(f"{prefix}1")

    @pytest.fixture
    def sealed(self, backend: Backend, handle: Handle) -> Handle:
        """A sealed segment that holds PATTERN."""
        with contextlib.closing(mapped(backend, handle, writable=True)) as mapping:
            mapping.write(0, PATTERN)
        backend.seal(handle.segment)
        return handle

    @pytest.fixture
    def pool(self, backend: Backend, prefix: str) -> Iterator[Handle]:
        """An empty pool."""
        num_bytes = POOL_EXTENTS * backend.granularity
        backend.reserve_pool(f"{prefix}pool", num_bytes)
        yield self.handle_of(backend, f"{prefix}pool", num_bytes)
        backend.free(f"{prefix}pool")

    @pytest.fixture
    def extents(self, backend: Backend, pool: Handle) -> list[Extent]:
        """Three reserved ones; the first two are neighbours."""
        size = backend.granularity
        extents = [Extent(offset=i * size, num_bytes=size) for i in (4, 5, 9)]
        for extent in extents:
            backend.reserve_extent(pool.segment, extent)
        return extents

    @pytest.fixture
    def window(self, pool: Handle) -> Iterator[PoolWindow]:
        """Of this process."""
        with contextlib.closing(for_handle(pool).open_pool(pool)) as window:
            yield window

    @pytest.fixture
    def start_peer(self, runtime_dir: RuntimeDir) -> Iterator[Callable[[], Peer]]:
        """Start further processes, which end with the test."""
        with contextlib.ExitStack() as started:
            yield lambda: started.enter_context(Peer())

    @staticmethod
    def handle_of(backend: Backend, segment: str, num_bytes: int) -> Handle:
        return Handle(
            backend=backend.name,
            device=backend.device,
            segment=segment,
            num_bytes=num_bytes,
            generation=1,
            placement=backend.placement,
        )

    @contextlib.contextmanager
    def faults(self) -> Iterator[None]:
        """The peer's command inside ends as one that touches foreign memory."""
        with pytest.raises(self.FAULT) as raised:
            yield
        if isinstance(raised.value, Died):
            assert raised.value.signal == self.FAULT_SIGNAL

    # --- the device

    def test_it_is_found_by_its_own_name(self, backend: Backend, handle: Handle) -> None:
        for found in (open_device(backend.device, backend.placement), for_handle(handle)):
            assert (found.name, found.device) == (backend.name, backend.device)
            assert found.placement == backend.placement

    def test_extents_are_whole_pages(self, backend: Backend) -> None:
        assert backend.granularity >= 4096
        assert backend.granularity & (backend.granularity - 1) == 0

    def test_the_limit_is_a_real_one(self, backend: Backend) -> None:
        assert 1 << 20 < backend.limit_bytes() < 1 << 50

    # --- segments

    def test_what_was_written_is_read_after_the_seal(
        self, backend: Backend, sealed: Handle
    ) -> None:
        with contextlib.closing(mapped(backend, sealed, writable=False)) as mapping:
            assert mapping.num_bytes == SIZE
            assert bytes_of(mapping) == PATTERN
            assert bytes_of(mapping, 300, 7) == PATTERN[300:307]
            assert bytes_of(mapping, SIZE, 0) == b""

    def test_writing_at_an_offset_leaves_the_rest(self, backend: Backend, handle: Handle) -> None:
        with contextlib.closing(mapped(backend, handle, writable=True, commit=False)) as mapping:
            mapping.write(0, PATTERN)
            mapping.write(5000, memoryview(b"--abc--")[2:5])
            mapping.write(SIZE, b"")
            assert bytes_of(mapping) == PATTERN[:5000] + b"abc" + PATTERN[5003:]

    def test_what_is_wider_than_a_byte_is_written_whole(
        self, backend: Backend, handle: Handle
    ) -> None:
        words = memoryview(PATTERN[:4096]).cast("I")
        with contextlib.closing(mapped(backend, handle, writable=True)) as mapping:
            mapping.write(8, words)
            out = bytearray(4096)
            mapping.read(8, memoryview(out).cast("I"))
            assert out == PATTERN[:4096]

    def test_committed_bytes_can_be_written_through_addresses(
        self, backend: Backend, handle: Handle
    ) -> None:
        with contextlib.closing(mapped(backend, handle, writable=True, commit=False)) as mapping:
            mapping.commit(4096, SIZE - 4096)
            poke(mapping, 4096, b"abc")
            assert bytes_of(mapping, 4096, 3) == b"abc"
            assert backend.committed_bytes(handle.segment) >= SIZE - 4096

    def test_another_process_reads_what_was_written(
        self, backend: Backend, sealed: Handle, start_peer: Callable[[], Peer]
    ) -> None:
        peer = start_peer()
        with exported(backend, sealed.segment) as descriptor:
            peer.given(descriptor).map(sealed, False)
        assert bytes.fromhex(peer.do.read(0, SIZE)) == PATTERN
        assert peer.peek(300, 7) == PATTERN[300:307]

    def test_two_processes_share_one_memory(
        self, backend: Backend, handle: Handle, start_peer: Callable[[], Peer]
    ) -> None:
        peer = start_peer()
        with contextlib.closing(mapped(backend, handle, writable=True)) as mapping:
            with exported(backend, handle.segment) as descriptor:
                peer.given(descriptor).map(handle, True)
            mapping.write(0, b"xyz")
            assert peer.peek(0, 3) == b"xyz"
            peer.poke(3, b"abc")
            assert bytes_of(mapping, 0, 6) == b"xyzabc"

    def test_a_sealed_segment_can_not_be_mapped_writable(
        self, backend: Backend, sealed: Handle
    ) -> None:
        with pytest.raises(NotWriter, match="sealed"):
            mapped(backend, sealed, writable=True)

    def test_the_kernel_shows_a_mapping_of_it_under_the_name_that_is_told(
        self, backend: Backend, sealed: Handle
    ) -> None:
        """Or it shows none at all, and none is told."""
        named = for_handle(sealed).kernel_object(sealed)
        before = shown_objects()
        with contextlib.closing(mapped(backend, sealed, writable=False)):
            assert (shown_objects() - before) & {named} == ({named} if named else set())
        identified = msgspec.structs.replace(sealed, identity=backend.identity(sealed.segment))
        assert for_handle(sealed).kernel_object(identified) == named
        if named:
            other = msgspec.structs.replace(sealed, identity="1:2:3")
            with pytest.raises(StaleGeneration, match="another segment"):
                for_handle(sealed).kernel_object(other)
            backend.free(sealed.segment)
            with pytest.raises(StaleGeneration, match="gone"):
                for_handle(sealed).kernel_object(sealed)

    def test_a_read_only_mapping_refuses_to_write(self, backend: Backend, sealed: Handle) -> None:
        with contextlib.closing(mapped(backend, sealed, writable=False)) as mapping:
            with pytest.raises(TypeError, match="read-only"):
                mapping.write(0, b"x")
            with pytest.raises(TypeError, match="read-only"):
                mapping.commit(0, 1)
            assert bytes_of(mapping) == PATTERN

    @pytest.mark.parametrize("offset", [-1, SIZE - 2, SIZE + 1, 1 << 62])
    def test_what_lies_outside_is_refused(
        self, backend: Backend, handle: Handle, offset: int
    ) -> None:
        with contextlib.closing(mapped(backend, handle, writable=True)) as mapping:
            for refused in (
                lambda: mapping.write(offset, b"abc"),
                lambda: mapping.commit(offset, 3),
                lambda: mapping.read(offset, memoryview(bytearray(3))),
            ):
                with pytest.raises(ValueError, match="outside the segment"):
                    refused()

    def test_a_mapping_outlives_the_segment(self, backend: Backend, sealed: Handle) -> None:
        with contextlib.closing(mapped(backend, sealed, writable=False)) as mapping:
            backend.free(sealed.segment)
            assert bytes_of(mapping) == PATTERN

    def test_a_closed_mapping_says_so(self, backend: Backend, sealed: Handle) -> None:
        mapping = mapped(backend, sealed, writable=False)
        mapping.close()
        mapping.close()
        with pytest.raises(ValueError, match="closed"):
            bytes_of(mapping)

    def test_freeing_twice_is_harmless(self, backend: Backend, handle: Handle) -> None:
        backend.free(handle.segment)
        backend.free(handle.segment)
        assert backend.identity(handle.segment) == ""
        with pytest.raises(StaleGeneration, match="gone"):
            mapped(backend, handle, writable=True)

    @pytest.mark.parametrize("num_bytes", [1 << 50, 1 << 62])
    def test_out_of_room_names_the_fix_and_leaves_nothing(
        self, backend: Backend, prefix: str, num_bytes: int
    ) -> None:
        with pytest.raises(OutOfDeviceMemory, match=r"Enlarge|serve a smaller model"):
            backend.reserve(f"{prefix}1", num_bytes)
        assert backend.sweep(prefix) == []

    def test_what_is_promised_already_is_not_promised_again(
        self, backend: Backend, prefix: str
    ) -> None:
        outstanding = backend.limit_bytes() - SIZE + 1
        with pytest.raises(OutOfDeviceMemory):
            backend.reserve(f"{prefix}1", SIZE, outstanding_bytes=outstanding)
        assert backend.sweep(prefix) == []

    def test_a_segment_has_all_its_memory(self, backend: Backend, handle: Handle) -> None:
        mapped(backend, handle, writable=True).close()
        assert SIZE <= backend.committed_bytes(handle.segment) < SIZE + 2 * backend.granularity

    # --- pools

    def test_a_pool_costs_nothing(self, backend: Backend, pool: Handle, window: PoolWindow) -> None:
        assert window.num_bytes == pool.num_bytes
        assert backend.committed_bytes(pool.segment) == 0

    def test_an_extent_is_memory(
        self, backend: Backend, pool: Handle, extents: list[Extent], window: PoolWindow
    ) -> None:
        for number, extent in enumerate(extents):
            map_extent(backend, pool, window, extent, writable=True)
            poke(window, extent.offset, bytes([number + 1]) * extent.num_bytes)
        for number, extent in enumerate(extents):
            there = peek(window, extent.offset, extent.num_bytes)
            assert there == bytes([number + 1]) * extent.num_bytes
        assert backend.committed_bytes(pool.segment) == sum(e.num_bytes for e in extents)

    def test_two_processes_hold_different_extents(
        self,
        backend: Backend,
        pool: Handle,
        extents: list[Extent],
        start_peer: Callable[[], Peer],
    ) -> None:
        peers = [start_peer(), start_peer()]
        for peer, extent, text in zip(peers, extents[:2], (b"one", b"two"), strict=True):
            peer.do.open_pool(pool)
            map_extent(backend, pool, peer, extent, writable=True)
            peer.poke(extent.offset, text)
        assert peers[0].peek(extents[0].offset, 3) == b"one"
        with self.faults():
            peers[0].poke(extents[1].offset, b"bad")
        assert peers[1].peek(extents[1].offset, 3) == b"two"
        # What one wrote, another one can read, and no more than that.
        map_extent(backend, pool, peers[1], extents[0], writable=False)
        assert peers[1].peek(extents[0].offset, 3) == b"one"
        with self.faults():
            peers[1].poke(extents[0].offset, b"bad")

    def test_mapping_again_changes_the_access(
        self,
        backend: Backend,
        pool: Handle,
        extents: list[Extent],
        start_peer: Callable[[], Peer],
    ) -> None:
        peer = start_peer()
        peer.do.open_pool(pool)
        map_extent(backend, pool, peer, extents[0], writable=True)
        peer.poke(extents[0].offset, b"abc")
        map_extent(backend, pool, peer, extents[0], writable=False)
        assert peer.peek(extents[0].offset, 3) == b"abc"
        with self.faults():
            peer.poke(extents[0].offset, b"bad")

    @pytest.mark.parametrize("discard", [False, True])
    def test_an_unmapped_extent_can_not_be_touched(
        self,
        backend: Backend,
        pool: Handle,
        extents: list[Extent],
        start_peer: Callable[[], Peer],
        discard: bool,
    ) -> None:
        peer = start_peer()
        peer.do.open_pool(pool)
        for extent in extents[:2]:
            map_extent(backend, pool, peer, extent, writable=True)
            peer.poke(extent.offset, b"abc")
        peer.do.unmap_extent(extents[0].offset, extents[0].num_bytes, discard)
        assert peer.peek(extents[1].offset, 3) == b"abc"
        with self.faults():
            peer.peek(extents[0].offset, 3)

    def test_a_freed_extent_gives_its_memory_back(
        self, backend: Backend, pool: Handle, extents: list[Extent], window: PoolWindow
    ) -> None:
        for extent in extents:
            map_extent(backend, pool, window, extent, writable=True)
            poke(window, extent.offset, b"abc")
        before = backend.committed_bytes(pool.segment)
        window.unmap(extents[0], discard=True)
        backend.free_extent(pool.segment, extents[0])
        assert backend.committed_bytes(pool.segment) == before - extents[0].num_bytes
        assert peek(window, extents[1].offset, 3) == b"abc"
        backend.reserve_extent(pool.segment, extents[0])
        map_extent(backend, pool, window, extents[0], writable=True)
        poke(window, extents[0].offset, b"new")
        assert peek(window, extents[0].offset, 3) == b"new"
        assert backend.committed_bytes(pool.segment) == before

    @pytest.mark.parametrize(
        ("first", "size"),
        [(POOL_EXTENTS, 1), (POOL_EXTENTS - 1, 2), (0, POOL_EXTENTS + 1), (1 << 46, 1), (0, 0)],
    )
    def test_an_extent_outside_the_pool_is_refused(
        self, backend: Backend, window: PoolWindow, first: int, size: int
    ) -> None:
        unit = backend.granularity
        wrong = Extent(offset=first * unit, num_bytes=size * unit)
        for refused in (
            lambda: window.map(wrong, writable=True),
            lambda: window.map(wrong, writable=False),
            lambda: window.unmap(wrong),
            lambda: window.unmap(wrong, discard=True),
        ):
            with pytest.raises(InvalidMessage, match="not in the pool"):
                refused()

    @pytest.mark.parametrize(("shift", "more"), [(1, 0), (0, 1), (-8, 0)])
    def test_an_extent_that_is_not_aligned_is_refused(
        self, backend: Backend, window: PoolWindow, shift: int, more: int
    ) -> None:
        unit = backend.granularity
        wrong = Extent(offset=unit + shift, num_bytes=unit + more)
        with pytest.raises(InvalidMessage, match="not whole pages"):
            window.map(wrong, writable=True)
        with pytest.raises(InvalidMessage, match="not whole pages"):
            window.unmap(wrong)

    def test_a_closed_window_says_so(
        self, backend: Backend, pool: Handle, extents: list[Extent], window: PoolWindow
    ) -> None:
        window.close()
        window.close()
        with pytest.raises(ValueError, match="closed"):
            map_extent(backend, pool, window, extents[0], writable=True)

    def test_a_pool_that_is_gone_can_not_be_opened(self, backend: Backend, pool: Handle) -> None:
        backend.free(pool.segment)
        with pytest.raises(StaleGeneration, match="gone"):
            for_handle(pool).open_pool(pool)
