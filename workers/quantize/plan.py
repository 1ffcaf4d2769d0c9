"""What is written where: which pieces of which tensors, and the bytes that they become. Pure.

Owns offsets in the output and the cut into units. Invariants: a unit needs nothing of another; its
extents are its own, so units can be done in any order, by anybody, again; which units there are
follows from the checkpoint's tensors, the scheme and the size of a piece alone. A unit reads at
most a piece of its tensor at a time, and one tensor's units cover it once.

    rounded, rows fit     [first row, last row)       whole rows, as many as fit
    in groups, wide rows  [row, column .. column)     of as many rows as a word of zero points has
    by rows, wide rows    [first row, last row)       of as many rows; each is read in parts
    kept                  [first byte, last byte)
"""

import math
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Final

import msgspec

from workers.config.safetensors_file import ITEM_BYTES
from workers.quantize.scheme import Scheme

Shape = tuple[int, ...]

MAX_SHARD_BYTES: Final = 5_000_000_000
_HEADER_ALIGNMENT: Final = 8
_PART_COLUMNS: Final = 256
"""Parts of a row begin at multiples of it (see `RowInParts`)."""


@dataclass(frozen=True, slots=True)
class Input:
    """A tensor as its source has it."""

    name: str
    dtype: str
    shape: Shape

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


@dataclass(frozen=True, slots=True)
class Output:
    """A tensor in an output file: bytes [begin, begin + num_bytes) of it."""

    name: str
    dtype: str
    shape: Shape
    file: int
    begin: int

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


@dataclass(frozen=True, slots=True)
class Extent:
    """Bytes [begin, begin + num_bytes) of an output file."""

    file: int
    begin: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class Unit:
    """Rows [first_row, last_row), columns [first_column, last_column) of a tensor that is rounded;
    of one that is kept, bytes in place of columns, and one row."""

    tensor: int
    first_row: int
    last_row: int
    first_column: int
    last_column: int

    @property
    def num_rows(self) -> int:
        return self.last_row - self.first_row

    @property
    def num_columns(self) -> int:
        return self.last_column - self.first_column


@dataclass(frozen=True, slots=True)
class Rounded:
    """A tensor that is rounded, and its parts."""

    source: Input
    levels: Output
    scales: Output
    zero_points: Output | None


@dataclass(frozen=True, slots=True)
class Kept:
    """A tensor that is written as it is."""

    source: Input
    output: Output


@dataclass(frozen=True)
class Shapes:
    """`weight_shape`, which is written with a file's header."""

    output: Output
    value: Shape


class Plan:
    """Of a whole checkpoint."""

    def __init__(self, inputs: Sequence[tuple[Input, bool]], scheme: Scheme, piece_bytes: int):
        """Which tensors there are, and whether each is rounded."""
        self.scheme = scheme
        self.piece_bytes = piece_bytes
        layout = _Layout(
            [_outputs(one, scheme) if rounds else [_kept(one)] for one, rounds in inputs]
        )
        self.files = layout.files
        """Their sizes, headers included."""
        self.headers = layout.headers
        self.shapes: list[Shapes] = []
        self.tensors: list[Rounded | Kept] = []
        for number, (one, rounds) in enumerate(inputs):
            placed = layout.placed[number]
            if not rounds:
                self.tensors.append(Kept(one, placed[0]))
                continue
            levels, scales = placed[:2]
            zero_points = None if scheme.symmetric else placed[2]
            self.tensors.append(Rounded(one, levels, scales, zero_points))
            if scheme.is_packed:
                self.shapes.append(Shapes(placed[-1], one.shape))
        self._ends = list(accumulate(self._num_units(one) for one in self.tensors))

    @property
    def num_units(self) -> int:
        return self._ends[-1] if self._ends else 0

    @property
    def source_bytes(self) -> int:
        return sum(one.source.num_bytes for one in self.tensors)

    def outputs(self) -> Iterator[Output]:
        """All tensors of the output."""
        for one in self.tensors:
            if isinstance(one, Kept):
                yield one.output
            else:
                yield from (one.levels, one.scales)
                if one.zero_points is not None:
                    yield one.zero_points
        for shape in self.shapes:
            yield shape.output

    @property
    def unit_output_bytes(self) -> int:
        """What all units write."""
        shapes = sum(one.output.num_bytes for one in self.shapes)
        return sum(one.num_bytes for one in self.outputs()) - shapes

    def unit(self, number: int) -> Unit:
        """Which part of which tensor."""
        tensor = bisect_right(self._ends, number)
        index = number - (self._ends[tensor - 1] if tensor else 0)
        one = self.tensors[tensor]
        if isinstance(one, Kept):
            begin = index * self.piece_bytes
            return Unit(tensor, 0, 1, begin, min(begin + self.piece_bytes, one.source.num_bytes))
        rows, columns = one.source.shape
        step_rows, step_columns = self._steps(one.source)
        down, across = divmod(index, math.ceil(columns / step_columns))
        first_row, first_column = down * step_rows, across * step_columns
        return Unit(
            tensor,
            first_row,
            min(first_row + step_rows, rows),
            first_column,
            min(first_column + step_columns, columns),
        )

    def unit_bytes(self, unit: Unit) -> int:
        """What it reads of its source."""
        one = self.tensors[unit.tensor]
        item_bytes = 1 if isinstance(one, Kept) else ITEM_BYTES[one.source.dtype]
        return unit.num_rows * unit.num_columns * item_bytes

    def is_in_parts(self, unit: Unit) -> bool:
        """Whether its rows have one scale each, and do not fit into a piece."""
        one = self.tensors[unit.tensor]
        if isinstance(one, Kept) or self.scheme.group_size is not None:
            return False
        return unit.num_rows * self._row_bytes(one.source) > self.piece_bytes

    def part_columns(self, unit: Unit) -> int:
        """Of a row that is in parts, how many are read at a time."""
        item_bytes = ITEM_BYTES[self.tensors[unit.tensor].source.dtype]
        return max(1, self.piece_bytes // item_bytes // _PART_COLUMNS) * _PART_COLUMNS

    def extents(self, unit: Unit) -> Iterator[Extent]:
        """What it writes, in the order in which it is digested: levels, scales, zero points."""
        one = self.tensors[unit.tensor]
        if isinstance(one, Kept):
            yield Extent(one.output.file, one.output.begin + unit.first_column, unit.num_columns)
            return
        per_byte = one.source.shape[1], self.scheme.row_bytes(one.source.shape[1])
        begin = self._level_bytes(unit.first_column, *per_byte)
        end = self._level_bytes(unit.last_column, *per_byte)
        yield from _rows(one.levels, unit.first_row, unit.last_row, begin, end, per_byte[1])
        first, last = self._groups(unit)
        width = one.scales.shape[1]
        item_bytes = ITEM_BYTES[one.scales.dtype]
        yield from _rows(
            *(one.scales, unit.first_row, unit.last_row),
            *(first * item_bytes, last * item_bytes, width * item_bytes),
        )
        if one.zero_points is not None:
            per_word = self.scheme.levels_per_word
            words = unit.first_row // per_word, math.ceil(unit.last_row / per_word)
            yield from _rows(one.zero_points, *words, first * 4, last * 4, width * 4)

    def _level_bytes(self, column: int, num_columns: int, row_bytes: int) -> int:
        if column == num_columns:
            return row_bytes
        return column * (self.scheme.num_bits if self.scheme.is_packed else 8) // 8

    def _groups(self, unit: Unit) -> tuple[int, int]:
        size = self.scheme.group_size
        return (0, 1) if size is None else (unit.first_column // size, unit.last_column // size)

    def _row_bytes(self, source: Input) -> int:
        """The most that a row takes, as it is or as it becomes."""
        columns = source.shape[1]
        groups = columns // (self.scheme.group_size or columns)
        becomes = max(self.scheme.row_bytes(columns), groups * 4)
        return max(columns * ITEM_BYTES[source.dtype], becomes)

    def _rows_together(self) -> int:
        """Rows that share a word of zero points."""
        return 1 if self.scheme.symmetric else self.scheme.levels_per_word

    def _steps(self, source: Input) -> tuple[int, int]:
        """Rows and columns of a unit."""
        columns, together = source.shape[1], self._rows_together()
        fitting = self.piece_bytes // self._row_bytes(source) // together * together
        if fitting:
            return fitting, columns
        size = self.scheme.group_size
        if size is None:
            return together, columns
        item_bytes = ITEM_BYTES[source.dtype]
        return together, max(1, self.piece_bytes // together // item_bytes // size) * size

    def _num_units(self, one: Rounded | Kept) -> int:
        if isinstance(one, Kept):
            return math.ceil(one.source.num_bytes / self.piece_bytes)
        rows, columns = one.source.shape
        step_rows, step_columns = self._steps(one.source)
        return math.ceil(rows / step_rows) * math.ceil(columns / step_columns)


def _kept(one: Input) -> tuple[str, str, Shape]:
    return one.name, one.dtype, one.shape


def _outputs(one: Input, scheme: Scheme) -> list[tuple[str, str, Shape]]:
    module = one.name.removesuffix(".weight")
    rows, columns = one.shape
    groups = 1 if scheme.group_size is None else columns // scheme.group_size
    scales = (f"{module}.weight_scale", one.dtype, (rows, groups))
    if not scheme.is_packed:
        return [(one.name, "I8", one.shape), scales]
    words = scheme.row_bytes(columns) // 4
    found: list[tuple[str, str, Shape]] = [
        (f"{module}.weight_packed", "I32", (rows, words)),
        scales,
    ]
    if not scheme.symmetric:
        packed_rows = math.ceil(rows / scheme.levels_per_word)
        found.append((f"{module}.weight_zero_point", "I32", (packed_rows, groups)))
    found.append((f"{module}.weight_shape", "I64", (2,)))
    return found


def _rows(
    output: Output, first: int, last: int, begin: int, end: int, row_bytes: int
) -> Iterator[Extent]:
    """Bytes [begin, end) of rows [first, last): one extent where these are all of a row."""
    if end - begin == row_bytes:
        yield Extent(output.file, output.begin + first * row_bytes, (last - first) * row_bytes)
        return
    for row in range(first, last):
        yield Extent(output.file, output.begin + row * row_bytes + begin, end - begin)


class _Layout:
    """Files and offsets. A module's tensors are in one file; in a file those with the largest
    elements come first, so that each begins at a multiple of its element."""

    def __init__(self, wanted: Sequence[Sequence[tuple[str, str, Shape]]]):
        shards: list[list[int]] = [[]]
        filled = 0
        for number, outputs in enumerate(wanted):
            size = sum(math.prod(shape) * ITEM_BYTES[dtype] for _, dtype, shape in outputs)
            if filled and filled + size > MAX_SHARD_BYTES:
                shards.append([])
                filled = 0
            shards[-1].append(number)
            filled += size
        self.files: list[int] = []
        self.headers: list[bytes] = []
        self.placed: dict[int, list[Output]] = {}
        for file, numbers in enumerate(shards):
            self._place(file, {number: wanted[number] for number in numbers})

    def _place(self, file: int, wanted: Mapping[int, Sequence[tuple[str, str, Shape]]]) -> None:
        flat = [
            (number, place) for number, outputs in wanted.items() for place in range(len(outputs))
        ]
        flat.sort(key=lambda one: -ITEM_BYTES[wanted[one[0]][one[1]][1]])
        begins: dict[tuple[int, int], int] = {}
        entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for number, place in flat:
            name, dtype, shape = wanted[number][place]
            end = offset + math.prod(shape) * ITEM_BYTES[dtype]
            entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": (offset, end)}
            begins[number, place] = offset
            offset = end
        text = msgspec.json.encode(entries)
        text += b" " * (-len(text) % _HEADER_ALIGNMENT)
        header = len(text).to_bytes(8, "little") + text
        self.headers.append(header)
        self.files.append(len(header) + offset)
        for number, outputs in wanted.items():
            self.placed[number] = [
                Output(name, dtype, shape, file, len(header) + begins[number, place])
                for place, (name, dtype, shape) in enumerate(outputs)
            ]
