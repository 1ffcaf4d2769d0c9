"""Guesses at the next tokens, from what the sequence itself has said before.

Prompt lookup (A. Saxena, "Prompt Lookup Decoding", 2023; vLLM's `ngram` method): where the last few
tokens occurred earlier, what followed then may follow again. The guess is computed along with the
next step, and kept as far as it is what would have been sampled anyway, so the text is the same.

Pure.
"""

from array import array
from collections.abc import Sequence
from typing import Final

_LONGEST_MATCH: Final = 4
_SHORTEST_MATCH: Final = 2
_REACH: Final = 4096
"""How far back to look, in tokens."""


def propose(token_ids: Sequence[int], most: int) -> tuple[int, ...]:
    """Up to `most` tokens that may follow `token_ids`: those behind the latest earlier occurrence
    of its longest possible ending."""
    recent = array("i", token_ids[-_REACH:])
    sought, width = recent.tobytes(), recent.itemsize
    for length in range(min(_LONGEST_MATCH, len(recent) - 1), _SHORTEST_MATCH - 1, -1):
        ending = sought[-length * width :]
        before = len(sought) - width
        while (found := sought.rfind(ending, 0, before)) >= 0:
            if found % width == 0:  # else it is the bytes of other tokens
                after = found // width + length
                return tuple(recent[after : after + most])
            before = found + len(ending) - 1
    return ()
