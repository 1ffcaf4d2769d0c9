"""From manifest entry to tensor: aliased, exact, and refused where it does not lie in its bytes."""

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from allocator import InvalidMessage, TensorEntry
from allocator.backends.host_mapping import HostMapping
from allocator.backends.numa import Placement
from allocator.client.weights.tensor import dtype_by_name, dtype_name, tensors

SIZE = 4096
DTYPES = [
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
    *(torch.float8_e4m3fn, torch.float8_e5m2, torch.complex64),
]


def mapping_of(first: int) -> HostMapping:
    """Writable memory of no name, whose bytes count from `first` on: what a tensor is made over
    does not matter here."""
    descriptor = os.memfd_create("tensors")
    try:
        os.write(descriptor, bytes(range(first, 256)) + bytes(range(first)))
        os.ftruncate(descriptor, SIZE)
        made = HostMapping(descriptor, SIZE, Placement())
    finally:
        os.close(descriptor)
    made.buffer[:] = bytes(made.buffer[:256]) * (SIZE // 256)
    return made


@pytest.fixture
def mapping() -> Iterator[HostMapping]:
    made = mapping_of(0)
    yield made
    made.close()


def entry(**changes: Any) -> TensorEntry:
    fields = {"dtype": "uint8", "shape": (8,), "stride": (1,), "offset": 0, "num_bytes": 8}
    return TensorEntry(**{**fields, **changes})


def one(mapping: HostMapping, **changes: Any) -> torch.Tensor:
    return tensors([mapping], {"t": entry(**changes)})["t"]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_sees_the_bytes_as_they_are(mapping: HostMapping, dtype: torch.dtype) -> None:
    name = dtype_name(dtype)
    assert dtype_by_name(name) == dtype
    assert "torch" not in name
    size = 8 * dtype.itemsize
    tensor = one(mapping, dtype=name, offset=256, num_bytes=size)
    assert (tensor.dtype, tensor.shape) == (dtype, (8,))
    assert bytes(tensor.view(torch.uint8)) == mapping.buffer[256 : 256 + size]


@pytest.mark.parametrize("name", ["float31", "", "Tensor", "nn", "__name__", "torch.float32"])
def test_what_is_no_dtype_is_refused(mapping: HostMapping, name: str) -> None:
    with pytest.raises(InvalidMessage, match="torch has no dtype"):
        one(mapping, dtype=name)


def test_tensors_alias_the_mapping_and_each_other_where_tied(mapping: HostMapping) -> None:
    tied = entry(dtype="int32", shape=(2, 4), stride=(4, 1), offset=512, num_bytes=32)
    made = tensors([mapping], {"head": tied, "embedding": tied, "other": entry(offset=1024)})
    made["head"][1, 2] = 77
    assert made["embedding"][1, 2] == 77
    assert mapping.buffer[512 + 24] == 77
    assert made["head"].data_ptr() == made["embedding"].data_ptr()
    assert made["other"].data_ptr() - made["head"].data_ptr() == 512


def test_an_entry_counts_the_mappings(mapping: HostMapping) -> None:
    other = mapping_of(100)
    made = tensors([mapping, other], {"own": entry(), "file's": entry(segment=1)})
    assert (made["own"].tolist()[0], made["file's"].tolist()[0]) == (0, 100)
    other.close()
    assert made["file's"].tolist() == list(range(100, 108))  # each keeps its own


@pytest.mark.parametrize("segment", [-1, 1, 1 << 40])
def test_an_entry_of_a_mapping_that_is_not_there_is_refused(
    mapping: HostMapping, segment: int
) -> None:
    with pytest.raises(InvalidMessage, match="'t' lies in no segment of its set"):
        one(mapping, segment=segment)


def test_a_transposed_tensor_keeps_its_stride(mapping: HostMapping) -> None:
    plain = one(mapping, shape=(3, 5), stride=(5, 1), num_bytes=15)
    transposed = one(mapping, shape=(5, 3), stride=(1, 5), num_bytes=15)
    assert torch.equal(transposed, plain.T)
    assert not transposed.is_contiguous()


def test_a_slice_keeps_its_stride(mapping: HostMapping) -> None:
    sliced = one(mapping, shape=(2, 2), stride=(5, 2), offset=1, num_bytes=8)
    assert sliced.tolist() == [[1, 3], [6, 8]]


def test_an_expanded_tensor(mapping: HostMapping) -> None:
    assert one(mapping, shape=(3, 2), stride=(0, 1), num_bytes=2).tolist() == [[0, 1]] * 3


@pytest.mark.parametrize("offset", [0, 256, SIZE])
@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 5)])
def test_zero_size(mapping: HostMapping, shape: tuple[int, ...], offset: int) -> None:
    stride = (1,) if len(shape) == 1 else (max(shape[1], 1), 1)
    made = one(mapping, dtype="bfloat16", shape=shape, stride=stride, offset=offset, num_bytes=0)
    assert (made.shape, made.numel()) == (shape, 0)


def test_zero_dimensions(mapping: HostMapping) -> None:
    assert one(mapping, shape=(), stride=(), offset=9, num_bytes=1).item() == 9


def test_a_tensor_keeps_its_mapping(mapping: HostMapping) -> None:
    made = one(mapping, offset=16)
    mapping.close()
    assert made.tolist() == list(range(16, 24))


def test_the_last_bytes_can_be_used(mapping: HostMapping) -> None:
    assert one(mapping, offset=SIZE - 8).tolist() == list(range(248, 256))


@pytest.mark.parametrize(
    "changes",
    [
        {"offset": SIZE - 7},
        {"offset": SIZE + 1, "num_bytes": 0, "shape": (0,)},
        {"num_bytes": SIZE + 1},
        {"offset": 1 << 62, "num_bytes": 1 << 62},
        {"offset": 8, "num_bytes": (1 << 62) - 4},
        {"offset": (1 << 62), "num_bytes": 0, "shape": (0,)},
    ],
)
def test_an_extent_outside_its_segment_is_refused(
    mapping: HostMapping, changes: dict[str, Any]
) -> None:
    with pytest.raises(InvalidMessage, match="'t' lies outside its segment"):
        one(mapping, **changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"shape": (9,)},
        {"shape": (2, 4), "stride": (5, 1)},
        {"shape": (8,), "stride": (2,)},
        {"shape": (1 << 40, 1 << 40), "stride": (1 << 40, 1)},
        {"shape": (2,), "stride": (1 << 62,)},
        {"shape": (8,), "stride": (-1,)},
        {"shape": (), "stride": (), "num_bytes": 0},
        {"shape": (-1,)},
        {"shape": (-2, -4), "stride": (4, 1)},
        {"shape": (0,), "stride": (-1,), "num_bytes": 0},
        {"shape": (0, 1 << 63), "stride": (1, 1), "num_bytes": 0},
        {"shape": (2, 4), "stride": (1,)},
        {"shape": (8,), "stride": ()},
        {"dtype": "int16", "shape": (5,), "num_bytes": 8},
    ],
)
def test_a_shape_beyond_its_extent_is_refused(
    mapping: HostMapping, changes: dict[str, Any]
) -> None:
    with pytest.raises(InvalidMessage, match="the shape of the tensor 't'"):
        one(mapping, **changes)


@pytest.mark.parametrize(
    "changes",
    [{"offset": 2, "num_bytes": 8}, {"offset": 4, "num_bytes": 7}, {"offset": 1, "num_bytes": 8}],
)
def test_a_misaligned_extent_is_refused(mapping: HostMapping, changes: dict[str, Any]) -> None:
    with pytest.raises(InvalidMessage, match="not aligned to its dtype"):
        one(mapping, dtype="float32", shape=(1,), **changes)
