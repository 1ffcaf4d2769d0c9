"""How fast this machine reads a checkpoint's files, and its memory: that says how much of reading
can be hidden behind computing.

Owns two short measurements. Invariant: nothing is written, and what was in the page cache of the
files may be gone from there, for as far as was measured.
"""

import mmap
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import torch

from workers.placement.reader import Read, Reader

_MOST_BYTES: Final = 256 << 20
_PIECE_BYTES: Final = 16 << 20


def read_bytes_per_s(files: Sequence[Path]) -> int:
    """Of the largest of the files, as offloaded layers are read; 0 where there is nothing to read.
    Raises OSError, ReadFailed."""
    largest = max(files, key=lambda file: file.stat().st_size)
    size = min(_MOST_BYTES, largest.stat().st_size) // _PIECE_BYTES * _PIECE_BYTES
    if not size:
        return 0
    _give_up_pages(largest, size)
    area = mmap.mmap(-1, _PIECE_BYTES, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE)
    address = torch.frombuffer(area, dtype=torch.uint8).data_ptr()
    with Reader() as reader:
        file = reader.open(largest)
        since = time.monotonic()
        for begin in range(0, size, _PIECE_BYTES):
            reader.wait(reader.start([Read(file, begin, _PIECE_BYTES, address)]))
        return int(size / (time.monotonic() - since))


def _give_up_pages(file: Path, num_bytes: int) -> None:
    descriptor = os.open(file, os.O_RDONLY)
    try:
        os.posix_fadvise(descriptor, 0, num_bytes, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def memory_bytes_per_s() -> int:
    """Read by all threads: to compute a token takes at least as long as reading all weights so."""
    numbers = torch.ones(_MOST_BYTES // 4)
    best = 0.0
    for _ in range(3):
        since = time.monotonic()
        numbers.sum()
        best = max(best, _MOST_BYTES / (time.monotonic() - since))
    return int(best)
