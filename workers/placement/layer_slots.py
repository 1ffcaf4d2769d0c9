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

import torch

from workers.errors import DeviceLost, ReadFailed, ReadTimedOut
from workers.placement.reader import Read, Reader
from workers.placement.ring import Fill, Ring
from workers.placement.slots import BLOCK, SlotLayout


class LayerSlots:
    """For layers of these layouts, in the order in which they are used."""

    def __init__(
        self,
        layouts: Sequence[SlotLayout],
        depth: int,
        memory: torch.Tensor,
        reader: Reader,
        patience_s: float = 20.0,
    ) -> None:
        """`memory`: `memory_bytes(layouts, depth)` of the processor's, uint8, from a multiple of
        `BLOCK` on. The layouts' files are those of the reader. A layer that takes longer than
        `patience_s` to be read will never be."""
        self._layouts = layouts
        self._ring = Ring(len(layouts), depth)
        size = _slot_bytes(layouts)
        if memory.numel() < size * self._ring.num_slots or memory.data_ptr() % BLOCK:
            raise ValueError(f"{self._ring.num_slots} slots of {size} bytes need other memory")
        self._slots = [memory[i * size : (i + 1) * size] for i in range(self._ring.num_slots)]
        self._reader = reader
        self._patience_s = patience_s
        self._hangs = False
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
        Raises ReadFailed; DeviceLost where the disk hangs."""
        try:
            slot, fills = self._ring.use(item)
            for fill in fills:
                self._start(fill)
            try:
                self._finish(slot)
            except ReadFailed:
                if any(fill.slot == slot for fill in fills):
                    raise
                self._start(Fill(item, slot))  # what was wrong when it was read ahead may be right
                self._finish(slot)
        except ReadTimedOut as error:
            self._hangs = True
            raise DeviceLost(str(error)) from error
        except BaseException:
            self.forget()
            raise
        return slot

    def close(self) -> None:
        """End the reader. One whose disk hangs ends with the process."""
        if not self._hangs:
            self._reader.close()

    def _finish(self, slot: int) -> None:
        job = self._jobs[slot]
        if job is None:
            return
        since = time.monotonic()
        is_there = self._reader.done(job)
        try:
            self._reader.wait(job, self._patience_s)
        except ReadFailed:
            self._jobs[slot] = None
            raise
        if not is_there:
            self.waited_s += time.monotonic() - since
        self._jobs[slot] = None

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
