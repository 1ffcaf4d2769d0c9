"""The CUDA backend on a GPU: the contract, and tensors over what it maps, in one process.

The calls themselves, and lifetimes, are tested without a GPU in tests/allocator/
test_cuda_sequence.py; here it is shown that a real driver takes them, and what a device does.
"""

import contextlib
import gc
import threading
from collections.abc import Iterator
from typing import ClassVar

import msgspec
import pytest
import torch

from allocator import StaleGeneration, TensorEntry
from allocator.backends import Backend, PoolWindow, for_handle, open_device
from allocator.client.weights.tensor import as_bytes, tensors
from allocator.messages import Extent, Handle
from tests.allocator.backends.backend_contract import (
    PATTERN,
    BackendContract,
    bytes_of,
    map_extent,
    mapped,
)
from tests.allocator.processes import Refused
from tests.leaks import descriptors

LARGE = (300 << 20) + 12345
GPU = torch.device("cuda:0")


class TestCUDA(BackendContract):
    # The device reports a forbidden access as an error of the calls that follow, in that process.
    FAULT: ClassVar[type[Exception]] = Refused

    def test_a_sealed_segment_can_not_be_mapped_writable(
        self, backend: Backend, sealed: Handle
    ) -> None:
        """Not so here: descriptors carry no access mode, so only clients' own mappings do."""
        with contextlib.closing(mapped(backend, sealed, writable=True)) as mapping:
            assert bytes_of(mapping) == PATTERN

    def test_a_pool_that_is_gone_can_not_be_opened(self, backend: Backend, pool: Handle) -> None:
        """Here a window takes nothing of the pool; its extents can't be had."""
        backend.free(pool.segment)
        for_handle(pool).open_pool(pool).close()
        with pytest.raises(StaleGeneration, match="gone"):
            backend.export(pool.segment, Extent(offset=0, num_bytes=backend.granularity))


@pytest.fixture
def large(backend: Backend) -> Iterator[Handle]:
    """A reserved segment that takes many staging buffers."""
    backend.reserve("large", LARGE)
    yield handle_of(backend, "large", LARGE)
    backend.free("large")


def handle_of(backend: Backend, segment: str, num_bytes: int) -> Handle:
    return Handle(
        backend="cuda", device=backend.device, segment=segment, num_bytes=num_bytes, generation=1
    )


def random_bytes(num_bytes: int, seed: int) -> torch.Tensor:
    """In host memory # [num_bytes]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (num_bytes,), dtype=torch.uint8, generator=generator)


def free_bytes() -> int:
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info()[0]


def test_the_device_is_named_by_the_uuid_that_torch_gives(backend: Backend) -> None:
    properties = torch.cuda.get_device_properties(0)
    assert backend.device == f"cuda:GPU-{properties.uuid}"
    assert open_device(backend.device).device == backend.device
    assert backend.limit_bytes() == properties.total_memory


def test_threads_write_what_one_reads(backend: Backend, large: Handle) -> None:
    given = random_bytes(LARGE, 1)
    data, piece = memoryview(given.numpy()), 7 << 20
    with contextlib.closing(mapped(backend, large, writable=True)) as mapping:
        starts = list(range(0, LARGE, piece))

        def write(first: int) -> None:
            for start in starts[first::4]:
                mapping.write(start, data[start : start + piece])

        threads = [threading.Thread(target=write, args=(i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        out = torch.empty_like(given)
        mapping.read(0, memoryview(out.numpy()))
        assert torch.equal(out, given)
        on_device = as_bytes(mapping)
        assert torch.equal(on_device.cpu(), given)
        mapping.write(3, b"abc")
        assert bytes(on_device[2:7].tolist())[1:4] == b"abc"


def test_reading_sees_what_torch_was_told_to_write(backend: Backend, large: Handle) -> None:
    with contextlib.closing(mapped(backend, large, writable=True)) as mapping:
        whole = as_bytes(mapping)
        with torch.cuda.stream(torch.cuda.Stream()):  # not the default one, and not waited for
            for value in range(20):
                whole.fill_(value)
        out = bytearray(16)
        mapping.read(LARGE - 16, memoryview(out))
        assert out == bytes([19]) * 16


def test_tensors_compute_as_copies_of_them_do(backend: Backend, large: Handle) -> None:
    weight = torch.randn(
        1024, 768, dtype=torch.bfloat16, generator=torch.Generator().manual_seed(2)
    )
    plain = TensorEntry(
        dtype="bfloat16", shape=(1024, 768), stride=(768, 1), offset=256, num_bytes=weight.nbytes
    )
    replace = msgspec.structs.replace
    entries = {
        "weight": plain,
        "transposed": replace(plain, shape=(768, 1024), stride=(1, 768)),
        "float8": replace(plain, dtype="float8_e4m3fn", shape=(64,), stride=(1,)),
    }
    with contextlib.closing(mapped(backend, large, writable=True)) as mapping:
        mapping.write(256, memoryview(weight.view(torch.uint8).reshape(-1).numpy()))
    backend.seal(large.segment)
    mapping = mapped(backend, large, writable=False)
    made = tensors([mapping], entries)
    assert {tensor.device for tensor in made.values()} == {GPU}
    assert made["weight"].data_ptr() == made["transposed"].data_ptr()
    assert torch.equal(made["weight"].cpu(), weight)
    x = torch.randn(8, 768, dtype=torch.bfloat16, device=GPU)
    assert torch.equal(x @ made["weight"].T, x @ weight.to(GPU).T)
    assert torch.equal(made["transposed"], made["weight"].T)
    float8 = weight.reshape(-1).view(torch.float8_e4m3fn)[:64]
    assert torch.equal(made["float8"].float().cpu().nan_to_num(), float8.float().nan_to_num())
    mapping.close()


def test_a_tensor_keeps_the_memory_and_the_last_one_gives_it_back(backend: Backend) -> None:
    before = free_bytes()
    backend.reserve("kept", LARGE)
    mapping = mapped(backend, handle_of(backend, "kept", LARGE), writable=True)
    mapping.write(LARGE - 3, b"end")
    last = as_bytes(mapping)[LARGE - 3 :]
    mapping.close()
    backend.free("kept")
    del mapping
    assert before - free_bytes() >= LARGE
    assert bytes(last.tolist()) == b"end"
    del last
    assert before - free_bytes() < LARGE // 2


def test_a_mapping_is_unmapped_only_after_the_kernels_that_use_it(
    backend: Backend, large: Handle
) -> None:
    result = torch.zeros((), dtype=torch.int64, device=GPU)
    mapping = mapped(backend, large, writable=True)
    view = as_bytes(mapping)
    view.fill_(3)
    for _ in range(30):
        result += view.sum()
    mapping.close()
    del mapping, view  # the device is still at work
    assert result.item() == 30 * 3 * LARGE


def test_mapping_again_and_again_leaves_no_descriptor_behind(backend: Backend) -> None:
    num_bytes, rounds = 2 * backend.granularity, 100
    backend.reserve("again", num_bytes)
    named = handle_of(backend, "again", num_bytes)
    before = len(descriptors())
    for _ in range(rounds):
        with contextlib.closing(mapped(backend, named, writable=True)) as mapping:
            mapping.write(0, b"abc")
    assert len(descriptors()) - before < rounds // 2
    backend.free("again")


@pytest.fixture
def window(backend: Backend) -> Iterator[tuple[Handle, PoolWindow]]:
    """Of a pool that is far larger than the device: only leased extents take memory."""
    pool = handle_of(backend, "pool", 1 << 40)
    backend.reserve_pool("pool", pool.num_bytes)
    with contextlib.closing(backend.open_pool(pool)) as opened:
        yield pool, opened
    backend.free("pool")


def test_a_kernel_reaches_all_extents_from_one_base(
    backend: Backend, window: tuple[Handle, PoolWindow]
) -> None:
    pool, opened = window
    whole, unit = as_bytes(opened), backend.granularity
    assert (whole.device, whole.numel()) == (GPU, 1 << 40)
    extents = [Extent(offset=i * unit, num_bytes=unit) for i in (3, 4, 1000)]
    for extent in extents:
        backend.reserve_extent("pool", extent)
        map_extent(backend, pool, opened, extent, writable=True)
    both = whole[3 * unit : 5 * unit]
    assert int(both.sum()) == 0  # a new lease is zero
    both.copy_(torch.arange(2 * unit, device=GPU).to(torch.uint8))
    assert torch.equal(both.cpu(), torch.arange(2 * unit).to(torch.uint8))
    index = torch.tensor([3, 1000, 4], device=GPU)
    blocks = whole[: 1001 * unit].view(-1, unit)
    blocks[1000].fill_(9)
    gathered = blocks[index]  # [3, unit]
    assert torch.equal(gathered[1], torch.full((unit,), 9, dtype=torch.uint8, device=GPU))
    assert torch.equal(gathered[0], both[:unit])
    assert torch.equal(gathered[2], both[unit:])


def test_extents_take_and_return_the_devices_memory(
    backend: Backend, window: tuple[Handle, PoolWindow]
) -> None:
    pool, opened = window
    unit, count = backend.granularity, 64
    before = free_bytes()
    extents = [Extent(offset=2 * i * unit, num_bytes=unit) for i in range(count)]
    for extent in extents:
        backend.reserve_extent("pool", extent)
        map_extent(backend, pool, opened, extent, writable=True)
    assert count * unit <= before - free_bytes() < (count + 16) * unit
    for extent in extents:
        opened.unmap(extent, discard=True)
        backend.free_extent("pool", extent)
    assert before - free_bytes() < 16 * unit
