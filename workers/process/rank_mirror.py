"""A rank's counterparts of the first rank's tables: the same blocks, its own part of each.

Owns what of the pools this rank maps. Invariants: a block is mapped here only while a table has it
that the first rank has not let go of, which holds it for all ranks; what a table has left behind is
read-only. Does not know who told it.
"""

from dataclasses import dataclass, field

import numpy as np

from allocator import PoolView
from allocator.messages import Extent, Handle
from workers.kv.block import KVBlock
from workers.kv.common import CommonMemory
from workers.kv.layout import KVLayout
from workers.kv.table import BlockTable
from workers.process.rank_messages import COMMON, PartOfStep


@dataclass(slots=True)
class _Mirrored:
    table: BlockTable
    places: list[tuple[int, int, int]] = field(default_factory=list)
    """Of each block: where it is, its offset there, and whether it is written to."""
    num_protected: int = 0


class Mirror:
    """All tables of a rank."""

    def __init__(self, layout: KVLayout, common: CommonMemory, pool: PoolView) -> None:
        """`pool` is the first one."""
        self._layout = layout
        self._common = common
        self._pools: list[PoolView] = [pool]
        self._tables: dict[int, _Mirrored] = {}

    def add_pool(self, handle: Handle) -> None:
        """The next one. Raises AllocatorError."""
        self._pools.append(PoolView(handle))

    def drop(self, tables: tuple[int, ...]) -> None:
        """The first rank has let go of their blocks."""
        for number in tables:
            mirrored = self._tables.pop(number, None)
            if mirrored is not None:
                self._let_go(mirrored)

    def table(self, part: PartOfStep) -> BlockTable:
        """As the first rank has it before the pass. Raises AllocatorError, ValueError."""
        mirrored = self._tables.get(part.table)
        if mirrored is None:
            mirrored = self._tables[part.table] = _Mirrored(BlockTable(self._layout))
        if part.first_block != len(mirrored.places):
            raise ValueError(
                f"blocks from {part.first_block} on of a table with {len(mirrored.places)}"
            )
        found = np.frombuffer(part.blocks, dtype=np.int64).reshape(-1, 3).tolist()
        blocks = [self._block(*place) for place in found]
        mirrored.table.extend(blocks)
        mirrored.places += [(space, offset, written) for space, offset, written in found]
        mirrored.table.rewind(part.num_tokens)
        self._protect(mirrored)
        return mirrored.table

    def close(self) -> None:
        """Nothing is mapped any more."""
        self._tables.clear()
        for pool in self._pools:
            pool.close()

    def _block(self, space: int, offset: int, written: int) -> KVBlock:
        if space == COMMON:
            return KVBlock(self._common.storage, offset, None)
        pool = self._pools[space - 1]
        pool.map(self._extent(offset), writable=bool(written))
        return KVBlock(pool.window(), offset, None)

    def _protect(self, mirrored: _Mirrored) -> None:
        """What is full is never written again."""
        num_full = mirrored.table.num_tokens // self._layout.block_size
        for space, offset, written in mirrored.places[mirrored.num_protected : num_full]:
            if written and space != COMMON:
                self._pools[space - 1].protect(self._extent(offset))
        mirrored.num_protected = max(mirrored.num_protected, num_full)

    def _let_go(self, mirrored: _Mirrored) -> None:
        mirrored.table.clear()
        for space, offset, _ in mirrored.places:
            if space != COMMON:
                self._pools[space - 1].unmap(self._extent(offset))

    def _extent(self, offset: int) -> Extent:
        return Extent(offset=offset, num_bytes=self._layout.block_bytes)
