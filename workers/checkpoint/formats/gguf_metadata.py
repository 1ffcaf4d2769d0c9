"""What a GGUF file says of its model, and whether `transformers` hears it.

Owns the step from metadata to a config, beyond what transformers' own tables read. Invariant:
nothing that the file says of the model is passed over: it is read by transformers, set here, known
to change nothing, or the file is refused by name, since leaving it out would compute another model.
Does not know tensors' bytes.
"""

from collections.abc import Iterable, Mapping
from typing import Any, Final

import torch

from workers.errors import UnsupportedCheckpoint

_SET_HERE: Final = {
    "attention.key_length": "head_dim",
    "attention.sliding_window": "sliding_window",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
}
_CHECKED_HERE: Final = frozenset({"attention.value_length", "rope.dimension_count"})
_WITHOUT_EFFECT: Final = frozenset({"vocab_size", "tensor_data_layout"})
_UNUSED_IF_ZERO: Final = frozenset(
    {"expert_count", "expert_used_count", "attention.sliding_window"}
)

ROPE_FACTORS: Final = "rope_freqs.weight"
_LLAMA3_FACTORS: Final = (8.0, 32.0)
"""Of Llama 3.1 and 3.3, and of the small ones of Llama 3.2 (their config.json)."""


def completed(
    config: Mapping[str, Any],
    said: Mapping[str, Any],
    heard: Iterable[str],
    rope_factors: torch.Tensor | None,
) -> dict[str, Any]:
    """`config`, as transformers made it of the keys `heard`, with what else the file has `said`.

    Keys are without the architecture's name. `rope_factors` is the tensor by which rotations are
    slowed down, if the file has one. Raises UnsupportedCheckpoint.
    """
    config = dict(config)
    heard = set(heard)
    for key, value in said.items():
        if key in heard - _CHECKED_HERE or key in _WITHOUT_EFFECT | _CHECKED_HERE:
            continue
        if key in _UNUSED_IF_ZERO and not value:
            continue
        if key in _SET_HERE:
            config[_SET_HERE[key]] = value
        elif key == "attention.causal" and value:
            continue
        elif not key.startswith("rope.scaling."):
            raise UnsupportedCheckpoint(
                f"it says {key} = {value}, which nobody reads: give the safetensors checkpoint"
            )
    for key in sorted(_CHECKED_HERE & said.keys()):
        if said[key] != _head_dim(config):
            raise UnsupportedCheckpoint(
                f"it says {key} = {said[key]} where heads are of {_head_dim(config)}: give the "
                "safetensors checkpoint"
            )
    scaling = _scaling({k: v for k, v in said.items() if k.startswith("rope.scaling.")})
    if rope_factors is not None:
        scaling = _llama3(
            rope_factors, float(config.get("rope_theta", 10_000.0)), _head_dim(config)
        )
    if scaling is not None:
        config["rope_scaling"] = scaling
    return config


def _head_dim(config: Mapping[str, Any]) -> int:
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def _scaling(said: Mapping[str, Any]) -> dict[str, Any] | None:
    kind = said.get("rope.scaling.type", "none")
    if kind == "none" or (kind == "linear" and said.get("rope.scaling.factor", 1.0) == 1.0):
        return None
    if kind == "linear" and said.keys() <= {
        "rope.scaling.type",
        "rope.scaling.factor",
        "rope.scaling.original_context_length",
        "rope.scaling.finetuned",
    }:
        return {"rope_type": "linear", "factor": float(said["rope.scaling.factor"])}
    raise UnsupportedCheckpoint(
        f"it scales rotations by {kind!r}, which is not read from a GGUF file: give the "
        "safetensors checkpoint"
    )


def _llama3(factors: torch.Tensor, theta: float, head_dim: int) -> dict[str, Any]:
    """The parameters of Llama 3's scaling that give these `factors` # [head_dim / 2]: the file
    holds its result, by llama.cpp's convert_hf_to_gguf.py, and transformers wants its causes."""
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    plain = 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    for factor in _LLAMA3_FACTORS:
        parameters = {
            "rope_type": "llama3",
            "factor": factor,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }
        config = LlamaConfig(
            head_dim=head_dim,
            max_position_embeddings=131_072,
            rope_parameters={**parameters, "rope_theta": theta},
        )
        scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
        if factors.shape == plain.shape and torch.allclose(plain / scaled, factors, rtol=1e-4):
            return parameters
    raise UnsupportedCheckpoint(
        f"it slows rotations down by {ROPE_FACTORS}, and not as Llama 3 does: give the safetensors "
        "checkpoint"
    )
