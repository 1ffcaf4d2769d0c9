"""Packed weights that several ranks compute with: each on views of the one set, cut between strips
and tiles, or within a tile that is a whole row."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from allocator import Client, RuntimeDir, connect
from tests.references import load, ulps_below_the_best
from tests.workers.model.test_tensor_parallel import (
    MAX_ROWS,
    PROMPTS,
    computed,
    computed_by_ranks,
    formed,
)
from tests.workers.placement.ranks import Ranks, of_one_copy
from tests.workers.tiny_models import write_checkpoint
from workers.checkpoint import AttachedWeights, attach
from workers.conformance.greedy import generated
from workers.conformance.ties import BF16_TIE_ULPS
from workers.errors import InvalidSetting
from workers.model.decoder import Model, build_model
from workers.model.shares import HeadGranule, head_shares, width_shares
from workers.packed_format import ROWS, PackedFormat, decoded, pack, unpack
from workers.placement.all_reduce import AllReduce
from workers.placement.packing import open_as_served
from workers.placement.resident import Resident
from workers.quantize.quantize import quantize
from workers.quantize.request import Request
from workers.settings import checked
from workers.skeleton.packed import PackedLinear

SIZES: dict[str, Any] = {
    "hidden_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "intermediate_size": 352,  # 11 groups of 32
}
LAYOUTS = {
    "4 bits with minima": PackedFormat(4, 32, wide=False, minima=True),
    "4 bits in groups of 64": PackedFormat(4, 64, wide=True, minima=False),
    "4 bits, a row": PackedFormat(4, 192, wide=True, minima=False),
    "8 bits in groups of 16": PackedFormat(8, 16, wide=True, minima=False),
    "8 bits, a row": PackedFormat(8, 192, wide=False, minima=False),
}


def strips_of(layout: PackedFormat, num_rows: int, width: int) -> torch.Tensor:
    """Of random numbers."""
    generator = torch.Generator().manual_seed(7)
    most = 16 if layout.bits == 4 else 256
    integers = torch.randint(0, most, (num_rows, width), generator=generator, dtype=torch.uint8)
    shape = (num_rows, width // layout.group)
    scales = torch.rand(shape, generator=generator) / 8
    minima = torch.rand(shape, generator=generator) if layout.minima else None
    return pack(layout, integers, scales, minima)


@pytest.mark.parametrize("name", LAYOUTS)
def test_parts_are_views_that_say_what_the_whole_does(name: str) -> None:
    layout = LAYOUTS[name]
    strips = strips_of(layout, 72, 192)
    whole = unpack(layout, strips)[:72]
    for begin, end in ((0, 16), (16, 48), (48, 72)):
        part = layout.rows(strips, begin, end)
        assert part.data_ptr() == strips.data_ptr() + begin // ROWS * strips.stride(0)
        assert torch.equal(unpack(layout, part)[: end - begin], whole[begin:end])
    granule = layout.column_granule(192)
    x = torch.rand(3, 192, dtype=torch.float64)
    total = torch.zeros(3, 72, dtype=torch.float64)
    exact = whole.double()
    for begin, end in ((0, granule), (granule, 2 * granule), (2 * granule, 192)):
        if begin == end:
            continue
        linear = nn.Linear(end - begin, 72, bias=False, device="meta")
        module = PackedLinear(linear, layout, layout.first_column(begin, end))
        part = layout.columns(strips, begin, end)
        assert part.shape == module.weight.shape
        assert part.untyped_storage().data_ptr() == strips.untyped_storage().data_ptr()
        module.weight = nn.Parameter(part, requires_grad=False)
        out = module(x[:, begin:end])
        torch.testing.assert_close(out, x[:, begin:end] @ exact[:, begin:end].T)
        total += out
    torch.testing.assert_close(total, x @ exact.T)


def test_heads_are_cut_where_strips_end() -> None:
    # Heads of 24: two of them are three strips.
    shares = head_shares(8, 8, 3, HeadGranule(2, 2))
    assert [tuple(one.keys_values) for one in shares] == [(0, 2), (2, 4), (4, 8)]
    # Heads of 64 over groups of 128, three queries to a key: two keys are three groups.
    shares = head_shares(12, 4, 2, HeadGranule(queries=2, keys_values=1))
    assert [tuple(one.queries) for one in shares] == [(0, 6), (6, 12)]
    with pytest.raises(InvalidSetting, match="may be 2 at most"):
        head_shares(12, 4, 3, HeadGranule(queries=2, keys_values=1))
    # One key for all queries: these are cut, and the key is on every rank.
    shares = head_shares(8, 1, 3, HeadGranule(queries=2, keys_values=2))
    assert [tuple(one.queries) for one in shares] == [(0, 2), (2, 4), (4, 8)]
    # Several keys, each on several ranks, can't be where they end within a strip.
    with pytest.raises(InvalidSetting, match="packed: --tensor-parallel-size may be 2 at most"):
        head_shares(8, 2, 4, HeadGranule(queries=1, keys_values=2))


@pytest.mark.parametrize("least", [1, 16, 32, 96, 128])
def test_widths_are_cut_at_whole_granules(least: int) -> None:
    for num_granules, num_ranks in ((4, 3), (11, 2), (40, 3)):
        shares = width_shares(num_granules * least, num_ranks, least)
        assert [one.begin for one in shares[1:]] == [one.end for one in shares[:-1]]
        assert (shares[0].begin, shares[-1].end) == (0, num_granules * least)
        assert all(one.size and one.begin % least == 0 for one in shares)


LESS_THAN_A_COPY = 90_000_000  # of the 97 MB of SmolLM2 in 4 bits


Made = Callable[..., AttachedWeights]


@pytest.fixture
def made(memory: Client, tmp_path: Path) -> Made:
    """A tiny llama, rounded by `onecopy quantize`, attached as ranks are served with it."""

    def make(scheme: str, size: int, group_size: int | None = None, **changes: Any) -> Any:
        folder = tmp_path / f"{scheme}-{group_size}"
        plain = write_checkpoint(
            folder.with_name("plain"), "llama", torch.bfloat16, **{**SIZES, **changes}
        )
        quantize(Request(plain, folder, scheme, group_size), lambda _: None)
        settings = checked({"tensor_parallel_size": size, "weights": "packed"})
        return attach(memory, open_as_served(folder, settings))

    return make


@pytest.mark.slow
@pytest.mark.this_process
@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize(
    ("scheme", "group_size", "num_ranks", "intermediate_size"),
    [
        ("w4a16", 32, 4, 352),  # a head of keys and values is on two ranks
        ("w4a16", 64, 2, 320),
        ("w8a16", None, 3, 352),  # a scale for a row: cut within it
    ],
)
def test_ranks_compute_what_one_does(
    scheme: str,
    group_size: int | None,
    num_ranks: int,
    intermediate_size: int,
    memory: Client,
    made: Made,
) -> None:
    """Natively, and by modules, which unpack. What is rounded to bf16 and to 8 bits in between may
    fall to the other side, so it is held against what a rank computes that is cut elsewhere."""
    weights = made(scheme, num_ranks, group_size, intermediate_size=intermediate_size)
    assert len(decoded(weights.metadata)) == 21
    for num_threads, most in ((2, 1e-3), (0, 0.05)):
        with Ranks(1, lambda _, n=num_threads: computed(weights, n).tolist()) as alone:
            expected = torch.tensor(alone.result(0))
        got = computed_by_ranks(num_ranks, memory, weights, expected, num_threads)
        assert (got - expected).abs().max() <= most * expected.abs().max()


@pytest.mark.slow
@pytest.mark.parametrize("num_ranks", [2, 4])
def test_the_demo_on_ranks_says_what_it_says_on_one(
    num_ranks: int,
    memory: Client,
    runtime_dir: RuntimeDir,
    smollm2_gguf: Path,
    smollm2_by_transformers: Path,
) -> None:
    """Up to ties. 9 heads over 3 of keys and values, a packed table of tokens that is the head,
    too; one copy, by the kernel's figures, and no rank grows by as much."""
    settings = checked({"tensor_parallel_size": num_ranks, "weights": "packed"})
    weights = attach(memory, open_as_served(smollm2_gguf, settings))
    alone = attach(memory, open_as_served(smollm2_gguf, checked({"weights": "packed"})))
    assert weights.reader.key == alone.reader.key  # the same set, however many compute with it
    config, formats = json.loads(weights.metadata["config"]), decoded(weights.metadata)
    assert len(formats) > 200

    def tokens(model: Model) -> list[list[int]]:
        assert model.accelerate(MAX_ROWS, 128, 1) is None
        return generated(model, PROMPTS, 12, max_num_batched_tokens=MAX_ROWS)

    def build(weights: AttachedWeights, group: AllReduce | None = None) -> Model:
        placement = Resident(weights.tensors)
        return build_model(config, placement, torch.bfloat16, ranks=group, packed=formats)

    with Ranks(1, lambda _: tokens(build(weights))) as one:
        expected = one.result(0)
    extent = formed(memory, num_ranks, MAX_ROWS * 576)

    def work(rank: int, look: Callable[[], None]) -> list[list[int]]:
        with connect(runtime_dir) as own, AllReduce(extent, rank, num_ranks) as group:
            model = build(attach(own, open_as_served(smollm2_gguf, settings)), group)
            found = tokens(model)
            look()
            return found

    results = of_one_copy(num_ranks, runtime_dir, LESS_THAN_A_COPY, work)
    assert results == [results[0]] * num_ranks
    reference = load(smollm2_by_transformers, torch.float32)
    for prompt, *news in zip(PROMPTS, expected, results[0], strict=True):
        for new in news:
            assert max(ulps_below_the_best(reference, prompt, new)) <= BF16_TIE_ULPS


def test_what_can_not_be_cut_stays_expanded_or_is_refused(tmp_path: Path) -> None:
    """Heads of 8 end within strips: two at a time could be cut off, and there are only two."""
    sizes = {**SIZES, "head_dim": 8, "num_key_value_heads": 2, "num_attention_heads": 4}
    plain = write_checkpoint(tmp_path / "plain", "llama", torch.bfloat16, **sizes)
    quantize(Request(plain, tmp_path / "out", "w8a16"), lambda _: None)
    for size, packed in ((1, True), (2, False)):
        settings = checked({"tensor_parallel_size": size})
        assert bool(decoded(open_as_served(tmp_path / "out", settings).metadata())) == packed
    settings = checked({"tensor_parallel_size": 2, "weights": "packed"})
    with pytest.raises(InvalidSetting, match=r"--weights packed: .* --tensor-parallel-size may be"):
        open_as_served(tmp_path / "out", settings)
