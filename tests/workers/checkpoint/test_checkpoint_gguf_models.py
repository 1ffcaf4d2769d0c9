"""GGUF files: every type of block, and slowed rotations."""

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from tests.references import parameters, transformers_reads
from tests.workers.checkpoint.checkpoint_files import same_bytes, write_gguf
from workers.checkpoint import open_checkpoint
from workers.conformance.greedy import read_whole
from workers.errors import UnsupportedCheckpoint
from workers.model.decoder import build_model
from workers.placement.resident import Resident

KINDS = gguf.GGMLQuantizationType


@pytest.mark.parametrize(
    "kind",
    [KINDS.Q4_0, KINDS.Q4_1, KINDS.Q5_0, KINDS.Q5_1, KINDS.Q8_0, KINDS.BF16, KINDS.F16, KINDS.F32],
    ids=lambda kind: kind.name,
)
def test_blocks_are_dequantized_as_by_transformers(kind: Any, tmp_path: Path) -> None:
    """K-quants are in the real model (test_real_models.py); nobody here can write them."""
    path = write_gguf(tmp_path / "tiny.gguf", matrices=kind)
    expected = parameters(transformers_reads(path, torch.bfloat16))
    read = read_whole(open_checkpoint(path, "bfloat16"))
    assert len(read) == 11
    assert [name for name in read if not same_bytes(read[name], expected[name].detach())] == []


@pytest.mark.parametrize("name", ["blk.0.attn_v.bias", "blk.0.ffn_gate_exps.weight", "rope.weight"])
def test_a_tensor_without_a_place_is_named(name: str, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "odd.gguf", tensors={name: np.zeros(32, np.float32)})
    with pytest.raises(UnsupportedCheckpoint, match=f"{name} has no place in llama"):
        open_checkpoint(path).tensors()


def test_a_tensor_of_rotations_that_is_not_read_is_named(tmp_path: Path) -> None:
    """Beside factors of longrope, llama.cpp goes by `rope_freqs` alone."""
    factors = {f"rope_factors_{one}.weight": np.ones(8, np.float32) for one in ("long", "short")}
    tensors = {**factors, "rope_freqs.weight": np.full(8, 2, np.float32)}
    path = write_gguf(tmp_path / "odd.gguf", tensors=tensors)
    with pytest.raises(UnsupportedCheckpoint, match=r"rope_freqs\.weight has no place in llama"):
        open_checkpoint(path).tensors()
    assert open_checkpoint(write_gguf(tmp_path / "a.gguf", tensors=factors)).tensors()


def test_a_parameter_without_a_tensor_is_named(tmp_path: Path) -> None:
    tensors = {"blk.0.attn_q.bias": np.zeros(32, np.float32)}
    path = write_gguf(tmp_path / "odd.gguf", tensors=tensors)
    with pytest.raises(UnsupportedCheckpoint, match=r"nothing that .*k_proj\.bias is made of"):
        open_checkpoint(path).tensors()


def llama3_factors(factor: float, head_dim: int = 16) -> np.ndarray:
    """What llama.cpp's converter writes: how much slower each frequency turns."""
    parameters = {"rope_type": "llama3", "factor": factor, "rope_theta": 10000.0}
    parameters |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    parameters |= {"original_max_position_embeddings": 8192}
    config = LlamaConfig(
        head_dim=head_dim, max_position_embeddings=131_072, rope_parameters=parameters
    )
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = 10000.0 ** -(torch.arange(0, head_dim, 2) / head_dim)
    factors: np.ndarray = (plain / scaled).float().numpy()
    return factors


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_slowed_rotations_are_those_of_llama_3(factor: float, tmp_path: Path) -> None:
    factors = llama3_factors(factor)
    assert factors.max() == pytest.approx(factor)
    path = write_gguf(tmp_path / "slow.gguf", tensors={"rope_freqs.weight": factors})
    checkpoint = open_checkpoint(path, "float32")
    tensors = read_whole(checkpoint)
    assert len(tensors) == 11
    module: Any = build_model(_config(checkpoint), Resident(tensors), torch.float32).module
    plain = 10000.0 ** -(torch.arange(0, 16, 2) / 16)
    torch.testing.assert_close(module.model.rotary_emb.inv_freq, plain / torch.tensor(factors))


def test_other_slowed_rotations_are_refused(tmp_path: Path) -> None:
    tensors = {"rope_freqs.weight": np.linspace(1, 3, 8, dtype=np.float32)}
    path = write_gguf(tmp_path / "slow.gguf", tensors=tensors)
    with pytest.raises(UnsupportedCheckpoint, match="not as Llama 3 does"):
        open_checkpoint(path).metadata()


def _config(checkpoint: Any) -> dict[str, Any]:
    config: dict[str, Any] = json.loads(checkpoint.metadata()["config"])
    return config
