"""What carries the linears of a series from the rank that has them to the others: the interface.

Owns the words between a series and its transport. Invariant: a transport knows bytes and ranks,
neither tensors' names nor layers' order.

    transport.open(name) ─► place ─► join ─► broadcast, wait, broadcast, wait, … ─► close
                                      ▲                    │ SeriesTimedOut
                                      └────────────────────┴─► leave
"""

from collections.abc import Callable, Mapping
from typing import Protocol

import torch

Fill = Callable[[torch.Tensor], None]
"""Writes a linear's bytes into memory, uint8 # [num_bytes]."""


class Arrival(Protocol):
    """A broadcast that is under way."""

    def wait(self) -> None:
        """Until the bytes are there, and those of this rank have been sent. Raises
        SeriesTimedOut."""


class Channel(Protocol):
    """Of one series, on one rank; for one thread at a time."""

    @property
    def device(self) -> torch.device:
        """That linears are computed on."""

    @property
    def maps_all(self) -> bool:
        """Whether a rank can address the linears of the others where they are, without windows."""

    def place(self, num_bytes: int, own: Mapping[int, Fill]) -> None:
        """Keep this rank's own linears from now on, each of `num_bytes`. Once, before `join`."""

    def join(self, form: str) -> None:
        """Make a group with all ranks; whoever is in one has left it before. Raises
        SeriesTimedOut where not all come, InvalidSetting where another's `form` is another."""

    def extent(self, index: int) -> torch.Tensor | None:
        """Where a linear lies, uint8 # [num_bytes], until the group is another; None where it needs
        a window."""

    def window(self, num_bytes: int) -> torch.Tensor:
        """Memory for linears on their way, uint8 # [num_bytes]."""

    def broadcast(self, extent: torch.Tensor, owner: int) -> Arrival:
        """Begin to bring the linear that lies in `extent` on rank `owner` into that of the others.
        In the same order on all ranks. Raises SeriesTimedOut."""

    def used(self, extent: torch.Tensor) -> None:
        """All that computes with a window has been given to its device."""

    def leave(self) -> None:
        """Give up what is under way, which may take as long as the deadline; the others can't go
        on without this rank. Idempotent."""

    def close(self) -> None:
        """Leave, and give back all memory. Idempotent."""


class Transport(Protocol):
    """Between the ranks that shard a module's series among them."""

    @property
    def rank(self) -> int:
        """Of this process."""

    @property
    def num_ranks(self) -> int:
        """All together."""

    def open(self, series: str) -> Channel:
        """A channel of its own for a series, with a group of its own."""
