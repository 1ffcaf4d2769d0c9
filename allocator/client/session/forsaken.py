"""Sessions that were closed while there was no allocator to hear of it.

Owns the list of this process's. Invariant: each is ended with the next allocator that answers, or
once its runtime directory is gone.
"""

import contextlib
import logging
from pathlib import Path

from allocator.errors import AllocatorError, AllocatorGone
from allocator.lifeline import Lifeline
from allocator.messages import Hello

log = logging.getLogger("onecopy.allocator")

_forsaken: list[tuple[Path, Hello]] = []
"""(lifeline, what resumes the session)."""


def add(lifeline: Path, resuming: Hello) -> None:
    """A successor may adopt this one."""
    _forsaken.append((lifeline, resuming))


def forget() -> None:
    """In a forked child: they are the parent's to end."""
    _forsaken.clear()


def end_all(timeout_s: float) -> None:
    """A successor may have adopted them, and can't tell by the process, which lives on: take each
    up once more, and end it."""
    for one in list(_forsaken):
        path, hello = one
        try:
            Lifeline.connect(path, timeout_s, hello).close()
        except AllocatorGone:
            if path.parent.exists():
                continue  # not yet: the next connection tries again
        except AllocatorError as error:
            log.debug("a session could not be ended: %s", error)
        with contextlib.suppress(ValueError):  # another thread was faster
            _forsaken.remove(one)
