"""Rounding without the interpreter's lock: the library compiled from quantize.cpp.

Owns its handle and its C structures. Invariant: the structures are those of quantize.cpp, and their
size is compared.
"""

import ctypes
import functools
import sysconfig
from ctypes import POINTER, byref, c_double, c_float, c_int32, c_int64
from pathlib import Path
from typing import Any, ClassVar, Final

from workers.model.native.library import Unavailable, check_processor
from workers.quantize.tile import Tile

TYPES: Final = {"BF16": 0, "F16": 1, "F32": 2}


class _Tile(ctypes.Structure):
    """Tile."""

    _fields_: ClassVar = [
        *(
            (name, c_int64)
            for name in (
                *("source", "quantized", "scales", "zero_points"),
                *("num_rows", "num_columns", "group_size", "row_bytes"),
            )
        ),
        *((name, c_int32) for name in (*("type", "num_bits", "packed", "num_candidates"),)),
    ]


class _Range(ctypes.Structure):
    """Range."""

    _fields_: ClassVar = [("low", c_float), ("high", c_float)]


@functools.cache
def _load(name: str) -> Any:
    file = Path(__file__).with_name(f"_quantize_{name}{sysconfig.get_config_var('EXT_SUFFIX')}")
    check_processor(name)
    if not file.exists():
        raise Unavailable("not compiled when onecopy was installed")
    library = ctypes.CDLL(str(file))
    if library.onecopy_quantize_size_of_tile() != ctypes.sizeof(_Tile):
        raise Unavailable(f"{file.name} was compiled from other sources: build it again")
    library.onecopy_quantize_rows.restype = c_int64
    library.onecopy_quantize_rows.argtypes = [POINTER(_Tile)]
    library.onecopy_quantize_step.restype = c_int64
    library.onecopy_quantize_step.argtypes = [
        *(POINTER(_Tile), c_int32, POINTER(_Range), POINTER(c_double), c_int32)
    ]
    return library


def _structure(tile: Tile) -> _Tile:
    return _Tile(
        tile.source.ctypes.data,
        tile.levels.ctypes.data,
        tile.scales.ctypes.data,
        0 if tile.scheme.symmetric else tile.zero_points.ctypes.data,
        tile.num_rows,
        tile.num_columns,
        tile.group_size,
        tile.scheme.row_bytes(tile.num_columns),
        TYPES[tile.dtype],
        tile.scheme.num_bits,
        tile.scheme.is_packed,
        tile.scheme.num_candidates,
    )


class NativeRounding:
    """See `workers.quantize.tile.Rounding`."""

    def __init__(self, name: str):
        """Raises Unavailable."""
        self._library = _load(name)
        self.name = name

    def rows(self, tile: Tile) -> int:
        """See Rounding."""
        found: int = self._library.onecopy_quantize_rows(byref(_structure(tile)))
        return found

    def parts(self) -> "NativeRow":
        """See Rounding."""
        return NativeRow(self._library)


class NativeRow:
    """See `workers.quantize.tile.RowInParts`."""

    def __init__(self, library: Any):
        self._library = library
        self._range = _Range(0, 0)
        self._losses = (c_double * 40)()
        self._settled = False

    def fold(self, part: Tile) -> int:
        """See RowInParts."""
        return self._step(part, 0)

    def compare(self, part: Tile) -> None:
        """See RowInParts."""
        self._settled = True
        self._step(part, 1)

    def write(self, part: Tile) -> None:
        """See RowInParts."""
        self._step(part, 2)

    def _step(self, part: Tile, what: int) -> int:
        found: int = self._library.onecopy_quantize_step(
            byref(_structure(part)), what, byref(self._range), self._losses, self._settled
        )
        return found
