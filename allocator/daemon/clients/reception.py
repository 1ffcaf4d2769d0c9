"""Clients that have connected and have not said yet what they want.

Owns the lifeline's listener and who waits at it. Invariants: whoever says Hello is heard, however
many others say nothing: the one that has been silent for longest gives way; whoever can't be taken
is told so, by a word that it understands (AllocatorBusy). Knows nothing of sessions but how many
there are.
"""

import contextlib
import logging
import resource
import sys
import time
from typing import Final

import zmq

from allocator.daemon.clients.seldom import Seldom
from allocator.errors import AllocatorBusy
from allocator.lifeline import (
    NO_DESCRIPTORS,
    LifelineListener,
    NobodyThere,
    OutOfDescriptors,
    Visitor,
)

log = logging.getLogger("onecopy.allocator")

_HELLO_PATIENCE_S: Final = 5.0
_MAX_VISITORS: Final = 256
_ACCEPTED_A_TURN: Final = 32
_SPARE_DESCRIPTORS: Final = 64
_PAUSE_S: Final = 0.5
"""How long nobody is accepted where there is not even a descriptor to say so with."""
_TOO_MANY: Final = "too many clients are about to connect: try again"


class Reception:
    """Its descriptors are registered with the owner's poller."""

    def __init__(self, listener: LifelineListener, poller: zmq.Poller) -> None:
        self._listener = listener
        self._poller = poller
        self._visitors: dict[int, Visitor] = {}  # by descriptor, who came first in front
        self._closed_until: float | None = None
        self._seldom = Seldom(log)
        poller.register(listener.fileno(), zmq.POLLIN)

    def accept(self, num_sessions: int) -> None:
        """Let in who is waiting, some of them at a time."""
        for _ in range(_ACCEPTED_A_TURN):
            try:
                visitor = self._listener.accept(_HELLO_PATIENCE_S)
            except NobodyThere:
                return
            except OutOfDescriptors:
                self._seldom.warning(NO_DESCRIPTORS)
                if not self._send_away_the_oldest(NO_DESCRIPTORS) and not self._turn_away():
                    return
                continue
            if visitor is not None:
                self._let_in(visitor, num_sessions)

    @property
    def listener_fd(self) -> int:
        """Readable when somebody is waiting."""
        return self._listener.fileno()

    def take(self, descriptor: int) -> Visitor | None:
        """The visitor of that descriptor, which has said something or is gone: the caller's from
        now on."""
        visitor = self._visitors.pop(descriptor, None)
        if visitor is not None:
            self._poller.unregister(descriptor)
        return visitor

    def tidy(self, now: float) -> None:
        """Hang up on who has been silent for too long, and listen again after a pause."""
        for visitor in [one for one in self._visitors.values() if one.deadline <= now]:
            self.take(visitor.connection.fileno())
            visitor.connection.close()
        if self._closed_until is not None and self._closed_until <= now:
            self._closed_until = None
            self._poller.register(self._listener.fileno(), zmq.POLLIN)

    def next_deadline(self) -> float | None:
        """When `tidy` has something to do."""
        deadlines = [visitor.deadline for visitor in self._visitors.values()]
        if self._closed_until is not None:
            deadlines.append(self._closed_until)
        return min(deadlines, default=None)

    def close(self) -> None:
        """Nobody comes in any more."""
        for visitor in self._visitors.values():
            visitor.connection.close()
        self._visitors.clear()
        self._listener.close()

    # --- steps

    def _let_in(self, visitor: Visitor, num_sessions: int) -> None:
        if num_sessions + len(self._visitors) >= _most_clients():
            self._seldom.warning(NO_DESCRIPTORS)
            if not self._send_away_the_oldest(NO_DESCRIPTORS):
                visitor.refuse(AllocatorBusy(NO_DESCRIPTORS))
                return
        elif len(self._visitors) >= _MAX_VISITORS:
            self._send_away_the_oldest(_TOO_MANY)
        self._visitors[visitor.connection.fileno()] = visitor
        self._poller.register(visitor.connection.fileno(), zmq.POLLIN)

    def _send_away_the_oldest(self, why: str) -> bool:
        """False where nobody is there who is silent."""
        for descriptor, visitor in self._visitors.items():
            if visitor.is_silent:
                self.take(descriptor)
                visitor.refuse(AllocatorBusy(why))
                return True
        return False

    def _turn_away(self) -> bool:
        if self._listener.turn_away():
            return True
        self._closed_until = time.monotonic() + _PAUSE_S
        with contextlib.suppress(KeyError):
            self._poller.unregister(self._listener.fileno())
        return False


def _most_clients() -> int:
    """Each has a lifeline and a connection of ZeroMQ's; the daemon's own work needs some more."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return sys.maxsize if soft == resource.RLIM_INFINITY else (soft - _SPARE_DESCRIPTORS) // 2
