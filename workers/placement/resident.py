"""All weights stay where the allocator has them, as long as the process lives.

Invariant: a pass is one stretch of all layers, and nothing is moved, copied or looked up for it.
"""

from collections.abc import Iterable, Mapping

import torch

from workers.model.stretch import Decoder, Stretch


class Resident:
    """See `workers.model.stretch.Placement`."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """By the checkpoint's names, all on one device."""
        self.tensors = tensors
        self._stretches: tuple[Stretch, ...] = ()

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(iter(self.tensors.values())).device

    def use(self, decoder: Decoder) -> None:
        """Let it compute the one stretch of all layers."""
        self._stretches = (decoder.whole(),)

    def stretches(self) -> Iterable[Stretch]:
        """The one of all layers."""
        return self._stretches
