"""Tiny models that embed, with random weights, one for each family that the tests compare.

Owns the configs, the checkpoints' files, and what transformers itself computes, one text at a time.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import CONFIG_MAPPING, AutoModel, AutoModelForMaskedLM

# Products this small gain nothing from a second thread, and wait long for it on a busy machine.
torch.set_num_threads(1)

VOCAB_SIZE = 300
MAX_POSITIONS = 64

_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": MAX_POSITIONS,
    "pad_token_id": 0,
}
_ROBERTA: dict[str, Any] = {"pad_token_id": 1, "max_position_embeddings": MAX_POSITIONS + 2}

CONFIGS: dict[str, dict[str, Any]] = {
    "bert": {"model_type": "bert"},
    "roberta": {"model_type": "roberta", **_ROBERTA},
    "xlm-roberta": {"model_type": "xlm-roberta", **_ROBERTA},
    "camembert": {"model_type": "camembert", **_ROBERTA},
    "distilbert": {
        "model_type": "distilbert",
        "dim": 32,
        "hidden_dim": 48,
        "n_layers": 3,
        "n_heads": 4,
    },
    "mpnet": {"model_type": "mpnet", **_ROBERTA},
    "electra": {"model_type": "electra", "embedding_size": 16},
    "albert": {"model_type": "albert", "embedding_size": 16},
    "deberta-v2": {
        "model_type": "deberta-v2",
        "relative_attention": True,
        "pos_att_type": ["p2c", "c2p"],
        "position_buckets": 8,
        "norm_rel_ebd": "layer_norm",
        "share_att_key": True,
    },
    "modernbert": {
        "model_type": "modernbert",
        "global_attn_every_n_layers": 2,
        "local_attention": 8,
        "bos_token_id": 2,
        "cls_token_id": 2,
        "eos_token_id": 3,
        "sep_token_id": 3,
    },
    "nomic_bert": {"model_type": "nomic_bert", "head_dim": 8},
    "qwen3": {"model_type": "qwen3", "num_key_value_heads": 2, "head_dim": 8},
    "gemma3_text": {
        "model_type": "gemma3_text",
        "num_key_value_heads": 2,
        "head_dim": 8,
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "use_bidirectional_attention": True,
    },
}


def config_of(family: str, **changes: Any) -> dict[str, Any]:
    """The parsed config.json of a family's tiny model."""
    return {**_COMMON, **CONFIGS[family], **changes}


def reference_model(
    family: str, *, head: bool = False, dtype: torch.dtype = torch.float32, **changes: Any
) -> Any:
    """The family's tiny model as transformers itself builds it, with attention computed eagerly and
    a config with `changes`; or the same below a head that guesses hidden tokens."""
    raw = config_of(family, **changes)
    config = CONFIG_MAPPING[raw["model_type"]].from_dict(dict(raw))
    build = AutoModelForMaskedLM if head else AutoModel
    torch.manual_seed(7)
    model = build.from_config(config, attn_implementation="eager")
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for _, parameter in sorted(model.base_model.named_parameters()):
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model.eval().requires_grad_(False)


def hidden_states(model: Any, token_ids: list[int]) -> torch.Tensor:
    """Of one text alone, by transformers: [num_tokens, hidden_size]."""
    inputs = torch.tensor([token_ids])
    with torch.inference_mode():
        output = model.base_model(input_ids=inputs, attention_mask=torch.ones_like(inputs))
    states: torch.Tensor = output.last_hidden_state[0]
    return states


def write_checkpoint(folder: Path, model: Any, config: dict[str, Any]) -> Path:
    """config.json and model.safetensors, without tied twins; returns `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(
        json.dumps({"architectures": [type(model).__name__], **config})
    )
    tensors = {
        name: tensor.contiguous()
        for name, tensor in model.state_dict().items()
        if name not in model.all_tied_weights_keys
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def write_sentence_files(
    folder: Path,
    pooling: dict[str, Any],
    kinds: tuple[str, ...] = ("Transformer", "Pooling", "Normalize"),
    max_seq_length: int | None = None,
) -> Path:
    """modules.json and what it names, as sentence-transformers writes them; returns `folder`."""
    steps = []
    for index, kind in enumerate(kinds):
        path = "" if index == 0 else f"{index}_{kind}"
        steps.append({"idx": index, "type": f"sentence_transformers.models.{kind}", "path": path})
        if kind == "Pooling":
            (folder / path).mkdir()
            (folder / path / "config.json").write_text(json.dumps(pooling))
    (folder / "modules.json").write_text(json.dumps(steps))
    if max_seq_length is not None:
        settings = json.dumps({"max_seq_length": max_seq_length, "do_lower_case": False})
        (folder / "sentence_bert_config.json").write_text(settings)
    return folder


def texts(*lengths: int, seed: int = 0) -> list[list[int]]:
    """Random token ids, none of them special."""
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randint(5, VOCAB_SIZE, (length,), generator=generator).tolist() for length in lengths
    ]
