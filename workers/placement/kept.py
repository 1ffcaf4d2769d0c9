"""Whether keys and values can be kept as the settings ask for.

Owns the refusal. Invariant: where they are quantized the native decoder computes, which alone reads
them; what can't be is said before weights are loaded, or at the latest before a request is taken.
"""

import json

import torch

from workers.checkpoint.formats.checkpoint import Checkpoint
from workers.config.encoder_settings import task_of
from workers.errors import InvalidSetting
from workers.kv.layout import FULL
from workers.model.native.decoder import supports
from workers.packed_format import decoded
from workers.settings import EngineSettings
from workers.skeleton.decoder import skeleton
from workers.skeleton.packed import put_packed
from workers.weight_format import float_dtype


def check_kept(checkpoint: Checkpoint, settings: EngineSettings) -> None:
    """Before the weights are there. What embeds keeps nothing. Raises InvalidSetting."""
    metadata = checkpoint.metadata()
    if settings.kv_cache_dtype == "auto" or task_of(metadata) == "embed":
        return
    shapes = {
        one.name: torch.empty(one.shape, dtype=one.dtype, device="meta")
        for one in checkpoint.tensors()
    }
    dtype = checkpoint.dtype or float_dtype(shapes)
    reason = None
    if settings.kv_bits != FULL:
        module = skeleton(json.loads(metadata["config"]), dtype)
        put_packed(module, decoded(metadata), dtype)
        module.eval()
        reason = supports(module, dtype, settings.cpu_kernels)
    require_kept(settings, dtype, reason)


def require_kept(settings: EngineSettings, dtype: torch.dtype, reason: str | None) -> None:
    """`reason`: why the native decoder does not compute the model. Raises InvalidSetting."""
    asked = f"--kv-cache-dtype is {settings.kv_cache_dtype}"
    if settings.kv_cache_dtype == "bf16" and dtype != torch.bfloat16:
        name = str(dtype).removeprefix("torch.")
        raise InvalidSetting(
            f"{asked}, and this model computes in {name}: leave it out, or add --dtype bfloat16"
        )
    if settings.kv_bits != FULL and reason is not None:
        raise InvalidSetting(
            f"{asked}, and this model is computed by transformers, which keeps keys and values as "
            f"they are ({reason}): leave it out"
        )
