"""Which two tokens make a third one: found by their scores, or listed in a file, and checked.

Owns the search. Invariant: what is given on names tokens alone, what is merged first at the front.
262,144 tokens can be cut in 1.1 million places; looking each half up by its text takes a second,
most of it waiting for memory, so halves are looked up by numbers that stand for them, all at once.
Pure.
"""

from collections.abc import Sequence
from typing import Any, Final

import numpy as np

_BASE: Final = 0x9E3779B97F4A7C15
_TABLE_BITS: Final = 20


def scored_merges(tokens: Sequence[str], scores: Sequence[float]) -> list[str]:
    """Pairs with a blank between the two, those first whose token has the highest score."""
    order = np.argsort(-np.asarray(scores, np.float64), kind="stable").tolist()
    texts = [tokens[at] for at in order]
    starts, ends, numbers = _together(texts)
    known = _Members(numbers.of(starts, ends))
    owners = np.repeat(np.arange(len(texts), dtype=np.int32), ends - starts)  # [num_characters]
    cuts = np.arange(len(owners), dtype=np.int32)
    inside = cuts > starts[owners]
    owners, cuts = owners[inside], cuts[inside]
    found = known.holds(numbers.of(starts[owners], cuts))
    owners, cuts = owners[found], cuts[found]
    found = known.holds(numbers.of(cuts, ends[owners]))
    owners, cuts = owners[found], cuts[found]
    places = (cuts - starts[owners]).tolist()
    return [
        f"{(text := texts[owner])[:place]} {text[place:]}"
        for owner, place in zip(owners.tolist(), places, strict=True)
    ]


def usable(tokens: Sequence[str], merges: Sequence[str]) -> tuple[list[str], str | None]:
    """Of `merges`, each with one blank, those of two tokens; and one of these that makes what is no
    token, if there is one."""
    if not merges:
        return [], None
    starts, ends, numbers = _together(tokens)
    known = _Members(numbers.of(starts, ends))
    starts, ends, numbers = _together(merges)
    blanks = numbers.places_of(" ")
    halves = known.holds(numbers.of(starts, blanks)) & known.holds(numbers.of(blanks + 1, ends))
    wrong = halves & ~known.holds(numbers.joined(starts, blanks, ends))
    first = merges[int(wrong.argmax())] if wrong.any() else None
    if halves.all():
        return list(merges), first
    return [merge for merge, whole in zip(merges, halves.tolist(), strict=True) if whole], first


def _together(texts: Sequence[str]) -> tuple[Any, Any, "_Numbers"]:
    """Where each starts and ends in all of them, and the numbers of parts of that."""
    lengths = np.fromiter(map(len, texts), np.int64, len(texts))
    ends = np.cumsum(lengths)
    return ends - lengths, ends, _Numbers("".join(texts))


class _Numbers:
    """A number for each part of a text, the same for the same characters: a polynomial modulo
    2**64. Two texts that are not the same could have the same one if somebody made them for it; a
    merge that comes of that names no token, and whoever loads the tokenizer refuses it."""

    def __init__(self, text: str):
        self._codes = np.frombuffer(text.encode("utf-32-le"), np.uint32)
        self._forwards = _powers(_BASE, len(self._codes))
        self._backwards = _powers(pow(_BASE, -1, 1 << 64), len(self._codes))
        self._sums = np.zeros(len(self._codes) + 1, np.uint64)
        values = self._codes.astype(np.uint64) + np.uint64(1)
        np.cumsum(values * self._forwards[1:], out=self._sums[1:])

    def of(self, starts: Any, ends: Any) -> Any:
        """For each start and end. # [num_parts]"""
        return (self._sums[ends] - self._sums[starts]) * self._backwards[starts]

    def joined(self, starts: Any, cuts: Any, ends: Any) -> Any:
        """For each, of what is left without the character at its cut. # [num_parts]"""
        return self.of(starts, cuts) + self.of(cuts + 1, ends) * self._forwards[cuts - starts]

    def places_of(self, character: str) -> Any:
        return np.flatnonzero(self._codes == ord(character))


def _powers(base: int, count: int) -> Any:
    powers = np.full(count + 1, base, np.uint64)
    powers[0] = 1
    return np.multiply.accumulate(powers, out=powers)


class _Members:
    """Numbers that can be asked for: one in each slot of a large table, and the few that found
    theirs taken in a small list that is searched."""

    def __init__(self, numbers: Any):
        self._numbers = numbers
        self._slots = np.full(1 << _TABLE_BITS, -1, np.int32)
        slots = self._slots_of(numbers)
        self._slots[slots] = np.arange(len(numbers), dtype=np.int32)
        self._others = np.sort(numbers[numbers[self._slots[slots]] != numbers])

    def holds(self, asked: Any) -> Any:
        """For each, whether it is one of them. # [num_asked]"""
        found = self._slots[self._slots_of(asked)]
        taken = np.flatnonzero(found >= 0)
        held = np.zeros(len(asked), bool)
        same = self._numbers[found[taken]] == asked[taken]
        held[taken[same]] = True
        if len(self._others):
            left = taken[~same]
            at = np.searchsorted(self._others, asked[left])
            held[left] = self._others[np.minimum(at, len(self._others) - 1)] == asked[left]
        return held

    def _slots_of(self, numbers: Any) -> Any:
        return (numbers * np.uint64(_BASE)) >> np.uint64(64 - _TABLE_BITS)
