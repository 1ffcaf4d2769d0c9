"""Weights of 8 and 4 bits as they lie in memory for the kernels, and their numbers.

Owns the layout that packed.h describes, on this side: how many bytes a matrix takes, how it is made
of integers and scales, and what it says. Invariant: one layout for all instruction sets, in whole
strips of 16 rows, so that a matrix can be written some strips at a time.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import torch

ROWS: Final = 16
"""Of a strip."""
METADATA: Final = "packed"
"""Where a weight set says which of its tensors are packed, and how."""


@dataclass(frozen=True, slots=True)
class PackedFormat:
    """Weights are `scale * integer + minimum` or, without `minima`, `scale * (integer -
    2**(bits - 1))`. `group` columns of a row have a scale in common: 16, 32, or a multiple of 32;
    16 only of 8 bits without minima. Integers beside minima are less than 128. `wide` scales are
    fp32, others fp16."""

    bits: int
    group: int
    wide: bool
    minima: bool

    @classmethod
    def of(cls, number: int) -> "PackedFormat":
        """That of which packed.h has this number."""
        return cls(number & 15, number >> 8, bool(number & 16), bool(number & 32))

    @property
    def number(self) -> int:
        """packed.h's, which tells it from every other and from bf16's 0."""
        return self.bits | self.wide << 4 | self.minima << 5 | self.group << 8

    @property
    def scale_dtype(self) -> torch.dtype:
        """Of scales and minima."""
        return torch.float32 if self.wide else torch.float16

    @property
    def integer_bytes(self) -> int:
        """Of a tile."""
        return self.group * ROWS * self.bits // 8

    @property
    def tile_bytes(self) -> int:
        """Of `group` columns of a strip."""
        return self.integer_bytes + ROWS * self.scale_dtype.itemsize * (1 + self.minima)

    def shape(self, num_rows: int, width: int) -> tuple[int, int]:
        """Of the uint8 tensor that holds such a matrix: a strip a row. The width is a multiple of
        the group."""
        return -(-num_rows // ROWS), width // self.group * self.tile_bytes

    def column_granule(self, width: int) -> int:
        """Columns of a matrix of that width are cut at multiples of it: between tiles, or where a
        row is one tile, within it; and between those that activations are rounded together, so
        that a part of a sum is the same whoever computes it."""
        return 32 if self.group == width else math.lcm(self.group, 32)

    def rows(self, packed: torch.Tensor, begin: int, end: int) -> torch.Tensor:
        """A view of rows [begin, end) of such a matrix; `begin` is a multiple of 16."""
        return packed[begin // ROWS : -(-end // ROWS)]

    def columns(self, packed: torch.Tensor, begin: int, end: int) -> torch.Tensor:
        """A view of the tiles that have columns [begin, end): these alone, or one that has more."""
        tile_bytes = self.tile_bytes
        return packed[:, begin // self.group * tile_bytes : -(-end // self.group) * tile_bytes]

    def first_column(self, begin: int, end: int) -> int | None:
        """Where columns [begin, end) begin in the one tile of which they are a part; None where
        they are whole tiles."""
        is_whole = begin % self.group == end % self.group == 0
        return None if is_whole else begin % self.group


def pack(
    layout: PackedFormat,
    integers: torch.Tensor,
    scales: torch.Tensor,
    minima: torch.Tensor | None = None,
) -> torch.Tensor:
    """uint8 # [num_strips, strip_bytes] of uint8 `integers` # [num_rows, width], as they are stored
    (those without minima with half of the range added), and `scales` # [num_rows, width / group],
    with `minima` of the same shape where the format has them. Rows up to the strip's end are 0."""
    num_rows, width = integers.shape
    strips, _ = layout.shape(num_rows, width)
    tiles, parts = width // layout.group, max(layout.group // 32, 1)
    padding = (0, 0, 0, strips * ROWS - num_rows)
    rows = torch.nn.functional.pad(integers, padding).view(strips, ROWS, tiles, layout.group)
    if layout.bits == 8:
        lines = rows.view(strips, ROWS, tiles, layout.group // 4, 4)
    else:
        halves = rows.view(strips, ROWS, tiles, parts, 2, 16)
        lines = halves[..., 0, :] | halves[..., 1, :] << 4
        lines = lines.reshape(strips, ROWS, tiles, parts * 4, 4)
    stored = [lines.permute(0, 2, 3, 1, 4).reshape(strips, tiles, -1)]
    for numbers in (scales,) if minima is None else (scales, minima):
        padded = torch.nn.functional.pad(numbers.to(layout.scale_dtype), padding)
        lanes = padded.view(strips, ROWS, tiles).transpose(1, 2).contiguous()
        stored.append(lanes.view(torch.uint8))
    return torch.cat(stored, dim=2).view(strips, -1)


def unpack(layout: PackedFormat, packed: torch.Tensor) -> torch.Tensor:
    """The weights, fp32 # [16 * num_strips, width], of strips # [num_strips, strip_bytes]."""
    strips, tiles = packed.shape[0], packed.shape[1] // layout.tile_bytes
    content = packed.view(strips, tiles, layout.tile_bytes)
    lines = content[..., : layout.integer_bytes].reshape(strips, tiles, -1, ROWS, 4)
    rows = lines.permute(0, 3, 1, 2, 4)  # [strips, ROWS, tiles, lines, 4]
    if layout.bits == 4:
        parts = rows.reshape(strips, ROWS, tiles, layout.group // 32, 16)
        rows = torch.stack((parts & 15, parts >> 4), dim=4)
    integers = rows.reshape(strips * ROWS, tiles, layout.group).float()
    numbers = content[..., layout.integer_bytes :].contiguous().view(layout.scale_dtype).float()
    scales = numbers[..., :ROWS].transpose(1, 2).reshape(strips * ROWS, tiles, 1)
    if layout.minima:
        minima = numbers[..., ROWS:].transpose(1, 2).reshape(strips * ROWS, tiles, 1)
        weights = scales * integers + minima
    else:
        weights = scales * (integers - 2 ** (layout.bits - 1))
    return weights.reshape(strips * ROWS, -1)


def encoded(formats: Mapping[str, PackedFormat]) -> str:
    """For a weight set's metadata: by format the tensors that are packed so."""
    names: dict[str, list[str]] = {}
    for name, layout in formats.items():
        names.setdefault(str(layout.number), []).append(name)
    return json.dumps(names)


def decoded(metadata: Mapping[str, str]) -> dict[str, PackedFormat]:
    """By tensor, of a weight set's metadata; empty where none is packed."""
    said = json.loads(metadata.get(METADATA, "{}"))
    return {name: PackedFormat.of(int(number)) for number, all_ in said.items() for name in all_}
