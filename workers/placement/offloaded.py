"""Some layers stay on the device, the others are read from files just before they are computed.

Owns the order of a pass: stretches of layers that stay, and one stretch for each that does not.
Invariants: results are those of `resident`, bit for bit; no more layers are in slots than there are
slots, whatever the pass does. Does not know which layers those are, or why.
"""

from collections.abc import Callable, Iterator, Mapping

import torch

from workers.checkpoint.offloaded import OffloadedLayers
from workers.model.stretch import Decoder, Stretch
from workers.placement.layer_slots import LayerSlots


class Offloaded:
    """See `workers.model.stretch.Placement`."""

    def __init__(
        self,
        tensors: Mapping[str, torch.Tensor],
        offloaded: OffloadedLayers,
        slots: LayerSlots,
        check_files: Callable[[], None] = lambda: None,
    ) -> None:
        """`tensors`: those that stay, by the checkpoint's names; `slots` are for the layers of
        `offloaded`, in that order. `check_files` raises where a file is not what it was."""
        self._items = {layer.index: item for item, layer in enumerate(offloaded.layers)}
        self._slots = slots
        self._check_files = check_files
        self._decoder: Decoder | None = None
        self._order: list[tuple[int, Stretch | None]] = []
        """First layer, and the stretch where the layers stay."""
        self._placed: dict[tuple[int, int], Stretch] = {}
        """By layer and slot."""
        # A layer must be bound to some place: to one that it will be in now and then.
        in_slots = {
            layer.prefix + name: view
            for item, layer in enumerate(offloaded.layers)
            for name, view in slots.views(item, item % slots.num_slots).items()
        }
        self.tensors = {**tensors, **in_slots}

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(iter(self.tensors.values())).device

    def use(self, decoder: Decoder) -> None:
        """See `Placement`."""
        self._decoder = decoder
        self._placed.clear()
        self._order.clear()
        num_layers = len(decoder.layers)
        first = 0
        while first < num_layers:
            if first in self._items:
                self._order.append((first, None))
                first += 1
                continue
            stop = next((i for i in range(first, num_layers) if i in self._items), num_layers)
            self._order.append((first, decoder.stretch(first, decoder.layers[first:stop])))
            first = stop

    def stretches(self) -> Iterator[Stretch]:
        """All layers in order. Raises ReadFailed, DeviceLost; CheckpointChanged where a file has
        changed, before the first layer, or behind the last: what was computed is not to be used
        then."""
        self._check()
        for first, staying in self._order:
            yield staying or self._in_slot(first, self._slots.use(self._items[first]))
        self._check()

    def _check(self) -> None:
        try:
            self._check_files()
        except BaseException:
            self._slots.forget()  # what was read ahead may be of either file
            raise

    def _in_slot(self, layer: int, slot: int) -> Stretch:
        found = self._placed.get((layer, slot))
        if found is None:
            decoder = self._decoder
            assert decoder is not None  # noqa: S101 - else there is no order
            views = self._slots.views(self._items[layer], slot)
            found = decoder.stretch(layer, [{**decoder.layers[layer], **views}])
            self._placed[layer, slot] = found
        return found
