"""Raw memory as tensors: aliased, and kept for as long as one of them lives. On CPU memory."""

import ctypes
import gc
import threading
import weakref

import pytest
import torch

from allocator.backends import dlpack
from allocator.client.weights.tensor import as_bytes

SIZE = 4096


class Memory:
    """Some bytes, and whether they are still there."""

    def __init__(self) -> None:
        self.bytes = (ctypes.c_uint8 * SIZE)(*(i % 251 for i in range(SIZE)))


class Exported:
    """What a mapping of memory that only a device's API can address offers."""

    def __init__(self, memory: Memory) -> None:
        self._memory = memory
        self.num_bytes = SIZE

    @property
    def buffer(self) -> memoryview:
        raise TypeError("not by addresses")

    def __dlpack__(self, **_options: object) -> object:
        address = ctypes.addressof(self._memory.bytes)
        return dlpack.capsule(address, SIZE, self.__dlpack_device__(), self._memory)

    def __dlpack_device__(self) -> tuple[int, int]:
        return dlpack.CPU, 0


@pytest.fixture
def memory() -> Memory:
    return Memory()


def test_a_tensor_aliases_the_memory(memory: Memory) -> None:
    tensor = as_bytes(Exported(memory))  # type: ignore[arg-type]
    assert (tensor.dtype, tensor.shape, tensor.stride()) == (torch.uint8, (SIZE,), (1,))
    assert tensor.data_ptr() == ctypes.addressof(memory.bytes)
    assert bytes(tensor) == bytes(memory.bytes)
    tensor[7] = 255
    assert memory.bytes[7] == 255
    memory.bytes[8] = 254
    assert tensor[8] == 254
    assert tensor[256:272].view(torch.bfloat16).shape == (8,)


def test_each_export_is_one_more_view(memory: Memory) -> None:
    exported = Exported(memory)
    first, second = as_bytes(exported), as_bytes(exported)  # type: ignore[arg-type]
    first[0] = 9
    del first
    gc.collect()
    assert second[0] == 9


@pytest.mark.parametrize("in_thread", [False, True])
def test_the_last_view_lets_the_memory_go(in_thread: bool) -> None:
    memory = Memory()
    alive = weakref.ref(memory)
    views = [as_bytes(Exported(memory))[16:32].view(torch.int32)]  # type: ignore[arg-type]
    views.append(views[0][1:].reshape(-1))
    del memory
    gc.collect()
    assert alive() is not None
    del views[0]
    gc.collect()
    assert alive() is not None
    if in_thread:
        thread = threading.Thread(target=views.clear)
        thread.start()
        thread.join()
    else:
        views.clear()
    gc.collect()
    assert alive() is None
