"""Weights that a folder stores as levels and scales, packed as they are.

Owns the step from `expanded`'s layouts to `workers.packed_format`'s terms, and which weights can
take it. Invariants: levels stay the file's; scales of 16 bits, and what zero points make of them,
are exact, those of fp32 with zero points are rounded to fp32 once more; a weight is packed a piece
at a time, straight to where it will lie.
"""

import math
from dataclasses import dataclass
from typing import Final

import torch

from workers.checkpoint.formats.checkpoint import OnCopied
from workers.checkpoint.formats.expanded import Expanded
from workers.packed_format import ROWS, PackedFormat, pack

_WIDEST: Final = 128
"""Columns of a group, where levels lie by columns: no more of them than needed are held at once."""


def packed(one: Expanded) -> "Packed | None":
    """None where it can't be. Reads zero points, and the order of columns. Raises
    CheckpointMismatch."""
    bits = one.bits
    if bits is None:
        return None  # fp8
    _, group = one.scale_extent()
    order = one.order()
    if order is not None and not torch.equal(order, torch.arange(one.shape[1]) // group):
        return None
    if one.how.layout != "rows" and group > _WIDEST:
        group = next((width for width in (_WIDEST, 64, 32) if group % width == 0), group)
    minima = _has_zeros(one)
    if group % 32 or one.shape[1] % group or (bits == 8 and minima):
        return None
    half = one.stored[one.scales_name()].dtype == torch.float16
    return Packed(one, PackedFormat(bits, group, minima or not half, minima))


@dataclass(frozen=True)
class Packed:
    """A weight, and what it is packed as."""

    weight: Expanded
    layout: PackedFormat

    def copy(self, out: torch.Tensor, on_copied: OnCopied) -> None:
        """`out` # uint8 [num_strips, strip_bytes]. Raises CheckpointMismatch."""
        least, grid, layout = self.weight.least, self.weight.grid(), self.layout
        strips = out.view(out.shape[0], -1, layout.tile_bytes)
        pieces = self.weight.pieces(0, self.weight.shape[0], (ROWS, layout.group))
        for row, column, levels in pieces:
            num_rows, num_columns = levels.shape
            rows = grid.row_of[row : row + num_rows]
            groups = grid.column_of[column : column + num_columns : layout.group]
            scales = grid.scales[rows][:, groups]
            minima = None
            if layout.minima and grid.zero_points is not None:
                minima = (least - grid.zero_points[rows][:, groups]) * scales
            made = pack(layout, (levels - least).to(torch.uint8), scales, minima)
            tiles = made.view(made.shape[0], -1, layout.tile_bytes)
            first = column // layout.group
            strips[row // ROWS : row // ROWS + len(tiles), first : first + tiles.shape[1]] = tiles
            on_copied(tiles.numel())


def _has_zeros(one: Expanded) -> bool:
    """Whether there are zero points elsewhere than in the middle of the levels."""
    shape = one.stored[one.scales_name()].shape
    found = one.zero_points(torch.Size(shape if len(shape) == 2 else (math.prod(shape), 1)))
    middle = one.least + (1 << ((one.bits or 8) - 1))
    return found is not None and bool((found != middle).any())
