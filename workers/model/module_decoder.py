"""A decoder's layers by transformers' own modules, a stretch of them at a time.

Owns how part of an architecture is computed by code that knows only the whole. Invariants: what an
architecture does before its layers and behind them (embeddings, masks, rotations, the head) is its
own code; after a pass the module is as it was before. Does not know where weights are.

    embed ─► layer 0 … first - 1   handed on, not computed
             layer first … stop - 1   computed: the first takes `hidden`
             layer stop   not reached: what it would have taken is the result
    norm, head   behind the last layer only
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from workers.model.attention import DEFAULT_WORKSPACE_BYTES
from workers.model.attention_pass import attention_pass
from workers.model.batch import Batch
from workers.model.geometry import Geometry
from workers.model.stretch import LayerWeights
from workers.skeleton.decoder import layers_of


class ModuleDecoder:
    """See `workers.model.stretch.Decoder`."""

    def __init__(self, module: Any, geometry: Geometry, device: torch.device) -> None:
        self._module = module
        self._geometry = geometry
        self._device = device
        self.workspace_bytes = DEFAULT_WORKSPACE_BYTES
        """What attention may take for itself."""

    @property
    def module(self) -> torch.nn.Module:
        """The `transformers` model."""
        module: torch.nn.Module = self._module
        return module

    @property
    def layers(self) -> Sequence[LayerWeights]:
        """Of each layer the parameters that it has. Raises UnsupportedCheckpoint for an
        architecture that can't be computed but as a whole."""
        return [dict(layer.named_parameters()) for layer in layers_of(self._module)]

    def whole(self) -> "_Whole":
        """The module as it is."""
        return _Whole(self)

    def stretch(self, first: int, weights: Sequence[LayerWeights]) -> "_Part":
        """The module with `weights` as those layers' parameters while it runs. Raises
        UnsupportedCheckpoint as `layers` does."""
        return _Part(self, layers_of(self._module), first, weights)

    def forward(self, batch: Batch, layers: range | None = None) -> torch.Tensor:
        """Run the module as it is now, which is to compute `layers`, or all. Returns the logits, or
        what a layer behind those takes."""
        inputs = {
            "input_ids": torch.from_numpy(batch.token_ids).long()[None].to(self._device),
            "position_ids": torch.from_numpy(batch.positions).long()[None].to(self._device),
            "use_cache": False,
        }
        own_pass = attention_pass(
            batch,
            self._geometry.kv_layout,
            self._geometry.sliding_windows,
            self._geometry.max_model_len,
            self.workspace_bytes,
            layers,
        )
        with torch.inference_mode(), own_pass:
            try:
                if len(batch.logit_rows):
                    rows = torch.from_numpy(batch.logit_rows).long().to(self._device)
                    output = self._module(**inputs, logits_to_keep=rows)
                    logits: torch.Tensor = output.logits[0]
                    return logits
                self._module.base_model(**inputs)
            except _Reached as reached:
                return reached.hidden
            return torch.empty(0, self._geometry.vocab_size, dtype=self._module.dtype)


class _Whole:
    def __init__(self, decoder: ModuleDecoder) -> None:
        self._decoder = decoder

    def forward(self, batch: Batch, hidden: torch.Tensor | None) -> torch.Tensor:
        """A pass through all of the module."""
        return self._decoder.forward(batch)


class _Part:
    def __init__(
        self,
        decoder: ModuleDecoder,
        layers: Sequence[torch.nn.Module],
        first: int,
        weights: Sequence[LayerWeights],
    ) -> None:
        stop = first + len(weights)
        if not 0 <= first < stop <= len(layers):
            raise ValueError(f"{len(weights)} layers from {first} on of {len(layers)}")
        self._decoder = decoder
        self._range = range(first, stop)
        self._before = layers[:first]
        self._first = layers[first]
        self._next = layers[stop] if stop < len(layers) else None
        self._slots = [
            slot
            for layer, own in zip(layers[first:stop], weights, strict=True)
            for slot in _slots(layer, own)
        ]

    def forward(self, batch: Batch, hidden: torch.Tensor | None) -> torch.Tensor:
        """A pass through the module, less the layers that are not of this stretch."""
        with ExitStack() as stack:
            stack.enter_context(_placed(self._slots))
            if hidden is not None:
                stack.enter_context(_begun(self._before, self._first, hidden))
            if self._next is not None:
                hook = self._next.register_forward_pre_hook(_reach, with_kwargs=True)
                stack.callback(hook.remove)
            return self._decoder.forward(batch, self._range)


class _Reached(BaseException):
    """A layer behind those that are computed was called, with this residual stream. Not an error:
    no code on the way may take it for one."""

    def __init__(self, hidden: torch.Tensor) -> None:
        super().__init__()
        self.hidden = hidden


def _reach(_layer: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
    raise _Reached(arguments[0] if arguments else named["hidden_states"])


@contextmanager
def _begun(
    before: Sequence[torch.nn.Module], first: torch.nn.Module, hidden: torch.Tensor
) -> Iterator[None]:
    """The layers `before` compute nothing, and `first` takes `hidden`."""

    def take(_layer: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
        if arguments:
            return (hidden, *arguments[1:]), named
        return arguments, {**named, "hidden_states": hidden}

    with ExitStack() as stack:
        for layer in before:
            # Some architectures take the first of several results, whose shape nobody looks at.
            layer.forward = lambda *_, **__: hidden
            stack.callback(delattr, layer, "forward")
        stack.callback(first.register_forward_pre_hook(take, with_kwargs=True).remove)
        yield


@dataclass(frozen=True, slots=True)
class _Slot:
    owner: torch.nn.Module
    name: str
    parameter: torch.nn.Parameter


def _slots(layer: torch.nn.Module, weights: LayerWeights) -> Iterator[_Slot]:
    """Where the weights go. Raises ValueError unless they are those of the layer."""
    own = dict(layer.named_parameters())
    if own.keys() != weights.keys():
        raise ValueError(f"a layer's weights, but for {sorted(own.keys() ^ weights.keys())}")
    for path, tensor in weights.items():
        if tensor.shape != own[path].shape or tensor.dtype != own[path].dtype:
            raise ValueError(f"{path} is {list(own[path].shape)} of {own[path].dtype}")
        prefix, _, name = path.rpartition(".")
        yield _Slot(
            layer.get_submodule(prefix), name, torch.nn.Parameter(tensor, requires_grad=False)
        )


@contextmanager
def _placed(slots: Sequence[_Slot]) -> Iterator[None]:
    bound = [slot.owner._parameters[slot.name] for slot in slots]
    for slot in slots:
        slot.owner._parameters[slot.name] = slot.parameter
    try:
        yield
    finally:
        for slot, parameter in zip(slots, bound, strict=True):
            slot.owner._parameters[slot.name] = parameter
