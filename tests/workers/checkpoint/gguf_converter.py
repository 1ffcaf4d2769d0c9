"""Models of transformers as llama.cpp's converter writes them to GGUF files.

Owns what the converter of November 2026 does to each architecture: which keys it writes, how it
names, merges and reorders tensors. Written from its sources, and compared with its own files. Knows
nothing of how they are read.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf.constants import MODEL_ARCH_NAMES

Keys = dict[str, Any]
VOCABULARY = [f"word{number}" for number in range(320)]


@dataclass(frozen=True)
class Converter:
    """Of one architecture: what it writes besides, or instead of, what the base class does."""

    architecture: str
    keys: Callable[[Any], Keys] = lambda config: {}
    base: bool = True
    pairs: bool = False
    """Rows of queries and keys in pairs."""
    plus_one: bool = False
    """To norms."""


def _llama(config: Any) -> Keys:
    head_dim = getattr(config, "head_dim", None) or (
        config.hidden_size // config.num_attention_heads
    )
    return {"vocab_size": config.vocab_size, "rope.dimension_count": head_dim}


def _turned(config: Any, head_dim: int | None = None) -> int:
    """Dimensions of a head that are turned."""
    head_dim = head_dim or config.hidden_size // config.num_attention_heads
    return int(config.rope_parameters.get("partial_rotary_factor", 1.0) * head_dim)


def _gemma(config: Any) -> Keys:
    return {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
    }


def _gemma2(config: Any) -> Keys:
    return {
        **_gemma(config),
        "attn_logit_softcapping": config.attn_logit_softcapping,
        "final_logit_softcapping": config.final_logit_softcapping,
        "attention.sliding_window": config.sliding_window,
    }


def _gemma3(config: Any) -> Keys:
    caps = config.final_logit_softcapping
    return {
        "attention.sliding_window": config.sliding_window,
        **({"final_logit_softcapping": caps} if caps else {}),
    }


def _pattern(config: Any) -> Keys:
    if not config.sliding_window:
        return {}
    return {
        "attention.sliding_window": config.sliding_window,
        "attention.sliding_window_pattern": [
            kind == "sliding_attention" for kind in config.layer_types
        ],
    }


def _phi3(config: Any) -> Keys:
    rope = config.rope_parameters
    original = rope.get("original_max_position_embeddings") or (
        config.original_max_position_embeddings
    )
    found = {
        "context_length": config.max_position_embeddings,
        "rope.scaling.original_context_length": original,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "block_count": config.num_hidden_layers,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "rope.dimension_count": _turned(config),
        "rope.freq_base": rope["rope_theta"],
        "attention.sliding_window": config.sliding_window or 0,
    }
    if "long_factor" in rope:
        scale = config.max_position_embeddings / original
        found["rope.scaling.attn_factor"] = float(
            np.sqrt(1 + np.log(scale) / np.log(original)) if scale > 1 else 1.0
        )
    return found


def _phi2(config: Any) -> Keys:
    return {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": 4 * config.hidden_size,
        "block_count": config.num_hidden_layers,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_attention_heads,
        "attention.layer_norm_epsilon": config.layer_norm_eps,
        "rope.dimension_count": _turned(config),
    }


def _gpt2(config: Any) -> Keys:
    return {
        "block_count": config.n_layer,
        "context_length": config.n_positions,
        "embedding_length": config.n_embd,
        "feed_forward_length": 4 * config.n_embd,
        "attention.head_count": config.n_head,
        "attention.layer_norm_epsilon": config.layer_norm_epsilon,
    }


def _gpt_neox(config: Any) -> Keys:
    return {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "rope.dimension_count": _turned(config),
        "attention.head_count": config.num_attention_heads,
        "use_parallel_residual": config.use_parallel_residual,
        "attention.layer_norm_epsilon": config.layer_norm_eps,
    }


def _stablelm(config: Any) -> Keys:
    return {
        **_gpt_neox(config),
        "attention.head_count_kv": config.num_key_value_heads,
    }


def _nemotron(config: Any) -> Keys:
    factor = config.rope_parameters.get("factor")
    scaling = {"rope.scaling.type": "linear", "rope.scaling.factor": factor}
    return {
        "vocab_size": config.vocab_size,
        "attention.layer_norm_epsilon": config.norm_eps,
        "rope.dimension_count": _turned(config),
        **(scaling if factor else {"rope.scaling.type": "none"}),
    }


def _cohere(config: Any) -> Keys:
    return {"logit_scale": config.logit_scale, "rope.scaling.type": "none"}


def _cohere2(config: Any) -> Keys:
    return {
        **_cohere(config),
        "attention.sliding_window": config.sliding_window,
        "vocab_size": config.vocab_size,
        "rope.dimension_count": config.hidden_size // config.num_attention_heads,
    }


def _granite(config: Any) -> Keys:
    return {
        **_llama(config),
        "attention.scale": config.attention_multiplier,
        "embedding_scale": config.embedding_multiplier,
        "residual_scale": config.residual_multiplier,
        "logit_scale": config.logits_scaling,
    }


def _olmo(config: Any) -> Keys:
    clip = {} if config.clip_qkv is None else {"attention.clamp_kqv": config.clip_qkv}
    return {"attention.layer_norm_epsilon": 1e-5, **clip}


def _glm4(config: Any) -> Keys:
    return {"rope.dimension_count": _turned(config, config.head_dim)}


def _routed(config: Any) -> Keys:
    return {
        "expert_feed_forward_length": config.moe_intermediate_size,
        "leading_dense_block_count": config.first_k_dense_replace,
        "expert_shared_count": config.n_shared_experts,
        "expert_weights_scale": config.routed_scaling_factor,
        "expert_weights_norm": config.norm_topk_prob,
    }


def _dots1(config: Any) -> Keys:
    return {"expert_count": config.n_routed_experts, **_routed(config)}


def _glm4_moe(config: Any) -> Keys:
    return {
        "block_count": config.num_hidden_layers + 1,
        "expert_gating_func": 2,
        "nextn_predict_layers": 1,
        **_glm4(config),
        **_dots1(config),
    }


def _ernie_moe(config: Any) -> Keys:
    return {
        "expert_count": config.moe_num_experts,
        "expert_used_count": config.moe_k,
        "interleave_moe_layer_step": config.moe_layer_interval,
        "leading_dense_block_count": config.moe_layer_start_index,
        "expert_feed_forward_length": config.moe_intermediate_size,
        "expert_shared_count": config.moe_num_shared_experts,
        "expert_shared_feed_forward_length": config.intermediate_size // config.num_key_value_heads,
    }


def _qwen2_moe(config: Any) -> Keys:
    return {
        "expert_feed_forward_length": config.moe_intermediate_size,
        "expert_shared_feed_forward_length": config.shared_expert_intermediate_size,
    }


CONVERTERS: Mapping[str, Converter] = {
    "apertus": Converter("apertus", _llama),
    "arcee": Converter("arcee", _llama, pairs=True),
    "cohere": Converter("command-r", _cohere),
    "cohere2": Converter("cohere2", _cohere2),
    "dots1": Converter("dots1", _dots1),
    "ernie4_5": Converter("ernie4_5"),
    "ernie4_5_moe": Converter("ernie4_5-moe", _ernie_moe),
    "exaone4": Converter(
        "exaone4", lambda config: {"vocab_size": config.vocab_size, **_pattern(config)}
    ),
    "gemma": Converter("gemma", _gemma, base=False, plus_one=True),
    "gemma2": Converter("gemma2", _gemma2, base=False, plus_one=True),
    "gemma3_text": Converter("gemma3", _gemma3, plus_one=True),
    "glm4": Converter("glm4", _glm4),
    "glm4_moe": Converter("glm4moe", _glm4_moe),
    "gpt2": Converter("gpt2", _gpt2, base=False),
    "gpt_neox": Converter("gptneox", _gpt_neox, base=False),
    "granite": Converter("granite", _granite, pairs=True),
    "granitemoe": Converter("granitemoe", _granite, pairs=True),
    "llama": Converter("llama", _llama, pairs=True),
    "mistral": Converter("llama", _llama, pairs=True),
    "mixtral": Converter("llama", _llama, pairs=True),
    "nemotron": Converter("nemotron", _nemotron, plus_one=True),
    "olmo": Converter("olmo", _olmo, pairs=True),
    "olmo2": Converter("olmo2"),
    "olmo3": Converter("olmo2", _pattern),
    "olmoe": Converter("olmoe"),
    "phi": Converter("phi2", _phi2, base=False),
    "phi3": Converter("phi3", _phi3, base=False),
    "qwen2": Converter("qwen2"),
    "qwen2_moe": Converter("qwen2moe", _qwen2_moe),
    "qwen3": Converter("qwen3"),
    "qwen3_moe": Converter(
        "qwen3moe", lambda config: {"expert_feed_forward_length": config.moe_intermediate_size}
    ),
    "seed_oss": Converter("seed_oss"),
    "smollm3": Converter("smollm3", _llama, pairs=True),
    "stablelm": Converter("stablelm", _stablelm, base=False),
    "starcoder2": Converter("starcoder2"),
}
"""By model_type."""


def convert(
    model: Any,
    path: Path,
    *,
    said: Mapping[str, Any] | None = None,
    num_parts: int = 1,
    fuse_qkv: bool = False,
    requantized: bool = False,
) -> Path:
    """The model in F32, with a tokenizer of as many words; `said` are further keys. `requantized`:
    as llama.cpp's tools write it anew, without dimensions of 1 at the front of a shape. Returns the
    path of the file, or of the first part."""
    config = model.config
    converter = CONVERTERS[config.model_type]
    tensors = dict(_tensors(model, converter))
    if fuse_qkv:
        tensors = dict(_fused(tensors))
    keys = {**(_base(config) if converter.base else {}), **converter.keys(config), **(said or {})}
    for name, tensor in _rotations(config).items():
        tensors[name] = tensor
    if requantized:
        tensors = {name: tensor.squeeze(0) for name, tensor in tensors.items()}
    if num_parts == 1:
        _write(path, converter.architecture, keys, _xielu(model), tensors)
        return path
    names = sorted(tensors)
    paths = [
        path.with_name(f"{path.stem}-{number:05d}-of-{num_parts:05d}.gguf")
        for number in range(1, num_parts + 1)
    ]
    for number, part in enumerate(paths):
        split = {"split.no": number, "split.count": num_parts}
        split["split.tensors.count"] = len(names)
        own = {name: tensors[name] for name in names[number::num_parts]}
        _write(part, converter.architecture, {} if number else keys, split, own, number == 0)
    return paths[0]


def _write(
    path: Path,
    architecture: str,
    keys: Keys,
    others: Keys,
    tensors: Mapping[str, torch.Tensor],
    with_tokenizer: bool = True,
) -> None:
    writer = gguf.GGUFWriter(path, architecture)
    whole = {f"{architecture}.{key}": value for key, value in keys.items()}
    for key, value in {**whole, **others}.items():
        if isinstance(value, list):
            writer.add_array(key, value)
        elif isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif key == "split.tensors.count":
            writer.add_int32(key, value)
        elif key.startswith("split."):
            writer.add_uint16(key, value)
        else:
            writer.add_uint32(key, value)
    if with_tokenizer:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("default")
        writer.add_token_list(VOCABULARY)
        writer.add_token_types([1] * len(VOCABULARY))
        writer.add_token_merges([])
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
    for name, tensor in tensors.items():
        writer.add_tensor(name, np.ascontiguousarray(tensor.float().numpy()))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _base(config: Any) -> Keys:
    """What the base class writes for every text model."""

    def first(*names: str) -> Any:
        return next(
            (getattr(config, n) for n in names if getattr(config, n, None) is not None), None
        )

    nested = config.rope_parameters
    rope = nested.get("full_attention", nested)
    found = {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "rope.freq_base": rope["rope_theta"],
        "rope.freq_base_swa": nested.get("sliding_attention", {}).get("rope_theta"),
        "attention.layer_norm_rms_epsilon": first("rms_norm_eps", "norm_eps"),
        "attention.layer_norm_epsilon": first(
            "layer_norm_eps", "layer_norm_epsilon", "norm_epsilon"
        ),
        "expert_count": first("num_local_experts", "num_experts"),
        "expert_used_count": first("num_experts_per_tok"),
        "expert_group_count": first("n_group"),
        "expert_group_used_count": first("topk_group"),
        "attention.key_length": None,
        "attention.value_length": None,
    }
    if config.model_type not in ("granite", "granitemoe") and getattr(config, "head_dim", None):
        found["attention.key_length"] = found["attention.value_length"] = config.head_dim
    if rope["rope_type"] in ("linear", "yarn"):
        found["rope.scaling.type"] = rope["rope_type"]
        found["rope.scaling.factor"] = rope["factor"]
    if rope["rope_type"] == "yarn":
        scaling = {
            "original_context_length": "original_max_position_embeddings",
            "yarn_attn_factor": "attention_factor",
            "yarn_beta_fast": "beta_fast",
            "yarn_beta_slow": "beta_slow",
        }
        found |= {f"rope.scaling.{key}": rope.get(name) for key, name in scaling.items()}
    return {key: value for key, value in found.items() if value is not None}


def _rotations(config: Any) -> dict[str, torch.Tensor]:
    """The tensors by which rotations are scaled."""
    rope = getattr(config, "rope_parameters", None) or {}
    if "long_factor" in rope:
        return {
            f"rope_factors_{kind}.weight": torch.tensor(rope[f"{kind}_factor"])
            for kind in ("long", "short")
        }
    if rope.get("rope_type") != "llama3":
        return {}
    head_dim = getattr(config, "head_dim", config.hidden_size // config.num_attention_heads)
    original, slower = rope["original_max_position_embeddings"], []
    for index in range(0, head_dim, 2):
        length = 2 * np.pi * rope["rope_theta"] ** (index / head_dim)
        low, high = original / rope["low_freq_factor"], original / rope["high_freq_factor"]
        smooth = (original / length - rope["low_freq_factor"]) / (
            rope["high_freq_factor"] - rope["low_freq_factor"]
        )
        between = 1 / ((1 - smooth) / rope["factor"] + smooth)
        slower.append(1.0 if length < high else rope["factor"] if length > low else between)
    return {"rope_freqs.weight": torch.tensor(slower)}


def _xielu(model: Any) -> Keys:
    """Apertus' activation, a number a layer."""
    if model.config.model_type != "apertus":
        return {}
    return {
        f"xielu.{name}": [
            float(getattr(layer.mlp.act_fn, name).float()) for layer in model.model.layers
        ]
        for name in ("alpha_p", "alpha_n", "beta", "eps")
    }


def _tensors(model: Any, converter: Converter) -> Iterator[tuple[str, torch.Tensor]]:
    config = model.config
    kinds = {name: kind for kind, name in MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(kinds[converter.architecture], config.num_hidden_layers)
    tied = config.tie_word_embeddings
    for name, tensor in model.state_dict().items():
        if ".act_fn." in name or (name == "lm_head.weight" and tied):
            continue
        yield from _converted(name, tensor, config, converter, names)


def _converted(
    name: str, tensor: torch.Tensor, config: Any, converter: Converter, names: Any
) -> Iterator[tuple[str, torch.Tensor]]:
    layer = re.search(r"\.(\d+)\.", name)
    block = f"blk.{layer[1]}." if layer else ""
    if converter.plus_one and name.endswith("norm.weight"):
        tensor = tensor + 1
    if converter.pairs and re.search(r"\.[qk]_proj\.", name):
        heads = config.num_attention_heads if ".q_proj." in name else config.num_key_value_heads
        tensor = _in_pairs(tensor, heads)
    if converter.architecture == "gpt2" and re.search(r"c_(attn|proj|fc)\.weight$", name):
        tensor = tensor.T
    if converter.architecture == "gptneox" and "query_key_value" in name:
        heads = config.num_attention_heads
        split = tensor.reshape(heads, 3, -1, *tensor.shape[1:])
        tensor = split.transpose(0, 1).reshape(tensor.shape)
    if name.endswith("experts.gate_up_proj"):
        gate, up = tensor.chunk(2, dim=1)
        yield f"{block}ffn_gate_exps.weight", gate
        yield f"{block}ffn_up_exps.weight", up
    elif name.endswith("experts.down_proj"):
        yield f"{block}ffn_down_exps.weight", tensor
    elif name.endswith("e_score_correction_bias"):
        yield f"{block}exp_probs_b.bias", tensor
    elif name.endswith("block_sparse_moe.router.weight"):
        yield f"{block}ffn_gate_inp.weight", tensor
    elif name == "lm_head.weight":
        yield "output.weight", tensor
    else:
        found = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert found is not None, name
        yield found, tensor


def _in_pairs(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """Row i of a head's first half before row i of the second."""
    halves = tensor.reshape(heads, 2, -1, *tensor.shape[1:])
    return halves.transpose(1, 2).reshape(tensor.shape)


def _fused(tensors: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    """As `--fuse-qkv` has it."""
    for name, tensor in tensors.items():
        part = re.fullmatch(r"(blk\.\d+\.attn_)([qkv])(\.\w+)", name)
        if part is None:
            yield name, tensor
        elif part[2] == "q":
            parts = [tensors[f"{part[1]}{kind}{part[3]}"] for kind in "qkv"]
            yield f"{part[1]}qkv{part[3]}", torch.cat(parts)


def keys_of(path: Path) -> Keys:
    """All but the tokenizer's, for comparing two files."""
    reader = gguf.GGUFReader(path)
    return {
        key: json.loads(json.dumps(field.contents(), default=lambda value: value.item()))
        for key, field in reader.fields.items()
        if not key.startswith(("GGUF.", "general.", "tokenizer."))
    }
