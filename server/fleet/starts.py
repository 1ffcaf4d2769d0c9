"""How an instance's starts have gone: when the next may be tried, and why they fail.

Invariant: what fails again and again is tried ever more slowly, until a start succeeds.
"""

import time
from typing import Final

_FIRST_RETRY_S: Final = 0.1
_LAST_RETRY_S: Final = 30.0
MOST_FAILURES: Final = 3
"""Starts in a row that fail, after which nobody waits for the next one any more."""


class StartError(Exception):
    """The model can't be served. The message is for a person."""


class Starts:
    """Of one fleet."""

    def __init__(self) -> None:
        self.num_failed = 0
        """In a row."""
        self.error: str | None = None
        """Why instances can't start, since the last one that could."""
        self._next_at = 0.0

    @property
    def may_be_tried(self) -> bool:
        """Whether it is time for another."""
        return time.monotonic() >= self._next_at

    def delay_s(self) -> float:
        """How long to wait after the failures so far."""
        return min(_LAST_RETRY_S, _FIRST_RETRY_S * 2.0 ** min(self.num_failed, 16))

    def failed(self) -> None:
        """One did; the next waits."""
        self.num_failed += 1
        self._next_at = time.monotonic() + self.delay_s()

    def succeeded(self) -> None:
        """One did, and all is forgotten."""
        self.num_failed, self._next_at, self.error = 0, 0.0, None
