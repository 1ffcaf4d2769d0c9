"""Memory that the ranks of an instance have in common without an allocator, and blocks of it.

Owns a range of addresses that all processes have which are forked from the one that made it, and
which of its places are taken. Invariants: a place is one block's; memory that no block has goes
back to the kernel. Takes none before it is touched.
"""

import mmap
from collections.abc import Sequence
from typing import Final

import torch

from workers.errors import OutOfKVMemory
from workers.kv.block import KVBlock
from workers.kv.layout import KVLayout
from workers.kv.source import PRIVATE_LIMIT_BYTES, PrivateSource

_MAP_NORESERVE: Final = 0x4000


class CommonMemory:
    """Made before the ranks are forked."""

    def __init__(self, num_bytes: int = PRIVATE_LIMIT_BYTES) -> None:
        """Raises OSError where there are no addresses."""
        flags = mmap.MAP_SHARED | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
        self._memory = mmap.mmap(-1, num_bytes, flags)
        self.num_bytes: Final = num_bytes
        self.storage: Final = torch.frombuffer(self._memory, dtype=torch.uint8)
        """All of it, uint8 # [num_bytes]."""

    def discard(self, offset: int, num_bytes: int) -> None:
        """Nobody has these bytes, whole pages, any more: they are zeros from now on."""
        self._memory.madvise(mmap.MADV_REMOVE, offset, num_bytes)


class CommonSource(PrivateSource):
    """Blocks of it, all given out by one rank."""

    def __init__(self, layout: KVLayout, memory: CommonMemory) -> None:
        super().__init__(layout, limit_bytes=memory.num_bytes)
        self._memory = memory
        self._block_bytes = layout.block_bytes
        self._places = list(range(memory.num_bytes // layout.block_bytes))

    def lease(self, count: int) -> list[KVBlock]:
        """See `PrivateSource`. Raises `OutOfKVMemory`."""
        if count > len(self._places):
            raise OutOfKVMemory(
                f"no allocator answers, and the ranks of this instance have {len(self._places)} KV "
                "blocks of their own left: start an allocator in its runtime directory"
            )
        self._count += count
        places = [self._places.pop() for _ in range(count)]
        return [KVBlock(self._memory.storage, place * self._block_bytes, None) for place in places]

    def release(self, blocks: Sequence[KVBlock]) -> None:
        """See `PrivateSource`."""
        super().release(blocks)
        for block in blocks:
            self._memory.discard(block.offset, self._block_bytes)
            self._places.append(block.offset // self._block_bytes)
