"""What the rest of the instance must know of a decoder to drive it, read off its modules.

Invariant: plain numbers, that stay as they are whoever computes the model and wherever its weights
are.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from workers.config.context_length import max_positions
from workers.config.ends import end_tokens
from workers.kv.layout import FULL, KVLayer, KVLayout
from workers.messages import ModelFacts
from workers.model.tensor_parallel import Shard
from workers.skeleton.decoder import attentions, head_dim


@dataclass(frozen=True, slots=True)
class Geometry:
    """What the rest of the instance must know of a model to drive it."""

    architecture: str
    vocab_size: int
    max_model_len: int
    """Positions that the model was made for."""
    eos_token_ids: tuple[int, ...]
    kv_layout: KVLayout
    sliding_windows: tuple[int | None, ...]
    """Of each layer: how many of the nearest keys a query sees, or all."""
    attention_span: int
    """How many earlier tokens make a token cost twice as much as the first, about."""
    num_parameters: int
    """Tied ones counted once."""
    weights_bytes: int

    @property
    def num_layers(self) -> int:
        return len(self.kv_layout.layers)

    def facts(self, max_model_len: int) -> ModelFacts:
        """The same for the wire, for an instance that serves up to `max_model_len` tokens."""
        return ModelFacts(
            architecture=self.architecture,
            dtype=str(self.kv_layout.dtype).removeprefix("torch."),
            vocab_size=self.vocab_size,
            max_model_len=max_model_len,
            eos_token_ids=self.eos_token_ids,
            num_parameters=self.num_parameters,
            weights_bytes=self.weights_bytes,
            kv_bytes_per_token=self.kv_layout.bytes_per_token,
        )


def geometry_of(
    module: Any,
    dtype: torch.dtype,
    device: torch.device,
    eos_token_ids: Sequence[int] | None,
    shard: Shard | None = None,
    kv_bits: int = FULL,
) -> Geometry:
    """Of a module with its weights, computed on `device`; `eos_token_ids` None are its config's.
    Where it is one rank's `shard`, what is counted is all ranks' together. `kv_bits`: of what is
    kept of keys and values."""
    config = module.config
    layers = []
    for part in attentions(module):
        groups = getattr(part, "num_key_value_groups", 1)
        layers.append(KVLayer(config.num_attention_heads // groups, head_dim(part) or 0))
    of_ranks: tuple[tuple[KVLayer, ...], ...] = ()
    if shard is None:
        parameters = list(module.parameters())
        num_parameters = sum(part.numel() for part in parameters)
        weights_bytes = sum(part.nbytes for part in parameters)
    else:
        num_parameters, weights_bytes = shard.num_parameters, shard.weights_bytes
        of_ranks = tuple(
            tuple(KVLayer(num_heads, layer.head_dim) for layer in layers)
            for num_heads in shard.num_kv_heads
        )
    rank = 0 if shard is None else shard.rank
    return Geometry(
        architecture=type(module).__name__,
        vocab_size=config.vocab_size,
        max_model_len=max_positions(config),
        eos_token_ids=_eos_token_ids(config) if eos_token_ids is None else tuple(eos_token_ids),
        kv_layout=KVLayout.on(device, tuple(layers), dtype, of_ranks, rank, kv_bits),
        sliding_windows=_sliding_windows(config),
        attention_span=_attention_span(module),
        num_parameters=num_parameters,
        weights_bytes=weights_bytes,
    )


def _attention_span(module: Any) -> int:
    """2 operations a weight for each token, embeddings aside, against 4 for each number of a query
    head and each earlier token: attention runs at about 0.6 of the speed of matrix products here
    (benchmarks/decoder_step.py)."""
    config = module.config
    tables = {
        id(table.weight)
        for table in (module.get_input_embeddings(), module.get_output_embeddings())
        if table is not None
    }
    num_weights = sum(
        part.numel() for part in module.parameters() if part.dim() > 1 and id(part) not in tables
    )
    widths = sum(config.num_attention_heads * (head_dim(one) or 0) for one in attentions(module))
    return max(1, int(0.6 * num_weights / (2 * widths)))


def _sliding_windows(config: Any) -> tuple[int | None, ...]:
    window = getattr(config, "sliding_window", None)
    types = getattr(config, "layer_types", None) or ["sliding_attention"] * config.num_hidden_layers
    return tuple(window if kind == "sliding_attention" else None for kind in types)


def _eos_token_ids(config: Any) -> tuple[int, ...]:
    return end_tokens(config.eos_token_id, "config.json") or ()
