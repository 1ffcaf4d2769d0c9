"""A layer of a decoder with its weights at some place.

Owns the way from a layer's structure, whose pointers say where the weights are, to one with the
weights elsewhere. Invariant: every pointer of a placed layer lies in a tensor that it keeps. Does
not know who moves weights, or when what lies at a place is what it should be.
"""

import ctypes
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from workers.model.native import library


@dataclass(frozen=True)
class PlacedLayer:
    """What `NativeDecoder.forward` takes for a layer."""

    index: int
    structure: library.Layer
    parameters: Mapping[str, torch.Tensor]
    """By their names within the layer, with the weights that the structure points into."""

    def at(self, tensors: Mapping[str, torch.Tensor]) -> "PlacedLayer":
        """The same layer with all of its weights in `tensors`, of the same names, shapes and dtype,
        each contiguous and on the processor, at any address that is a multiple of 2. They must hold
        the weights whenever it is computed. Raises ValueError."""
        moved = _Moved(self.parameters, tensors)
        structure = library.Layer.from_buffer_copy(self.structure)
        moved.pointers(structure)
        return PlacedLayer(self.index, structure, dict(tensors))


class _Moved:
    def __init__(
        self, parameters: Mapping[str, torch.Tensor], tensors: Mapping[str, torch.Tensor]
    ) -> None:
        if parameters.keys() != tensors.keys():
            differing = ", ".join(sorted(parameters.keys() ^ tensors.keys()))
            raise ValueError(f"a layer's weights, but for {differing}")
        self._moves = []
        for name, old in parameters.items():
            new = tensors[name]
            if new.shape != old.shape or new.dtype != old.dtype:
                raise ValueError(f"{name} is {list(old.shape)} of {old.dtype}")
            if not new.is_contiguous() or new.device.type != "cpu" or new.data_ptr() % 2:
                raise ValueError(f"{name} must be contiguous and on the processor")
            self._moves.append((old.data_ptr(), old.nbytes, new.data_ptr()))

    def pointers(self, structure: Any) -> None:
        """Move all of them, also those of structures in it."""
        for name, kind, *_ in structure._fields_:
            value = getattr(structure, name)
            if kind is ctypes.c_void_p and value is not None:
                setattr(structure, name, self._new(value))
            elif isinstance(value, ctypes.Structure):
                self.pointers(value)
            elif isinstance(value, ctypes.Array):
                for element in value:
                    self.pointers(element)

    def _new(self, address: int) -> int:
        for old, num_bytes, new in self._moves:
            if old <= address < old + num_bytes:
                return new + address - old
        raise AssertionError("a pointer into none of the layer's weights")
