"""ggml's blocks as integers and scales, without a loss.

Owns the step from the blocks that are packed to `workers.packed_format`'s terms. Invariant: what is
made of a block says the numbers that the `gguf` package dequantizes it to, bit for bit. Scales of
two levels become one, in fp32. Layouts are those of ggml-common.h in llama.cpp.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import numpy as np
from gguf import GGMLQuantizationType as Kind
from gguf.quants import Q4_K

from workers.packed_format import PackedFormat

Array = np.ndarray[Any, Any]


@dataclass(frozen=True, slots=True)
class Parts:
    """Of rows: `integers` # uint8 [num_rows, width], as `packed_format.pack` takes them, with
    `scales`, and `minima` where the format has them, # [num_rows, width / group]."""

    integers: Array
    scales: Array
    minima: Array | None


def _halves(blocks: Array, at: int) -> Array:
    """The fp16 at this byte of each block # [num_blocks]"""
    return np.ascontiguousarray(blocks[:, at : at + 2]).view(np.float16)[:, 0]


def _nibbles(content: Array) -> Array:
    """Of each block the low halves of all bytes, then the high ones."""
    return np.concatenate((content & 15, content >> 4), axis=1)


def _fifth_bits(content: Array) -> Array:
    """16, or 0, for each of 32 bits # [num_blocks, 4] → [num_blocks, 32]"""
    return np.unpackbits(content, axis=1, bitorder="little") << 4


def _q4_0(b: Array) -> Parts:
    return Parts(_nibbles(b[:, 2:]), _halves(b, 0), None)


def _q4_1(b: Array) -> Parts:
    return Parts(_nibbles(b[:, 4:]), _halves(b, 0), _halves(b, 2))


def _q5_0(b: Array) -> Parts:
    five = _nibbles(b[:, 6:]) | _fifth_bits(b[:, 2:6])
    return Parts(five + np.uint8(128 - 16), _halves(b, 0), None)


def _q5_1(b: Array) -> Parts:
    return Parts(_nibbles(b[:, 8:]) | _fifth_bits(b[:, 4:8]), _halves(b, 0), _halves(b, 2))


def _q8_0(b: Array) -> Parts:
    return Parts(b[:, 2:] ^ 0x80, _halves(b, 0), None)


def _two_levels(b: Array) -> tuple[Array, Array]:
    """Scales and minima of the 8 parts of 32 # fp32 [num_blocks, 8]"""
    scales, minima = Q4_K.get_scale_min(b[:, 4:16])
    outer, outer_minima = (_halves(b, at).astype(np.float32)[:, None] for at in (0, 2))
    return outer * scales.astype(np.float32), -(outer_minima * minima.astype(np.float32))


def _by_parts(content: Array) -> Array:
    """[num_blocks, 128] → [num_blocks, 256]: 32 bytes hold two parts, one in their low halves."""
    return _nibbles(content.reshape(-1, 32)).reshape(len(content), 256)


def _q4_k(b: Array) -> Parts:
    return Parts(_by_parts(b[:, 16:]), *_two_levels(b))


def _q5_k(b: Array) -> Parts:
    fifth = np.stack([(b[:, 16:48] >> part & 1) << 4 for part in range(8)], axis=1)
    integers = _by_parts(b[:, 48:]) | fifth.reshape(len(b), 256)
    return Parts(integers, *_two_levels(b))


def _q6_k(b: Array) -> Parts:
    low = b[:, :128].reshape(-1, 2, 64)
    low = np.concatenate((low & 15, low >> 4), axis=2)  # [num_blocks, 2, 128]
    high = b[:, 128:192].reshape(-1, 2, 32)
    high = np.concatenate([(high >> 2 * part & 3) << 4 for part in range(4)], axis=2)
    outer = _halves(b, 208).astype(np.float32)[:, None]
    scales = outer * b[:, 192:208].view(np.int8).astype(np.float32)
    return Parts((low | high).reshape(len(b), 256) + np.uint8(128 - 32), scales, None)


class _Blocks(NamedTuple):
    layout: PackedFormat
    width: int
    num_bytes: int
    parts: Callable[[Array], Parts]


_BLOCKS: Final[Mapping[Kind, _Blocks]] = {
    Kind.Q4_0: _Blocks(PackedFormat(4, 32, False, False), 32, 18, _q4_0),
    Kind.Q4_1: _Blocks(PackedFormat(4, 32, False, True), 32, 20, _q4_1),
    Kind.Q5_0: _Blocks(PackedFormat(8, 32, False, False), 32, 22, _q5_0),
    Kind.Q5_1: _Blocks(PackedFormat(8, 32, False, True), 32, 24, _q5_1),
    Kind.Q8_0: _Blocks(PackedFormat(8, 32, False, False), 32, 34, _q8_0),
    Kind.Q4_K: _Blocks(PackedFormat(4, 32, True, True), 256, 144, _q4_k),
    Kind.Q5_K: _Blocks(PackedFormat(8, 32, True, True), 256, 176, _q5_k),
    Kind.Q6_K: _Blocks(PackedFormat(8, 16, True, False), 256, 210, _q6_k),
}


def packed_format(kind: Kind) -> PackedFormat | None:
    """What blocks of this kind are packed as; None for those that are not."""
    blocks = _BLOCKS.get(kind)
    return None if blocks is None else blocks.layout


def parts_of(kind: Kind, rows: Array) -> Parts:
    """Of rows of blocks, uint8 # [num_rows, row_bytes]."""
    blocks = _BLOCKS[kind]
    made = blocks.parts(rows.reshape(-1, blocks.num_bytes))
    count = len(rows)
    return Parts(
        made.integers.reshape(count, -1),
        made.scales.reshape(count, -1),
        None if made.minima is None else made.minima.reshape(count, -1),
    )
