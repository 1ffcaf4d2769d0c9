"""The config that `transformers` would have of a model in a GGUF file.

Owns the order of that: sizes and names by the architecture's table, then windows, then rotations.
Invariants: a config is made of what the file says and of nothing that transformers assumes for
another model; nothing that the file says is passed over. Does not know tensors' bytes.
"""

from collections.abc import Mapping
from typing import Final

from workers.checkpoint.formats.gguf_architectures import (
    ARCHITECTURES,
    SIZES,
    Architecture,
    Config,
)
from workers.checkpoint.formats.gguf_metadata import ADVICE, Metadata
from workers.checkpoint.formats.gguf_rotations import ReadTensor, local_base, rope_parameters
from workers.errors import CheckpointCorrupt, UnsupportedCheckpoint

_FULL, _SLIDING = "full_attention", "sliding_attention"
_WINDOWS: Final[Mapping[tuple[str, int | None], int]] = {
    ("exaone4", 64): 4096,
    ("gemma2", None): 4096,
}
"""Where the file says none: of an architecture, or of those with so many layers."""


def config_of(said: Metadata, read: ReadTensor) -> Config:
    """The config that `transformers` would have of this model. `read` gives a tensor of the file in
    fp32. Raises UnsupportedCheckpoint, CheckpointCorrupt."""
    architecture = ARCHITECTURES.get(said.architecture)
    if architecture is None:
        raise UnsupportedCheckpoint(
            f"the architecture {said.architecture!r} can't be served from a GGUF file: {ADVICE}"
        )
    config: Config = {"model_type": architecture.model_type, **architecture.constants}
    for key, name in {**SIZES, **architecture.names}.items():
        if (value := said.get(key)) is not None:
            config[name] = value
    heads = config.get("num_attention_heads") or config.get("n_head")
    width = config.get("hidden_size") or config.get("n_embd")
    if not heads or not width or "token_embd.weight" not in said.shapes:
        raise CheckpointCorrupt("it does not say how large the model is")
    if next_token_layers := said.get("nextn_predict_layers", 0):
        config["num_hidden_layers"] -= next_token_layers  # which guess ahead, and count as layers
    head_dim = said.get("attention.key_length", width // heads)
    if said.get("attention.value_length", head_dim) != head_dim:
        raise UnsupportedCheckpoint(
            f"it says attention.value_length = {said.get('attention.value_length')} where heads "
            f"are of {head_dim}: {ADVICE}"
        )
    config["head_dim"] = head_dim
    config["vocab_size"] = said.shapes["token_embd.weight"][0]
    config["tie_word_embeddings"] = "output.weight" not in said.shapes
    config["pad_token_id"] = None
    _add_windows(said, architecture, config)
    if architecture.rotates:
        _add_rotations(said, architecture, config, read)
    if architecture.complete is not None:
        architecture.complete(said, config)
    said.check_all_heard()
    return config


def _add_windows(said: Metadata, architecture: Architecture, config: Config) -> None:
    if architecture.model_type == "phi3":
        config["sliding_window"] = said.get("attention.sliding_window") or None
    if architecture.window_period is None:
        return
    layers = config["num_hidden_layers"]
    usual = _WINDOWS.get((said.architecture, layers), _WINDOWS.get((said.architecture, None), 0))
    if window := said.get("attention.sliding_window", usual):
        config["sliding_window"] = window
        config["layer_types"] = _layer_types(said, layers, architecture.window_period)
    elif architecture.model_type != "olmo2":
        config |= {"sliding_window": None, "layer_types": [_FULL] * layers}


def _layer_types(said: Metadata, num_layers: int, period: int) -> list[str]:
    pattern = said.each("attention.sliding_window_pattern")
    if isinstance(pattern, list):
        if len(pattern) != num_layers:
            raise CheckpointCorrupt("its sliding_window_pattern is not as long as its layers many")
        return [_SLIDING if slides else _FULL for slides in pattern]
    period = period if pattern is None else int(pattern)
    if period == 0:  # as llama.cpp has it
        return [_SLIDING] * num_layers
    return [_SLIDING if (index + 1) % period else _FULL for index in range(num_layers)]


def _add_rotations(
    said: Metadata, architecture: Architecture, config: Config, read: ReadTensor
) -> None:
    rope = rope_parameters(said, config["head_dim"], read)
    if not architecture.turns_parts and rope.pop("partial_rotary_factor") != 1:
        raise UnsupportedCheckpoint(
            f"it says rope.dimension_count = {said.get('rope.dimension_count')} where heads are of "
            f"{config['head_dim']}: {ADVICE}"
        )
    if rope["rope_type"] == "longrope":
        config["original_max_position_embeddings"] = rope["original_max_position_embeddings"]
    if architecture.local_rope and "sliding_window" in config:
        usual = rope["rope_theta"] if architecture.model_type == "olmo2" else 10_000.0
        local = {"rope_type": "default", "rope_theta": local_base(said, usual)}
        config["rope_parameters"] = {_FULL: rope, _SLIDING: local}
    else:
        config["rope_parameters"] = rope
        if local_base(said, rope["rope_theta"]) != rope["rope_theta"]:
            raise UnsupportedCheckpoint(f"it turns some layers by another base: {ADVICE}")
