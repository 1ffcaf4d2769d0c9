"""A ZeroMQ ROUTER that no peer can make hold more than so much, however it sends.

    handshake     a peer shows a password (PLAIN), which the owner knows or not
    frames        at most so long; a message is cut to so many of them
    messages      at most a few wait for a peer, in either direction
    memory        watched: where it grows, whoever floods is cut off, else all begin anew

Owns the socket, and its context. Invariants: what was received is given out once and in order; when
`tick` says so, what peers had sent or would have been sent may be lost, and their connections are
gone.
"""

import contextlib
import enum
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

import zmq

from allocator.daemon.clients.flood import MemoryWatch, cut, flooding_connections
from allocator.daemon.clients.seldom import Seldom

log = logging.getLogger("onecopy.allocator")

_ZAP: Final = "inproc://zeromq.zap.01"  # where libzmq asks (rfc.zeromq.org/spec/27)
_WAITING_REQUESTS: Final = 16
"""Of one peer; further ones wait at its end."""
_WAITING_REPLIES: Final = 128
"""For one peer; further ones are dropped."""
_HANDSHAKE_MS: Final = 5000
_SKIPPED_AT_ONCE: Final = 1000
_TICK_S: Final = 0.05


class Loss(enum.Enum):
    """What `tick` had to do."""

    NOTHING = enum.auto()
    FLOODERS = enum.auto()
    """The connections of `flooders` were cut."""
    ALL = enum.auto()
    """All connections are new."""


class BoundedRouter:
    """Bound to a Unix path, and registered with the owner's poller."""

    def __init__(
        self,
        endpoint: str,
        poller: zmq.Poller,
        knows: Callable[[bytes], bool],
        *,
        max_frame_bytes: int,
        max_frames: int,
    ) -> None:
        """`endpoint` as "ipc://PATH"; `knows` says whether a peer with this password may come in.
        Raises zmq.ZMQError where the path can't be had."""
        self._endpoint = endpoint
        self._path = endpoint.removeprefix("ipc://")
        self._poller = poller
        self._knows = knows
        self._max_frame_bytes = max_frame_bytes
        self._max_frames = max_frames
        self._watch = MemoryWatch()
        self._seldom = Seldom(log)
        self._tick_at = 0.0
        self._is_skipping = False
        self.flooders: frozenset[int] = frozenset()
        """The processes that were cut off by the last `tick`."""
        try:
            self._open()
        except BaseException:
            self._watch.close()
            raise

    @property
    def socket(self) -> "zmq.Socket[bytes]":
        """Readable when `receive` has something. Another one after everything was lost."""
        return self._router

    def greet(self, events: dict[object, int]) -> None:
        """Answer those that want to come in, where the poller has shown any."""
        if self._doorkeeper not in events:
            return
        while True:
            try:
                request = self._doorkeeper.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            # version, request id, domain, address, identity, mechanism, name, password
            is_known = len(request) == 8 and self._knows(request[7])
            status = (b"200", b"OK") if is_known else (b"400", b"no session has this token")
            self._doorkeeper.send_multipart([b"1.0", request[1], *status, b"", b""])

    def receive(self) -> list[bytes] | None:
        """The next message, identity first, without the frames beyond `max_frames`; None where
        there is none, or not yet."""
        if self._is_skipping and not self._skip():
            return None
        try:
            frame = self._router.recv(zmq.NOBLOCK, copy=False)
        except zmq.Again:
            return None
        # A frame knows whether it is the last. The socket's `rcvmore` says the same, and looks up
        # the option's name for it, which takes as long as all else here.
        frames = [frame.bytes]
        while frame.more:
            if len(frames) == self._max_frames:
                self._seldom.warning("a message has more than %d frames", self._max_frames)
                self._is_skipping = True
                self._skip()
                break
            frame = self._router.recv(copy=False)
            frames.append(frame.bytes)
        return frames

    def send(self, identity: bytes, *frames: bytes) -> None:
        """Dropped where the peer is gone, or does not read."""
        self._router.send_multipart([identity, *frames])

    def next_tick(self) -> float:
        """When `tick` should be called next, as long as anybody may come in."""
        return self._tick_at

    def tick(self, now: float) -> Loss:
        """See that peers keep within bounds. Takes some hundredths of a second where one does
        not."""
        if now < self._tick_at:
            return Loss.NOTHING
        self._tick_at = now + _TICK_S
        if not self._watch.is_exceeded or not self._watch.is_exceeded_when_trimmed():
            return Loss.NOTHING
        held_bytes = self._watch.private_bytes()
        flooding = flooding_connections(self._path)
        if flooding:
            for descriptor in flooding:
                cut(descriptor, self._path)
            self.flooders = frozenset(flooding.values())
            self._seldom.warning(
                "%d MB are held: processes %s send without end, and are cut off",
                *(held_bytes >> 20, sorted(self.flooders)),
            )
            return Loss.FLOODERS
        # Perhaps it is what they had sent before they were cut off, or stopped: all begin anew,
        # since only the end of a connection frees what came over it.
        self._close()
        self._watch.settle()  # before anybody can have sent again
        self._open()
        self._seldom.warning("%d MB were held: all connections begin anew", held_bytes >> 20)
        self._tick_at = time.monotonic() + _TICK_S
        return Loss.ALL

    def close(self) -> None:
        """End all connections, and remove the name."""
        self._close()
        self._watch.close()
        with contextlib.suppress(OSError):
            Path(self._path).unlink(missing_ok=True)  # libzmq leaves it behind

    # --- steps

    def _open(self) -> None:
        # A context of its own: its end waits until all connections are closed, so that whoever
        # connects again meets the new socket.
        self._context = zmq.Context(io_threads=1)
        try:
            self._doorkeeper = self._context.socket(zmq.REP)
            self._doorkeeper.setsockopt(zmq.LINGER, 0)
            self._doorkeeper.bind(_ZAP)
            self._router = self._context.socket(zmq.ROUTER)
            self._router.setsockopt(zmq.LINGER, 0)
            self._router.setsockopt(zmq.MAXMSGSIZE, self._max_frame_bytes)
            self._router.setsockopt(zmq.RCVHWM, _WAITING_REQUESTS)
            self._router.setsockopt(zmq.SNDHWM, _WAITING_REPLIES)
            self._router.setsockopt(zmq.HANDSHAKE_IVL, _HANDSHAKE_MS)
            self._router.setsockopt(zmq.PLAIN_SERVER, 1)
            self._router.bind(self._endpoint)
        except BaseException:
            self._context.destroy(0)
            raise
        self._is_skipping = False
        self._poller.register(self._router, zmq.POLLIN)
        self._poller.register(self._doorkeeper, zmq.POLLIN)

    def _close(self) -> None:
        self._poller.unregister(self._router)
        self._poller.unregister(self._doorkeeper)
        self._context.destroy(0)

    def _skip(self) -> bool:
        """Drop what is left of a message, some of it at a time; whether that was all."""
        for _ in range(_SKIPPED_AT_ONCE):
            if not self._router.recv(copy=False).more:
                self._is_skipping = False
                return True
        return False
