"""The host backend: the contract, what only host memory promises, and who is found by which name.

A further device has its own module, with its own class made from `BackendContract`.
"""

import contextlib
import ctypes
import errno
import mmap
import os
import resource
import signal
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from allocator import NotWriter, OutOfDeviceMemory, StaleGeneration
from allocator.backends import Backend, PoolWindow, for_handle, open_device
from allocator.backends.host import SHM_ROOT, HostBackend
from allocator.client.weights.tensor import as_bytes
from allocator.errors import InvalidMessage, InvalidSetting
from allocator.messages import Extent, Handle
from tests.allocator.backends.backend_contract import PATTERN, SIZE, BackendContract, bytes_of
from tests.allocator.backends.backend_peer import Peer
from tests.allocator.daemon.raw_session import commit
from tests.allocator.processes import in_fork
from tests.leaks import descriptors

LIBC = ctypes.CDLL(None, use_errno=True)


def path_of(handle: Handle) -> Path:
    return SHM_ROOT / handle.segment.removeprefix("/")


def committed(handle: Handle) -> int:
    """What `committed_bytes` should say, by another way."""
    return path_of(handle).stat().st_blocks * 512


def address_space_bytes() -> int:
    """Of this process (proc(5), statm)."""
    return int(Path("/proc/self/statm").read_text().split()[0]) * mmap.PAGESIZE


def make_writable(buffer: memoryview, num_bytes: int) -> int:
    """mprotect; 0 or the kernel's errno."""
    address = np.frombuffer(buffer, np.uint8).ctypes.data
    protection = mmap.PROT_READ | mmap.PROT_WRITE
    if LIBC.mprotect(ctypes.c_void_p(address), ctypes.c_size_t(num_bytes), protection) == 0:
        return 0
    return ctypes.get_errno()


class TestHost(BackendContract):
    @pytest.fixture
    def backend(self) -> Backend:
        return HostBackend()

    # --- segments

    def test_a_new_segment_is_zero(self, backend: Backend, handle: Handle) -> None:
        with contextlib.closing(backend.map(handle, writable=True)) as mapping:
            assert mapping.buffer == bytes(SIZE)

    def test_nothing_is_committed_before_it_is_wanted(
        self, backend: Backend, handle: Handle
    ) -> None:
        with contextlib.closing(backend.map(handle, writable=True, commit=False)) as mapping:
            assert committed(handle) == 0
            mapping.commit(mmap.PAGESIZE, 1)
            assert committed(handle) == backend.committed_bytes(handle.segment) == mmap.PAGESIZE
            mapping.commit(0, 0)
            mapping.write(SIZE - 1, b"x")
            assert committed(handle) == 2 * mmap.PAGESIZE
            mapping.write(0, PATTERN)
            assert committed(handle) == 4 * mmap.PAGESIZE
        assert path_of(handle).stat().st_size == SIZE

    def test_threads_write_at_once(self, backend: Backend, prefix: str) -> None:
        piece = 1 << 20
        backend.reserve(f"{prefix}2", 8 * piece)
        handle = self.handle_of(backend, f"{prefix}2", 8 * piece)
        with contextlib.closing(backend.map(handle, writable=True, commit=False)) as mapping:

            def write(number: int) -> None:
                mapping.write(number * piece, bytes([number]) * piece)

            threads = [threading.Thread(target=write, args=(n,)) for n in range(8)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            for number in range(8):
                assert bytes_of(mapping, number * piece, piece) == bytes([number]) * piece

    def test_python_refuses_to_write_to_a_sealed_buffer(
        self, backend: Backend, sealed: Handle
    ) -> None:
        mapping = backend.map(sealed, writable=False)
        with pytest.raises(TypeError):
            mapping.buffer[0] = 0
        mapping.close()

    def test_writing_through_a_tensor_kills_the_writer_alone(
        self, backend: Backend, sealed: Handle
    ) -> None:
        mapping = backend.map(sealed, writable=False)
        tensor = as_bytes(mapping)

        def write() -> str:
            tensor.fill_(7)
            return "survived"

        child = in_fork(write)
        assert (child.signal, child.text) == (signal.SIGSEGV, "")
        assert mapping.buffer == PATTERN
        assert bytes(tensor) == PATTERN

    def test_mprotect_cannot_undo_the_seal(self, backend: Backend, sealed: Handle) -> None:
        with contextlib.closing(backend.map(sealed, writable=False)) as mapping:
            assert make_writable(mapping.buffer, SIZE) == errno.EACCES

    def test_views_outlive_the_mapping(self, backend: Backend, sealed: Handle) -> None:
        mapping = backend.map(sealed, writable=False)
        tensor = as_bytes(mapping)[5:9]
        mapping.close()
        del mapping
        assert bytes(tensor) == PATTERN[5:9]

    def test_the_last_view_unmaps(self, backend: Backend, sealed: Handle) -> None:
        mapping = backend.map(sealed, writable=False)
        tensor = as_bytes(mapping)[5:9]
        mapping.close()
        assert sealed.segment in Path("/proc/self/maps").read_text()
        del tensor
        assert sealed.segment not in Path("/proc/self/maps").read_text()

    @pytest.mark.parametrize("writable", [True, False])
    def test_a_handle_of_another_size_is_stale(
        self, backend: Backend, handle: Handle, writable: bool
    ) -> None:
        wrong = self.handle_of(backend, handle.segment, SIZE + 1)
        with pytest.raises(StaleGeneration, match="another size"):
            backend.map(wrong, writable=writable)

    def test_a_handle_of_nothing_is_refused(self, backend: Backend, handle: Handle) -> None:
        empty = self.handle_of(backend, handle.segment, 0)
        with pytest.raises(InvalidMessage, match="nothing to map"):
            backend.map(empty, writable=False)

    def test_others_may_not_even_open_it(self, handle: Handle, pool: Handle) -> None:
        assert path_of(handle).stat().st_mode & 0o777 == 0o600
        assert path_of(pool).stat().st_mode & 0o777 == 0o600
        commit(handle)
        HostBackend().seal(handle.segment)
        assert path_of(handle).stat().st_mode & 0o777 == 0o400

    @pytest.mark.skipif(os.geteuid() != 0, reason="becoming another user needs root")
    def test_after_the_seal_the_owner_cannot_map_it_writable(
        self, backend: Backend, sealed: Handle
    ) -> None:
        os.chown(path_of(sealed), 65534, 65534)  # the kernel itself never refuses root
        child = in_fork(lambda: str(backend.map(sealed, writable=True)), uid=65534)
        assert child.text.startswith("NotWriter")
        child = in_fork(lambda: str(len(backend.map(sealed, writable=False).buffer)), uid=65534)
        assert child.text == str(SIZE)
        os.chown(path_of(sealed), 0, 0)  # what is another user's is not swept

    def test_torch_does_not_warn_of_read_only_memory(
        self, backend: Backend, sealed: Handle, recwarn: pytest.WarningsRecorder
    ) -> None:
        with contextlib.closing(backend.map(sealed, writable=False)) as mapping:
            assert as_bytes(mapping).dtype == torch.uint8
            assert not recwarn.list

    def test_there_is_nothing_to_export(self, backend: Backend, handle: Handle) -> None:
        with pytest.raises(InvalidMessage, match="mapped by its name"):
            backend.export(handle.segment)

    # --- who is who

    def test_the_identity_is_that_of_the_very_segment(
        self, backend: Backend, prefix: str, handle: Handle
    ) -> None:
        first = backend.identity(handle.segment)
        assert first
        assert backend.identity(handle.segment) == first
        commit(handle)
        backend.seal(handle.segment)
        sealed = backend.identity(handle.segment)
        assert sealed != first
        held = backend.map(handle, writable=False)  # else the inode's number may come again
        backend.free(handle.segment)
        assert backend.identity(handle.segment) == ""
        backend.reserve(handle.segment, SIZE)
        commit(handle)
        backend.seal(handle.segment)
        assert backend.identity(handle.segment) not in ("", first, sealed)
        held.close()

    def test_the_sweep_takes_our_names_and_no_others(self, backend: Backend, prefix: str) -> None:
        ours, others = prefix, f"{prefix[:-1]}x-"
        for name in (f"{ours}1", f"{ours}2", f"{ours}3", f"{others}1"):
            backend.reserve(name, 10)
        assert backend.sweep(ours, frozenset({f"{ours}2"})) == [f"{ours}1", f"{ours}3"]
        assert backend.sweep(ours) == [f"{ours}2"]
        assert backend.sweep(ours) == []
        assert backend.sweep(others) == [f"{others}1"]

    # --- descriptors

    @pytest.mark.parametrize("writable", [True, False])
    def test_a_closed_mapping_leaves_no_descriptor(
        self, backend: Backend, handle: Handle, writable: bool
    ) -> None:
        before = descriptors()
        for _ in range(3):
            mapping = backend.map(handle, writable=writable)  # kept until the next one is there
            mapping.close()
            assert descriptors() == before

    def test_refusals_leave_no_descriptor(
        self, backend: Backend, sealed: Handle, pool: Handle
    ) -> None:
        before = descriptors()
        refused: list[tuple[Callable[[], object], type[Exception]]] = [
            (lambda: backend.map(sealed, writable=True), NotWriter),
            (lambda: backend.map(self.handle_of(backend, sealed.segment, 7), writable=False),
             StaleGeneration),
            (lambda: backend.open_pool(self.handle_of(backend, pool.segment, 7)), StaleGeneration),
            (lambda: backend.open_pool(sealed), NotWriter),
        ]  # fmt: skip
        for attempt, error in refused:
            with pytest.raises(error):
                attempt()
        assert descriptors() == before

    def test_a_closed_window_leaves_neither_descriptor_nor_mapping(
        self, backend: Backend, pool: Handle, extents: list[Extent]
    ) -> None:
        backend.hold_pool(pool.segment)
        before = descriptors()
        window = backend.open_pool(pool)
        window.map(extents[0], writable=True)
        window.map(extents[2], writable=False)
        window.unmap(extents[0])
        window.close()
        assert pool.segment not in Path("/proc/self/maps").read_text()
        assert descriptors() == before
        backend.free_extent(pool.segment, extents[0])
        assert descriptors() == before

    # --- the pool

    def test_a_window_can_be_larger_than_the_machine(self, backend: Backend, prefix: str) -> None:
        size = 1 << 40
        backend.reserve_pool(f"{prefix}large", size)
        handle = self.handle_of(backend, f"{prefix}large", size)
        extent = Extent(offset=size - backend.granularity, num_bytes=backend.granularity)
        with contextlib.closing(backend.open_pool(handle)) as window:
            window.map(extent, writable=True)
            window.buffer[-3:] = b"end"
            assert len(window.buffer) == size
            assert committed(handle) == backend.granularity
            assert address_space_bytes() >= size
        del window
        assert address_space_bytes() < size

    def test_a_writable_extent_is_committed(
        self, backend: Backend, pool: Handle, extents: list[Extent], window: PoolWindow
    ) -> None:
        window.map(extents[0], writable=True)
        assert committed(pool) == extents[0].num_bytes
        window.map(extents[2], writable=False)
        assert committed(pool) == extents[0].num_bytes

    def test_discarded_memory_goes_back_at_once(
        self, backend: Backend, pool: Handle, extents: list[Extent], window: PoolWindow
    ) -> None:
        for extent in extents:
            window.map(extent, writable=True)
            window.buffer[extent.offset : extent.offset + 3] = b"abc"
        window.unmap(extents[0])
        assert backend.committed_bytes(pool.segment) == 3 * extents[0].num_bytes
        window.unmap(extents[1], discard=True)
        assert backend.committed_bytes(pool.segment) == 2 * extents[0].num_bytes
        for extent, kept in ((extents[0], b"abc"), (extents[1], bytes(3))):
            window.map(extent, writable=True)
            assert window.buffer[extent.offset : extent.offset + 3] == kept

    def test_who_still_maps_a_freed_extent_reads_zeros(
        self, backend: Backend, pool: Handle, extents: list[Extent], window: PoolWindow
    ) -> None:
        window.map(extents[0], writable=True)
        window.buffer[extents[0].offset] = 7
        window.map(extents[0], writable=False)
        backend.free_extent(pool.segment, extents[0])
        assert window.buffer[extents[0].offset] == 0

    def test_a_pool_that_can_not_be_made_leaves_nothing(
        self, backend: Backend, prefix: str
    ) -> None:
        def attempt() -> str:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
            backend.reserve_pool(f"{prefix}pool", 1 << 21)
            return "made"

        assert in_fork(attempt).text.startswith("SharedMemoryFull: 2.1 MB of shared memory")
        assert backend.sweep(prefix) == []

    def test_freeing_an_extent_of_a_pool_that_is_gone_is_harmless(
        self, backend: Backend, pool: Handle, extents: list[Extent]
    ) -> None:
        backend.free(pool.segment)
        backend.free_extent(pool.segment, extents[0])
        assert backend.committed_bytes(pool.segment) == 0

    def test_mprotect_cannot_make_a_read_only_extent_writable(
        self, pool: Handle, extents: list[Extent], window: PoolWindow
    ) -> None:
        extent = extents[0]
        window.map(extent, writable=False)
        there = window.buffer[extent.offset : extent.offset + extent.num_bytes]
        assert make_writable(there, extent.num_bytes) == errno.EACCES

    def test_a_view_that_is_left_ends_in_a_fault_not_in_foreign_memory(
        self, backend: Backend, pool: Handle, extents: list[Extent]
    ) -> None:
        window = backend.open_pool(pool)
        window.map(extents[0], writable=True)
        view = window.buffer[extents[0].offset :]
        window.close()
        del window
        # What comes next gets other addresses, though these would suit it.
        again = backend.open_pool(pool)
        again.map(extents[0], writable=True)
        assert in_fork(lambda: str(view[0])).signal == signal.SIGSEGV
        again.close()

    def test_a_fork_keeps_what_was_mapped(
        self, pool: Handle, extents: list[Extent], window: PoolWindow
    ) -> None:
        extent = extents[0]
        window.map(extent, writable=True)
        window.buffer[extent.offset : extent.offset + 3] = b"abc"
        assert in_fork(lambda: bytes(window.buffer[extent.offset :][:3]).decode()).text == "abc"

    def test_an_extent_larger_than_the_device_is_refused_at_once(
        self, backend: Backend, prefix: str
    ) -> None:
        status = os.statvfs(SHM_ROOT)
        size = status.f_blocks * status.f_frsize + backend.granularity
        backend.reserve_pool(f"{prefix}large", size)
        handle = self.handle_of(backend, f"{prefix}large", size)
        with (
            contextlib.closing(backend.open_pool(handle)) as window,
            pytest.raises(OutOfDeviceMemory, match=r"are needed, but .* are free\."),
        ):
            window.map(Extent(offset=0, num_bytes=size), writable=True)
        assert committed(handle) == 0

    def test_the_limit_of_mappings_is_told(
        self, backend: Backend, prefix: str, start_peer: Callable[[], Peer]
    ) -> None:
        limit = int(Path("/proc/sys/vm/max_map_count").read_text())
        if limit > 1 << 17:
            pytest.skip(f"this machine allows {limit} mappings, too many to make in a test")
        page = mmap.PAGESIZE
        backend.reserve_pool(f"{prefix}many", 4 * limit * page)
        handle = self.handle_of(backend, f"{prefix}many", 4 * limit * page)

        def exhaust() -> str:
            window = backend.open_pool(handle)
            for number in range(limit):
                window.map(Extent(offset=2 * number * page, num_bytes=page), writable=False)
            return "never refused"

        child = in_fork(exhaust)
        assert child.text.startswith("OutOfDeviceMemory")
        assert "vm.max_map_count" in child.text

    def test_what_can_not_be_unmapped_is_given_up_all_the_same(
        self, backend: Backend, prefix: str
    ) -> None:
        """Unmapping the midst of a mapping takes one more, and there may be as many as allowed."""
        limit = int(Path("/proc/sys/vm/max_map_count").read_text())
        if limit > 1 << 17:
            pytest.skip(f"this machine allows {limit} mappings, too many to make in a test")
        page = mmap.PAGESIZE
        backend.reserve_pool(f"{prefix}many", 16 * page)
        handle = self.handle_of(backend, f"{prefix}many", 16 * page)

        def exhaust() -> str:
            window = backend.open_pool(handle)
            extents = [Extent(offset=number * page, num_bytes=page) for number in range(9)]
            for extent in extents:  # one mapping of the kernel's, all in all
                window.map(extent, writable=True)
            window.buffer[: 9 * page] = b"x" * (9 * page)
            room = mmap.mmap(-1, 2 * limit * page, prot=mmap.PROT_READ)
            first = ctypes.c_void_p(np.frombuffer(room, np.uint8).ctypes.data).value or 0
            split = [
                address
                for address in range(first, first + 2 * limit * page, 2 * page)
                if LIBC.mprotect(ctypes.c_void_p(address), ctypes.c_size_t(page), 0) == 0
            ]
            for number in (1, 3, 5):
                window.unmap(extents[number], discard=True)
            left = bytes(window.buffer[page : page + 1])  # it is mapped, and empty
            for address in split[:64]:
                LIBC.mprotect(ctypes.c_void_p(address), ctypes.c_size_t(page), mmap.PROT_READ)
            window.map(extents[3], writable=True)
            window.buffer[3 * page] = 7
            window.unmap(extents[7])
            lines = Path("/proc/self/maps").read_text().splitlines()
            mapped = [line for line in lines if f"{prefix}many" in line]
            sizes = [
                (int(end, 16) - int(begin, 16)) // page
                for begin, end in (line.split()[0].split("-") for line in mapped)
            ]
            return f"{left!r} {window.buffer[3 * page]} {sizes}"

        # Pages 1, 5 and 7 are gone; 3 was mapped anew, so it is somebody's.
        assert in_fork(exhaust).text == "b'\\x00' 7 [1, 3, 1, 1]"
        # Of nine pages 5 stays discarded; 1 was read.
        assert backend.committed_bytes(handle.segment) == 8 * page


class TestChoice:
    @pytest.mark.parametrize("device", ["tape", "", "host:0"])
    def test_an_unknown_device_is_refused(self, device: str) -> None:
        with pytest.raises(InvalidSetting, match="is not one of host"):
            open_device(device)

    def test_a_handle_of_an_unknown_backend_is_refused(self) -> None:
        handle = Handle(backend="tape", segment="/x", num_bytes=1, generation=1)
        with pytest.raises(InvalidSetting, match="'tape' is not one of host"):
            for_handle(handle)

    def test_a_handle_without_a_device_is_found_by_its_backend(self) -> None:
        handle = Handle(backend="host", segment="/x", num_bytes=1, generation=1)
        assert isinstance(for_handle(handle), HostBackend)
