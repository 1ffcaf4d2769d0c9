"""Memory that bytes of files are read into, and what may be written of it."""

import mmap
from typing import Final

import numpy as np

from workers.placement.reader import BLOCK, Read

UNTOUCHED: Final = 0xA5


class Memory:
    """Bytes that begin with a block, all UNTOUCHED."""

    def __init__(self, num_bytes: int) -> None:
        self.bytes: Final = np.frombuffer(mmap.mmap(-1, num_bytes), np.uint8)
        self.wipe()

    def wipe(self) -> None:
        self.bytes[:] = UNTOUCHED

    @property
    def is_untouched(self) -> bool:
        return bool((self.bytes == UNTOUCHED).all())

    def read(self, file: int, begin: int, num_bytes: int, block: int = 0) -> Read:
        """Of these bytes into this block of the memory, and those that follow."""
        offset = block * BLOCK + begin % BLOCK
        assert offset + num_bytes <= len(self.bytes)
        return Read(file, begin, num_bytes, int(self.bytes.ctypes.data) + offset)

    def read_by(self, read: Read) -> bytes:
        """What lies where the read put its bytes."""
        offset = read.address - int(self.bytes.ctypes.data)
        return self.bytes[offset : offset + read.num_bytes].tobytes()

    def around(self, read: Read, *, blocks: bool) -> bytes:
        """All that the read may not have written to; `blocks`: of whole blocks."""
        first = read.address - int(self.bytes.ctypes.data)
        last = first + read.num_bytes
        if blocks:
            first, last = first // BLOCK * BLOCK, -(-last // BLOCK) * BLOCK
        return self.bytes[:first].tobytes() + self.bytes[last:].tobytes()


def num_blocks(begin: int, num_bytes: int) -> int:
    """So many hold these bytes."""
    return -(-(begin % BLOCK + num_bytes) // BLOCK)
