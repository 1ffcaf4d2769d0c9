"""The seam between what computes a model's layers and where their weights are.

    placement   says which layers come next, and that their weights are there
    stretch     some layers that follow one on another, with their weights at one place
    decoder     computes stretches: transformers' modules, or the native kernels

Invariant: a stretch gives the same bits wherever its weights are, and however the layers are cut
into stretches. Knows no architecture.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

import torch

from workers.model.batch import Batch

LayerWeights = Mapping[str, torch.Tensor]
"""The weights of a layer, by their names within it."""


class Stretch(Protocol):
    """Layers that follow one on another, with their weights at one place."""

    def forward(self, batch: Batch, hidden: torch.Tensor | None) -> torch.Tensor:
        """Compute these layers of the batch, and write their keys and values behind those of its
        tables; nothing is committed. `hidden` is what the stretch before this one returned, None
        for the model's first. Returns the residual stream, in a form of the decoder's own, which
        may be written to by the next stretch; behind the last layer the logits of the batch's
        `logit_rows` [num_logit_rows, vocab_size]."""


class Decoder(Protocol):
    """Who computes a model's layers."""

    @property
    def layers(self) -> Sequence[LayerWeights]:
        """Of each layer the weights that the model is bound to."""

    def whole(self) -> Stretch:
        """All layers, with the weights that the model is bound to."""

    def stretch(self, first: int, weights: Sequence[LayerWeights]) -> Stretch:
        """As many layers from `first` on, with `weights` of the names, shapes and dtypes of
        `layers`. They must hold the layers' weights whenever the stretch is computed; what lies
        there meanwhile is not looked at. To be made once for each place, not for each pass. Raises
        ValueError."""


class Placement(Protocol):
    """Where a layer's weights are when it is computed."""

    @property
    def tensors(self) -> Mapping[str, torch.Tensor]:
        """A tensor for every parameter, by the checkpoint's names: where it is computed with, or
        where it is kept until then. One that is not in this process at all is on meta."""

    @property
    def device(self) -> torch.device:
        """Where the model is computed."""

    def use(self, decoder: Decoder) -> None:
        """From now on the layers are this decoder's."""

    def stretches(self) -> Iterable[Stretch]:
        """All layers in order, for one pass. The weights of each stretch are in place from when it
        comes until the next is asked for."""
