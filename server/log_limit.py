"""A bound on what one kind of message may write to the log.

Owns the counting. Invariant: of messages with the same words (before figures are put in) no more
than `most` pass in a window of time, and the first one of a later window says how many did not.
"""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

_MOST_KINDS: Final = 512
_UNLIMITED: Final = frozenset({"uvicorn.access"})
"""Loggers that write a line for each request, which is what they are for."""


@dataclass
class _Window:
    begun_at: float
    num_passed: int = 0
    num_left_out: int = 0


class LogLimit(logging.Filter):
    """For a handler."""

    def __init__(
        self, most: int = 50, window_s: float = 10.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        super().__init__()
        self._most = most
        self._window_s = window_s
        self._clock = clock
        self._windows: dict[tuple[str, int, str], _Window] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        if record.name in _UNLIMITED:
            return True
        now = self._clock()
        window = self._window(record, now)
        if window.num_passed >= self._most:
            window.num_left_out += 1
            return False
        window.num_passed += 1
        return True

    def _window(self, record: logging.LogRecord, now: float) -> _Window:
        kind = (record.name, record.levelno, str(record.msg)[:200])
        known = self._windows.get(kind)
        if known is not None and now - known.begun_at < self._window_s:
            return known
        if known is not None and known.num_left_out:
            record.msg = f"{record.getMessage()} ({known.num_left_out} more like it were left out)"
            record.args = ()
        if known is None and len(self._windows) >= _MOST_KINDS:
            self._windows = {
                one: window
                for one, window in self._windows.items()
                if now - window.begun_at < self._window_s
            }
            if len(self._windows) >= _MOST_KINDS:
                self._windows.clear()
        window = self._windows[kind] = _Window(now)
        return window
