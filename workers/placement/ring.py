"""Which slot holds which of a series of layers, and what is read into one next. Pure.

Owns the order. Invariants: a slot that is in use is never filled; what is filled next is what will
be needed next, if the series is used in order and over again; no item is in two slots.

    depth 2, five items       slots     0    1    2
    use(0)                             [0]   1    2     in use, and on their way
    use(1)                              3   [1]   2     what was used makes room
    use(4)                             [4]   0    1     2 and 3 were skipped
"""

from collections import deque
from collections.abc import Iterable
from typing import NamedTuple


class Fill(NamedTuple):
    """What `slot` is to hold from now on."""

    item: int
    slot: int


class Ring:
    """Items 0 … num_items - 1 over `depth` + 1 slots, one of which is in use; fewer slots where
    there are fewer items."""

    def __init__(self, num_items: int, depth: int) -> None:
        if num_items < 1 or depth < 0:
            raise ValueError(f"{num_items} items, {depth} ahead")
        self.num_items = num_items
        self.num_slots = min(num_items, depth + 1)
        self._held: deque[Fill] = deque()
        """In the order in which they will be used, that in use first."""
        self._free: deque[int] = deque(range(self.num_slots))

    @property
    def held(self) -> tuple[Fill, ...]:
        """What the slots hold, or are being filled with: that in use first."""
        return tuple(self._held)

    def use(self, item: int) -> tuple[int, tuple[Fill, ...]]:
        """`item` is used now, and what was used before is not any more. Returns its slot and what
        to fill, in this order; that may be the item itself. A slot to fill may hold what was never
        used, and may still be on its way to it."""
        if not 0 <= item < self.num_items:
            raise ValueError(f"item {item} of {self.num_items}")
        if self.num_slots == self.num_items:
            return self._keep_all(item)
        while self._held and self._held[0].item != item:
            self._free.append(self._held.popleft().slot)
        fills = []
        if not self._held:
            fills.append(self._fill(item))
        while self._free:
            fills.append(self._fill((self._held[-1].item + 1) % self.num_items))
        return self._held[0].slot, tuple(fills)

    def forget(self) -> None:
        """What the slots hold is not to be relied on."""
        self._held.clear()
        self._free = deque(range(self.num_slots))

    def _keep_all(self, item: int) -> tuple[int, tuple[Fill, ...]]:
        """Each item stays where it is: that in use is turned to the front."""
        if self._held:
            self._held.rotate(-next(i for i, held in enumerate(self._held) if held.item == item))
            return self._held[0].slot, ()
        order: Iterable[int] = ((item + i) % self.num_items for i in range(self.num_items))
        fills = tuple(self._fill(each) for each in order)
        return self._held[0].slot, fills

    def _fill(self, item: int) -> Fill:
        fill = Fill(item, self._free.popleft())
        self._held.append(fill)
        return fill
