"""The ranks that compute one model together: what a model knows of them.

Owns the seam between what computes a part of a model and what sums the parts. Knows neither.
"""

from typing import Any, Protocol

import torch


class Ranks(Protocol):
    """All of them, as one of them sees them."""

    @property
    def rank(self) -> int: ...

    @property
    def num_ranks(self) -> int: ...

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """The sum of all ranks' `values`, which may be overwritten. Every rank calls it, in the
        same order. Raises RankError."""

    @property
    def capacity(self) -> int:
        """Numbers that native code may sum at a time."""

    def native(self) -> Any:
        """What native code sums by, a `workers.model.native.library.Ranks`; None where it can't."""

    def raise_for(self, result: int, rank: int) -> None:
        """The error that native code met. Raises RankError."""
