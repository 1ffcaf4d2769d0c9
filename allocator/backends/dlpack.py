"""Raw memory handed to a tensor library without a copy, by DLPack (https://dmlc.github.io/dlpack).

Owns the capsules' structures until their consumer is done with them. Invariant: what `owner` keeps
alive lives until the last tensor over it is gone, wherever that happens. Knows nothing of CUDA.

Why not `__cuda_array_interface__`: torch asks the driver which device its address is on, which is
unknown for a pool's window as long as nothing is mapped at its begin; it refuses what is marked
read-only; and it copies without a word where the device it is told is another one. DLPack states
the device.
"""

import ctypes
import itertools
from typing import Final, Protocol, runtime_checkable

CPU: Final = 1
CUDA: Final = 2
_UNSIGNED: Final = 1
_CAPSULE_NAME: Final = b"dltensor"


@runtime_checkable
class Exporter(Protocol):
    """What `torch.from_dlpack` takes. Its two methods are DLPack's own."""

    def __dlpack__(self, **_options: object) -> object: ...

    def __dlpack_device__(self) -> tuple[int, int]: ...


class _Tensor(ctypes.Structure):
    """DLManagedTensor, whose first member is a DLTensor of one dimension."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("num_dimensions", ctypes.c_int32),
        ("dtype_code", ctypes.c_uint8),
        ("dtype_bits", ctypes.c_uint8),
        ("dtype_lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.c_void_p),
        ("byte_offset", ctypes.c_uint64),
        ("context", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
    )


_exported: dict[int, tuple[_Tensor, ctypes.Array[ctypes.c_int64], object]] = {}
"""By number: the structure, what it points to, and what keeps the memory."""
_numbers = itertools.count(1)


def capsule(address: int, num_bytes: int, device: tuple[int, int], owner: object) -> object:
    """`num_bytes` at `address` as uint8 # [num_bytes]. The consumer must take it: one that is
    dropped unused keeps its owner for ever."""
    number = next(_numbers)
    shape = (ctypes.c_int64 * 1)(num_bytes)
    tensor = _Tensor(
        *(address, *device, 1),
        *(_UNSIGNED, 8, 1),
        *(shape, None, 0),
        *(number, ctypes.cast(_release, ctypes.c_void_p)),
    )
    made = _new_capsule(ctypes.addressof(tensor), _CAPSULE_NAME, None)
    _exported[number] = (tensor, shape, owner)
    return made


def _forget(tensor: "ctypes._Pointer[_Tensor]") -> None:
    """The consumer's last word, from any thread."""
    del _exported[tensor.contents.context]


_release = ctypes.CFUNCTYPE(None, ctypes.POINTER(_Tensor))(_forget)
_new_capsule = ctypes.pythonapi.PyCapsule_New
_new_capsule.restype = ctypes.py_object
_new_capsule.argtypes = (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
# A tensor may outlive this module at the interpreter's end, so the callback is never collected.
ctypes.pythonapi.Py_IncRef(ctypes.py_object(_release))
