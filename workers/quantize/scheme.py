"""How weights are rounded, in a person's words and in those of compressed-tensors. Pure.

Owns the words of `quantization_config`. Invariant: a scheme that is here can be computed, written
and described; any other is refused by name. Does not know tensors.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from workers.errors import QuantizationRefused

FORMAT_VERSION: Final = "0.20.0"
"""Of compressed-tensors, whose words these are."""
GROUP_SIZES: Final = (128, 64, 32)
"""The ones that other engines have kernels for, the least bits first."""
NUM_CANDIDATES: Final = 20
"""Ranges that a search tries: all of it, and steps of 1/40 less."""


@dataclass(frozen=True, slots=True)
class _Kind:
    num_bits: int
    rounds_activations: bool
    is_grouped: bool
    """By itself: where nobody gives a size of groups."""


_KINDS: Final = {
    "w8a16": _Kind(8, False, False),
    "w8a8": _Kind(8, True, False),
    "w4a16": _Kind(4, False, True),
}
SCHEMES: Final = tuple(_KINDS)


@dataclass(frozen=True, slots=True)
class Scheme:
    """`group_size` consecutive elements of a row share a scale; None: all of the row."""

    name: str
    num_bits: int
    rounds_activations: bool
    group_size: int | None
    symmetric: bool
    num_candidates: int

    @property
    def is_packed(self) -> bool:
        """Whether levels are written as words, low bits first; else as int8."""
        return not self.rounds_activations

    @property
    def format(self) -> str:
        """As compressed-tensors calls it."""
        return "pack-quantized" if self.is_packed else "int-quantized"

    @property
    def levels_per_word(self) -> int:
        """Of a packed int32."""
        return 32 // self.num_bits

    def row_bytes(self, num_columns: int) -> int:
        """What the levels of a row take."""
        if not self.is_packed:
            return num_columns
        return math.ceil(num_columns / self.levels_per_word) * 4

    def quantization_config(self, ignored: Sequence[str]) -> dict[str, Any]:
        """What config.json says of weights that were rounded so; `ignored` are the modules that
        were not."""
        weights: dict[str, Any] = {
            "num_bits": self.num_bits,
            "type": "int",
            "symmetric": self.symmetric,
            "group_size": self.group_size,
            "strategy": "channel" if self.group_size is None else "group",
            "dynamic": False,
        }
        activations = {
            "num_bits": 8,
            "type": "int",
            "symmetric": True,
            "group_size": None,
            "strategy": "token",
            "dynamic": True,
        }
        return {
            "config_groups": {
                "group_0": {
                    "targets": ["Linear"],
                    "weights": weights,
                    "input_activations": activations if self.rounds_activations else None,
                    "output_activations": None,
                    "format": self.format,
                }
            },
            "format": self.format,
            "global_compression_ratio": None,
            "ignore": list(ignored),
            "kv_cache_scheme": None,
            "moe_sparsity_config": None,
            "quant_method": "compressed-tensors",
            "quantization_status": "compressed",
            "sparsity_config": {},
            "transform_config": {},
            "version": FORMAT_VERSION,
        }


UNROUNDED: Final = Scheme("none", 8, False, None, True, 1)
"""Of a checkpoint all of whose tensors are kept."""


def scheme_of(
    name: str,
    group_size: int | None,
    symmetric: bool,
    searches_clip: bool,
    num_columns: Sequence[int],
) -> Scheme:
    """The scheme for linears with so many columns. Raises QuantizationRefused."""
    kind = _KINDS.get(name.lower())
    if kind is None:
        raise QuantizationRefused(f"the scheme {name!r} is not one of {', '.join(SCHEMES)}")
    if kind.rounds_activations and (group_size is not None or not symmetric):
        raise QuantizationRefused(
            f"{name} has one scale for each row and no zero points, as the products of other "
            "engines want it: leave out --group-size and --asymmetric"
        )
    if group_size is not None and group_size not in GROUP_SIZES:
        raise QuantizationRefused(
            f"groups of {group_size} are not computed by other engines: --group-size is one of "
            f"{', '.join(map(str, sorted(GROUP_SIZES)))}"
        )
    if group_size is None and kind.is_grouped:
        group_size = _largest(num_columns)
    return Scheme(
        name.lower(),
        kind.num_bits,
        kind.rounds_activations,
        group_size,
        symmetric,
        NUM_CANDIDATES if searches_clip else 1,
    )


def _largest(num_columns: Sequence[int]) -> int:
    """The size of groups that divides all rows; where none does, the smallest, so that those whose
    rows it does not divide are told by name."""
    for size in GROUP_SIZES:
        if all(columns % size == 0 for columns in num_columns):
            return size
    return GROUP_SIZES[-1]
