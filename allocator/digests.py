"""Content digests of tensors: which hash, and comparing a segment with its manifest.

A digest is there to notice accidents: a torn write, a rotten disk, a bug of ours. XXH3-128 reads
about as fast as memory does, but it is no cryptographic hash: it says nothing of an adversary, who
could make other bytes with the same digest. (XXH3 as specified in xxHash's doc/xxhash_spec.md.)

Invariant: bytes are hashed where they lie, never copied.
"""

import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Final

import xxhash

from allocator.messages import TensorEntry

Digest = xxhash.xxh3_128
"""For bytes that come in pieces: `update` with each, then `hexdigest`."""

_PIECE_BYTES: Final = 8 << 20
"""One call's worth. The hash lets other threads run meanwhile; between two calls a signal is seen,
however large the tensor."""
_MAX_THREADS: Final = 4
"""Few threads read as fast as memory can deliver."""


def digest(view: memoryview) -> str:
    """The 32 hex digits for the bytes of a contiguous, one-dimensional view."""
    hashed = Digest()
    for begin in range(0, len(view), _PIECE_BYTES):
        with view[begin : begin + _PIECE_BYTES] as piece:
            hashed.update(piece)
    return hashed.hexdigest()


def differing(
    buffer: memoryview, entries: Mapping[str, TensorEntry], *, num_threads: int | None = None
) -> list[str]:
    """The names, in the order of `entries`, whose bytes in `buffer` do not match their digest.

    All `entries` lie in the segment that `buffer` is; one that reaches beyond its end differs. One
    without a digest is skipped, tied ones are hashed once. By default one thread a core, at most 4.
    """
    if num_threads is None:
        num_threads = min(_MAX_THREADS, len(os.sched_getaffinity(0)))
    checked = {name: entry for name, entry in entries.items() if entry.digest}
    # Largest first: a large one that begins last would be waited for by all other threads.
    extents = sorted({(entry.num_bytes, entry.offset) for entry in checked.values()}, reverse=True)

    def found(extent: tuple[int, int]) -> str | None:
        num_bytes, offset = extent
        if offset + num_bytes > len(buffer):
            return None
        with buffer[offset : offset + num_bytes] as view:
            return digest(view)

    with ThreadPoolExecutor(num_threads, thread_name_prefix="digest") as threads:
        digests = dict(zip(extents, threads.map(found, extents), strict=True))
    return [
        name
        for name, entry in checked.items()
        if digests[entry.num_bytes, entry.offset] != entry.digest
    ]
