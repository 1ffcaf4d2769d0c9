"""Requests that may be what ends instances: each goes on alone, on an instance for itself.

Owns their line. Invariants: such an instance has one request at a time, and its end harms no other;
others never wait for a request in here, since its instance is an additional one; a request that
ends that instance too is over.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Callable
from typing import Final

from server.fleet.homeless import LONGEST_S
from server.fleet.instance import Instance
from server.fleet.requests import Request

log = logging.getLogger("onecopy.server")

MOST_AT_ONCE: Final = 2
"""Instances that there are for such requests; further ones wait in line."""


class Quarantine:
    """The line, and those whose turn it is."""

    def __init__(
        self,
        want: Callable[[int], None],
        place: Callable[[Request, Instance], None],
        recovers: Callable[[], bool],
        give_up: Callable[[Request], None],
    ) -> None:
        """`want` asks for so many instances for one request each; `place` gives a request to one of
        them; `recovers` says whether any can be expected; `give_up` ends a request whose turn does
        not come."""
        self._want = want
        self._place = place
        self._recovers = recovers
        self._give_up = give_up
        self._waiting: deque[Request] = deque()
        self._running: dict[str, Request] = {}  # by the name of its instance

    def __contains__(self, request: Request) -> bool:
        return request in self._waiting or request in self._running.values()

    def add(self, request: Request) -> None:
        """It goes on here; first of all, where its instance was taken from it by somebody else."""
        was_here = self._leave(request)
        if was_here:
            self._waiting.appendleft(request)
        else:
            log.warning(
                "request %s was computed on %d instances that ended by themselves: it goes on "
                "alone",
                request.request_id,
                request.num_blamed,
            )
            self._waiting.append(request)
        self._await_turn(request)
        self._ask()

    def remove(self, request: Request) -> None:
        """It is over. Nothing if it was not here."""
        if self._leave(request):
            self._ask()

    def offer(self, instance: Instance) -> None:
        """An instance for one request has nothing to do."""
        if instance.name in self._running or not instance.answers:
            return
        if self._waiting:
            request = self._running[instance.name] = self._waiting.popleft()
            self._place(request, instance)

    def _await_turn(self, request: Request) -> None:
        """As long as there are instances for requests alone, or any can be expected."""
        request.num_waits += 1
        loop = asyncio.get_running_loop()
        loop.call_later(LONGEST_S, self._lose_turn, request, request.num_waits)

    def _lose_turn(self, request: Request, num_waits: int) -> None:
        if request.ended or request.num_waits != num_waits:
            return
        if self._recovers() or self._running or request not in self._waiting:
            self._await_turn(request)
        else:
            self._give_up(request)

    def _leave(self, request: Request) -> bool:
        if request in self._waiting:
            self._waiting.remove(request)
            return True
        for name, one in self._running.items():
            if one is request:
                del self._running[name]
                return True
        return False

    def _ask(self) -> None:
        self._want(min(len(self._waiting) + len(self._running), MOST_AT_ONCE))
