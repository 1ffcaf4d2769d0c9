"""Blocks of GGUF files that stay packed: what they say, and when they do."""

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind

from workers.checkpoint import open_checkpoint
from workers.checkpoint.formats.gguf_blocks import packed_format, parts_of
from workers.errors import InvalidSetting
from workers.packed_format import decoded, pack, unpack
from workers.placement.packing import open_as_served
from workers.settings import EngineSettings, checked

HALVES = {Kind.Q6_K: (208,), Kind.Q4_0: (0,), Kind.Q5_0: (0,), Kind.Q8_0: (0,)}
"""Where a block has numbers in fp16; others have two at their beginning."""
PACKED = [kind for kind in Kind if packed_format(kind) is not None]
AS_BF16 = checked({"weights": "bf16"})


def random_blocks(kind: Kind, num_rows: int, num_weights: int) -> np.ndarray:
    """uint8 # [num_rows, row_bytes], with scales that are numbers."""
    block, num_bytes = gguf.GGML_QUANT_SIZES[kind]
    rng = np.random.default_rng(7)
    shape = (num_rows * num_weights // block, num_bytes)
    blocks = rng.integers(0, 256, shape, dtype=np.uint8)
    for at in HALVES.get(kind, (0, 2)):
        halves = rng.normal(size=len(blocks)).astype(np.float16)
        blocks[:, at : at + 2] = halves.view(np.uint8).reshape(-1, 2)
    return blocks.reshape(num_rows, -1)


def test_these_blocks_are_packed() -> None:
    assert {kind.name for kind in PACKED} == {
        "Q4_0",
        "Q4_1",
        "Q5_0",
        "Q5_1",
        "Q8_0",
        "Q4_K",
        "Q5_K",
        "Q6_K",
    }


@pytest.mark.parametrize("kind", PACKED)
def test_packed_blocks_say_what_the_library_reads(kind: Kind) -> None:
    rows = random_blocks(kind, 37, 512)
    layout, parts = packed_format(kind), parts_of(kind, rows)
    assert layout is not None
    numbers = (parts.integers, parts.scales, parts.minima)
    strips = pack(layout, *(torch.from_numpy(one) for one in numbers if one is not None))
    assert np.array_equal(unpack(layout, strips)[:37].numpy(), gguf.dequantize(rows, kind))


def test_a_file_says_the_same_packed_in_less_memory(smollm2_gguf: Path) -> None:
    plain = open_checkpoint(smollm2_gguf)
    packed = open_as_served(smollm2_gguf, EngineSettings())
    formats = decoded(packed.metadata())
    dense = {one.name: one for one in plain.tensors()}
    laid_out = {one.name: one for one in packed.tensors()}
    assert dense.keys() == laid_out.keys()
    total = sum(one.num_bytes for one in laid_out.values())
    assert total < 0.37 * sum(one.num_bytes for one in dense.values())
    assert total < 1.001 * smollm2_gguf.stat().st_size
    assert plain.fingerprint() != packed.fingerprint()
    names = ("model.layers.3.self_attn.q_proj.weight", "model.layers.29.mlp.down_proj.weight")
    for name in (*names, "model.norm.weight"):
        expected = torch.empty(dense[name].shape, dtype=dense[name].dtype)
        plain.copy_into(name, expected, lambda _: None)
        found = torch.empty(laid_out[name].shape, dtype=laid_out[name].dtype)
        counted: list[int] = []
        packed.copy_into(name, found, counted.append)
        assert sum(counted) == found.nbytes
        if name in names:
            found = unpack(formats[name], found)[: len(expected)].to(torch.bfloat16)
        assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("asked", "reason"),
    [
        ({"dtype": "float32"}, "--dtype is float32"),
        ({"device": "cuda:0"}, "--device is cuda:0"),
        ({"tensor_parallel_size": 10}, "--tensor-parallel-size is 10, but the model has 9"),
    ],
)
def test_what_is_against_it_is_told_to_who_asks_for_it(
    smollm2_gguf: Path, asked: dict[str, object], reason: str
) -> None:
    assert "packed" not in open_as_served(smollm2_gguf, checked(asked)).fingerprint().values()
    with pytest.raises(InvalidSetting, match=f"--weights packed: .*{reason}"):
        open_as_served(smollm2_gguf, checked({**asked, "weights": "packed"}))


def test_who_wants_it_expanded_gets_it_so(smollm2_gguf: Path) -> None:
    assert (
        open_as_served(smollm2_gguf, AS_BF16).fingerprint()
        == open_checkpoint(smollm2_gguf).fingerprint()
    )
