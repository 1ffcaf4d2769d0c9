"""Sets of tokens as a bit for each token of the vocabulary, the lowest first."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def packed(token_ids: Sequence[int], vocab_size: int) -> NDArray[np.uint8]:
    """The mask of just these tokens."""
    bits = np.zeros(-(-vocab_size // 8), dtype=np.uint8)
    set_bits(bits, np.array(token_ids, dtype=np.int64))
    return bits


def set_bits(bits: NDArray[np.uint8], token_ids: NDArray[np.int64]) -> None:
    """Add these tokens."""
    np.bitwise_or.at(bits, token_ids >> 3, (1 << (token_ids & 7)).astype(np.uint8))


def clear_bits(bits: NDArray[np.uint8], token_ids: NDArray[np.int64]) -> None:
    """Take these tokens away."""
    np.bitwise_and.at(bits, token_ids >> 3, ~(1 << (token_ids & 7)).astype(np.uint8))
