"""Requests that are on no instance, and wait for one that becomes ready.

Owns their patience. Invariant: whoever waits is placed by somebody, ends, or is given up at last,
and what was set for an earlier wait does nothing.
"""

import asyncio
from collections.abc import Callable
from typing import Final

from server.fleet.requests import Request

_PATIENCE_S: Final = 2.0
"""How long a request whose instance ended waits for the replacement before it joins a busy one."""
LONGEST_S: Final = 60.0
"""How long a request waits for a new instance when there is none left, and none can be started."""


class Homeless:
    """Those of one router."""

    def __init__(
        self,
        may_join: Callable[[Request], bool],
        recovers: Callable[[], bool],
        place: Callable[[Request], None],
        give_up: Callable[[Request], None],
    ) -> None:
        """`may_join` says whether there is anything to be had by placing it, `recovers` whether
        instances can be expected; `place` and `give_up` do that to one that waits no longer."""
        self._may_join = may_join
        self._recovers = recovers
        self._place = place
        self._give_up = give_up
        self._waiting: list[Request] = []

    def add(self, request: Request) -> None:
        """After a while it joins a busy instance, if there is any, and after a long while it is
        given up."""
        request.num_waits += 1
        self._waiting.append(request)
        loop = asyncio.get_running_loop()
        loop.call_later(_PATIENCE_S, self._lose_patience, request, request.num_waits)
        loop.call_later(LONGEST_S, self._lose_hope, request, request.num_waits)

    def remove(self, request: Request) -> None:
        """It waits no longer, if it did."""
        if request in self._waiting:
            self._waiting.remove(request)

    def place_all(self) -> None:
        """An instance became ready."""
        waiting, self._waiting = self._waiting, []
        for request in waiting:
            self._place(request)

    def _still_waits(self, request: Request, num_waits: int) -> bool:
        return request in self._waiting and request.num_waits == num_waits

    def _lose_patience(self, request: Request, num_waits: int) -> None:
        if self._still_waits(request, num_waits) and self._may_join(request):
            self._waiting.remove(request)
            self._place(request)

    def _lose_hope(self, request: Request, num_waits: int) -> None:
        if not self._still_waits(request, num_waits):
            return
        if self._recovers():  # on a slow machine it takes longer
            loop = asyncio.get_running_loop()
            loop.call_later(LONGEST_S, self._lose_hope, request, num_waits)
        else:
            self._give_up(request)
