"""HTTP requests on their way, each counted for the time when it began.

Owns the count. Invariant: whoever asks whether a model as it was is still needed hears yes until
the last byte of the last answer that began before is sent, or its client is gone, wherever in the
server the request may be at the moment. Knows nothing of what requests are about.
"""

from collections import Counter

from starlette.types import ASGIApp, Receive, Scope, Send


class InFlight:
    """Of one server."""

    def __init__(self) -> None:
        self._now = 0
        self._counts: Counter[int] = Counter()

    def mark(self) -> int:
        """A moment, which is now."""
        self._now += 1
        return self._now

    def num_before(self, mark: int) -> int:
        """Requests that began before that moment."""
        return sum(count for began, count in self._counts.items() if began < mark)

    async def run(self, app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
        """Let `app` answer one request."""
        began = self._now
        self._counts[began] += 1
        try:
            await app(scope, receive, send)
        finally:
            self._counts[began] -= 1
            if not self._counts[began]:
                del self._counts[began]


class InFlightCount:
    """ASGI middleware."""

    def __init__(self, app: ASGIApp, in_flight: InFlight) -> None:
        self._app = app
        self._in_flight = in_flight

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._in_flight.run(self._app, scope, receive, send)
