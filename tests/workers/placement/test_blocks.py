"""Blocks of any module, offloaded: the same bits as in memory."""

import os
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from allocator import Client
from tests.quick import few_quick
from workers.errors import InvalidSetting
from workers.placement.blocks import OffloadedBlocks, offload
from workers.process import linux

WIDTH = 160
"""A matrix of so many rows and columns is large enough to be offloaded."""


class Block(nn.Module):
    """With whatever a block may have: a matrix, a transposed and a sliced one, two names for one,
    integers, a table that nobody trains, and something small."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        random = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=random) / WIDTH**0.5

        self.plain = nn.Parameter(normal(WIDTH, WIDTH))
        self.transposed = nn.Parameter(normal(WIDTH, WIDTH).T)
        self.sliced = nn.Parameter(normal(WIDTH, 3 * WIDTH)[:, WIDTH : 2 * WIDTH])
        self.tied = self.plain
        self.narrow = nn.Parameter(normal(WIDTH, 2 * WIDTH).to(torch.bfloat16))
        self.norm = nn.LayerNorm(WIDTH)
        integers = torch.randint(-128, 128, (2 * WIDTH, 2 * WIDTH), generator=random)
        self.register_buffer("signed", integers.to(torch.int8))
        self.register_buffer("unsigned", (integers + 128).to(torch.uint8))
        self.register_buffer("table", normal(WIDTH, 2 * WIDTH))
        self.register_buffer("num_calls", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.num_calls += 1
        x = x + torch.tanh(x @ self.plain + x @ self.transposed + x @ self.sliced + x @ self.tied)
        mixed = (x.to(torch.bfloat16) @ self.narrow).float() + x @ self.table
        mixed = mixed @ (self.signed.float() - self.unsigned.float() / 2) / 4000
        return self.norm(mixed[:, :WIDTH] + x) * self.num_calls


def blocks_of(count: int) -> list[Block]:
    return [Block(seed).requires_grad_(False).eval() for seed in range(count)]


def begin_anew(blocks: list[Block]) -> None:
    for block in blocks:
        block.num_calls.zero_()


def passes(blocks: list[Block], order: Sequence[int], num_passes: int) -> list[torch.Tensor]:
    x = torch.linspace(-1, 1, 3 * WIDTH).view(3, WIDTH)
    results = []
    for _ in range(num_passes):
        for index in order:
            x = blocks[index](x)
            results.append(x)
    return results


def assert_equal(got: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    assert len(got) == len(expected)
    assert all(torch.equal(one, other) for one, other in zip(got, expected, strict=True))


@pytest.mark.parametrize("count", few_quick(range(1, 13)))
def test_every_depth_gives_the_same_bits(count: int, tmp_path: Path) -> None:
    blocks = blocks_of(count)
    expected = passes(blocks, range(count), 3)
    for depth in range(1, count + 1):
        begin_anew(blocks)
        with offload(blocks, depth=depth, directory=tmp_path) as offloaded:
            assert offloaded.indices == tuple(range(count))
            assert_equal(passes(blocks, range(count), 3), expected)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "order",
    [(0, 0, 1, 2, 2, 2, 3), (0, 2, 4), (4, 3, 2, 1, 0), (3,), (0, 1, 0, 1, 4, 0)],
    ids=["repeated", "skipped", "backwards", "one alone", "anyhow"],
)
def test_blocks_may_be_called_in_any_order(order: tuple[int, ...], tmp_path: Path) -> None:
    blocks = blocks_of(5)
    expected = passes(blocks, order, 3)
    for depth in (1, 2, 3):
        begin_anew(blocks)
        with offload(blocks, depth=depth, directory=tmp_path):
            assert_equal(passes(blocks, order, 3), expected)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_whatever_the_mode(mode: Any, tmp_path: Path) -> None:
    with mode():
        expected = passes(blocks_of(3), range(3), 2)
    blocks = blocks_of(3)
    with offload(blocks, directory=tmp_path), mode():
        assert_equal(passes(blocks, range(3), 2), expected)


def test_an_error_in_mid_pass_leaves_the_next_one_right(tmp_path: Path) -> None:
    expected = passes(blocks_of(4), range(4), 2)
    blocks = blocks_of(4)
    with offload(blocks, depth=1, directory=tmp_path):
        for failing in range(4):
            passes(blocks, range(failing), 1)
            with pytest.raises(RuntimeError, match="shape"):
                blocks[failing](torch.zeros(1, 7))
        begin_anew(blocks)
        assert_equal(passes(blocks, range(4), 2), expected)


def test_what_a_block_writes_to_a_large_buffer_is_kept(tmp_path: Path) -> None:
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("seen", torch.zeros(WIDTH, WIDTH))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.seen[0] += x
            return self.seen.sum(0)

    blocks = [Counts().eval() for _ in range(3)]
    one = torch.ones(WIDTH)
    with offload(blocks, directory=tmp_path):
        for number in range(1, 4):
            for block in blocks:
                assert torch.equal(block(one), number * one)
    assert all(torch.equal(block.seen[0], 3 * one) for block in blocks)


def test_buffers_in_the_same_memory_stay_so(tmp_path: Path) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            whole = torch.zeros(WIDTH + 1, WIDTH)
            self.register_buffer("first", whole[:-1])
            self.register_buffer("second", whole[1:])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.first += x
            return self.second.sum(0)

    blocks, others = ([Twice().eval() for _ in range(3)] for _ in range(2))
    expected = [block(torch.ones(WIDTH)) for _ in range(3) for block in others]
    with offload(blocks, directory=tmp_path):
        assert_equal([block(torch.ones(WIDTH)) for _ in range(3) for block in blocks], expected)


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
def test_a_block_that_is_left_in_the_middle_is_whole_afterwards(
    error: type[BaseException], tmp_path: Path
) -> None:
    class Stops(nn.Linear):
        stops = False

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if self.stops:
                raise error
            return super().forward(x)

    blocks = [Stops(WIDTH, WIDTH).requires_grad_(False) for _ in range(4)]
    weights = [block.weight.clone() for block in blocks]
    with offload(blocks, directory=tmp_path):
        blocks[1].stops = True
        blocks[0](torch.ones(1, WIDTH))
        with pytest.raises(error):
            blocks[1](torch.ones(1, WIDTH))
        assert blocks[1].weight.numel() == 0
        blocks[1].stops = False
        for block in blocks:
            block(torch.ones(1, WIDTH))
    for block, weight in zip(blocks, weights, strict=True):
        assert torch.equal(block.weight, weight)


def test_what_a_block_returns_of_its_own_stays_what_it_was(tmp_path: Path) -> None:
    class Table(nn.Module):
        def __init__(self, seed: int) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.full((WIDTH, WIDTH), float(seed)), requires_grad=False)

        def forward(self) -> dict[str, Any]:
            return {"rows": (self.table[:4], self.table.T)}

    blocks = [Table(seed) for seed in range(6)]
    with offload(blocks, directory=tmp_path):
        results = [block()["rows"] for block in blocks]
        for seed, parts in enumerate(results):
            assert all(torch.equal(part, torch.full_like(part, seed)) for part in parts)


def test_a_block_within_a_block_is_refused(tmp_path: Path) -> None:
    class Outer(nn.Linear):
        inner: list[nn.Module]

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner[0](super().forward(x))

    inner = nn.Linear(WIDTH, WIDTH).requires_grad_(False)
    outer = Outer(WIDTH, WIDTH).requires_grad_(False)
    outer.inner = [inner]
    with (
        offload([outer, inner], directory=tmp_path),
        pytest.raises(InvalidSetting, match="while another one computes"),
    ):
        outer(torch.ones(1, WIDTH))


def test_a_forward_of_a_module_s_own_comes_back(tmp_path: Path) -> None:
    block = nn.Linear(WIDTH, WIDTH).requires_grad_(False)
    own = block.forward
    block.forward = lambda x: 2 * own(x)  # type: ignore[method-assign]
    expected, replaced = block(torch.ones(1, WIDTH)), block.forward
    with offload([block], directory=tmp_path):
        assert torch.equal(block(torch.ones(1, WIDTH)), expected)
    assert block.forward is replaced


def test_parts_of_one_storage_are_offloaded_each(tmp_path: Path) -> None:
    flat = torch.randn(4 * WIDTH * WIDTH)
    blocks = [nn.Linear(WIDTH, WIDTH, bias=False).requires_grad_(False) for _ in range(4)]
    for number, block in enumerate(blocks):
        begin = number * WIDTH * WIDTH
        block.weight.data = flat[begin : begin + WIDTH * WIDTH].view(WIDTH, WIDTH)
    x = torch.ones(1, WIDTH)
    expected = [block(x) for block in blocks]
    with offload(blocks, directory=tmp_path) as offloaded:
        assert offloaded.indices == (0, 1, 2, 3)
        assert_equal([block(x) for block in blocks], expected)


def test_as_many_blocks_stay_as_the_budget_has_room_for(tmp_path: Path) -> None:
    count = 8
    blocks = [nn.Linear(512, 512).requires_grad_(False) for _ in range(count)]
    num_bytes = 512 * 512 * 4
    with offload(blocks, budget_bytes=5 * num_bytes + 65_536, directory=tmp_path) as offloaded:
        assert offloaded.indices == (1, 3, 4, 6, 7)  # three stay, and there are two slots
        held = {
            blocks[index].weight.untyped_storage().data_ptr(): blocks[index].weight.nbytes
            for index in range(count)
            if blocks[index].weight.numel()
        }
        assert sum(held.values()) == 3 * num_bytes
    with pytest.raises(InvalidSetting, match=r"budget_bytes is 1,048,576, and .* is the least"):
        offload(blocks, budget_bytes=num_bytes, directory=tmp_path)
    assert all(block.weight.numel() for block in blocks)


def test_what_blocks_share_stays(tmp_path: Path) -> None:
    blocks = [nn.Linear(256, 256, bias=False).requires_grad_(False) for _ in range(3)]
    blocks[2].weight = blocks[0].weight
    with offload(blocks, directory=tmp_path) as offloaded:
        assert offloaded.indices == (1,)
        assert blocks[0].weight.numel()


def test_between_calls_nothing_can_be_taken_for_a_weight(tmp_path: Path) -> None:
    blocks = blocks_of(3)
    with offload(blocks, directory=tmp_path):
        passes(blocks, range(3), 1)
        assert [block.plain.numel() for block in blocks] == [0, 0, 0]
        with pytest.raises(RuntimeError):
            torch.ones(1, WIDTH) @ blocks[0].plain


def test_after_the_end_all_is_in_memory_again(tmp_path: Path) -> None:
    before = [dict(chain(b.named_parameters(), b.named_buffers())) for b in blocks_of(3)]
    blocks = blocks_of(3)
    offloaded = offload(blocks, directory=tmp_path)
    passes(blocks, range(3), 1)
    offloaded.close()
    offloaded.close()
    for block, tensors in zip(blocks, before, strict=True):
        block.num_calls.zero_()
        for name, tensor in chain(block.named_parameters(), block.named_buffers()):
            assert torch.equal(tensor, tensors[name])
            assert tensor.stride() == tensors[name].stride()
        assert "forward" not in vars(block)
    assert_equal(passes(blocks, range(3), 1), passes(blocks_of(3), range(3), 1))


def test_slots_may_be_leased(memory: Client, tmp_path: Path) -> None:
    expected = passes(blocks_of(4), range(4), 2)
    blocks = blocks_of(4)
    with offload(blocks, directory=tmp_path, memory=memory):
        assert memory.statistics().pool.leased_bytes > 0
        assert_equal(passes(blocks, range(4), 2), expected)
    assert memory.statistics().pool.leased_bytes == 0


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.slow
def test_their_memory_is_free(tmp_path: Path) -> None:
    blocks = [nn.Linear(3072, 3584, bias=False).requires_grad_(False) for _ in range(6)]
    num_bytes = blocks[0].weight.nbytes  # beyond what the heap keeps for itself
    linux.trim_heap()  # a large hole that is left of other tests would take the blocks
    before = resident_bytes()
    with offload(blocks, directory=tmp_path, depth=1):
        for _ in range(2):
            for block in blocks:
                block(torch.zeros(1, 3072))
        linux.trim_heap()
        freed = before - resident_bytes()
    assert freed > 3 * num_bytes  # of 6, with 2 in slots


def test_a_folder_that_can_not_be_written_to_leaves_all_as_it_was(tmp_path: Path) -> None:
    blocks = blocks_of(2)
    with pytest.raises(OSError, match="nowhere"):
        offload(blocks, directory=tmp_path / "nowhere")
    assert_equal(passes(blocks, range(2), 1), passes(blocks_of(2), range(2), 1))


def test_what_is_not_on_the_processor_is_refused() -> None:
    with pytest.raises(InvalidSetting, match="weight of block 0 is on meta"):
        offload([nn.Linear(2, 2, device="meta")])


def test_a_block_that_is_there_twice_is_refused() -> None:
    block = Block(0)
    with pytest.raises(InvalidSetting, match="twice"):
        offload([block, block])


def test_blocks_that_are_too_small_are_left_alone() -> None:
    with offload([nn.Linear(3, 3), nn.ReLU()]) as offloaded:
        assert isinstance(offloaded, OffloadedBlocks)
        assert offloaded.indices == ()
        assert offloaded.waited_s == 0
