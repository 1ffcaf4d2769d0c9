"""HTTP requests on their way, each counted for the model as it was when the request began.

Owns the count. Invariant: whoever asks whether the model as it was is still needed hears yes until
the last byte of the last such answer is sent, or its client is gone, wherever in the server the
request may be at the moment. Knows nothing of what requests are about.
"""

from collections import Counter
from collections.abc import Callable

from starlette.types import ASGIApp, Receive, Scope, Send


class InFlight:
    """Of one server."""

    def __init__(self, epoch: Callable[[], int]) -> None:
        """`epoch` of the model as it is served now."""
        self._epoch = epoch
        self._counts: Counter[int] = Counter()

    def num_before(self, epoch: int) -> int:
        """Requests that began before the model was served as it is in `epoch`."""
        return sum(count for began, count in self._counts.items() if began < epoch)

    async def run(self, app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
        """Let `app` answer one request."""
        epoch = self._epoch()
        self._counts[epoch] += 1
        try:
            await app(scope, receive, send)
        finally:
            self._counts[epoch] -= 1
            if not self._counts[epoch]:
                del self._counts[epoch]


class InFlightCount:
    """ASGI middleware."""

    def __init__(self, app: ASGIApp, in_flight: InFlight) -> None:
        self._app = app
        self._in_flight = in_flight

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._in_flight.run(self._app, scope, receive, send)
