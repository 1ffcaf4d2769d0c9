"""A model of the `transformers` library that embeds text, as its config describes it, without any
head and before there are weights.

Owns which architectures embed here and how one is built. Invariants as for a decoder's.
"""

import copy
import inspect
from collections.abc import Mapping
from typing import Any, Final

import torch
from transformers import CONFIG_MAPPING, MODEL_MAPPING
from transformers.initialization import no_init_weights

from workers.config.architecture import architecture_errors, check_config
from workers.config.encoder_settings import ENCODERS
from workers.errors import UnsupportedCheckpoint
from workers.skeleton.buffers import compute_buffers

_DECODERS: Final = frozenset({"gemma3_text", "llama", "mistral", "qwen2", "qwen3"})
"""Model types that some embedders were made of. In each a token sees no padding behind it."""


def skeleton(raw_config: Mapping[str, Any], dtype: torch.dtype) -> Any:
    """The architecture with its parameters on meta and its derived buffers computed."""
    check_config(raw_config)
    name = raw_config.get("model_type")
    if name not in ENCODERS | _DECODERS:
        raise UnsupportedCheckpoint(
            f"model_type {name!r} is not one that embeds text here; known are "
            f"{', '.join(sorted(ENCODERS | _DECODERS))}"
        )
    with architecture_errors(f"{name!r} can't be built by this config.json"):
        config = CONFIG_MAPPING[name].from_dict(copy.deepcopy(dict(raw_config)))
        model_class = MODEL_MAPPING[type(config)]
        attention = "sdpa" if model_class._supports_sdpa else "eager"
        takes = inspect.signature(model_class.__init__).parameters
        options = {"add_pooling_layer": False} if "add_pooling_layer" in takes else {}
        with no_init_weights(), torch.device("meta"):
            module = model_class._from_config(
                config, dtype=dtype, attn_implementation=attention, **options
            )
        compute_buffers(module)
    return module
