"""Which heads, rows and columns of a model each of several ranks computes. Pure.

Owns the cuts. Invariants: the ranks' ranges of query heads, and of an MLP's width, lie one behind
the other and are all of it, and none is empty; all query heads that share a key and value head are
computed by ranks that have it, and a rank has as many query heads for each of its key and value
heads as for the others, which is all that attention knows.

    9 heads over 3 of keys and values       rank 0      rank 1      rank 2      rank 3
    2 ranks                                 0…2 | 0     3…8 | 1 2
    4 ranks: the last is on two of them     0…2 | 0     3…5 | 1     6 | 2       7 8 | 2
"""

import math
from typing import Final, NamedTuple

from workers.errors import InvalidSetting

_GRANULE: Final = 64
_LEAST_GRANULES: Final = 4
"""Of each rank: so one has at most a fourth more than another."""


class Share(NamedTuple):
    """[begin, end)"""

    begin: int
    end: int

    @property
    def size(self) -> int:
        return self.end - self.begin

    def of(self, width: int) -> "Share":
        """The same of what is `width` times as long."""
        return Share(self.begin * width, self.end * width)


class HeadShare(NamedTuple):
    """Of one rank."""

    queries: Share
    keys_values: Share


class HeadGranule(NamedTuple):
    """How many heads at a time can be cut off, where weights are packed."""

    queries: int = 1
    keys_values: int = 1


ANY_HEAD: Final = HeadGranule()


def head_shares(
    num_heads: int, num_kv_heads: int, num_ranks: int, granule: HeadGranule = ANY_HEAD
) -> tuple[HeadShare, ...]:
    """Of each rank: whole heads of keys and values with all their queries, or, where there are more
    ranks than those, one of them with some of its queries. Cut at multiples of `granule` only.
    Raises InvalidSetting."""
    if num_ranks > num_heads:
        raise InvalidSetting(
            f"--tensor-parallel-size is {num_ranks}, but the model has {num_heads} attention heads "
            f"to divide: at most {num_heads} is possible"
        )
    group = num_heads // num_kv_heads
    if num_ranks <= num_kv_heads:
        at_once = granule.keys_values
        while at_once * group % granule.queries:
            at_once += granule.keys_values
        kept = shares(num_kv_heads, num_ranks, at_once)
        return tuple(HeadShare(one.of(group), one) for one in kept)
    found = []
    if num_kv_heads > 1 and (granule.keys_values > 1 or group % granule.queries):
        raise InvalidSetting(
            f"{num_kv_heads} heads of keys and values can't be cut one by one where their weights "
            f"are packed: --tensor-parallel-size may be {num_kv_heads} at most"
        )
    for kv_head, ranks in enumerate(shares(num_ranks, num_kv_heads)):
        for one in shares(group, ranks.size, granule.queries):
            first = kv_head * group
            queries = Share(first + one.begin, first + one.end)
            found.append(HeadShare(queries, Share(kv_head, kv_head + 1)))
    return tuple(found)


def width_shares(width: int, num_ranks: int, least: int = 1) -> tuple[Share, ...]:
    """Of an MLP: at multiples of `least`, and of what a processor reads at once where there are
    enough of them. Raises InvalidSetting."""
    granule = math.lcm(_GRANULE, least)
    while granule > least and width < granule * num_ranks * _LEAST_GRANULES:
        granule //= 2
    return shares(width, num_ranks, granule)


def shares(length: int, num_ranks: int, granule: int = 1) -> tuple[Share, ...]:
    """As equal as they can be, cut at multiples of `granule` only, which is the length of a group
    where weights are quantized in groups. Raises InvalidSetting."""
    num_granules = -(-length // granule)
    if num_ranks > num_granules:
        raise InvalidSetting(
            f"{length} in pieces of {granule} can't be divided among {num_ranks} ranks: "
            f"--tensor-parallel-size may be {max(num_granules, 1)} at most"
        )
    cuts = [num_granules * rank // num_ranks * granule for rank in range(num_ranks)]
    return tuple(Share(begin, end) for begin, end in zip(cuts, [*cuts[1:], length], strict=True))
