"""Doing a unit: reading its piece, rounding it, writing what it becomes.

Owns the buffers of one thread. Invariants: they are made once, of a size that follows from the size
of a piece; a unit that was done has exactly its extents written.
"""

import errno
import os
from collections.abc import Iterator, Sequence
from typing import Any, Final

import numpy as np

from allocator import Digest, DiskFull
from workers.config.safetensors_file import ITEM_BYTES
from workers.errors import QuantizationRefused
from workers.quantize.plan import Extent, Kept, Plan, Rounded, Unit
from workers.quantize.source import Source
from workers.quantize.tile import Bytes, Rounding, Tile

_FULL: Final = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class UnitWorker:
    """Of one thread."""

    def __init__(self, plan: Plan, source: Source, files: Sequence[int], rounding: Rounding):
        """`files` are descriptors of the output files."""
        self._plan = plan
        self._source = source
        self._files = files
        self._rounding = rounding
        # The least that a tile can be is a group, in as many rows as share a word.
        size = max(
            plan.piece_bytes, plan.scheme.levels_per_word * 4 * (plan.scheme.group_size or 256)
        )
        self._piece = np.empty(size, np.uint8)
        self._levels = np.empty(size, np.uint8)
        self._scales = np.empty(size, np.uint8)
        self._zero_points = np.empty(0 if plan.scheme.symmetric else size, np.uint8)

    def done(self, number: int) -> bytes:
        """The digest of what was written. Raises CheckpointError, QuantizationRefused, DiskFull,
        OSError."""
        unit = self._plan.unit(number)
        one = self._plan.tensors[unit.tensor]
        out = _Extents(self._plan.extents(unit), self._files)
        if isinstance(one, Kept):
            piece = self._piece[: unit.num_columns]
            self._source.read(one.source.name, unit.first_column, piece.data)
            out.write(piece)
        elif self._plan.is_in_parts(unit):
            self._round_in_parts(unit, one, out)
        else:
            self._round(unit, one, out)
        return out.digest()

    def written(self, number: int) -> bytes:
        """The digest of what lies in the unit's extents now."""
        digest = Digest()
        for extent in self._plan.extents(self._plan.unit(number)):
            for begin in range(0, extent.num_bytes, len(self._piece)):
                part = self._piece[: min(len(self._piece), extent.num_bytes - begin)]
                if _fill(self._files[extent.file], extent.begin + begin, part.data):
                    digest.update(part.data)
        return digest.digest()

    def _round(self, unit: Unit, one: Rounded, out: "_Extents") -> None:
        columns, item_bytes = one.source.shape[1], ITEM_BYTES[one.source.dtype]
        piece = self._piece[: unit.num_rows * unit.num_columns * item_bytes]
        if unit.num_columns == columns:
            self._source.read(one.source.name, unit.first_row * columns * item_bytes, piece.data)
        else:
            for row, part in enumerate(np.split(piece, unit.num_rows)):
                begin = (unit.first_row + row) * columns + unit.first_column
                self._source.read(one.source.name, begin * item_bytes, part.data)
        tile = self._tile(one, unit.num_rows, unit.num_columns, piece, 0)
        self._check(self._rounding.rows(tile), tile, one, unit.first_row, unit.first_column)
        out.write(tile.levels)
        out.write(tile.scales)
        self._write_zero_points(tile.zero_points, unit.num_rows, out)

    def _round_in_parts(self, unit: Unit, one: Rounded, out: "_Extents") -> None:
        num_rows, scale_bytes = unit.num_rows, ITEM_BYTES[one.scales.dtype]
        for row in range(num_rows):
            given = self._rounding.parts()
            for begin, part in self._parts(unit, one, row):
                self._check(given.fold(part), part, one, unit.first_row + row, begin)
            if self._plan.scheme.num_candidates > 1:
                for _, part in self._parts(unit, one, row):
                    given.compare(part)
            for _, part in self._parts(unit, one, row):
                given.write(part)
                out.write(part.levels)
        out.write(self._scales[: num_rows * scale_bytes])
        self._write_zero_points(self._zero_points[:num_rows], num_rows, out)

    def _parts(self, unit: Unit, one: Rounded, row: int) -> Iterator[tuple[int, Tile]]:
        """Of one row, with the column at which each begins; the row's scale has its own place."""
        columns, item_bytes = one.source.shape[1], ITEM_BYTES[one.source.dtype]
        step = self._plan.part_columns(unit)
        for begin in range(0, columns, step):
            count = min(step, columns - begin)
            piece = self._piece[: count * item_bytes]
            at = (unit.first_row + row) * columns + begin
            self._source.read(one.source.name, at * item_bytes, piece.data)
            yield begin, self._tile(one, 1, count, piece, row)

    def _tile(self, one: Rounded, rows: int, columns: int, piece: Bytes, first: int) -> Tile:
        """Scales are written from the place of row `first` on."""
        scheme = self._plan.scheme
        groups = rows * (columns // (scheme.group_size or columns))
        scale_bytes = ITEM_BYTES[one.scales.dtype]
        return Tile(
            scheme=scheme,
            dtype=one.source.dtype,
            num_rows=rows,
            num_columns=columns,
            source=piece,
            levels=self._levels[: rows * scheme.row_bytes(columns)],
            scales=self._scales[first * scale_bytes : (first + groups) * scale_bytes],
            zero_points=self._zero_points[first : first + groups],
        )

    def _check(self, bad: int, tile: Tile, one: Rounded, row: int, column: int) -> None:
        if bad < 0:
            return
        down, across = divmod(bad, tile.num_columns)
        raise QuantizationRefused(
            f"{one.source.name} holds NaN or an infinity at [{row + down}, {column + across}], "
            "which no scale can express: correct the checkpoint, or leave the tensor as it is with "
            "--keep"
        )

    def _write_zero_points(self, zero_points: Bytes, num_rows: int, out: "_Extents") -> None:
        """Words of rows, low bits first."""
        scheme = self._plan.scheme
        if scheme.symmetric:
            return
        offset = 1 << (scheme.num_bits - 1)
        raised = zero_points.reshape(num_rows, -1).view(np.int8).astype(np.int16) + offset
        padding = -num_rows % scheme.levels_per_word
        rows = np.pad(raised, ((0, padding), (0, 0))).astype(np.uint32)
        rows = rows.reshape(-1, scheme.levels_per_word, rows.shape[1])
        words: Any = rows[:, 0]
        for place in range(1, scheme.levels_per_word):
            words = words | rows[:, place] << np.uint32(place * scheme.num_bits)
        out.write(np.ascontiguousarray(words).view(np.uint8))


class _Extents:
    """Takes bytes one after the other, and writes them where they belong."""

    def __init__(self, extents: Iterator[Extent], files: Sequence[int]):
        self._extents = extents
        self._files = files
        self._file = self._begin = self._left = 0
        self._digest = Digest()

    def write(self, data: Bytes) -> None:
        view = data.reshape(-1).data
        self._digest.update(view)
        while len(view):
            if not self._left:
                extent = next(self._extents)
                self._file, self._begin = self._files[extent.file], extent.begin
                self._left = extent.num_bytes
            part = view[: self._left]
            write_all(self._file, self._begin, part)
            self._begin += len(part)
            self._left -= len(part)
            view = view[len(part) :]

    def digest(self) -> bytes:
        return self._digest.digest()


def write_all(descriptor: int, begin: int, data: memoryview) -> None:
    """Raises DiskFull, OSError."""
    try:
        while len(data):
            count = os.pwrite(descriptor, data, begin)
            begin += count
            data = data[count:]
    except OSError as error:
        if error.errno in _FULL:
            raise DiskFull(
                f"the output's disk is full ({error.strerror}): make room there, and run the same "
                "command again; it goes on where it was"
            ) from error
        raise


def _fill(descriptor: int, begin: int, out: memoryview) -> bool:
    """Whether the file has all of it."""
    done = 0
    while done < len(out):
        count = os.preadv(descriptor, [out[done:]], begin + done)
        if count == 0:
            return False
        done += count
    return True
