"""What the choice of a token needs of a grammar: which tokens may come next."""

from typing import Protocol

import numpy as np
from numpy.typing import NDArray


class Grammar(Protocol):
    """One sequence's way through a grammar. Its methods raise `GrammarFailed`."""

    def accept(self, token: int) -> None:
        """Take the next token, which the mask allowed."""

    @property
    def finished(self) -> bool:
        """Whether an end token was accepted."""

    @property
    def must_end(self) -> bool:
        """Whether nothing but an end token may come next."""

    def fill_mask(self, bits: NDArray[np.uint8]) -> None:
        """Set the bits of the tokens that may come next in `bits`, which is zero."""
