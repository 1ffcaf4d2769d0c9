"""The layout of a module's bytes: which tensors belong together, and where they go. Pure.

Owns extents, as spans of bytes that overlap, and their offsets. Invariants: bytes that were one
before are one after, at the same distances; extents do not overlap; each tensor is aligned to its
own dtype. Knows nothing of tensors or of memory.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from allocator.errors import InvalidMessage
from allocator.messages import ALIGNMENT

LARGEST_ITEM_BYTES: Final = 16
"""No dtype needs a coarser alignment than complex128."""
_MOST_NAMED: Final = 8


@dataclass(frozen=True)
class Span:
    """Bytes [start, end) that one tensor reaches, holes between its strides included: of memory
    before the layout, of the segment after it."""

    start: int
    end: int
    itemsize: int
    name: str


@dataclass(frozen=True)
class SpanGroup:
    """Spans that overlap, directly or through others, sorted by their start."""

    spans: tuple[Span, ...]

    @property
    def start(self) -> int:
        return self.spans[0].start

    @property
    def end(self) -> int:
        return max(span.end for span in self.spans)


def grouped(spans: Iterable[Span]) -> list[SpanGroup]:
    """All spans, each in one extent, the extents sorted by their start. Spans that only touch are
    apart."""
    found: list[list[Span]] = []
    end = 0
    for span in sorted(spans, key=lambda span: (span.start, span.end)):
        if not found or span.start >= end:
            found.append([])
            end = span.end
        found[-1].append(span)
        end = max(end, span.end)
    return [SpanGroup(tuple(group)) for group in found]


def lay_out(ordered: Iterable[SpanGroup]) -> tuple[list[int], int]:
    """The offset of each extent, in their order, and the number of bytes that hold them all.

    Offsets are multiples of `ALIGNMENT`, or at most 15 bytes behind one where spans of different
    dtypes overlap. Raises InvalidMessage where no offset aligns them all.
    """
    offsets: list[int] = []
    end = 0
    for extent in ordered:
        offsets.append(-(-end // ALIGNMENT) * ALIGNMENT + _lead(extent))
        end = offsets[-1] + extent.end - extent.start
    return offsets, end


def _lead(extent: SpanGroup) -> int:
    for lead in range(LARGEST_ITEM_BYTES):
        if all((lead + s.start - extent.start) % s.itemsize == 0 for s in extent.spans):
            return lead
    names = ", ".join(repr(span.name) for span in extent.spans[:_MOST_NAMED])
    raise InvalidMessage(f"the tensors {names} overlap at distances that their dtypes do not allow")
