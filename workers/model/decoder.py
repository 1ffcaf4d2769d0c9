"""A decoder of the `transformers` library, computing on tensors that someone else owns.

Owns the way from a config and named tensors to a model that answers a batch with logits. Invariant:
every parameter is one of the given tensors, never a copy and never written to; all else that the
model holds (rotary frequencies and the like) is small and private. Does not know files, shared
memory, scheduling or sampling, and never runs code that came with a checkpoint.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedConfig
from transformers.initialization import no_init_weights

from workers.config.architecture import architecture_errors, check_config
from workers.config.context_length import max_positions
from workers.config.ends import end_tokens
from workers.errors import UnsupportedCheckpoint
from workers.kv.layout import KVLayer, KVLayout
from workers.kv.source import PrivateSource
from workers.kv.table import BlockTable
from workers.messages import ModelFacts
from workers.model.attention import DEFAULT_WORKSPACE_BYTES
from workers.model.attention_pass import NAME, attention_pass
from workers.model.batch import Batch, Part
from workers.model.binding import bind, compute_buffers, move_buffers
from workers.model.native import load
from workers.model.native.architecture import NotNative
from workers.model.native.decoder import NativeDecoder, supports

_LAYER_TYPES = frozenset({"full_attention", "sliding_attention"})
_OTHER_MEDIA = frozenset({"audio_config", "vision_config"})


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


class Model:
    """Weights bound to an architecture. Made by `build_model`."""

    def __init__(self, module: Any, geometry: Geometry) -> None:
        self._module = module
        self.geometry = geometry
        self.workspace_bytes = DEFAULT_WORKSPACE_BYTES
        """What attention may take for itself."""
        self._native: NativeDecoder | None = None
        self.kernels: str | None = None
        """The native decoder's, once it computes."""
        self._threads: Callable[[], int] = lambda: 1

    @property
    def module(self) -> torch.nn.Module:
        """The `transformers` model underneath."""
        module: torch.nn.Module = self._module
        return module

    def forward(self, batch: Batch) -> torch.Tensor:
        """Compute the batch's tokens, which then belong to their tables.

        Returns the logits [num_logit_rows, vocab_size], in the model's dtype and on its device or
        float32 on the processor. If it raises, no table has changed. Raises ValueError where the
        batch has more rows than the native decoder was made for: the modules could not go on with
        its keys and values, which lie in another order.
        """
        if self._native is not None:
            logits = torch.empty(len(batch.logit_rows), self.geometry.vocab_size)
            tables, addresses = batch.tables()
            self._native.forward(
                batch.token_ids,
                batch.positions,
                tables,
                addresses,
                batch.logit_rows,
                logits,
                num_threads=self._threads(),
            )
        else:
            logits = self._forward_module(batch)
        batch.commit()
        return logits

    def accelerate(
        self,
        max_rows: int,
        max_model_len: int,
        num_threads: int,
        threads_now: Callable[[], int] | None = None,
        kernels: str = "auto",
    ) -> str | None:
        """From now on compute by the native decoder, on the same weights, batches of up to
        `max_rows` rows with up to `num_threads` threads; `threads_now` says how many for each, and
        `kernels` names the instruction set. Returns why not, where it does not know this model or
        this machine. No table may hold anything yet."""
        reason = supports(self._module, self.geometry.kv_layout.dtype, kernels)
        if reason is None:
            layout = self.geometry.kv_layout
            try:
                native = NativeDecoder(
                    self._module, layout, max_rows, max_model_len, num_threads, load(kernels)
                )
            except (NotNative, MemoryError) as error:
                reason = str(error)
            else:
                self._native, self.kernels = native, native.kernels.name
        self._threads = threads_now or (lambda: num_threads)
        return reason

    def _forward_module(self, batch: Batch) -> torch.Tensor:
        device = self.device
        inputs = {
            "input_ids": torch.from_numpy(batch.token_ids).long()[None].to(device),
            "position_ids": torch.from_numpy(batch.positions).long()[None].to(device),
            "use_cache": False,
        }
        own_pass = attention_pass(
            batch,
            self.geometry.kv_layout,
            self.geometry.sliding_windows,
            self.geometry.max_model_len,
            self.workspace_bytes,
        )
        with torch.inference_mode(), own_pass:
            if len(batch.logit_rows):
                rows = torch.from_numpy(batch.logit_rows).long().to(device)
                output = self._module(**inputs, logits_to_keep=rows)
                logits: torch.Tensor = output.logits[0]
            else:
                self._module.base_model(**inputs)
                logits = torch.empty(0, self.geometry.vocab_size, dtype=self._module.dtype)
        return logits

    @property
    def device(self) -> torch.device:
        """Where its weights are."""
        return next(self.module.parameters()).device

    def warm_up(self) -> None:
        """Compute one token and forget it, so that what is slow the first time, or not supported
        by this architecture after all (`UnsupportedCheckpoint`), shows before a request does."""
        layout = self.geometry.kv_layout
        table = BlockTable(layout, PrivateSource(layout, self.device).lease(1))
        with architecture_errors(f"{self.geometry.architecture} can't compute a token"):
            self.forward(Batch.of([Part(table, [0], 1)]))


def preload(config: Mapping[str, Any], dtype: torch.dtype = torch.bfloat16) -> None:
    """Import and warm up all that `build_model` will need for `config`, so that processes forked
    from here need not. Starts no threads and keeps no memory. Raises `UnsupportedCheckpoint`."""
    skeleton(config, dtype)


def build_model(
    config: Mapping[str, Any],
    tensors: Mapping[str, torch.Tensor],
    dtype: torch.dtype,
    eos_token_ids: Sequence[int] | None = None,
) -> Model:
    """Bind `tensors`, named as in the checkpoint, to the architecture that `config` describes.

    `config` is the parsed JSON file; `eos_token_ids` None are its own. Tensors may be read-only
    memory and must stay mapped as long as the model lives. Of tied parameters, one is enough.
    Raises `UnsupportedCheckpoint`, `CheckpointMismatch` and `CheckpointCorrupt`.
    """
    module = skeleton(config, dtype)
    with architecture_errors(f"{type(module).__name__} can't be computed by this config.json"):
        bind(module, tensors, dtype)
        move_buffers(module)
        module.requires_grad_(False)
        module.eval()
        return Model(module, _geometry(module, dtype, eos_token_ids))


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
    _attentions(module)
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


def _attentions(module: Any) -> list[Any]:
    """The attention module of each layer. Raises UnsupportedCheckpoint."""
    found: dict[int, Any] = {}
    for part in module.modules():
        index = getattr(part, "layer_idx", None)
        if isinstance(index, int) and hasattr(part, "is_causal") and _head_dim(part):
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
        if hasattr(found[index], "sinks"):
            raise UnsupportedCheckpoint(f"{type(module).__name__} has attention sinks")
    return [found[index] for index in indices]


def _head_dim(attention: Any) -> int | None:
    """Each family's word for it."""
    return getattr(attention, "head_dim", None) or getattr(attention, "head_size", None)


def _geometry(module: Any, dtype: torch.dtype, eos_token_ids: Sequence[int] | None) -> Geometry:
    config = module.config
    layers = []
    for part in _attentions(module):
        groups = getattr(part, "num_key_value_groups", 1)
        layers.append(KVLayer(config.num_attention_heads // groups, _head_dim(part) or 0))
    parameters = {part.data_ptr(): part for part in module.parameters()}.values()
    return Geometry(
        architecture=type(module).__name__,
        vocab_size=config.vocab_size,
        max_model_len=max_positions(config),
        eos_token_ids=_eos_token_ids(config) if eos_token_ids is None else tuple(eos_token_ids),
        kv_layout=KVLayout.on(next(module.parameters()).device, tuple(layers), dtype),
        sliding_windows=_sliding_windows(config),
        attention_span=_attention_span(module),
        num_parameters=sum(part.numel() for part in parameters),
        weights_bytes=sum(part.nbytes for part in parameters),
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
    widths = sum(config.num_attention_heads * (_head_dim(one) or 0) for one in _attentions(module))
    return max(1, int(0.6 * num_weights / (2 * widths)))


def _sliding_windows(config: Any) -> tuple[int | None, ...]:
    window = getattr(config, "sliding_window", None)
    types = getattr(config, "layer_types", None) or ["sliding_attention"] * config.num_hidden_layers
    return tuple(window if kind == "sliding_attention" else None for kind in types)


def _eos_token_ids(config: Any) -> tuple[int, ...]:
    return end_tokens(config.eos_token_id, "config.json") or ()
