"""What checkpoints hold that architectures compute for themselves, and what only looks like it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.workers.model.tiny_families import save, tiny_model
from workers.checkpoint import open_checkpoint
from workers.conformance.greedy import read_whole
from workers.errors import CheckpointMismatch
from workers.model.decoder import build_model
from workers.placement.resident import Resident

_FREQUENCIES = torch.ones(8)
_MASK = torch.ones(1, 1, 256, 256, dtype=torch.uint8).tril()
_FILL = torch.tensor(-1e9)

IGNORED: dict[str, tuple[str, dict[str, torch.Tensor]]] = {
    "rotations of each layer": (
        "llama",
        {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": _FREQUENCIES + i for i in range(3)},
    ),
    "rotations of the model": ("llama", {"model.rotary_emb.inv_freq": _FREQUENCIES}),
    "cosines and sines": (
        "llama",
        {
            f"model.layers.0.self_attn.rotary_emb.{name}": torch.ones(1, 1, 64, 16)
            for name in ("cos_cached", "sin_cached")
        },
    ),
    "rotations of a Qwen": (
        "qwen2",
        {"model.layers.0.self_attn.rotary_emb.inv_freq": _FREQUENCIES},
    ),
    "masks and rotations of Pythia": (
        "gpt_neox",
        {
            "gpt_neox.layers.0.attention.bias": _MASK,
            "gpt_neox.layers.0.attention.masked_bias": _FILL,
            "gpt_neox.layers.0.attention.rotary_emb.inv_freq": _FREQUENCIES,
        },
    ),
    "masks of GPT-2": (
        "gpt2",
        {
            "transformer.h.0.attn.bias": _MASK,
            "transformer.h.0.attn.masked_bias": _FILL,
        },
    ),
}
REFUSED: dict[str, tuple[str, dict[str, torch.Tensor]]] = {
    "a bias that the config denies": (
        "llama",
        {"model.layers.0.self_attn.q_proj.bias": torch.ones(64)},
    ),
    "what is too large to fill a mask": (
        "llama",
        {"model.layers.0.self_attn.masked_bias": torch.ones(64)},
    ),
    "a further layer": ("llama", {"model.layers.3.mlp.up_proj.weight": torch.ones(96, 64)}),
}


def with_tensors(folder: Path, family: str, more: dict[str, torch.Tensor]) -> tuple[Path, Any]:
    reference = tiny_model(family)
    file = save(reference, folder) / "model.safetensors"
    save_file({**load_file(file), **more}, file, {"format": "pt"})
    return folder, reference


def loaded(folder: Path) -> Any:
    checkpoint = open_checkpoint(folder, "float32")
    config = json.loads(checkpoint.metadata()["config"])
    return build_model(config, Resident(read_whole(checkpoint)), torch.float32)


@pytest.mark.parametrize("name", IGNORED)
def test_what_is_computed_anyway_is_passed_over(name: str, tmp_path: Path) -> None:
    folder, reference = with_tensors(tmp_path, *IGNORED[name])
    ours = loaded(folder).module.state_dict()
    theirs = reference.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[one], theirs[one]) for one in theirs)


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_change_tokens_is_refused(name: str, tmp_path: Path) -> None:
    folder, _ = with_tensors(tmp_path, *REFUSED[name])
    with pytest.raises(CheckpointMismatch, match="no place for"):
        loaded(folder)
