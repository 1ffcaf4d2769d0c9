"""The tables of requests: every request has its rows, and its replies change what they should."""

from typing import get_args

import pytest

from allocator.books import Books, LeasesBegan, LeasesEnded, PinsChanged, ReadsChanged
from allocator.journaled import JOURNALED
from allocator.messages import Extent, LeaseId, Reply, Request
from allocator.requests import REPEATABLE


def test_every_request_has_its_row() -> None:
    assert set(JOURNALED) == set(get_args(Request))
    assert {reply for row in JOURNALED.values() for reply in row} <= set(get_args(Reply))
    assert set(get_args(Request)) >= REPEATABLE


LEASED = LeasesBegan(generation=3, extents=(Extent(offset=0, num_bytes=64),))
RETURNED = LeasesEnded(leases=(LeaseId(0, 3),))
PINNED = PinsChanged(digests=(b"d" * 16,), pinned=True)
UNPINNED = PinsChanged(digests=(b"d" * 16,), pinned=False)
READ = ReadsChanged(key="k", generation=1, by=1)
RELEASED = ReadsChanged(key="k", generation=1, by=-1)


@pytest.mark.parametrize(
    ("begins", "ends"), [(LEASED, RETURNED), (PINNED, UNPINNED), (READ, RELEASED)]
)
def test_what_ends_must_have_begun(
    begins: LeasesBegan | PinsChanged | ReadsChanged,
    ends: LeasesEnded | PinsChanged | ReadsChanged,
) -> None:
    books = Books()
    assert not ends.fits(books)
    ends.enter(books)  # what nobody knows of is as good as ended
    assert (books.leases, books.pins, books.reads) == ({}, {}, {})
    assert begins.fits(books)
    begins.enter(books)
    assert ends.fits(books)
    ends.enter(books)
    assert (books.leases, books.pins, books.reads) == ({}, {}, {})
    assert not ends.fits(books)
