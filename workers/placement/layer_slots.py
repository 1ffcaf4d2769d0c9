"""Slots of memory into which a series of layers is read ahead of its use, over and over.

    use(0) ─► wait for 0      read 1, 2 meanwhile
    use(1) ─► wait for 1      0 is not used any more: read 3 into its slot
    …

Owns what is in which slot, and which reads are under way. Invariants: a layer that was given has
all of its bytes, until the next is asked for; a slot is written to only while nobody uses it; of a
read that failed nothing is kept. Does not know what computes the layers.
"""

import time
from collections.abc import Sequence
from typing import Final

import torch

from workers.placement.reader import Read, Reader
from workers.placement.ring import Fill, Ring
from workers.placement.slots import BLOCK, SlotLayout

_PATIENCE_S: Final = 60.0
"""How long a layer may take to be read: beyond that the disk hangs."""


class LayerSlots:
    """For layers of these layouts, in the order in which they are used."""

    def __init__(
        self, layouts: Sequence[SlotLayout], depth: int, memory: torch.Tensor, reader: Reader
    ) -> None:
        """`memory`: `memory_bytes(layouts, depth)` of the processor's, uint8, from a multiple of
        `BLOCK` on. The layouts' files are those of the reader."""
        self._layouts = layouts
        self._ring = Ring(len(layouts), depth)
        size = _slot_bytes(layouts)
        if memory.numel() < size * self._ring.num_slots or memory.data_ptr() % BLOCK:
            raise ValueError(f"{self._ring.num_slots} slots of {size} bytes need other memory")
        self._slots = [memory[i * size : (i + 1) * size] for i in range(self._ring.num_slots)]
        self._reader = reader
        self._jobs: list[int | None] = [None] * self._ring.num_slots
        self.waited_s = 0.0
        """For layers that were not there yet when they were needed, altogether."""

    @property
    def num_slots(self) -> int:
        """Layers that are in memory at once, at most."""
        return self._ring.num_slots

    def views(self, item: int, slot: int) -> dict[str, torch.Tensor]:
        """The layer's tensors where they are while it is in that slot."""
        return self._layouts[item].views(self._slots[slot])

    def use(self, item: int) -> int:
        """Wait until the layer is in a slot, and tell in which. It stays there until the next call.
        Raises ReadFailed, ReadTimedOut."""
        try:
            slot, fills = self._ring.use(item)
            for fill in fills:
                self._start(fill)
            job = self._jobs[slot]
            if job is not None:
                if not self._reader.done(job):
                    since = time.monotonic()
                    self._reader.wait(job, _PATIENCE_S)
                    self.waited_s += time.monotonic() - since
                self._reader.wait(job, 0)  # raises what went wrong
                self._jobs[slot] = None
        except BaseException:
            self.forget()
            raise
        return slot

    def forget(self) -> None:
        """Keep nothing of what is in the slots, and end what is on its way."""
        self._ring.forget()
        for slot in range(len(self._jobs)):
            self._end(slot)

    def _start(self, fill: Fill) -> None:
        self._end(fill.slot)  # what was never used may still be on its way
        address = self._slots[fill.slot].data_ptr()
        reads = [
            Read(read.file, read.begin, read.num_bytes, address + read.offset, read.in_blocks)
            for read in self._layouts[fill.item].reads
        ]
        self._jobs[fill.slot] = self._reader.start(reads)

    def _end(self, slot: int) -> None:
        job, self._jobs[slot] = self._jobs[slot], None
        if job is not None:
            self._reader.cancel(job)


def memory_bytes(layouts: Sequence[SlotLayout], depth: int) -> int:
    """What the slots take for these layers, `depth` of which are read ahead."""
    return _slot_bytes(layouts) * min(len(layouts), depth + 1)


def _slot_bytes(layouts: Sequence[SlotLayout]) -> int:
    return max(layout.num_bytes for layout in layouts)
