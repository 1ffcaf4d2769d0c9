"""The random number of a token: a function of its sequence's seed and its index."""

from typing import Final

_MASK: Final = (1 << 64) - 1
_GOLDEN_GAMMA: Final = 0x9E3779B97F4A7C15


def uniform(seed: int, index: int) -> float:
    """The random number in [0, 1) of the `index`-th generated token.

    The state of a splitmix64 generator after `index + 1` steps, mixed (G. L. Steele, D. Lea and
    C. H. Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014, variant 13 of
    D. Stafford's mixers). The seed is mixed first, so that no two seeds are shifted copies of one
    stream.
    """
    state = _mix(seed) + (index + 1) * _GOLDEN_GAMMA
    return (_mix(state) >> 11) * 2.0**-53


def _mix(state: int) -> int:
    state &= _MASK
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
    return state ^ (state >> 31)
