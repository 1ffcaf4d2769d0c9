"""uvicorn on a socket that is bound already, for clients that may do anything with connections.

Owns accepting, and the number of connections. Invariants: the process never runs out of descriptors
by connections; who connects is heard as long as anybody can be closed for it. Knows nothing of what
is served.

uvicorn has no bound on connections that answers by more than a closed door, and asyncio's own loop
of accepting writes 2,000 tracebacks to the log where descriptors run out.
"""

import asyncio
import contextlib
import errno
import logging
import resource
import socket
from collections.abc import Callable, Iterator
from http import HTTPStatus
from typing import Final

import uvicorn
from fastapi import FastAPI

from server.api.connection import USUAL_PATIENCE, Connection, Connections, Patience, refusal

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
        patience: Patience = USUAL_PATIENCE,
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
