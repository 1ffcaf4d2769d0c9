"""Threads of one session take turns: one request is on its way at a time.

Owns the order. Invariant: whoever came second is next, however often the first asks again.
"""

import contextlib
import threading
from collections.abc import Iterator

from allocator.errors import WaitTimeout


class Turns:
    """Of one session. A thread that has the turn can take it once more."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._next = threading.RLock()

    @contextlib.contextmanager
    def taken(self, patience_s: float | None = None) -> Iterator[None]:
        """Raises WaitTimeout after `patience_s`, if that is given."""
        # A lock alone would go to the thread that has just released it and asks again, for as long
        # as it waits for a weight set; here whoever came second holds the door until its turn.
        timeout_s = -1 if patience_s is None else patience_s
        if not self._next.acquire(timeout=timeout_s):
            raise WaitTimeout("another thread waits for the allocator")
        try:
            is_ours = self._lock.acquire(timeout=timeout_s)
        finally:
            self._next.release()
        if not is_ours:
            raise WaitTimeout("another thread waits for the allocator")
        try:
            yield
        finally:
            self._lock.release()
