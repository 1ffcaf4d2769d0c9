"""The architectures that are read from GGUF files: what their metadata mean to `transformers`.

Owns the table, by llama.cpp's name of each. What an architecture has and its files do not say (the
scale of Gemma 2 27B's attention, every fourth layer without rotation) is here, too, as llama.cpp
computes it. Does not know tensors' bytes or names of parameters.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from workers.checkpoint.formats.gguf_metadata import ADVICE, Metadata
from workers.errors import UnsupportedCheckpoint

Config = dict[str, Any]

SIZES: Final = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
}
_SOFT_CAPS: Final = {
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
}
_EXPERTS: Final = {
    "expert_count": "num_experts",
    "expert_used_count": "num_experts_per_tok",
    "expert_feed_forward_length": "moe_intermediate_size",
}
_LOCAL_EXPERTS: Final = {
    "expert_count": "num_local_experts",
    "expert_used_count": "num_experts_per_tok",
}
_ROUTED_EXPERTS: Final = {
    "expert_count": "n_routed_experts",
    "expert_used_count": "num_experts_per_tok",
    "expert_feed_forward_length": "moe_intermediate_size",
    "expert_shared_count": "n_shared_experts",
    "expert_group_count": "n_group",
    "expert_group_used_count": "topk_group",
    "expert_weights_scale": "routed_scaling_factor",
    "expert_weights_norm": "norm_topk_prob",
    "leading_dense_block_count": "first_k_dense_replace",
}
_SIGMOID: Final = 2
"""llama.cpp's number of it, among the ways to weigh experts."""


@dataclass(frozen=True, slots=True)
class Architecture:
    """How one architecture's files become a config, and what was done to its tensors."""

    model_type: str
    names: Mapping[str, str] = field(default_factory=dict)
    """Of the config, by the file's keys: beside `SIZES`, or another word for one of them."""
    constants: Mapping[str, Any] = field(default_factory=dict)
    complete: Callable[[Metadata, Config], None] | None = None
    """What takes more than another name."""
    rotates: bool = True
    turns_parts: bool = False
    """Whether a part of a head alone may be turned."""
    local_rope: bool = False
    """Whether layers that see a window have rotations of their own."""
    window_period: int | None = None
    """Every how many layers one sees all, where the file has no pattern of its own."""
    interleaved: bool = False
    """Whether rows of queries and keys were put in pairs (rotation of neighbours)."""
    adds_one: bool = False
    """Whether norms were stored with 1 added."""


def _biases(said: Metadata, config: Config) -> None:
    config["attention_bias"] = said.has("attn_q.bias")
    config["mlp_bias"] = said.has("ffn_up.bias")


def _llama(said: Metadata, config: Config) -> None:
    _biases(said, config)
    window = said.get("attention.sliding_window") or None
    if said.get("expert_count", 0):
        config["model_type"] = "mixtral"
        config |= {name: said.get(key) for key, name in _LOCAL_EXPERTS.items()}
        config["sliding_window"] = window
    elif window is not None:
        config["model_type"] = "mistral"
        config["sliding_window"] = window


def _gemma(said: Metadata, config: Config, size_27b: int) -> None:
    """llama.cpp knows the 27B by its layers."""
    scalar = config["head_dim"]
    if config["num_hidden_layers"] == size_27b:
        scalar = config["hidden_size"] // config["num_attention_heads"]
    if (scale := said.get("attention.scale")) is not None:
        scalar = scale**-2
    config["query_pre_attn_scalar"] = scalar


def _gemma2(said: Metadata, config: Config) -> None:
    _gemma(said, config, size_27b=46)


def _gemma3(said: Metadata, config: Config) -> None:
    _gemma(said, config, size_27b=62)
    config.setdefault("final_logit_softcapping", None)


def _nemotron(said: Metadata, config: Config) -> None:
    _biases(said, config)
    said.get("attention.layer_norm_rms_epsilon")  # the same, by the name that the base class knows
    config.pop("rms_norm_eps", None)


def _real_width(said: Metadata, config: Config) -> None:
    """The file says four times the hidden size, whatever it is."""
    if (shape := said.shapes.get("blk.0.ffn_up.weight")) is not None:
        config["n_inner" if said.architecture == "gpt2" else "intermediate_size"] = shape[0]


def _gptneox(said: Metadata, config: Config) -> None:
    config["attention_bias"] = said.has("attn_qkv.bias")


def _starcoder2(said: Metadata, config: Config) -> None:
    config["use_bias"] = said.has("attn_q.bias")


def _stablelm(said: Metadata, config: Config) -> None:
    said.get("use_parallel_residual")  # llama.cpp goes by the norm
    config["use_parallel_residual"] = not said.has("ffn_norm.weight")
    config["use_qkv_bias"] = said.has("attn_q.bias")


def _olmo(said: Metadata, config: Config) -> None:
    if said.get("attention.layer_norm_epsilon", 1e-5) != 1e-5:
        raise UnsupportedCheckpoint(f"its norms have another epsilon than 1e-5: {ADVICE}")
    config["clip_qkv"] = said.get("attention.clamp_kqv") or None
    config["attention_bias"] = said.has("attn_q.bias")


def _olmo2(said: Metadata, config: Config) -> None:
    config["attention_bias"] = said.has("attn_q.bias")
    if "sliding_window" in config:
        config["model_type"] = "olmo3"


def _command_r(said: Metadata, config: Config) -> None:
    config["attention_bias"] = said.has("attn_q.bias")
    config["use_qk_norm"] = said.has("attn_q_norm.weight")


def _granite(said: Metadata, config: Config) -> None:
    _biases(said, config)
    config.setdefault("attention_multiplier", config["head_dim"] ** -0.5)


def _apertus(said: Metadata, config: Config) -> None:
    _attention_bias(said, config)
    for name in ("alpha_p", "alpha_n", "beta", "eps"):
        said.each(f"xielu.{name}")  # parameters of its layers


def _attention_bias(said: Metadata, config: Config) -> None:
    config["attention_bias"] = said.has("attn_q.bias")


def _seed_oss(said: Metadata, config: Config) -> None:
    _biases(said, config)
    config["attention_out_bias"] = said.has("attn_output.bias")


def _ernie(said: Metadata, config: Config) -> None:
    config["use_bias"] = said.has("attn_q.bias")


def _ernie_moe(said: Metadata, config: Config) -> None:
    _ernie(said, config)
    said.get("expert_shared_feed_forward_length")  # the tensors have it


def _routed(said: Metadata, config: Config) -> None:
    config["attention_bias"] = said.has("attn_q.bias")
    if said.get("expert_gating_func", _SIGMOID) != _SIGMOID:
        raise UnsupportedCheckpoint(f"it does not weigh its experts by a sigmoid: {ADVICE}")
    for name in ("n_group", "topk_group"):
        config[name] = config.get(name) or 1


def _glm4_moe(said: Metadata, config: Config) -> None:
    _routed(said, config)
    config["use_qk_norm"] = said.has("attn_q_norm.weight")


_LAYER_NORM: Final = {"attention.layer_norm_epsilon": "layer_norm_eps"}
_SCALES: Final = {
    "attention.scale": "attention_multiplier",
    "embedding_scale": "embedding_multiplier",
    "residual_scale": "residual_multiplier",
    "logit_scale": "logits_scaling",
}

ARCHITECTURES: Final[Mapping[str, Architecture]] = {
    "apertus": Architecture("apertus", complete=_apertus),
    "arcee": Architecture("arcee", complete=_biases, interleaved=True),
    "cohere2": Architecture(
        "cohere2",
        {**_LAYER_NORM, "logit_scale": "logit_scale"},
        complete=_attention_bias,
        window_period=4,
    ),
    "command-r": Architecture(
        "cohere", {**_LAYER_NORM, "logit_scale": "logit_scale"}, complete=_command_r
    ),
    "dots1": Architecture("dots1", _ROUTED_EXPERTS, complete=_routed),
    "ernie4_5": Architecture("ernie4_5", complete=_ernie),
    "ernie4_5-moe": Architecture(
        "ernie4_5_moe",
        {
            "expert_count": "moe_num_experts",
            "expert_used_count": "moe_k",
            "expert_feed_forward_length": "moe_intermediate_size",
            "expert_shared_count": "moe_num_shared_experts",
            "interleave_moe_layer_step": "moe_layer_interval",
            "leading_dense_block_count": "moe_layer_start_index",
        },
        complete=_ernie_moe,
    ),
    "exaone4": Architecture("exaone4", window_period=4),
    "gemma": Architecture("gemma", adds_one=True),
    "gemma2": Architecture("gemma2", _SOFT_CAPS, complete=_gemma2, window_period=2, adds_one=True),
    "gemma3": Architecture(
        "gemma3_text",
        {"final_logit_softcapping": "final_logit_softcapping"},
        complete=_gemma3,
        local_rope=True,
        window_period=6,
        adds_one=True,
    ),
    "glm4": Architecture("glm4", complete=_attention_bias, turns_parts=True),
    "glm4moe": Architecture("glm4_moe", _ROUTED_EXPERTS, complete=_glm4_moe, turns_parts=True),
    "gpt2": Architecture(
        "gpt2",
        {
            "context_length": "n_positions",
            "embedding_length": "n_embd",
            "block_count": "n_layer",
            "feed_forward_length": "n_inner",
            "attention.head_count": "n_head",
            "attention.layer_norm_epsilon": "layer_norm_epsilon",
        },
        complete=_real_width,
        rotates=False,
    ),
    "gptneox": Architecture(
        "gpt_neox",
        {**_LAYER_NORM, "use_parallel_residual": "use_parallel_residual"},
        complete=_gptneox,
        turns_parts=True,
    ),
    "granite": Architecture("granite", _SCALES, complete=_granite, interleaved=True),
    "granitemoe": Architecture(
        "granitemoe", {**_SCALES, **_LOCAL_EXPERTS}, complete=_granite, interleaved=True
    ),
    "llama": Architecture("llama", complete=_llama, interleaved=True),
    "nemotron": Architecture(
        "nemotron",
        {"attention.layer_norm_epsilon": "norm_eps"},
        complete=_nemotron,
        turns_parts=True,
        adds_one=True,
    ),
    "olmo": Architecture("olmo", complete=_olmo, interleaved=True),
    "olmo2": Architecture("olmo2", complete=_olmo2, local_rope=True, window_period=4),
    "olmoe": Architecture(
        "olmoe",
        {"expert_count": "num_experts", "expert_used_count": "num_experts_per_tok"},
        {"norm_topk_prob": False},
    ),
    "phi2": Architecture("phi", _LAYER_NORM, complete=_real_width, turns_parts=True),
    "phi3": Architecture("phi3", turns_parts=True),
    "qwen2": Architecture("qwen2"),
    "qwen2moe": Architecture(
        "qwen2_moe",
        {**_EXPERTS, "expert_shared_feed_forward_length": "shared_expert_intermediate_size"},
        {"norm_topk_prob": False},
    ),
    "qwen3": Architecture("qwen3", complete=_attention_bias),
    "qwen3moe": Architecture(
        "qwen3_moe", _EXPERTS, {"norm_topk_prob": True}, complete=_attention_bias
    ),
    "seed_oss": Architecture("seed_oss", complete=_seed_oss),
    "smollm3": Architecture("smollm3", complete=_biases, interleaved=True),
    "stablelm": Architecture("stablelm", _LAYER_NORM, complete=_stablelm, turns_parts=True),
    "starcoder2": Architecture(
        "starcoder2", {"attention.layer_norm_epsilon": "norm_epsilon"}, complete=_starcoder2
    ),
}
