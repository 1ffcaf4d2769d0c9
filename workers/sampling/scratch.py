"""Memory for rows of logits that are worked on.

Owns one buffer a thread, so that no step has to fault in pages of its own. Invariant: what is
handed out is a copy in float32, and valid until the next is asked for.
"""

import threading
from collections.abc import Iterator, Sequence
from typing import Final

import torch

BYTES: Final = 4 << 20
"""Rows are worked on as many at a time as this holds, one at least."""

_own = threading.local()


def groups(
    logits: torch.Tensor, indices: Sequence[int] | None = None
) -> Iterator[tuple[int, torch.Tensor]]:
    """Copies of rows of `logits` [n, vocab_size], `indices` or all, a group at a time, each with
    the position of its first row among them."""
    num_rows, vocab_size = len(logits) if indices is None else len(indices), logits.shape[1]
    at_once = max(1, BYTES // (4 * vocab_size))
    buffer = _buffer(vocab_size, at_once)
    for start in range(0, num_rows, at_once):
        stop = min(start + at_once, num_rows)
        rows = buffer[: stop - start]
        if indices is None:
            rows.copy_(logits[start:stop])
        else:
            for row, index in zip(rows, indices[start:stop], strict=True):
                row.copy_(logits[index])
        yield start, rows


def _buffer(vocab_size: int, num_rows: int) -> torch.Tensor:
    buffer: torch.Tensor | None = getattr(_own, "buffer", None)
    if buffer is None or buffer.shape[1] != vocab_size:
        buffer = _own.buffer = torch.empty(num_rows, vocab_size)
    return buffer
