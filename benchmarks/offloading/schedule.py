"""How long passes over layers that are read ahead must take: the critical path. Pure.

Of layer i, counted over all passes, with `depth` read ahead:

    its read begins      when the read before it has ended, and layer i - depth - 1 is computed,
                         whose slot it gets
    its computation      when that before it and its own read have ended

Nothing that has `depth` + 1 slots, one disk and one processor, and keeps the order, is faster.
"""

from collections.abc import Sequence
from typing import NamedTuple


class Span(NamedTuple):
    """From when to when, in seconds."""

    begin_s: float
    end_s: float


class Step(NamedTuple):
    """One layer, once."""

    read: Span
    compute: Span


def critical_path(reads: Sequence[float], computes: Sequence[float], depth: int) -> list[Step]:
    """Of layers that take so long each. A read that takes no time is one that is not needed."""
    steps: list[Step] = []
    for number, (read_s, compute_s) in enumerate(zip(reads, computes, strict=True)):
        read_before = steps[-1].read.end_s if steps else 0.0
        computed = steps[-1].compute.end_s if steps else 0.0
        freed = steps[number - depth - 1].compute.end_s if number > depth else 0.0
        read = _span(max(read_before, freed), read_s)
        steps.append(Step(read, _span(max(computed, read.end_s), compute_s)))
    return steps


def steady_s(reads: Sequence[float], computes: Sequence[float], depth: int, passes: int) -> float:
    """So many passes over layers that take so long each, behind a first one that is not counted.
    Where all layers have a slot they are read in that one only."""
    num_layers = len(reads)
    later = reads if num_layers > depth + 1 else [0.0] * num_layers
    steps = critical_path([*reads, *list(later) * passes], list(computes) * (passes + 1), depth)
    return steps[-1].compute.end_s - steps[num_layers - 1].compute.end_s


def overlap(sync_s: float, async_s: float, best_s: float) -> float:
    """The share of what could be hidden that was: 1 where it took no longer than it must."""
    return (sync_s - async_s) / (sync_s - best_s)


def _span(begin_s: float, seconds: float) -> Span:
    return Span(begin_s, begin_s + seconds)
