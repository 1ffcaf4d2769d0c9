"""Address ranges, holes and memory policies: the calls of the C library that Python does not offer.

Owns raw addresses. Invariants: a call that fails raises OSError with the kernel's reason; a range
goes back to the kernel when no view of it is left, and not before, so that a stale view ends in
SIGSEGV instead of in somebody else's memory.
"""

import ctypes
import errno
import mmap
import os
import platform
import weakref
from collections.abc import Iterable
from pathlib import Path
from typing import Final

_PROT_NONE: Final = 0
_MAP_FIXED: Final = 0x10
_MAP_NORESERVE: Final = 0x4000
_FALLOC_FL_KEEP_SIZE: Final = 1
_FALLOC_FL_PUNCH_HOLE: Final = 2
_MADV_POPULATE_WRITE: Final = 23  # Linux 5.14
_MBIND_NUMBER: Final = {"x86_64": 237, "aarch64": 235}.get(platform.machine())
_LONG_BITS: Final = 64

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (
    *(ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int),
    *(ctypes.c_int, ctypes.c_int, ctypes.c_int64),
)
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
_libc.syscall.restype = ctypes.c_long
_libc.syscall.argtypes = (
    *(ctypes.c_long, ctypes.c_void_p, ctypes.c_ulong, ctypes.c_ulong),
    *(ctypes.c_void_p, ctypes.c_ulong, ctypes.c_ulong),
)

_MAP_FAILED: Final = ctypes.c_void_p(-1).value


class AddressRange:
    """`num_bytes` of addresses that nothing is behind, until a file is mapped there."""

    def __init__(self, num_bytes: int, alignment: int = mmap.PAGESIZE):
        """The first address is a multiple of `alignment`, a power of two. Costs no memory."""
        self.num_bytes = num_bytes
        reserved = num_bytes + alignment - mmap.PAGESIZE
        start = _map(None, reserved, _PROT_NONE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)
        self.address = -(-start // alignment) * alignment
        bytes_there = (ctypes.c_ubyte * num_bytes).from_address(self.address)
        weakref.finalize(bytes_there, _libc.munmap, start, reserved).atexit = False
        self.buffer = memoryview(bytes_there).cast("B")

    def map(self, descriptor: int, offset: int, num_bytes: int, *, writable: bool) -> None:
        """Let bytes [offset, offset + num_bytes) be those of the file, whole pages. Read-only ones
        can be made writable by nobody if the descriptor is read-only."""
        protection = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
        flags = mmap.MAP_SHARED | _MAP_FIXED
        _map(self.address + offset, num_bytes, protection, flags, descriptor, offset)

    def unmap(self, offset: int, num_bytes: int) -> None:
        """Take what is there away; the addresses stay ours."""
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_FIXED
        _map(self.address + offset, num_bytes, _PROT_NONE, flags, -1, 0)


def address_of(writable: mmap.mmap) -> int:
    """Where a writable mapping lies."""
    return ctypes.addressof(ctypes.c_ubyte.from_buffer(writable))


def kernel_object(descriptor: int) -> str:
    """The file that a descriptor is open on, as "device:inode" like in /proc/PID/maps. Found out by
    mapping it, since on layered file systems stat(2) says something else."""
    addresses = AddressRange(mmap.PAGESIZE)
    addresses.map(descriptor, 0, mmap.PAGESIZE, writable=False)
    with Path("/proc/self/maps").open() as maps:
        for line in maps:  # START-END PERMISSIONS OFFSET DEVICE INODE PATH
            bounds, _permissions, _offset, device, inode, *_path = line.split(maxsplit=5)
            if int(bounds.partition("-")[0], 16) == addresses.address:
                return f"{device}:{inode}"
    raise OSError(errno.ENOENT, "the kernel shows no such mapping")


def punch_hole(descriptor: int, offset: int, num_bytes: int) -> None:
    """Give these bytes' memory back to the file system; they read as zeros. Needs a writable
    descriptor. Raises OSError."""
    mode = _FALLOC_FL_PUNCH_HOLE | _FALLOC_FL_KEEP_SIZE
    _check(_libc.fallocate(descriptor, mode, offset, num_bytes))


def use_huge_pages(address: int, num_bytes: int) -> None:
    """Let faults in this range use huge pages where they can. Raises OSError."""
    _check(_libc.madvise(address, num_bytes, mmap.MADV_HUGEPAGE))


def populate(address: int, num_bytes: int) -> bool:
    """Fault these pages in for writing; False where the kernel could not, or can't do it at all."""
    return not _libc.madvise(address, num_bytes, _MADV_POPULATE_WRITE)


def set_memory_policy(address: int, num_bytes: int, mode: int, nodes: Iterable[int]) -> None:
    """mbind(2): memory that this range gets from now on comes from these NUMA nodes. For a shared
    mapping the policy belongs to the file, whoever commits it. Raises OSError."""
    if _MBIND_NUMBER is None:
        raise OSError(errno.ENOSYS, f"mbind has no number for {platform.machine()} here")
    bits = sum(1 << node for node in set(nodes))
    num_words = -(-max(bits.bit_length(), 1) // _LONG_BITS)
    words = [bits >> (_LONG_BITS * i) & ((1 << _LONG_BITS) - 1) for i in range(num_words)]
    mask = (ctypes.c_uint64 * num_words)(*words)
    # The kernel looks at one bit less than it is told.
    max_node = num_words * _LONG_BITS + 1
    _check(
        _libc.syscall(_MBIND_NUMBER, address, num_bytes, mode, ctypes.addressof(mask), max_node, 0)
    )


def _map(
    address: int | None, num_bytes: int, protection: int, flags: int, descriptor: int, offset: int
) -> int:
    flags |= _MAP_NORESERVE if flags & mmap.MAP_ANONYMOUS else 0
    mapped = _libc.mmap(address, num_bytes, protection, flags, descriptor, offset)
    if mapped == _MAP_FAILED:
        _check(-1)
    return int(mapped)


def _check(result: int) -> None:
    if result:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
