"""One sequence's keys and values: its blocks in order, and the tensors that are views or copies of
them.

Owns where in which block a token lies. Invariant: committed tokens are never rewritten. Does not
know where blocks come from, and when they are shared.

    blocks     | 0: tokens 0..15 | 1: 16..31 | 2: 32..47 |
    num_tokens ───────────────────────────────► 37
"""

from array import array
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import torch

from workers.errors import OutOfKVMemory
from workers.kv.block import KVBlock
from workers.kv.layout import KVLayout


class BlockTable:
    """A forward pass writes all layers of the next tokens, then calls `commit` once. Without the
    commit the pass has not happened: the next one writes to the same place."""

    def __init__(self, layout: KVLayout, blocks: Sequence[KVBlock] = (), num_tokens: int = 0):
        """`blocks` hold the first `num_tokens` tokens already."""
        self.layout = layout
        self.blocks: list[KVBlock] = []
        self._addresses = array("q")
        self._found_runs: tuple[int, int, list[tuple[int, int, int]]] = (0, 0, [])
        """What `_runs` found last: all layers of a pass read the same blocks."""
        self.extend(blocks)
        self.num_tokens = num_tokens
        """Tokens whose keys and values are here, in every layer."""

    @property
    def addresses(self) -> npt.NDArray[np.int64]:
        """Where each block begins [num_blocks]; to be dropped before the table grows."""
        return np.frombuffer(self._addresses, dtype=np.int64)

    def extend(self, blocks: Sequence[KVBlock]) -> None:
        """Room for further tokens."""
        self.blocks += blocks
        self._found_runs = (0, 0, [])
        self._addresses.extend(block.address for block in blocks)

    def clear(self) -> list[KVBlock]:
        """Hold nothing any more. Returns the blocks, the caller's to release."""
        blocks, self.blocks = self.blocks, []
        self._addresses = array("q")
        self._found_runs = (0, 0, [])
        self.num_tokens = 0
        return blocks

    @property
    def capacity(self) -> int:
        """Tokens that the blocks have room for."""
        return len(self.blocks) * self.layout.block_size

    def write(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Put `keys` and `values` [1, num_heads, num_new, head_dim] behind the committed ones.
        Raises `OutOfKVMemory` beyond the capacity."""
        end = self.num_tokens + keys.shape[2]
        if end > self.capacity:
            raise OutOfKVMemory(f"{end} tokens do not fit into blocks for {self.capacity}")
        self._write(layer, 0, keys[0])
        self._write(layer, 1, values[0])

    def read(self, layer: int, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Copies of the keys and values of the tokens [start, stop), committed or just written,
        each [1, num_heads, stop - start, head_dim]."""
        first = start // self.layout.block_size
        parts = [
            self._planes(layer, begin, count, step).permute(0, 2, 1, 3, 4).flatten(2, 3)
            for begin, count, step in self._runs(first, self.layout.num_blocks(stop))
        ]
        both = parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)
        skipped = first * self.layout.block_size
        keys, values = both[:, None, :, start - skipped : stop - skipped].unbind()
        return keys, values

    def commit(self, num_new: int) -> None:
        """Every layer has `num_new` more tokens: they now belong to the sequence."""
        self.num_tokens += num_new

    def rewind(self, num_tokens: int) -> None:
        """Only the first `num_tokens` tokens belong to the sequence: those behind were a trial."""
        self.num_tokens = num_tokens

    def _write(self, layer: int, which: int, rows: torch.Tensor) -> None:
        """`rows` [num_heads, num_new, head_dim] go behind the committed tokens."""
        size = self.layout.block_size
        done, position = 0, self.num_tokens
        while done < rows.shape[1]:
            block, inside = divmod(position, size)
            count = min(size - inside, rows.shape[1] - done)
            run = self._planes(layer, block, 1, 0)[which, 0]
            run[:, inside : inside + count] = rows[:, done : done + count]
            done, position = done + count, position + count

    def _planes(self, layer: int, first: int, count: int, step: int) -> torch.Tensor:
        """Keys and values of `count` blocks that begin `step` bytes behind one another, as a view
        [2, count, num_heads, block_size, head_dim]."""
        layout, shape = self.layout, self.layout.layers[layer]
        block, size = self.blocks[first], self.layout.block_size
        itemsize = layout.dtype.itemsize
        return torch.as_strided(
            block.storage.view(layout.dtype),
            (2, count, shape.num_heads, size, shape.head_dim),
            (
                shape.num_heads * size * shape.head_dim,
                step // itemsize,
                size * shape.head_dim,
                shape.head_dim,
                1,
            ),
            (block.offset + layout.layer_offsets[layer]) // itemsize,
        )

    def _runs(self, first: int, end: int) -> list[tuple[int, int, int]]:
        """(first, count, step) of blocks [first, end) that begin `step` bytes behind one another:
        most do, for they are leased so."""
        found_first, found_end, found = self._found_runs
        if (found_first, found_end) != (first, end):
            found = list(self._find_runs(first, end))
            self._found_runs = (first, end, found)
        return found

    def _find_runs(self, first: int, end: int) -> Iterator[tuple[int, int, int]]:
        while first < end:
            before, index, step = self.blocks[first], first + 1, 0
            while index < end:
                block = self.blocks[index]
                distance = block.offset - before.offset
                if block.storage is not before.storage or distance <= 0:
                    break
                if step not in (0, distance):
                    break
                before, index, step = block, index + 1, distance
            yield first, index - first, step
            first = index
