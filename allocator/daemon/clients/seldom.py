"""Warnings that somebody else can cause as often as they like, told now and then.

Owns the counting. Invariant: of each kind at most one line in a while, which says how many it
stands for.
"""

import logging
import time
from typing import Final

_EVERY_S: Final = 10.0


class Seldom:
    """A logger's warnings, by their format."""

    def __init__(self, log: logging.Logger, every_s: float = _EVERY_S) -> None:
        self._log = log
        self._every_s = every_s
        self._told_at: dict[str, float] = {}
        self._num_untold: dict[str, int] = {}

    def warning(self, text: str, *arguments: object) -> None:
        """As `Logger.warning`, for a `text` that is a constant."""
        now = time.monotonic()
        if now - self._told_at.get(text, -self._every_s) < self._every_s:
            self._num_untold[text] = self._num_untold.get(text, 0) + 1
            return
        self._told_at[text] = now
        untold = self._num_untold.pop(text, 0)
        if untold:
            self._log.warning(text + " (and %d more like it before)", *arguments, untold)
        else:
            self._log.warning(text, *arguments)
