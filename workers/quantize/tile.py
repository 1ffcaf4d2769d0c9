"""What is given to whoever rounds, and what is wanted of it.

Owns the layout of a tile's buffers. Invariant: whoever rounds, the bytes are those of
`reference.py`. Does not know files.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from workers.quantize.scheme import Scheme

Bytes = np.ndarray[Any, np.dtype[np.uint8]]


@dataclass(frozen=True, slots=True)
class Tile:
    """Rows to round # [num_rows, num_columns], of a dtype as safetensors names it, and where the
    results go. A scheme without groups has one for each row."""

    scheme: Scheme
    dtype: str
    num_rows: int
    num_columns: int
    source: Bytes
    levels: Bytes
    """[num_rows, row_bytes]"""
    scales: Bytes
    """[num_rows, num_groups] of the same dtype"""
    zero_points: Bytes
    """[num_rows, num_groups] int8; empty where there are none"""

    @property
    def group_size(self) -> int:
        return self.scheme.group_size or self.num_columns

    @property
    def num_groups(self) -> int:
        return self.num_columns // self.group_size


class RowInParts(Protocol):
    """A row without groups that is given in parts, each a tile of one row that begins at a
    multiple of 256: all of them once for each of the first two steps, then for the last."""

    def fold(self, part: Tile) -> int:
        """-1, or which element of the part is no number."""

    def compare(self, part: Tile) -> None:
        """What each of the candidates loses; only where there are several."""

    def write(self, part: Tile) -> None:
        """The part's levels, and the row's scale and zero point."""


class Rounding(Protocol):
    """`name` is what a person may call it."""

    name: str

    def rows(self, tile: Tile) -> int:
        """-1, or which element of the tile is no number: what was written is of no use then."""

    def parts(self) -> RowInParts:
        """For one row."""
