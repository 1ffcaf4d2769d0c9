"""Digests: the hash itself, and which tensors of a segment do not match theirs."""

import mmap
import tracemalloc
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from allocator.digests import Digest, differing, digest
from allocator.messages import TensorEntry

MIB = 1 << 20


def entry(data: bytes, offset: int, num_bytes: int, expected: str | None = None) -> TensorEntry:
    """A tensor of bytes; its digest is what `data` holds there, if nothing else is said."""
    return TensorEntry(
        dtype="uint8",
        shape=(num_bytes,),
        stride=(1,),
        offset=offset,
        num_bytes=num_bytes,
        digest=digest(memoryview(data)[offset : offset + num_bytes])
        if expected is None
        else expected,
    )


@pytest.mark.parametrize(
    ("data", "expected"),
    # The first is also in xxHash's own tests. Manifests on disks were written with these.
    [
        (b"", "99aa06d3014798d86001c324468d497f"),
        (b"onecopy", "4a1956e8234911370f8b54ee00383231"),
    ],
)
def test_known_digests(data: bytes, expected: str) -> None:
    assert digest(memoryview(data)) == expected


@pytest.mark.parametrize("num_bytes", [8 * MIB - 1, 8 * MIB, 8 * MIB + 1, 20 * MIB])
def test_pieces_do_not_show(num_bytes: int) -> None:
    data = bytes(range(251)) * (num_bytes // 251 + 1)
    view = memoryview(data)[:num_bytes]
    whole = Digest(view).hexdigest()
    assert digest(view) == whole
    pieces = Digest()
    for begin in range(0, num_bytes, 1_000_003):
        pieces.update(view[begin : begin + 1_000_003])
    assert pieces.hexdigest() == whole


@dataclass
class Segment:
    """Three tensors with a gap between them, and names for odd ones."""

    data: bytearray = field(default_factory=lambda: bytearray(bytes(range(256)) * 40))

    def entries(self) -> dict[str, TensorEntry]:
        data = bytes(self.data)
        return {
            "z": entry(data, 0, 256),
            "a": entry(data, 512, 1000),
            "tied to a": entry(data, 512, 1000),
            "inside a": entry(data, 768, 10),
            "empty": entry(data, 300, 0),
            "last": entry(data, len(data) - 7, 7),
            "without": entry(data, 0, len(data), ""),
        }


@pytest.mark.parametrize("num_threads", [None, 1, 2, 7])
@pytest.mark.parametrize(
    ("at", "expected"),
    [
        (None, []),
        (0, ["z"]),
        (255, ["z"]),
        (256, []),  # between two tensors
        (511, []),
        (512, ["a", "tied to a"]),
        (770, ["a", "tied to a", "inside a"]),
        (1511, ["a", "tied to a"]),
        (1512, []),
        (-1, ["last"]),
    ],
)
def test_what_differs(num_threads: int | None, at: int | None, expected: list[str]) -> None:
    segment = Segment()
    entries = segment.entries()
    if at is not None:
        segment.data[at] ^= 1
    found = differing(memoryview(segment.data), entries, num_threads=num_threads)
    assert found == expected


def test_the_order_is_that_of_the_entries() -> None:
    data = bytes(1000)
    entries = {f"{n % 7}-{n}": entry(data, n, n, "0" * 32) for n in range(100)}
    assert differing(memoryview(data), entries) == list(entries)


@pytest.mark.parametrize(
    ("offset", "num_bytes"), [(990, 11), (1000, 1), (1001, 0), (1 << 62, 1 << 62), (0, 1 << 62)]
)
def test_what_reaches_beyond_the_end_differs(offset: int, num_bytes: int) -> None:
    data = bytes(1000)
    # Even with the digest of the bytes that are there.
    wrong = entry(data, offset, num_bytes)
    assert differing(memoryview(data), {"x": wrong, "y": entry(data, 0, 5)}) == ["x"]


def test_nothing_to_check() -> None:
    assert differing(memoryview(b""), {}) == []
    assert differing(memoryview(b""), {"x": entry(b"", 0, 0, "")}) == []


@settings(deadline=None)  # threads may wait for a core
@given(st.binary(min_size=1, max_size=300), st.data())
def test_any_changed_byte_is_found(data: bytes, draw: st.DataObject) -> None:
    extents = draw.draw(
        st.lists(
            st.tuples(st.integers(0, len(data)), st.integers(0, len(data))).map(
                lambda ends: (min(ends), max(ends) - min(ends))
            ),
            max_size=5,
        )
    )
    entries = {f"{n}": entry(data, *extent) for n, extent in enumerate(extents)}
    at = draw.draw(st.integers(0, len(data) - 1))
    changed = bytearray(data)
    changed[at] ^= draw.draw(st.integers(1, 255))
    expected = [f"{n}" for n, (begin, size) in enumerate(extents) if begin <= at < begin + size]
    assert differing(memoryview(changed), entries, num_threads=2) == expected


def test_nothing_is_copied_and_nothing_is_kept() -> None:
    num_bytes = 64 * MIB
    mapped = mmap.mmap(-1, num_bytes)
    view = memoryview(mapped)
    entries = {"all": entry(b"", 0, num_bytes, digest(view)), "half": entry(b"", 0, MIB, "0" * 32)}
    tracemalloc.start()
    try:
        found = differing(view, entries, num_threads=2)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert found == ["half"]
    assert peak < MIB
    view.release()
    mapped.close()  # raises BufferError where a view is left
