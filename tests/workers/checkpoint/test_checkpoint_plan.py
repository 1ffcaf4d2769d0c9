"""The plan: for any tensors, extents that are aligned, disjoint, and in the given order."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from allocator import ALIGNMENT
from workers.checkpoint.formats.checkpoint import SourceTensor
from workers.checkpoint.plan import contiguous_stride, make_plan

SHAPES = st.lists(st.integers(0, 70), max_size=4).map(tuple)
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.uint8])
TENSORS = st.lists(st.tuples(SHAPES, DTYPES), max_size=12).map(
    lambda drawn: [SourceTensor(f"t{n}", shape, dtype) for n, (shape, dtype) in enumerate(drawn)]
)


@given(TENSORS)
def test_extents(tensors: list[SourceTensor]) -> None:
    plan = make_plan(tensors, {"config": "{}"})
    entries = plan.manifest.tensors
    assert list(entries) == [tensor.name for tensor in tensors]
    assert plan.manifest.metadata == {"config": "{}"}
    end = 0
    for tensor in tensors:
        entry = entries[tensor.name]
        assert entry.offset % ALIGNMENT == 0
        assert 0 <= entry.offset - end < ALIGNMENT  # behind the one before, and close to it
        meta = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
        assert entry.num_bytes == meta.nbytes == tensor.num_bytes
        assert (entry.shape, entry.dtype) == (tensor.shape, str(tensor.dtype)[6:])
        end = entry.offset + entry.num_bytes
    assert end <= plan.num_bytes < end + ALIGNMENT


@given(SHAPES)
def test_strides_are_those_of_torch(shape: tuple[int, ...]) -> None:
    assert contiguous_stride(shape) == torch.empty(shape, device="meta").stride()
