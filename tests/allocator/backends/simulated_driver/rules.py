"""That the simulated driver refuses what the documentation of the real one forbids.

A simulation that took anything would let any sequence pass. Run by
tests/allocator/backends/test_cuda_sequence.py, in a process that finds that driver.
"""

import ctypes
from collections.abc import Iterator
from typing import Any

import pytest
from cuda.bindings import driver

from allocator.backends.cuda_driver import allocation_properties, descriptor_type, location
from tests.allocator.backends.simulated_driver.build import GRANULARITY

INVALID = "CUDA_ERROR_INVALID_VALUE"
ILLEGAL = "CUDA_ERROR_ILLEGAL_ADDRESS"


def ok(returned: tuple[Any, ...]) -> Any:
    assert returned[0].name == "CUDA_SUCCESS", returned
    return returned[1] if len(returned) > 1 else None


def name(returned: tuple[Any, ...]) -> str:
    return str(returned[0].name)


def access(flags: int) -> Any:
    wanted = driver.CUmemAccessDesc()
    wanted.location = location(driver, 0)
    wanted.flags = driver.CUmemAccess_flags(flags)
    return [wanted]


@pytest.fixture(autouse=True)
def _initialised() -> None:
    ok(driver.cuInit(0))


@pytest.fixture
def context() -> Iterator[None]:
    ok(driver.cuCtxPushCurrent(ok(driver.cuDevicePrimaryCtxRetain(0))))
    yield
    ok(driver.cuCtxPopCurrent())


@pytest.fixture
def handle() -> Iterator[Any]:
    made = ok(driver.cuMemCreate(GRANULARITY, allocation_properties(driver, 0), 0))
    yield made
    ok(driver.cuMemRelease(made))


@pytest.fixture
def start(context: None) -> Iterator[int]:
    """The begin of two units of addresses."""
    reserved = int(ok(driver.cuMemAddressReserve(2 * GRANULARITY, 0, 0, 0)))
    yield reserved
    ok(driver.cuMemAddressFree(reserved, 2 * GRANULARITY))


@pytest.fixture
def mapped(start: int, handle: Any) -> Iterator[int]:
    ok(driver.cuMemMap(start, GRANULARITY, 0, handle, 0))
    yield start
    ok(driver.cuMemUnmap(start, GRANULARITY))


def test_mapping_and_copying_want_a_context(handle: Any) -> None:
    wanted = "CUDA_ERROR_INVALID_CONTEXT"
    assert name(driver.cuMemAddressReserve(GRANULARITY, 0, 0, 0)) == wanted
    assert name(driver.cuMemMap(0, GRANULARITY, 0, handle, 0)) == wanted
    assert name(driver.cuMemcpyHtoD(0, b"abc", 3)) == wanted
    assert name(driver.cuCtxSynchronize()) == wanted


def test_sizes_are_whole_units() -> None:
    properties = allocation_properties(driver, 0)
    for num_bytes in (0, 1, GRANULARITY - 1, GRANULARITY + 4096):
        assert name(driver.cuMemCreate(num_bytes, properties, 0)) == INVALID


def test_memory_belongs_to_a_device() -> None:
    properties = allocation_properties(driver, 7)
    wanted = "CUDA_ERROR_INVALID_DEVICE"
    assert name(driver.cuMemCreate(GRANULARITY, properties, 0)) == wanted


def test_a_handle_is_released_once() -> None:
    made = ok(driver.cuMemCreate(GRANULARITY, allocation_properties(driver, 0), 0))
    ok(driver.cuMemRelease(made))
    assert name(driver.cuMemRelease(made)) == INVALID
    assert name(driver.cuMemExportToShareableHandle(made, descriptor_type(driver), 0)) == INVALID


def test_only_what_was_made_for_it_is_exported() -> None:
    properties = allocation_properties(driver, 0)
    properties.requestedHandleTypes = driver.CUmemAllocationHandleType.CU_MEM_HANDLE_TYPE_NONE
    made = ok(driver.cuMemCreate(GRANULARITY, properties, 0))
    assert name(driver.cuMemExportToShareableHandle(made, descriptor_type(driver), 0)) == INVALID
    ok(driver.cuMemRelease(made))


def test_mapping_is_into_reserved_addresses_that_are_free(mapped: int, handle: Any) -> None:
    for start in (mapped, mapped + 4096, mapped + 2 * GRANULARITY, 0):
        assert name(driver.cuMemMap(start, GRANULARITY, 0, handle, 0)) == INVALID
    assert name(driver.cuMemMap(mapped, 2 * GRANULARITY, 0, handle, 0)) == INVALID


def test_what_is_mapped_is_not_accessible_yet(mapped: int) -> None:
    # An access that is refused ends the process's context, so only what comes before is checked.
    assert name(driver.cuMemSetAccess(mapped, 2 * GRANULARITY, access(3), 1)) == INVALID
    assert name(driver.cuMemSetAccess(mapped + 4096, 4096, access(3), 1)) == INVALID
    ok(driver.cuMemSetAccess(mapped, GRANULARITY, access(3), 1))
    ok(driver.cuMemcpyHtoD(mapped + GRANULARITY - 3, b"abc", 3))
    assert name(driver.cuMemcpyHtoD(mapped + GRANULARITY - 2, b"abc", 3)) == INVALID


def test_unmapping_is_whole_and_comes_before_freeing_addresses(mapped: int) -> None:
    assert name(driver.cuMemUnmap(mapped, GRANULARITY // 2)) == INVALID
    assert name(driver.cuMemUnmap(mapped, 2 * GRANULARITY)) == INVALID
    assert name(driver.cuMemAddressFree(mapped, 2 * GRANULARITY)) == INVALID


def test_addresses_are_freed_as_they_were_reserved(start: int) -> None:
    assert name(driver.cuMemAddressFree(start, GRANULARITY)) == INVALID
    assert name(driver.cuMemAddressFree(start + GRANULARITY, GRANULARITY)) == INVALID


def test_a_copy_happens_when_it_is_waited_for(mapped: int) -> None:
    ok(driver.cuMemSetAccess(mapped, GRANULARITY, access(3), 1))
    streams = [ok(driver.cuStreamCreate(1)) for _ in range(2)]
    pinned = int(ok(driver.cuMemHostAlloc(4096, 0)))
    ctypes.memmove(pinned, b"one", 3)
    ok(driver.cuMemcpyHtoDAsync(mapped, pinned, 3, streams[0]))
    ctypes.memmove(pinned, b"two", 3)  # too early: the buffer is still in use
    ok(driver.cuStreamSynchronize(streams[1]))
    assert ctypes.string_at(mapped, 3) == b"\xa5" * 3  # new memory holds anything
    ok(driver.cuStreamSynchronize(streams[0]))
    assert ctypes.string_at(mapped, 3) == b"two"
    for stream in streams:
        ok(driver.cuStreamDestroy(stream))
    ok(driver.cuMemFreeHost(pinned))


def test_pinned_memory_is_freed_once(context: None) -> None:
    pinned = int(ok(driver.cuMemHostAlloc(4096, 0)))
    ok(driver.cuMemFreeHost(pinned))
    assert name(driver.cuMemFreeHost(pinned)) == INVALID


def test_a_fault_ends_the_context(context: None, handle: Any) -> None:
    """The last test: nothing that wants a context works in this process any more."""
    start = int(ok(driver.cuMemAddressReserve(GRANULARITY, 0, 0, 0)))
    ok(driver.cuMemMap(start, GRANULARITY, 0, handle, 0))
    ok(driver.cuMemSetAccess(start, GRANULARITY, access(1), 1))
    ok(driver.cuMemcpyDtoH(bytearray(3), start, 3))
    assert name(driver.cuMemcpyHtoD(start, b"abc", 3)) == ILLEGAL
    assert name(driver.cuCtxSynchronize()) == ILLEGAL
    assert name(driver.cuMemUnmap(start, GRANULARITY)) == ILLEGAL
