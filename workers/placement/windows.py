"""Which linears of a sharded series are in windows, and which come next. Pure.

Owns the order. Invariants: the t-th broadcast is that of linear start + t % n on every rank, so
that ranks whose broadcasts meet are about the same linear; a window is given out again only when
the linear in it is used no longer; what lies on this rank for good takes none.

    series 3 … 7, rank 0 of 2 has 4 and 6, one ahead      window    0    1
    use(3)                begin 3 and 4                            [3]
    use(4)                begin 5                                   5         4 is used where it is
    use(5)                begin 6                                  [5]
    use(7)                begin 3, for the next pass               [7]   3
"""

from collections import deque
from collections.abc import Collection
from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, slots=True)
class Broadcast:
    """Of a linear, into a window where it does not lie on this rank."""

    index: int
    window: int | None


class Windows:
    """For linears start … start + num_linears - 1, `ahead` of which are on their way while one is
    used; all of them stay where the windows are enough for that."""

    def __init__(self, start: int, num_linears: int, ahead: int, here: Collection[int]) -> None:
        """`here`: those that lie on this rank for good."""
        if num_linears < 1 or start < 0 or ahead < 0:
            raise ValueError(f"{num_linears} linears from {start} on, {ahead} ahead")
        self._start = start
        self._num_linears = num_linears
        self._ahead = min(ahead, num_linears - 1)
        self._here = frozenset(here)
        self.num_windows: Final = max(
            sum(self._after(start + first, i) not in self._here for i in range(self._ahead + 1))
            for first in range(num_linears)
        )
        self._held: deque[Broadcast] = deque()
        """In the order in which they are used, that in use first."""
        self._free: deque[int] = deque(range(self.num_windows))

    def next_index(self, index: int) -> int:
        """What is broadcast when `index` is used, in a series that does not stay."""
        return self._after(index, self._ahead)

    def follows(self, index: int) -> bool:
        """Whether `index` may be used now: it is the next of the pass, or in use, or all stay."""
        if not self._held:
            return index == self._start
        if self._all_stay:
            return self._start <= index < self._start + self._num_linears
        return index in (self._held[0].index, self._after(self._held[0].index, 1))

    def use(self, index: int) -> tuple[Broadcast, ...]:
        """`index` is used now, and what was used before is not any more. Returns what to begin, in
        this order; that may be the linear itself. Raises ValueError unless it `follows`."""
        if not self.follows(index):
            raise ValueError(f"linear {index} does not follow {self._held}")
        if not self._held:
            return tuple(self._begin(self._start + i) for i in range(self._ahead + 1))
        if self._all_stay or index == self._held[0].index:
            return ()
        used = self._held.popleft()
        if used.window is not None:
            self._free.append(used.window)
        return (self._begin(self.next_index(index)),)

    def window(self, index: int) -> int | None:
        """Where a linear is that was used or begun; None where it lies on this rank for good."""
        return next(held.window for held in self._held if held.index == index)

    def forget(self) -> None:
        """What the windows hold is not to be relied on: the next pass begins anew."""
        self._held.clear()
        self._free = deque(range(self.num_windows))

    @property
    def _all_stay(self) -> bool:
        return self._ahead == self._num_linears - 1

    def _after(self, index: int, distance: int) -> int:
        return (index - self._start + distance) % self._num_linears + self._start

    def _begin(self, index: int) -> Broadcast:
        window = None if index in self._here else self._free.popleft()
        broadcast = Broadcast(index, window)
        self._held.append(broadcast)
        return broadcast
