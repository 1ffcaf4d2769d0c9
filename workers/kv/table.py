"""One sequence's keys and values: its blocks in order, and the tensors that are views or copies of
them.

Owns where in which block a token lies. Invariants: committed tokens are never rewritten; where they
are quantized, the section that the committed tokens end in is here as it was. Does not know where
blocks come from, and when they are shared.

    blocks     | 0: tokens 0..15 | 1: 16..31 | 2: 32..47 |
    num_tokens ───────────────────────────────► 37

Quantized, in sections of 32 tokens, the blocks of a section that is not complete yet lie beside:

    blocks     | 0: tokens 0..31 | 1: 32..63 |
    open       {1: tokens 32..63 as they are}

A pass has the open section that it begins in and the one that its last token is in.
"""

from array import array
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import torch

from workers.errors import OutOfKVMemory
from workers.kv.block import KVBlock
from workers.kv.layout import SECTION, KVLayout


class BlockTable:
    """A forward pass writes all layers of the next tokens, then calls `commit` once. Without the
    commit the pass has not happened: the next one writes to the same place."""

    def __init__(self, layout: KVLayout, blocks: Sequence[KVBlock] = (), num_tokens: int = 0):
        """`blocks` hold the first `num_tokens` tokens already."""
        self.layout = layout
        self.blocks: list[KVBlock] = []
        self._open: dict[int, list[KVBlock]] = {}
        """Section → the blocks that have it as it is."""
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

    def open_addresses(self, num_new: int) -> npt.NDArray[np.int64]:
        """Where the open sections are of which a pass over the next `num_new` tokens has the first
        and the last [2, num_open_blocks]; 0 where it begins with a section."""
        addresses = np.zeros((2, self.layout.num_open_blocks), np.int64)
        ends = (self.num_tokens // SECTION, (self.num_tokens + num_new - 1) // SECTION)
        for row, section in zip(addresses, ends, strict=True):
            if section in self._open:
                row[:] = [block.address for block in self._open[section]]
        return addresses

    def num_missing(self, num_tokens: int) -> int:
        """Blocks that are to be handed to `grow`, for as many tokens in all."""
        lacking, idle = self._open_changes(num_tokens)
        num_open = (len(lacking) - len(idle)) * self.layout.num_open_blocks
        return max(0, self.layout.num_blocks(num_tokens) - len(self.blocks) + num_open)

    def grow(self, num_tokens: int, blocks: Sequence[KVBlock]) -> list[KVBlock]:
        """Have room for `num_tokens` tokens in all, with the `blocks` that are missing. Returns
        those that are not needed any more."""
        lacking, idle = self._open_changes(num_tokens)
        left = [*blocks, *(block for section in idle for block in self._open.pop(section))]
        short = max(0, self.layout.num_blocks(num_tokens) - len(self.blocks))
        self.extend(left[:short])
        del left[:short]
        for section in lacking:
            self._open[section] = left[: self.layout.num_open_blocks]
            del left[: self.layout.num_open_blocks]
        return left

    @property
    def held(self) -> list[KVBlock]:
        """All blocks, those of open sections too."""
        return [*self.blocks, *(block for blocks in self._open.values() for block in blocks)]

    def extend(self, blocks: Sequence[KVBlock]) -> None:
        """Room for further tokens."""
        self.blocks += blocks
        self._found_runs = (0, 0, [])
        self._addresses.extend(block.address for block in blocks)

    def clear(self) -> list[KVBlock]:
        """Hold nothing any more. Returns the blocks, the caller's to release."""
        blocks, self.blocks, self._open = self.held, [], {}
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

    def _open_changes(self, num_tokens: int) -> tuple[list[int], list[int]]:
        """Sections that must be open for a pass up to so many tokens, and are not; and the other
        way round."""
        if not self.layout.num_open_blocks:
            return [], []
        needed = {max(num_tokens - 1, self.num_tokens) // SECTION}
        if self.num_tokens % SECTION:
            needed.add(self.num_tokens // SECTION)
        return sorted(needed - self._open.keys()), sorted(self._open.keys() - needed)

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
