"""A model of the `transformers` library that makes one vector of each text.

Owns the way from a config and named tensors to vectors: the architecture without any head, a batch
filled up to rectangular shape under a mask, pooling in float32. Invariant: every parameter is one
of the given tensors or a part of one, never a copy and never written to. Does not know files,
shared memory, or which texts are computed together.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Chunk,
    WeightConverter,
    WeightRenaming,
    rename_source_key,
)

from workers.config.architecture import architecture_errors
from workers.config.encoder_settings import ENCODERS, EmbeddingSettings, read_settings
from workers.errors import InvalidEmbedding, UnsupportedCheckpoint
from workers.messages import ModelFacts
from workers.model.binding import bind
from workers.model.native import load
from workers.model.native.architecture import NotNative
from workers.model.native.decoder import supports
from workers.model.native.embedder import NativeEmbedder
from workers.skeleton.buffers import move_buffers
from workers.skeleton.encoder import skeleton


class EmbeddingModel:
    """Weights bound to an architecture, and how its output is pooled. Made by
    `build_embedding_model`."""

    def __init__(self, module: Any, settings: EmbeddingSettings) -> None:
        self._module = module
        self._settings = settings
        self._pad_token_id = _pad_token_id(module.config)
        self.max_model_len = _max_positions(module)
        """Tokens that the architecture can take."""
        self.vocab_size: int = module.config.vocab_size
        self.embedding_size: int = module.config.hidden_size
        self._native: NativeEmbedder | None = None
        self._threads: Callable[[], int] = lambda: 1

    @property
    def module(self) -> torch.nn.Module:
        """The `transformers` model underneath."""
        module: torch.nn.Module = self._module
        return module

    @property
    def device(self) -> torch.device:
        """Where its weights are."""
        return next(self.module.parameters()).device

    @property
    def advised_max_model_len(self) -> int:
        """Tokens that it should be given unless somebody knows better."""
        return min(self._settings.max_seq_length or self.max_model_len, self.max_model_len)

    def facts(self, max_model_len: int) -> ModelFacts:
        """What a server must know, for an instance that takes texts of up to `max_model_len`."""
        parameters = {part.data_ptr(): part for part in self.module.parameters()}.values()
        return ModelFacts(
            architecture=type(self._module).__name__,
            dtype=str(self._module.dtype).removeprefix("torch."),
            vocab_size=self.vocab_size,
            max_model_len=max_model_len,
            eos_token_ids=(),
            num_parameters=sum(part.numel() for part in parameters),
            weights_bytes=sum(part.nbytes for part in parameters),
            kv_bytes_per_token=0,
            task="embed",
            embedding_size=self.embedding_size,
        )

    def accelerate(
        self,
        max_rows: int,
        max_model_len: int,
        num_threads: int,
        threads_now: Callable[[], int] | None = None,
        kernels: str = "auto",
    ) -> str | None:
        """From now on compute by the native kernels, on the same weights, batches of up to
        `max_rows` tokens. The rest is as for `workers.model.decoder.Model.accelerate`."""
        reason = supports(self._module, self._module.dtype, kernels)
        if reason is None:
            try:
                self._native = NativeEmbedder(
                    self._module, max_rows, max_model_len, num_threads, load(kernels)
                )
            except (NotNative, MemoryError) as error:
                reason = str(error)
        self._threads = threads_now or (lambda: num_threads)
        return reason

    @property
    def kernels(self) -> str | None:
        """The native decoder's, once it computes."""
        return self._native.kernels.name if self._native is not None else None

    @property
    def pads(self) -> bool:
        """Whether texts of different lengths cost what the longest does."""
        return self._native is None

    def forward(self, texts: Sequence[Sequence[int]]) -> torch.Tensor:
        """The pooled hidden states of each text: [num_texts, embedding_size] float32, on the CPU,
        not normalized. Texts are token ids, none empty."""
        if self._native is not None and self._native.takes(texts):
            states = self._native.forward(texts, self._threads())
            return torch.stack([self._pooled(one) for one in states])
        lengths = torch.tensor([len(text) for text in texts])
        longest = int(lengths.max())
        padded = [[*text, *[self._pad_token_id] * (longest - len(text))] for text in texts]
        mask = torch.arange(longest) < lengths[:, None]  # [num_texts, longest]
        with torch.inference_mode():
            hidden = self._module(
                input_ids=torch.tensor(padded, device=self.device),
                attention_mask=mask.to(self.device, torch.long),
                **self._options,
            ).last_hidden_state
            return self._pool(hidden, mask.to(self.device), lengths.to(self.device)).cpu()

    def finish(self, vector: torch.Tensor, dimensions: int = 0) -> bytes:
        """A row of `forward`'s as it travels: its first `dimensions` numbers (0: all), normalized
        if the model's are. Raises InvalidEmbedding if one isn't finite."""
        kept = vector[: dimensions or None]
        if self._settings.normalize:
            kept = torch.nn.functional.normalize(kept, dim=0, eps=1e-12)
        if not bool(kept.isfinite().all()):
            raise InvalidEmbedding(
                "the model's vector of this text has numbers that are not finite"
            )
        return kept.numpy().astype("<f4").tobytes()

    def warm_up(self) -> None:
        """Compute two short texts and forget them: what is slow the first time, or not supported by
        this architecture after all, shows before a request does."""
        with architecture_errors(f"{type(self.module).__name__} can't compute a text"):
            self.forward([[0, 0], [0]])

    @property
    def _options(self) -> dict[str, Any]:
        """A decoder would make a cache that nobody reads."""
        return {} if self._module.config.model_type in ENCODERS else {"use_cache": False}

    def _pooled(self, states: torch.Tensor) -> torch.Tensor:
        """Of one text: [num_tokens, size] → [size]."""
        match self._settings.pooling:
            case "mean":
                return states.float().mean(dim=0)
            case "cls":
                return states[0].float()
            case "last":
                return states[-1].float()
            case "max":
                return states.float().amax(dim=0)

    def _pool(
        self, hidden: torch.Tensor, mask: torch.Tensor, lengths: torch.Tensor
    ) -> torch.Tensor:
        """hidden [num_texts, longest, size], mask [num_texts, longest] → [num_texts, size]."""
        match self._settings.pooling:
            case "mean":
                states = hidden.float().masked_fill(~mask[..., None], 0.0)
                return states.sum(dim=1) / lengths[:, None]
            case "cls":
                return hidden[:, 0].float()
            case "last":
                return hidden[torch.arange(len(lengths), device=hidden.device), lengths - 1].float()
            case "max":
                return hidden.float().masked_fill(~mask[..., None], -torch.inf).amax(dim=1)


def preload(config: Mapping[str, Any], dtype: torch.dtype) -> None:
    """Import and warm up all that `build_embedding_model` will need for `config`, so that processes
    forked from here need not. Raises `UnsupportedCheckpoint`."""
    module = skeleton(config, dtype)
    get_model_conversion_mapping(module)


def build_embedding_model(
    metadata: Mapping[str, str], tensors: Mapping[str, torch.Tensor], dtype: torch.dtype
) -> EmbeddingModel:
    """Bind `tensors`, named as in the checkpoint with this `metadata`, to its architecture.

    Tensors may be read-only memory and must stay mapped as long as the model lives. Heads of other
    purposes are left out. Raises `UnsupportedCheckpoint` and `CheckpointMismatch`.
    """
    settings = read_settings(metadata)
    module = skeleton(json.loads(metadata["config"]), dtype)
    with architecture_errors(f"{type(module).__name__} can't be computed by this config.json"):
        bind(module, _named_for(module, tensors), dtype)
        move_buffers(module, next(module.parameters()).device)
        module.requires_grad_(False)
        module.eval()
        return EmbeddingModel(module, settings)


def _named_for(module: Any, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors under the names that `module` gives them, by transformers' own rules: older
    names, a prefix of the model with a head, and matrices that were saved as one and are views of
    it here. Heads and saved positions are left out. Raises UnsupportedCheckpoint."""
    rules = get_model_conversion_mapping(module)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    prefix = module.base_model_prefix
    known = dict.fromkeys(module.state_dict(), True)
    derived = {name for name, _ in module.named_buffers()} - known.keys()
    has_prefix = any(name.startswith(f"{prefix}.") for name in tensors)
    found: dict[str, torch.Tensor] = {}
    for source, tensor in tensors.items():
        name, pattern = rename_source_key(source, renamings, converters, prefix, known)
        if pattern is not None:
            converter = next(one for one in converters if pattern in one.source_patterns)
            found.update(_parts(name, tensor, converter))
            continue
        own = name.removeprefix(f"{prefix}.")
        surplus = own in derived or own.startswith("pooler.")
        if name in known or not (surplus or _is_head(source, prefix, has_prefix)):
            found[name] = tensor
    return found


def _parts(name: str, tensor: torch.Tensor, converter: WeightConverter) -> dict[str, torch.Tensor]:
    """Equal parts of `tensor`, which the checkpoint holds as one, as views."""
    [operation, *others] = converter.operations
    if others or not isinstance(operation, Chunk) or operation.dim != 0:
        raise UnsupportedCheckpoint(
            f"the tensor {name} would have to be converted by {type(operation).__name__}"
        )
    targets = converter.target_patterns
    first = next(target for target in targets if target in name)
    parts = tensor.chunk(len(targets))
    return {name.replace(first, target): part for target, part in zip(targets, parts, strict=True)}


def _is_head(source: str, prefix: str, has_prefix: bool) -> bool:
    """Whether the tensor lies beside the base model in a checkpoint of a model with a head."""
    return has_prefix and not source.startswith(f"{prefix}.")


def _pad_token_id(config: Any) -> int:
    """Some architectures count positions by it, so that it must be their own."""
    pad = config.pad_token_id
    return pad if isinstance(pad, int) and 0 <= pad < config.vocab_size else 0


def _max_positions(module: Any) -> int:
    """RoBERTa and its kin count positions from behind the padding token's."""
    config = module.config
    limit: int = config.max_position_embeddings
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") == "longrope":  # beyond, other frequencies for the whole batch
        limit = min(limit, rope["original_max_position_embeddings"])
    for name, part in module.named_modules():
        padding_idx = getattr(part, "padding_idx", None)
        if name.endswith("position_embeddings") and padding_idx is not None:
            limit = min(limit, part.num_embeddings - padding_idx - 1)
    return limit
