"""Which of the waiting texts are computed together.

Owns the choice. Invariants: the oldest text is always in the next batch, so none waits for ever; a
batch, filled up to rectangular shape, holds at most the budget (or the oldest text alone), and is
filled up by at most `FREE_PADDING` tokens or a quarter of its own. Pure: knows neither texts nor
tensors.

                  oldest
    lengths  3  5   8   8  9  31  250       sorted; the batch grows from the oldest to both sides,
                └───────────┘               to the nearer length first
"""

from collections.abc import Sequence
from typing import Final

FREE_PADDING: Final = 64
"""Tokens that cost less than a further pass: one of MiniLM's takes as long as some 60 tokens."""
_MAX_SHARE: Final = 4


def fill(lengths: Sequence[int], max_num_batched_tokens: int) -> list[int]:
    """The same where no padding is computed: the oldest, as many as the budget holds."""
    total = count = 0
    for length in lengths:
        total += length
        if count and total > max_num_batched_tokens:
            break
        count += 1
    return list(range(count))


def choose(lengths: Sequence[int], max_num_batched_tokens: int) -> list[int]:
    """Indices into `lengths`, which are those of the waiting texts, the oldest first. Not empty
    unless `lengths` is."""
    if not lengths:
        return []
    order = sorted(range(len(lengths)), key=lambda index: (lengths[index], index))
    first = order.index(0)
    low, high = first, first + 1  # the batch is order[low:high]
    oldest = total = lengths[0]
    while True:
        sides = []
        if low > 0:
            sides.append((oldest - lengths[order[low - 1]], -1))
        if high < len(order):
            sides.append((lengths[order[high]] - oldest, 1))
        for _, side in sorted(sides):
            added = lengths[order[high if side > 0 else low - 1]]
            longest = max(lengths[order[high - 1]], added)
            size = (high - low + 1) * longest
            padding = size - total - added
            if size <= max_num_batched_tokens and padding <= max(
                FREE_PADDING, (total + added) // _MAX_SHARE
            ):
                low, high = (low, high + 1) if side > 0 else (low - 1, high)
                total += added
                break
        else:
            return order[low:high]
