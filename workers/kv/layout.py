"""How keys and values lie in a block: the sizes and offsets that everything else counts with.

    one block, `block_size` tokens of every layer:

    | layer 0                                   | layer 1 ...
    | keys   [num_heads, block_size, head_dim]  |
    | values [num_heads, block_size, head_dim]  |
    ^ layer_offsets[0], a multiple of 64 bytes  ^ layer_offsets[1]

    of an instance of several ranks, which keep other heads of each layer:

    | rank 0: layer 0, layer 1 ... | rank 1: layer 0, layer 1 ... |
                                   ^ layer_offsets[0] of rank 1

Where they are quantized, a layer is its sections, of `SECTION` tokens each, one after the other, in
the order that `workers/model/native/sections.h` says: here is how many bytes one takes. The section
that a sequence has not completed is kept as it is in other blocks of the same size: `open_places`.

Pure numbers. Knows nothing of memory, sequences or models.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Final

import torch

BLOCK_SIZE: Final = 16
"""Tokens of a block. Fewer waste less at a sequence's end, more cost less to find and to lease."""

SECTION: Final = 32
"""Tokens that are quantized together."""
FULL: Final = 16
"""Bits of what is not quantized."""

_LAYER_ALIGNMENT: Final = 64
_GRANULE: Final = 64 << 10
"""What host memory is leased in, so that what is counted here is what is held there."""
_GRANULES: Final = {"cuda": 2 << 20}
"""The same of other devices. So much for 16 tokens would be mostly waste for a small model."""
_MOST_TOKENS: Final = 128
"""Of a block: a prefix is found by whole blocks."""
_PART: Final = 64
"""Elements of a value of 4 bits that have a scale of their own, about."""
_WASTE: Final = 1.1
"""How much more a token may take than in larger blocks."""


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
    bits: int = FULL
    """8 or 4 where keys and values are quantized."""

    @classmethod
    def on(
        cls,
        device: torch.device,
        layers: tuple[KVLayer, ...],
        dtype: torch.dtype,
        of_ranks: tuple[tuple[KVLayer, ...], ...] = (),
        rank: int = 0,
        bits: int = FULL,
    ) -> "KVLayout":
        """For a device whose memory comes in such pieces: as many tokens as a piece holds, in
        multiples of `BLOCK_SIZE`. Of quantized ones as few as waste little of the pieces, in
        multiples of `SECTION`."""
        granule = _GRANULES.get(device.type, 0)
        if bits != FULL:
            sizes = [
                cls(layers, dtype, size, granule or _GRANULE, of_ranks, rank, bits)
                for size in range(SECTION, _MOST_TOKENS + 1, SECTION)
            ]
            fitting = [one for one in sizes if one._holds_open_layers] or sizes[-1:]
            least_bytes = min(one.block_bytes / one.block_size for one in fitting)
            return next(
                one for one in fitting if one.block_bytes <= _WASTE * least_bytes * one.block_size
            )
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
        layers = (layer for layers in self.all_layers for layer in layers)
        return sum(map(self.layer_bytes, layers)) // self.block_size

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

    def layer_bytes(self, layer: KVLayer) -> int:
        """Bytes of a block's keys and values of one layer."""
        if self.bits == FULL:
            return self._full_bytes(layer, self.block_size)
        return self.block_size // SECTION * layer.num_heads * self._section_bytes(layer.head_dim)

    def num_blocks(self, num_tokens: int) -> int:
        """Blocks that so many tokens take."""
        return -(-num_tokens // self.block_size)

    def num_bytes(self, num_tokens: int) -> int:
        """Bytes of the blocks that so many tokens of a sequence take at most."""
        most_open = min(2, -(-num_tokens // SECTION)) * self.num_open_blocks
        return (self.num_blocks(num_tokens) + most_open) * self.block_bytes

    # --- open sections

    @cached_property
    def open_places(self) -> tuple[tuple[int, int], ...]:
        """Of each layer: in which of an open section's blocks it is, and where in it."""
        before = sum(len(layers) for layers in self.of_ranks[: self.rank])
        return self._all_open_places[before : before + len(self.layers)]

    @cached_property
    def num_open_blocks(self) -> int:
        """Blocks of a section that is not quantized yet; 0 where none ever is."""
        return self._all_open_places[-1][0] + 1 if self._all_open_places else 0

    @cached_property
    def _all_open_places(self) -> tuple[tuple[int, int], ...]:
        places: list[tuple[int, int]] = []
        index = end = 0
        for layer in self._quantized_layers:
            num_bytes = _up(self._full_bytes(layer, SECTION), _LAYER_ALIGNMENT)
            if end + num_bytes > self.block_bytes:
                index, end = index + 1, 0
            places.append((index, end))
            end += num_bytes
        return tuple(places)

    @property
    def _quantized_layers(self) -> tuple[KVLayer, ...]:
        if self.bits == FULL:
            return ()
        return tuple(layer for layers in self.all_layers for layer in layers)

    @property
    def _holds_open_layers(self) -> bool:
        """Whether a block has room for any layer's open section."""
        return all(
            self._full_bytes(layer, SECTION) <= self.block_bytes for layer in self._quantized_layers
        )

    # --- bytes

    def _full_bytes(self, layer: KVLayer, num_tokens: int) -> int:
        return 2 * layer.num_heads * num_tokens * layer.head_dim * self.dtype.itemsize

    def _section_bytes(self, head_dim: int) -> int:
        """Of one head: integers of keys and values, and their scales."""
        num_scales = 2 * SECTION
        if self.bits == 4:
            num_scales = 2 * head_dim + 2 * SECTION * max(1, head_dim // _PART)
        return _up(2 * SECTION * head_dim * self.bits // 8 + 2 * num_scales, _LAYER_ALIGNMENT)

    def _part_bytes(self, layers: tuple[KVLayer, ...]) -> int:
        return self._offsets(layers)[-1]

    def _offsets(self, layers: tuple[KVLayer, ...]) -> list[int]:
        """Where in its part each begins, and the part's end."""
        offsets = [0]
        for layer in layers:
            offsets.append(_up(offsets[-1] + self.layer_bytes(layer), _LAYER_ALIGNMENT))
        return offsets


def _up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
