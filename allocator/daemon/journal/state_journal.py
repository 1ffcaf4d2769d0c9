"""The daemon's state as its journal tells it: noted change by change, written anew when it is long.

Owns the journal's life beside the daemon's. Invariants: before `begin` nothing is noted; a journal
that lacks a record is never left for a successor, who would lease what is leased. Knows nothing of
what the records say.
"""

import logging
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Final

from allocator.daemon.journal.file import Journal
from allocator.daemon.journal.history import History
from allocator.errors import JournalError
from allocator.messages import Message, encode

log = logging.getLogger("onecopy.allocator")

_RETRY_S: Final = 5.0
_LONG_BYTES: Final = 4 << 20
_LONG_FACTOR: Final = 4


class StateJournal:
    """Of one runtime directory."""

    def __init__(
        self, path: Path, snapshot: Callable[[], Iterable[Message]], history: History
    ) -> None:
        """`snapshot` gives the records of everything that is so now."""
        self._path = path
        self._snapshot = snapshot
        self._history = history
        self._journal: Journal | None = None
        self._is_behind = False
        self._rewrite_not_before = 0.0

    def begin(self) -> None:
        """Write it anew, instead of the last daemon's. Raises JournalError."""
        self._journal = Journal.create(self._path, map(encode, self._snapshot()))

    def note(self, record: Message, sync: bool = False) -> None:
        """Append a change; with `sync` it is on the disk then."""
        if self._journal is None or self._is_behind:
            return
        try:
            self._journal.append(encode(record), sync=sync)
        except JournalError as error:
            # Serving goes on: what is lost is only what a successor could adopt. From a journal
            # that lacks the latest leases it must not: it would lease the same extents again.
            self._history.add("journal", f"{error}; nothing can be adopted until it is written")
            self._is_behind = True
            try:
                self._path.unlink(missing_ok=True)
            except OSError as unlinked:
                log.error("the journal can't be removed, do so by hand: %s", unlinked)  # noqa: TRY400

    def tidy(self) -> None:
        """Write it anew where it has grown long, or did not take a record."""
        journal = self._journal
        if journal is None:
            return
        too_long = max(_LONG_BYTES, _LONG_FACTOR * journal.num_bytes_at_rewrite)
        if not self._is_behind and journal.num_bytes <= too_long:
            return
        if time.monotonic() < self._rewrite_not_before:
            return
        try:
            journal.rewrite(map(encode, self._snapshot()))
        except JournalError as error:
            log.warning("%s", error)
            self._rewrite_not_before = time.monotonic() + _RETRY_S
        else:
            self._is_behind = False

    def close(self) -> None:
        """Leave it to the next daemon."""
        if self._journal is not None:
            self._journal.close()

    def remove(self) -> None:
        """Nothing is held any more that could be adopted."""
        try:
            self._path.unlink(missing_ok=True)
        except OSError as error:  # it names segments that are gone, so nothing is adopted by it
            log.warning("the journal %s can't be removed: %s", self._path, error.strerror)
        self.close()
