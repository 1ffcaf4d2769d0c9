"""How long a context may be: as vLLM derives it from the same configs, and as it is computed."""

import json
from typing import Any

import pytest
import torch

from tests.workers.model.tiny_families import LONGROPE, tiny_config, tiny_model
from tests.workers.tiny_models import generate, prompt, tensors_of
from workers.config.context_length import max_positions
from workers.conformance.greedy import generated
from workers.errors import UnsupportedCheckpoint
from workers.model.decoder import build_model
from workers.placement.resident import Resident

_BASE = {"rope_theta": 10000.0}
_LLAMA3 = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.mark.parametrize(
    ("family", "stated", "rope", "length"),
    [
        ("llama", 256, {"rope_type": "default"}, 256),
        ("llama", 256, {"rope_type": "linear", "factor": 4.0}, 1024),
        ("llama", 256, {"rope_type": "linear", "factor": 2.5}, 640),
        ("llama", 256, {"rope_type": "dynamic", "factor": 4.0}, 256),
        (
            "llama",
            256,  # Qwen's recipe, which leaves the stated length
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256},
            1024,
        ),
        (
            "llama",
            1024,  # stated as it is with the scaling
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256},
            1024,
        ),
        ("llama", 256, {"rope_type": "yarn", "factor": 4.0}, 1024),
        (
            "llama",
            1024,
            {**_LLAMA3, "factor": 4.0, "original_max_position_embeddings": 256},
            1024,
        ),
        ("qwen2", 128, {"rope_type": "yarn", "factor": 2.0}, 256),
    ],
)
def test_lengths(family: str, stated: int, rope: dict[str, Any], length: int) -> None:
    config = tiny_config(family, max_position_embeddings=stated, rope_parameters={**_BASE, **rope})
    assert max_positions(config) == length


def test_a_scaling_of_the_layers_that_see_all(  # Gemma 3 states the length that it comes to
) -> None:
    rope = {
        "full_attention": {**_BASE, "rope_type": "linear", "factor": 8.0},
        "sliding_attention": {**_BASE, "rope_type": "default"},
    }
    assert max_positions(tiny_config("gemma3", rope_parameters=rope)) == 256
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}
    rope["full_attention"] = {**_BASE, **yarn}
    assert max_positions(tiny_config("olmo3", rope_parameters=rope)) == 1024


def test_longrope_ends_at_its_original_length() -> None:
    assert max_positions(tiny_config("phi3", **LONGROPE)) == 64


@pytest.mark.parametrize("factor", ["4", -1.0, 0, True, 1e12])
def test_a_factor_that_is_none(factor: Any) -> None:
    config = tiny_config("llama")
    config.rope_parameters = {**_BASE, "rope_type": "linear", "factor": factor}
    with pytest.raises(UnsupportedCheckpoint, match=r"factor is .*: it can be a number above 0"):
        max_positions(config)


@pytest.mark.parametrize("kind", ["yarn", "linear"])
def test_tokens_beyond_the_stated_length_are_those_of_transformers(kind: str) -> None:
    rope = {**_BASE, "rope_type": kind, "factor": 4.0}
    if kind == "yarn":
        rope["original_max_position_embeddings"] = 64
    reference = tiny_model("llama", max_position_embeddings=64, rope_parameters=rope)
    config = json.loads(reference.config.to_json_string())
    model = build_model(config, Resident(tensors_of(reference)), torch.float32)
    assert model.geometry.max_model_len == 256
    text = prompt(200, seed=3)
    assert generated(model, [text], 10) == [generate(reference, text, 10)]
