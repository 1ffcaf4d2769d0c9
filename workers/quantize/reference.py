"""The rounding itself, in numpy: what quantize.cpp computes, and what computes where it can't be
compiled.

Owns the arithmetic, as it is documented in docs/quantization.md. Invariant: every operation is one
of fp32, in the same order as in quantize.cpp, so that both have the same bits.
"""

from typing import Any, Final

import numpy as np

from workers.quantize.tile import Tile

Floats = np.ndarray[Any, np.dtype[np.float32]]
Levels = np.ndarray[Any, np.dtype[np.int32]]

_LARGEST: Final = {
    "BF16": np.uint32(0x7F7F0000).view(np.float32),
    "F16": np.float32(65504),
    "F32": np.finfo(np.float32).max,
}
_ROUNDING: Final = np.uint32(0x4B400000)
"""1.5 * 2^23 in fp32: a number up to 2^22 plus this is rounded to the nearest integer."""
_KEPT_BITS: Final = {"BF16": np.uint32(0xFFFF0000), "F16": np.uint32(0xFFFFE000)}
_CANDIDATE_STEPS: Final = 40
_LANES: Final = 16
_BLOCK: Final = 256


def loaded(source: Any, dtype: str) -> Floats:
    """The numbers that bytes stand for."""
    if dtype == "BF16":
        widened = source.view(np.uint16).astype(np.uint32) << np.uint32(16)
        return np.asarray(widened.view(np.float32))
    if dtype == "F16":
        return np.asarray(source.view(np.float16).astype(np.float32))
    return np.asarray(source.view(np.float32))


def stored(values: Floats, dtype: str) -> Floats:
    """Positive scales as they will be stored, in fp32: to the nearest; up where so little is left
    of a number's bits that the nearest would cut off what is near the range's end."""
    bits = values.view(np.uint32)
    if dtype == "BF16":
        nearest = (bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))) & _KEPT_BITS[
            "BF16"
        ]
        short = (bits < np.uint32(0x00800000)) & (nearest < bits)
        return np.asarray(np.where(short, nearest + np.uint32(0x10000), nearest).view(np.float32))
    if dtype == "F16":
        step = np.float32(2.0**-24)
        small = np.ceil(values / step) * step
        large = (bits + np.uint32(0xFFF) + (bits >> np.uint32(13) & np.uint32(1))) & _KEPT_BITS[
            "F16"
        ]
        return np.where(values < np.float32(2.0**-14), small, large.view(np.float32))
    return values


def scales_of(low: Floats, high: Floats, tile: Tile, candidate: Any) -> tuple[Floats, Floats]:
    """What ranges are divided by, each made smaller by `candidate` steps, and their zero points."""
    scheme = tile.scheme
    least = np.float32(-(1 << (scheme.num_bits - 1)))
    most = -least - np.float32(1)
    kept = (np.float32(_CANDIDATE_STEPS) - np.asarray(candidate, np.float32)) / np.float32(
        _CANDIDATE_STEPS
    )
    largest = _LARGEST[tile.dtype]
    if scheme.symmetric:
        scale = np.maximum(-low, high) * kept / ((most - least) / np.float32(2))
    else:
        low = np.minimum(low, np.float32(0)) * kept
        high = np.maximum(high, np.float32(0)) * kept
        wide = high.astype(np.float64) - low.astype(np.float64)
        scale = (wide / np.float64(most - least)).astype(np.float32)
    empty = ~(scale > 0)
    scale = stored(np.where(empty, np.float32(1), scale), tile.dtype)
    zero = np.zeros_like(scale) if scheme.symmetric else _zero_points(low, scale, least, most)
    farthest = np.maximum(zero - least, most - zero)
    bound = largest / farthest
    over = scale > bound
    if over.any():
        if tile.dtype != "F32":
            bound = (bound.view(np.uint32) & _KEPT_BITS[tile.dtype]).view(np.float32)
        scale = np.where(over, bound, scale)
        if not scheme.symmetric:
            zero = np.where(over, _zero_points(low, scale, least, most), zero)
    return (
        np.where(empty, np.float32(1), scale),
        np.where(empty, np.float32(0), zero).astype(np.float32),
    )


def _zero_points(low: Floats, scale: Floats, least: Any, most: Any) -> Floats:
    return np.asarray(np.minimum(np.maximum(np.rint(least - low / scale), least), most))


def levels_of(values: Floats, scale: Floats, zero: Floats, num_bits: int) -> Levels:
    """To the nearest level, of two the even one; scales have one dimension less."""
    moved = values / scale[..., None] + zero[..., None] + _ROUNDING.view(np.float32)
    found = moved.view(np.int32) - _ROUNDING.view(np.int32)
    least = -(1 << (num_bits - 1))
    return np.asarray(np.clip(found, least, -least - 1))


def losses_of(values: Floats, scale: Floats, zero: Floats, num_bits: int, before: Any) -> Any:
    """The squares of what rounding loses, added to `before`: 256 elements in 16 lanes of fp32 each,
    then in fp64."""
    rounded = levels_of(values, scale, zero, num_bits).astype(np.float32)
    off = values - (rounded - zero[..., None]) * scale[..., None]
    with np.errstate(over="ignore"):  # the range of fp32 itself: all candidates lose as much
        squares = off * off
    padding = -squares.shape[-1] % _BLOCK
    widths = [(0, 0)] * (squares.ndim - 1) + [(0, padding)]
    blocks: Any = np.pad(squares, widths).reshape(*squares.shape[:-1], -1, _BLOCK // _LANES, _LANES)
    lanes = blocks[..., 0, :]
    for step in range(1, _BLOCK // _LANES):
        lanes = lanes + blocks[..., step, :]
    sums = np.zeros(lanes.shape[:-1])
    for lane in range(_LANES):
        sums = sums + lanes[..., lane]
    total = before
    for block in range(sums.shape[-1]):
        total = total + sums[..., block]
    return total


class NumpyRounding:
    """See `workers.quantize.tile.Rounding`."""

    name = "numpy"

    def rows(self, tile: Tile) -> int:
        """See Rounding. Row by row, so that little is held beside the tile."""
        values = loaded(tile.source, tile.dtype).reshape(tile.num_rows, tile.num_columns)
        for number, row in enumerate(values):
            groups = row.reshape(tile.num_groups, tile.group_size)
            bad = ~np.isfinite(groups)
            if bad.any():
                return number * tile.num_columns + int(bad.reshape(-1).argmax())
            low, high = _ranges(groups, tile.scheme.symmetric)
            chosen: Any = 0
            if tile.scheme.num_candidates > 1:
                losses = [
                    losses_of(
                        groups,
                        *scales_of(low, high, tile, candidate),
                        tile.scheme.num_bits,
                        np.zeros(tile.num_groups),
                    )
                    for candidate in range(tile.scheme.num_candidates)
                ]
                chosen = np.argmin(np.stack(losses), axis=0)
            scale, zero = scales_of(low, high, tile, chosen)
            _write(tile, number, groups, scale, zero)
        return -1

    def parts(self) -> "NumpyRow":
        """See Rounding."""
        return NumpyRow()


class NumpyRow:
    """See `workers.quantize.tile.RowInParts`."""

    def __init__(self) -> None:
        self._low = self._high = np.zeros(1, np.float32)
        self._losses: list[Any] | None = None

    def fold(self, part: Tile) -> int:
        """See RowInParts."""
        groups = loaded(part.source, part.dtype).reshape(1, -1)
        bad = ~np.isfinite(groups)
        if bad.any():
            return int(bad.argmax())
        low, high = _ranges(groups, part.scheme.symmetric)
        self._low, self._high = np.minimum(self._low, low), np.maximum(self._high, high)
        return -1

    def compare(self, part: Tile) -> None:
        """See RowInParts."""
        groups = loaded(part.source, part.dtype).reshape(1, -1)
        before = self._losses or [np.zeros(1)] * part.scheme.num_candidates
        self._losses = [
            losses_of(
                groups,
                *scales_of(self._low, self._high, part, candidate),
                part.scheme.num_bits,
                loss,
            )
            for candidate, loss in enumerate(before)
        ]

    def write(self, part: Tile) -> None:
        """See RowInParts."""
        groups = loaded(part.source, part.dtype).reshape(1, -1)
        chosen = 0 if self._losses is None else np.argmin(np.stack(self._losses), axis=0)
        _write(part, 0, groups, *scales_of(self._low, self._high, part, chosen))


def _ranges(groups: Floats, symmetric: bool) -> tuple[Floats, Floats]:
    """With 0 in them."""
    zero = np.float32(0)
    if symmetric:
        return np.zeros(len(groups), np.float32), np.abs(groups).max(axis=1)
    return np.minimum(groups.min(axis=1), zero), np.maximum(groups.max(axis=1), zero)


def _write(tile: Tile, row: int, groups: Floats, scale: Floats, zero: Floats) -> None:
    scheme = tile.scheme
    levels = levels_of(groups, scale, zero, scheme.num_bits).reshape(-1)
    row_bytes = scheme.row_bytes(tile.num_columns)
    out = tile.levels[row * row_bytes : (row + 1) * row_bytes]
    out[:] = 0
    if scheme.num_bits == 8:
        out[: len(levels)] = (levels + 128 * scheme.is_packed).astype(np.uint8)
    else:
        nibbles = np.pad(levels + 8, (0, len(levels) % 2)).astype(np.uint8)
        out[: len(nibbles) // 2] = nibbles[::2] | nibbles[1::2] << np.uint8(4)
    if tile.dtype == "F32":
        written = scale.astype(np.float32).view(np.uint8)
    elif tile.dtype == "F16":
        written = scale.astype(np.float16).view(np.uint8)
    else:
        written = (scale.view(np.uint32) >> np.uint32(16)).astype(np.uint16).view(np.uint8)
    tile.scales[row * len(written) : (row + 1) * len(written)] = written
    if not scheme.symmetric:
        begin = row * tile.num_groups
        tile.zero_points[begin : begin + tile.num_groups] = zero.astype(np.int8).view(np.uint8)
