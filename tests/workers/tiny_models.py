"""Tiny decoders with random weights, one for each family that the tests compare, made from a seed.

Owns the configs and the checkpoints' files. Invariant: the logits of a row are far apart (large
initial values; `smallest_gap` measures it), so that the greedy choice is no matter of rounding.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

# Products this small gain nothing from a second thread, and wait long for it on a busy machine.
torch.set_num_threads(1)

VOCAB_SIZE = 320
EOS_TOKEN_ID = 2

COMMON: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": EOS_TOKEN_ID,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}

CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", "rope_theta": 10000.0},
    "llama-tied": {"model_type": "llama", "tie_word_embeddings": True},
    "llama-rope-scaled": {
        "model_type": "llama",
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    },
    "mistral": {"model_type": "mistral", "sliding_window": 8},
    "qwen2": {"model_type": "qwen2"},
    "qwen2-sliding": {
        "model_type": "qwen2",
        "use_sliding_window": True,
        "sliding_window": 8,
        "max_window_layers": 1,
    },
    "qwen3": {"model_type": "qwen3", "tie_word_embeddings": True},
    "gemma2": {
        "model_type": "gemma2",
        "tie_word_embeddings": True,
        "sliding_window": 8,
        "query_pre_attn_scalar": 16,
        "attn_logit_softcapping": 5.0,
        "final_logit_softcapping": 30.0,
    },
    "gemma3": {
        "model_type": "gemma3_text",
        "tie_word_embeddings": True,
        "sliding_window": 8,
        "query_pre_attn_scalar": 16,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "phi3": {"model_type": "phi3", "sliding_window": None},
}


def config_of(family: str, **changes: Any) -> dict[str, Any]:
    """The parsed config.json of a family's tiny model."""
    return {**COMMON, **CONFIGS[family], **changes}


def reference_model(family: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """The family's tiny model as transformers itself builds it, on private memory.

    Soft-capped models run `eager` there, all others `sdpa`.
    """
    raw = config_of(family, **changes)
    config = CONFIG_MAPPING[raw["model_type"]].from_dict(dict(raw))
    attention = "eager" if raw.get("attn_logit_softcapping") else "sdpa"
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    fill_at_random(model)
    # Buffers keep the dtype that they were computed in, as from_pretrained has it.
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model.eval().requires_grad_(False)


def fill_at_random(model: Any) -> None:
    """Give every parameter values so large that the logits are far apart."""
    is_gemma = "gemma" in model.config.model_type
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            is_norm = "norm" in name or ".ln_" in name
            spread = 0.2 if is_norm or name.endswith("bias") else 0.25
            if is_gemma and "embed" in name:
                spread = 0.04  # scaled up by the model; a larger one would repeat its own token
            values = torch.randn(parameter.shape, generator=generator) * spread
            centre = 1.0 if is_norm and name.endswith("weight") and not is_gemma else 0.0
            parameter.copy_(values + centre)


def tensors_of(model: Any) -> dict[str, torch.Tensor]:
    """What a checkpoint of `model` holds: each tensor once, under its first name."""
    tensors: dict[str, torch.Tensor] = {}
    seen: set[int] = set()
    for name, tensor in model.state_dict().items():
        if tensor.data_ptr() not in seen:
            seen.add(tensor.data_ptr())
            tensors[name] = tensor
    return tensors


def write_checkpoint(
    folder: Path, family: str, dtype: torch.dtype = torch.float32, **changes: Any
) -> Path:
    """Write config.json, generation_config.json and model.safetensors; returns `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    model = reference_model(family, dtype, **changes)
    config = {
        "architectures": [type(model).__name__],
        "dtype": str(dtype).removeprefix("torch."),
        **config_of(family, **changes),
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    generation_config = {"bos_token_id": 1, "eos_token_id": [EOS_TOKEN_ID]}
    (folder / "generation_config.json").write_text(json.dumps(generation_config))
    tensors = {name: tensor.contiguous() for name, tensor in tensors_of(model).items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def write_tokenizer(folder: Path) -> Path:
    """Write a tokenizer.json whose tokens are the 256 bytes behind a few special ones, so that any
    text becomes ids below `VOCAB_SIZE` and comes back unchanged; returns `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    special = ["<pad>", "<s>", "</s>", "<unk>"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*special, *letters])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": "<pad>",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def prompt(length: int, seed: int = 0) -> list[int]:
    """`length` random token ids, none of them special."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(4, VOCAB_SIZE, (length,), generator=generator).tolist()


def generate(model: Any, token_ids: list[int], num_new: int) -> list[int]:
    """What transformers itself generates greedily behind `token_ids`, ignoring end of sequence."""
    inputs = torch.tensor([token_ids])
    output = model.generate(
        inputs,
        attention_mask=torch.ones_like(inputs),
        do_sample=False,
        max_new_tokens=num_new,
        eos_token_id=None,
        pad_token_id=0,
    )
    new: list[int] = output[0, len(token_ids) :].tolist()
    return new


def smallest_gap(logits: torch.Tensor) -> float:
    """How far the best logit of a row is above the second, in the row where it is least."""
    best = logits.float().topk(2, dim=-1).values
    return float((best[..., 0] - best[..., 1]).min())
