"""What a model that embeds will take, from its headers alone.

Owns the figures that differ from a decoder's: no keys and values are kept, no logits are made, and
a step computes whole texts. Invariant: no weight is read.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from workers.checkpoint.formats.checkpoint import SourceTensor
from workers.checkpoint.plan import make_plan
from workers.errors import InvalidSetting
from workers.messages import Estimate
from workers.model.encoder import EmbeddingModel, build_embedding_model


def embedding_estimate(
    metadata: Mapping[str, str],
    tensors: Sequence[SourceTensor],
    dtype: torch.dtype,
    max_model_len: int | None,
    max_num_batched_tokens: int,
) -> Estimate:
    """All figures; lengths in tokens, None being the model's own. Raises CheckpointError as loading
    it would, and InvalidSetting where the model is shorter than `max_model_len`."""
    shapes = {one.name: torch.empty(one.shape, dtype=one.dtype, device="meta") for one in tensors}
    model = build_embedding_model(metadata, shapes, dtype)
    max_model_len = max_model_len or model.advised_max_model_len
    if max_model_len > model.max_model_len:
        raise InvalidSetting(
            f"--max-model-len is {max_model_len}, but this model was made for "
            f"{model.max_model_len} tokens"
        )
    return Estimate(
        architecture=type(model.module).__name__,
        dtype=str(dtype).removeprefix("torch."),
        num_parameters=sum(one.numel() for one in model.module.parameters()),
        num_tensors=len(tensors),
        max_model_len=max_model_len,
        segment_bytes=make_plan(tensors, metadata).segment_bytes,
        kv_bytes_per_token=0,
        kv_bytes_per_sequence=0,
        prefill_bytes=_step_bytes(
            model, max(max_num_batched_tokens, max_model_len), max_model_len, dtype
        ),
        logits_bytes_per_sequence=0,
        stays_because="a model that embeds is not offloaded",
        rank=None,
    )


def _step_bytes(
    model: EmbeddingModel, num_tokens: int, max_model_len: int, dtype: torch.dtype
) -> int:
    """What a step of `num_tokens` keeps at its height: rows as wide as the residual stream and as
    the widest layer, pooling's float32; the mask, and where transformers computes attention
    eagerly, all scores twice."""
    config: Any = model.module.config
    widths = [one.shape[0] for one in model.module.parameters() if one.ndim > 1]
    widest = max(width for width in widths if width != model.vocab_size)
    size = model.embedding_size
    rows = num_tokens * ((4 * size + 3 * widest) * dtype.itemsize + 2 * size * 4)
    pairs = num_tokens * max_model_len
    if config._attn_implementation == "eager":
        return rows + 2 * pairs * int(config.num_attention_heads) * 4
    return rows + pairs * 5
