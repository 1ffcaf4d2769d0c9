"""Tiny configs of further families, as `transformers` itself initialises and saves them.

Owns what differs between families' configs: sizes that are small, and what makes each family
different (windows, biases, experts) so large that leaving it out changes the tokens.
"""

from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from tests.workers.tiny_models import COMMON, CONFIGS, VOCAB_SIZE, config_of, fill_at_random

_SIZES = {k: v for k, v in COMMON.items() if k != "tie_word_embeddings"}  # a family's own
_EXPERTS: dict[str, Any] = {
    "num_experts": 12,  # as many as show whether 10 comes behind 9
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
}
_SLIDING = ["sliding_attention", "full_attention", "sliding_attention"]
_GPT2: dict[str, Any] = {"n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 256}

_WITH_SINKS = ("gpt_oss", "granite_swa")

FAMILIES: dict[str, dict[str, Any]] = {
    "apertus": {},
    "arcee": {},
    "biogpt": {"scale_embedding": False},
    "cohere": {"logit_scale": 1.0},
    "cohere2": {"logit_scale": 1.0, "sliding_window": 8, "layer_types": _SLIDING},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1}
    | {"moe_intermediate_size": 32, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1},
    "ernie4_5": {},
    "ernie4_5_moe": {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 32},
    "exaone4": {"sliding_window": 8, "layer_types": _SLIDING},
    "gemma": {},
    "gemma4_text": {"sliding_window": 8, "global_head_dim": 32, "num_kv_shared_layers": 0}
    | {"layer_types": ["sliding_attention", "sliding_attention", "full_attention"]}
    | {"hidden_size_per_layer_input": 16, "vocab_size_per_layer_input": VOCAB_SIZE},
    "glm4": {},
    "glm4_moe": {"n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1}
    | {"moe_intermediate_size": 32, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1},
    "gpt2": _GPT2,
    "gpt_neox": {"rotary_pct": 0.25, "use_parallel_residual": True},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2}
    | {"sliding_window": 8, "layer_types": _SLIDING},
    "granite": {},
    "granite_swa": {"sliding_window": 8},
    "granitemoe": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "helium": {},
    "minimax_m2": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8},
    "nemotron": {},
    "olmo": {},
    "olmo2": {},
    "olmo3": {"sliding_window": 8, "layer_types": _SLIDING},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "opt": {"ffn_dim": 96, "word_embed_proj_dim": 64},
    "persimmon": {},
    "phi": {"partial_rotary_factor": 0.25},
    "phimoe": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": {**_EXPERTS, "shared_expert_intermediate_size": 32},
    "qwen3_moe": _EXPERTS,
    "seed_oss": {},
    "smollm3": {},
    "stablelm": {"partial_rotary_factor": 0.5, "use_qkv_bias": True},
    "starcoder2": {"sliding_window": 8},
}

LONGROPE: dict[str, Any] = {
    "original_max_position_embeddings": 64,
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0 + 0.1 * index for index in range(8)],
        "long_factor": [4.0] * 8,
        "original_max_position_embeddings": 64,
        "factor": 4.0,
    },
}

# Computed by none of the plain formula; refused when the first token is computed, at the latest.
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "diffllama": ({}, "attends twice"),
    "moshi": ({"sliding_window": 8, "ffn_dim": 96}, "other means than a sliding window"),
}

REFUSED_BY_NAME: tuple[tuple[str, str], ...] = (
    ("bart", "not a decoder"),
    ("bert", "layers without a known attention"),
    ("bloom", "does not take another attention function"),
    ("codegen", "does not take another attention function"),
    ("deepseek_v3", "kv_lora_rank"),
    ("doge", "layers without a known attention"),
    ("falcon", "does not take another attention function"),
    ("falcon_h1", "layers of type"),
    ("gemma4", "more than text"),
    ("gpt_bigcode", "the values of the buffer"),
    ("gpt_neo", "does not take another attention function"),
    ("gptj", "does not take another attention function"),
    ("jamba", "layers of type"),
    ("llama4_text", "chunked_attention"),
    ("mamba", "layers of type"),
    ("mimo_v2_flash", "values of another size"),
    ("mpt", "does not take another attention function"),
    ("qwen3_5_text", "layers of type"),
    ("qwen3_next", "layers of type"),
    ("rwkv", "does not take another attention function"),
    ("t5", "not a decoder"),
    ("xlnet", "does not take another attention function"),
    ("zamba2", "layers of type"),
)
"""Before anything of them is loaded: model_type, and what the message says."""


def tiny_config(family: str, **changes: Any) -> Any:
    """Of one of `FAMILIES` or of `tiny_models.CONFIGS`."""
    if family in CONFIGS:
        raw = config_of(family, **changes)
    else:
        own = FAMILIES[family] if family in FAMILIES else REFUSED[family][0]
        raw = {"model_type": family, **_SIZES, **own, **changes}
        if "n_embd" in own:
            raw = {name: raw[name] for name in raw if name not in _SIZES or "_id" in name}
            raw["vocab_size"] = VOCAB_SIZE
    return CONFIG_MAPPING[raw["model_type"]].from_dict(raw)


def tiny_model(family: str, **changes: Any) -> Any:
    """As transformers builds it in fp32; what `sdpa` does not know runs `eager`."""
    config = tiny_config(family, **changes)
    capped = getattr(config, "attn_logit_softcapping", None)
    attention = "eager" if capped or family in _WITH_SINKS else "sdpa"
    model: Any = AutoModelForCausalLM.from_config(
        config,
        dtype=torch.float32,
        attn_implementation=None if family in REFUSED else attention,
    )
    fill_at_random(model)
    return model.eval().requires_grad_(False)


def save(model: Any, folder: Path, **options: Any) -> Path:
    """As `save_pretrained` writes it; returns `folder`."""
    model.save_pretrained(folder, **options)
    return folder
