"""One instance's process: its engine is put together, and fed from the server's socket.

Owns the instance's life from its fork to its exit. Invariants: it announces itself exactly once,
as ready or as failed; its pulse says what it is at before it is at it; while requests run, messages
are read between steps and never waited for; whatever a request holds, it is answered; after a drain
every accepted request has ended. Does not know text.
"""

import contextlib
import logging
import os
import signal
import socket
import time
from collections.abc import Callable
from typing import Final

import msgspec
import zmq

from allocator import (
    AllocatorError,
    Client,
    RuntimeDir,
    connect,
)
from workers.config.architecture import architecture_errors
from workers.engine.protocol import Engine
from workers.errors import InstanceLost, RanksLost, WorkerError
from workers.messages import (
    MAX_FRAME_BYTES,
    PROTOCOL_VERSION,
    Abort,
    Drain,
    Embed,
    Embedded,
    FromInstance,
    Generate,
    InstanceSpec,
    Loading,
    Output,
    Ready,
    StartFailed,
    decode_from_instance,
    decode_to_instance,
    encode,
)
from workers.process import linux
from workers.process.assembly import Assembled, Assembly
from workers.process.cores import SharedCores
from workers.process.first_rank import FirstRank
from workers.process.inbox import named
from workers.process.node_pinning import pin_first
from workers.process.outbox import frames
from workers.process.pulse import Pulse
from workers.process.rank_processes import RankProcesses, end_as

log = logging.getLogger("onecopy.instance")

_LINGER_MS: Final = 2000
"""How long the last outputs may take to leave at the end."""
_PATIENCE_S: Final = 1.0
"""How long a step may wait for the allocator, once; not at all for one that is silent already."""
_STALLED_MS: Final = 20
"""How long to wait before asking again for KV memory where there was none."""


def run(spec: InstanceSpec, pulse: Pulse, processes: RankProcesses | None = None) -> int:
    """The instance's whole life; `processes` are its further ranks. Returns the process's exit
    status, unless a rank was ended by a signal: then that ends this process, too."""
    ended = None
    try:
        status, lost = _run(spec, pulse, processes)
        if processes is not None and isinstance(lost, RanksLost):
            ended = processes.status(lost.rank)
    finally:
        if processes is not None:
            processes.close()
    end_as(ended)
    return status


def _run(
    spec: InstanceSpec, pulse: Pulse, processes: RankProcesses | None
) -> tuple[int, InstanceLost | None]:
    linux.set_process_name(f"onecopy:{spec.name}")
    context = zmq.Context(io_threads=1)
    server = context.socket(zmq.DEALER)
    server.setsockopt(zmq.LINGER, _LINGER_MS)
    server.setsockopt(zmq.MAXMSGSIZE, MAX_FRAME_BYTES)
    # Whoever else connects is turned away before a byte is read (SO_PEERCRED).
    server.setsockopt(zmq.IPC_FILTER_PID, spec.server_pid)
    server.bind(spec.engines)
    try:
        return _Instance(spec, server, pulse, processes).run(), None
    except RanksLost as lost:
        log.error("instance %s ends, and its requests go on elsewhere: %s", spec.name, lost)  # noqa: TRY400 - nobody's code is to blame
        return 1, lost
    except InstanceLost as lost:
        log.exception("instance %s ends, and its requests go on elsewhere", spec.name)
        return 1, lost
    finally:
        server.close()
        context.term()


class _Instance:
    def __init__(
        self,
        spec: InstanceSpec,
        server: "zmq.Socket[bytes]",
        pulse: Pulse,
        processes: RankProcesses | None,
    ):
        self._spec = spec
        self._settings = spec.settings
        self._server = server
        self._pulse = pulse
        self._draining = False
        self._phases: dict[str, float] = {}
        self._phase_start = spec.requested_at
        self._cores: SharedCores | None = None
        self._resources = contextlib.ExitStack()
        """What must end before the session."""
        self._processes = processes
        self._ranks: FirstRank | None = None
        self._warm_up: Callable[[], None] | None = None
        """A first pass, where none was made yet."""

    def run(self) -> int:
        self._ended("fork")
        with contextlib.ExitStack() as stack:
            try:
                # Threads that begin from here on are on the first rank's node, too.
                pinning = pin_first(self._settings)
                memory = stack.enter_context(self._connect())
                stack.enter_context(self._resources)
                assembly = Assembly(
                    self._spec,
                    memory,
                    self._resources,
                    self._processes,
                    self._pulse.works_on,
                    self._loading,
                    self._ended,
                    pinning,
                )
                assembled = assembly.assemble()
                self._cores, self._ranks = assembly.cores, assembled.ranks
                self._announce(assembled)
            except (WorkerError, AllocatorError) as error:
                return self._failed(error.code, str(error))
            except Exception as error:
                # The architectures are not our code: whatever they raise is shown to a person.
                log.exception("the instance can't serve %s", self._spec.model)
                return self._failed("internal", f"{type(error).__name__}: {error}")
            memory.hurry(_PATIENCE_S, self._pulse.allocator_silent_since)
            self._serve(assembled.engine)
        return 0

    def _failed(self, code: str, message: str) -> int:
        """The exit status of one that can't be ready, which it says."""
        self._send(StartFailed(code=code, message=message[:60_000]))
        return 1

    # --- start

    def _connect(self) -> Client:
        memory = connect(
            RuntimeDir.open(self._spec.runtime_dir, create=False),
            device=self._settings.device,
            model=self._spec.served_model_name[:256],
            label=f"instance {self._spec.name}",
        )
        self._ended("connect")
        return memory

    def _announce(self, made: Assembled) -> None:
        linux.trim_heap()
        self._phases["total"] = (time.monotonic() - self._spec.requested_at) * 1000
        ready = Ready(
            version=PROTOCOL_VERSION,
            pid=os.getpid(),
            facts=made.facts,
            loaded=made.weights.loaded,
            weight_set=made.weights.reader.key,
            startup_ms=self._phases,
            metadata=made.weights.facts,
            cpu_kernels=made.kernels or "",
            rank_pids=() if made.ranks is None else made.ranks.pids,
        )
        # What the checkpoint says went into it; the server would drop what does not fit, and wait.
        with architecture_errors(f"{made.facts.architecture} can't be served by this config.json"):
            decode_from_instance(encode(ready))
        self._send(ready)
        if not made.weights.loaded:
            self._warm_up = made.warm_up

    def _loading(self, num_bytes: int, total_bytes: int, writer_pid: int) -> None:
        self._send(
            Loading(
                num_bytes=num_bytes,
                total_bytes=total_bytes,
                writer=writer_pid == os.getpid(),
                writer_pid=writer_pid,
            )
        )

    def _ended(self, phase: str) -> None:
        now = time.monotonic()
        self._phases[phase] = (now - self._phase_start) * 1000
        self._phase_start = now

    # --- serve

    def _serve(self, engine: Engine) -> None:
        # A first pass touches every weight, so its length grows with the model: an instance that
        # attached is ready before it, and makes it only if no request is there to do so.
        if self._warm_up is not None and not self._server.poll(0):
            self._warm_up()
            linux.trim_heap()
        poller = zmq.Poller()
        poller.register(self._server, zmq.POLLIN)
        wake_read, wake_write = socket.socketpair()
        with wake_read, wake_write:
            wake_read.setblocking(False)
            wake_write.setblocking(False)
            poller.register(wake_read.fileno(), zmq.POLLIN)
            for link in () if self._ranks is None else self._ranks.links:
                poller.register(link.fileno(), zmq.POLLIN)
            signal.set_wakeup_fd(wake_write.fileno(), warn_on_full_buffer=False)
            signal.signal(signal.SIGTERM, lambda _number, _frame: self._drain())
            try:
                self._loop(engine, poller, wake_read)
            finally:
                signal.set_wakeup_fd(-1)
                engine.close()

    def _loop(self, engine: Engine, poller: zmq.Poller, wake: socket.socket) -> None:
        while engine.has_work or not self._draining:
            had_work = engine.has_work
            wait_ms = _STALLED_MS if engine.is_stalled else 0
            events = dict(poller.poll(wait_ms if had_work else None))
            if wake.fileno() in events:
                wake.recv(4096)
            if self._ranks is not None:
                self._ranks.check()
            if self._server in events:
                self._read(engine)
                self._pulse.end()
            if engine.has_work:
                if self._cores is not None:
                    self._cores.begin()
                self._pulse.begin()
                outputs = engine.step()
                self._report(engine, outputs)
                self._pulse.end()
            elif had_work:  # the last was aborted: no step says so
                self._report(engine, ())

    def _report(self, engine: Engine, outputs: tuple[Output | Embedded, ...]) -> None:
        for frame in frames(engine.report(outputs), engine.abort):
            self._server.send(frame)
        if not engine.has_work:
            if self._cores is not None:
                self._cores.end()
            if self._ranks is not None:
                self._ranks.rest()
            linux.trim_heap()
            self._check(engine)

    def _check(self, engine: Engine) -> None:
        """An idle moment: see that what is held is what is used. A leak is for the log, not a
        reason to end the streams that come next."""
        try:
            engine.check()
        except AssertionError:
            log.exception("the engine's books do not add up")

    def _read(self, engine: Engine) -> None:
        while True:
            try:
                frame = self._server.recv(zmq.NOBLOCK)
            except zmq.Again:
                return
            self._pulse.took(1)
            try:
                message = decode_to_instance(frame)
            except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
                log.exception("a message is not one of the protocol's")
                self._refuse(engine, named(frame), f"it can't be read: {error}")
                continue
            match message:
                case Generate() | Embed():
                    self._pulse.begin([message.request_id])
                    engine.add(message)
                case Abort(request_id=request_id):
                    engine.abort(request_id)
                case Drain():
                    self._drain()

    def _refuse(self, engine: Engine, request_id: str, problem: str) -> None:
        """Who sent it waits for an answer."""
        if request_id:
            engine.refuse(request_id, f"the instance can't take the request: {problem}")

    def _drain(self) -> None:
        self._draining = True

    def _send(self, message: FromInstance) -> None:
        self._server.send(encode(message))
