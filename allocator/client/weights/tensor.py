"""Tensors over mapped bytes. Owns the step from manifest entry to aliased tensor.

Invariant: a tensor made here keeps its mapping alive, and never copies. Imported, and
torch with it, only when a client asks for tensors.
"""

import math
import warnings
from collections.abc import Mapping as NamedMapping
from collections.abc import Sequence
from typing import Final

import torch
from torch.utils.dlpack import from_dlpack

from allocator.backends import Mapping, PoolWindow
from allocator.backends.dlpack import Exporter
from allocator.errors import InvalidMessage
from allocator.messages import TensorEntry

_MOST_ELEMENTS: Final = 1 << 62


def dtype_name(dtype: torch.dtype) -> str:
    """How a manifest writes a dtype: "bfloat16", "float32", …"""
    return str(dtype).removeprefix("torch.")


def dtype_by_name(name: str) -> torch.dtype:
    """The reverse of `dtype_name`. Raises InvalidMessage for a name torch does not know."""
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise InvalidMessage(f"torch has no dtype {name!r}")
    return dtype


def as_bytes(mapping: Mapping | PoolWindow) -> torch.Tensor:
    """The whole mapping as uint8 # [num_bytes], on the device that it is on. Writing through it
    where the mapping is read-only kills the process by SIGSEGV, or on a GPU makes every later call
    of its CUDA context fail, and harms nobody else."""
    if isinstance(mapping, Exporter):
        return from_dlpack(mapping)
    with warnings.catch_warnings():
        # torch can't mark a tensor read-only and warns of it; the kernel does it for us.
        warnings.filterwarnings("ignore", message="The given buffer is not writable")
        return torch.frombuffer(mapping.buffer, dtype=torch.uint8)


def tensors(
    mappings: Sequence[Mapping], entries: NamedMapping[str, TensorEntry]
) -> dict[str, torch.Tensor]:
    """One aliased tensor an entry, of its dtype, shape and stride, in the mapping that the entry's
    `segment` counts. Tied entries alias each other.

    Raises InvalidMessage where an entry does not lie in its mapping.
    """
    wholes = [as_bytes(mapping) for mapping in mappings]
    found: dict[str, torch.Tensor] = {}
    for name, entry in entries.items():
        if not 0 <= entry.segment < len(wholes):
            raise InvalidMessage(f"the tensor {name!r} lies in no segment of its set")
        found[name] = _tensor(wholes[entry.segment], name, entry)
    return found


def _tensor(whole: torch.Tensor, name: str, entry: TensorEntry) -> torch.Tensor:
    dtype = dtype_by_name(entry.dtype)
    size = whole.numel()
    if entry.offset > size or entry.num_bytes > size - entry.offset:
        raise InvalidMessage(f"the tensor {name!r} lies outside its segment")
    if entry.offset % dtype.itemsize or entry.num_bytes % dtype.itemsize:
        raise InvalidMessage(f"the tensor {name!r} is not aligned to its dtype")
    extent = whole[entry.offset : entry.offset + entry.num_bytes].view(dtype)
    if not _fits(entry, extent.numel()):
        raise InvalidMessage(f"the shape of the tensor {name!r} reaches beyond its extent")
    return extent.as_strided(entry.shape, entry.stride)


def _fits(entry: TensorEntry, num_elements: int) -> bool:
    """Whether all indices of the shape lie in [0, num_elements), in numbers that torch can hold."""
    if len(entry.shape) != len(entry.stride) or min((*entry.shape, *entry.stride), default=0) < 0:
        return False
    if math.prod(max(length, 1) for length in entry.shape) > _MOST_ELEMENTS:
        return False
    if 0 in entry.shape:
        return max(entry.stride, default=0) <= _MOST_ELEMENTS
    last = sum((n - 1) * stride for n, stride in zip(entry.shape, entry.stride, strict=True))
    return last < num_elements
