"""One connection, however slow or odd its client may be, and all of them together.

Owns what a connection is at, and what is granted to one that is slow. Invariants: what arrives in
one piece never holds up the event loop for long; who waits longest for nothing is closed first.

uvicorn has no time limit for a request's head or body.
"""

import asyncio
import contextlib
import sys
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, Final, Literal, cast

import h11
import uvicorn
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

from server.api.openai.errors import plain_error

Phase = Literal["waiting", "head", "body", "answer", "lingering"]
"""What a connection does: nothing; sends a request's head, its body; is answered; or still sends
the body of a request that has been answered."""

_FIRST_BYTES: Final = 1 << 11
_LEAST_BYTES: Final = 1 << 8
_MOST_BYTES: Final = 1 << 16
"""Of what arrived, handed on at once: fewer where these take long, such as chunks of one byte."""
_QUICK_S: Final = 0.0005
_SLOW_S: Final = 0.003


@dataclass(frozen=True)
class Patience:
    """How long a connection may take, in seconds."""

    idle_s: float = 75.0
    """Until its first byte, and between two requests."""
    head_s: float = 20.0
    """For a request's head, from its first byte."""
    body_s: float = 30.0
    """For its body, and a second more for every `body_bytes_per_s`."""
    body_bytes_per_s: int = 4096
    stuck_s: float = 120.0
    """With an answer that it does not take."""
    linger_s: float = 10.0
    linger_bytes: int = 64 << 20
    """For the rest of a body after the answer, which would be lost if nobody read on."""


USUAL_PATIENCE: Final = Patience()


class Connections:
    """All connections of a server, and which of them wait for a request."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.all: set[Connection] = set()
        self._waiting: OrderedDict[Connection, None] = OrderedDict()
        """The one that has waited longest first."""

    def waits(self, connection: "Connection") -> None:
        self._waiting[connection] = None

    def works(self, connection: "Connection") -> None:
        self._waiting.pop(connection, None)

    def forget(self, connection: "Connection") -> None:
        self.all.discard(connection)
        self._waiting.pop(connection, None)

    def make_room(self) -> bool:
        """Close the one that has waited longest, if as many are open as may be. False where none
        can be closed."""
        return len(self.all) < self.most or self.close_one()

    def close_one(self) -> bool:
        """Close the one that has waited longest. False where none waits."""
        if not self._waiting:
            return False
        longest, _ = self._waiting.popitem(last=False)
        self.all.discard(longest)
        longest.close()
        return True


class _Flow(FlowControl):
    """Tells when reading goes on."""

    def __init__(self, transport: asyncio.Transport, resumed: Callable[[], None]) -> None:
        super().__init__(transport)
        self._resumed = resumed

    def pause_reading(self) -> None:
        self.read_paused = True  # the connection holds back what it has

    def resume_reading(self) -> None:
        if self.read_paused:
            self.read_paused = False
            self._resumed()


class _Transport:
    """What uvicorn writes to and closes. A close while the client still sends the body of a request
    that was answered would take the answer with it: the kernel resets such a connection."""

    def __init__(self, transport: asyncio.Transport, linger: Callable[[], bool]) -> None:
        self._transport = transport
        self._linger = linger

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def close(self) -> None:
        if not self._linger():
            self._transport.close()


class Connection(H11Protocol):
    """One, with a bound on our patience. Its transport reads only while nothing is held back."""

    def __init__(
        self,
        config: uvicorn.Config,
        state: ServerState,
        connections: Connections,
        patience: Patience,
    ) -> None:
        super().__init__(config, state, {})
        self._others = connections
        self._patience = patience
        self._held_back = b""
        """What arrived and was not handed on yet."""
        self._size = _FIRST_BYTES
        self._is_feeding = False
        self._phase: Phase = "waiting"
        self._since = self.loop.time()
        """When the phase began."""
        self._num_bytes = 0
        """That arrived in it."""
        self._stuck_since: float | None = None
        self._is_left = False
        """Nothing that comes is looked at any more."""

    # --- told by the transport, and by uvicorn

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)  # noqa: S101 - sockets have no other
        super().connection_made(transport)
        # What it does beyond that is asyncio's own.
        self.transport = cast("asyncio.Transport", _Transport(transport, self._linger))
        self.flow = _Flow(transport, self._feed_soon)
        self._others.all.add(self)
        self._others.waits(self)

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._others.forget(self)
        self._held_back = b""

    def data_received(self, data: bytes) -> None:
        if self._phase == "waiting":
            self._enter("head")
        self._num_bytes += len(data)
        if self._phase == "lingering" and self._num_bytes > self._patience.linger_bytes:
            self.transport.abort()
        if not self._is_left:
            self._held_back += data
            self._feed()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stuck_since = self.loop.time()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._stuck_since = None

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._note()

    def send_400_response(self, msg: str) -> None:
        """What h11 does not take; uvicorn would answer in plain text."""
        error = sys.exception()
        status = getattr(error, "error_status_hint", HTTPStatus.BAD_REQUEST)
        said = f": {error}" if isinstance(error, h11.RemoteProtocolError) else ""
        self._refuse(status, f"The request is no HTTP that this server takes{said}.")

    # --- handing on

    def _feed_soon(self) -> None:
        if not self._is_feeding:
            self._is_feeding = True
            self.loop.call_soon(self._feed_again)

    def _feed_again(self) -> None:
        self._is_feeding = False
        self._feed()

    def _feed(self) -> None:
        """Hand on a part of what has arrived; the rest when others have had their turn."""
        if self._held_back and not self.flow.read_paused and not self.transport.is_closing():
            piece = self._held_back[: self._size]
            self._held_back = self._held_back[self._size :]
            begun_at = self.loop.time()
            super().data_received(piece)
            took_s = self.loop.time() - begun_at
            if took_s > _SLOW_S:
                self._size = max(_LEAST_BYTES, self._size // 2)
            elif took_s < _QUICK_S:
                self._size = min(_MOST_BYTES, self._size * 2)
            self._note()
        if self.transport.is_closing():
            self._held_back = b""
        elif self._held_back or self.flow.read_paused:
            self.transport.pause_reading()
            if not self.flow.read_paused:
                self._feed_soon()
        else:
            self.transport.resume_reading()

    # --- patience

    def _enter(self, phase: Phase) -> None:
        self._phase, self._since, self._num_bytes = phase, self.loop.time(), 0

    def _note(self) -> None:
        """See which phase it is in by now."""
        if self.cycle is None or self._is_left:
            return
        sends = self.conn.their_state is h11.SEND_BODY
        if not self.cycle.response_complete:
            phase: Phase = "body" if sends else "answer"
        else:
            phase = "lingering" if sends else "waiting"
        if phase == self._phase or (phase, self._phase) == ("waiting", "head"):
            return
        self._enter(phase)
        if phase == "waiting":
            self._others.waits(self)
        else:
            self._others.works(self)

    def judge(self, now: float) -> None:
        """End it where our patience does."""
        patience, waited_s = self._patience, now - self._since
        if self._stuck_since is not None and now - self._stuck_since > patience.stuck_s:
            self.transport.abort()
        elif self._phase == "waiting" and waited_s > patience.idle_s:
            self.close()
        elif self._phase == "lingering" and waited_s > patience.linger_s:
            self.transport.abort()
        elif self._phase == "head" and waited_s > patience.head_s:
            self._refuse(HTTPStatus.REQUEST_TIMEOUT, "The request's head took too long.")
        elif self._phase == "body":
            if self.flow.read_paused:
                self._since = max(self._since, now - patience.body_s)  # it waits for us
            elif waited_s > patience.body_s + self._num_bytes / patience.body_bytes_per_s:
                self._refuse(HTTPStatus.REQUEST_TIMEOUT, "The request's body took too long.")

    def _linger(self) -> bool:
        """Leave a connection on which a body, or what is no request, may still come, once all that
        was written is sent. False where nothing can."""
        comes_on = self.conn.their_state in (h11.SEND_BODY, h11.ERROR)
        if not comes_on or self.transport.is_closing():
            return False
        if not self._is_left:
            self._is_left = True
            self._held_back = b""
            self._enter("lingering")
            self._others.works(self)
            if self.transport.can_write_eof():
                self.transport.write_eof()
            self.flow.read_paused = False
            self.transport.resume_reading()
        return True

    def shutdown(self) -> None:
        """The server ends: at once, or with the answer that is under way."""
        if self._phase in ("body", "answer"):
            self.cycle.keep_alive = False
        else:
            self.close()

    def close(self) -> None:
        """One that waits for its next request."""
        if not self.transport.is_closing():
            with contextlib.suppress(h11.LocalProtocolError):
                self.conn.send(h11.ConnectionClosed())
            self.transport.abort() if self._is_left else self.transport.close()

    def _refuse(self, status: int, message: str) -> None:
        """Answer in place of the application, and close."""
        if self.transport.is_closing():
            return
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE, h11.ERROR):
            self.transport.write(refusal(status, message))
        self.transport.close()
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.disconnected = True
            self.cycle.message_event.set()


def refusal(status: int, message: str, *headers: str) -> bytes:
    """A whole answer with an error's body, after which the connection is closed."""
    body = plain_error(message, "server_error" if status >= 500 else "invalid_request_error")
    lines = [
        f"HTTP/1.1 {status} {HTTPStatus(status).phrase}",
        "content-type: application/json",
        f"content-length: {len(body)}",
        "connection: close",
        *headers,
    ]
    return "\r\n".join([*lines, "", ""]).encode() + body
