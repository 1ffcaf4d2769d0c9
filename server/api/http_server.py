"""uvicorn on a socket that is bound already, for clients that may do anything with connections.

Owns accepting, the number of connections, and what is granted to one that is slow. Invariants: the
process never runs out of descriptors by connections; who connects is heard as long as anybody can
be closed for it; what arrives in one piece never holds up the event loop for long. Knows nothing of
what is served.

uvicorn has no bound on connections that answers by more than a closed door, no time limit for a
request's head or body, and asyncio's own loop of accepting writes 2,000 tracebacks to the log where
descriptors run out.
"""

import asyncio
import contextlib
import errno
import logging
import resource
import socket
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, Final, Literal, cast

import h11
import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

from server.api.openai.errors import plain_error

_log = logging.getLogger("onecopy.server")

_BACKLOG: Final = 4096
_ACCEPTED_AT_ONCE: Final = 16
_REST_S: Final = 0.5
"""Pause of accepting where the machine has no descriptor left."""
_OUT_OF_DESCRIPTORS: Final = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})
_MOST_DESCRIPTORS: Final = 1 << 16
_MOST_CONNECTIONS: Final = 1 << 14
_RESERVED: Final = 192
"""Descriptors for what is no connection: sockets, children, bodies that arrive, the admin's."""
_RESERVED_PER_INSTANCE: Final = 2
_RETRY_AFTER_S: Final = 2
_TICKS: Final = 10
"""Of uvicorn's ten a second, between two looks at who is slow."""

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


def raise_descriptor_limit() -> int:
    """As far as is allowed and makes sense. Returns how many descriptors there may be."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _MOST_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, _MOST_DESCRIPTORS)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
            soft = wanted
    return _MOST_DESCRIPTORS if soft == resource.RLIM_INFINITY else soft


def most_connections(num_descriptors: int, num_instances: int) -> int:
    """That leave enough descriptors for everything else."""
    reserved = _RESERVED + _RESERVED_PER_INSTANCE * num_instances
    return max(16, num_descriptors // 4, min(num_descriptors - reserved, _MOST_CONNECTIONS))


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


class _Acceptor:
    """Takes connections off a listening socket while there is room for them."""

    def __init__(
        self, listening: socket.socket, connections: Connections, made: Callable[[], Connection]
    ) -> None:
        self._listening = listening
        self._connections = connections
        self._made = made
        self._loop = asyncio.get_running_loop()
        self._tasks: set[asyncio.Task[object]] = set()
        self._pause: asyncio.TimerHandle | None = None
        listening.setblocking(False)
        listening.listen(_BACKLOG)
        self._resume()

    def stop(self) -> None:
        self._loop.remove_reader(self._listening)
        if self._pause is not None:
            self._pause.cancel()

    def _resume(self) -> None:
        self._loop.add_reader(self._listening, self._accept)

    def _accept(self) -> None:
        for _ in range(_ACCEPTED_AT_ONCE):
            try:
                accepted, _ = self._listening.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:
                if error.errno not in _OUT_OF_DESCRIPTORS:
                    raise
                _log.warning(
                    "no connection can be accepted: %s. Raise the limit of open files", error
                )
                self._connections.close_one()
                self._loop.remove_reader(self._listening)
                self._pause = self._loop.call_later(_REST_S, self._resume)
                return
            accepted.setblocking(False)
            if not self._connections.make_room():
                self._turn_away(accepted)
                continue
            connecting = self._loop.connect_accepted_socket(self._made, accepted)
            task = self._loop.create_task(connecting)
            self._tasks.add(task)
            task.add_done_callback(self._connected)

    def _connected(self, task: "asyncio.Task[object]") -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            _log.warning("a connection could not be taken: %s", error)

    def _turn_away(self, accepted: socket.socket) -> None:
        _log.warning(
            "%d connections are open, which is all that there may be; turned one away. Raise the "
            "limit of open files to allow more",
            self._connections.most,
        )
        with accepted, contextlib.suppress(OSError):
            accepted.send(
                refusal(
                    HTTPStatus.SERVICE_UNAVAILABLE,
                    "As many connections are open as this server takes. Try again.",
                    f"retry-after: {_RETRY_AFTER_S}",
                )
            )


class HTTPServer(uvicorn.Server):
    """uvicorn on a socket that is bound already, without signal handlers of its own."""

    def __init__(
        self,
        app: FastAPI,
        bound: socket.socket,
        *,
        most: int = _MOST_CONNECTIONS,
        patience: Patience = Patience(),
    ):
        """`most`: connections that may be open at once."""
        super().__init__(
            uvicorn.Config(
                app,
                log_config=None,
                lifespan="off",
                ws="none",
                server_header=False,
                timeout_keep_alive=int(patience.idle_s),
                timeout_graceful_shutdown=5,
            )
        )
        self._bound = bound
        self._patience = patience
        self._connections = Connections(most)
        self._acceptor: _Acceptor | None = None
        self._up = asyncio.Event()
        self._serving: asyncio.Task[None] | None = None

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """In place of uvicorn's: connections are accepted here."""
        await self.lifespan.startup()
        self.servers = []
        self._acceptor = _Acceptor(self._bound, self._connections, self._connection)
        self.started = True
        self._up.set()

    def _connection(self) -> Connection:
        return Connection(self.config, self.server_state, self._connections, self._patience)

    async def on_tick(self, counter: int) -> bool:
        if counter % _TICKS == 0:
            now = asyncio.get_running_loop().time()
            for connection in list(self._connections.all):
                connection.judge(now)
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        if self._acceptor is not None:
            self._acceptor.stop()
        await super().shutdown(sockets)

    async def start(self) -> None:
        """Until connections are accepted."""
        self._serving = asyncio.create_task(self.serve(sockets=[self._bound]))
        up = asyncio.create_task(self._up.wait())
        await asyncio.wait([self._serving, up], return_when=asyncio.FIRST_COMPLETED)
        up.cancel()
        if self._serving.done():
            self._serving.result()

    async def ended(self) -> None:
        """Until it serves no longer. Raises what it ended with."""
        if self._serving is not None:
            await asyncio.wait([self._serving])
            self._serving.result()

    async def close(self) -> None:
        """Stop accepting, let running answers end, close."""
        self.should_exit = True
        if self._serving is not None:
            await asyncio.gather(self._serving, return_exceptions=True)
