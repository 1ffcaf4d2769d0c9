"""The allocator: one process that owns devices' memory and says who may map what.

Owns the sockets, the sessions, the journal and the loop. Invariants: one daemon a runtime
directory; a request is answered exactly once: now, when what it waits for happens, or when its
session asks for something else; whatever a client sends, the worst it gets is a typed error; a
broken invariant of our own ends the process, since handing out wrong memory is worse than
restarting. Never imports torch.
"""

import contextlib
import logging
import os
import secrets
import signal
import socket
import time
from collections.abc import Iterator
from typing import Final

import msgspec
import zmq

from allocator.daemon.clients.bounded_router import BoundedRouter, Loss
from allocator.daemon.clients.exports import send_exports
from allocator.daemon.clients.hung_writers import HungWriters
from allocator.daemon.clients.reception import Reception
from allocator.daemon.clients.seldom import Seldom
from allocator.daemon.clients.sessions import Session, Sessions
from allocator.daemon.device.parts import Around
from allocator.daemon.devices import Devices
from allocator.daemon.journal.history import History
from allocator.daemon.journal.records import (
    JOURNAL_VERSION,
    RunBegan,
    SessionEnded,
    boot_id,
)
from allocator.daemon.journal.state_journal import StateJournal
from allocator.daemon.own_segments import OwnSegments
from allocator.daemon.settings import DaemonSettings
from allocator.daemon.weights.weight_set import ReplyTo, WeightSet
from allocator.errors import (
    AllocatorBusy,
    AllocatorError,
    DeviceError,
    InvalidMessage,
    RuntimeDirError,
    Unauthorized,
)
from allocator.lifeline import LifelineListener, Visitor, refuse, tell_to_ask_again
from allocator.messages import (
    MAX_FRAME_BYTES,
    PROTOCOL_VERSION,
    REQUEST_ID_BYTES,
    TOKEN_BYTES,
    Failed,
    Message,
    Reply,
    Request,
    Welcome,
    decode_request,
    encode,
    plain_token,
)
from allocator.processes.identity import ProcessIdentity
from allocator.runtime_dir import RuntimeDir

log = logging.getLogger("onecopy.allocator")

_REQUESTS_A_TURN: Final = 64
"""After so many requests the loop looks at the lifelines again, however busy the clients are."""
_MAX_FRAMES: Final = 5
"""Identity, request id, token and request; one more shows that there are too many."""
_MAX_WIRE_BYTES: Final = 2 * MAX_FRAME_BYTES
"""Longer frames end the connection; up to here a sender is told what is wrong."""


class Daemon:
    """The allocator of one runtime directory. `serve` runs until `stop`, or until a signal."""

    def __init__(self, runtime_dir: RuntimeDir, settings: DaemonSettings | None = None):
        """Raises AlreadyRunning, InvalidSetting, RuntimeDirError, JournalError, DeviceError."""
        self._sessions = Sessions()
        self._devices = Devices(settings or DaemonSettings())
        self._history = History()
        self._hung_writers = HungWriters()
        self._seldom = Seldom(log)
        self._started = time.monotonic()
        self._running = True
        self._poller = zmq.Poller()
        with contextlib.ExitStack() as undo:
            self._lock = runtime_dir.lock("allocator")
            undo.callback(self._lock.release)
            self._journal = StateJournal(runtime_dir.journal, self._snapshot, self._history)
            undo.callback(self._journal.close)
            self._segments = OwnSegments(runtime_dir)
            undo.callback(self._leave_to_the_next)
            self._take_over(runtime_dir)
            self._open_sockets(runtime_dir, undo)
            undo.pop_all()
        self._wake_read, self._wake_write = socket.socketpair()
        self._wake_read.setblocking(False)
        self._wake_write.setblocking(False)
        self._poller.register(self._wake_read.fileno(), zmq.POLLIN)
        for session in self._sessions:
            self._poller.register(session.fd, zmq.POLLIN)

    def _open_sockets(self, runtime_dir: RuntimeDir, undo: contextlib.ExitStack) -> None:
        self._requests = runtime_dir.allocator_requests
        try:
            self._router = BoundedRouter(
                self._requests,
                self._poller,
                self._is_client,
                max_frame_bytes=_MAX_WIRE_BYTES,
                max_frames=_MAX_FRAMES,
            )
            undo.callback(self._router.close)
            self._reception = Reception(LifelineListener(runtime_dir.lifeline), self._poller)
        except (OSError, zmq.ZMQError) as error:
            raise RuntimeDirError(
                f"no socket can be made in the runtime directory {runtime_dir.path}: "
                f"{error.strerror}. See what lies there, or choose another one with --runtime-dir."
            ) from error

    def _take_over(self, runtime_dir: RuntimeDir) -> None:
        """What an earlier daemon left and is still true; the rest is removed."""
        names, note = self._segments.names, self._journal.note
        around = Around(self._started, self._sessions, self._history, names, note, self._reply)
        self._devices.take_over(runtime_dir, self._segments, around)
        for removed in self._segments.remove_abandoned():
            self._history.add("removed", removed)
        self._journal.begin()

    def _leave_to_the_next(self) -> None:
        """The start has failed: what was adopted is still there to be adopted."""
        if not self._devices.hold_anything:
            self._journal.remove()
        self._segments.leave()

    def _is_client(self, password: bytes) -> bool:
        session = self._sessions.by_token(plain_token(password))
        return session is not None and not session.adopted

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
        events = dict(self._poller.poll(self._patience_ms()))
        if self._wake_read.fileno() in events:
            self._wake_read.recv(4096)
        # Ends before requests: what a dead client held is free for whoever asks next.
        for fd in events:
            session = self._sessions.by_fd(fd) if isinstance(fd, int) else None
            if session is not None:
                self._end_session(session)
        for fd in events:
            visitor = self._reception.take(fd) if isinstance(fd, int) else None
            if visitor is not None:
                self._hear(visitor)
        if self._reception.listener_fd in events:
            self._reception.accept(len(self._sessions))
        self._router.greet(events)
        if self._router.socket in events:
            self._answer_requests()
        now = time.monotonic()
        for device in self._devices:
            for weight_set, waiter in device.memory.sets.expired(now):
                self._reply(waiter.reply_to, waiter.session, device.still_loading(weight_set))
                self._doubt(weight_set, now)
            device.relieve(now)
        self._reception.tidy(now)
        self._keep_within_bounds(now)
        self._journal.tidy()

    def _doubt(self, weight_set: WeightSet, now: float) -> None:
        """Somebody waits in vain for its writer, who may be stopped."""
        writer = self._sessions.by_number(weight_set.writer or 0)
        if writer is not None and self._hung_writers.give_up(writer, now):
            self._history.add(
                "given up",
                f"process {writer.process.pid}, which is stopped, no longer writes "
                f"{weight_set.key}: the next who waits does",
            )
            self._end_session(writer)

    def _patience_ms(self) -> int | None:
        deadlines = [device.memory.sets.next_deadline() for device in self._devices]
        deadlines += [device.next_relief() for device in self._devices]
        deadlines += [self._reception.next_deadline()]
        if len(self._sessions):  # nobody else can send anything
            deadlines += [self._router.next_tick()]
        earliest = min((one for one in deadlines if one is not None), default=None)
        if earliest is None:
            return None
        return int(max(0.0, earliest - time.monotonic()) * 1000) + 1

    def _keep_within_bounds(self, now: float) -> None:
        """Whoever sends without end loses its sessions. Where all connections had to begin anew,
        clients learn that what they have sent may be lost."""
        loss = self._router.tick(now)
        if loss is Loss.FLOODERS:
            for session in [s for s in self._sessions if s.process.pid in self._router.flooders]:
                text = f"session {session.number}, process {session.process.pid}, sent without end"
                self._history.add("cut off", text)
                self._end_session(session)
        elif loss is Loss.ALL:
            for session in self._sessions:
                if session.lifeline is not None:
                    self._devices[session.device].stop_waiting(session)
                    tell_to_ask_again(session.lifeline)

    def _close(self) -> None:
        for device in self._devices:
            device.close()
        for session in self._sessions:
            session.close()
        self._reception.close()
        self._router.close()
        self._journal.remove()  # without segments there is nothing to journal
        self._segments.close()
        self._wake_read.close()
        self._wake_write.close()
        self._lock.release()

    # --- sessions

    def _hear(self, visitor: Visitor) -> None:
        connection = visitor.connection
        try:
            hello = visitor.hello()
            session = self._sessions.by_token(hello.resume) if hello.resume else None
            resumed = session is not None and session.adopted
            if session is not None and resumed and session.process.pid == visitor.pid:
                self._poller.unregister(session.fd)
                self._sessions.resume(hello.resume, visitor.pid, connection)
            else:
                resumed = False
                session = self._new_session(
                    visitor, hello.device, hello.model, hello.user, hello.label
                )
            welcome = Welcome(
                version=PROTOCOL_VERSION,
                pid=os.getpid(),
                token=session.token,
                requests=self._requests,
                device=session.device,
                devices=self._devices.names,
                resumed=resumed,
            )
        except EOFError:
            connection.close()
            return
        except AllocatorError as error:
            refuse(connection, error)
            return
        except OSError as error:  # of /proc, where descriptors have run out
            self._seldom.warning("a client can't be taken: %s", error)
            refuse(connection, AllocatorBusy(f"the allocator can't take a client: {error}"))
            return
        self._poller.register(session.fd, zmq.POLLIN)
        with contextlib.suppress(OSError):  # gone already: the poller says so next
            connection.send(encode(welcome))

    def _new_session(
        self, visitor: Visitor, device: str, model: str, user: str, label: str
    ) -> Session:
        process = ProcessIdentity.of(visitor.pid)
        if process is None:
            raise EOFError
        chosen = self._devices.find(device)
        session = Session(
            self._sessions.next_number(),
            process,
            secrets.token_bytes(TOKEN_BYTES),
            chosen.name,
            model,
            user,
            label,
            lifeline=visitor.connection,
        )
        self._sessions.add(session)
        chosen.begin_session(session)
        self._journal.note(session.record())
        log.debug("session %d: pid %d", session.number, process.pid)
        return session

    def _end_session(self, session: Session) -> None:
        self._poller.unregister(session.fd)
        self._sessions.remove(session)
        self._hung_writers.forget(session)
        log.debug("session %d ended: pid %d", session.number, session.process.pid)
        self._journal.note(SessionEnded(number=session.number))
        self._devices[session.device].end_session(session, time.monotonic())

    # --- requests

    def _answer_requests(self) -> None:
        for _ in range(_REQUESTS_A_TURN):
            frames = self._router.receive()
            if frames is None:
                return
            if len(frames) < 2 or len(frames[1]) != REQUEST_ID_BYTES:
                self._seldom.warning("dropped a message of %d frames: not a request", len(frames))
                continue
            identity, request_id, *rest = frames
            self._answer((identity, request_id), rest)

    def _answer(self, reply_to: ReplyTo, frames: list[bytes]) -> None:
        session: Session | None = None
        reply: Reply | None
        try:
            if len(frames) != 2:
                num_frames = len(frames) + 1
                most = " or more" if num_frames == _MAX_FRAMES - 1 else ""
                raise InvalidMessage(f"a request has 3 frames, this one {num_frames}{most}")
            token, payload = frames
            session = self._sessions.by_token(token) if len(token) == TOKEN_BYTES else None
            if session is None or session.adopted:
                raise Unauthorized("no open lifeline stands behind this token")
            request, now = _decoded(payload), time.monotonic()
            reply = self._devices[session.device].dispatch(session, reply_to, request, now)
        except AllocatorError as error:
            reply = Failed(code=error.code, message=str(error)[:4000])
        except OSError as error:
            reply = self._broken(session, error)
        if reply is not None:
            self._reply(reply_to, session.number if session is not None else 0, reply)

    def _broken(self, session: Session | None, error: OSError) -> Failed:
        """The machine refused something that is not foreseen to fail. That is this request's error,
        as long as our own books are right, which they are found to be or the daemon ends."""
        log.error("a request failed: %s", error, exc_info=error)
        if session is not None:
            self._devices[session.device].memory.check()
        text = f"the machine does not let the allocator do that: {error}"
        return Failed(code=DeviceError.code, message=text[:4000])

    def _reply(self, reply_to: ReplyTo, number: int, message: Reply) -> None:
        identity, request_id = reply_to
        session = self._sessions.by_number(number)
        if session is not None and session.lifeline is not None:
            device = self._devices[session.device]
            if device.backend.exports:
                try:
                    send_exports(device.backend, session.lifeline, request_id, message)
                except OSError as error:
                    # It holds what it can't map, and would wait for descriptors for ever.
                    log.warning("session %d ends, it can't get descriptors: %s", number, error)
                    self._end_session(session)
                    return
        frame = encode(message)
        if len(frame) > MAX_FRAME_BYTES:  # it would never arrive, and be waited for
            text = f"the answer takes {len(frame)} bytes, at most {MAX_FRAME_BYTES} can be sent"
            frame = encode(Failed(code=InvalidMessage.code, message=text))
        # What is for a peer that is gone or does not read is dropped, which is what we want: its
        # lifeline tells us when it ends.
        self._router.send(identity, request_id, frame)

    # --- the journal

    def _snapshot(self) -> Iterator[Message]:
        yield RunBegan(version=JOURNAL_VERSION, boot_id=boot_id())
        for session in self._sessions:
            yield session.record()
        for device in self._devices:
            yield from device.records()


def _decoded(payload: bytes) -> Request:
    if len(payload) > MAX_FRAME_BYTES:
        raise InvalidMessage(
            f"a request of {len(payload)} bytes; at most {MAX_FRAME_BYTES} are taken"
        )
    try:
        return decode_request(payload)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidMessage(f"not a request: {error}") from error
