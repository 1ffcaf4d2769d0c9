"""A decoder of the `transformers` library as its config describes it, before there are weights.

Owns which architectures are computed here and how one is built. Invariants: its parameters are on
meta, so it costs next to nothing however large the model; code that came with a checkpoint never
runs. Does not know weights, or how the architecture is computed.
"""

import copy
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedConfig
from transformers.initialization import no_init_weights

from workers.config.architecture import architecture_errors, check_config
from workers.errors import UnsupportedCheckpoint
from workers.skeleton.attention_hook import NAME
from workers.skeleton.buffers import compute_buffers

_LAYER_TYPES = frozenset({"full_attention", "sliding_attention"})
_OTHER_MEDIA = frozenset({"audio_config", "vision_config"})


def skeleton(raw_config: Mapping[str, Any], dtype: torch.dtype) -> Any:
    """The architecture with its parameters on meta and its derived buffers computed."""
    check_config(raw_config)
    with architecture_errors(
        f"{raw_config.get('model_type')!r} can't be built by this config.json"
    ):
        return _skeleton(raw_config, dtype)


def _skeleton(raw_config: Mapping[str, Any], dtype: torch.dtype) -> Any:
    model_type = raw_config.get("model_type")
    if model_type not in CONFIG_MAPPING:
        raise UnsupportedCheckpoint(
            f"model_type {model_type!r} is not one that the transformers library knows"
            + (
                "; the checkpoint brings its own code (auto_map), which is never run here"
                if "auto_map" in raw_config
                else ""
            )
        )
    with architecture_errors(f"config.json is none of model_type {model_type!r}"):
        config = CONFIG_MAPPING[model_type].from_dict(_decoded(raw_config))
    _check_config(config)
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    no_interface = f"{model_class.__name__} does not take another attention function"
    if not model_class._supports_sdpa and not model_class._supports_attention_backend:
        raise UnsupportedCheckpoint(no_interface)
    # Initial values would only be overwritten. Ties are made when the tensors are known.
    try:
        with no_init_weights(), torch.device("meta"):
            module = model_class._from_config(config, dtype=dtype, attn_implementation=NAME)
    except KeyError as error:
        if error.args == (NAME,):  # it looked for a class of that name
            raise UnsupportedCheckpoint(no_interface) from error
        raise
    attentions(module)
    compute_buffers(module)
    return module


def _decoded(raw_config: Mapping[str, Any]) -> dict[str, Any]:
    """A copy in which infinity is a number again: JSON has no word for it."""
    decoded: dict[str, Any] = PreTrainedConfig._decode_special_floats(
        copy.deepcopy(dict(raw_config))
    )
    return decoded


def _check_config(config: Any) -> None:
    name = config.model_type
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING or config.is_encoder_decoder:
        raise UnsupportedCheckpoint(f"model_type {name!r} is not a decoder that generates text")
    if config.get_text_config() is not config or config.sub_configs.keys() & _OTHER_MEDIA:
        raise UnsupportedCheckpoint(
            f"model_type {name!r} takes more than text; serve its text model"
        )
    other_layers = set(getattr(config, "layer_types", None) or ()) - _LAYER_TYPES
    if other_layers:
        raise UnsupportedCheckpoint(
            f"model_type {name!r} has layers of type {sorted(other_layers)}"
        )
    for attribute in ("num_kv_shared_layers", "kv_lora_rank", "use_bidirectional_attention"):
        if getattr(config, attribute, None):
            raise UnsupportedCheckpoint(
                f"model_type {name!r} with {attribute} is not computed here"
            )


def attentions(module: Any) -> list[Any]:
    """The attention module of each layer. Raises UnsupportedCheckpoint."""
    found: dict[int, Any] = {}
    for part in module.modules():
        index = getattr(part, "layer_idx", None)
        if isinstance(index, int) and hasattr(part, "is_causal") and head_dim(part):
            if index in found:
                raise UnsupportedCheckpoint(
                    f"{type(module).__name__} has several attentions in layer {index}"
                )
            found[index] = part
    indices = range(module.config.num_hidden_layers)
    if sorted(found) != list(indices):
        raise UnsupportedCheckpoint(f"{type(module).__name__} has layers without a known attention")
    for index in indices:
        if not found[index].is_causal:
            raise UnsupportedCheckpoint(f"{type(module).__name__} is not causal in layer {index}")
        size = head_dim(found[index])
        if getattr(found[index], "v_head_dim", size) != size:
            name = type(module).__name__
            raise UnsupportedCheckpoint(f"{name} has values of another size than keys")
    return [found[index] for index in indices]


def head_dim(attention: Any) -> int | None:
    """Each family's word for it."""
    return getattr(attention, "head_dim", None) or getattr(attention, "head_size", None)


def layers_of(module: Any) -> tuple[torch.nn.Module, ...]:
    """Its layers, in order: the modules of one list, each with one of `attentions` in it. Raises
    UnsupportedCheckpoint."""
    own = attentions(module)
    lists = [part for part in module.modules() if isinstance(part, torch.nn.ModuleList)]
    for layers in lists:
        if len(layers) == len(own) and all(
            attention in set(layer.modules()) for layer, attention in zip(layers, own, strict=True)
        ):
            return tuple(layers)
    raise UnsupportedCheckpoint(f"{type(module).__name__} has no list of layers")


class LayerNames(NamedTuple):
    """What the names of a layer's tensors begin with, and the rest of each."""

    prefix: str
    names: tuple[str, ...]


def names_of_layers(module: Any) -> tuple[LayerNames, ...]:
    """Of each layer the parameters that are its alone. Raises UnsupportedCheckpoint."""
    names = {part: name for name, part in module.named_modules()}
    ties = module.all_tied_weights_keys
    tied = {*ties.keys(), *ties.values()}
    found = []
    for layer in layers_of(module):
        prefix = f"{names[layer]}."
        own = tuple(name for name, _ in layer.named_parameters() if prefix + name not in tied)
        found.append(LayerNames(prefix, own))
    return tuple(found)
