"""The allocator: one process that owns a device's memory and says who may map what.

Owns the sockets, the sessions and the loop that joins weight sets to a backend. Invariants: one
daemon a runtime directory; a request is answered exactly once, now or when what it waits for
happens; whatever a client sends, the worst it gets is a typed error; a broken invariant of our own
ends the process, since handing out wrong memory is worse than restarting. Never imports torch.
"""

import contextlib
import logging
import os
import secrets
import signal
import socket
import time
from typing import Final

import msgspec
import zmq

from allocator.backends import Backend, by_name
from allocator.errors import AllocatorError, InvalidMessage, OutOfDeviceMemory, Unauthorized
from allocator.lifeline import LifelineListener, Session
from allocator.messages import (
    MAX_FRAME_BYTES,
    REQUEST_ID_BYTES,
    TOKEN_BYTES,
    Abandon,
    Done,
    Evict,
    Failed,
    GetStatistics,
    Handle,
    Open,
    Progress,
    Release,
    Reply,
    Request,
    Reserve,
    Reserved,
    Seal,
    Statistics,
    StillLoading,
    WeightSetStatistics,
    decode_request,
    encode,
)
from allocator.runtime_dir import RuntimeDir
from allocator.weight_sets import Answer, Effect, Free, ReplyTo, Waiter, WeightSet, WeightSets

log = logging.getLogger("onecopy.allocator")

_REQUESTS_A_TURN: Final = 64
"""After so many requests the loop looks at the lifelines again, however busy the clients are."""


class Daemon:
    """One device's allocator. `serve` runs until `stop`, or until a signal."""

    def __init__(
        self, runtime_dir: RuntimeDir, *, backend: str = "host", memory_limit: int | None = None
    ):
        self._backend: Backend = by_name(backend)
        self._limit = memory_limit
        self._sets = WeightSets()
        self._sessions: dict[int, Session] = {}  # by the lifeline's file descriptor
        self._by_token: dict[bytes, Session] = {}
        self._segment_number = 0
        # A client may hold a handle of the daemon before us: no name may come again.
        self._run = secrets.token_hex(4)
        self._started = time.monotonic()
        self._running = True
        with contextlib.ExitStack() as undo:
            self._lock = runtime_dir.lock("allocator")
            undo.callback(self._lock.release)
            self._prefix = runtime_dir.segment_prefix
            for name in self._backend.sweep(self._prefix):
                log.info("removed the segment %s of an allocator that is gone", name)
            self._context = zmq.Context(io_threads=1)
            undo.callback(self._context.destroy, 0)
            self._router = self._context.socket(zmq.ROUTER)
            self._router.setsockopt(zmq.LINGER, 0)
            self._router.setsockopt(zmq.MAXMSGSIZE, MAX_FRAME_BYTES)
            self._router.bind(runtime_dir.allocator_requests)
            self._requests_path = runtime_dir.allocator_requests.removeprefix("ipc://")
            self._listener = LifelineListener(runtime_dir.lifeline, runtime_dir.allocator_requests)
            undo.pop_all()
        self._wake_read, self._wake_write = socket.socketpair()
        self._wake_read.setblocking(False)
        self._wake_write.setblocking(False)
        self._poller = zmq.Poller()
        self._poller.register(self._router, zmq.POLLIN)
        self._poller.register(self._listener.fileno(), zmq.POLLIN)
        self._poller.register(self._wake_read.fileno(), zmq.POLLIN)

    # --- life

    def serve(self) -> None:
        """Run the loop, then give everything back."""
        try:
            while self._running:
                self._turn()
        finally:
            self._close()

    def stop_on_signals(self) -> None:
        """SIGTERM and SIGINT end the loop. The interpreter's own handler wakes the poll: ours in
        Python would not run where a signal came just before the poll began to wait."""
        signal.set_wakeup_fd(self._wake_write.fileno(), warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda _number, _frame: self.stop())

    def stop(self) -> None:
        """End the loop; safe in a signal handler and from another thread."""
        self._running = False
        with contextlib.suppress(BlockingIOError):  # a full pipe wakes the loop as well
            self._wake_write.send(b"\0")

    def _turn(self) -> None:
        deadline = self._sets.next_deadline()
        timeout = (
            None if deadline is None else int(max(0.0, deadline - time.monotonic()) * 1000) + 1
        )
        events = dict(self._poller.poll(timeout))
        if self._wake_read.fileno() in events:
            self._wake_read.recv(4096)
        # Ends before requests: what a dead client held is free for whoever asks next.
        for fd in events.keys() & self._sessions.keys():
            self._end_session(self._sessions[fd])
        if self._listener.fileno() in events:
            self._begin_session()
        if self._router in events:
            self._answer_requests()
        for weight_set, waiter in self._sets.expired(time.monotonic()):
            self._reply(waiter.reply_to, self._still_loading(weight_set))

    def _close(self) -> None:
        for handle in self._sets.handles():
            self._backend.free(handle.segment)
        for session in self._sessions.values():
            session.lifeline.close()
        self._listener.close()
        self._router.close(0)
        self._context.term()
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._requests_path)  # noqa: PTH108 - libzmq leaves the name behind
        self._wake_read.close()
        self._wake_write.close()
        self._lock.release()

    # --- sessions

    def _begin_session(self) -> None:
        session = self._listener.accept()
        if session is None:
            return
        self._sessions[session.lifeline.fileno()] = session
        self._by_token[session.token] = session
        self._poller.register(session.lifeline.fileno(), zmq.POLLIN)
        log.debug("session %d: pid %d", session.number, session.pid)

    def _end_session(self, session: Session) -> None:
        fd = session.lifeline.fileno()
        self._poller.unregister(fd)
        del self._sessions[fd]
        del self._by_token[session.token]
        session.lifeline.close()
        log.debug("session %d ended: pid %d", session.number, session.pid)
        self._apply(self._sets.end_session(session.number, time.monotonic()))

    def _pid(self, number: int) -> int:
        return next((s.pid for s in self._sessions.values() if s.number == number), 0)

    # --- requests

    def _answer_requests(self) -> None:
        for _ in range(_REQUESTS_A_TURN):
            try:
                frames = self._router.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            if len(frames) != 4 or len(frames[1]) != REQUEST_ID_BYTES:
                log.warning("dropped a message of %d frames: not a request", len(frames))
                continue
            identity, request_id, token, payload = frames
            reply_to = (identity, request_id)
            try:
                reply = self._handle(reply_to, token, payload)
            except AllocatorError as error:
                reply = Failed(code=error.code, message=str(error)[:4000])
            if reply is not None:
                self._reply(reply_to, reply)

    def _handle(self, reply_to: ReplyTo, token: bytes, payload: bytes) -> Reply | None:
        session = self._by_token.get(token) if len(token) == TOKEN_BYTES else None
        if session is None:
            raise Unauthorized("no open lifeline stands behind this token")
        try:
            request = decode_request(payload)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise InvalidMessage(f"not a request: {error}") from error
        return self._dispatch(session, reply_to, request)

    def _dispatch(self, session: Session, reply_to: ReplyTo, request: Request) -> Reply | None:
        now = time.monotonic()
        number = session.number
        match request:
            case Open(key=key, fingerprint=fingerprint, wait_ms=wait_ms):
                answer = self._sets.open(number, key, fingerprint)
                if answer is None:
                    self._sets.wait(key, Waiter(number, reply_to, now + wait_ms / 1000))
                return answer
            case Reserve(key=key, generation=generation, num_bytes=num_bytes):
                return self._reserve(session, key, generation, num_bytes)
            case Progress(key=key, generation=generation, num_bytes=num_bytes):
                self._sets.progress(number, key, generation, num_bytes)
            case Seal(key=key, generation=generation, manifest=manifest):
                self._seal_segment(number, key, generation)
                sealed, effects = self._sets.seal(number, key, generation, manifest)
                self._apply(effects)
                log.info("sealed %s: %d bytes", key, sealed.handle.num_bytes)
                return sealed
            case Abandon(key=key, generation=generation):
                self._apply(self._sets.abandon(number, key, generation))
            case Release(key=key, generation=generation):
                self._sets.release(number, key, generation, now)
            case Evict(key=key):
                self._apply(self._sets.evict(key))
            case GetStatistics():
                return self._statistics(now)
        return Done()

    def _reserve(self, session: Session, key: str, generation: int, num_bytes: int) -> Reserved:
        weight_set = self._sets.writing(session.number, key, generation)
        if weight_set.handle is not None:
            raise InvalidMessage(f"the weight set {key!r} already has its segment")
        self._make_room(num_bytes)
        self._segment_number += 1
        handle = Handle(
            backend=self._backend.name,
            segment=f"{self._prefix}{self._run}-{self._segment_number}",
            num_bytes=num_bytes,
            generation=generation,
        )
        self._reserve_segment(handle)
        self._sets.reserve(session.number, key, handle)
        log.info("reserved %d bytes for %s, written by pid %d", num_bytes, key, session.pid)
        return Reserved(handle=handle)

    def _make_room(self, num_bytes: int) -> None:
        busy = [(s, s.handle) for s in self._sets if s.handle is not None and s.state != "idle"]
        busy_bytes = sum(handle.num_bytes for _, handle in busy)
        if self._limit is None:
            return  # the device itself says when it is full
        if busy_bytes + num_bytes > self._limit:  # evicting what is idle would be in vain
            holders = ", ".join(
                f"{s.key} ({s.state}, {handle.num_bytes / 1e6:.1f} MB)" for s, handle in busy
            )
            used = f", and {busy_bytes / 1e6:.1f} MB of it are in use: {holders}. Stop one of them,"
            raise OutOfDeviceMemory(
                f"{num_bytes / 1e6:.1f} MB are needed, but the limit is {self._limit / 1e6:.1f} MB"
                f"{used + ' or raise' if busy else '. Raise'} --memory-limit."
            )
        while self._sets.used_bytes() + num_bytes > self._limit:
            self._evict_one()

    def _reserve_segment(self, handle: Handle) -> None:
        """Others use the device as well, so it can be short below our limit: idle sets go then,
        unless even an otherwise empty device could not hold the segment."""
        in_vain = handle.num_bytes > self._backend.limit_bytes()
        while True:
            try:
                self._backend.reserve(handle.segment, handle.num_bytes)
            except OutOfDeviceMemory:
                if in_vain or not self._evict_one():
                    raise
            else:
                return

    def _evict_one(self) -> bool:
        idle = self._sets.least_recently_used()
        if idle is None:
            return False
        log.info("evicting %s, which nobody reads", idle.key)
        self._apply(self._sets.evict(idle.key))
        return True

    def _seal_segment(self, number: int, key: str, generation: int) -> None:
        handle = self._sets.writing(number, key, generation).handle
        if handle is not None:
            self._backend.seal(handle.segment)

    # --- effects and replies

    def _apply(self, effects: list[Effect]) -> None:
        for effect in effects:
            match effect:
                case Free(handle=handle):
                    self._backend.free(handle.segment)
                case Answer(waiter=waiter, message=message):
                    self._reply(waiter.reply_to, message)

    def _reply(self, reply_to: ReplyTo, message: Reply) -> None:
        identity, request_id = reply_to
        # A ROUTER drops what is for a peer that is gone or does not read, which is what we want:
        # its lifeline tells us when it ends.
        self._router.send_multipart([identity, request_id, encode(message)])

    def _still_loading(self, weight_set: WeightSet) -> StillLoading:
        return StillLoading(
            writer_pid=self._pid(weight_set.writer) if weight_set.writer is not None else 0,
            num_bytes=weight_set.written_bytes,
            total_bytes=weight_set.handle.num_bytes if weight_set.handle is not None else 0,
        )

    def _statistics(self, now: float) -> Statistics:
        return Statistics(
            pid=os.getpid(),
            uptime_s=now - self._started,
            device=self._backend.device,
            limit_bytes=min(self._limit or 1 << 62, self._backend.limit_bytes()),
            used_bytes=self._sets.used_bytes(),
            num_sessions=len(self._sessions),
            weight_sets=tuple(
                WeightSetStatistics(
                    key=s.key,
                    state=s.state,
                    generation=s.generation,
                    segment=s.handle.segment if s.handle is not None else "",
                    num_bytes=s.handle.num_bytes if s.handle is not None else 0,
                    written_bytes=s.written_bytes,
                    writer_pid=self._pid(s.writer) if s.writer is not None else None,
                    reader_pids=tuple(self._pid(number) for number in s.readers.elements()),
                    idle_s=now - s.idle_since if s.state == "idle" else 0.0,
                )
                for s in self._sets
            ),
        )


def run(
    runtime_dir: RuntimeDir, *, memory_limit: int | None = None, ready_fd: int | None = None
) -> None:
    """Serve until SIGTERM or SIGINT; `ready_fd` gets one byte, and is closed, once clients can
    connect. Raises AlreadyRunning."""
    os.umask(0o077)
    daemon = Daemon(runtime_dir, memory_limit=memory_limit)
    daemon.stop_on_signals()
    log.info("allocator ready in %s", runtime_dir.path)
    if ready_fd is not None:
        os.write(ready_fd, b"\n")
        os.close(ready_fd)
    daemon.serve()
    log.info("allocator stopped")
