"""Forks of a process that has sessions: the child must not keep its parent's alive.

Owns the hook. Invariant: in a forked child every connection that was open is dropped before
anything else runs.
"""

import os
import weakref
from typing import Protocol

from allocator.client.session import forsaken


class Inherited(Protocol):
    """A connection."""

    def drop_inherited(self) -> None:
        """Close what a forked child has of it."""


_open: "weakref.WeakSet[Inherited]" = weakref.WeakSet()


def watch(connection: Inherited) -> None:
    """It is open in this process."""
    _open.add(connection)


def _after_fork_in_child() -> None:
    forsaken.forget()
    for connection in list(_open):
        connection.drop_inherited()


os.register_at_fork(after_in_child=_after_fork_in_child)
