"""Finding the one in a batch that makes the whole batch fail.

Owns the search. Invariant: whatever some items raise, each of the others gets a result that it
shares with others that are sound.
"""

from collections.abc import Callable, Sequence
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


def in_sound_groups(
    items: Sequence[T], compute: Callable[[Sequence[T]], R]
) -> list[tuple[Sequence[T], R | Exception]]:
    """`compute(items)` where that succeeds, as one group. Else that of each half, and so on down to
    the single item that fails alone, which stands with its error. `compute` must not have changed
    anything where it raises. The groups, joined, are `items`."""
    if not items:
        return []
    try:
        return [(items, compute(items))]
    except Exception as error:  # noqa: BLE001 - what is computed here, and by whose code, is unknown
        if len(items) == 1:
            return [(items, error)]
    middle = len(items) // 2
    return [
        *in_sound_groups(items[:middle], compute),
        *in_sound_groups(items[middle:], compute),
    ]
