"""An instance as far as memory goes, that can also copy the weights: by each way that there is.

Run by `tests/server/machine/test_clones.py`, told what to do as a `ClientProgram` is.
"""

import ctypes
import mmap
import os
import tempfile
from pathlib import Path
from typing import Any

from allocator import WeightSetReader
from tests.allocator.client.client_program import ClientProgram, main

_libc = ctypes.CDLL(None, use_errno=True)
_libc.shmat.restype = ctypes.c_void_p
_libc.mmap.restype = ctypes.c_void_p
_IPC_RMID = 0
_MAP_HUGETLB = 0x40000
_MFD_HUGETLB = 4


class CloningProgram(ClientProgram):
    """`attach`, and then perhaps `clone`."""

    def __init__(self, runtime_dir: str, options: dict[str, str]):
        super().__init__(runtime_dir, options)
        self.kept: list[Any] = []

    def attach(self, key: str) -> None:
        """Read the sealed set, every page of it."""
        opened = self.memory.open_weight_set(key, None)
        assert isinstance(opened, WeightSetReader)
        self.reader = opened
        for mapping in opened._mappings:
            sum(mapping.buffer[:: mmap.PAGESIZE])

    @property
    def weights(self) -> memoryview:
        assert self.reader is not None
        return max((one.buffer for one in self.reader._mappings), key=len)

    def clone(self, how: str, path: str = "") -> None:
        """A second copy of the weights, in this process's hands."""
        getattr(self, f"_{how}")(path)

    def _heap(self, _path: str) -> None:
        self.kept.append(bytearray(self.weights))

    def _private_mapping(self, _path: str) -> None:
        mapped = mmap.mmap(-1, len(self.weights), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        mapped[:] = self.weights
        self.kept.append(mapped)

    def _shared_mapping(self, _path: str) -> None:
        """Anonymous, and for children to inherit."""
        mapped = mmap.mmap(-1, len(self.weights), mmap.MAP_SHARED | mmap.MAP_ANONYMOUS)
        mapped[:] = self.weights
        self.kept.append(mapped)

    def _memfd(self, _path: str) -> None:
        self._mapped(os.memfd_create("onecopy-weights"))

    def _memfd_that_is_called_like_a_segment(self, path: str) -> None:
        self._mapped(os.memfd_create(path))

    def _memfd_that_can_be_executed(self, _path: str) -> None:
        self._mapped(os.memfd_create("program"), mmap.PROT_READ | mmap.PROT_EXEC)

    def _memfd_that_nobody_maps(self, _path: str) -> None:
        descriptor = os.memfd_create("onecopy-weights")
        os.write(descriptor, self.weights)
        self.kept.append(descriptor)

    def _file(self, path: str) -> None:
        """On disk or in memory: wherever the path is."""
        self._mapped(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))

    def _file_that_nobody_maps(self, path: str) -> None:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        os.write(descriptor, self.weights)
        self.kept.append(descriptor)

    def _unlinked_file(self, path: str) -> None:
        self._file(path)
        Path(path).unlink()

    def _written_pages(self, path: str) -> None:
        """Of a private mapping of the segment itself: pages become own ones as they are written."""
        descriptor = os.open(path, os.O_RDONLY)
        flags, protection = mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE
        mapped = mmap.mmap(descriptor, 0, flags, protection)
        os.close(descriptor)
        for at in range(0, len(mapped), mmap.PAGESIZE):
            mapped[at] = mapped[at]
        self.kept.append(mapped)

    def _sysv(self, _path: str) -> None:
        number = _libc.shmget(0, ctypes.c_size_t(len(self.weights)), 0o600)
        assert number >= 0, os.strerror(ctypes.get_errno())
        address = _libc.shmat(number, None, 0)
        _libc.shmctl(number, _IPC_RMID, None)  # goes with this process
        ctypes.memmove(address, bytes(self.weights), len(self.weights))

    def _huge_pages(self, _path: str) -> None:
        self._huge(-1, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_HUGETLB)

    def _huge_memfd(self, _path: str) -> None:
        descriptor = os.memfd_create("weights", _MFD_HUGETLB)
        os.ftruncate(descriptor, self._in_huge_pages())
        self._huge(descriptor, mmap.MAP_SHARED)

    def _huge(self, descriptor: int, flags: int) -> None:
        num_bytes, protection = self._in_huge_pages(), mmap.PROT_READ | mmap.PROT_WRITE
        address = _libc.mmap(
            None, ctypes.c_size_t(num_bytes), protection, flags, descriptor, ctypes.c_long(0)
        )
        assert address != ctypes.c_void_p(-1).value, os.strerror(ctypes.get_errno())
        ctypes.memmove(address, bytes(self.weights), len(self.weights))

    def _in_huge_pages(self) -> int:
        return -(-len(self.weights) // (2 << 20)) * (2 << 20)

    def _other_weight_set(self, path: str) -> None:
        """Handed out by the allocator, but not for this process to read."""
        descriptor = os.open(path, os.O_RDONLY)
        mapped = mmap.mmap(descriptor, 0, mmap.MAP_SHARED, mmap.PROT_READ)
        os.close(descriptor)
        sum(mapped[:: mmap.PAGESIZE])
        self.kept.append(mapped)

    def _mapped(self, descriptor: int, protection: int = mmap.PROT_READ) -> None:
        os.write(descriptor, self.weights)
        os.fsync(descriptor)  # what is on disk is clean then
        mapped = mmap.mmap(descriptor, 0, mmap.MAP_SHARED, protection)
        os.close(descriptor)
        sum(mapped[:: mmap.PAGESIZE])
        self.kept.append(mapped)

    # --- what is no copy

    def use_the_pool(self, num_bytes: int) -> None:
        """As KV blocks do."""
        [offset] = self.lease(num_bytes)
        self.fill_leases([(offset, 7)])

    def work(self, num_bytes: int) -> None:
        """Activations and the like."""
        self.kept.append(bytearray(b"x" * num_bytes))

    def log(self, path: str) -> None:
        """To a file, as any program does."""
        self.kept.append(Path(path).open("w"))  # noqa: SIM115 - kept open on purpose

    def read_a_file(self, num_bytes: int) -> None:
        """And forget it: only the page cache has it."""
        with tempfile.TemporaryFile() as file:
            file.write(bytes(num_bytes))
            file.seek(0)
            file.read()


if __name__ == "__main__":
    main(CloningProgram)
