"""What the elements of weights are, for who computes on them as they lie.

Owns the formats that kernels know, by the numbers of matrix.h. Invariant: the bytes of a row are
counted here alone.
"""

from collections.abc import Mapping
from enum import IntEnum

import torch


class WeightFormat(IntEnum):
    """matrix.h's Format."""

    BF16 = 0

    @classmethod
    def of(cls, tensor: torch.Tensor) -> "WeightFormat | None":
        """That of a tensor's elements, where it is one of these."""
        return _OF_DTYPE.get(tensor.dtype)

    def row_bytes(self, width: int) -> int:
        """Of a row of so many elements."""
        return width * _DTYPES[self].itemsize


_DTYPES: Mapping[WeightFormat, torch.dtype] = {WeightFormat.BF16: torch.bfloat16}
_OF_DTYPE = {dtype: one for one, dtype in _DTYPES.items()}


def float_dtype(tensors: Mapping[str, torch.Tensor]) -> torch.dtype:
    """The dtype of most of the parameters, where the checkpoint does not say."""
    sizes: dict[torch.dtype, int] = {}
    for tensor in tensors.values():
        if tensor.is_floating_point():
            sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.numel()
    return max(sizes, key=lambda dtype: sizes[dtype], default=torch.float32)
