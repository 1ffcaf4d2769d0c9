"""How keys and values lie in a block: the sizes and offsets that everything else counts with.

    one block, `block_size` tokens of every layer:

    | layer 0                                   | layer 1 ...
    | keys   [num_heads, block_size, head_dim]  |
    | values [num_heads, block_size, head_dim]  |
    ^ layer_offsets[0], a multiple of 64 bytes  ^ layer_offsets[1]

    of an instance of several ranks, which keep other heads of each layer:

    | rank 0: layer 0, layer 1 ... | rank 1: layer 0, layer 1 ... |
                                   ^ layer_offsets[0] of rank 1

Pure numbers. Knows nothing of memory, sequences or models.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Final

import torch

BLOCK_SIZE: Final = 16
"""Tokens of a block. Fewer waste less at a sequence's end, more cost less to find and to lease."""

_LAYER_ALIGNMENT: Final = 64
_GRANULE: Final = 64 << 10
"""What host memory is leased in, so that what is counted here is what is held there."""
_GRANULES: Final = {"cuda": 2 << 20}
"""The same of other devices. So much for 16 tokens would be mostly waste for a small model."""
_MOST_TOKENS: Final = 128
"""Of a block: a prefix is found by whole blocks."""


@dataclass(frozen=True, slots=True)
class KVLayer:
    """What one layer keeps of a token: `num_heads` keys and as many values of `head_dim`."""

    num_heads: int
    head_dim: int


@dataclass(frozen=True)
class KVLayout:
    """What all layers keep of `block_size` tokens, on this rank."""

    layers: tuple[KVLayer, ...]
    dtype: torch.dtype
    block_size: int = BLOCK_SIZE
    granule: int = _GRANULE
    of_ranks: tuple[tuple[KVLayer, ...], ...] = ()
    """The layers of each rank, this one's among them; () where there is one."""
    rank: int = 0

    @classmethod
    def on(
        cls,
        device: torch.device,
        layers: tuple[KVLayer, ...],
        dtype: torch.dtype,
        of_ranks: tuple[tuple[KVLayer, ...], ...] = (),
        rank: int = 0,
    ) -> "KVLayout":
        """For a device whose memory comes in such pieces: as many tokens as a piece holds, in
        multiples of `BLOCK_SIZE`."""
        granule = _GRANULES.get(device.type, 0)
        least = cls(layers, dtype, granule=1, of_ranks=of_ranks, rank=rank)
        fits = min(granule // least.block_bytes, _MOST_TOKENS // BLOCK_SIZE)
        size = BLOCK_SIZE * max(1, fits)
        return cls(layers, dtype, size, granule or _GRANULE, of_ranks, rank)

    @property
    def all_layers(self) -> tuple[tuple[KVLayer, ...], ...]:
        """Of each rank: what a block's bytes depend on, beside the dtype and its size."""
        return self.of_ranks or (self.layers,)

    @cached_property
    def bytes_per_token(self) -> int:
        """Bytes that one more token adds in the long run, on all ranks."""
        itemsize = self.dtype.itemsize
        layers = (layer for layers in self.all_layers for layer in layers)
        return sum(2 * layer.num_heads * layer.head_dim * itemsize for layer in layers)

    @cached_property
    def layer_offsets(self) -> tuple[int, ...]:
        """Where in a block each layer's keys begin, in bytes. Its values follow at once."""
        begin = sum(self._part_bytes(layers) for layers in self.of_ranks[: self.rank])
        return tuple(begin + offset for offset in self._offsets(self.layers)[:-1])

    @cached_property
    def block_bytes(self) -> int:
        """Bytes of a block, all ranks' parts of it, in whole granules of the pool: each is leased
        on its own."""
        return _up(sum(map(self._part_bytes, self.all_layers)), self.granule)

    def plane_bytes(self, layer: KVLayer) -> int:
        """Bytes of a block's keys, or values, of one layer."""
        return layer.num_heads * self.block_size * layer.head_dim * self.dtype.itemsize

    def num_blocks(self, num_tokens: int) -> int:
        """Blocks that so many tokens take."""
        return -(-num_tokens // self.block_size)

    def num_bytes(self, num_tokens: int) -> int:
        """Bytes of the blocks that so many tokens take."""
        return self.num_blocks(num_tokens) * self.block_bytes

    def _part_bytes(self, layers: tuple[KVLayer, ...]) -> int:
        return self._offsets(layers)[-1]

    def _offsets(self, layers: tuple[KVLayer, ...]) -> list[int]:
        """Where in its part each begins, and the part's end."""
        offsets = [0]
        for layer in layers:
            offsets.append(_up(offsets[-1] + 2 * self.plane_bytes(layer), _LAYER_ALIGNMENT))
        return offsets


def _up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
