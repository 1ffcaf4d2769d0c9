"""Which tokens a sequence has met, and how often it generated each.

Owns two columns that grow with the number of different tokens, not with the vocabulary. Invariant:
a token has one row.
"""

from collections.abc import Iterable
from typing import Final

import numpy as np
import torch

_FIRST_ROOM: Final = 64


class TokenCounts:
    """Tokens met, in the order in which they were met first."""

    def __init__(self, met: Iterable[int] = ()) -> None:
        """`met`: tokens that are met but not generated."""
        self._rows: dict[int, int] = {}
        self._ids = np.zeros(_FIRST_ROOM, dtype=np.int64)
        self._numbers = np.zeros(_FIRST_ROOM, dtype=np.float32)
        for token in met:
            self._row(token)

    def add(self, token: int) -> None:
        """The token was generated once more."""
        row = self._row(token)  # first: it may put a longer column in the place of this one
        self._numbers[row] += 1

    @property
    def token_ids(self) -> torch.Tensor:
        """All that were met."""
        return torch.from_numpy(self._ids[: len(self._rows)])

    @property
    def numbers(self) -> torch.Tensor:
        """How often each of `token_ids` was generated."""
        return torch.from_numpy(self._numbers[: len(self._rows)])

    def _row(self, token: int) -> int:
        row = self._rows.get(token)
        if row is not None:
            return row
        row = self._rows[token] = len(self._rows)
        if row == len(self._ids):
            self._ids = np.concatenate((self._ids, np.zeros_like(self._ids)))
            self._numbers = np.concatenate((self._numbers, np.zeros_like(self._numbers)))
        self._ids[row] = token
        return row
