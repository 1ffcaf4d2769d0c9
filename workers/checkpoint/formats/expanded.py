"""Weights that a folder stores as levels and scales, expanded to numbers while they are read.

Owns the layouts of compressed-tensors, fp8, GPTQ and AWQ. Invariants: a weight is read in pieces
of a bounded size and expanded straight to where it will lie; it has the value that its own library
gives it, rounded once; what does not fit together is refused by name before anything is read. Does
not know files: whoever asks hands over how tensors are read.

    compressed-tensors  weight_packed [N, K bits / 32] int32, low bits first, levels less 2^(bits-1)
                        weight_scale [N, groups]   weight_zero_point [N bits / 32, groups] int32
    fp8, int8           weight [N, K]   weight_scale or weight_scale_inv [1], [N, 1] or in blocks
    GPTQ                qweight [K bits / 32, N]   qzeros [groups, N bits / 32]   scales [groups, N]
    AWQ                 qweight [K, N bits / 32], eight levels in the order 0 2 4 6 1 3 5 7
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final, Protocol

import torch

from workers.checkpoint.formats.checkpoint import SCRATCH_BYTES, OnCopied
from workers.config.quantization import StoredLevels
from workers.errors import CheckpointMismatch, UnsupportedCheckpoint

_BEYOND_WEIGHTS: Final = (
    *(".input_scale", ".output_scale", ".input_zero_point", ".k_scale", ".v_scale", ".q_scale"),
    *(".input_global_scale", ".prob_scale"),
)
"""Of activations and caches, which are computed as they are."""
_AWQ_ORDER: Final = (0, 4, 1, 5, 2, 6, 3, 7)
"""At which place of a word each of eight columns is."""


class Stored(Protocol):
    """A tensor as it lies in a file."""

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def shape(self) -> tuple[int, ...]: ...


Read = Callable[[str, int, torch.Tensor], None]
"""Fills a tensor with elements of the stored one of that name, from that element on."""


@dataclass(frozen=True)
class Grid:
    """Scales and zero points, and which element of them each row and each column has."""

    scales: torch.Tensor  # [rows of scales, columns of scales] fp32
    zero_points: torch.Tensor | None
    row_of: torch.Tensor
    column_of: torch.Tensor

    def applied(self, levels: torch.Tensor, first_row: int, first_column: int) -> torch.Tensor:
        """Of levels [rows, columns] in fp32, whose memory is used."""
        rows = self.row_of[first_row : first_row + levels.shape[0]]
        columns = self.column_of[first_column : first_column + levels.shape[1]]
        if self.zero_points is not None:
            levels -= self.zero_points[rows][:, columns]
        levels *= self.scales[rows][:, columns]
        return levels


@dataclass(frozen=True)
class Expanded:
    """A weight [N, K] that is no tensor of the files. `parts` says which it is made of."""

    name: str
    shape: tuple[int, int]
    dtype: torch.dtype
    """The one that its scales have, where that is one for weights."""
    parts: tuple[str, ...]
    how: StoredLevels
    stored: Mapping[str, Stored]
    read: Read

    def copy(self, begin: int, out: torch.Tensor, on_copied: OnCopied) -> None:
        """Fill `out` # [elements] with elements of it, which are whole rows. Raises
        UnsupportedCheckpoint where they are not."""
        first_row, rest = divmod(begin, self.shape[1])
        if rest or out.numel() % self.shape[1]:
            raise UnsupportedCheckpoint(f"{self.name} is taken apart by columns, and is quantized")
        out = out.view(-1, self.shape[1])
        grid = self.grid()
        for row, column, levels in self.pieces(first_row, out.shape[0]):
            rows, columns = levels.shape
            target = out[row - first_row : row - first_row + rows, column : column + columns]
            target.copy_(grid.applied(levels, row, column))
            on_copied(target.numel() * out.dtype.itemsize)

    @property
    def bits(self) -> int | None:
        """Of a level, where levels are integers."""
        stored = self.stored[self.parts[0]]
        if self.how.layout != "rows":
            return self.how.num_bits
        if self.parts[0].endswith(".weight_packed"):
            return _bits_of(stored.shape[1], self.shape[1])
        return 8 if stored.dtype == torch.int8 else None

    @property
    def least(self) -> int:
        """The least that a level of so many bits can be."""
        return -(1 << ((self.bits or 8) - 1)) if self.how.layout == "rows" else 0

    def scale_extent(self) -> tuple[int, int]:
        """Of how many rows and columns a scale is, from its shape alone."""
        shape = self.stored[self.scales_name()].shape
        if self.how.layout != "rows":
            return 1, self._group_size(shape[0])
        rows, columns = self.shape
        height, width = self.how.block or (0, 0)
        if math.prod(shape) == 1:
            return rows, columns
        if height and tuple(shape) == (-(-rows // height), -(-columns // width)):
            return height, width
        return 1, self._group_size(shape[-1] if len(shape) > 1 else 1)

    def order(self) -> torch.Tensor | None:
        """Which group each column is of, where the files say it # [columns] int64"""
        name = self._part("g_idx")
        return None if name is None else self._whole(name).long()

    def _whole(self, part: str) -> torch.Tensor:
        stored = self.stored[part]
        found = torch.empty(stored.shape, dtype=stored.dtype)
        self.read(part, 0, found)
        return found

    def _part(self, ending: str) -> str | None:
        return next((one for one in self.parts if one.endswith(ending)), None)

    # --- levels

    def pieces(
        self, first: int, count: int, unit: tuple[int, int] = (1, 1)
    ) -> Iterator[tuple[int, int, torch.Tensor]]:
        """The levels of `count` rows from row `first` on, in fp32, a piece at a time, with the row
        and the column where it begins: multiples of `unit` further than `first` and 0."""
        if self.how.layout == "rows":
            return self._by_rows(first, count, unit[0])
        return self._by_columns(first, count, unit[1])

    def _by_rows(
        self, first: int, count: int, unit: int
    ) -> Iterator[tuple[int, int, torch.Tensor]]:
        columns = self.shape[1]
        name = self.parts[0]
        stored = self.stored[name]
        step = max(1, SCRATCH_BYTES // (4 * columns * unit)) * unit
        for row in range(first, first + count, step):
            rows = min(step, first + count - row)
            piece = torch.empty((rows, stored.shape[1]), dtype=stored.dtype)
            self.read(name, row * stored.shape[1], piece)
            if name.endswith(".weight_packed"):
                bits = _bits_of(stored.shape[1], columns)
                levels = _unpacked(piece, bits)[:, :columns].float() + self.least
            else:
                levels = piece.float()
            yield row, 0, levels

    def _by_columns(
        self, first: int, count: int, unit: int
    ) -> Iterator[tuple[int, int, torch.Tensor]]:
        """Rows of qweight are columns of the weight."""
        name = self.parts[0]
        stored, columns = self.stored[name], self.shape[1]
        per_word = 32 // self.how.num_bits if self.how.layout == "gptq" else 1
        unit = math.lcm(unit, per_word)
        step = max(1, SCRATCH_BYTES // (4 * self.shape[0] * unit)) * unit
        for column in range(0, columns, step):
            end = min(column + step, columns)
            words = torch.empty(
                (math.ceil((end - column) / per_word), stored.shape[1]), dtype=torch.int32
            )
            self.read(name, column // per_word * stored.shape[1], words)
            if self.how.layout == "gptq":
                levels = _unpacked(words.T.contiguous(), self.how.num_bits)[:, : end - column]
            else:
                levels = _awq_unpacked(words).T
            yield first, column, levels[first : first + count].float()

    # --- scales

    def grid(self) -> Grid:
        """Raises CheckpointMismatch."""
        height, width = self.scale_extent()
        row_of = torch.arange(self.shape[0]) // height
        order = self.order()
        column_of = torch.arange(self.shape[1]) // width if order is None else order
        scales = self._whole(self.scales_name()).float()
        if self.how.layout != "rows":
            scales = scales.T.contiguous()
        elif scales.dim() < 2:
            scales = scales.view(-1, 1)
        return self._fitting(Grid(scales, self.zero_points(scales.shape), row_of, column_of))

    def scales_name(self) -> str:
        """Raises CheckpointMismatch where there are none."""
        if self.how.layout == "rows":
            return self._named((".weight_scale", ".weight_scale_inv"))
        return self._named((".scales",))

    def zero_points(self, shape: torch.Size) -> torch.Tensor | None:
        """As many as scales are # [rows of scales, columns of scales] fp32"""
        if self.how.layout == "rows":
            zero = self._part(".weight_zero_point")
            return None if zero is None else self._zero_points_of_rows(zero, shape)
        zeros = self._whole(self._named((".qzeros",)))
        if self.how.layout == "gptq":
            levels = _unpacked(zeros, self.how.num_bits).float() + self.how.zero_is_one_less
        else:
            levels = _awq_unpacked(zeros).float()
        return levels.T.contiguous()

    def _zero_points_of_rows(self, name: str, shape: torch.Size) -> torch.Tensor:
        found = self._whole(name)
        if found.dtype != torch.int32 or not self.parts[0].endswith(".weight_packed"):
            if found.numel() != shape.numel():
                raise self._unfitting(list(shape))
            return found.float().view(shape)
        bits = _bits_of(self.stored[self.parts[0]].shape[1], self.shape[1])
        levels = _unpacked(found.T.contiguous(), bits)[:, : shape[0]]
        return levels.T.float() - (1 << (bits - 1))

    def _group_size(self, num_groups: int) -> int:
        """Of groups that are equally large, or of a whole row where an order says which is
        whose."""
        columns = self.shape[1]
        if num_groups and columns % num_groups == 0:
            return columns // num_groups
        if self._part("g_idx") is None:
            raise CheckpointMismatch(
                f"{self.name} has {columns} columns, which are no {num_groups} groups of a size"
            )
        return columns

    def _named(self, endings: tuple[str, ...]) -> str:
        for ending in endings:
            if (found := self._part(ending)) is not None:
                return found
        raise CheckpointMismatch(f"{self.name} has no {' or '.join(endings)} beside its levels")

    def _fitting(self, grid: Grid) -> Grid:
        """Raises CheckpointMismatch, so that no index reaches beyond the scales."""
        down, across = grid.scales.shape[0], grid.scales.shape[-1]
        fits = (
            grid.scales.dim() == 2
            and grid.row_of.shape[0] == self.shape[0]
            and grid.column_of.shape[0] == self.shape[1]
            and 0 <= int(grid.row_of.min()) <= int(grid.row_of.max()) < down
            and 0 <= int(grid.column_of.min()) <= int(grid.column_of.max()) < across
            and (grid.zero_points is None or grid.zero_points.shape == grid.scales.shape)
        )
        if not fits:
            raise self._unfitting([down, across])
        return grid

    def _unfitting(self, scales: list[int]) -> CheckpointMismatch:
        return CheckpointMismatch(
            f"{self.name} {list(self.shape)} does not fit its scales {scales}: "
            "download the model again"
        )


def expand(
    stored: Mapping[str, Stored], how: StoredLevels, read: Read
) -> tuple[dict[str, Expanded], set[str]]:
    """The weights that can be had, by the names that they would have whole, and the names of all
    tensors that they are made of or that nothing here computes with. Raises CheckpointMismatch,
    UnsupportedCheckpoint."""
    found: dict[str, Expanded] = {}
    used = {name for name in stored if name.endswith(_BEYOND_WEIGHTS)}
    for name in stored:
        module, _, ending = name.rpartition(".")
        if ending not in ("weight_packed", "weight", "qweight"):
            continue
        endings = _ENDINGS[ending]
        parts = tuple(part for end in endings if (part := f"{module}.{end}") in stored)
        if ending == "weight":
            if not _is_coarse(stored[name].dtype):
                continue
            if len(parts) == 1:
                raise CheckpointMismatch(f"{name} is stored in 8 bits, without a scale")
        elif (ending == "qweight") != (how.layout != "rows"):
            raise UnsupportedCheckpoint(f"{name} is not stored as {how.told} is")
        one = _expanded(f"{module}.weight", parts, how, stored, read)
        found[one.name] = one
        used |= set(parts)
    return found, used


_ENDINGS: Final[Mapping[str, tuple[str, ...]]] = {
    "weight_packed": (
        *("weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx"),
    ),
    "weight": ("weight", "weight_scale", "weight_scale_inv", "weight_zero_point"),
    "qweight": ("qweight", "qzeros", "scales", "g_idx"),
}
"""The first holds the levels."""


def _is_coarse(dtype: torch.dtype) -> bool:
    return dtype in (torch.int8, torch.float8_e4m3fn, torch.float8_e5m2)


def _expanded(
    name: str, parts: tuple[str, ...], how: StoredLevels, stored: Mapping[str, Stored], read: Read
) -> Expanded:
    levels = stored[parts[0]]
    if len(levels.shape) != 2:
        raise UnsupportedCheckpoint(
            f"{parts[0]} {list(levels.shape)} is no matrix: levels of more dimensions are not read"
        )
    scale = next(
        (part for part in parts if part.endswith(("_scale", "_scale_inv", ".scales"))), None
    )
    dtype = stored[scale].dtype if scale is not None else torch.bfloat16
    if dtype.itemsize != 2:
        dtype = torch.bfloat16
    one = Expanded(name, _shape(parts, how, stored, read), dtype, parts, how, stored, read)
    expected = _levels_shape(one)
    if levels.shape != expected or not _dtype_fits(parts[0], levels.dtype):
        raise CheckpointMismatch(
            f"{parts[0]} is {list(levels.shape)} {levels.dtype}, and for {list(one.shape)} it "
            f"would be {list(expected)}: download the model again"
        )
    return one


def _shape(
    parts: tuple[str, ...], how: StoredLevels, stored: Mapping[str, Stored], read: Read
) -> tuple[int, int]:
    rows, columns = stored[parts[0]].shape
    if how.layout == "gptq":
        return columns, rows * 32 // how.num_bits
    if how.layout == "awq":
        return columns * 32 // how.num_bits, rows
    said = next((part for part in parts if part.endswith(".weight_shape")), None)
    if not parts[0].endswith(".weight_packed"):
        return rows, columns
    if said is None or stored[said].shape != (2,):
        raise CheckpointMismatch(f"{parts[0]} has no weight_shape of two numbers beside it")
    lengths = torch.empty(2, dtype=stored[said].dtype)
    read(said, 0, lengths)
    return int(lengths[0]), int(lengths[1])


def _levels_shape(one: Expanded) -> tuple[int, int]:
    """What the levels of such a weight take."""
    rows, columns = one.shape
    words = one.stored[one.parts[0]].shape
    if one.parts[0].endswith(".weight_packed"):
        bits = _bits_of(words[1], columns)
        return rows, math.ceil(columns * bits / 32)
    return (words[0], words[1])


def _dtype_fits(name: str, dtype: torch.dtype) -> bool:
    return dtype == torch.int32 if not name.endswith(".weight") else _is_coarse(dtype)


def _bits_of(num_words: int, num_columns: int) -> int:
    """Of a level, by how many words a row has. Raises UnsupportedCheckpoint."""
    for bits in (4, 8):
        if num_columns > 0 and math.ceil(num_columns * bits / 32) == num_words:
            return bits
    raise UnsupportedCheckpoint(
        f"{num_columns} levels in {num_words} words are neither of 4 bits nor of 8"
    )


def _unpacked(words: torch.Tensor, bits: int) -> torch.Tensor:
    """Levels of int32 words # [rows, words], low bits first, as uint8."""
    as_bytes = words.reshape(-1).view(torch.uint8).view(words.shape[0], -1)
    if bits == 8:
        return as_bytes
    return torch.stack((as_bytes & 15, as_bytes >> 4), dim=-1).view(as_bytes.shape[0], -1)


def _awq_unpacked(words: torch.Tensor) -> torch.Tensor:
    levels = _unpacked(words, 4).view(words.shape[0], -1, 8)
    found: Any = levels[:, :, list(_AWQ_ORDER)]
    return torch.as_tensor(found.reshape(words.shape[0], -1))
