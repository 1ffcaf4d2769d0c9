"""How a layer's tensors lie in a slot."""

from itertools import pairwise

import torch
from hypothesis import given
from hypothesis import strategies as st

from workers.checkpoint.offloaded import FileRun, OffloadedTensor
from workers.placement.slots import BLOCK, slot_layout

FILE_BYTES = 200_000
FILES = [bytes((i * 7 + i // 251 + number) % 256 for i in range(FILE_BYTES)) for number in range(2)]


def tensor(*runs: tuple[int, int, int], dtype: str = "uint8") -> OffloadedTensor:
    itemsize = getattr(torch, dtype).itemsize
    num_elements = sum(num_bytes for _, _, num_bytes in runs) // itemsize
    return OffloadedTensor(dtype, (num_elements,), tuple(FileRun(*run) for run in runs))


def test_what_lies_together_in_a_file_is_one_read() -> None:
    layout = slot_layout({"b": tensor((0, 4992, 3008)), "a": tensor((0, 128, 4800))})
    [read] = layout.reads
    assert (read.begin, read.num_bytes, read.offset, read.in_blocks) == (128, 7872, 128, True)
    assert layout.offsets == {"a": 128, "b": 4992}
    assert layout.num_bytes == 2 * BLOCK


def test_what_lies_together_at_an_odd_place_is_one_read_still() -> None:
    layout = slot_layout({"a": tensor((0, 105, 640)), "b": tensor((0, 745, 64))})
    [read] = layout.reads
    assert (read.begin, read.num_bytes, read.offset, read.in_blocks) == (105, 704, 0, False)


def test_what_lies_apart_shares_no_block() -> None:
    layout = slot_layout({"a": tensor((0, 128, 50)), "b": tensor((0, 100_032, 50))})
    assert [read.offset for read in layout.reads] == [128, BLOCK + 100_032 % BLOCK]


def test_a_tensor_of_several_runs_is_in_one_piece() -> None:
    layout = slot_layout({"a": tensor((0, 4096, 100), (1, 7, 50), (0, 60_000, 10))})
    assert [(read.offset, read.in_blocks) for read in layout.reads] == [
        (0, False),
        (100, False),
        (150, False),
    ]


def test_every_tensor_is_aligned_as_one_that_stays() -> None:
    layout = slot_layout({"a": tensor((0, 101, 8), dtype="float32"), "b": tensor((0, 109, 99))})
    assert [offset % 64 for offset in layout.offsets.values()] == [0, 0]
    assert len(layout.reads) == 2


def test_an_empty_tensor_is_not_read() -> None:
    layout = slot_layout({"a": OffloadedTensor("float32", (0, 3), ()), "b": tensor((0, 9, 4))})
    assert len(layout.reads) == 1
    assert layout.views(torch.zeros(layout.num_bytes, dtype=torch.uint8))["a"].shape == (0, 3)


RUN = st.tuples(st.integers(0, 1), st.integers(0, FILE_BYTES - 9000), st.integers(1, 9000))


@given(st.lists(st.lists(RUN, max_size=3), min_size=1, max_size=8), st.sampled_from([1, 2, 4]))
def test_the_reads_put_every_byte_in_place(
    all_runs: list[list[tuple[int, int, int]]], itemsize: int
) -> None:
    dtype = {1: "int8", 2: "bfloat16", 4: "float32"}[itemsize]
    tensors = {
        f"t{i}": tensor(
            *((f, b, max(itemsize, n // itemsize * itemsize)) for f, b, n in runs), dtype=dtype
        )
        for i, runs in enumerate(all_runs)
    }
    layout = slot_layout(tensors)
    slot = torch.zeros(layout.num_bytes, dtype=torch.uint8)
    written = memoryview(slot.numpy())
    for read in sorted(layout.reads, key=lambda read: not read.in_blocks):
        begin, end = read.offset, read.offset + read.num_bytes
        source = FILES[read.file][read.begin : read.begin + read.num_bytes]
        if read.in_blocks:  # whole blocks, as a device gives them
            down, up = begin % BLOCK, -end % BLOCK
            assert read.begin % BLOCK == down
            source = FILES[read.file][read.begin - down : read.begin + read.num_bytes + up]
            begin, end = begin - down, min(end + up, begin - down + len(source))
        written[begin:end] = source
    extents = []
    for name, view in layout.views(slot).items():
        runs = tensors[name].runs
        wanted = b"".join(FILES[r.file][r.begin : r.begin + r.num_bytes] for r in runs)
        assert view.contiguous().view(torch.uint8).numpy().tobytes() == wanted
        assert layout.offsets[name] % 64 == 0
        extents.append((layout.offsets[name], layout.offsets[name] + len(wanted)))
    filled = sorted(extent for extent in extents if extent[0] < extent[1])
    assert all(before[1] <= after[0] for before, after in pairwise(filled))
